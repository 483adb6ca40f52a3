"""Trial points: shared by the optimizers that accept a point, or lead back from it, by its loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdopt import _trees
from gdopt._errors import InputError
from gdopt._settings import own_promotion
from gdopt._trees import Packed
from gdopt._types import PyTree

MAX_REJECTED = 60  # trials in a row; a step that is halved as often shrinks below 1e-18
_FIRST_STEP = 0.01  # the first step, over the largest entry of the params; CG_DESCENT's psi_0
_SUFFICIENT = 1e-4  # the least decrease, over the one that the slope promises; Armijo's constant
_SHORTEST, _LONGEST = 0.1, 0.5  # the next step over a rejected one; SPG's safeguard
_ROUNDING = 10  # the difference of losses that count as equal, in eps

Unit = tuple[PyTree, jax.Array]  # a tree over the size of its largest entry, and that size


class Trials(NamedTuple):
    """The last accepted point, and what decides on the next one.

    Params and gradients are packed: their small leaves form one vector of each dtype, so that many of them compile as
    fast as one.
    """

    point: Packed
    grad: Packed
    value: jax.Array
    reference: jax.Array  # the average of accepted losses that a new one is measured against
    weight: jax.Array  # the sum of that average's weights
    left: jax.Array  # the gain that is left at the accepted point by the curvature that was learned: g'Hg / 2
    accepted: jax.Array  # the number of accepted points; 0: the search starts at the next one
    rejected: jax.Array  # the number of rejected trials in a row; at MAX_REJECTED no step was found


# The properties of each state that holds trials.
PARAMS = property(lambda state: _trees.unpack(state.trials.point), doc="The last accepted point.")
GRAD = property(lambda state: _trees.unpack(state.trials.grad), doc="The gradient there.")
VALUE = property(lambda state: state.trials.value, doc="The loss there.")
REJECTED = property(lambda state: state.trials.rejected, doc="Trials in a row that were taken back.")


class Within(NamedTuple):
    """A constraint, as the update of a search takes it."""

    nearest: Callable[[PyTree, Any], PyTree]  # (params, rate) -> the nearest point, or that of a proximal step
    box: Any  # the bounds, packed; None for other constraints
    known_value: bool  # whether the value holds all that is minimised


class Sizes(NamedTuple):
    """The largest absolute values of the entries at a trial, and at the accepted point before it."""

    params: jax.Array
    grad: jax.Array
    last_params: jax.Array
    last_grad: jax.Array


class Products(NamedTuple):
    """Inner products of trees over their sizes: the step s, the change y along it, and the gradient g at the trial."""

    ss: jax.Array
    sy: jax.Array
    yy: jax.Array
    gg: jax.Array


class Verdict(NamedTuple):
    """The verdict on a trial."""

    first: jax.Array  # whether the search starts at it
    accepted: jax.Array
    step: Unit  # from the accepted point to the trial
    change: Unit  # the change of the gradient along the step
    sizes: Sizes
    products: Products
    slope: jax.Array  # the slope of the loss along the step, at the accepted point
    rejected: jax.Array  # the number of rejected trials in a row, with this one
    gave_up: jax.Array
    made: jax.Array | None = None  # whether the update will be made; None: always

    def keeps(self, condition: jax.Array) -> jax.Array:
        """Tell whether the state takes up something large that it takes up under a condition: see `update`."""
        return condition if self.made is None else condition & self.made

    @property
    def curvature(self) -> jax.Array:
        """The inner product of the step with the change of the gradient."""
        return self.step[1] * self.change[1] * self.products.sy

    @property
    def square(self) -> jax.Array:
        """The squared 2-norm of the gradient at the trial; infinite or 0 if it is out of range."""
        return _square(_trees.scale_of(self.sizes.grad), self.products.gg)


def begin(params: PyTree) -> Trials:
    """Return the state before the first trial."""
    blank = jax.tree.map(jnp.zeros_like, pack(params))
    zero = jnp.zeros((), jnp.promote_types(_trees.norm_dtype(blank), float))  # the loss's dtype is not known yet
    left, none = jnp.full_like(zero, jnp.inf), jnp.int32(0)
    return Trials(blank, blank, zero, zero, zero, left, accepted=none, rejected=none)


def pack(tree: PyTree) -> Packed:
    """Pack the small leaves of a tree together."""
    return _trees.pack(_trees.strong(tree), _trees.SMALL)


def update(
    updates: PyTree,
    state: Any,
    params: PyTree | None = None,
    *,
    value: Any,
    within: Within | None = None,
    made: jax.Array | None = None,
    **extra_args: Any,
) -> tuple[PyTree, Any]:
    """Update an optimizer whose state holds ``trials``, its ``name``, and a function for the ``next`` trial.

    ``within`` is the constraint that `minimize` was given, if there is one. ``made`` tells whether the update will be
    made. If not, the state stays as it was. To select one of two states afterwards would copy all large arrays, some of
    which otherwise change in place. So ``next`` changes none that is not to change, and only numbers are selected here.
    """
    del extra_args
    if params is None:
        raise InputError(f"{state.name} was updated without params. Call update(grad, state, params, value=loss).")
    with own_promotion():
        if within is None:
            return _jitted_update(updates, state, params, value, made)
        return _update(updates, state, params, value, made, within)


def _update(
    grad: PyTree, state: Any, params: PyTree, value: Any, made: jax.Array | None, within: Within | None = None
) -> tuple[PyTree, Any]:
    """Return the way to the next trial, from the loss and the gradient at the last one."""
    here, grad, last = pack(params), pack(grad), state.trials
    eps = jnp.finfo(jnp.result_type(value)).eps
    value = jnp.asarray(value, last.value.dtype)
    verdict = judge(last, here, grad, value, eps)._replace(made=made)
    updates, new = state.next(verdict, here, grad, value, within)
    if made is not None:
        new = jax.tree.map(lambda new, old: new if new.ndim else lax.select(made, new, old), new, state)
    return updates, new


# With an inlined jit, these many small operations are traced once for each structure of params, not at each call.
_jitted_update = functools.partial(jax.jit, inline=True)(_update)


def judge(last: Trials, params: Packed, grad: Packed, value: jax.Array, eps: Any) -> Verdict:
    """Accept a trial whose loss is sufficiently below the average of the accepted ones (Zhang & Hager, 2004)."""
    # The step that was really made: an update back from a far x, x + (accepted - x), has the rounding of that x.
    step = jax.tree.map(jnp.subtract, params, last.point)
    change = jax.tree.map(jnp.subtract, grad, last.grad)
    step_size, change_size, *sizes = _trees.each_largest(step, change, params, grad, last.point, last.grad)
    sizes = Sizes(*sizes)
    step, change = _trees.over(step, step_size), _trees.over(change, change_size)
    (s, _), (y, _), (g, _) = step, change, _trees.over(grad, sizes.grad)
    last_grad, last_size = _trees.over(last.grad, sizes.last_grad)
    *products, slope = _trees.vdots((s, s), (s, y), (y, y), (g, g), (last_grad, s))
    products, slope = Products(*products), last_size * step[1] * slope
    moves = products.ss > 0
    bound = last.reference + _SUFFICIENT * jnp.minimum(slope, 0) + _ROUNDING * eps * jnp.abs(last.reference)
    first = last.accepted == 0
    finite = jnp.isfinite(value) & jnp.isfinite(products.gg)
    leads_on = (sizes.grad > 0) | (value <= last.value)  # A plateau below the average would end the search.
    accepted = first | (moves & finite & leads_on & (value <= bound))
    return Verdict(first, accepted, step, change, sizes, products, slope, *_counted(last, accepted, moves))


def majorised(last: Trials, verdict: Verdict, value: jax.Array, rate: jax.Array) -> Verdict:
    """Accept a proximal step if the loss is below the parabola of its rate: then loss and penalty together fall.

    Source: Beck & Teboulle, "A fast iterative shrinkage-thresholding algorithm for linear inverse problems", 2009,
    lemma 2.3.
    """
    eps = jnp.finfo(value.dtype).eps
    bend = verdict.step[1] * verdict.step[1] * verdict.products.ss / jnp.where(rate > 0, rate, 1) / 2
    bound = last.value + verdict.slope + bend + _ROUNDING * eps * jnp.abs(last.value)
    moves = verdict.products.ss > 0
    accepted = verdict.first | (moves & jnp.isfinite(value) & (value <= bound))
    rejected, gave_up = _counted(last, accepted, moves)
    return verdict._replace(accepted=accepted, rejected=rejected, gave_up=gave_up)


def _counted(last: Trials, accepted: jax.Array, moves: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the number of rejected trials in a row, and whether the search gives up: at once if nothing moves."""
    rejected = jnp.where(accepted, 0, jnp.where(moves, last.rejected + 1, MAX_REJECTED))
    return rejected, rejected == MAX_REJECTED


def follow(last: Trials, verdict: Verdict, params: Packed, grad: Packed, value: jax.Array, memory: float) -> Trials:
    """Return the state after a trial.

    ``memory`` is Zhang and Hager's eta: 0 compares with the last loss, 1 with the mean.
    """
    weight = jnp.where(verdict.first, 1, memory * last.weight + 1)
    reference = jnp.where(verdict.first, value, last.reference + (value - last.reference) / weight)
    new = Trials(params, grad, value, reference, weight, last.left, last.accepted + 1, jnp.zeros_like(last.rejected))
    new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, last)
    new = _trees.select(verdict.keeps(verdict.accepted), new, last)
    return new._replace(accepted=jnp.where(verdict.gave_up, 0, new.accepted), rejected=verdict.rejected)


def square(tree: PyTree) -> jax.Array:
    """Return the squared 2-norm; infinite or 0 if it is out of range."""
    unit, size = _trees.unit(tree)
    return _square(size, _trees.vdot(unit, unit))


def _square(size: jax.Array, of_unit: jax.Array) -> jax.Array:
    return size * (size * of_unit)


def first_rate(x_size: jax.Array, grad_size: jax.Array, gg: jax.Array, value: jax.Array) -> jax.Array:
    """Return CG_DESCENT's I0: a hundredth of the largest entry; at zero, a hundredth of the way to a loss of zero.

    ``gg`` is the square of the gradient over its size.
    """
    scale = _trees.scale_of(grad_size)
    # XLA would turn (a / b) / b into a / b**2, which leaves the range of float32 early.
    to_zero = lax.optimization_barrier(jnp.abs(value) / scale / gg) / scale
    return jnp.where(x_size > 0, _FIRST_STEP * x_size / scale, jnp.where(value != 0, _FIRST_STEP * to_zero, 1))


def shorter(last: Trials, value: jax.Array, slope: jax.Array, curvature: jax.Array) -> jax.Array:
    """Return the share of a rejected step that leads to the minimum of the cubic through both values and slopes.

    Source: Nocedal & Wright, "Numerical Optimization", eq. 3.59, safeguarded.
    """
    fall = 3 * (last.value - value) + 2 * slope + curvature
    root = jnp.sqrt(fall**2 - slope * (slope + curvature))
    share = 1 - (slope + curvature + root - fall) / (curvature + 2 * root)
    quadratic = -slope / (2 * (value - last.value - slope))
    share = jnp.where(jnp.isfinite(share) & (share > 0), share, quadratic)
    return jnp.where(jnp.isfinite(share), jnp.clip(share, _SHORTEST, _LONGEST), _SHORTEST)


def updates(verdict: Verdict, here: Packed, new: Trials, leaf_update: Callable, *trees: Packed) -> PyTree:
    """Return the update from a trial to the next: ``leaf_update(x, accepted_x, ...)``, or back if the search gave up.

    A ``cond`` makes XLA compute whole vectors of small leaves once, and not anew in each leaf that is cut from them. A
    hundred leaves then compile in half of the time. Large leaves are updated in one pass without it.
    """
    given = here, new.point, *trees
    back = lambda x, accepted_x, *_: accepted_x - x
    either = lambda *leaves: jnp.where(verdict.gave_up, back(*leaves), leaf_update(*leaves))
    small, large = [tree.vectors for tree in given], [tree.others for tree in given]
    of_small = lambda leaf: lambda: jax.tree.map(leaf, *small)
    vectors = lax.cond(verdict.gave_up, of_small(back), of_small(leaf_update)) if here.vectors else []
    return dataclasses.replace(here, vectors=vectors, others=jax.tree.map(either, *large)).tree()


def descended(params: PyTree, grad: PyTree, rate: jax.Array) -> PyTree:
    """Return x - rate * g."""

    def leaf(x: jax.Array, g: jax.Array) -> jax.Array:
        wide = jnp.finfo(jnp.promote_types(x.dtype, jnp.float32)).dtype
        return (x - rate.astype(wide) * g).astype(x.dtype)

    return jax.tree.map(leaf, params, grad)


def farthest(params: PyTree, size: jax.Array) -> jax.Array:
    """Return how far a step may move an entry: no update leads back from beyond half the range of the dtype.

    ``size`` is that of the largest entry of the params.
    """
    highest = min(float(jnp.finfo(leaf.dtype).max) for leaf in jax.tree.leaves(params))
    return jnp.maximum(highest / 2 - size, 0)
