"""Pictures of results by matplotlib, which is imported only when a picture is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gdopt._checks import whole_number
from gdopt._errors import GdoptError, InputError
from gdopt._result import RangeTest, Result, ends
from gdopt._settings import own_work
from gdopt._types import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["descent", "lr_find", "schedule"]


def __dir__() -> list[str]:
    return __all__


_DOTTED = 40  # the most points of a line that shows them one by one
_MEANS = 30  # the most points of the averaged line through a noisy one


def descent(result: Result | Sequence[Result] | Mapping[str, Result]) -> Figure:
    """Draw the loss, the gradient norm and the learning rate over the steps of a run, or of several.

    Args:
        result: the result of ``gdopt.minimize``. To compare runs, pass several: a list, or a dict by names.

    Returns:
        A ``matplotlib.figure.Figure`` with one panel above the other: the loss, the gradient norm and, if it is known,
        the rate of each update. The validation loss is in the first one, with a dot for each epoch. Several runs have a
        color each, and their validation losses are dashed. Values that span decades have a logarithmic axis, and those
        of mini-batches a line of means. A cross at the upper edge stands for a value that is infinite, NaN or beyond
        1e200. The figure is made without pyplot, so no window opens and nothing has to be closed:
        ``.savefig("descent.png")``, or show it in a notebook.

    Raises:
        GdoptError: if matplotlib is missing, with the command that installs it.
        InputError: for a result from inside jit, vmap or grad, which has no history; and for no result at all.

    Example:
        >>> import gdopt
        >>> result = gdopt.minimize(lambda x: x**2, 1.0, learning_rate=0.1)
        >>> figure = gdopt.plot.descent(result)
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['loss', 'gradient norm', 'learning rate']
        >>> figure = gdopt.plot.descent({"0.1": result, "default": gdopt.minimize(lambda x: x**2, 1.0)})
    """
    runs = _runs(result)
    alone = isinstance(result, Result)
    panels = 3 if any(np.isfinite(run.learning_rate).any() for run in runs) else 2
    figure = _figure(2 + 1.5 * panels)
    rows = figure.subplots(panels, sharex=True, height_ratios=[2, 1, 1][:panels])
    if alone:
        rows[0].set_title(runs[0].title)
    losses = _spans_decades(np.concatenate([np.append(run.loss, run.validation_loss) for run in runs]))
    norms = _spans_decades(np.concatenate([run.grad_norm for run in runs]))
    rates = np.concatenate([run.learning_rate for run in runs])
    # A cycle from nearly 0 spans decades too, but few of its rates are small: a linear axis shows it best.
    decays = _spans_decades(rates) and np.nanmedian(rates) < np.nanmax(rates) / 10
    for number, run in enumerate(runs):
        colors = ("C0", "C1", "C2") if alone else (f"C{number}",) * 3
        _line(rows[0], "loss", run.loss, colors[0], log=losses, each=run.each, name=run.name)
        _validation(rows[0], run, "C3" if alone else colors[0], dashed=not alone)
        _line(rows[1], "gradient norm", run.grad_norm, colors[1], log=norms, each=run.each, name=run.name)
        if panels == 3:
            _line(rows[2], "learning rate", run.learning_rate, colors[2], log=decays)
    if panels == 3 and not decays:
        rows[2].set_ylim(bottom=0)
    for axes in rows[: 2 if alone else 1]:
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="upper right", fontsize="small")
    rows[-1].set_xlabel("step")
    rows[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.align_ylabels()
    return figure


class _Run(NamedTuple):
    """A run to be drawn."""

    name: str  # "" for a run alone
    title: str
    loss: np.ndarray
    grad_norm: np.ndarray
    learning_rate: np.ndarray
    validation_loss: np.ndarray
    validation_steps: np.ndarray
    each: int  # the steps that are averaged; 0 without noise


def _runs(given: Any) -> list[_Run]:
    """Return the runs of a result, of a list of results, or of a dict of them."""
    if isinstance(given, Result):
        return [_run("", given)]
    named = given if isinstance(given, Mapping) else {f"run {k}": each for k, each in enumerate(given)}
    if not named:
        raise InputError("result holds no runs to compare. Pass at least one result.")
    for name, each in named.items():
        if not isinstance(each, Result):
            raise InputError(f"{name!r} of result is a {type(each).__name__}. Pass results of gdopt.minimize.")
    return [_run(str(name), each) for name, each in named.items()]


def _run(name: str, result: Result) -> _Run:
    if result.history is None:
        which = f"{name!r} of result" if name else "result"
        raise InputError(f"{which} is of a run inside jit, vmap or grad, so it has no history. Make the run outside.")
    loss, grad_norm, learning_rate = (np.asarray(entries, float) for entries in result.history[:3])
    steps = f"{result.steps} step{'' if result.steps == 1 else 's'}"
    title = f"{ends(result.status)} after {steps}, returned loss {result.loss:.4g}"
    each = 0 if result.steps_per_epoch is None else max(result.steps_per_epoch, len(loss) // _MEANS, 2)
    made = learning_rate[: result.steps]  # No update is made from the last point.
    validation = np.asarray(result.history.validation_loss, float), np.asarray(result.history.validation_steps)
    return _Run(name, title, loss, grad_norm, made, *validation, each)


def lr_find(result: RangeTest, *, ax: Axes | None = None) -> Figure:
    """Draw a range test: the raw and smoothed loss over the rate, with the suggestions, and the rate over the steps.

    Args:
        result: the result of ``gdopt.lr_find``.
        ax: ``matplotlib.axes.Axes`` to draw only the loss into; by default a new figure with both.

    Returns:
        The ``matplotlib.figure.Figure``, made without pyplot; with ``ax``, its figure. The upper edge lies a little
        above the loss at the start, so the blow-up leaves the picture.

    Raises:
        GdoptError: if matplotlib is missing, with the command that installs it.

    Example:
        >>> import gdopt, jax.numpy as jnp
        >>> test = gdopt.lr_find(lambda x: jnp.sum(x**2 * jnp.array([1.0, 9.0])), jnp.ones(2))
        >>> figure = gdopt.plot.lr_find(test)
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['learning rate', 'step']
    """
    below = None
    if ax is None:
        panels: list[Axes] = list(_figure(5.5).subplots(2, height_ratios=[3, 1]))
        ax, below = panels
    rates, raw, smoothed = result.learning_rate, result.losses, result.smoothed_loss
    for row in raw:
        ax.plot(rates, np.where(_drawable(row), row, np.nan), color="C0", alpha=0.3, linewidth=0.8)
    ax.plot(rates, np.where(_drawable(smoothed), smoothed, np.nan), color="C0", label="smoothed loss")
    for number, (name, rate) in enumerate(result.suggestions.items(), 1):
        if rate is not None:
            height = np.interp(np.log(rate), np.log(rates), smoothed)
            ax.plot(rate, height, "o", color=f"C{number}", label=f"{name}: {rate:.2g}")
    if result.suggestion is not None:
        ax.axvline(result.suggestion, color="C1", linestyle="--", label=f"suggestion: {result.suggestion:.2g}")
    drawn = smoothed[_drawable(smoothed)]
    top = drawn[: max(len(drawn) // 10, 1)].max(initial=-np.inf)
    if drawn.size and top > drawn.min():
        fall = top - drawn.min()
        ax.set_ylim(min(drawn.min(), raw[_drawable(raw)].min()) - 0.1 * fall, top + 0.4 * fall)
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
    return ax.figure.figure  # the second one leads from a subfigure to its figure


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
    ax = _figure(3).subplots() if ax is None else ax
    log = _spans_decades(rates) and np.median(rates) < rates.max() / 10
    ax.plot(np.arange(len(rates)), rates, color="C2")
    ax.set_yscale("log" if log else "linear")
    if not log:
        ax.set_ylim(bottom=0)
    ax.set_xlabel("step")
    ax.set_ylabel("learning rate")
    return ax.figure.figure


def _figure(height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GdoptError('gdopt.plot needs matplotlib. Run pip install "gdopt[plot]"') from error
    return Figure(figsize=(7, height), layout="constrained")


def _line(axes: Axes, label: str, values: np.ndarray, color: str, *, log: bool, each: int = 0, name: str = "") -> None:
    steps, drawn = np.arange(len(values)), _drawable(values)
    means = 0 < 2 * each <= len(values)
    x, y = steps[drawn], values[drawn]
    faint = {"alpha": 0.35, "linewidth": 0.8} if means else {}
    style: dict[str, Any] = {"marker": "."} if len(values) <= _DOTTED else faint
    axes.plot(x, y, color=color, label=name if name and not means else None, **style)
    if means:
        axes.plot(_means(x, each), _means(y, each), color=color, label=name or f"mean of {each} steps")
    _crosses(axes, steps[~drawn])
    axes.set_ylabel(label)
    axes.set_yscale("log" if log else "linear")


def _validation(axes: Axes, run: _Run, color: str, *, dashed: bool) -> None:
    """Draw the validation losses, if there are any."""
    if not run.validation_loss.size:
        return
    drawn = _drawable(run.validation_loss)
    style: dict[str, Any] = {"linestyle": "--" if dashed else "-"}
    style |= {"marker": "."} if len(drawn) <= _DOTTED else {}
    label = f"{run.name}, validation" if run.name else "validation"
    axes.plot(run.validation_steps[drawn], run.validation_loss[drawn], color=color, label=label, **style)
    _crosses(axes, run.validation_steps[~drawn])


def _crosses(axes: Axes, steps: np.ndarray) -> None:
    """Mark the steps whose values cannot be drawn."""
    if steps.size:
        axes.plot(steps, np.ones(steps.size), "rx", transform=axes.get_xaxis_transform(), clip_on=False)


def _drawable(values: np.ndarray) -> np.ndarray:
    """Tell which values are finite and far enough from the end of float64 for the ticks above them to be finite."""
    return np.abs(values) < 1e200


def _spans_decades(values: np.ndarray) -> bool:
    """Tell whether values span two decades, so that a logarithmic axis is sure to have two labels."""
    y = values[_drawable(values)]
    return bool((y >= 0).all() and (y > 0).any() and y.max() / 100 > y[y > 0].min())


def _means(values: np.ndarray, each: int) -> list[float]:
    return [values[i : i + each].mean() for i in range(0, len(values) - each + 1, each)]
