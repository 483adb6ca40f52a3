"""The check of a run's claim: is there really so little left to gain at the point that is returned?

Products of the Hessian with a few directions give what Newton's method would still gain, g'H^-1 g / 2. They also show
negative curvature, which distinguishes a saddle from a minimum. If they contradict the claim, the points that they lead
to are tried. If none of these is lower although the gradient promises it, the loss has a kink. Then neighbours show
what a gradient cannot.

All of it is computed with lists of real arrays: see `places`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from gdopt import _stopping, _trees
from gdopt._status import RUNNING, Status
from gdopt._stopping import Ending, Limits, Watch
from gdopt._verify.composite import Advance, Found, Move, bordered, look
from gdopt._verify.counterexamples import TRIED, Lowest, Point, directions, lowest, resized, wanted_kinds
from gdopt._verify.kinks import Below, look_below
from gdopt._verify.places import Blocks, Place, Probe, chance, coarsest, count_of, dot, largest, loss_at, shifted
from gdopt._verify.spectrum import Spectrum, evened, newton_step, spectrum

_EXACT = 64  # the most entries of the params whose whole Hessian is computed
_CLEAR = 1e-3  # the least negative curvature that counts, over the largest curvature
_PART = 0.5  # the gain of a try over what a parabola promises from which on there is no kink
_KINK = 100  # the gain that a step downhill should have had, over the rounding of the loss
_ROUNDED, _ULPS = 3, 4.0  # the points that measure the noise of the loss, and their distance in eps of the params
_MOSTLY, _MUCH = 0.1, 1000  # the most noise of a usable loss, over the gain, and over the noise at the start
_AGAIN = 0.2  # the rest after Newton's step: it is 0.14 for exponentials and high powers, 0 for parabolas
_LITTLE = 10  # the effect of an entry, over the rounding of the loss, below which the loss no longer depends on it
_STEEPER = 100  # the slope of such an entry at the start, over that of a parabola
_SLOWLY = 0.8  # the rest at the next point above which Newton's method says nothing


class Check(NamedTuple):
    """The findings at a point."""

    left: Any  # the gain that is left, in units of the loss; infinite if the curvature does not show it
    curved: Any  # whether the loss has a Hessian there
    negative: Any  # whether there is a direction of negative curvature
    lower: Any  # whether a point is lower by more than was allowed, or along a negative curvature by more than rounding
    below: Any  # whether a point is lower by more than rounding, if the curvature does not show how much more is left
    kink: Any  # whether the gradient promises that the loss falls, though no gradient around it does, nor any try
    slope: Any  # the slope there
    saturated: Any  # whether the loss depended on an entry at the start, but does not here
    point: Blocks  # the lowest point found
    steepest: Any  # the largest entry of the gradient at the given point
    outside: Any  # whether the point is outside of the set of a projection or a prox


class Claim(NamedTuple):
    """The claim of a run that it has ended at a minimum."""

    code: Any
    step: Any
    params: Blocks  # the returned ones
    begin: Blocks  # the start of the run
    loss: Any
    grad_norm: Any
    watch: Watch
    free: Blocks | None  # 0 for entries that the optimizer holds in their places, 1 for others

    @property
    def moved(self) -> Blocks:
        """The distance from the start."""
        return [x - start for x, start in zip(self.params, self.begin, strict=True)]


class Settled(NamedTuple):
    """The outcome of a claim."""

    code: Any  # RUNNING if it is withdrawn
    ending: Ending
    watch: Watch
    moves: Any  # whether the run continues at ``point``
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
    move: Move | None = None,
    advance: Advance | None = None,
) -> Settled:
    """Verify a claim, or withdraw it: then the run continues, at a lower point if its optimizer ``searches``.

    Another optimizer keeps its own way, and if it has come to its end, the run has stalled. Products of the Hessian are
    ``exact``, or ``differences`` of gradients if it is not finite. ``move`` makes the steps of a projection or a prox,
    and ``advance`` walks by them: see `composite.look`.
    """
    np, loss, watch = place.np, claim.loss, claim.watch
    grad = probe.at(claim.params)[1]
    if exact:
        probe, exact = _finite(place, probe, differences, claim.params)
    noise, drowned = known(place, _within(probe, move), claim, grad)
    own, may = _stopping.resolution(loss, eps), _stopping.allowed(np, watch, loss, limits)
    rounding = np.where(drowned, own, np.maximum(own, noise))
    here = Point(claim.params, loss, grad, _typical(np, claim, eps), rounding, np.maximum(may, rounding))
    start = Start(claim.begin, _stopping.resolution(watch.first_loss, eps), watch.first_loss - loss)
    limited = claim.code == Status.PRECISION_LIMIT
    if move is None:
        seen = check(place, probe, here, start, exact=exact, limited=limited)
    else:
        found = look(place, probe, move, here, claim.step, advance if advance is not None and exact else None)
        seen = check_within(place, probe, move, here, found, limited=limited)

    nothing = np.where(searches & ~limited, _stopping.NOTHING, limits.tol * limits.tol)
    all_left = _stopping.is_all(seen.left, loss, watch, nothing) & (claim.step > 0)
    lower = seen.lower | (seen.below & (limited | (claim.grad_norm == 0)))  # This happens on the way to a kink.
    little = seen.curved & (seen.left <= here.allowed) & ~lower & ~all_left
    kink = limited & seen.kink & ~lower & (seen.slope <= _MOSTLY * (watch.first_loss - loss))
    holds = (little | kink) & ~seen.saturated & ~drowned
    if limits.grad_tol is not None:
        holds = holds | (seen.steepest <= limits.grad_tol)
    holds = holds & ~seen.outside
    hides = ~drowned & (noise > own) & (noise > seen.left)  # whether rounding hides what is left
    left = np.where(drowned | hides, noise, np.where(np.isfinite(seen.left), seen.left, np.nan))
    soon = claim.step < watch.patience  # Claims without steps in between would never end.
    stuck = limited | (claim.grad_norm == 0) | (watch.grad_norm == 0) | soon
    again = lower & searches & (watch.bar > _stopping.LEAST_BAR)
    goes_on = ~holds & (again | ~stuck) & (claim.step < limits.max_steps)
    moves = goes_on & lower & searches

    name = np.where(limited & (kink | (left > may)), Status.PRECISION_LIMIT, Status.CONVERGED)
    ended = np.where(stuck, Status.STALLED, Status.MAX_STEPS)
    code = np.where(holds, name, np.where(goes_on, RUNNING, ended))
    by_curvature = np.where(hides, _stopping.UP_TO_NOISE, _stopping.BY_CURVATURE)
    how = np.where(little, by_curvature, np.where(kink, _stopping.BY_NEIGHBOURS, _stopping.NOT_VERIFIED))
    how = np.where(holds, how, _stopping.NOT_VERIFIED)
    left = np.where(kink, np.maximum(rounding, seen.slope), left).astype(loss.dtype)
    saddle = np.where(seen.negative, _stopping.SADDLE, _stopping.NONE_SEEN)
    flaw = np.where(seen.saturated, _stopping.SATURATED, np.where(drowned, _stopping.DROWNED, saddle))
    flaw = np.where(seen.outside, _stopping.OUTSIDE, flaw)
    return Settled(
        code=code.astype(np.int32),
        ending=Ending(left, how.astype(np.int32), flaw.astype(np.int32)),
        watch=place.select(goes_on, _stopping.contradicted(np, watch, claim.step), watch),
        moves=moves,
        restarts=moves & limited,
        point=seen.point,
    )


def _typical(np: Any, claim: Claim, eps: float) -> Blocks:
    """Return the size of each entry: how large it is, or how far it has come."""
    sizes = [np.fmax(abs(x), abs(moved)) for x, moved in zip(claim.params, claim.moved, strict=True)]
    size = largest(np, sizes)
    size = np.where(size > 0, size, 1)
    least = float(jnp.finfo(_trees.norm_dtype(sizes)).tiny) ** 0.5  # The square of a smaller number is zero.
    sizes = [np.where(x > eps**2 * size, x, size) for x in sizes]  # The others have not moved yet.
    sizes = [np.maximum(size, least).astype(x.dtype) for size, x in zip(sizes, claim.params, strict=True)]
    return sizes if claim.free is None else [x * f for x, f in zip(sizes, claim.free, strict=True)]


def _within(probe: Probe, move: Move | None) -> Probe:
    """Return a probe whose points are moved into the set: next to it a penalty may be infinite."""
    if move is None:
        return probe
    return probe._replace(at=lambda xs: probe.at(move(xs, (0 * xs[0].real.sum()).astype(_trees.norm_dtype(xs)))[0]))


def known(place: Place, probe: Probe, claim: Claim, grad: Blocks) -> tuple[Any, Any]:
    """Return the noise of the loss, and whether most of the gain is noise."""
    free = claim.free
    noise = _noise(place, probe, claim.params, claim.loss, grad, free).astype(claim.loss.dtype)
    drowned = noise > _MOSTLY * (claim.watch.first_loss - claim.loss)

    def more() -> Any:
        begin = claim.begin
        return noise > _MUCH * _noise(place, probe, begin, claim.watch.first_loss, probe.at(begin)[1], free)

    # A run that starts at its minimum gains no more than noise either, but there the noise is the same as at the start.
    return noise, place.if_any(drowned, more, lambda: drowned)


def _finite(place: Place, probe: Probe, differences: Callable, params: Blocks) -> tuple[Probe, Any]:
    """Return the probe with finite products of the Hessian, and whether they are exact."""
    np = place.np
    product = probe.times(params, [np.where(x == 0, 1, x).astype(x.dtype) for x in params])
    exact = np.stack([np.isfinite(block).all() for block in product]).all()
    # An unused root or norm at zero has no second derivative, and then JAX gives NaN for the whole product.
    times = lambda *given: place.when(exact, lambda: probe.times(*given), lambda: differences(*given))
    return probe._replace(times=times), exact


def _noise(place: Place, probe: Probe, params: Blocks, loss: Any, grad: Blocks, free: Blocks | None) -> Any:
    """Measure how far the loss is from its gradient's prediction a few roundings of the params away.

    A sum of large terms that cancel has a much larger error than its own rounding.
    """
    np, dtype = place.np, _trees.norm_dtype(params)

    def attempt(number: Any, most: Any) -> Any:
        ways = chance(place, params, number)
        ways = ways if free is None else [w * f for w, f in zip(ways, free, strict=True)]
        there = [x * (1 + _ULPS * float(jnp.finfo(x.dtype).eps) * w) for x, w in zip(params, ways, strict=True)]
        there = [new.astype(x.dtype) for new, x in zip(there, params, strict=True)]
        expected = dot(place, grad, [new - x for new, x in zip(there, params, strict=True)], dtype)
        return np.fmax(most, abs(loss_at(place, probe, there) - loss - expected).astype(dtype))

    return place.fold(_ROUNDED, attempt, np.zeros((), dtype))


class Start(NamedTuple):
    """The first point of the run."""

    params: Blocks
    rounding: Any  # of the loss
    gain: Any  # what the run has gained since


def check(place: Place, probe: Probe, here: Point, start: Start, *, exact: Any, limited: Any) -> Check:
    """Find what is left to gain at a point, and look for a lower one.

    Products of the Hessian are ``exact``, or differences of gradients. If the run is ``limited``, that is, has come to
    its end, look for a way down from a kink.
    """
    np, loss = place.np, here.loss
    found, newton, gain, left = _model(place, probe, here, exact)
    left = left.astype(loss.dtype)
    little = found.known & (left <= here.allowed)
    negative = found.known & (found.values[0] < -found.noise)
    clear = negative & (found.values[0] < -_CLEAR * np.max(np.abs(found.values)))
    flat = found.highest == 0
    visible = np.maximum(here.allowed, here.rounding)

    ways, lengths, promised = directions(place, found, newton, here.grad, here.typical, visible)
    kinds = wanted_kinds(place, found, little, negative)
    best = lowest(place, probe, here, left, ways, lengths, kinds, loss - visible)
    promised = np.maximum(promised, gain)
    kink = found.known & ~little & (promised > _KINK * here.rounding)
    kink = kink & (best.finite > TRIED // 2)  # Few finite points show the border of the domain.
    hidden = kink & limited & (loss - best.loss < _PART * promised)
    if found.whole:
        best = _beyond_idle(place, probe, here, found, best, little, loss - visible)
    nothing = np.zeros((), found.right.dtype)
    down = lambda: look_below(place, probe, best.point, best.loss, here.typical)
    below = place.if_any(hidden, down, lambda: Below(best.loss, best.point, nothing, nothing > 0))
    return Check(
        left=np.maximum(left, loss - below.loss),
        curved=found.known,
        negative=clear,
        lower=(below.loss < loss - visible) | (clear & best.saddle) | best.beyond,
        below=(below.loss < loss - here.rounding) & (~little | flat),
        kink=kink & below.tells & (below.slope < np.inf),
        slope=below.slope,
        saturated=_is_saturated(place, probe, here, found, start),
        point=below.point,
        steepest=largest(np, here.grad),
        outside=loss != loss,
    )


def _beyond_idle(
    place: Place, probe: Probe, here: Point, found: Spectrum, best: Lowest, little: Any, wanted: Any
) -> Lowest:
    """Return a lower point than the best so far, if another size of an entry without any effect nearby leads to one."""
    np = place.np
    none = coarsest(here.params) * here.rounding
    idle = little & (np.abs(np.diagonal(found.matrix)) <= none) & (np.abs(found.right) <= none)
    tried = lambda: resized(place, probe, here, found, idle, wanted)
    value, point = place.if_any(idle.any(), tried, lambda: (here.loss, here.params))
    better = value < best.loss
    point = [np.where(better, new, old) for new, old in zip(point, best.point, strict=True)]
    return best._replace(loss=np.where(better, value, best.loss), point=point)


def check_within(place: Place, probe: Probe, move: Move, here: Point, found: Found, *, limited: Any) -> Check:
    """Judge what was found at a point of a convex set, or with a penalty.

    If the run is ``limited``, look for a way down from a kink.
    """
    np, no = place.np, here.loss != here.loss
    known = np.isfinite(found.left)
    little = known & (found.left <= here.allowed)
    nothing = np.zeros((), _trees.norm_dtype(here.params))
    flat = Below(found.loss, found.point, nothing, nothing > 0)
    hidden = limited & ~little & ~(found.loss < here.loss - here.rounding)

    def down() -> Below:
        below = look_below(place, bordered(probe, move, here, np), found.point, found.loss, here.typical)
        return below._replace(point=move(below.point, nothing)[0])

    below = place.if_any(hidden, down, lambda: flat)
    return Check(
        left=found.left,
        curved=known,
        negative=no,
        lower=found.lower | (below.loss < here.loss - np.maximum(here.allowed, here.rounding)),
        below=(below.loss < here.loss - here.rounding) & ~little,
        kink=hidden & below.tells & (below.slope < np.inf),
        slope=below.slope,
        saturated=no,
        point=below.point,
        steepest=found.steepest,
        outside=found.outside,
    )


def _model(place: Place, probe: Probe, here: Point, exact: Any) -> tuple[Spectrum, Blocks, Any, Any]:
    """The curvature, Newton's step, its gain by the curvature, and what is left; infinite if that does not tell."""
    np, eps, dtype = place.np, coarsest(here.params), _trees.norm_dtype(here.params)
    accuracy = np.where(exact, eps, eps ** (2 / 3))  # the accuracy of curvatures
    few = count_of(here.params) <= _EXACT
    scale = here.typical if few else evened(place, probe, here.params, here.typical)
    found = spectrum(place, probe, here.params, here.grad, scale, accuracy, dtype, whole=few)
    weights, gain = newton_step(place, found, found.right)
    step = found.way(place, -weights)
    there = shifted(here.params, step)
    grad = probe.at(there)[1]

    # After Newton's step the gradient of a parabola is zero. If it is not much smaller, the Hessian says little about
    # the loss, as in a curved valley (the test of Deuflhard, "Newton Methods for Nonlinear Problems", 2004, 3.3).
    _, again = newton_step(place, found, found.along(place, grad))
    ulps = [np.where(s > 0, eps * x / np.where(s > 0, s, 1), 0) for x, s in zip(here.typical, scale, strict=True)]
    grain = found.highest * dot(place, ulps, ulps, dtype)  # The params are known no better.
    least = np.maximum(here.rounding, grain)
    bends = ~(again <= np.maximum(_AGAIN * gain, least)) & (gain > here.rounding)

    # Along a valley the curvature changes, too. Then the curvature at the new point shows how much more is left.
    asks = found.known & ~bends & (gain <= here.allowed) & (gain > least) & few

    def further() -> Any:
        new = spectrum(place, probe, there, grad, scale, accuracy, dtype, whole=True)
        return np.where(new.known, newton_step(place, new, new.right)[1], np.inf)

    more = place.if_any(asks, further, lambda: 0 * gain) if few else 0 * gain
    share = more / np.where(gain > 0, gain, 1)
    tells = found.known & ~bends & (~asks | (share < _SLOWLY))
    left = np.where(tells, gain, np.where((found.right != 0).any(), np.inf, 0))
    left = left / np.where(tells & asks, 1 - share, 1)
    return found, step, gain, left


def _is_saturated(place: Place, probe: Probe, here: Point, found: Spectrum, start: Start) -> Any:
    """Tell whether entries went so far that the loss no longer depends on them, as it did at the start.

    An example is the width of a peak that became a line: gradient and curvature are zero up to rounding, but the loss
    is no minimum. A loss of zero may be one. Only the whole Hessian shows it.
    """
    np = place.np
    if count_of(here.params) > _EXACT:
        return here.loss != here.loss
    curved = np.diagonal(found.matrix)
    little = _LITTLE * here.rounding
    lost = (np.abs(curved) <= little) & (np.abs(found.right) <= little)
    # The slopes of a parabola are at most sqrt(2 gain curvature): Cauchy's inequality for its Hessian.
    bends = np.sqrt(np.where(curved > 0, curved, np.maximum(-curved - here.rounding, 0)))
    steep = _STEEPER * np.sqrt(2 * np.maximum(start.gain, 0)) * bends

    def look() -> Any:
        slopes = np.abs(found.along(place, probe.at(start.params)[1]))
        dead = lost & (slopes > np.maximum(start.rounding, steep))
        half = found.way(place, np.where(dead, 0.5, 0))
        side = lambda number: shifted(here.params, [(1 - 2 * number) * x for x in half])
        (changes,) = place.rows(lambda number: [np.abs(probe.at(side(number))[0] - here.loss)], 2)
        # One of them may be outside the domain, but not both.
        return dead.any() & (np.fmax(*changes) <= little) & (here.loss != 0)

    return place.if_any(lost.any(), look, lambda: lost.any() & False)
