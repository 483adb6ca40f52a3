"""The check of a claim within a convex set, or with a penalty: is little left to gain there by the curvature?

Projected or proximal steps minimise the parabola of the loss within the set, by products of the Hessian. Their gain is
what Newton's method would still gain there. Then the point that they lead to, and neighbours in the set, are tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gdopt import _trees
from gdopt._verify.counterexamples import Point
from gdopt._verify.places import Blocks, Place, Probe, chance, coarsest, dot, largest, loss_at, neighbour, shifted

_STEPS, _MOST = 60, 1000  # the steps on the parabola, each with a product of the Hessian, besides those of the run
_ENOUGH = 0.01  # the gain of the second half of the steps, over that of all, below which they end
_LEAST = 0.01  # the gain of interest, over what may be left
_LONGER = 10  # the rate over the last one along a direction without curvature
_LEAPS = 3  # the sets of entries that creep
_TRIED = 24  # the neighbours that are tried
_BESIDE = 0.5  # the first point's distance from the given one, as a power of eps
_OUTSIDE = 1e3  # the move of a step of rate 0, in eps of the largest entry, that shows a point outside of the set
_SHORT = 0.6  # the rate at which the gradient of a penalty is read, over one as long as the params, as a power of eps
_STEEP = 4  # the slope of the border of a set, and the most of a penalty, over the gradient of the loss
_ROUNDED = 10  # the distance from a set that may be rounding, in eps of the largest entry

# (params, rate) -> (the nearest or the proximal point, the penalty there; NaN if it is not known)
Move = Callable[[Blocks, Any], tuple[Blocks, Any]]


class Found(NamedTuple):
    """The findings of `look`; see `claim.Check`."""

    left: Any
    lower: Any
    loss: Any
    point: Blocks
    steepest: Any  # the largest entry of the projected gradient
    outside: Any  # whether the given point is outside of the set, as it may be if that is not convex


class Walk(NamedTuple):
    """A walk down the parabola q(y) = g'(y - x) + (y - x)'H(y - x) / 2 with the penalty."""

    number: Any
    point: Blocks
    grad: Blocks  # of the parabola at the point
    penalty: Any
    rate: Any
    gain: Any  # since the given point
    older: Any  # the gain after between a quarter and half of the steps
    recent: Any  # the same after half of them or more
    doubles: Any  # the step at which they are renewed
    most: Any  # the most steps


# (walk, the given point) -> the walk at its end
Advance = Callable[[Walk, Point], Walk]


def look(place: Place, probe: Probe, move: Move, here: Point, steps: Any, advance: Advance | None = None) -> Found:
    """Return what is left to gain at a point to which a run made so many steps, and the lowest point that was seen.

    ``advance`` walks in place of `advanced`.
    """
    np, dtype = place.np, _trees.norm_dtype(here.params)
    still, penalty = move(here.params, np.zeros((), dtype))
    walk = _begun(place, probe, move, here, penalty)._replace(most=np.minimum(_STEPS + steps, _MOST).astype(np.int32))
    walk = advanced(place, probe, move, here, walk, walk.most) if advance is None else advance(walk, here)
    since = np.maximum(walk.gain - walk.older, 0)  # Further steps gain about as much.
    walk = place.fold(_LEAPS, lambda _, walk: _leapt(place, probe, move, here, walk), walk)
    left = np.where(np.isfinite(walk.gain), np.maximum(walk.gain, 0) + since, np.inf)
    # Without the penalty, a lower loss says nothing.
    knows = np.isfinite(walk.penalty)
    best, point = place.when(
        knows, lambda: _lowest(place, probe, move, here, walk.point), lambda: (here.loss, here.params)
    )
    visible = np.maximum(here.allowed, here.rounding)
    left = np.maximum(left.astype(here.loss.dtype), here.loss - best)
    steepest = largest(np, _residual(np, move, here.params, here.grad))
    moved = largest(np, [x - new for x, new in zip(here.params, still, strict=True)])
    outside = moved > _OUTSIDE * coarsest(here.params) * largest(np, here.params)
    return Found(left, best < here.loss - visible, best, point, steepest, outside)


def bordered(probe: Probe, move: Move, here: Point, np: Any) -> Probe:
    """Return the probe of all that is minimised, also outside of the set.

    A point has the loss and the gradient of the nearest point y of the set. A gradient of the penalty is added to that,
    (y - p) / t with the proximal point p at a small rate t; and a border outside that holds the loss back.
    """
    dtype, eps = _trees.norm_dtype(here.params), coarsest(here.params)
    rate = long_rate(np, largest(np, here.params), largest(np, here.grad)).astype(dtype)
    rate, zero = (rate * eps**_SHORT).astype(dtype), np.zeros((), dtype)
    away = lambda a, b: [x - y for x, y in zip(a, b, strict=True)]

    def at(params: Blocks) -> tuple[Any, Blocks]:
        inside = move(params, zero)[0]
        loss, grad = probe.at(inside)
        most = _STEEP * largest(np, grad)

        def pull(way: Blocks, length: Any, share: Any) -> Blocks:
            factor = np.where(length > 0, share / np.where(length > 0, length, 1), 0)
            return [factor.astype(w.dtype) * w for w in way]

        out, back = away(params, inside), away(inside, move(inside, rate)[0])
        far, long = largest(np, out), largest(np, back)
        border = pull(out, np.where(far > _ROUNDED * eps * largest(np, params), far, 0), most)
        penalty = pull(back, long, np.minimum(long / rate, most))
        return loss, [(g + b + p).astype(g.dtype) for g, b, p in zip(grad, border, penalty, strict=True)]

    return probe._replace(at=at)


def _residual(np: Any, move: Move, params: Blocks, grad: Blocks) -> Blocks:
    """Return the projected gradient (x - P(x - t g)) / t of a step as long as the params."""
    rate = long_rate(np, largest(np, params), largest(np, grad)).astype(_trees.norm_dtype(params))
    there, _ = move(_descended(params, grad, rate), rate)
    return [(x - new) / rate.astype(x.dtype) for x, new in zip(params, there, strict=True)]


def _begun(place: Place, probe: Probe, move: Move, here: Point, penalty: Any) -> Walk:
    """Return the walk before its first step, from a point with this penalty."""
    np, dtype = place.np, _trees.norm_dtype(here.params)
    rate = long_rate(np, largest(np, here.params), largest(np, here.grad)).astype(dtype)
    zero, number = np.zeros((), dtype), np.zeros((), np.int32)
    # It begins beside the point, from where a walk leads down a saddle, too.
    share = np.where(np.isfinite(penalty), coarsest(here.params) ** _BESIDE, 0)
    away = [(share * t).astype(t.dtype) * w for t, w in zip(here.typical, chance(place, here.params, 1), strict=True)]
    begin, near = move(shifted(here.params, away), zero)
    step = [y - x for y, x in zip(begin, here.params, strict=True)]
    bent = probe.times(here.params, step)
    fall = dot(place, here.grad, step, dtype) + dot(place, step, bent, dtype) / 2
    grad = [g + b for g, b in zip(here.grad, bent, strict=True)]
    rise = np.where(np.isfinite(near - penalty), near - penalty, 0).astype(dtype)
    unknown = zero - np.inf
    gain = (-(fall + rise)).astype(dtype)
    return Walk(number, begin, grad, near, rate, gain, unknown, unknown, number + np.int32(2), number)


def advanced(place: Place, probe: Probe, move: Move, here: Point, walk: Walk, limit: Any) -> Walk:
    """Return the walk at its end, or after so many steps in all.

    A claim is refuted once more was gained than may be left. Then a part of the steps is enough.
    """
    np, dtype = place.np, _trees.norm_dtype(here.params)

    def goes_on(walk: Walk) -> Any:
        least = _ENOUGH * np.maximum(abs(walk.gain), _LEAST * here.allowed.astype(dtype))
        room = walk.number < np.minimum(np.where(walk.gain > here.allowed, _STEPS + walk.most // 4, walk.most), limit)
        return room & ~(walk.gain - walk.older <= least) & np.isfinite(walk.gain)

    def stepped(walk: Walk) -> Walk:
        there, penalty = move(_descended(walk.point, walk.grad, walk.rate), walk.rate)
        way = _way(place, probe, here, walk, there, penalty, walk.rate)
        curved = way.curve > 0
        share = np.where(curved, way.share, 1).astype(dtype)
        rate = np.where(curved, way.square / np.where(curved, way.curve, 1), _LONGER * walk.rate)
        rate = np.where(np.isfinite(rate) & (rate > 0), rate, walk.rate).astype(dtype)
        number = (walk.number + 1).astype(np.int32)
        gain = (walk.gain + way.gain(share)).astype(dtype)
        new = way.gone(share)._replace(number=number, rate=rate, gain=gain)
        renewed = new._replace(older=walk.recent, recent=gain, doubles=(2 * walk.doubles).astype(np.int32))
        return place.select(number == walk.doubles, renewed, new)

    return place.loop(goes_on, stepped, walk)


class _Way(NamedTuple):
    """The straight way from the point of a walk to another point of the set."""

    walk: Walk
    step: Blocks
    bent: Blocks  # the Hessian times the step
    penalty: Any  # at its end
    square: Any  # of its length
    curve: Any
    slope: Any  # that of the parabola and of the penalty
    share: Any  # the part of it that leads to the minimum, if it is curved

    def gain(self, share: Any) -> Any:
        """Return the gain of a part. A penalty is convex, so there it is at most the mean of both ends."""
        return -(share * self.slope + share * share * self.curve / 2)

    def gone(self, share: Any) -> Walk:
        """Return the walk after a part."""
        walk, add = self.walk, lambda x, y: (x + share.astype(x.dtype) * y).astype(x.dtype)
        return walk._replace(
            point=[add(y, s) for y, s in zip(walk.point, self.step, strict=True)],
            grad=[add(g, b) for g, b in zip(walk.grad, self.bent, strict=True)],
            penalty=(walk.penalty + share * (self.penalty - walk.penalty)).astype(walk.penalty.dtype),
        )


def _way(place: Place, probe: Probe, here: Point, walk: Walk, there: Blocks, penalty: Any, rate: Any) -> _Way:
    """Return the way to a point to which a step at a rate leads."""
    np, dtype = place.np, _trees.norm_dtype(here.params)
    step = [new - y for new, y in zip(there, walk.point, strict=True)]
    bent = probe.times(here.params, step)
    square, curve = dot(place, step, step, dtype), dot(place, step, bent, dtype)
    slope = dot(place, walk.grad, step, dtype) + (penalty - walk.penalty).astype(dtype)
    slope = np.where(np.isnan(penalty), -square / rate, slope)  # It is at most that.
    share = np.clip(-slope / np.where(curve > 0, curve, 1), 0, 1)
    return _Way(walk, step, bent, penalty, square, curve, slope, share)


def _leapt(place: Place, probe: Probe, move: Move, here: Point, walk: Walk) -> Walk:
    """Move the entries that creep as far as they go: those that the penalty or a slope pulls without curvature.

    The others end the walk. A step as long as the params does not turn the residual of an entry that creeps.
    """
    np, dtype = place.np, _trees.norm_dtype(here.params)
    residual, size = _residual(np, move, walk.point, walk.grad), largest(np, walk.point)

    def far(pull: Blocks) -> tuple[Blocks, Any]:
        rate = long_rate(np, size, largest(np, pull)).astype(dtype)
        there, _ = move(_descended(walk.point, walk.grad, rate), rate)
        return [new - y for new, y in zip(there, walk.point, strict=True)], rate

    turned = probe.times(here.params, far(residual)[0])
    creeps = [abs(b) <= abs(r) for b, r in zip(turned, residual, strict=True)]
    step, rate = far([np.where(c, r, 0) for c, r in zip(creeps, residual, strict=True)])
    step = [np.where(c, s, 0) for c, s in zip(creeps, step, strict=True)]
    there, penalty = move(shifted(walk.point, step), np.zeros((), dtype))  # A part of a step may lead out of the set.
    way = _way(place, probe, here, walk, there, penalty, rate)
    share = np.where(way.curve > 0, way.share, way.slope < 0).astype(dtype)
    gain = way.gain(share)
    finite = np.isfinite(gain)
    more = np.where(finite, gain, 0).astype(walk.gain.dtype)
    return way.gone(np.where(finite, share, 0).astype(dtype))._replace(gain=walk.gain + more)


def _lowest(place: Place, probe: Probe, move: Move, here: Point, point: Blocks) -> tuple[Any, Blocks]:
    """Return the lowest loss among a point, neighbours in the set, and the given point."""
    np, zero = place.np, place.np.zeros((), _trees.norm_dtype(here.params))

    def better(best: tuple, there: Blocks) -> tuple:
        value = loss_at(place, probe, there).astype(here.loss.dtype)
        lower = value < best[0]  # NaN is not.
        return np.where(lower, value, best[0]), [np.where(lower, a, b) for a, b in zip(there, best[1], strict=True)]

    def attempt(number: Any, best: tuple) -> tuple:
        beside = shifted(here.params, neighbour(place, number, here.typical, coarsest(here.params)))
        return better(best, move(beside, zero)[0])

    return place.fold(_TRIED, attempt, better((here.loss, here.params), point))


def _descended(params: Blocks, grad: Blocks, rate: Any) -> Blocks:
    return [(x - rate.astype(x.dtype) * g).astype(x.dtype) for x, g in zip(params, grad, strict=True)]


def long_rate(np: Any, size: Any, grad_size: Any) -> Any:
    """Return the rate of a step as long as the params; 1 if these or the gradient are zero."""
    ratio = size / np.where(grad_size > 0, grad_size, 1)
    return np.where(np.isfinite(ratio) & (ratio > 0) & (grad_size > 0), ratio, 1)
