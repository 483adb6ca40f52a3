"""Figures without pyplot, and what all pictures share."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from gdopt._errors import GdoptError, InputError
from gdopt._result import Result, ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTTED = 40  # the most points of a line that shows them one by one


def new_figure(height: float) -> Figure:
    """Return a figure that no window shows. A notebook shows it, because it has a ``_repr_png_``."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GdoptError('gdopt.plot needs matplotlib. Run pip install "gdopt[plot]"') from error
    figure: Any = Figure(figsize=(7, height), layout="constrained")
    figure._repr_png_ = functools.partial(png, figure)
    return figure


def png(figure: Figure, dpi: float | None = None) -> bytes:
    """Return the picture as the bytes of a PNG file."""
    figure.savefig(file := io.BytesIO(), format="png", dpi=dpi or figure.dpi)
    return file.getvalue()


def axes_of(ax: Axes | None, height: float) -> Axes:
    """Return the given axes; those of a new figure if there are none."""
    if ax is None:
        return new_figure(height).subplots()
    if not hasattr(ax, "get_figure") or not hasattr(ax, "plot"):
        raise InputError(f"ax={ax!r} is no Axes of matplotlib. Pass one (for example figure.subplots()).")
    return ax


def figure_of(ax: Axes) -> Figure:
    """Return the figure of axes, also if they are in a subfigure."""
    return ax.figure.figure


def drawable(values: np.ndarray) -> np.ndarray:
    """Tell which values are finite and far enough from the end of float64 for the ticks above them to be finite."""
    with np.errstate(invalid="ignore"):
        return np.abs(values) < 1e200


def spans_decades(values: np.ndarray) -> bool:
    """Tell whether values span two decades, so that a logarithmic axis is sure to have two labels."""
    y = values[drawable(values)]
    return bool((y >= 0).all() and (y > 0).any() and y.max() / 100 > y[y > 0].min())


def title_of(result: Result) -> str:
    """Say how a run ended."""
    return f"{ended(result)}, returned loss {result.loss:.4g}"


def ended(result: Result) -> str:
    """Say how a run ended, and when."""
    return f"{ends(result.status)} after {result.steps} step{'' if result.steps == 1 else 's'}"


def refuse_no_history(name: str) -> NoReturn:
    """Raise InputError for a result without a history."""
    which = f"{name!r} of result" if name else "result"
    raise InputError(f"{which} is of a run inside jit, vmap or grad, so it has no history. Make the run outside.")


def _several(given: Any) -> dict[str, Result]:
    try:
        named = dict(given) if hasattr(given, "keys") else {f"run {k}": each for k, each in enumerate(given)}
    except TypeError:
        raise InputError(f"result is a {type(given).__name__}. Pass a result of gdopt.minimize, or several.") from None
    if not named:
        raise InputError("result holds no runs to compare. Pass at least one result.")
    for name, each in named.items():
        if not isinstance(each, Result):
            raise InputError(f"{name!r} of result is a {type(each).__name__}. Pass results of gdopt.minimize.")
    return {str(name): each for name, each in named.items()}


def named_results(given: Any) -> dict[str, Result]:
    """Return results by name, from one result (whose name is ""), a list, or a dict of them."""
    named = {"": given} if isinstance(given, Result) else _several(given)
    for name, each in named.items():
        if each.history is None:
            refuse_no_history(name)
    return named
