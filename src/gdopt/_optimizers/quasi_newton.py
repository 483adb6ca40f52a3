"""`quasi_newton`: a limited-memory BFGS around a learned diagonal, one value and gradient a step."""

from __future__ import annotations

import functools
import math
import os
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gdopt import _jax, _trees
from gdopt._checks import whole_number
from gdopt._errors import InputError
from gdopt._optimizers import boxed, trials
from gdopt._optimizers.trials import GRAD, PARAMS, REJECTED, VALUE, Trials
from gdopt._settings import own_promotion
from gdopt._trees import Packed
from gdopt._types import PyTree

PAIRS = 5  # the default number of pairs
_AVERAGE = 0.5  # Zhang and Hager's eta
_TELLS = 1e-8  # the least curvature that is learned from a rejected trial, over |s| |y|
_LEAST = 1e-12  # the least entry of the diagonal, over the largest
_FARTHER = 4  # the length of a step over that of the last one, if the loss was not convex along that
_NEARER = 0.9  # the longest step after a rejected one, over the length of that


class Pairs(NamedTuple):
    """The last steps and the changes of the gradient along them, each in units of its largest entry."""

    steps: Packed  # with a leading axis, whose rows are replaced in turn
    changes: Packed
    products: jax.Array  # (memory, memory) the inner products of the steps with their own and later changes
    ratios: jax.Array  # (memory,) the unit of each change over that of its step


class QuasiNewtonState(NamedTuple):
    """The state of `quasi_newton`: the last accepted point, a diagonal Hessian, and the last pairs."""

    trials: Trials
    diagonal: Packed  # of the Hessian, over its largest entry
    largest: jax.Array  # that entry
    pairs: Pairs | None  # None without memory
    learned: jax.Array  # the number of pairs learned since the last ones were forgotten

    name, next = "quasi_newton", lambda *given: _next(*given)
    params, grad, value, rejected = PARAMS, GRAD, VALUE, REJECTED
    average = property(
        lambda state: _AVERAGE if state.pairs else 0.0, doc="The weight of the past in the average of accepted losses."
    )


def quasi_newton(memory: int = PAIRS) -> optax.GradientTransformationExtraArgs:
    """Return limited-memory BFGS around a diagonal that it learns. Use it for deterministic losses.

    Each update takes one value and one gradient. It evaluates nothing inside, and nothing has to be tuned. A diagonal
    approximation of the Hessian follows the scales of the params, which may differ by many orders of magnitude. The
    last ``memory`` steps, with the changes of the gradient along them, correct it. The loss may rise on the way: a
    trial point is accepted if its loss is sufficiently below a running average of the accepted ones. Otherwise the next
    update leads back to the last accepted point, and from there makes a smaller or a better step. If the loss is not
    convex along a step, the next one goes at least four times as far. `minimize` uses this by default.

    Args:
        memory: the number of pairs (default 5, which solved most of 219 problems among 1 to 10). The state takes
            2 * memory + 3 times the memory of the params. With 0 it takes three times that memory. Its steps are then
            those of a conjugate gradient method in the diagonal's metric, which needs about a fifth more evaluations.

    Returns:
        An optax transformation. Its ``update`` needs ``params``, the loss there as ``value=``, and the gradient of the
        same point. It works for any pytree of float and complex leaves, in their own dtypes, under ``jit`` and
        ``vmap``. Inner products are real, and a complex entry has one real curvature. The state has ``params``,
        ``grad`` and ``value`` of the last accepted point, and ``rejected``, the number of trials in a row that were
        taken back. After 60 of them, or when a step changes no entry any more, the update leads back to the accepted
        point, and the search starts anew there.

        The trial points are no result: their loss may be higher, infinite or NaN. Keep ``state.params``, or the best
        point seen. Conjugate the gradient that JAX gives for complex leaves, as for all of optax. Not for mini-batches:
        a change of the batch would be taken for a change of the gradient.

    Raises:
        InputError: for a memory that is negative or not a whole number; from ``update``, if it is called without
            params.

    Source: Nocedal, "Updating quasi-Newton matrices with limited storage", 1980 (the pairs); Gilbert & Lemaréchal,
    "Some numerical experiments with variable-storage quasi-Newton algorithms", 1989 (the diagonal); Zhang & Hager, "A
    nonmonotone line search technique and its application to unconstrained optimization", 2004 (what is accepted); Dai &
    Kou, "A Barzilai-Borwein conjugate gradient method", 2016 (without memory).

    Example:
        >>> import gdopt, jax, jax.numpy as jnp, optax
        >>> loss = lambda x: jnp.sum(jnp.array([1.0, 1e6]) * (x - jnp.array([1000.0, 0.001])) ** 2)
        >>> optimizer, x = gdopt.quasi_newton(), jnp.zeros(2)
        >>> state = optimizer.init(x)
        >>> for _ in range(20):
        ...     value, grad = jax.value_and_grad(loss)(x)
        ...     updates, state = optimizer.update(grad, state, x, value=value)
        ...     x = optax.apply_updates(x, updates)
        >>> state.params.round(4)
        Array([1.e+03, 1.e-03], dtype=float32)
    """
    return _made(whole_number("memory", memory, least=0))


def affordable_memory(params: PyTree) -> int:
    """Return the number of pairs, up to the default, whose state takes at most half of the memory of a device."""
    size = 0
    for leaf in jax.tree.leaves(params):
        shape = leaf.shape if _jax.is_tracer(leaf) else leaf.sharding.shard_shape(leaf.shape)
        size += math.prod(shape) * leaf.dtype.itemsize
    try:
        total = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        total = total or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Neither the device nor the system reports its memory.
        return PAIRS
    return max((memory for memory in range(PAIRS + 1) if (2 * memory + 3) * size <= total / 2), default=0)


@functools.cache
def _made(memory: int) -> optax.GradientTransformationExtraArgs:
    init = functools.partial(_init, memory)
    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, trials.update))


def _init(memory: int, params: PyTree) -> QuasiNewtonState:
    with own_promotion():
        first = trials.begin(params)
        scalar, point = first.value, first.point
        diagonal = jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=_wide(leaf)), point)
        many = jax.tree.map(lambda leaf: jnp.zeros((memory, *leaf.shape), leaf.dtype), point)
    pairs = Pairs(many, many, jnp.eye(memory, dtype=scalar.dtype), jnp.ones(memory, scalar.dtype)) if memory else None
    return QuasiNewtonState(first, diagonal, jnp.ones_like(scalar), pairs, jnp.int32(0))


def _wide(leaf: jax.Array) -> Any:
    """Return the real dtype for the curvature of an entry, which may be out of the range of 16 bits."""
    return jnp.finfo(jnp.promote_types(leaf.dtype, jnp.float32)).dtype


class _Pair(NamedTuple):
    """The last step with the change of the gradient along it, and their inner products."""

    step: trials.Unit
    change: trials.Unit
    ss: jax.Array
    sy: jax.Array
    yy: jax.Array
    curved: jax.Array  # whether the loss is convex along the step, by more than rounding


def _next(
    state: QuasiNewtonState,
    verdict: trials.Verdict,
    here: Packed,
    grad: Packed,
    value: jax.Array,
    within: trials.Within | None,
) -> tuple[PyTree, QuasiNewtonState]:
    box = _box_of(within)
    last = state.trials
    point = trials.follow(last, verdict, here, grad, value, state.average)
    pair = _pair(verdict, here)
    learns = pair.curved & (verdict.accepted | (last.rejected == 0))
    new = _keep_pairs(_learn(state, pair), state, verdict, learns, pair)
    fresh = 1 / _first_rate(verdict, here, grad, value, box)
    new, descent = _descent(new, _plain(new, verdict.first, pair, fresh), verdict, point, pair, box)
    along, again = _lengths(verdict, pair, learns, last, value, point, descent)

    def leaf_update(x: jax.Array, accepted_x: jax.Array, way: jax.Array, step: jax.Array) -> jax.Array:
        a, b = along.astype(_wide(x)), again.astype(_wide(x))
        move = jnp.where(a != 0, a * way, 0) + jnp.where(b != 0, b * step, 0)
        return ((accepted_x - x) + move.astype(x.dtype)).astype(x.dtype)

    updates = trials.updates(verdict, here, point, leaf_update, descent.way, pair.step[0])
    if box is not None:
        new_x = jax.tree.map(jnp.add, here, trials.pack(updates))
        updates = jax.tree.map(jnp.subtract, boxed.clipped(new_x, box), here).tree()
    new = new._replace(trials=point._replace(left=descent.left))
    return updates, jax.tree.map(lambda new, old: new.astype(old.dtype), new, state)


def _first_rate(
    verdict: trials.Verdict, here: Packed, grad: Packed, value: jax.Array, box: boxed.Box | None
) -> jax.Array:
    """Return the rate of the first step; in a box by the entries of the gradient that do not lead out of it."""
    if box is None:
        return trials.first_rate(verdict.sizes.params, verdict.sizes.grad, verdict.products.gg, value)
    unit, size = _trees.unit(boxed.reduced(grad, here, box))
    return trials.first_rate(verdict.sizes.params, size, _trees.vdot(unit, unit), value)


def _box_of(within: trials.Within | None) -> boxed.Box | None:
    if within is not None and within.box is None:
        raise InputError(
            "optimizer holds gdopt.quasi_newton(), which takes bounds=, but no project= or prox=. Leave optimizer out, "
            "or pass gdopt.spectral()."
        )
    return None if within is None else within.box


def _pair(verdict: trials.Verdict, here: Packed) -> _Pair:
    """Return the pair of the last trial, and whether it reveals a curvature."""
    step, change = verdict.step, verdict.change
    ss, sy, yy, _ = verdict.products
    tiny = float(jnp.finfo(_trees.norm_dtype(here)).eps) ** 2
    curved = jnp.isfinite(sy) & (sy > jnp.where(verdict.accepted, tiny, _TELLS) * jnp.sqrt(ss * yy))
    return _Pair(step, change, ss, sy, yy, ~verdict.first & curved)


def _plain(state: QuasiNewtonState, first: jax.Array, pair: _Pair, fresh: jax.Array) -> QuasiNewtonState:
    """Return the state whose Hessian has a single curvature."""
    learned = jnp.where(pair.curved, pair.change[1] / pair.step[1] * pair.yy / pair.sy, state.largest)
    least = float(jnp.finfo(state.largest.dtype).tiny)  # A CPU takes smaller numbers for zero.
    return state._replace(
        diagonal=jax.tree.map(jnp.ones_like, state.diagonal),
        largest=jnp.maximum(jnp.where(first, fresh, learned), least),
        learned=jnp.int32(0),
    )


class _Descent(NamedTuple):
    """The way to the next trial."""

    way: Packed  # over its unit
    unit: jax.Array
    square: jax.Array  # the square of the way over its unit
    largest: jax.Array  # the largest entry of that
    left: jax.Array  # the gain that is left along the way


def _descent(
    new: QuasiNewtonState,
    plain: QuasiNewtonState,
    verdict: trials.Verdict,
    point: Trials,
    pair: _Pair,
    box: boxed.Box | None,
) -> tuple[QuasiNewtonState, _Descent]:
    """Return the new state, and the way to go from the last accepted point.

    If the direction does not lead down, the state forgets what it learned. Its numbers and those of the straight way
    are selected one by one, so that no pass over the params selects the direction.
    """
    new = _forget(verdict.keeps(verdict.first), plain, new)
    wide = lambda g, like: g.astype(jnp.promote_types(g.dtype, like.dtype))
    grad = jax.tree.map(wide, point.grad, new.diagonal)
    if box is None:
        size = jnp.where(verdict.accepted, verdict.sizes.grad, verdict.sizes.last_grad)
        unit_grad, grad_size = _trees.over(grad, size)
        way, straight = _direction(new, unit_grad, pair), unit_grad
        largest, most = _trees.largest(way), jnp.ones_like(grad_size)
    else:
        unit_grad, grad_size = boxed.unit(grad, point.point, box)
        limits = boxed.limits(unit_grad, grad_size / new.largest, point.point, box)
        way = boxed.direction(boxed.model_of(new.diagonal, new.largest, new.pairs, new.learned), unit_grad, *limits)
        limits = boxed.limits(unit_grad, grad_size / plain.largest, point.point, box)
        straight = jax.tree.map(jnp.clip, unit_grad, *limits)
        largest, most = _trees.each_largest(way, straight)
    slope, square, *of_straight = _trees.vdots(
        (unit_grad, way), (way, way), (unit_grad, straight), (straight, straight)
    )
    descends = (slope > 0) & jnp.isfinite(slope)
    new = _forget(verdict.keeps(~descends), plain, new)
    way, slope, square, largest = _trees.select(descends, (way, slope, square, largest), (straight, *of_straight, most))
    size = grad_size / new.largest
    return new, _Descent(way, size, square, largest, grad_size * (size * slope) / 2)


def _lengths(
    verdict: trials.Verdict,
    pair: _Pair,
    learns: jax.Array,
    last: Trials,
    value: jax.Array,
    point: Trials,
    descent: _Descent,
) -> tuple[jax.Array, jax.Array]:
    """Return how far to go along the direction, or which share of a rejected step to make again."""
    size = descent.unit
    length, before = size * jnp.sqrt(descent.square), pair.step[1] * jnp.sqrt(pair.ss)
    ahead = jnp.where(pair.curved | verdict.first, 1, jnp.maximum(1, _FARTHER * before / length))
    back = jnp.minimum(1, _NEARER * before / length)
    factor = jnp.where(verdict.accepted, ahead, back)
    share = trials.shorter(last, value, verdict.slope, verdict.curvature)
    shorten = ~verdict.accepted & ~learns
    x_size = jnp.where(verdict.accepted, verdict.sizes.params, verdict.sizes.last_params)
    most = trials.farthest(point.point, x_size) / (size * descent.largest)
    along = jnp.where(shorten | verdict.gave_up, 0, -size * jnp.minimum(factor, most))
    along = jnp.where(size > 0, along, 0)
    return along, jnp.where(shorten & ~verdict.gave_up, pair.step[1] * share, 0)


def _forget(condition: jax.Array, plain: QuasiNewtonState, state: QuasiNewtonState) -> QuasiNewtonState:
    """Return the state without what it learned if the condition holds."""
    names = ("diagonal", "largest", "learned")
    return state._replace(
        **{name: _trees.select(condition, getattr(plain, name), getattr(state, name)) for name in names}
    )


def _learn(state: QuasiNewtonState, pair: _Pair) -> QuasiNewtonState:
    """Update the diagonal by a pair (Gilbert & Lemaréchal, 1989, eq. 4.7).

    With B the diagonal and c = y'y/B / s'y, it is c B + y*y / s'y - c (B*s)^2 / s'Bs, in the unit of y over that of s.
    """
    s, y, b, sy = pair.step[0], pair.change[0], state.diagonal, pair.sy
    over, times = jax.tree.map(jnp.divide, y, b), jax.tree.map(jnp.multiply, s, b)
    scale, bent = _trees.vdots((over, y), (times, s))
    scale = scale / sy

    def entries(s: jax.Array, y: jax.Array, b: jax.Array) -> jax.Array:
        scaled, sy_, bent_ = (number.astype(b.dtype) for number in (scale, sy, bent))
        # Other products than in the sums: XLA would write one that both need into memory.
        s, y = jnp.abs(s), jnp.abs(y)
        return (scaled * (b - (b / bent_ * s) * (b * s)) + y / sy_ * y).astype(b.dtype)

    known = state.learned > 0
    new = jax.tree.map(entries, s, y, b)
    high = _trees.largest(new)
    new = jax.tree.map(lambda leaf: jnp.where(known, jnp.maximum(leaf / high.astype(leaf.dtype), _LEAST), 1), new)
    unit = pair.change[1] / pair.step[1]
    return state._replace(diagonal=new, largest=unit * jnp.where(known, high, pair.yy / sy))


def _keep_pairs(
    new: QuasiNewtonState,
    old: QuasiNewtonState,
    verdict: trials.Verdict,
    learns: jax.Array,
    pair: _Pair,
) -> QuasiNewtonState:
    """Replace the oldest pair by the new one, if it reveals a curvature."""
    pairs, step, change, keeps = old.pairs, pair.step, pair.change, verdict.keeps(learns)
    diagonal, largest = _trees.select(keeps, (new.diagonal, new.largest), (old.diagonal, old.largest))
    if pairs is not None:
        memory = pairs.ratios.shape[0]
        slot = old.learned % memory
        steps, changes = _put((pairs.steps, pairs.changes), (step[0], change[0]), slot, keeps)
        # The products of this step with earlier changes are never read.
        products = pairs.products.at[:, slot].set(_with_rows(steps, change[0]))
        ratios = pairs.ratios.at[slot].set(change[1] / step[1])
        products, ratios = _trees.select(keeps, (products, ratios), (pairs.products, pairs.ratios))
        pairs = Pairs(steps, changes, products, ratios)
    return new._replace(diagonal=diagonal, largest=largest, pairs=pairs, learned=old.learned + learns)


def _put(rows: PyTree, new: PyTree, slot: jax.Array, keeps: jax.Array) -> PyTree:
    """Put a new row in the place of an old one, if it is to be kept."""

    put = lambda rows, row: rows.at[slot].set(row.astype(rows.dtype))
    if max((row.size for row in jax.tree.leaves(new)), default=0) <= _trees.SMALL:
        either = lambda rows, row: put(rows, jnp.where(keeps, row.astype(rows.dtype), rows[slot]))
        return jax.tree.map(either, rows, new)
    # A loop of one turn or none changes large rows in place, and does not read the old ones. Without it XLA copies all
    # rows of a matrix, because it fuses the change with each product that needs them. Small ones compile faster above.
    once = lambda carry: (jnp.zeros_like(keeps), jax.tree.map(put, carry[1], new))
    return lax.while_loop(lambda carry: carry[0], once, (keeps, rows))[1]


def _with_rows(rows: PyTree, tree: PyTree) -> jax.Array:
    """Return the real inner products of a tree with each row."""
    dtype = _trees.norm_dtype(tree)

    def leaf(rows: jax.Array, leaf: jax.Array) -> jax.Array:
        wide = jnp.promote_types(leaf.dtype, dtype)
        axes = tuple(range(1, rows.ndim)), tuple(range(leaf.ndim))
        product = jnp.tensordot(rows.conj().astype(wide), leaf.astype(wide), axes, precision="highest")
        return product.real.astype(dtype)

    return sum(jax.tree.leaves(jax.tree.map(leaf, rows, tree)), jnp.zeros((), dtype))


def _combined(weights: jax.Array, rows: PyTree, like: PyTree) -> PyTree:
    """Return the sum of the rows, each times its weight."""

    def leaf(rows: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.tensordot(weights.astype(like.dtype), rows.astype(like.dtype), 1, precision="highest")

    return jax.tree.map(leaf, rows, like)


def _direction(state: QuasiNewtonState, grad: PyTree, pair: _Pair) -> PyTree:
    """Return the inverse Hessian times the gradient."""
    if state.pairs is None:
        return _conjugate(state, grad, pair)
    pairs = state.pairs
    memory = pairs.ratios.shape[0]
    newest = (state.learned - 1 - jnp.arange(memory)) % memory  # first
    known = jnp.arange(memory) < state.learned
    dtype = _trees.norm_dtype(grad)
    both = known[:, None] & known[None, :]
    products = jnp.where(both, pairs.products[newest][:, newest], jnp.eye(memory)).astype(dtype)
    unit = (state.largest / pairs.ratios[newest]).astype(dtype)

    # Nocedal's two loops solve for the coefficients. Only four products of vectors with all rows remain.
    right = jnp.where(known, _with_rows(pairs.steps, grad)[newest], 0)
    first = lax.linalg.triangular_solve(products, right[:, None], left_side=True, lower=True)[:, 0]
    rest = jax.tree.map(jnp.subtract, grad, _combined(jnp.zeros_like(first).at[newest].set(first), pairs.changes, grad))
    way = jax.tree.map(jnp.divide, rest, state.diagonal)
    right = jnp.diagonal(products) * unit * first - jnp.where(known, _with_rows(pairs.changes, way)[newest], 0)
    second = lax.linalg.triangular_solve(
        products, jnp.where(known, right, 0)[:, None], left_side=True, lower=True, transpose_a=True
    )[:, 0]
    return jax.tree.map(jnp.add, way, _combined(jnp.zeros_like(second).at[newest].set(second), pairs.steps, way))


def _conjugate(state: QuasiNewtonState, g: PyTree, pair: _Pair) -> PyTree:
    """Return Dai and Kou's direction in the diagonal's metric, or that of steepest descent if it does not lead down."""
    (s, step_size), (y, change_size), sy, curved = pair.step, pair.change, pair.sy, pair.curved
    over = lambda tree: jax.tree.map(jnp.divide, tree, state.diagonal)
    scaled, unit = over(g), (state.largest * step_size / change_size)
    yy, gg, yg, gs = (_trees.vdot(*each) for each in ((y, over(y)), (g, scaled), (y, scaled), (g, s)))
    bound = 1.5 * yy * gg - yg**2
    a, b = (sy * gg - yg * gs) / bound, (1.5 * yy / sy * gg * gs - yg * gg) / bound
    usable = curved & jnp.isfinite(a) & jnp.isfinite(b)
    steep = jnp.where(curved, unit * sy / yy, 1)

    def leaf(scaled: jax.Array, s: jax.Array) -> jax.Array:
        kind = scaled.dtype
        conjugate = unit.astype(kind) * (a.astype(kind) * scaled + b.astype(kind) * s.astype(kind))
        return jnp.where(usable, conjugate, steep.astype(kind) * scaled)

    way = jax.tree.map(leaf, scaled, s)
    slope = _trees.vdot(g, way)
    return _trees.select(
        (slope > 0) & jnp.isfinite(slope), way, jax.tree.map(lambda x: steep.astype(x.dtype) * x, scaled)
    )
