"""Optimizers whose rate follows the distance that the params have to go: the default for mini-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdopt import _trees
from gdopt._checks import number
from gdopt._errors import InputError
from gdopt._optimizers.optax_state import states_of
from gdopt._optimizers.spectral import check_learning_rate
from gdopt._settings import own_promotion
from gdopt._types import PyTree, Scalar, Schedule

FIRST = 0.03  # the distance that is taken for granted
_B1, _B2, _EPS = 0.85, 0.98, 1e-8  # Adam's
_LEAST_MEMORY, _MEMORY = 10.0, 0.1  # the steps that the averages remember: some, and a share of those made
_DECAY = 0.001  # the share by which a step at the full rate shrinks the params
_FALL = 10.0  # the most that the loss may fall by the first full step, over the loss, if it were linear
# These and the cycle were measured on half of the trainings of benchmarks/training_tasks.py.


class DistanceState(NamedTuple):
    """The state of an optimizer whose rate is a multiple of an estimated distance."""

    distance: jax.Array  # (leaves,) or (1,): the estimates, which only grow
    size: jax.Array  # the largest entry of the first gradient that is not zero, in whose units others are taken
    start: PyTree  # the params before the first update
    gain: jax.Array  # like distance: the average of rate * <gradient, start - params>
    push: PyTree  # the average of rate * gradient
    steps: jax.Array  # the number of updates
    inner: PyTree  # the state of the optimizer that makes the updates


def distance_adamw(learning_rate: Scalar | Schedule, weight_decay: Scalar = _DECAY) -> optax.GradientTransformation:
    """Return AdamW whose rate follows the distance that the params have to go. It needs no rate in their units.

    The rate of a step is ``learning_rate * distance``, so ``learning_rate`` is a shape: 1 at its highest. Each leaf of
    the params has its own distance. It begins at 0.03, which suits most networks. If a step of that size along the sign
    of the first gradient would cost more than ten times the loss, it begins lower. It grows while the gradients still
    point away from the start, which means that the rate is too low for the number of steps. The estimate is Prodigy's,
    a lower bound of the distance to the minimum of a convex loss, leaf by leaf and with a shorter memory. The updates
    are those of Adam with Nesterov's momentum (b1 = 0.85, b2 = 0.98), of the gradient over the size of the first one:
    multiplying the loss changes nothing. `minimize` uses it with ``one_cycle(1.0, steps)`` for mini-batches and random
    keys if you pass neither an optimizer nor a learning_rate.

    Args:
        learning_rate: a positive number, or a schedule ``step -> shape``, step 0 first. It may be traced.
        weight_decay: each step also shrinks the params by this share times ``learning_rate``, whatever the distance; by
            default 0.001. 0 turns it off.

    Returns:
        An optax transformation for any pytree of float and complex leaves, in their own dtypes. Its ``update`` needs
        ``params``. Its state takes four times the memory of the params. Its ``distance`` holds the estimates.

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
    return following(_nadam, check_learning_rate(learning_rate), decay=decay, by_leaf=True)


def _nadam(learning_rate: Any) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=_B1, b2=_B2, eps=_EPS, nesterov=True)
    return optax.chain(adam, optax.scale_by_learning_rate(learning_rate))


def distance_gd(learning_rate: Scalar | Schedule) -> optax.GradientTransformation:
    """Return gradient descent with Nesterov's momentum whose rate follows the distance that the params have to go.

    It is `distance_adamw` with one rate for all entries: it divides a gradient by an average norm of the gradients.
    With a rate for each entry, projected or proximal steps end elsewhere than at the minimum.
    """
    return following(_normalised, check_learning_rate(learning_rate))


class NormalisedState(NamedTuple):
    """The state of an optimizer that divides gradients by their average size."""

    steps: jax.Array
    mean: PyTree  # the average of the gradients
    norm: jax.Array  # that of their norms, over the root of the number of entries
    size: jax.Array  # by which the last gradient was divided


def _normalised(learning_rate: Any) -> optax.GradientTransformation:
    def init(params: PyTree) -> NormalisedState:
        zero = jnp.zeros((), _trees.norm_dtype(params))
        return NormalisedState(jnp.int32(0), jax.tree.map(jnp.zeros_like, params), zero, zero + 1)

    def update(grad: PyTree, state: NormalisedState, params: PyTree = None) -> tuple[PyTree, NormalisedState]:
        steps = state.steps + 1
        blend = lambda old, new: jax.tree.map(lambda m, g: (_B1 * m + (1 - _B1) * g).astype(m.dtype), old, new)
        root = float(np.sqrt(sum(leaf.size for leaf in jax.tree.leaves(grad))))
        with own_promotion():
            norm = _B2 * state.norm + (1 - _B2) * _trees.norm(grad) / root
            size = norm / (1 - _B2 ** steps.astype(norm.dtype))
            size = jnp.where(size > 0, size, 1)
            mean = blend(state.mean, grad)
            factor = -_rate(learning_rate, state.steps) / size / (1 - _B1 ** (steps + 1).astype(norm.dtype))
            updates = jax.tree.map(lambda g: _times(g, factor), blend(mean, grad))
        return updates, NormalisedState(steps, mean, norm, size)

    return optax.GradientTransformation(cast(Any, init), cast(Any, update))


def following(
    factory: Callable[[Any], Any],
    learning_rate: Any,
    *,
    decay: float = 0.0,
    first: float = FIRST,
    by_leaf: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Return the factory's optimizer at the rate ``learning_rate * distance``.

    Use it for updates that do not depend on the scale of the gradient: see `distance_adamw`. With ``by_leaf`` each leaf
    of the params has a distance, by which its updates are multiplied, and the factory's optimizer gets gradients in
    units of the first one.
    """

    def init(params: PyTree) -> DistanceState:
        leaves, dtype = len(jax.tree.leaves(params)) if by_leaf else 1, _trees.norm_dtype(params)
        steps, distance = jnp.int32(0), jnp.full(leaves, first, dtype)
        zero, zeros = jnp.zeros((), dtype), jax.tree.map(jnp.zeros_like, params)
        rate = _rate(learning_rate, steps) * (1 if by_leaf else first)
        inner = factory(rate).init(_wide(params) if by_leaf else params)
        return DistanceState(distance, zero, _trees.copy(params), 0 * distance, zeros, steps, inner)

    def update(
        grad: PyTree, state: DistanceState, params: PyTree = None, **extras: Any
    ) -> tuple[PyTree, DistanceState]:
        if params is None:
            raise InputError("params=None was given to the update of a rate that follows a distance. Pass the params.")
        shape = _rate(learning_rate, state.steps).astype(state.size.dtype)
        size, unit_grad = _in_units(state.size, grad)
        state = state._replace(size=size, steps=optax.safe_increment(state.steps))
        if "value" in extras:
            state = _begun(state, unit_grad, extras["value"])
        state = _estimated(state, unit_grad, params, shape, skips=not by_leaf)
        optimizer = optax.with_extra_args_support(factory(shape if by_leaf else shape * state.distance[0]))
        if by_leaf:
            updates, inner = optimizer.update(_wide(unit_grad), state.inner, _wide(params), **extras)
            updates = _each(_times, updates, state.distance)
            updates = jax.tree.map(lambda u, x: u.astype(x.dtype), updates, params)
        else:
            updates, inner = optimizer.update(grad, state.inner, params, **extras)
        if decay:
            updates = jax.tree.map(lambda u, x: u - _times(x, shape * decay).astype(u.dtype), updates, params)
        return updates, state._replace(inner=inner)

    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, update))


def _wide(tree: PyTree) -> PyTree:
    """Return the leaves of float16 as float32: Adam's eps and the squares of small gradients would be zero."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float16 else leaf, tree)


def _rate(learning_rate: Any, steps: jax.Array) -> jax.Array:
    return jnp.asarray(learning_rate(steps) if callable(learning_rate) else learning_rate)


def _times(leaf: jax.Array, factor: jax.Array) -> jax.Array:
    return leaf * factor.astype(jnp.finfo(leaf.dtype).dtype)


def _each(function: Callable[[jax.Array, jax.Array], jax.Array], tree: PyTree, factors: jax.Array) -> PyTree:
    """Apply a function to each leaf and its factor; a single factor is that of all."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([function(leaf, factors[min(at, len(factors) - 1)]) for at, leaf in enumerate(leaves)])


def _begun(state: DistanceState, grad: PyTree, value: jax.Array) -> DistanceState:
    """Lower the first distances so that a step by the sign of the gradient would not cost many times the loss.

    That is the case for inputs in the millions, whose weights are millionths, and for very wide networks.
    """

    def lowered() -> jax.Array:
        with own_promotion():
            limit = _FALL * jnp.abs(value).astype(state.size.dtype) / state.size / _sizes(state, grad)
            return jnp.where(jnp.isfinite(limit) & (limit > 0), jnp.minimum(state.distance, limit), state.distance)

    return state._replace(distance=jax.lax.cond(state.steps == 1, lowered, lambda: state.distance))


def _totals(state: DistanceState, terms: list[jax.Array]) -> jax.Array:
    """Return a number for each distance, from one for each leaf."""
    terms = [term.astype(state.size.dtype) for term in terms]
    return jnp.stack(terms) if len(state.distance) == len(terms) else sum(terms, jnp.zeros_like(state.size))[None]


def _sizes(state: DistanceState, tree: PyTree) -> jax.Array:
    return _totals(state, [jnp.sum(jnp.abs(leaf), dtype=state.size.dtype) for leaf in jax.tree.leaves(tree)])


def _estimated(state: DistanceState, grad: PyTree, params: PyTree, shape: jax.Array, *, skips: bool) -> DistanceState:
    """Return the state with the next estimate: <average gradient, start - params> / |average gradient|_1.

    Both averages are weighted by the rate times the distance. They are kept in units of the newest one, squared, so
    that they stay in range however far the params go. The size of the gradient cancels. If the optimizer ``skips``
    gradients that are not finite, or may do so, the averages leave them out as well.
    """
    if skips:
        finite = _trees.all_finite(grad)
        grad = jax.tree.map(lambda g: jnp.where(finite, g, 0).astype(g.dtype), grad)
    with own_promotion():
        memory = 1 - 1 / (_LEAST_MEMORY + _MEMORY * state.steps.astype(state.size.dtype))
        share = (1 - memory) * shape
        away = jax.tree.leaves(jax.tree.map(jnp.subtract, state.start, params))
        gains = [_trees.vdot(g, x) for g, x in zip(jax.tree.leaves(grad), away, strict=True)]
        gain = memory * state.gain + share * _totals(state, gains)
        push = jax.tree.map(lambda old, g: (memory * old + share * g).astype(old.dtype), state.push, grad)
        estimate = gain / _sizes(state, push)
        distance = jnp.where(jnp.isfinite(estimate), jnp.maximum(state.distance, estimate), state.distance)
        unit = (state.distance / distance) ** 2
        return state._replace(distance=distance, gain=unit * gain, push=_each(_times, push, unit))


def _in_units(size: jax.Array, grad: PyTree) -> tuple[jax.Array, PyTree]:
    """Divide a gradient by the size of the first one, so that no square leaves the range, and eps has no units."""
    size = jnp.where((size > 0) | ~_trees.all_finite(grad), size, _trees.largest(grad))
    scale = jnp.where(size > 0, size, 1)
    divide = lambda g: (g / scale.astype(jnp.finfo(g.dtype).dtype)).astype(g.dtype)
    return size, jax.tree.map(divide, grad)


def rate_of_distance(state: PyTree, rate: Any) -> Any:
    """Return the rate of the last update whose shape is ``rate``; that itself if the state estimates no distance."""
    distance, normalised = distance_in(state), states_of(state, NormalisedState)
    if distance is None:
        return rate
    return rate * distance if len(normalised) != 1 else rate * distance / normalised[0].size


def distance_in(state: PyTree) -> jax.Array | None:
    """Return the largest distance in an optimizer's state; None if it estimates none."""
    found = states_of(state, DistanceState)
    return jnp.max(found[0].distance) if len(found) == 1 else None


def steps_of_distance(state: PyTree) -> jax.Array | None:
    """Return the updates in which an optimizer's state has estimated its distance; None if it estimates none."""
    found = states_of(state, DistanceState)
    return found[0].steps if len(found) == 1 else None
