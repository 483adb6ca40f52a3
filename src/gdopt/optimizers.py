"""gdopt's own optimizers, as optax transformations: gradient descent with a rate given, and with one chosen."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gdopt import _jax, _trees
from gdopt._checks import number
from gdopt._settings import own_promotion
from gdopt._types import PyTree, Scalar, Schedule
from gdopt.errors import InputError


def gd(learning_rate: Scalar | Schedule) -> optax.GradientTransformation:
    """Vanilla gradient descent, ``x - learning_rate * g``, as an optax transformation.

    Args:
        learning_rate: a positive number, or a schedule ``step -> rate``, step 0 first. May be traced.

    Returns:
        A transformation whose updates equal those of ``optax.sgd(learning_rate)`` bit for bit. It keeps no state but
        the step count of a schedule.

    Raises:
        InputError: for a rate that is negative, zero, NaN, infinite or not a scalar.

    Source: Cauchy, "Méthode générale pour la résolution des systèmes d'équations simultanées", 1847.

    Example:
        >>> import gdopt, jax, jax.numpy as jnp, optax
        >>> params = jnp.array([1.0, 2.0])
        >>> optimizer = gdopt.gd(0.1)
        >>> updates, state = optimizer.update(jax.grad(jnp.sum)(params), optimizer.init(params))
        >>> optax.apply_updates(params, updates)
        Array([0.9, 1.9], dtype=float32)
    """
    return optax.scale_by_learning_rate(check_learning_rate(learning_rate))


def check_learning_rate(learning_rate: Any) -> Any:
    """The rate as it plugs in: a schedule or a traced rate as it is, a number as Python's float.

    Python's float stays weakly typed in a trace: bfloat16 params keep their dtype then, and float64 ones their digits.
    """
    if callable(learning_rate):
        return learning_rate
    if _jax.is_tracer(learning_rate):
        if learning_rate.shape != ():
            raise InputError(f"learning_rate has shape {learning_rate.shape}: pass one number for all parameters.")
        if not (jnp.issubdtype(learning_rate.dtype, jnp.floating) or jnp.issubdtype(learning_rate.dtype, jnp.integer)):
            raise InputError(f"learning_rate has dtype {learning_rate.dtype}: pass a real number.")
        return learning_rate
    wanted = "a finite number above 0, such as 0.1, nor a schedule step -> rate"
    rate = number("learning_rate", learning_rate, lambda x: x > 0, wanted)
    limits = jnp.finfo(jax.dtypes.canonicalize_dtype(float))  # beyond, it would be infinite or 0
    if not float(limits.tiny) <= rate <= float(limits.max):
        raise InputError(
            f"learning_rate={learning_rate!r} is out of the range of {limits.dtype}, from {float(limits.tiny):.2g} to "
            f"{float(limits.max):.2g}."
        )
    return rate


Unit = tuple[PyTree, jax.Array]  # a tree over the size of its largest entry, and that size


class SpectralState(NamedTuple):
    """What `spectral` remembers: the last accepted point, the rate, and what decides on the next trial."""

    params: PyTree  # the last accepted point, with its gradient and its loss
    grad: PyTree
    value: jax.Array
    learning_rate: jax.Array  # of the last update
    reference: jax.Array  # the average of accepted losses that a new one is measured against
    weight: jax.Array  # the sum of that average's weights
    threshold: jax.Array  # the short rate is used where it is below this share of the long one
    long: jax.Array  # both rates of the accepted step before; 0: it had none
    short: jax.Array
    accepted: jax.Array  # points; 0: the next one is where the search starts
    rejected: jax.Array  # trials in a row; at MAX_REJECTED no step was found


MAX_REJECTED = 60  # a rate halved that often is below 1e-18 of what it was
_FIRST_STEP = 0.01  # of the largest entry of the params; CG_DESCENT's psi_0
_SUFFICIENT = 1e-4  # of the decrease that the slope promises; Armijo's constant
_SHORTEST, _LONGEST = 0.1, 0.5  # of a rejected rate; SPG's safeguard
_ROUNDING = 10  # losses within this many eps of each other count as equal
_MEMORY = 0.95  # Zhang and Hager's eta: 0 measures against the last loss, 1 against the mean of all
_THRESHOLD, _ADAPT = 0.5, 1.02  # each use of one rate makes the other likelier by this factor
_TURN = 4  # accepted steps: so many alternate between the rates, so many choose by the threshold
_RESOLUTION = 8  # eps: by so much of itself a step moves the largest entry at least
_UNCURVED = 10  # times the last rate, where the gradient did not change at all


def spectral() -> optax.GradientTransformationExtraArgs:
    """Gradient descent that finds its rate at every step, for a loss that is the same function each time.

    Every step is ``x - learning_rate * g``. With the last step ``s`` and the change ``y`` of the gradient along it, the
    rate is the long ``s.s / s.y`` or the short ``s.y / y.y`` of Barzilai and Borwein, or the still shorter one of Huang
    et al., which would end at the minimum of a quadratic in two dimensions: in turn, four steps alternate between the
    first two, and four choose by how far these lie apart. The loss may rise on the way: a trial point is accepted if
    its loss is sufficiently below a running average of the accepted ones. Otherwise the next update leads back to the
    last accepted point and from there a smaller step. So an update takes one value and one gradient, nothing is
    evaluated inside, and nothing has to be tuned. This is what `minimize` uses by default.

    Returns:
        An optax transformation whose ``update`` needs ``params`` and ``value=``, the loss there, with the gradient of
        the same point. Works for any pytree of float and complex leaves, in their own dtypes, under ``jit`` and
        ``vmap``. Its state takes twice the memory of the params: ``params``, ``grad`` and ``value`` of the last
        accepted point, ``learning_rate`` of the last update, and ``rejected``, the number of trials in a row that were
        taken back. After 60 of them, or when a step changes no entry any more, the update leads back to the accepted
        point, and the search starts anew there.

        The trial points are no result: their loss may be higher, infinite or NaN. Keep ``state.params``, or the best
        point seen. For complex leaves conjugate the gradient that JAX gives, as for all of optax. Not for mini-batches,
        where a change of the batch would be taken for a change of the gradient.

    Raises:
        InputError: from ``update``, when it is called without params.

    Source: Barzilai & Borwein, "Two-point step size gradient methods", 1988, and Huang, Dai, Liu & Zhang, "On the
    acceleration of the Barzilai-Borwein method", 2022 (the rates; that they take turns is our own measurement); Zhang &
    Hager, "A nonmonotone line search technique and its application to unconstrained optimization", 2004 (what is
    accepted); Hager & Zhang, "Algorithm 851: CG_DESCENT", 2006 (the first step); Birgin, Martínez & Raydan,
    "Nonmonotone spectral projected gradient methods on convex sets", 2000 (the safeguards).

    Example:
        >>> import gdopt, jax, jax.numpy as jnp, optax
        >>> loss = lambda x: jnp.sum(jnp.array([1.0, 100.0]) * (x - 3) ** 2)
        >>> optimizer, x = gdopt.spectral(), jnp.zeros(2)
        >>> state = optimizer.init(x)
        >>> for _ in range(20):
        ...     value, grad = jax.value_and_grad(loss)(x)
        ...     updates, state = optimizer.update(grad, state, x, value=value)
        ...     x = optax.apply_updates(x, updates)
        >>> state.params.round(2)
        Array([3., 3.], dtype=float32)
    """

    return optax.GradientTransformationExtraArgs(_init, cast(Any, _checked_update))  # optax knows no extra arguments


# Not inside of `spectral`, so that each of its transformations is known to be the same.
def _init(params: PyTree) -> SpectralState:
    params = _trees.strong(params)
    blank = optax.tree.zeros_like(params)
    with own_promotion():
        zero = jnp.zeros((), _scalar_dtype(params))
    none = jnp.int32(0)
    threshold = zero + _THRESHOLD
    return SpectralState(blank, blank, zero, zero, zero, zero, threshold, zero, zero, accepted=none, rejected=none)


def _checked_update(
    updates: PyTree, state: SpectralState, params: PyTree | None = None, *, value: Any, **extra_args: Any
) -> tuple[PyTree, SpectralState]:
    del extra_args
    if params is None:
        raise InputError("spectral was updated without params: call update(grad, state, params, value=loss).")
    with own_promotion():
        return _update(updates, state, params, value)


# jit, inlined, so that these many small operations are traced once for params of a kind and not at each call.
@functools.partial(jax.jit, inline=True)
def _update(grad: PyTree, state: SpectralState, params: PyTree, value: Any) -> tuple[PyTree, SpectralState]:
    """The way to the next trial, from the loss and the gradient at the last one."""
    params, grad = _trees.strong(params), _trees.strong(grad)
    eps, value = jnp.finfo(jnp.result_type(value)).eps, jnp.asarray(value, state.value.dtype)

    # The step as it really is: what leads back from far off, x + (accepted - x), has the rounding of that far x.
    step = _trees.unit(optax.tree.sub(params, state.params))
    change = _trees.unit(optax.tree.sub(grad, state.grad))
    slope = _dot(_trees.unit(state.grad), step)
    moves = _trees.vdot(step[0], step[0]) > 0  # which the rates need as well
    bound = state.reference + _SUFFICIENT * jnp.minimum(slope, 0) + _ROUNDING * eps * jnp.abs(state.reference)
    first = state.accepted == 0
    grad_size = _trees.largest(grad)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_size)
    leads_on = (grad_size > 0) | (value <= state.value)  # a plateau may lie below the average, and ends all
    accepted = first | (moves & finite & leads_on & (value <= bound))
    rejected = jnp.where(accepted, 0, jnp.where(moves, state.rejected + 1, MAX_REJECTED))
    gave_up = rejected == MAX_REJECTED

    new = _trees.select(accepted, _accept(state, params, grad, value, step, change), state)
    shorter = jnp.where(gave_up, 0, _shorter_rate(state, value, slope, _dot(step, change)))
    rate = jnp.where(accepted, new.learning_rate, shorter)
    new = new._replace(learning_rate=rate, accepted=jnp.where(gave_up, 0, new.accepted), rejected=rejected)

    def leaf_update(x: jax.Array, accepted_x: jax.Array, g: jax.Array) -> jax.Array:
        wide = rate.astype(jnp.finfo(jnp.promote_types(x.dtype, jnp.float32)).dtype)
        return ((accepted_x - x) - wide * g).astype(x.dtype)

    return jax.tree.map(leaf_update, params, new.params, new.grad), new


def _dot(a: Unit, b: Unit) -> jax.Array:
    return a[1] * b[1] * _trees.vdot(a[0], b[0])


def _scalar_dtype(params: PyTree) -> Any:
    """Of the state's scalars: that of the loss is not known at the start, so the widest there is."""
    return jnp.promote_types(_trees.norm_dtype(params), float)


def _accept(
    state: SpectralState, params: PyTree, grad: PyTree, value: jax.Array, step: Unit, change: Unit
) -> SpectralState:
    """The state in which this trial is the accepted point, with the rate of the step from here."""
    first = state.accepted == 0
    weight = jnp.where(first, 1, _MEMORY * state.weight + 1)
    reference = jnp.where(first, value, state.reference + (value - state.reference) / weight)

    eps = jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).eps
    ss, sy, yy = (_trees.vdot(a[0], b[0]) for a, b in ((step, step), (step, change), (change, change)))
    ratio = step[1] / change[1]
    curved = ~first & (sy > eps**2 * jnp.sqrt(ss * yy))
    long, short = ratio * ss / sy, ratio * sy / yy
    wants_short = short < state.threshold * long
    chosen = jnp.where(wants_short, _shortest(state, long, short), long)
    alternate = jnp.where(state.accepted % 2 == 0, short, long)
    uncurved = jnp.where(yy > 0, ratio * jnp.sqrt(ss / yy), _UNCURVED * state.learning_rate)
    rate = jnp.where(curved, jnp.where(state.accepted // _TURN % 2 == 0, alternate, chosen), uncurved)
    rate = jnp.where(first, _first_rate(params, grad, value), rate)
    adapted = state.threshold * jnp.where(wants_short, 1 / _ADAPT, _ADAPT)

    # A step below the resolution of the params tells nothing of the curvature; from one beyond their range there is no
    # way back.
    x_size, grad_size = _trees.largest(params), _trees.largest(grad)
    least = _RESOLUTION * eps * x_size / grad_size
    rate = jnp.where(rate < least, jnp.maximum(least, jnp.where(curved, long, 0)), rate)
    highest = min(float(jnp.finfo(leaf.dtype).max) for leaf in jax.tree.leaves(params))
    most = jnp.minimum(jnp.maximum(highest / 2 - x_size, 0) / grad_size, jnp.finfo(x_size.dtype).max)
    rate = jnp.where(grad_size > 0, jnp.minimum(rate, most), 0)

    accepted = SpectralState(
        params=params,
        grad=grad,
        value=value,
        learning_rate=rate,
        reference=reference,
        weight=weight,
        threshold=jnp.where(curved, adapted, state.threshold),
        long=jnp.where(curved, long, 0),
        short=jnp.where(curved, short, 0),
        accepted=state.accepted + 1,
        rejected=jnp.zeros_like(state.rejected),
    )
    return jax.tree.map(lambda new, old: new.astype(old.dtype), accepted, state)


def _first_rate(params: PyTree, grad: PyTree, value: jax.Array) -> jax.Array:
    """CG_DESCENT's I0: a hundredth of the largest entry; at zero, a hundredth of the way to a loss of zero."""
    unit_grad, grad_size = _trees.unit(grad)
    x_size = _trees.largest(params)
    # XLA would make (a / b) / b a / b**2, which leaves float32 early.
    to_zero = lax.optimization_barrier(jnp.abs(value) / grad_size / _trees.vdot(unit_grad, unit_grad)) / grad_size
    return jnp.where(x_size > 0, _FIRST_STEP * x_size / grad_size, jnp.where(value != 0, _FIRST_STEP * to_zero, 1))


def _shortest(state: SpectralState, long: jax.Array, short: jax.Array) -> jax.Array:
    """The least of this step's short rate, the last step's, and Huang et al.'s.

    Theirs is the one from which a quadratic in two dimensions is at its minimum two steps later. It is computed in
    shares of the long rate, as products of rates leave the range of float32.
    """
    last_long, last_short, this = state.long / long, state.short / long, short / long
    scale = last_short * this * (last_long - 1)
    q1, q2 = (last_short - this) / scale, (last_long * last_short - this) / scale
    share = 2 / (q2 + jnp.sqrt(q2**2 - 4 * q1))
    rate = jnp.where(jnp.isfinite(share) & (share > 0), share * long, short)
    return jnp.where(state.long > 0, jnp.minimum(short, jnp.minimum(state.short, rate)), short)


def _shorter_rate(state: SpectralState, value: jax.Array, slope: jax.Array, curvature: jax.Array) -> jax.Array:
    """The rate to the minimum of the cubic through both values and slopes (Nocedal & Wright, eq. 3.59), safeguarded."""
    rate = state.learning_rate
    fall = 3 * (state.value - value) + 2 * slope + curvature
    root = jnp.sqrt(fall**2 - slope * (slope + curvature))
    share = 1 - (slope + curvature + root - fall) / (curvature + 2 * root)
    quadratic = -slope / (2 * (value - state.value - slope))
    share = jnp.where(jnp.isfinite(share) & (share > 0), share, quadratic)
    return rate * jnp.where(jnp.isfinite(share), jnp.clip(share, _SHORTEST, _LONGEST), _SHORTEST)
