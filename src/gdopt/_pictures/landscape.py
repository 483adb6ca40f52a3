"""The loss around the recorded points of a run."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdopt._errors import InputError
from gdopt._pictures.canvas import refuse_no_history
from gdopt._pictures.trials import rejected
from gdopt._result import Result
from gdopt._settings import own_work
from gdopt._types import Loss, PyTree

_FIRST = 200  # the first points of a run that are all drawn
_MOST = 500  # and the most points
_AHEAD = 5  # the points of a failed run that are sure to be in the picture
_GROWTH = 8.0  # and how far these may lie from the start, over the first step
_FARTHEST = 1.0  # how far beyond the points of the others such a run is followed, over their span
_MARGIN = 0.12  # the empty part at each edge, over the span of the points

_is_none = lambda leaf: leaf is None


class Track(NamedTuple):
    """The recorded points of a run, as the rows of a matrix."""

    result: Result
    steps: np.ndarray  # (n,) the numbers of the points
    points: np.ndarray  # (n, d) of float64
    accepted: np.ndarray  # (n,) False for trials that the optimizer took back
    found: np.ndarray  # (d,) the returned params

    @property
    def failed(self) -> bool:
        """Tell whether the run ended as DIVERGED or NON_FINITE."""
        return self.result.status.name in ("DIVERGED", "NON_FINITE")


def track_of(result: Any, name: str = "") -> Track:
    """Return the points of a run, some of them if there are many; raise InputError if it recorded none."""
    which = f"{name!r} of result" if name else "result"
    if not isinstance(result, Result):
        raise InputError(f"{which} is a {type(result).__name__}. Pass a result of gdopt.minimize.")
    if result.history is None:
        refuse_no_history(name)
    if result.history.params is None:
        raise InputError(
            f"{which} does not hold the params of its steps. Pass record_params=True to gdopt.minimize, and draw that."
        )
    leaves = jax.tree.leaves(result.history.params)
    if any(np.iscomplexobj(leaf) for leaf in leaves):
        raise InputError(f"{which} has complex params, which have no valley and no plane. Draw gdopt.plot.descent.")
    steps = _some(len(leaves[0]))
    points = _matrix([leaf[steps] for leaf in leaves])
    accepted = ~np.isin(steps, rejected(result))
    found = _matrix([np.asarray(leaf)[None] for leaf in optimised(result, result.params)])[0]
    return Track(result, steps, points, accepted, found)


def _some(count: int) -> np.ndarray:
    """Return the numbers of all points; if there are many, the first ones, later ones at growing distances, the last.

    A run turns back and forth in its first steps. The picture could not show all of many thousand later ones.
    """
    if count <= _MOST:
        return np.arange(count)
    later = np.geomspace(_FIRST, count - 1, _MOST - _FIRST)
    return np.unique(np.append(np.arange(_FIRST), np.round(later).astype(int)))


def _matrix(leaves: list[Any]) -> np.ndarray:
    with own_work():
        arrays = [np.asarray(leaf) for leaf in leaves]
    return np.concatenate([array.reshape(len(array), -1).astype(float) for array in arrays], axis=1)


def optimised(result: Result, tree: PyTree) -> list[Any]:
    """Return the leaves of a tree like params that belong to those which are optimised."""
    assert result.history is not None
    recorded, treedef = jax.tree.flatten(result.history.params, is_leaf=_is_none)
    leaves = treedef.flatten_up_to(tree)
    return [leaf for leaf, kept in zip(leaves, recorded, strict=True) if kept is not None]


def names(result: Result) -> list[str]:
    """Return a name for each number of the params (for example ``params['w'][1]``)."""
    assert result.history is not None
    found: list[str] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(result.history.params):
        root = "params" + jax.tree_util.keystr(path)
        indices = list(np.ndindex(leaf.shape[1:]))
        found += [root + (str(list(index)) if index else "") for index in indices]
    return found


class Plane(NamedTuple):
    """The points ``origin + coordinates @ axes``, of one dimension or of two."""

    origin: np.ndarray  # (d,)
    axes: np.ndarray  # (1, d) or (2, d)


def losses(loss: Loss, track: Track, plane: Plane, coordinates: np.ndarray, args: tuple[Any, ...]) -> np.ndarray:
    """Evaluate a loss at points of a plane, one by one in a single program."""
    if not callable(loss):
        raise InputError(f"loss={loss!r} is not a function. Pass the loss of the run.")
    if not isinstance(args, tuple):
        raise InputError(f"args={args!r} is not a tuple. Pass args=(x, y), or args=(batch,) for a loss of batches.")
    result = track.result
    assert result.history is not None
    recorded, treedef = jax.tree.flatten(result.history.params, is_leaf=_is_none)
    rest = treedef.flatten_up_to(result.params)

    def value(leaves: list[jax.Array]) -> jax.Array:
        moving = iter(leaves)
        whole = [other if kept is None else next(moving) for kept, other in zip(recorded, rest, strict=True)]
        out: Any = loss(treedef.unflatten(whole), *args)
        found = jnp.asarray(out[0] if isinstance(out, tuple) else out)
        if found.shape != ():
            raise InputError(f"the loss returned shape {found.shape}. Pass the loss of the run, with its args=.")
        return found

    def values(origins: list[jax.Array], axes: list[jax.Array], rows: list[jax.Array]) -> jax.Array:
        def at(row: list[jax.Array]) -> jax.Array:
            leaves = [_moved(*each) for each in zip(origins, axes, row, strict=True)]
            return value(leaves)

        return lax.map(at, rows)

    leaves = [leaf for leaf in recorded if leaf is not None]
    origins, axes = _leaves(plane.origin[None], leaves), _leaves(plane.axes, leaves)
    rows = [coordinates.astype(leaf.dtype) for leaf in leaves]  # Recorded points stay exactly what they are.
    with own_work(), jax.disable_jit(False):  # Thousands of points one by one would take minutes without a jit.
        given = jax.tree.map(jax.device_put, ([origin[0] for origin in origins], axes, rows))
        return np.asarray(jax.jit(values)(*given)).astype(float)


def _moved(origin: jax.Array, axes: jax.Array, row: jax.Array) -> jax.Array:
    for number in range(axes.shape[0]):
        origin = origin + row[number] * axes[number]
    return origin


@np.errstate(over="ignore")
def _leaves(vectors: np.ndarray, like: list[np.ndarray]) -> list[np.ndarray]:
    """Cut vectors (n, d) into arrays (n, *shape) of the shapes and dtypes of recorded leaves."""
    sizes = [math.prod(leaf.shape[1:]) for leaf in like]
    parts = np.split(vectors, np.cumsum(sizes)[:-1], axis=1)
    return [part.reshape(-1, *leaf.shape[1:]).astype(leaf.dtype) for part, leaf in zip(parts, like, strict=True)]


def window(tracks: list[Track], paths: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and the upper corner of the picture, for the points (n, d) of several runs.

    All accepted points are in it but those of a failed run: of these it shows the first few, and no more than as much
    again around the points of the others.
    """
    both = list(zip(tracks, paths, strict=True))
    good = [points[track.accepted] for track, points in both if not track.failed]
    low, high = _bounds([*good, *(points[:1] for points in paths)])
    for track, points in both:
        if track.failed:
            ahead = points[: _AHEAD + 1]
            ahead = ahead[(np.abs(ahead) < 1e100).all(axis=1)]
            away = np.linalg.norm(ahead - ahead[:1], axis=1)
            ahead = ahead[away <= _GROWTH * away[:2].max(initial=0)]
            if good and (high > low).any():
                reach = _FARTHEST * (high - low)
                ahead = ahead[((ahead >= low - reach) & (ahead <= high + reach)).all(axis=1)]
            low, high = _bounds([ahead, np.stack([low, high])])
    span = high - low
    widest = span.max() or max(float(np.abs(low).max()), 1.0)
    span = np.where(span > 1e-3 * widest, span, widest)
    middle = (low + high) / 2
    half = span * (0.5 + _MARGIN)
    return middle - half, middle + half


def _bounds(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    points = np.concatenate(parts)
    points = points[(np.abs(points) < 1e100).all(axis=1)]
    return points.min(axis=0), points.max(axis=0)


def polyline(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, list[tuple]]:
    """Return the part of a path inside a box, with rows of NaN where it leaves, and an arrow for each exit.

    An arrow is a pair: the last point inside, and the place at the edge to which the next step leads.
    """
    inside: Any = ((points >= low) & (points <= high)).all(axis=1)
    line: list[np.ndarray] = []
    arrows: list[tuple[np.ndarray, np.ndarray]] = []
    gap = np.full(points.shape[1], np.nan)
    for k, point in enumerate(points):
        if inside[k]:
            if k and not inside[k - 1]:
                line += [gap, _edge(point, points[k - 1], low, high)]
            line.append(point)
        elif k and inside[k - 1]:
            edge = _edge(points[k - 1], point, low, high)
            line.append(edge)
            arrows.append((points[k - 1], edge))
    return np.array(line).reshape(-1, points.shape[1]), arrows


def _edge(start: np.ndarray, end: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the place at the edge of a box to which the way from a point inside leads. NaN counts as upwards."""
    far = 1e3 * (high - low)
    end = np.where(np.isnan(end), np.where(np.arange(len(end)) == len(end) - 1, np.inf, start), end)
    way = np.clip(end, low - far, high + far) - start
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(way > 0, (high - start) / way, np.where(way < 0, (low - start) / way, np.inf))
    return start + max(min(float(shares.min()), 1.0), 0.0) * way
