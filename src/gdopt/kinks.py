"""A way down from a kink, which the gradient at a single point does not tell.

Source: Burke, Lewis & Overton, "A robust gradient sampling algorithm for nonsmooth, nonconvex optimization", 2005.
"""

from __future__ import annotations

from typing import Any

from gdopt import _trees
from gdopt.places import (
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

_ROUNDS = 8  # each with gradients from a smaller region
_SAMPLES = 32  # gradients, at the most; of few params twice as many as these
_SHIFTS = 200  # of weight between two gradients
_LENGTHS = 10  # that are tried along a way


def lowest_beyond(place: Place, probe: Probe, params: Blocks, loss: Any, typical: Blocks) -> tuple[Any, Blocks]:
    """Go down from a point at a kink, and return the lowest loss and its point.

    Along the shortest vector in the convex hull of gradients near the point: all of them tell that the loss falls
    there. Near is a share of each entry's ``typical`` size, which is 0 for those that are held in their places; or, as
    an entry may have come far too little, of what would change the loss by all of it.
    """
    np, dtype, eps = place.np, _trees.norm_dtype(params), coarsest(params)
    count = min(2 * count_of(params), _SAMPLES) + 1

    def beside(point: Blocks, sizes: Blocks, number: Any) -> Blocks:
        """The gradient at the point, or at another one near it."""
        away = [np.where(number == 0, 0, s * c) for s, c in zip(sizes, chance(place, sizes, number), strict=True)]
        return probe.at(shifted(point, away))[1]

    def descend(number: Any, lowest: tuple[Any, Blocks, Blocks]) -> tuple[Any, Blocks, Blocks]:
        loss, begin, steepest = lowest
        radius = eps ** (0.15 * ((number + 1) // 2))
        by_loss = [np.where((t > 0) & (g > 0), abs(loss) / g, t) for t, g in zip(typical, steepest, strict=True)]
        sizes = [np.where(number % 2 == 1, t, s) for t, s in zip(typical, by_loss, strict=True)]
        sizes = [(radius * np.where(np.isfinite(s), s, 0)).astype(s.dtype) for s in sizes]
        rows = place.rows(lambda number: beside(begin, sizes, number), count)
        rows = [np.where(np.isfinite(block), block, 0) for block in rows]
        steepest = [np.maximum(np.max(abs(block), axis=0), s) for block, s in zip(rows, steepest, strict=True)]
        rows = [block * s[None] for block, s in zip(rows, sizes, strict=True)]
        size = largest(np, rows)
        rows = [block / np.where(size > 0, size, 1).astype(block.dtype) for block in rows]
        way = normal(place, combined(place, _shortest(place, rows, count, dtype), rows), dtype)
        way = [s * w for s, w in zip(sizes, way, strict=True)]

        def attempt(number: Any, lowest: tuple[Any, Blocks]) -> tuple[Any, Blocks]:
            loss, point = lowest
            there = shifted(begin, [-(4.0 ** (_LENGTHS // 2 - number)) * w for w in way])
            value = loss_at(place, probe, there).astype(loss.dtype)
            point = [np.where(value < loss, new, old) for new, old in zip(there, point, strict=True)]
            return np.where(value < loss, value, loss), point

        return *place.fold(_LENGTHS, attempt, (loss, begin)), steepest

    first = [abs(g).astype(t.dtype) for g, t in zip(probe.at(params)[1], typical, strict=True)]
    return place.fold(_ROUNDS, descend, (loss, params, first))[:2]


def _shortest(place: Place, rows: Blocks, count: int, dtype: Any) -> Any:
    """The weights of the shortest vector in the convex hull of rows.

    Weight goes to the row that is least along their sum from the one that is most, as in Platt, "Sequential minimal
    optimization", 1998.
    """
    np = place.np
    row = lambda number: [products(place, rows, [block[number] for block in rows], dtype)]
    matrix = place.rows(row, count)[0]
    numbers = np.arange(count)

    def shift(_: Any, weights: Any) -> Any:
        slope = matrix @ weights
        to, since = np.argmin(slope), np.argmax(np.where(weights > 0, slope, -np.inf))
        square = matrix[to, to] + matrix[since, since] - 2 * matrix[to, since]
        part = (slope[since] - slope[to]) / np.where(square > 0, square, 1)
        part = np.where(square > 0, np.minimum(np.maximum(part, 0), weights[since]), 0)
        return weights + part * ((numbers == to) * 1 - (numbers == since) * 1).astype(dtype)

    return place.fold(_SHIFTS, shift, np.full(count, 1 / count, dtype))
