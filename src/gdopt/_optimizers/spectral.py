"""Gradient descent as optax transformations: with a given rate, and with one that it finds."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gdopt import _jax, _trees
from gdopt._checks import number
from gdopt._errors import InputError
from gdopt._optimizers import trials
from gdopt._optimizers.trials import GRAD, PARAMS, REJECTED, VALUE, Trials, Verdict
from gdopt._settings import own_promotion
from gdopt._trees import Packed
from gdopt._types import PyTree, Scalar, Schedule


def gd(learning_rate: Scalar | Schedule) -> optax.GradientTransformation:
    """Return vanilla gradient descent, ``x - learning_rate * g``, as an optax transformation.

    Args:
        learning_rate: a positive number, or a schedule ``step -> rate``, step 0 first. It may be traced.

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
    """Return a schedule or a traced rate as it is, and a number as Python's float.

    Python's float stays weakly typed in a trace, so bfloat16 params keep their dtype, and float64 ones their digits.
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
    limits = jnp.finfo(jax.dtypes.canonicalize_dtype(float))  # Beyond these, the rate would be infinite or 0.
    if not float(limits.tiny) <= rate <= float(limits.max):
        raise InputError(
            f"learning_rate={learning_rate!r} is out of the range of {limits.dtype}. Pass a number from "
            f"{float(limits.tiny):.2g} to {float(limits.max):.2g}."
        )
    return rate


class SpectralState(NamedTuple):
    """The state of `spectral`: the last accepted point, the rate, and what decides on the next trial."""

    trials: Trials
    learning_rate: jax.Array  # of the last update
    threshold: jax.Array  # the short rate is used if it is below this share of the long one
    long: jax.Array  # the long rate of the accepted step before; 0: it had none
    short: jax.Array  # the short rate of that step

    name, next = "spectral", lambda *given: _next(*given)
    params, grad, value, rejected = PARAMS, GRAD, VALUE, REJECTED
    average = property(lambda _: _MEMORY, doc="The weight of the past in the average of accepted losses.")


_MEMORY = 0.95  # Zhang and Hager's eta: 0 compares with the last loss, 1 with the mean of all
_THRESHOLD, _ADAPT = 0.5, 1.02  # the first threshold, and the factor by which each use of one rate favours the other
_TURN = 4  # the accepted steps that alternate between the rates, and then those that choose by the threshold
_RESOLUTION = 8  # the least move of the largest entry, in eps of it
_UNCURVED = 10  # the rate over the last one, if the gradient did not change at all


def spectral() -> optax.GradientTransformationExtraArgs:
    """Return gradient descent that finds its rate at every step. Use it for deterministic losses.

    Every step is ``x - learning_rate * g``. With the last step ``s`` and the change ``y`` of the gradient along it, the
    rate is one of three: the long ``s.s / s.y`` or the short ``s.y / y.y`` of Barzilai and Borwein, or the still
    shorter one of Huang et al., which would end at the minimum of a quadratic in two dimensions. Four steps alternate
    between the first two, then four choose by how far these lie apart. The loss may rise on the way: a trial point is
    accepted if its loss is sufficiently below a running average of the accepted ones. Otherwise the next update leads
    back to the last accepted point, and from there makes a smaller step. So an update takes one value and one gradient.
    It evaluates nothing inside, and nothing has to be tuned. `minimize` uses this for ``optimizer=gdopt.gd`` without a
    rate.

    Returns:
        An optax transformation. Its ``update`` needs ``params``, the loss there as ``value=``, and the gradient of the
        same point. It works for any pytree of float and complex leaves, in their own dtypes, under ``jit`` and
        ``vmap``. Its state takes twice the memory of the params: ``params``, ``grad`` and ``value`` of the last
        accepted point, ``learning_rate`` of the last update, and ``rejected``, the number of trials in a row that were
        taken back. After 60 of them, or when a step changes no entry any more, the update leads back to the accepted
        point, and the search starts anew there.

        The trial points are no result: their loss may be higher, infinite or NaN. Keep ``state.params``, or the best
        point seen. Conjugate the gradient that JAX gives for complex leaves, as for all of optax. Not for mini-batches:
        a change of the batch would be taken for a change of the gradient.

    Raises:
        InputError: from ``update``, if it is called without params.

    Source: Barzilai & Borwein, "Two-point step size gradient methods", 1988, and Huang, Dai, Liu & Zhang, "On the
    acceleration of the Barzilai-Borwein method", 2022 (the rates; we measured that they should take turns); Zhang &
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

    # optax's types know neither states of others nor extra arguments.
    return optax.GradientTransformationExtraArgs(cast(Any, _init), cast(Any, trials.update))


# A function outside `spectral`, so that all of its transformations are known to be the same.
def _init(params: PyTree) -> SpectralState:
    with own_promotion():
        first = trials.begin(params)
    zero = jnp.zeros_like(first.value)
    return SpectralState(first, zero, zero + _THRESHOLD, zero, zero)


def _next(
    state: SpectralState,
    verdict: Verdict,
    here: Packed,
    grad: Packed,
    value: jax.Array,
    within: trials.Within | None,
) -> tuple[PyTree, SpectralState]:
    last = state.trials
    if within is not None and not within.known_value:
        verdict = trials.majorised(last, verdict, value, state.learning_rate)
    point = trials.follow(last, verdict, here, grad, value, _MEMORY)
    new = _trees.select(verdict.accepted, _accept(state, here, value, verdict), state)
    share = trials.shorter(last, value, verdict.slope, verdict.curvature)
    shortened = jnp.where(verdict.gave_up, 0, state.learning_rate * share)
    rate = jnp.where(verdict.accepted, new.learning_rate, shortened)
    if within is not None:
        return _confined(new, verdict, here, point, rate, within)
    point = point._replace(left=jnp.where(verdict.accepted, rate * verdict.square / 2, last.left))

    def leaf_update(x: jax.Array, accepted_x: jax.Array, g: jax.Array) -> jax.Array:
        wide = rate.astype(jnp.finfo(jnp.promote_types(x.dtype, jnp.float32)).dtype)
        return ((accepted_x - x) - wide * g).astype(x.dtype)

    updates = trials.updates(verdict, here, point, leaf_update, point.grad)
    return updates, new._replace(trials=point, learning_rate=rate)


def _confined(
    new: SpectralState, verdict: Verdict, here: Packed, point: Trials, rate: jax.Array, within: trials.Within
) -> tuple[PyTree, SpectralState]:
    """Return the update to a trial within a constraint: that of a projected or proximal step.

    Source: Birgin, Martínez & Raydan, "Nonmonotone spectral projected gradient methods on convex sets", 2000; Wright,
    Nowak & Figueiredo, "Sparse reconstruction by separable approximation", 2009. A rejected trial is shortened on the
    straight way to it, where the set is convex. If the penalty is not known, the step is made anew at a lower rate.
    """

    def ahead() -> PyTree:
        there = trials.pack(within.nearest(trials.descended(point.point, point.grad, rate).tree(), rate))
        return jax.tree.map(jnp.subtract, there, point.point)

    def back() -> PyTree:
        share = jnp.where(rate > 0, rate / new.learning_rate, 0)  # 0: the search gave up.
        step = jax.tree.map(jnp.subtract, here, point.point)
        return jax.tree.map(lambda s: (share.astype(jnp.finfo(s.dtype).dtype) * s).astype(s.dtype), step)

    step = ahead() if not within.known_value else lax.cond(verdict.accepted, ahead, back)
    size = trials.square(step)
    left = jnp.where(verdict.accepted & (rate > 0), size / jnp.where(rate > 0, rate, 1) / 2, point.left)
    step = _trees.select(verdict.gave_up, jax.tree.map(jnp.zeros_like, step), step)
    updates = jax.tree.map(lambda x, a, s: ((a - x) + s).astype(x.dtype), here, point.point, step)
    left = left.astype(point.left.dtype)
    return updates.tree(), new._replace(trials=point._replace(left=left), learning_rate=rate)


def _accept(state: SpectralState, params: Packed, value: jax.Array, verdict: Verdict) -> SpectralState:
    """Choose the rate of the step from an accepted trial, and update what decides on the next rate."""
    first, step, change, number = verdict.first, verdict.step, verdict.change, state.trials.accepted
    eps = jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).eps
    ss, sy, yy, gg = verdict.products
    x_size, grad_size = verdict.sizes.params, verdict.sizes.grad
    ratio = step[1] / change[1]
    curved = ~first & (sy > eps**2 * jnp.sqrt(ss * yy))
    long, short = ratio * ss / sy, ratio * sy / yy
    wants_short = short < state.threshold * long
    chosen = jnp.where(wants_short, _shortest(state, long, short), long)
    alternate = jnp.where(number % 2 == 0, short, long)
    uncurved = jnp.where(yy > 0, ratio * jnp.sqrt(ss / yy), _UNCURVED * state.learning_rate)
    rate = jnp.where(curved, jnp.where(number // _TURN % 2 == 0, alternate, chosen), uncurved)
    rate = jnp.where(first, trials.first_rate(x_size, grad_size, gg, value), rate)
    adapted = state.threshold * jnp.where(wants_short, 1 / _ADAPT, _ADAPT)

    # A step below the resolution of the params reveals nothing about the curvature.
    least = _RESOLUTION * eps * x_size / grad_size
    rate = jnp.where(rate < least, jnp.maximum(least, jnp.where(curved, long, 0)), rate)
    most = jnp.minimum(trials.farthest(params, x_size) / grad_size, jnp.finfo(x_size.dtype).max)
    rate = jnp.where(grad_size > 0, jnp.minimum(rate, most), 0)

    accepted = SpectralState(
        state.trials,
        learning_rate=rate,
        threshold=jnp.where(curved, adapted, state.threshold),
        long=jnp.where(curved, long, 0),
        short=jnp.where(curved, short, 0),
    )
    return jax.tree.map(lambda new, old: new.astype(old.dtype), accepted, state)


def _shortest(state: SpectralState, long: jax.Array, short: jax.Array) -> jax.Array:
    """Return the least of this step's short rate, the last step's, and Huang et al.'s.

    Two steps after theirs, a quadratic in two dimensions is at its minimum. It is computed in shares of the long rate,
    because products of rates leave the range of float32.
    """
    last_long, last_short, this = state.long / long, state.short / long, short / long
    scale = last_short * this * (last_long - 1)
    q1, q2 = (last_short - this) / scale, (last_long * last_short - this) / scale
    share = 2 / (q2 + jnp.sqrt(q2**2 - 4 * q1))
    rate = jnp.where(jnp.isfinite(share) & (share > 0), share * long, short)
    return jnp.where(state.long > 0, jnp.minimum(short, jnp.minimum(state.short, rate)), short)
