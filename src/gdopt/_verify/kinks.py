"""A way down from a kink, which the gradient at a single point does not show.

Source: Burke, Lewis & Overton, "A robust gradient sampling algorithm for nonsmooth, nonconvex optimization", 2005. If a
way leads up, the gradient there is added to the others, as in Lemaréchal, "An extension of Davidon methods to non
differentiable problems", 1975.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gdopt import _trees
from gdopt._verify.places import (
    Blocks,
    Place,
    Probe,
    chance,
    coarsest,
    combined,
    count_of,
    largest,
    loss_at,
    normal,
    products,
    shifted,
)

_ROUNDS, _COARSE = 8, 3  # rounds with ever smaller regions, and the first ones, whose regions are too large for a slope
_SAMPLES, _MORE = 16, 48  # the most random gradients, and the most along ways that led up
_SHIFTS = 100  # the shifts of weight between two gradients
_LENGTHS = 6  # the lengths that are tried along a way, each four times the last
_ZERO = 0.003  # the length of the shortest vector that counts as zero, over the longest gradient
_FALLS = 0.1  # the fall that is enough, over the one that the shortest vector promises


class Below(NamedTuple):
    """The lower point that was found around a kink, if there is one."""

    loss: Any  # the lowest loss
    point: Blocks
    slope: Any  # the least slope of all regions along the best way, for a step as long as the entries are large
    tells: Any  # whether the gradients of the last region led down, or showed that there is no way


class _Bundle(NamedTuple):
    """Gradients near a point, their shortest convex combination, and the lowest point along it."""

    known: Any  # the number of gradients
    rows: Blocks
    weights: Any  # the weights of the gradients in the shortest vector
    length: Any  # its length
    longest: Any  # the length of the longest gradient
    loss: Any  # the lowest loss
    point: Blocks


def look_below(place: Place, probe: Probe, params: Blocks, loss: Any, typical: Blocks) -> Below:
    """Go down from a point at a kink.

    The way is the shortest vector in the convex hull of gradients near the point, along which all of them promise that
    the loss falls. If that vector is zero, the point is a minimum or a saddle. Near is a share of each entry's
    ``typical`` size, which is 0 for entries that are held in their places. An entry may have moved far too little, so
    in turn near is a share of the move that would change the loss by all of it.
    """
    np, dtype, eps = place.np, _trees.norm_dtype(params), coarsest(params)
    few = min(count_of(params), _SAMPLES) + 1
    room = few + min(4 * count_of(params), _MORE)

    def descend(number: Any, below: tuple[Below, Blocks]) -> tuple[Below, Blocks]:
        (loss, begin, least, _), steepest = below
        radius = eps ** (0.15 * ((number + 1) // 2))
        sizes = _region(np, number, radius, typical, steepest, loss)
        rows = _gradients(place, probe, begin, sizes, few, room)
        steepest = [np.maximum(np.max(abs(block), axis=0), s) for block, s in zip(rows, steepest, strict=True)]
        rows = [block * s[None] for block, s in zip(rows, sizes, strict=True)]
        unit = largest(np, rows)
        unit = np.where(unit > 0, unit, 1)

        def goes_on(bundle: _Bundle) -> Any:
            length = bundle.length
            promises = (length > _ZERO * bundle.longest) & (_FALLS * length > eps * abs(loss))  # It has to be visible.
            return (bundle.known < room) & promises & ~(bundle.loss < loss - _FALLS * length)

        def follow(bundle: _Bundle) -> _Bundle:
            known, rows = bundle.known, bundle.rows
            scaled = [block / unit.astype(block.dtype) for block in rows]
            weights, length, longest = _shortest(place, scaled, bundle.weights, known, dtype)
            way = normal(place, combined(place, weights, scaled), dtype)
            way = [s * w for s, w in zip(sizes, way, strict=True)]
            there = shifted(begin, [-w for w in way])
            grad = [g * s for g, s in zip(probe.at(there)[1], sizes, strict=True)]
            grad = [np.where(np.isfinite(g), g, 0) for g in grad]
            rows = [place.put(block, known, g) for block, g in zip(rows, grad, strict=True)]
            return _Bundle(
                known + 1, rows, weights, length * unit, longest * unit, *_along(place, probe, begin, loss, way)
            )

        def further(_: Any, bundle: _Bundle) -> _Bundle:
            return place.when(goes_on(bundle), lambda: follow(bundle), lambda: bundle)

        one = np.ones((), dtype)
        first = np.where(np.arange(room) == 0, one, 0)
        start = _Bundle(np.int32(few) + 0 * number, rows, first, np.inf * one, one * unit, loss, begin)
        end = place.fold(room - few, further, start)
        least = np.minimum(least, np.where(number < _COARSE, np.inf, end.length / radius)).astype(dtype)
        return Below(end.loss, end.point, least, ~goes_on(end._replace(known=few))), steepest

    first = [abs(g).astype(t.dtype) for g, t in zip(probe.at(params)[1], typical, strict=True)]
    unknown = np.full((), np.inf, dtype)
    return place.fold(_ROUNDS, descend, (Below(loss, params, unknown, unknown < 0), first))[0]


def _gradients(place: Place, probe: Probe, point: Blocks, sizes: Blocks, few: int, room: int) -> Blocks:
    """Return the gradient at the point and a few near it, with room for further ones."""
    np = place.np

    def beside(number: Any) -> Blocks:
        away = [np.where(number == 0, 0, s * c) for s, c in zip(sizes, chance(place, sizes, number), strict=True)]
        return probe.at(shifted(point, away))[1]

    rows = place.rows(beside, few)
    rows = [np.concatenate([block, np.zeros((room - few, *block.shape[1:]), block.dtype)]) for block in rows]
    return [np.where(np.isfinite(block), block, 0) for block in rows]


def _region(np: Any, number: Any, radius: Any, typical: Blocks, steepest: Blocks, loss: Any) -> Blocks:
    """Return the size of a round's region along each entry: by typical sizes, and in turn by the loss."""
    by_loss = [np.where((t > 0) & (g > 0), abs(loss) / g, t) for t, g in zip(typical, steepest, strict=True)]
    sizes = [np.where(number % 2 == 1, t, s) for t, s in zip(typical, by_loss, strict=True)]
    return [(radius * np.where(np.isfinite(s), s, 0)).astype(s.dtype) for s in sizes]


def _along(place: Place, probe: Probe, begin: Blocks, loss: Any, way: Blocks) -> tuple[Any, Blocks]:
    """Return the lowest loss along a way, and its point."""
    np = place.np

    def attempt(number: Any, lowest: tuple[Any, Blocks]) -> tuple[Any, Blocks]:
        loss, point = lowest
        there = shifted(begin, [-(4.0 ** (number - 1)) * w for w in way])
        value = loss_at(place, probe, there).astype(loss.dtype)
        point = [np.where(value < loss, new, old) for new, old in zip(there, point, strict=True)]
        return np.where(value < loss, value, loss), point

    return place.fold(_LENGTHS, attempt, (loss, begin))


def _shortest(place: Place, rows: Blocks, weights: Any, known: Any, dtype: Any) -> tuple[Any, Any, Any]:
    """Return the weights and length of the shortest vector in the convex hull of the first rows, and the longest row's.

    Weight moves from the row that is longest along their sum to the one that is shortest, as in Platt, "Sequential
    minimal optimization", 1998.
    """
    np = place.np
    row = lambda number: [products(place, rows, [block[number] for block in rows], dtype)]
    matrix = place.rows(row, len(weights))[0]
    numbers = np.arange(len(weights))

    def shift(_: Any, weights: Any) -> Any:
        slope = matrix @ weights
        to = np.argmin(np.where(numbers < known, slope, np.inf))
        since = np.argmax(np.where(weights > 0, slope, -np.inf))
        square = matrix[to, to] + matrix[since, since] - 2 * matrix[to, since]
        part = (slope[since] - slope[to]) / np.where(square > 0, square, 1)
        part = np.where(square > 0, np.minimum(np.maximum(part, 0), weights[since]), 0)
        return weights + part * ((numbers == to) * 1 - (numbers == since) * 1).astype(dtype)

    weights = place.fold(_SHIFTS, shift, weights)
    square = weights @ matrix @ weights
    return weights, np.sqrt(np.maximum(square, 0)), np.sqrt(np.max(np.diagonal(matrix)))
