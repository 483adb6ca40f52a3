"""A picture that follows a run in a notebook."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gdopt._checks import number
from gdopt._errors import GdoptError
from gdopt._pictures.canvas import drawable, figure_of, new_figure, spans_decades
from gdopt._result import Report

_SHARE = 4  # the least time between two pictures, over the time that one takes


def live(every: float = 0.5) -> Callable[[Report], None]:
    """Return a callback for `minimize` that draws the loss while the run goes on, in one figure of a notebook.

    ``gdopt.minimize(..., callback=gdopt.plot.live())`` shows the loss of each `Report` over its step, and its
    validation loss if there is one. The figure is drawn anew at most every so many seconds, in place of the one before,
    and once more when the cell has ended. If a drawing takes long, the next one waits four times as long. Outside of a
    notebook, in a terminal or a script, the callback does nothing and prints nothing. It never stops the run. With
    several runs, one callback starts anew with each.

    Args:
        every: the least seconds between two drawings, 0 or more (default 0.5).

    Returns:
        A function of a `Report`, to be passed as ``callback=``.

    Raises:
        GdoptError: if IPython or matplotlib is missing, with the command that installs it.
        InputError: if ``every`` is not a number of at least 0.

    Example:
        >>> import gdopt
        >>> gdopt.minimize(lambda x: x**2, 1.0, learning_rate=0.1, callback=gdopt.plot.live()).status.name
        'CONVERGED'
    """
    every = number("every", every, lambda x: x >= 0, "a number of seconds, 0 or more, such as 0.5")
    try:
        from IPython.core.getipython import get_ipython
    except ImportError as error:
        raise GdoptError("gdopt.plot.live needs IPython. Run pip install ipython") from error
    new_figure(1)  # This raises an error now if matplotlib is missing, and not in the middle of a run.
    shell = get_ipython()
    is_notebook = getattr(shell, "kernel", None) is not None  # IPython in a terminal has a shell without one.
    return _Live(every, shell) if is_notebook else _nothing


def _nothing(report: Report) -> None:
    """Do nothing with a report."""


class _Live:
    """The callback in a notebook."""

    def __init__(self, every: float, shell: Any):
        self._every, self._shell = every, shell
        self._handle: Any = None
        self._drawn_at, self._seconds = -math.inf, 0.0  # the end of the last drawing, and how long it took
        self._reports: list[tuple[int, float, float]] = []  # step, loss, validation loss
        self._drawn = 0  # the reports that are in the picture

    def __call__(self, report: Report) -> None:
        if self._reports and report.step < self._reports[-1][0]:  # Another run began.
            self._end()
        if not self._reports:
            self._shell.events.register("post_run_cell", self._finish)
        self._reports.append((report.step, report.loss, report.validation_loss))
        if time.perf_counter() - self._drawn_at >= max(self._every, _SHARE * self._seconds):
            self._draw()

    def _end(self) -> None:
        """Draw the last reports of a run, unless that was done, and forget them."""
        if self._drawn < len(self._reports):
            self._draw()
        self._reports, self._handle, self._drawn = [], None, 0

    def _finish(self, *_: Any) -> None:
        """End the last run, when the cell has ended."""
        self._shell.events.unregister("post_run_cell", self._finish)
        self._end()

    def _draw(self) -> None:
        from IPython.display import display

        began = time.perf_counter()
        figure = _picture(np.array(self._reports, float))
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)
        self._drawn, self._drawn_at = len(self._reports), time.perf_counter()
        self._seconds = self._drawn_at - began


def _picture(reports: np.ndarray) -> Any:
    """Draw the losses over the steps."""
    axes = new_figure(3.5).subplots()
    step, loss, validation = reports.T
    for values, color, label in ((loss, "C0", "loss"), (validation, "C3", "validation")):
        drawn = drawable(values)
        if drawn.any():
            axes.plot(step[drawn], values[drawn], ".-", color=color, label=label)
    axes.set_yscale("log" if spans_decades(np.append(loss, validation)) else "linear")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(f"step {int(step[-1])}, loss {loss[-1]:.4g}")
    if np.isfinite(validation).any():
        axes.legend(loc="upper right", fontsize="small")
    return figure_of(axes)
