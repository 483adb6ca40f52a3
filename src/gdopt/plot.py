"""Pictures of results, by matplotlib, which is imported only when one is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from gdopt.errors import GdoptError
from gdopt.result import Result

__all__ = ["descent"]

_DOTTED = 40  # the longest line that shows its points one by one
_MEANS = 30  # the most points of the averaged line through a noisy one


def descent(result: Result) -> Any:
    """Draws the loss, the gradient norm and the learning rate over the steps of a run.

    Args:
        result: what ``gdopt.minimize`` returned.

    Returns:
        A ``matplotlib.figure.Figure`` with one panel above the other: the loss, the gradient norm and, where it is
        known, the rate of each update. Values that span decades have a logarithmic axis, those of mini-batches a line
        of means through them, and a cross at the upper edge stands for a value that is infinite, NaN or beyond 1e200.
        Made without pyplot, so no window opens and nothing has to be closed: ``.savefig("descent.png")``, or show it
        in a notebook.

    Raises:
        GdoptError: when matplotlib is missing, with the command that installs it.

    Example:
        >>> import gdopt
        >>> result = gdopt.minimize(lambda x: x**2, 1.0, learning_rate=0.1)
        >>> figure = gdopt.plot.descent(result)
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['loss', 'gradient norm', 'learning rate']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GdoptError('gdopt.plot needs matplotlib: pip install "gdopt[plot]"') from error

    loss, grad_norm, learning_rate = (np.asarray(entries, float) for entries in result.history)
    learning_rate = learning_rate[: result.steps]  # no update is made from the last point
    panels = 3 if np.isfinite(learning_rate).any() else 2
    figure = Figure(figsize=(7, 2 + 1.5 * panels), layout="constrained")
    rows = figure.subplots(panels, sharex=True, height_ratios=[2, 1, 1][:panels])
    steps = f"{result.steps} step{'' if result.steps == 1 else 's'}"
    rows[0].set_title(f"{result.status.name} after {steps}, returned loss {result.loss:.4g}")
    each = 0 if result.steps_per_epoch is None else max(result.steps_per_epoch, len(loss) // _MEANS, 2)
    _line(rows[0], "loss", loss, "C0", log=_spans_decades(loss), each=each)
    _line(rows[1], "gradient norm", grad_norm, "C1", log=_spans_decades(grad_norm), each=each)
    if panels == 3:
        # A cycle from nearly 0 spans decades too, and is best seen as it is: few of its rates are that small.
        log = _spans_decades(learning_rate) and np.nanmedian(learning_rate) < np.nanmax(learning_rate) / 10
        _line(rows[2], "learning rate", learning_rate, "C2", log=log)
        if not log:
            rows[2].set_ylim(bottom=0)
    rows[-1].set_xlabel("step")
    rows[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.align_ylabels()
    return figure


def _line(axes: Any, label: str, values: np.ndarray, color: str, *, log: bool, each: int = 0) -> None:
    steps, drawn = np.arange(len(values)), _drawable(values)
    means = 0 < 2 * each <= len(values)
    x, y = steps[drawn], values[drawn]
    style = {"marker": "."} if len(values) <= _DOTTED else {"alpha": 0.35, "linewidth": 0.8} if means else {}
    axes.plot(x, y, color=color, **style)
    if means:
        axes.plot(_means(x, each), _means(y, each), color=color, label=f"mean of {each} steps")
        axes.legend(loc="upper right", fontsize="small")
    if not drawn.all():
        axes.plot(steps[~drawn], np.ones((~drawn).sum()), "rx", transform=axes.get_xaxis_transform(), clip_on=False)
    axes.set_ylabel(label)
    axes.set_yscale("log" if log else "linear")


def _drawable(values: np.ndarray) -> np.ndarray:
    """Where a value is finite, and not so near to the end of float64 that the ticks above it are not."""
    return np.abs(values) < 1e200


def _spans_decades(values: np.ndarray) -> bool:
    """Whether a logarithmic axis shows more: from two decades on it is sure to have two labels."""
    y = values[_drawable(values)]
    return bool((y >= 0).all() and (y > 0).any() and y.max() / 100 > y[y > 0].min())


def _means(values: np.ndarray, each: int) -> list[float]:
    return [values[i : i + each].mean() for i in range(0, len(values) - each + 1, each)]
