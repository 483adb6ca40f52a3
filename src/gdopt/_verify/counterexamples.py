"""Points that would contradict a claim to be at a minimum, if they are lower."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp

from gdopt._verify.places import Blocks, Place, Probe, coarsest, dot, largest, loss_at, neighbour, shifted
from gdopt._verify.spectrum import Spectrum, scaled

TRIED = 96  # the most neighbours of a kink that are tried
# The number of points of each kind, which are tried one kind after the other.
_KINDS = (8, 6, 32, 32, 16, 12, 2, 4, TRIED - 4)
_WEAK, _NEWTON, _NEGATIVE, _SECOND, _FLAT, _DOWNHILL, _BEYOND, _FEW, _MANY = range(len(_KINDS))
_ENDS = tuple(itertools.accumulate(_KINDS))
_FARTHEST = 1e6  # the distance of the farthest point from which a run may continue, in sizes of the params
_NEAR = 8  # the tries on either side that are so far away that the loss should change visibly, or farther
_MORE = 4  # the gain over that of Newton's step above which there is no minimum
_STRETCH = 4.0  # the length of a try over that of the one before
_SIZES = *(4.0**power for power in (-1, -2, -3, -4, -5, -6, 1, 2, 3, 4, 5, 6)), -1.0  # tries for an idle entry, over it


class Point(NamedTuple):
    """The point that is returned."""

    params: Blocks
    loss: Any
    grad: Blocks
    typical: Blocks  # the size of each entry, 0 for those that are held in their places
    rounding: Any  # the rounding of the loss
    allowed: Any  # the gain that may be left


def directions(
    place: Place, found: Spectrum, newton: Blocks, grad: Blocks, typical: Blocks, visible: Any
) -> tuple[Blocks, Any, Any]:
    """Return ways to try, how far to go along each, and what the last one promises.

    - downhill along curvatures that are lost in rounding, until the loss should fall visibly;
    - Newton's step;
    - two ways of negative curvature, until the loss should change visibly;
    - the flattest;
    - downhill, to the minimum of the parabola.
    """
    np, dtype, out = place.np, found.right.dtype, functools.partial(found.way, place)
    slope = scaled(found.scale, scaled(found.scale, grad))
    highest = found.highest
    size = np.max(np.abs(found.right))
    unit, steepest = found.right / np.where(size > 0, size, 1), np.where(highest == 0, 1, highest)
    bend, square = unit @ (found.matrix / steepest) @ unit, unit @ unit
    best = np.where(bend > 0, square / np.where(bend > 0, bend, 1) / steepest, 1)
    promised = np.where(bend > 0, size * (size * best) * square / 2, np.where(size > 0, np.inf, 0))

    whole = dot(place, typical, typical, dtype)

    def reach(way: Blocks) -> Any:
        """Return how far the params have come, or are from zero: farther away the loss may be only rounding."""
        return np.sqrt(whole / np.maximum(dot(place, way, way, dtype), jnp.finfo(dtype).tiny))

    fall = found.weak @ found.weak
    ways = [out(-(found.vectors @ found.weak) / found.even), newton]
    visibly = np.where(fall > 0, visible / np.where(fall > 0, fall, 1), 0)
    lengths = [np.minimum(visibly, reach(ways[0]) / _STRETCH ** (_KINDS[_WEAK] - 1)), np.ones_like(best)]
    for weights in (found.vectors[:, 0] / found.even, found.lowest):
        way = out(weights)
        least = np.abs(weights @ found.matrix @ weights)
        seen = np.sqrt(2 * visible / np.where(least > 0, least, 1))
        lengths.append(np.where(np.isfinite(seen) & (seen > 0), seen, 1e-3 * reach(way)))
        ways.append(way)
    flattest = out(found.vectors[:, np.argmin(np.abs(found.values))] / found.even)
    ways += [flattest, [-g for g in slope]]
    lengths += [reach(flattest), best]
    rows = [np.stack(blocks) for blocks in zip(*ways, strict=True)]
    return rows, np.stack([length.astype(dtype) for length in lengths]), promised


def wanted_kinds(place: Place, found: Spectrum, little: Any, negative: Any) -> Any:
    """Tell for each kind whether to try it, if ``little`` seems to be left or a curvature is ``negative``."""
    np = place.np
    weak, goes, flat = found.weak.any(), (found.right != 0).any(), found.highest == 0
    level = found.whole & found.known & (np.min(np.abs(found.values)) <= found.noise)
    return np.stack([weak, ~little, negative, negative, level, ~little, goes, weak | True, ~little | flat])


class Lowest(NamedTuple):
    """The lowest of the points that were tried."""

    loss: Any
    point: Blocks
    finite: Any  # how many were finite
    saddle: Any  # whether one along a negative curvature was lower by more than rounding
    beyond: Any  # whether one beyond Newton's step was lower than the end of that step should be


def lowest(
    place: Place, probe: Probe, here: Point, left: Any, ways: Blocks, lengths: Any, kinds: Any, wanted: Any
) -> Lowest:
    """Try the points of these kinds that may be lower, one kind after the other, up to a loss that is wanted.

    ``left`` is what seems to be left to gain; ``ways`` have a leading axis.
    """
    np = place.np
    ends = np.stack([np.int32(end) for end in _ENDS])
    begins = np.stack([np.int32(begin) for begin in (0, *_ENDS[:-1])])

    far = _FARTHEST * largest(np, here.typical)
    # From a point that is zero up to rounding, the loss may change visibly only farther away.
    spans = [np.max(abs(rows), axis=tuple(range(1, rows.ndim))).astype(lengths.dtype) for rows in ways]
    visible = _STRETCH * lengths * np.max(np.stack(spans), axis=0)

    def following(number: Any) -> Any:
        """Return the next number, from this one on, of a kind that is to be tried."""
        return np.min(np.where(kinds & (number < ends), np.maximum(number, begins), _ENDS[-1]))

    def goes_on(search: tuple) -> Any:
        number, found = search
        return (number < _ENDS[-1]) & ~(found.loss < wanted)

    def attempt(search: tuple) -> tuple:
        number, found = search
        kind = np.sum(number >= ends)
        step = _step(place, here, ways, lengths, kind, number - begins[kind])
        there = shifted(here.params, step)
        value = loss_at(place, probe, there).astype(here.loss.dtype)
        negative = (kind == _NEGATIVE) | (kind == _SECOND)
        limit = np.where(negative, np.maximum(far, visible[np.minimum(kind, _SECOND)]), far)
        near = np.stack([(abs(block) <= limit).all() for block in step]).all()
        better = near & (value < found.loss)  # NaN is not
        falls = near & (value < here.loss - here.rounding)
        return following(number + 1), Lowest(
            np.where(better, value, found.loss),
            [np.where(better, new, old) for new, old in zip(there, found.point, strict=True)],
            (found.finite + np.isfinite(value)).astype(number.dtype),
            found.saddle | (negative & falls),
            found.beyond | ((kind == _BEYOND) & falls & (value < here.loss - _MORE * left)),
        )

    first = following(np.zeros((), np.int32))
    no = first < 0
    begin = first, Lowest(here.loss, here.params, 0 * first, no, no)
    return place.loop(goes_on, attempt, begin)[1]


def resized(place: Place, probe: Probe, here: Point, found: Spectrum, idle: Any, wanted: Any) -> tuple[Any, Blocks]:
    """Try other sizes of the ``idle`` entries, on which the loss does not depend nearby, up to a loss that is wanted.

    A run may start so far away that the loss is constant, as the width of a peak outside of the data does.
    """
    np, tries = place.np, len(_SIZES)
    factors = np.stack([np.asarray(size, found.right.dtype) for size in _SIZES])
    counts, asked = np.arange(tries * len(idle)), np.repeat(idle, tries)

    def following(number: Any) -> Any:
        return np.min(np.where(asked & (counts >= number), counts, len(counts)))

    def goes_on(search: tuple) -> Any:
        number, least, _ = search
        return (number < len(counts)) & ~(least < wanted)

    def attempt(search: tuple) -> tuple:
        number, least, point = search
        entry = found.way(place, (counts[::tries] == number - number % tries).astype(found.right.dtype))
        there = [
            np.where(way != 0, x * factors[number % tries].astype(x.dtype), x)
            for way, x in zip(entry, here.params, strict=True)
        ]
        value = loss_at(place, probe, there).astype(here.loss.dtype)
        better = value < least
        new = [np.where(better, new, old) for new, old in zip(there, point, strict=True)]
        return following(number + 1), np.where(better, value, least), new

    return place.loop(goes_on, attempt, (following(0 * counts[0]), here.loss, here.params))[1:]


def _step(place: Place, here: Point, ways: Blocks, lengths: Any, kind: Any, count: Any) -> Blocks:
    """Return the way to the point with this number among its kind."""
    np = place.np

    def along() -> Blocks:
        negative = (kind == _NEGATIVE) | (kind == _SECOND)
        both = negative | (kind == _FLAT)
        half = np.where(both, count // 2, count)
        # The tries go farther out first, and then between the point and there.
        inwards = np.where(half < _NEAR, half, 1.5 * (_NEAR - 1 - half))
        power = np.where(negative, inwards, np.where(kind == _WEAK, half, -half))
        power = np.where(kind == _BEYOND, 1.5 * (half + 1), power)
        length = np.where(both & (count % 2 == 1), -1, 1) * _STRETCH ** power.astype(lengths.dtype)
        own = np.where(kind == _BEYOND, _NEWTON, kind)
        return [(length * lengths[own]).astype(rows.dtype) * rows[own] for rows in ways]

    def beside() -> Blocks:
        number = count + (kind == _MANY) * _KINDS[_FEW]
        return neighbour(place, number, here.typical, coarsest(here.params))

    return place.when(kind >= _FEW, beside, along)
