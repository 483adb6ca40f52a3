"""The loss, the gradient norm and the rate over the steps of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gdopt._errors import InputError
from gdopt._pictures.canvas import (
    DOTTED,
    axes_of,
    drawable,
    figure_of,
    named_results,
    new_figure,
    spans_decades,
    title_of,
)
from gdopt._pictures.trials import rejected
from gdopt._result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MEANS = 30  # the most points of the averaged line through a noisy one
_PANELS = ("loss", "gradient norm", "learning rate")


def descent(
    result: Result | Sequence[Result] | Mapping[str, Result], *, ax: Axes | Sequence[Axes] | None = None
) -> Figure:
    """Draw the loss, the gradient norm and the learning rate over the steps of a run, or of several.

    Args:
        result: the result of ``gdopt.minimize``. To compare runs, pass several: a list, or a dict by names.
        ax: one ``matplotlib.axes.Axes`` to draw only the loss into; or a sequence of two (loss, gradient norm) or of
            three (the learning rate as well, if it is known). By default a new figure with all that is known.

    Returns:
        A ``matplotlib.figure.Figure`` with one panel above the other: the loss, the gradient norm and, if it is known,
        the rate of each update. The validation loss is in the first one, with a dot for each epoch. Several runs have a
        color each, and their validation losses are dashed. Values that span decades have a logarithmic axis, and those
        of mini-batches a line of means. A cross at the upper edge stands for a value that is infinite, NaN or beyond
        1e200. If the optimizer takes points back (`quasi_newton` and `spectral` do), a ring in the first panel marks
        each trial whose loss was too high for it. The figure is made without pyplot, so no window opens and nothing has
        to be closed: ``.savefig("descent.png")``. A notebook shows it as the last value of a cell.

    Raises:
        GdoptError: if matplotlib is missing, with the command that installs it.
        InputError: for a result from inside jit, vmap or grad, which has no history; for no result at all; and for more
            axes than panels.

    Example:
        >>> import gdopt
        >>> result = gdopt.minimize(lambda x: x**2, 1.0, learning_rate=0.1)
        >>> figure = gdopt.plot.descent(result)
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['loss', 'gradient norm', 'learning rate']
        >>> figure = gdopt.plot.descent({"0.1": result, "default": gdopt.minimize(lambda x: x**2, 1.0)})
    """
    runs = [_run(name, each) for name, each in named_results(result).items()]
    alone = isinstance(result, Result)
    panels = 3 if any(np.isfinite(run.learning_rate).any() for run in runs) else 2
    rows = _new_rows(panels) if ax is None else _given_rows(ax, panels)
    if alone:
        rows[0].set_title(runs[0].title)
    logs = _logarithmic(runs)
    for number, run in enumerate(runs):
        colors = ("C0", "C1", "C2") if alone else (f"C{number}", f"C{number}", f"C{number}")
        _draw(run, rows, colors, logs, alone=alone)
    if len(rows) == 3 and not logs[2]:
        rows[2].set_ylim(bottom=0)
    for axes in rows[: 2 if alone else 1]:
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="upper right", fontsize="small")
    rows[-1].set_xlabel("step")
    if ax is None:
        locator: Any = rows[-1].xaxis.get_major_locator()
        locator.set_params(integer=True, min_n_ticks=1)
        figure_of(rows[0]).align_ylabels()
    return figure_of(rows[0])


def _new_rows(panels: int) -> list[Axes]:
    figure = new_figure(2 + 1.5 * panels)
    return list(figure.subplots(panels, sharex=True, height_ratios=[2, 1, 1][:panels]))


def _given_rows(ax: Any, panels: int) -> list[Axes]:
    """Return the given axes as a list; raise InputError if there are none, or more than panels."""
    if hasattr(ax, "plot"):
        return [ax]
    rows = list(np.ravel(np.asarray(ax, object)))
    if not 1 <= len(rows) <= panels:
        unknown = "" if panels == 3 else " (the learning rate is not known)"
        raise InputError(
            f"ax holds {len(rows)} axes, but the picture has {panels} panels: {', '.join(_PANELS[:panels])}{unknown}. "
            f"Pass 1 to {panels} axes."
        )
    return [axes_of(row, 0) for row in rows]


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
    rejected: np.ndarray  # the steps of trials that were taken back


def _run(name: str, result: Result) -> _Run:
    assert result.history is not None
    loss, grad_norm, learning_rate = (np.asarray(entries, float) for entries in result.history[:3])
    each = 0 if result.steps_per_epoch is None else max(result.steps_per_epoch, len(loss) // _MEANS, 2)
    made = learning_rate[: result.steps]  # No update is made from the last point.
    validation = np.asarray(result.history.validation_loss, float), np.asarray(result.history.validation_steps)
    return _Run(name, title_of(result), loss, grad_norm, made, *validation, each, rejected(result))


def _logarithmic(runs: list[_Run]) -> tuple[bool, bool, bool]:
    """Tell which panels have a logarithmic axis."""
    losses = spans_decades(np.concatenate([np.append(run.loss, run.validation_loss) for run in runs]))
    norms = spans_decades(np.concatenate([run.grad_norm for run in runs]))
    rates = np.concatenate([run.learning_rate for run in runs])
    # A cycle from nearly 0 spans decades too, but few of its rates are small: a linear axis shows it best.
    return losses, norms, spans_decades(rates) and bool(np.nanmedian(rates) < np.nanmax(rates) / 10)


def _draw(
    run: _Run, rows: list[Axes], colors: tuple[str, str, str], logs: tuple[bool, bool, bool], *, alone: bool
) -> None:
    """Draw one run into as many panels as there are axes."""
    _line(rows[0], "loss", run.loss, colors[0], log=logs[0], each=run.each, name=run.name)
    _validation(rows[0], run, "C3" if alone else colors[0], dashed=not alone)
    _rings(rows[0], run, "C3" if alone else colors[0], alone=alone)
    if len(rows) > 1:
        _line(rows[1], "gradient norm", run.grad_norm, colors[1], log=logs[1], each=run.each, name=run.name)
    if len(rows) > 2 and np.isfinite(run.learning_rate).any():  # Otherwise its rates are not known.
        _line(rows[2], "learning rate", run.learning_rate, colors[2], log=logs[2])


def _line(axes: Axes, label: str, values: np.ndarray, color: str, *, log: bool, each: int = 0, name: str = "") -> None:
    steps, drawn = np.arange(len(values)), drawable(values)
    means = 0 < 2 * each <= len(values)
    x, y = steps[drawn], values[drawn]
    faint = {"alpha": 0.35, "linewidth": 0.8} if means else {}
    style: dict[str, Any] = {"marker": "."} if len(values) <= DOTTED else faint
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
    drawn = drawable(run.validation_loss)
    style: dict[str, Any] = {"linestyle": "--" if dashed else "-"}
    style |= {"marker": "."} if len(drawn) <= DOTTED else {}
    label = f"{run.name}, validation" if run.name else "validation"
    axes.plot(run.validation_steps[drawn], run.validation_loss[drawn], color=color, label=label, **style)
    _crosses(axes, run.validation_steps[~drawn])


def _rings(axes: Axes, run: _Run, color: str, *, alone: bool) -> None:
    """Mark the trials that were rejected, if their loss can be drawn."""
    steps = run.rejected[drawable(run.loss[run.rejected])]
    if steps.size:
        label = "rejected trial" if alone else None
        axes.plot(steps, run.loss[steps], "o", color=color, fillstyle="none", markersize=8, label=label)


def _crosses(axes: Axes, steps: np.ndarray) -> None:
    """Mark the steps whose values cannot be drawn."""
    if steps.size:
        axes.plot(steps, np.ones(steps.size), "rx", transform=axes.get_xaxis_transform(), clip_on=False)


def _means(values: np.ndarray, each: int) -> list[float]:
    return [values[i : i + each].mean() for i in range(0, len(values) - each + 1, each)]
