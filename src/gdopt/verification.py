"""The end of a run, checked: is there really so little left to gain at the point that is returned?

Products of the Hessian with a few directions give what Newton's method would still gain, g'H^-1 g / 2, and show
negative curvature, which tells a saddle from a minimum. If they contradict the claim, the points that they lead to are
tried. If none of these is lower although the gradient promises it, the loss has a kink; then neighbours tell what a
gradient cannot.

All of it is computed with lists of real arrays: see `places`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from gdopt import _trees, stopping
from gdopt.kinks import lowest_beyond
from gdopt.places import (
    Blocks,
    Place,
    Probe,
    chance,
    combined,
    dot,
    largest,
    loss_at,
    neighbour,
    normal,
    products,
    shifted,
)
from gdopt.stopping import RUNNING, Ending, Limits, Status, Watch

_EXACT = 64  # entries of the params: the whole Hessian of so many is computed
_SWEEPS, _SIGNS = 5, 2  # to even the scales of the entries, with so many directions in each
_KRYLOV, _MANY_KRYLOV = 24, 96  # directions for more of them, at the most, and at the most where they are cheap
_LATE, _FADES = 0.02, 0.75  # no more of them where the last ones add less than this part of what all of them tell
_ENTRIES, _CHEAP, _FEWEST = 2**24, 2**21, 6  # of all directions together, and the fewest of these
_CLEAR = 1e-3  # of the largest curvature: less of a negative one tells nothing
_NOISE = 10  # eps times the number of directions: the rounding of a curvature
_KINK = 100  # times the rounding of the loss: what a step downhill should have gained
_ROUNDED, _ULPS = 3, 4.0  # points that tell how well the loss is known, and how far away: in eps of the params
_MOSTLY, _MUCH = 0.1, 1000  # of what was gained, and over that at the start: a loss with more noise tells nothing
_AGAIN = 0.2  # of what is left, where Newton's step has led to: 0.14 for exponentials and high powers, 0 for parabolas
_SLOWLY = 0.8  # of what is left, at the next point: after that Newton's method tells nothing
_STRETCH = 4.0  # the length of a try over that of the one before

# The points that are tried, one kind after the other: how many there are of each.
_KINDS = (8, 6, 32, 32, 16, 12, 2, 4, stopping.TRIED - 4)
_WEAK, _NEWTON, _NEGATIVE, _SECOND, _FLAT, _DOWNHILL, _BEYOND, _FEW, _MANY = range(len(_KINDS))
_ENDS = tuple(itertools.accumulate(_KINDS))
_FARTHEST = 1e6  # sizes of the params: a point so far away is nothing to go on from
_NEAR = 8  # the tries on either side that lie as far as the loss should change visibly, or farther
_MORE = 4  # times what Newton's step should gain: beyond it there is no minimum


class Check(NamedTuple):
    """What was found at a point."""

    left: Any  # to gain, in units of the loss; infinite if the curvature does not tell
    curved: Any  # whether the loss has a Hessian there
    negative: Any  # whether there is a direction of negative curvature
    lower: Any  # whether a point is lower by more than was allowed, or along a negative curvature by more than rounding
    below: Any  # the same by more than rounding, where the curvature cannot tell how much more is left
    kink: Any  # whether the gradient promises that the loss falls visibly, though no try showed it
    saturated: Any  # whether the loss depended on an entry at the start, and does not there
    point: Blocks  # the lowest found
    steepest: Any  # the largest entry of the gradient at the given one


class Claim(NamedTuple):
    """A run that has ended at a minimum, as it says."""

    code: Any
    step: Any
    params: Blocks  # that are returned
    moved: Blocks  # from the start
    loss: Any
    grad_norm: Any
    watch: Watch
    free: Blocks | None  # 0 for entries that the optimizer holds in their places, 1 for others


class Settled(NamedTuple):
    """What comes of a claim."""

    code: Any  # RUNNING if it is withdrawn
    ending: Ending
    watch: Watch
    moves: Any  # whether the run goes on at ``point``
    restarts: Any  # whether it starts its search anew there
    point: Blocks


def settle(
    place: Place,
    probe: Probe,
    differences: Callable[[Blocks, Blocks], Blocks],
    claim: Claim,
    limits: Limits,
    eps: float,
    *,
    exact: bool,
    searches: bool,
) -> Settled:
    """Verify a claim, or withdraw it: then the run goes on, if its optimizer ``searches`` at a lower point.

    An optimizer that does not is left on its own way; if it has come to its end, the run has stalled. Products of the
    Hessian are ``exact``, or ``differences`` of gradients where it is not finite.
    """
    grad = probe.at(claim.params)[1]
    if exact:
        probe, exact = _finite(place, probe, differences, claim.params)
    np, loss, watch = place.np, claim.loss, claim.watch
    begin = [x - moved for x, moved in zip(claim.params, claim.moved, strict=True)]
    noise = _noise(place, probe, claim.params, loss, grad).astype(loss.dtype)
    raw = noise
    drowned = noise > _MOSTLY * (watch.first_loss - loss)
    # A run that starts at its minimum gains no more than that, too.
    more = lambda: noise > _MUCH * _noise(place, probe, begin, watch.first_loss, None)
    drowned = place.when(drowned, more, lambda: drowned)
    noise = np.where(drowned, 0, noise)
    may, rounding = stopping.allowed(np, watch, loss, limits), np.maximum(stopping.resolution(loss, eps), noise)
    wanted = np.maximum(may, rounding)
    typical = [np.fmax(abs(x), abs(moved)) for x, moved in zip(claim.params, claim.moved, strict=True)]
    size = largest(np, typical)
    size = np.where(size > 0, size, 1)
    typical = [np.where(x > eps**2 * size, x, size).astype(x.dtype) for x in typical]  # others have not moved yet
    if claim.free is not None:
        typical = [x * f for x, f in zip(typical, claim.free, strict=True)]
    start = Start(begin, watch.first_loss, stopping.resolution(watch.first_loss, eps))
    limited = claim.code == Status.PRECISION_LIMIT
    seen = check(place, probe, claim.params, loss, grad, typical, start, wanted, rounding, exact=exact, limited=limited)
    unknown = (noise > stopping.resolution(loss, eps)) & (noise > seen.left)
    known = np.where(unknown, noise, seen.left)
    nothing = np.where(searches & ~limited, stopping.NOTHING, limits.tol * limits.tol)
    all_left = stopping.is_all(seen.left, loss, watch, nothing) & (claim.step > 0)
    lower = seen.lower | (seen.below & (limited | (claim.grad_norm == 0)))  # as on the way to a kink
    little = seen.curved & (seen.left <= wanted) & ~lower & ~all_left
    kink = limited & seen.kink & ~lower
    holds = (little | kink) & ~seen.saturated & ~drowned
    if limits.grad_tol is not None:
        holds = holds | (seen.steepest <= limits.grad_tol)
    by_rounding = limited & (kink | (known > may))
    name = np.where(by_rounding, Status.PRECISION_LIMIT, Status.CONVERGED)
    stuck = limited | (claim.grad_norm == 0) | (watch.grad_norm == 0)
    again = lower & searches & (watch.bar > stopping.LEAST_BAR)
    goes_on = ~holds & (again | ~stuck) & (claim.step < limits.max_steps)
    ended = np.where(stuck, Status.STALLED, Status.MAX_STEPS)
    code = np.where(holds, name, np.where(goes_on, RUNNING, ended))
    how = np.where(little, stopping.BY_CURVATURE, np.where(kink, stopping.BY_NEIGHBOURS, stopping.NOT_VERIFIED))
    how = np.where(little & unknown, stopping.UP_TO_NOISE, how)
    how = np.where(holds, how, stopping.NOT_VERIFIED)
    left = np.where(np.isfinite(known), known, np.nan)
    left = np.where(kink, rounding, left).astype(loss.dtype)  # by so much a neighbour may be lower
    saddle = np.where(seen.negative, stopping.SADDLE, stopping.NONE_SEEN)
    flaw = np.where(seen.saturated, stopping.SATURATED, np.where(drowned, stopping.DROWNED, saddle))
    left = np.where(drowned, raw, left)
    moves = goes_on & lower if searches else goes_on & False
    return Settled(
        code=code.astype(np.int32),
        ending=Ending(left, how.astype(np.int32), flaw.astype(np.int32)),
        watch=place.select(goes_on, stopping.contradicted(np, watch, claim.step), watch),
        moves=moves,
        restarts=moves & limited,
        point=seen.point,
    )


def _finite(place: Place, probe: Probe, differences: Callable, params: Blocks) -> tuple[Probe, Any]:
    """The probe with finite products of the Hessian, and whether they are exact."""
    np = place.np
    product = probe.times(params, [np.where(x == 0, 1, x).astype(x.dtype) for x in params])
    exact = np.stack([np.isfinite(block).all() for block in product]).all()
    # A root or a norm at zero that a loss leaves aside has no second derivative, and JAX gives NaN for all of it.
    times = lambda *given: place.when(exact, lambda: probe.times(*given), lambda: differences(*given))
    return probe._replace(times=times), exact


def _noise(place: Place, probe: Probe, params: Blocks, loss: Any, grad: Blocks | None) -> Any:
    """How far the loss is from its gradient's prediction a few roundings of the params away.

    A sum of large terms that cancel is known to much less than its own rounding.
    """
    np, dtype = place.np, _trees.norm_dtype(params)

    grad = probe.at(params)[1] if grad is None else grad

    def attempt(number: Any, most: Any) -> Any:
        ways = chance(place, params, number)
        there = [x * (1 + _ULPS * float(jnp.finfo(x.dtype).eps) * w) for x, w in zip(params, ways, strict=True)]
        there = [new.astype(x.dtype) for new, x in zip(there, params, strict=True)]
        expected = dot(place, grad, [new - x for new, x in zip(there, params, strict=True)], dtype)
        return np.fmax(most, abs(loss_at(place, probe, there) - loss - expected).astype(dtype))

    return place.fold(_ROUNDED, attempt, np.zeros((), dtype))


class _Spectrum(NamedTuple):
    """The Hessian between directions, and its eigenvalues."""

    basis: Blocks  # with a leading axis of directions, in units of the scale
    right: Any  # the gradient along each
    matrix: Any
    even: Any  # about the root of each direction's curvature, by which the matrix is divided from both sides
    values: Any  # of that, ascending
    vectors: Any
    weak: Any  # the gradient along each of them whose curvature is lost in rounding, 0 along others
    lowest: Any  # weights of another direction of negative curvature, if there is one
    noise: Any  # of the values
    known: Any


class Start(NamedTuple):
    """The first point of the run."""

    params: Blocks
    loss: Any
    rounding: Any  # of that


def check(
    place: Place,
    probe: Probe,
    params: Blocks,
    loss: Any,
    grad: Blocks,
    typical: Blocks,
    start: Start,
    allowed: Any,
    rounding: Any,
    *,
    exact: Any,
    limited: Any,
) -> Check:
    """Look for what is left to gain at a point, and for a lower one.

    ``typical`` is the size of each entry, 0 for those that are held in their places. At most ``allowed`` may be left;
    the loss is known up to ``rounding``. Products of the Hessian are ``exact``, or differences of gradients. A way down
    from a kink is looked for where the run is ``limited``: has come to its end.
    """
    np, eps = place.np, max(float(jnp.finfo(x.dtype).eps) for x in params)
    accuracy = np.where(exact, eps, eps ** (2 / 3))  # of curvatures
    dtype = _trees.norm_dtype(params)
    few = sum(x.size for x in params) <= _EXACT
    scale = typical if few else _evened(place, probe, params, typical)
    scaled = functools.partial(_scaled, scale)
    times = functools.partial(_scaled_product, probe, params, scale)
    found = _spectrum(place, times, scaled(grad), accuracy, dtype, whole=few)
    newton = _newton(place, found, found.right)
    out = lambda weights: [w * s for w, s in zip(combined(place, weights, found.basis), scale, strict=True)]
    step = out(-newton.weights)
    # There the gradient of a parabola is zero. If it is not much smaller, the Hessian tells little of the loss, as in a
    # curved valley (the test of Deuflhard, "Newton Methods for Nonlinear Problems", 2004, section 3.3).
    _, there = probe.at(shifted(params, step))
    again = _newton(place, found, products(place, found.basis, scaled(there), dtype)).left
    ulps = [np.where(s > 0, eps * x / np.where(s > 0, s, 1), 0) for x, s in zip(typical, scale, strict=True)]
    highest = np.max(np.abs(found.matrix))
    grain = highest * dot(place, ulps, ulps, dtype)  # the params are known no better
    least = np.maximum(rounding, grain)
    bends = ~(again <= np.maximum(_AGAIN * newton.left, least)) & (newton.left > rounding)
    # Along a valley the curvature changes, too: then it is that at the new point which tells how much more is left.
    little = found.known & ~bends & (newton.left <= allowed) & (newton.left > least)

    def further() -> Any:
        image = functools.partial(_scaled_product, probe, shifted(params, step), scale)
        new = _spectrum(place, image, scaled(there), accuracy, dtype, whole=True)
        return np.where(new.known, _newton(place, new, new.right).left, np.inf)

    more = place.when(little, further, lambda: 0 * newton.left) if few else 0 * newton.left
    share = more / np.where(newton.left > 0, newton.left, 1)
    bends = bends | (little & ~(share < _SLOWLY))
    newton = newton._replace(left=newton.left / np.where(little & (share < _SLOWLY), 1 - share, 1))
    left = np.where(found.known & ~bends, newton.left, np.where((found.right != 0).any(), np.inf, 0))
    left = left.astype(loss.dtype)
    little = found.known & (left <= allowed)

    visible = np.maximum(allowed, rounding)
    ways, lengths, promised = _directions(place, found, step, out, scaled(scaled(grad)), typical, visible)
    negative = found.known & (found.values[0] < -found.noise)
    flat = highest == 0
    sizes = np.abs(found.values)
    level = found.known & (np.min(sizes) <= found.noise) if few else found.known & False
    always = found.known | ~found.known
    goes = (found.right != 0).any()
    kinds = found.weak.any(), ~little, negative, negative, level, ~little, goes, always, ~little | flat
    tries = _Tries(place, probe, params, loss, left, rounding, typical, eps, ways, lengths, np.stack(kinds))
    best = tries.lowest(loss - visible)
    clear = negative & (found.values[0] < -_CLEAR * np.max(sizes))
    kink = found.known & ~little & (np.maximum(promised, newton.left) > _KINK * rounding)
    kink = kink & (best.finite > stopping.TRIED // 2)  # not outside of its domain
    beyond = lambda: lowest_beyond(place, probe, best.point, best.loss, typical, eps)
    lowest, point = place.when(
        kink & limited & ((loss - best.loss) * _KINK < promised), beyond, lambda: (best.loss, best.point)
    )
    return Check(
        left=np.maximum(left, loss - lowest),
        curved=found.known,
        negative=clear,
        lower=(lowest < loss - visible) | (clear & best.saddle) | best.beyond,
        below=(lowest < loss - rounding) & (~little | flat),
        kink=kink,
        saturated=_is_saturated(place, probe, params, loss, found, out, scaled, start, rounding)
        if few
        else flat & False,
        point=point,
        steepest=largest(np, grad),
    )


def _scaled(scale: Blocks, blocks: Blocks) -> Blocks:
    return [g.astype(s.dtype) * s for g, s in zip(blocks, scale, strict=True)]


def _scaled_product(probe: Probe, params: Blocks, scale: Blocks, way: Blocks) -> Blocks:
    """Multiply a direction by S H S, with the scale S."""
    along = [(w * s).astype(x.dtype) for w, s, x in zip(way, scale, params, strict=True)]
    return _scaled(scale, probe.times(params, along))


def _is_saturated(
    place: Place,
    probe: Probe,
    params: Blocks,
    loss: Any,
    found: _Spectrum,
    out: Callable,
    scaled: Callable,
    start: Start,
    rounding: Any,
) -> Any:
    """Tell whether entries went so far that the loss no longer depends on them, as it did at the start.

    As the width of a peak that became a line: gradient and curvature are zero there, and the loss is no minimum. A loss
    of zero may be one. For the whole Hessian, of entries in units of their sizes.
    """
    np = place.np
    curved = np.diagonal(found.matrix)
    lost = (curved <= 0) & (np.abs(curved) <= rounding) & (np.abs(found.right) <= rounding)

    def look() -> Any:
        slope = products(place, found.basis, scaled(probe.at(start.params)[1]), found.right.dtype)
        dead = lost & (np.abs(slope) > start.rounding)
        half = out(np.where(dead, 0.5, 0))
        side = lambda number: shifted(params, [(1 - 2 * number) * x for x in half])
        (changes,) = place.rows(lambda number: [np.abs(probe.at(side(number))[0] - loss)], 2)
        # One of them may be outside of the domain, but not both.
        return dead.any() & (np.fmax(*changes) <= rounding) & (loss != 0)

    return place.when(lost.any(), look, lambda: lost.any() & False)


class _Newton(NamedTuple):
    """Newton's step for a gradient."""

    weights: Any  # of the directions, for Newton's step away from the minimum
    left: Any  # to gain by it: g'H^-1 g / 2, with the absolute values of curvatures


def _newton(place: Place, found: _Spectrum, right: Any) -> _Newton:
    np = place.np
    parts = found.vectors.T @ (right / found.even)
    sizes = np.abs(found.values)
    firm = np.maximum(sizes, found.noise)
    weights = np.where(parts == 0, 0, parts / np.where(firm > 0, firm, 1))
    # A curvature that is lost in rounding may be smaller than that, and more be left.
    least = np.maximum(sizes, found.noise / (_NOISE * len(sizes)))
    gains = np.where(parts == 0, 0, parts * (parts / np.where(least > 0, least, 1))) / 2
    left = np.where((firm > 0).all(), np.sum(gains), np.where((parts != 0).any(), np.inf, 0))
    return _Newton(found.vectors @ weights / found.even, left)


def _directions(
    place: Place, found: _Spectrum, newton: Blocks, out: Callable, slope: Blocks, typical: Blocks, visible: Any
) -> tuple[Blocks, Any, Any]:
    """Ways to try, how far to go along each, and what the last promises.

    Downhill where the curvature is lost in rounding, as far as the loss should fall visibly; Newton's; two of negative
    curvature, as far as the loss should change visibly; the flattest; downhill, to the minimum of the parabola.
    """
    np, dtype = place.np, found.right.dtype
    highest = np.max(np.abs(found.matrix))
    size = np.max(np.abs(found.right))
    unit, steepest = found.right / np.where(size > 0, size, 1), np.where(highest == 0, 1, highest)
    bend, square = unit @ (found.matrix / steepest) @ unit, unit @ unit
    best = np.where(bend > 0, square / np.where(bend > 0, bend, 1) / steepest, 1)
    promised = np.where(bend > 0, size * (size * best) * square / 2, np.where(size > 0, np.inf, 0))

    whole = dot(place, typical, typical, dtype)

    def reach(way: Blocks) -> Any:
        """How far the params have come, or are from zero: farther away the loss may be nothing but rounding."""
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


class _Tries(NamedTuple):
    """Points that may be lower, one kind after the other."""

    place: Place
    probe: Probe
    params: Blocks
    loss: Any
    left: Any
    rounding: Any
    typical: Blocks
    eps: float
    ways: Blocks  # with a leading axis
    lengths: Any
    kinds: Any  # whether each kind is to be tried

    def lowest(self, wanted: Any) -> _Lowest:
        """Try up to a loss that is wanted."""
        np = self.place.np
        ends = np.stack([np.int32(end) for end in _ENDS])
        begins = np.stack([np.int32(begin) for begin in (0, *_ENDS[:-1])])

        far = _FARTHEST * largest(np, self.typical)

        def following(number: Any) -> Any:
            """The number from this one on that is of a kind to be tried."""
            return np.min(np.where(self.kinds & (number < ends), np.maximum(number, begins), _ENDS[-1]))

        def goes_on(search: tuple) -> Any:
            number, found = search
            return (number < _ENDS[-1]) & ~(found.loss < wanted)

        def attempt(search: tuple) -> tuple:
            number, found = search
            kind = np.sum(number >= ends)
            step = self._step(kind, number - begins[kind])
            there = shifted(self.params, step)
            value = loss_at(self.place, self.probe, there).astype(self.loss.dtype)
            near = np.stack([(abs(block) <= far).all() for block in step]).all()
            better = near & (value < found.loss)  # NaN is not
            falls = near & (value < self.loss - self.rounding)
            return following(number + 1), _Lowest(
                np.where(better, value, found.loss),
                [np.where(better, new, old) for new, old in zip(there, found.point, strict=True)],
                (found.finite + np.isfinite(value)).astype(number.dtype),
                found.saddle | (((kind == _NEGATIVE) | (kind == _SECOND)) & falls),
                found.beyond | ((kind == _BEYOND) & falls & (value < self.loss - _MORE * self.left)),
            )

        first = following(np.zeros((), np.int32))
        no = first < 0
        begin = first, _Lowest(self.loss, self.params, 0 * first, no, no)
        return self.place.loop(goes_on, attempt, begin)[1]

    def _step(self, kind: Any, count: Any) -> Blocks:
        """The way to the point of a kind that has this number among them."""
        np = self.place.np

        def along() -> Blocks:
            negative = (kind == _NEGATIVE) | (kind == _SECOND)
            both = negative | (kind == _FLAT)
            half = np.where(both, count // 2, count)
            # Farther out, then between the point and there.
            inwards = np.where(half < _NEAR, half, 1.5 * (_NEAR - 1 - half))
            power = np.where(negative, inwards, np.where(kind == _WEAK, half, -half))
            power = np.where(kind == _BEYOND, 1.5 * (half + 1), power)
            length = np.where(both & (count % 2 == 1), -1, 1) * _STRETCH ** power.astype(self.lengths.dtype)
            own = np.where(kind == _BEYOND, _NEWTON, kind)
            return [(length * self.lengths[own]).astype(rows.dtype) * rows[own] for rows in self.ways]

        def beside() -> Blocks:
            number = count + (kind == _MANY) * _KINDS[_FEW]
            return neighbour(self.place, number, self.typical, self.eps)

        return self.place.when(kind >= _FEW, beside, along)


class _Lowest(NamedTuple):
    """The lowest of the points that were tried."""

    loss: Any
    point: Blocks
    finite: Any  # how many were
    saddle: Any  # whether one along a negative curvature was lower by more than rounding
    beyond: Any  # whether one beyond Newton's step was lower than that should lead


def _spectrum(
    place: Place, times: Callable[[Blocks], Blocks], slope: Blocks, eps: Any, dtype: Any, *, whole: bool
) -> _Spectrum:
    """The eigenvalues of the Hessian: of all of it, or of what Lanczos' directions see."""
    np, count = place.np, sum(block.size for block in slope)
    basis, matrix = (_whole if whole else _krylov)(place, times, slope, count, dtype)
    right = products(place, basis, slope, dtype)
    known = np.isfinite(matrix).all() & np.isfinite(right).all()
    matrix, right = np.where(known, matrix, 0), np.where(np.isfinite(right), right, 0)
    even = _even(np, matrix) if whole else np.ones_like(right)
    values, vectors = np.linalg.eigh(matrix / even[:, None] / even[None, :])
    # Rounding between entries of very different scales can spoil the lowest: then that of the plain matrix is better.
    lowest = np.linalg.eigh(matrix)[1][:, 0] if whole else vectors[:, 1]
    noise = _NOISE * matrix.shape[0] * eps * np.max(np.abs(values))
    weak = np.where(np.abs(values) <= noise, vectors.T @ (right / even), 0)
    return _Spectrum(basis, right, matrix, even, values, vectors, weak, lowest, noise, known)


def _evened(place: Place, probe: Probe, params: Blocks, scale: Blocks) -> Blocks:
    """The scale by which all rows of S H S have a norm of about 1, where H is known by its products alone.

    Source: Bradley, "Algorithms for the equilibration of matrices and their application to limited-memory quasi-Newton
    methods", 2010, section 2.3 (a few directions of random signs tell the norms of all rows).
    """
    np = place.np

    def sweep(number: Any, scale: Blocks) -> Blocks:
        norms = [np.zeros_like(s) for s in scale]
        for probes in range(_SIGNS):
            signs = [np.where(x < 0, -1, 1) for x in chance(place, scale, _SIGNS * number + probes)]
            image = _scaled_product(probe, params, scale, signs)
            norms = [np.hypot(a, h) for a, h in zip(norms, image, strict=True)]
        rows = [a / _SIGNS**0.5 for a in norms]
        return [
            np.where((r > 0) & np.isfinite(r), s / np.sqrt(np.where(r > 0, r, 1)), s).astype(s.dtype)
            for r, s in zip(rows, scale, strict=True)
        ]

    return place.fold(_SWEEPS, sweep, scale)


def _even(np: Any, matrix: Any) -> Any:
    """Numbers that divide rows and columns of a symmetric matrix so that the largest entry of each is about 1.

    Not roots of the diagonal, which is zero for units of a network that have no output yet.
    Source: Ruiz, "A scaling algorithm to equilibrate both rows and columns norms in matrices", 2001.
    """
    even = np.ones_like(matrix[0])
    for _ in range(_SWEEPS):
        rows = np.max(np.abs(matrix / even[:, None] / even[None, :]), axis=1)
        even = even * np.where(rows > 0, np.sqrt(rows), 1)
    return even


def _whole(place: Place, times: Callable, like: Blocks, count: int, dtype: Any) -> tuple[Blocks, Any]:
    """Each entry as a direction, and the matrix between them."""
    np = place.np
    begins = [sum(block.size for block in like[:number]) for number in range(len(like))]
    basis = [
        np.eye(count, block.size, -begin, block.dtype).reshape(count, *block.shape)
        for block, begin in zip(like, begins, strict=True)
    ]
    images = place.rows(lambda number: times([rows[number] for rows in basis]), count)
    matrix = np.concatenate([block.reshape(count, -1).astype(dtype) for block in images], axis=1)
    return basis, (matrix + matrix.T) / 2


def _krylov(place: Place, times: Callable, slope: Blocks, count: int, dtype: Any) -> tuple[Blocks, Any]:
    """Directions from the gradient on, with a little of chance in it, and the matrix between them.

    Source: Lanczos, "An iteration method for the solution of the eigenvalue problem", 1950; orthogonalised in full.
    """
    np, size = place.np, max(_FEWEST, min(_KRYLOV, _ENTRIES // count), min(_MANY_KRYLOV, _CHEAP // count))
    random = normal(place, chance(place, slope, 0), dtype)
    first = normal(place, [a + 0.1 * b for a, b in zip(normal(place, slope, dtype), random, strict=True)], dtype)
    rows = [place.put(np.zeros((size, *block.shape), block.dtype), 0, block) for block in first]
    one = np.ones((), dtype)

    def goes_on(carry: tuple) -> Any:
        number, *_, total, late = carry
        return (number < size) & ~((number >= _KRYLOV) & (late < _LATE * total))

    def follow(carry: tuple) -> tuple:
        number, rows, matrix, pivot, weight, total, late = carry
        image = times([block[number] for block in rows])
        along = products(place, rows, image, dtype)
        matrix = place.put(matrix, number, along)
        for _ in range(2):  # once leaves what rounding has put there
            taken = combined(place, products(place, rows, image, dtype), rows)
            image = [a - b for a, b in zip(image, taken, strict=True)]
        following = normal(place, image, dtype)
        rows = [place.put(block, number + 1, x) for block, x in zip(rows, following, strict=True)]
        # What this direction adds to what Newton's step gains, by the pivots of the matrix.
        across = np.where(number > 0, along[np.maximum(number - 1, 0)], 0) / pivot
        pivot, weight = along[number] - across**2 * pivot, np.where(number > 0, -weight * across, 1)
        gain = weight**2 / abs(pivot)
        return number + 1, rows, matrix, pivot, weight, total + gain, _FADES * late + gain

    begin = np.zeros((), np.int32), rows, np.zeros((size, size), dtype), one, one, 0 * one, 0 * one
    number, rows, matrix, *_ = place.loop(goes_on, follow, begin)
    used = np.arange(size) < number  # one direction more is there already
    rows = [np.where(used.reshape(-1, *(1,) * (block.ndim - 1)), block, 0) for block in rows]
    lower = np.tril(matrix)  # at its time each direction knew nothing of the later ones
    return rows, lower + np.tril(matrix, -1).T
