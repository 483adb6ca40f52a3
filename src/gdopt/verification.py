"""The end of a run, checked: is there really so little left to gain at the point that is returned?

Products of the Hessian with a few directions give what Newton's method would still gain, g'H^-1 g / 2, and show
negative curvature, which tells a saddle from a minimum. If they contradict the claim, the points that they lead to are
tried. If none of these is lower although the gradient promises it, the loss has a kink; then neighbours tell what a
gradient cannot.

All of it is computed with lists of real arrays, by NumPy on the host or by JAX in a trace: as a program it takes a
second to compile, so a run outside of jit compiles the products alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from gdopt import _trees, stopping
from gdopt.stopping import RUNNING, Ending, Limits, Status, Watch

Blocks = list[Any]  # real arrays, the entries of the params
# (point, direction) -> the loss, its gradient, and the Hessian times the direction
Probe = Callable[[Blocks, Blocks], tuple[Any, Blocks, Blocks]]

_EXACT = 64  # entries of the params: the whole Hessian of so many is computed
_SWEEPS, _SIGNS = 5, 2  # to even the scales of the entries, with so many directions in each
_KRYLOV = 24  # directions for more of them
_ENTRIES, _FEWEST = 2**24, 6  # of all directions together, and the fewest of these
_CLEAR = 1e-3  # of the largest curvature: less of a negative one tells nothing
_NOISE = 10  # eps times the number of directions: the rounding of a curvature
_KINK = 100  # times the rounding of the loss: what a step downhill should have gained
_AGAIN = 0.2  # of what is left, where Newton's step has led to: 0.14 for exponentials and high powers, 0 for parabolas
_STRETCH = 4.0  # the length of a try over that of the one before

# The points that are tried, one kind after the other.
_WEAK, _NEWTON, _NEGATIVE, _DOWNHILL = 8, 6, (16, 16), 12
*_ENDS, _ALL = itertools.accumulate((_WEAK, _NEWTON, *_NEGATIVE, _DOWNHILL, stopping.TRIED))


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


class OnHost:
    """Arrays and loops of Python's."""

    np = np

    @staticmethod
    def rows(function: Callable[[Any], Blocks], count: int) -> Blocks:
        """Stack what a function gives for each number."""
        return [np.stack(blocks) for blocks in zip(*map(function, range(count)), strict=True)]

    @staticmethod
    def fold(count: int, body: Callable, carry: Any) -> Any:
        """Call ``carry = body(number, carry)`` for each number."""
        for number in range(count):
            carry = body(number, carry)
        return carry

    @staticmethod
    def loop(goes_on: Callable, body: Callable, carry: Any) -> Any:
        """Call ``carry = body(carry)`` as long as it goes on."""
        while goes_on(carry):
            carry = body(carry)
        return carry

    @staticmethod
    def select(condition: Any, if_true: Any, if_false: Any) -> Any:
        """One of two trees."""
        return if_true if condition else if_false

    @staticmethod
    def when(condition: Any, function: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        """Call one of two functions."""
        return function() if condition else otherwise()

    @staticmethod
    def put(rows: Any, number: Any, row: Any) -> Any:
        """Write a row, if there is room for it."""
        if number < len(rows):
            rows[number] = row
        return rows


class InTrace:
    """The same for what is being traced."""

    np = jnp

    @staticmethod
    def rows(function: Callable[[Any], Blocks], count: int) -> Blocks:
        """Stack what a function gives for each number."""
        return lax.map(function, lax.iota(int, count))

    @staticmethod
    def fold(count: int, body: Callable, carry: Any) -> Any:
        """Call ``carry = body(number, carry)`` for each number."""
        return lax.fori_loop(0, count, body, carry)

    @staticmethod
    def loop(goes_on: Callable, body: Callable, carry: Any) -> Any:
        """Call ``carry = body(carry)`` as long as it goes on."""
        return lax.while_loop(goes_on, body, carry)

    @staticmethod
    def select(condition: Any, if_true: Any, if_false: Any) -> Any:
        """One of two trees."""
        return _trees.select(condition, if_true, if_false)

    @staticmethod
    def when(condition: Any, function: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        """Call one of two functions."""
        return lax.cond(condition, function, otherwise)

    @staticmethod
    def put(rows: Any, number: Any, row: Any) -> Any:
        """Write a row, if there is room for it."""
        return rows.at[number].set(row, mode="drop")


Place = type[OnHost] | type[InTrace]


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
    place: Place, probe: Probe, claim: Claim, limits: Limits, eps: float, *, exact: bool, searches: bool
) -> Settled:
    """Verify a claim, or withdraw it: then the run goes on, if its optimizer ``searches`` at a lower point.

    An optimizer that does not is left on its own way; if it has come to its end, the run has stalled. Products of the
    Hessian are ``exact``, or differences of gradients.
    """
    np, loss, watch = place.np, claim.loss, claim.watch
    may, rounding = stopping.allowed(np, watch, loss, limits), stopping.resolution(loss, eps)
    wanted = np.maximum(may, rounding)
    typical = [np.fmax(abs(x), abs(moved)) for x, moved in zip(claim.params, claim.moved, strict=True)]
    size = _largest(np, typical)
    size = np.where(size > 0, size, 1)
    typical = [np.where(x > eps**2 * size, x, size).astype(x.dtype) for x in typical]  # others have not moved yet
    if claim.free is not None:
        typical = [x * f for x, f in zip(typical, claim.free, strict=True)]
    begin = [x - moved for x, moved in zip(claim.params, claim.moved, strict=True)]
    start = Start(begin, watch.first_loss, stopping.resolution(watch.first_loss, eps))
    seen = check(place, probe, claim.params, loss, typical, start, wanted, rounding, exact=exact)

    limited = claim.code == Status.PRECISION_LIMIT
    nothing = np.where(searches & ~limited, stopping.NOTHING, limits.tol * limits.tol)
    all_left = stopping.is_all(seen.left, loss, watch, nothing) & (claim.step > 0)
    lower = seen.lower | (seen.below & (limited | (claim.grad_norm == 0)))  # as on the way to a kink
    little = seen.curved & (seen.left <= wanted) & ~lower & ~all_left
    kink = limited & seen.kink & ~lower
    holds = (little | kink) & ~seen.saturated
    if limits.grad_tol is not None:
        holds = holds | (seen.steepest <= limits.grad_tol)
    name = np.where(limited & (kink | (seen.left > may)), Status.PRECISION_LIMIT, Status.CONVERGED)
    stuck = limited | (claim.grad_norm == 0) | (watch.grad_norm == 0)
    again = lower & searches & (watch.bar > stopping.LEAST_BAR)
    goes_on = ~holds & (again | ~stuck) & (claim.step < limits.max_steps)
    ended = np.where(stuck, Status.STALLED, Status.MAX_STEPS)
    code = np.where(holds, name, np.where(goes_on, RUNNING, ended))
    how = np.where(little, stopping.BY_CURVATURE, np.where(kink, stopping.BY_NEIGHBOURS, stopping.NOT_VERIFIED))
    left = np.where(np.isfinite(seen.left), seen.left, np.nan)
    left = np.where(kink, rounding, left).astype(loss.dtype)  # by so much a neighbour may be lower
    saddle = np.where(seen.negative, stopping.SADDLE, stopping.NONE_SEEN)
    flaw = np.where(seen.saturated, stopping.SATURATED, saddle)
    moves = goes_on & lower if searches else goes_on & False
    return Settled(
        code=code.astype(np.int32),
        ending=Ending(left, how.astype(np.int32), flaw.astype(np.int32)),
        watch=place.select(goes_on, stopping.contradicted(np, watch, claim.step), watch),
        moves=moves,
        restarts=moves & limited,
        point=seen.point,
    )


def _largest(np: Any, blocks: Blocks) -> Any:
    return np.max(np.stack([np.max(abs(block), initial=0).astype(_trees.norm_dtype(blocks)) for block in blocks]))


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
    typical: Blocks,
    start: Start,
    allowed: Any,
    rounding: Any,
    *,
    exact: bool,
) -> Check:
    """Look for what is left to gain at a point, and for a lower one.

    ``typical`` is the size of each entry, 0 for those that are held in their places. At most ``allowed`` may be left;
    the loss is known up to ``rounding``.
    """
    np, eps = place.np, max(float(jnp.finfo(x.dtype).eps) for x in params)
    accuracy = eps if exact else eps ** (2 / 3)  # of curvatures
    dtype = _trees.norm_dtype(params)
    still = [np.zeros_like(x) for x in params]
    few = sum(x.size for x in params) <= _EXACT
    scale = typical if few else _evened(place, probe, params, typical)
    scaled = functools.partial(_scaled, scale)
    times = functools.partial(_scaled_product, probe, params, scale)
    _, grad, _ = probe(params, still)
    found = _spectrum(place, times, scaled(grad), accuracy, dtype, whole=few)
    newton = _newton(place, found, found.right)
    out = lambda weights: [w * s for w, s in zip(_combined(place, weights, found.basis), scale, strict=True)]
    step = out(-newton.weights)
    # There the gradient of a parabola is zero. If it is not much smaller, the Hessian tells little of the loss, as in a
    # curved valley (the test of Deuflhard, "Newton Methods for Nonlinear Problems", 2004, section 3.3).
    _, there, _ = probe(_moved(params, step), still)
    again = _newton(place, found, _products(place, found.basis, scaled(there), dtype)).left
    ulps = [np.where(s > 0, eps * x / np.where(s > 0, s, 1), 0) for x, s in zip(typical, scale, strict=True)]
    highest = np.max(np.abs(found.matrix))
    grain = highest * _dot(place, ulps, ulps, dtype)  # the params are known no better
    bends = ~(again <= np.maximum(_AGAIN * newton.left, np.maximum(rounding, grain))) & (newton.left > rounding)
    left = np.where(found.known & ~bends, newton.left, np.where((found.right != 0).any(), np.inf, 0))
    left = left.astype(loss.dtype)
    little = found.known & (left <= allowed)

    visible = np.maximum(allowed, rounding)
    ways, lengths, promised = _directions(place, found, step, out, scaled(scaled(grad)), typical, visible)
    negative = found.known & (found.values[0] < -found.noise)
    flat = highest == 0
    kinds = found.weak.any(), ~little, negative, negative, ~little, ~little | flat
    tries = _Tries(place, probe, params, loss, rounding, typical, eps, ways, lengths, kinds)
    lowest, point, told, saddle = tries.lowest(loss - visible)
    clear = negative & (found.values[0] < -_CLEAR * np.max(np.abs(found.values)))
    return Check(
        left=np.maximum(left, loss - lowest),
        curved=found.known,
        negative=clear,
        lower=(lowest < loss - visible) | (clear & saddle),
        below=(lowest < loss - rounding) & (~little | flat),
        kink=found.known
        & ~little
        & (np.maximum(promised, newton.left) > _KINK * rounding)
        & (told > stopping.TRIED // 2),  # not outside of its domain
        saturated=_is_saturated(place, probe, params, loss, found, out, scaled, start, rounding)
        if few
        else flat & False,
        point=point,
        steepest=_largest(np, grad),
    )


def _scaled(scale: Blocks, blocks: Blocks) -> Blocks:
    return [g.astype(s.dtype) * s for g, s in zip(blocks, scale, strict=True)]


def _scaled_product(probe: Probe, params: Blocks, scale: Blocks, way: Blocks) -> Blocks:
    """Multiply a direction by S H S, with the scale S."""
    along = [(w * s).astype(x.dtype) for w, s, x in zip(way, scale, params, strict=True)]
    return _scaled(scale, probe(params, along)[2])


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
    still = [np.zeros_like(x) for x in params]
    curved = np.diagonal(found.matrix)
    lost = (curved <= 0) & (np.abs(curved) <= rounding) & (np.abs(found.right) <= rounding)

    def look() -> Any:
        slope = _products(place, found.basis, scaled(probe(start.params, still)[1]), found.right.dtype)
        dead = lost & (np.abs(slope) > start.rounding)
        half = out(np.where(dead, 0.5, 0))
        sides = [_moved(params, half), _moved(params, [-x for x in half])]
        one, other = (np.abs(probe(side, still)[0] - loss) for side in sides)
        # One of them may be outside of the domain, but not both.
        return dead.any() & (np.fmax(one, other) <= rounding) & (loss != 0)

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
) -> tuple[tuple[Blocks, ...], Any, Any]:
    """Ways to try, how far to go along each, and what the last promises.

    Downhill where the curvature is lost in rounding, as far as the loss should fall visibly; Newton's; two of negative
    curvature, as far as the loss should change visibly; downhill, to the minimum of the parabola.
    """
    np, dtype = place.np, found.right.dtype
    highest = np.max(np.abs(found.matrix))
    size = np.max(np.abs(found.right))
    unit, steepest = found.right / np.where(size > 0, size, 1), np.where(highest == 0, 1, highest)
    bend, square = unit @ (found.matrix / steepest) @ unit, unit @ unit
    best = np.where(bend > 0, square / np.where(bend > 0, bend, 1) / steepest, 1)
    promised = np.where(bend > 0, size * (size * best) * square / 2, np.where(size > 0, np.inf, 0))

    whole = _dot(place, typical, typical, dtype)

    def reach(way: Blocks) -> Any:
        """How far the params have come, or are from zero: farther away the loss may be nothing but rounding."""
        return np.sqrt(whole / np.maximum(_dot(place, way, way, dtype), jnp.finfo(dtype).tiny))

    fall = found.weak @ found.weak
    ways = [out(-(found.vectors @ found.weak) / found.even), newton]
    visibly = np.where(fall > 0, visible / np.where(fall > 0, fall, 1), 0)
    lengths = [np.minimum(visibly, reach(ways[0]) / _STRETCH ** (_WEAK - 1)), np.ones_like(best)]
    for weights in (found.vectors[:, 0] / found.even, found.lowest):
        way = out(weights)
        least = np.abs(weights @ found.matrix @ weights)
        seen = np.sqrt(2 * visible / np.where(least > 0, least, 1))
        lengths.append(np.where(np.isfinite(seen) & (seen > 0), seen, 1e-3 * reach(way)))
        ways.append(way)
    lengths = np.stack([length.astype(dtype) for length in (*lengths, best)])
    return (*ways, [-g for g in slope]), lengths, promised


class _Tries(NamedTuple):
    """Points that may be lower, one kind after the other."""

    place: Place
    probe: Probe
    params: Blocks
    loss: Any
    rounding: Any
    typical: Blocks
    eps: float
    ways: tuple[Blocks, ...]
    lengths: Any
    kinds: tuple[Any, ...]  # whether each kind is to be tried

    def lowest(self, wanted: Any) -> tuple[Any, Blocks, Any, Any]:
        """Try up to a loss that is wanted.

        Returns the lowest loss, its point, how many were finite, and whether one of negative curvature was lower.
        """
        np = self.place.np

        def goes_on(search: tuple) -> Any:
            number, lowest, *_ = search
            return (number < _ALL) & ~(lowest < wanted)

        def attempt(search: tuple) -> tuple:
            number, lowest, point, told, saddle = search
            there = self._other(number)
            value = self.probe(there, [np.zeros_like(x) for x in there])[0].astype(self.loss.dtype)
            better = value < lowest  # NaN is not
            point = [np.where(better, new, old) for new, old in zip(there, point, strict=True)]
            told = (told + np.isfinite(value)).astype(number.dtype)
            saddle = saddle | ((number >= _ENDS[1]) & (number < _ENDS[3]) & (value < self.loss - self.rounding))
            return self._next(number + 1), np.where(better, value, lowest), point, told, saddle

        first = self._next(np.zeros((), np.int32))
        begin = first, self.loss, self.params, 0 * first, first < 0
        return self.place.loop(goes_on, attempt, begin)[1:]

    def _next(self, number: Any) -> Any:
        """The number from this one on that is of a kind to be tried."""
        np = self.place.np
        for wanted, begin, end in zip(self.kinds, (0, *_ENDS), (*_ENDS, _ALL), strict=True):
            number = np.where((number >= begin) & (number < end) & ~wanted, end, number)
        return number.astype(np.int32)

    def _other(self, number: Any) -> Blocks:
        """One of the points."""
        np = self.place.np
        kind = sum((number >= end) * 1 for end in _ENDS)
        count = number - sum((kind == k) * end for k, end in enumerate(_ENDS, start=1))
        both = (kind == 2) | (kind == 3)  # ways of each direction
        power = np.where(both, count // 2, np.where(kind == 0, count, -count)).astype(self.lengths.dtype)
        length = np.where(both & (count % 2 == 1), -1, 1) * _STRETCH**power
        length = length * self.lengths[np.minimum(kind, len(_ENDS) - 1)]
        neighbour = _neighbour(self.place, number, self.typical, self.eps)
        each = []
        for *ways, beside in zip(*self.ways, neighbour, strict=True):
            way = functools.reduce(lambda way, k: np.where(kind == k, ways[k], way), range(1, len(ways)), ways[0])
            each.append(np.where(kind == len(ways), beside, length.astype(way.dtype) * way))
        return _moved(self.params, each)


def _moved(params: Blocks, ways: Blocks) -> Blocks:
    return [x + way.astype(x.dtype) for x, way in zip(params, ways, strict=True)]


def _spectrum(
    place: Place, times: Callable[[Blocks], Blocks], slope: Blocks, eps: float, dtype: Any, *, whole: bool
) -> _Spectrum:
    """The eigenvalues of the Hessian: of all of it, or of what Lanczos' directions see."""
    np, count = place.np, sum(block.size for block in slope)
    basis, matrix = (_whole if whole else _krylov)(place, times, slope, count, dtype)
    right = _products(place, basis, slope, dtype)
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
            signs = [np.where(x < 0, -1, 1) for x in _chance(place, scale, _SIGNS * number + probes)]
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
    np, size = place.np, max(_FEWEST, min(_KRYLOV, _ENTRIES // count))
    chance = _normal(place, _chance(place, slope, 0), dtype)
    first = _normal(place, [a + 0.1 * b for a, b in zip(_normal(place, slope, dtype), chance, strict=True)], dtype)
    rows = [place.put(np.zeros((size, *block.shape), block.dtype), 0, block) for block in first]

    def follow(number: Any, carry: tuple) -> tuple:
        rows, matrix = carry
        image = times([block[number] for block in rows])
        matrix = place.put(matrix, number, _products(place, rows, image, dtype))
        for _ in range(2):  # once leaves what rounding has put there
            taken = _combined(place, _products(place, rows, image, dtype), rows)
            image = [a - b for a, b in zip(image, taken, strict=True)]
        following = _normal(place, image, dtype)
        return [place.put(block, number + 1, x) for block, x in zip(rows, following, strict=True)], matrix

    rows, matrix = place.fold(size, follow, (rows, np.zeros((size, size), dtype)))
    lower = np.tril(matrix)  # at its time each direction knew nothing of the later ones
    return rows, lower + np.tril(matrix, -1).T


def _products(place: Place, rows: Blocks, blocks: Blocks, dtype: Any) -> Any:
    """The inner product with each row."""

    def flat(rows: Any, block: Any) -> Any:
        axes = tuple(range(1, rows.ndim)), tuple(range(block.ndim))
        exactly: Any = {} if place is OnHost else {"precision": "highest"}
        return place.np.tensordot(rows.astype(dtype), block.astype(dtype), axes, **exactly)

    return sum(flat(*each) for each in zip(rows, blocks, strict=True))


def _combined(place: Place, weights: Any, rows: Blocks) -> Blocks:
    """The sum of the rows, each times its weight."""
    exactly: Any = {} if place is OnHost else {"precision": "highest"}
    return [place.np.tensordot(weights.astype(block.dtype), block, 1, **exactly) for block in rows]


def _dot(place: Place, a: Blocks, b: Blocks, dtype: Any) -> Any:
    return sum(place.np.sum(x.astype(dtype) * y.astype(dtype)) for x, y in zip(a, b, strict=True))


def _normal(place: Place, blocks: Blocks, dtype: Any) -> Blocks:
    """The blocks with norm 1; 0 if they have none."""
    np = place.np
    size = sum(np.max(np.abs(block), initial=0).astype(dtype) for block in blocks)
    unit = [block / np.where(size > 0, size, 1).astype(block.dtype) for block in blocks]
    norm = np.sqrt(_dot(place, unit, unit, dtype))
    return [block / np.where(norm > 0, norm, 1).astype(block.dtype) for block in unit]


def _chance(place: Place, like: Blocks, number: Any) -> Blocks:
    """Entries from -1 to 1 that look random, others for each number: JAX's own take long to compile.

    Source: Weyl's equidistributed sequences, with the irrational numbers of Roberts, "The unreasonable effectiveness of
    quasirandom sequences", 2018, and a hash of what they give.
    """
    np, begin, out = place.np, 1, []
    for block in like:
        entries = np.arange(begin, begin + block.size, dtype=np.float32).reshape(block.shape)
        begin += block.size
        mixed = np.sin(entries * np.float32(0.75487767) + number * np.float32(0.56984029)) * np.float32(1e4)
        out.append((2 * (mixed - np.floor(mixed)) - 1).astype(block.dtype))
    return out


def _neighbour(place: Place, number: Any, typical: Blocks, eps: float) -> Blocks:
    """A step of random length: along all entries, or along a single one."""
    np, begin, out = place.np, 0, []
    share = number * np.float32(0.61803399)
    length = eps ** (0.1 + 0.65 * (share - np.floor(share)))
    chosen = number // 4 % sum(block.size for block in typical)
    for block, chance in zip(typical, _chance(place, typical, number), strict=True):
        here = (np.arange(begin, begin + block.size) == chosen).reshape(block.shape) | (number % 2 == 0)
        begin += block.size
        out.append(np.where(here, length.astype(block.dtype) * block * chance, 0))
    return out
