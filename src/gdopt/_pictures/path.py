"""The contours of a loss of two weights, or in a plane of more, with the path of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from gdopt._errors import InputError
from gdopt._pictures.canvas import DOTTED, axes_of, drawable, figure_of, spans_decades, title_of
from gdopt._pictures.landscape import Plane, Track, losses, names, optimised, polyline, track_of, window
from gdopt._pictures.valley import draw_arrows
from gdopt._result import Result
from gdopt._types import Loss, PyTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GRID = 61  # the points of a grid along each axis
_LEVELS = 16  # the contours
_DECADES = 1e-6  # the lowest contour of a logarithmic scale, over the highest


def path(
    loss: Loss,
    result: Result,
    *,
    args: tuple[Any, ...] = (),
    directions: tuple[PyTree, PyTree] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the contours of a loss of two weights and the path of a run; for more weights, in a plane through them.

    Args:
        loss: the loss of the run, ``loss(params, *args)``.
        result: the result of ``gdopt.minimize`` with ``record_params=True``.
        args: the further arguments of the loss; with mini-batches the data that the contours are to be drawn for, as
            ``args=(data,)``.
        directions: two trees like params, which span the plane through the returned params. By default, for two
            weights these are the axes. For more they are the two leading principal directions of the recorded points,
            each of length 1.
        ax: ``matplotlib.axes.Axes`` to draw into; by default a new figure.

    Returns:
        The ``matplotlib.figure.Figure``, made without pyplot; with ``ax``, its figure. A ring marks the start, and a
        star the returned params. Contours are logarithmic if the loss spans decades in the picture. If there are more
        than two weights, the path is projected onto the plane: the loss at a point of the plane is not that of the
        point of the run. Axes are then in units of the directions, with the returned params at 0. If a run leaves the
        picture, an arrow at the edge shows where. Of runs with more than 500 points it shows a part, with all of the
        first 200. The grid takes 3,721 evaluations of the loss.

    Raises:
        GdoptError: if matplotlib is missing, with the command that installs it.
        InputError: for a run without recorded params, for complex params or a single weight, and for directions that
            do not fit params or span no plane.

    Example:
        >>> import gdopt, jax.numpy as jnp
        >>> rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> result = gdopt.minimize(rosenbrock, jnp.array([-1.0, 1.0]), record_params=True)
        >>> figure = gdopt.plot.path(rosenbrock, result)
        >>> figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()
        ('params[0]', 'params[1]')
    """
    map_ = map_of(loss, track_of(result), args, directions)
    ax = axes_of(ax, 5.5)
    draw_contours(ax, map_)
    line, arrows = polyline(map_.path, map_.low, map_.high)
    ax.plot(line[:, 0], line[:, 1], color="C1", linewidth=1.2)
    inside = map_.path[((map_.path >= map_.low) & (map_.path <= map_.high)).all(axis=1)]
    ax.plot(inside[:, 0], inside[:, 1], "o", color="C1", markersize=4 if len(inside) <= DOTTED else 2.5)
    draw_arrows(ax, arrows, "C1")
    ax.set_title(title_of(result))
    return figure_of(ax)


class Map(NamedTuple):
    """A plane through params, with the loss on a grid in it, and the path of a run."""

    track: Track
    labels: tuple[str, str]
    x: np.ndarray  # (n,)
    y: np.ndarray  # (n,)
    z: np.ndarray  # (n, n) the loss, with rows of one y
    path: np.ndarray  # (m, 2)
    found: np.ndarray  # (2,) the returned params
    low: np.ndarray  # (2,) the corners
    high: np.ndarray


def map_of(loss: Loss, track: Track, args: tuple[Any, ...], directions: Any) -> Map:
    """Evaluate the loss in a plane around the path of a run."""
    count = track.points.shape[1]
    if count < 2:
        raise InputError("params hold one number, but contours need two. Use gdopt.plot.valley.")
    if directions is None and count == 2:
        origin, axes, labels = np.zeros(2), np.eye(2), tuple(names(track.result))
    else:
        origin = track.found
        axes = _principal(track) if directions is None else _given(track, directions)
        kind = "principal direction" if directions is None else "direction"
        labels = f"{kind} 1", f"{kind} 2"
    path = _projected(track.points, origin, axes)
    found = _projected(track.found[None], origin, axes)[0]
    low, high = window([track], [path])
    x, y = np.linspace(low[0], high[0], _GRID), np.linspace(low[1], high[1], _GRID)
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    z = losses(loss, track, Plane(origin, axes), grid, args).reshape(_GRID, _GRID)
    return Map(track, (labels[0], labels[1]), x, y, z, path, found, low, high)


def _projected(points: np.ndarray, origin: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Return the coordinates of the nearest points in the plane; those that are not finite stay so."""
    away = points - origin
    finite = (np.abs(away) < 1e100).all(axis=1)
    found = np.full((len(points), 2), np.inf)
    found[finite] = np.linalg.lstsq(axes.T, away[finite].T, rcond=None)[0].T
    return found


def _principal(track: Track) -> np.ndarray:
    """Return the two leading principal directions of the points of a run, seen from the returned params."""
    away = track.points - track.found
    away = away[(np.abs(away) < 1e100).all(axis=1)]
    known = _leading(away / (np.abs(away).max(initial=0) or 1))
    for unit in np.eye(3, len(track.found)):  # A run on a straight line has one direction, and one point has none.
        rest = unit - known.T @ (known @ unit)
        if len(known) < 2 and np.linalg.norm(rest) > 0.1:
            known = np.concatenate([known, rest[None] / np.linalg.norm(rest)])
    return known * np.where(known.sum(axis=1) < 0, -1.0, 1.0)[:, None]


def _leading(away: np.ndarray) -> np.ndarray:
    """Return the two leading right singular vectors, or fewer if there are fewer.

    The squares suffice for these, and take much less time than all of a decomposition.
    """
    wide = away.shape[0] < away.shape[1]
    sizes, vectors = np.linalg.eigh(away @ away.T if wide else away.T @ away)
    chosen = [k for k in (-1, -2)[: len(sizes)] if sizes[k] > 1e-12 * max(float(sizes[-1]), 1e-300)]
    found = vectors[:, chosen].T @ away if wide else vectors[:, chosen].T
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def _given(track: Track, directions: Any) -> np.ndarray:
    """Return two directions as vectors; raise InputError if they do not fit."""
    result = track.result
    if not isinstance(directions, tuple | list) or len(directions) != 2:
        raise InputError(f"directions={directions!r} are not two trees like params. Pass a pair of these.")
    vectors = [_vector(result, number, tree) for number, tree in enumerate(directions)]
    axes = np.stack(vectors)
    scaled = axes / np.maximum(np.abs(axes).max(axis=1, keepdims=True), 1e-300)
    if not np.isfinite(axes).all() or np.linalg.matrix_rank(scaled) < 2:
        raise InputError("directions are not finite, or parallel, or zero, so they span no plane. Pass two others.")
    return axes


def _vector(result: Result, number: int, tree: PyTree) -> np.ndarray:
    try:
        leaves = optimised(result, tree)
        shapes = [np.shape(leaf) for leaf in leaves]
    except (ValueError, TypeError) as error:
        raise InputError(f"directions[{number}] is not a tree like params. ({error})") from error
    wanted = [leaf.shape[1:] for leaf in jax.tree.leaves(result.history and result.history.params)]
    if shapes != wanted:
        raise InputError(f"directions[{number}] has leaves of the shapes {shapes}, but those of params are {wanted}.")
    return np.concatenate([np.asarray(leaf, float).reshape(-1) for leaf in leaves])


def draw_contours(ax: Axes, map_: Map) -> None:
    """Draw the contours of the loss, the start and the returned params."""
    known = drawable(map_.z)
    z = np.ma.array(np.where(known, map_.z, 0.0), mask=~known)
    levels = _levels(map_.z[known])
    if len(levels) > 1:
        norm: Any = "log" if levels[0] > 0 and levels[-1] / levels[0] >= 100 else "linear"
        ax.contourf(map_.x, map_.y, z, levels, cmap="Blues", norm=norm, alpha=0.7, extend="both")
        ax.contour(map_.x, map_.y, z, levels, colors="0.4", linewidths=0.5, linestyles="solid")
    ax.plot(*map_.path[0], "o", color="C3", fillstyle="none", markersize=9, label="start")
    ax.plot(*map_.found, "*", color="C3", markersize=12, label="returned params")
    ax.set_xlim(map_.low[0], map_.high[0])
    ax.set_ylim(map_.low[1], map_.high[1])
    ax.set_xlabel(map_.labels[0])
    ax.set_ylabel(map_.labels[1])
    ax.legend(loc="best", fontsize="small")


def _levels(values: np.ndarray) -> np.ndarray:
    """Return the losses of the contours, logarithmic if the loss spans decades."""
    if not values.size or values.min() == values.max():
        return np.zeros(0)
    if spans_decades(values):
        least = max(values[values > 0].min(), _DECADES * values.max())
        return np.geomspace(least, values.max(), _LEVELS)
    return np.linspace(values.min(), values.max(), _LEVELS)
