"""Optimizers whose rate follows the distance that the params have to go: the default for mini-batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from gdopt import _trees
from gdopt._checks import number
from gdopt._errors import InputError
from gdopt._optimizers.spectral import check_learning_rate
from gdopt._settings import own_promotion
from gdopt._types import PyTree, Scalar, Schedule

FIRST = 0.03  # the distance that is taken for granted
_B1, _B2, _EPS = 0.85, 0.98, 1e-8  # Adam's
_MEMORY = 0.9  # the factor of the averages that estimate the distance
_DECAY = 0.001  # the share by which a step at the full rate shrinks the params
# These and the cycle were measured on half of the trainings of benchmarks/training_tasks.py.


class DistanceState(NamedTuple):
    """The state of an optimizer whose rate is a multiple of an estimated distance."""

    distance: jax.Array  # the estimate, which only grows
    size: jax.Array  # the largest entry of the first gradient that is not zero, in whose units others are taken
    start: PyTree  # the params before the first update
    gain: jax.Array  # the average of rate * <gradient, start - params>
    push: PyTree  # the average of rate * gradient
    count: jax.Array | None  # the number of updates, if the rate is a schedule
    inner: PyTree  # the state of the optimizer that makes the updates


def distance_adamw(learning_rate: Scalar | Schedule, weight_decay: Scalar = _DECAY) -> optax.GradientTransformation:
    """Return AdamW whose rate follows the distance that the params have to go. It needs no rate in their units.

    The rate of a step is ``learning_rate * distance``, so ``learning_rate`` is a shape: 1 at its highest. The distance
    begins at 0.03, which suits most networks, and grows while the gradients still point away from the start. Then the
    rate is too low for the number of steps, as it is if targets are in the thousands. The estimate is that of Prodigy,
    a lower bound of the distance to the minimum of a convex loss. The updates are those of Adam with Nesterov's
    momentum (b1 = 0.85, b2 = 0.98), of the gradient over the size of the first one: multiplying the loss changes
    nothing. `minimize` uses it with ``one_cycle(1.0, steps)`` for mini-batches and random keys if you pass neither an
    optimizer nor a learning_rate.

    Args:
        learning_rate: a positive number, or a schedule ``step -> shape``, step 0 first. It may be traced.
        weight_decay: each step also shrinks the params by this share times ``learning_rate``, whatever the distance; by
            default 0.001. 0 turns it off.

    Returns:
        An optax transformation for any pytree of float and complex leaves, in their own dtypes. Its ``update`` needs
        ``params``. Its state takes four times the memory of the params. ``distance`` is the estimate.

    Raises:
        InputError: for a rate or a weight_decay that is not valid, and from ``update`` without params.

    Source: Mishchenko & Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", 2023, arXiv 2306.06101,
    algorithm 4 (the estimate); Dozat, "Incorporating Nesterov Momentum into Adam", 2016; Loshchilov & Hutter,
    "Decoupled Weight Decay Regularization", 2017, arXiv 1711.05101 (the decay has the schedule's shape alone).

    Example:
        >>> import gdopt, jax, jax.numpy as jnp
        >>> x = jnp.linspace(-1.0, 1.0, 64)
        >>> def loss(params, batch):
        ...     return jnp.mean((params[0] * batch[0] + params[1] - batch[1]) ** 2)
        >>> shape = gdopt.schedules.one_cycle(1.0, total_steps=400)
        >>> result = gdopt.minimize(
        ...     loss,
        ...     jnp.zeros(2),
        ...     data=(x, 300 * x + 700),
        ...     batch_size=8,
        ...     max_steps=400,
        ...     optimizer=gdopt.distance_adamw,
        ...     learning_rate=shape,
        ... )
        >>> result.params.round(0)
        Array([300., 700.], dtype=float32)
    """
    decay = number("weight_decay", weight_decay, lambda x: x >= 0, "a number of at least 0, such as 0.001")
    return following(_nadam, check_learning_rate(learning_rate), decay=decay, in_units=True)


def lower_distance_adamw(share: float) -> functools.partial[Any]:
    """Return `distance_adamw` at a share of its first distance, which does not grow: for another try."""
    return functools.partial(following, _nadam, decay=_DECAY, first=share * FIRST, grows=False, in_units=True)


def _nadam(learning_rate: Any) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=_B1, b2=_B2, eps=_EPS, nesterov=True)
    return optax.chain(adam, optax.scale_by_learning_rate(learning_rate))


def following(
    factory: Callable[[Any], Any],
    learning_rate: Any,
    *,
    decay: float = 0.0,
    first: float = FIRST,
    grows: bool = True,
    in_units: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Return the factory's optimizer at the rate ``learning_rate * distance``.

    Use it for updates that do not depend on the scale of the gradient: see `distance_adamw`. With ``in_units`` the
    factory's optimizer gets gradients in units of the first one.
    """

    def init(params: PyTree) -> DistanceState:
        count = jnp.int32(0) if callable(learning_rate) else None
        dtype = _trees.norm_dtype(params)
        distance, zeros = jnp.asarray(first, dtype), jax.tree.map(jnp.zeros_like, params)
        inner = factory(_rate(learning_rate, count) * distance).init(params)
        zero = jnp.zeros((), dtype)
        return DistanceState(distance, zero, _trees.copy(params), zero, zeros, count, inner)

    def update(
        grad: PyTree, state: DistanceState, params: PyTree = None, **extras: Any
    ) -> tuple[PyTree, DistanceState]:
        if params is None:
            raise InputError("params=None was given to the update of a rate that follows a distance. Pass the params.")
        shape = _rate(learning_rate, state.count).astype(state.distance.dtype)
        size, unit_grad = _in_units(state.size, grad)
        state = state._replace(size=size)
        if grows:
            state = _estimated(state, unit_grad, params, shape)
        optimizer = optax.with_extra_args_support(factory(shape * state.distance))
        updates, inner = optimizer.update(unit_grad if in_units else grad, state.inner, params, **extras)
        if decay:
            shrink = lambda u, x: u - ((shape * decay).astype(jnp.finfo(x.dtype).dtype) * x).astype(u.dtype)
            updates = jax.tree.map(shrink, updates, params)
        count = None if state.count is None else optax.safe_increment(state.count)
        return updates, state._replace(count=count, inner=inner)

    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, update))


def _rate(learning_rate: Any, count: jax.Array | None) -> jax.Array:
    return jnp.asarray(learning_rate(count) if callable(learning_rate) else learning_rate)


def _estimated(state: DistanceState, grad: PyTree, params: PyTree, shape: jax.Array) -> DistanceState:
    """Return the state with the next estimate: <average gradient, start - params> / |average gradient|_1.

    Both averages are weighted by the rate times the distance. They are kept in units of the newest one, squared, so
    that they stay in range however far the params go. The size of the gradient cancels.
    """
    with own_promotion():
        dtype = state.distance.dtype
        share = (1 - _MEMORY) * shape
        away = jax.tree.map(jnp.subtract, state.start, params)
        gain = _MEMORY * state.gain + share * _trees.vdot(grad, away)
        push = jax.tree.map(lambda old, g: (_MEMORY * old + share * g).astype(old.dtype), state.push, grad)
        sizes = [jnp.sum(jnp.abs(leaf), dtype=dtype) for leaf in jax.tree.leaves(push)]
        estimate = gain / sum(sizes, jnp.zeros((), dtype))
        distance = jnp.where(jnp.isfinite(estimate), jnp.maximum(state.distance, estimate), state.distance)
        unit = (state.distance / distance) ** 2
        push = jax.tree.map(lambda leaf: (unit * leaf).astype(leaf.dtype), push)
        return state._replace(distance=distance, gain=unit * gain, push=push)


def _in_units(size: jax.Array, grad: PyTree) -> tuple[jax.Array, PyTree]:
    """Divide a gradient by the size of the first one, so that no square leaves the range, and eps has no units."""
    largest = _trees.largest(grad)
    size = jnp.where((size > 0) | ~jnp.isfinite(largest), size, largest)
    scale = jnp.where(size > 0, size, 1)
    divide = lambda g: (g / scale.astype(jnp.finfo(g.dtype).dtype)).astype(g.dtype)
    return size, jax.tree.map(divide, grad)


def distance_in(state: PyTree) -> jax.Array | None:
    """Return the distance in an optimizer's state; None if it estimates none."""
    is_one = lambda node: isinstance(node, DistanceState)
    found = [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]
    return found[0].distance if len(found) == 1 else None
