"""Range tests and schedules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gdopt._checks import whole_number
from gdopt._errors import InputError
from gdopt._pictures.canvas import axes_of, drawable, figure_of, new_figure, spans_decades
from gdopt._result import RangeTest
from gdopt._settings import own_work
from gdopt._types import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def lr_find(result: RangeTest, *, ax: Axes | None = None) -> Figure:
    """Draw a range test: the raw and smoothed loss over the rate, with the suggestions, and the rate over the steps.

    Args:
        result: the result of ``gdopt.lr_find``.
        ax: ``matplotlib.axes.Axes`` to draw only the loss into; by default a new figure with both.

    Returns:
        The ``matplotlib.figure.Figure``, made without pyplot; with ``ax``, its figure. The upper edge lies a little
        above the loss at the start, so the blow-up leaves the picture. A dot on the smoothed curve marks the rate that
        each rule suggests, but for two: "steep" marks where the curve falls fastest before its minimum, and "minimum"
        marks the minimum itself. If the rule suggests another rate than the marked one, the legend says so: the rule
        "minimum" suggests a tenth, and "steep" may suggest a rate behind the minimum, where the blow-up has spikes.

    Raises:
        GdoptError: if matplotlib is missing, with the command that installs it.

    Example:
        >>> import gdopt, jax.numpy as jnp
        >>> test = gdopt.lr_find(lambda x: jnp.sum(x**2 * jnp.array([1.0, 9.0])), jnp.ones(2))
        >>> figure = gdopt.plot.lr_find(test)
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['learning rate', 'step']
    """
    if not isinstance(result, RangeTest):
        raise InputError(f"result is a {type(result).__name__}. Pass the result of gdopt.lr_find.")
    below = None
    if ax is None:
        panels: list[Axes] = list(new_figure(5.5).subplots(2, height_ratios=[3, 1]))
        ax, below = panels
    rates, raw, smoothed = result.learning_rate, result.losses, result.smoothed_loss
    for row in raw:
        ax.plot(rates, np.where(drawable(row), row, np.nan), color="C0", alpha=0.3, linewidth=0.8)
    ax.plot(rates, np.where(drawable(smoothed), smoothed, np.nan), color="C0", label="smoothed loss")
    for number, (name, rate) in enumerate(result.suggestions.items(), 1):
        if rate is not None:
            at = _marked(name, rate, rates, smoothed)
            height = np.interp(np.log(at), np.log(rates), smoothed)
            label = f"{name}: {at:.2g}" + ("" if at == rate else f", suggests {rate:.2g}")
            ax.plot(at, height, "o", color=f"C{number}", label=label)
    if result.suggestion is not None:
        ax.axvline(result.suggestion, color="C1", linestyle="--", label=f"suggestion: {result.suggestion:.2g}")
    _limit(ax, raw, smoothed)
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel("loss")
    ax.legend(loc="best", fontsize="small")
    if below is not None:
        ax.set_title(
            "no suggestion" if result.suggestion is None else f"suggested learning rate {result.suggestion:.3g}"
        )
        below.plot(np.arange(len(rates)), rates, color="C2")
        below.set_yscale("log")
        below.set_xlabel("step")
        below.set_ylabel("learning rate")
    return figure_of(ax)


def _marked(name: str, rate: float, rates: np.ndarray, smoothed: np.ndarray) -> float:
    """Return the rate at which the mark of a rule stands: where the drawn curve shows what its name says."""
    if name not in ("steep", "minimum"):
        return rate
    known = np.where(drawable(smoothed), smoothed, np.inf)
    bottom = int(known.argmin())
    if name == "minimum":
        return float(rates[bottom])
    first = len(rates) // 10  # The average of the first few losses wavers, and the rule leaves these out as well.
    if bottom <= first:
        return rate
    slopes = np.diff(smoothed[first : bottom + 1]) / np.diff(np.log(rates[first : bottom + 1]))
    return float(rates[first + int(np.argmin(slopes))])


def _limit(ax: Axes, raw: np.ndarray, smoothed: np.ndarray) -> None:
    """Leave the blow-up out of the picture."""
    drawn = smoothed[drawable(smoothed)]
    top = drawn[: max(len(drawn) // 10, 1)].max(initial=-np.inf)
    if drawn.size and top > drawn.min():
        fall = top - drawn.min()
        ax.set_ylim(min(drawn.min(), raw[drawable(raw)].min()) - 0.1 * fall, top + 0.4 * fall)


def schedule(schedule: Schedule, steps: int, *, ax: Axes | None = None) -> Figure:
    """Draw the rates of a schedule over a number of steps.

    Args:
        schedule: any ``step -> rate``, gdopt's, optax's or your own.
        steps: the number of steps, from step 0 on.
        ax: ``matplotlib.axes.Axes`` to draw into; by default a new figure.

    Returns:
        The ``matplotlib.figure.Figure``, made without pyplot; with ``ax``, its figure.

    Raises:
        GdoptError: if matplotlib is missing, with the command that installs it.
        InputError: for a schedule that is not a function, or steps that are not a positive whole number.

    Example:
        >>> import gdopt
        >>> figure = gdopt.plot.schedule(gdopt.schedules.triangular2(0.1, 0.5, step_size_up=20), 120)
        >>> figure.axes[0].get_ylabel()
        'learning rate'
    """
    if not callable(schedule):
        raise InputError(f"schedule={schedule!r} is not a function. Pass one (for example of gdopt.schedules).")
    with own_work():
        rates = np.array([schedule(step) for step in range(whole_number("steps", steps))], float)
    ax = axes_of(ax, 3)
    log = spans_decades(rates) and np.median(rates) < rates.max() / 10
    ax.plot(np.arange(len(rates)), rates, color="C2")
    ax.set_yscale("log" if log else "linear")
    if not log:
        ax.set_ylim(bottom=0)
    ax.set_xlabel("step")
    ax.set_ylabel("learning rate")
    return figure_of(ax)
