"""The curve of a loss of one weight, with the steps of runs on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gdopt._errors import InputError
from gdopt._pictures.canvas import DOTTED, axes_of, drawable, ended, figure_of, named_results, title_of
from gdopt._pictures.landscape import Plane, Track, losses, names, polyline, track_of, window
from gdopt._result import Result
from gdopt._types import Loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GRID = 400  # the points of the curve
_LINE = Plane(np.zeros(1), np.ones((1, 1)))  # all weights
_ABOVE = 0.15  # the part of the picture above the highest point of the runs, over their fall
_OVERSHOOT = 0.01  # the least distance of both points from the minimum, over that of the start


def valley(
    loss: Loss,
    results: Result | Sequence[Result] | Mapping[str, Result],
    *,
    args: tuple[Any, ...] = (),
    ax: Axes | None = None,
) -> Figure:
    """Draw the curve of a loss of one weight, and the steps of one or several runs on it.

    Args:
        loss: the loss of the runs, ``loss(params, *args)``, whose params hold one number that is optimised.
        results: a result of ``gdopt.minimize`` with ``record_params=True``, or several: a list, or a dict by names.
        args: the further arguments of the loss; with mini-batches the data that the curve is to be drawn for, as
            ``args=(data,)``.
        ax: ``matplotlib.axes.Axes`` to draw into; by default a new figure.

    Returns:
        The ``matplotlib.figure.Figure``, made without pyplot; with ``ax``, its figure. Each point of a run is a dot on
        the curve; for runs of more than 500 points it is a part of these, with all of the first 200. The title, or the
        legend if there are several, says how each run ended, and how often its steps jumped across the minimum. If a
        run leaves the picture, an arrow at the edge shows where.

    Raises:
        GdoptError: if matplotlib is missing, with the command that installs it.
        InputError: for a run without recorded params, and for params that are complex or more than one number.

    Example:
        >>> import gdopt
        >>> loss = lambda x: x**2
        >>> rates = (0.1, 0.9, 1.1)
        >>> runs = {f"rate {r}": gdopt.minimize(loss, 1.0, learning_rate=r, record_params=True) for r in rates}
        >>> figure = gdopt.plot.valley(loss, runs)
        >>> for text in figure.axes[0].get_legend().get_texts():
        ...     print(text.get_text())
        rate 0.1: CONVERGED after ... steps
        rate 0.9: CONVERGED after ... steps, overshoots ... times
        rate 1.1: DIVERGED after ... steps
    """
    scene = scene_of(loss, named_results(results), args)
    ax = axes_of(ax, 4.5)
    draw_curve(ax, scene)
    alone = isinstance(results, Result)
    for number, (name, track) in enumerate(scene.tracks.items(), 1):
        _draw_steps(ax, scene, name, f"C{number}", alone=alone)
        if alone:
            ax.set_title(title_of(track.result) + _overshoots(track))
    if not alone:
        # Above the picture it hides no point.
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), fontsize="small")
    return figure_of(ax)


class Scene(NamedTuple):
    """A curve, with the points of runs on it."""

    tracks: dict[str, Track]
    x: np.ndarray  # (n,) of the curve
    y: np.ndarray
    paths: dict[str, np.ndarray]  # by run, the points (n, 2) on the curve
    low: np.ndarray  # (2,) the corners of the picture
    high: np.ndarray


def scene_of(loss: Loss, results: dict[str, Result], args: tuple[Any, ...]) -> Scene:
    """Evaluate the loss around the points of runs, and choose what the picture shows."""
    tracks = {name: track_of(result, name) for name, result in results.items()}
    for name, track in tracks.items():
        if (count := track.points.shape[1]) != 1:
            which = f"the params of {name!r}" if name else "params"
            raise InputError(f"{which} hold {count} numbers, but a valley has one. Use gdopt.plot.path for more.")
    (left,), (right,) = window([*tracks.values()], [track.points for track in tracks.values()])
    first = next(iter(tracks.values()))
    inside = [track.points[(track.points > left) & (track.points < right)] for track in tracks.values()]
    x = np.unique(np.concatenate([np.linspace(left, right, _GRID), *inside]))
    parts = [x, *(track.points[:, 0] for track in tracks.values())]
    values = losses(loss, first, _LINE, np.concatenate(parts)[:, None], args)
    y, *of_points = np.split(values, np.cumsum([len(part) for part in parts])[:-1])
    paths = {
        name: np.stack([track.points[:, 0], heights], axis=1)
        for (name, track), heights in zip(tracks.items(), of_points, strict=True)
    }
    seen = np.concatenate([path[(path[:, 0] >= left) & (path[:, 0] <= right), 1] for path in paths.values()])
    bottom, top = _heights(y, seen)
    return Scene(tracks, x, y, paths, np.array([left, bottom]), np.array([right, top]))


def _heights(curve: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
    """Return the lower and the upper edge, so that all points that are seen are inside."""
    known = curve[drawable(curve)]
    seen = seen[drawable(seen)]
    if not known.size:
        return 0.0, 1.0
    low = float(min(known.min(), seen.min(initial=np.inf)))
    high = float(seen.max(initial=-np.inf))
    if not high - low > 1e-3 * (known.max() - low):  # All points are at the bottom.
        high = float(known.max())
    span = high - low or max(abs(low), 1.0)
    return low - 0.5 * _ABOVE * span, high + _ABOVE * span


def draw_curve(ax: Axes, scene: Scene) -> None:
    """Draw the loss over the weight."""
    ax.plot(scene.x, np.where(drawable(scene.y), scene.y, np.nan), color="C0")
    (left, bottom), (right, top) = scene.low, scene.high
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ax.set_xlabel(names(next(iter(scene.tracks.values())).result)[0])
    ax.set_ylabel("loss")


def _draw_steps(ax: Axes, scene: Scene, name: str, color: str, *, alone: bool) -> None:
    path, track = scene.paths[name], scene.tracks[name]
    line, arrows = polyline(path, scene.low, scene.high)
    ax.plot(line[:, 0], line[:, 1], color=color, linewidth=1, alpha=0.6)
    inside = path[((path >= scene.low) & (path <= scene.high)).all(axis=1)]
    label = None if alone else f"{name}: {ended(track.result)}{_overshoots(track)}"
    size = 5 if len(inside) <= DOTTED else 3
    ax.plot(inside[:, 0], inside[:, 1], "o", color=color, markersize=size, label=label)
    draw_arrows(ax, arrows, color)


def draw_arrows(ax: Axes, arrows: list[tuple], color: str) -> None:
    """Draw an arrow to the edge wherever a run leaves the picture."""
    style: dict[str, Any] = {"arrowstyle": "-|>", "color": color, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
    for start, edge in arrows:
        ax.annotate("", xy=edge, xytext=start, arrowprops=style)


def _overshoots(track: Track) -> str:
    """Say how often the steps of a run jumped across its minimum, by more than a little."""
    away = track.points[:, 0] - track.found[0]
    if track.failed or not np.isfinite(away).all():
        return ""
    far = np.abs(away) > _OVERSHOOT * np.abs(away[0])
    count = int(np.sum((away[1:] * away[:-1] < 0) & far[1:] & far[:-1]))
    return f", overshoots {count} time{'' if count == 1 else 's'}" if count else ""
