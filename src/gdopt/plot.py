"""Pictures of results, by matplotlib, which is imported only when one is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from gdopt.errors import GdoptError
from gdopt.result import Result

__all__ = ["descent"]


def descent(result: Result) -> Any:
    """Draws the loss, the gradient norm and the learning rate over the steps of a run.

    Args:
        result: what ``gdopt.minimize`` returned.

    Returns:
        A ``matplotlib.figure.Figure`` with one panel above the other: the loss on a logarithmic axis where it stays
        positive, with the gradient norm beside it, and below the rate of each update, where it is known. Made without
        pyplot, so no window opens and nothing has to be closed: ``.savefig("descent.png")``, or show it in a notebook.

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

    loss, grad_norm, learning_rate = result.history
    steps = np.arange(len(loss))
    has_rate = bool(np.isfinite(learning_rate).any())
    figure = Figure(figsize=(7, 5 if has_rate else 3.5), layout="constrained")
    rows = figure.subplots(2 if has_rate else 1, sharex=True, squeeze=False, height_ratios=[2, 1] if has_rate else [1])
    top = rows[0, 0]
    _line(top, steps, loss, "C0", "loss")
    beside = top.twinx()
    _line(beside, steps, grad_norm, "C1", "gradient norm", alpha=0.35)
    top.set_zorder(beside.get_zorder() + 1)  # the loss in front
    top.patch.set_visible(False)
    top.set_title(f"{result.status.name} after {result.steps} steps, loss {result.loss:.4g}")
    if has_rate:
        _line(rows[1, 0], steps, learning_rate, "C2", "learning rate", log=False)
        rows[1, 0].set_ylim(bottom=0)
    rows[-1, 0].set_xlabel("step")
    return figure


def _line(axes: Any, x: np.ndarray, y: np.ndarray, color: str, label: str, log: bool = True, alpha: float = 1) -> None:
    finite = np.isfinite(y)
    axes.plot(x[finite], y[finite], color=color, alpha=alpha, linewidth=1.2)
    axes.set_ylabel(label, color=color)
    if log and finite.any() and (y[finite] > 0).all():
        axes.set_yscale("log")
