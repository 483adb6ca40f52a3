"""The effect of a scaled gradient on the updates of an optimizer, which decides how its rate is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _trees
from gdopt._optimizers.factory import function_identity
from gdopt._optimizers.optax_state import apply, extra_arguments
from gdopt._settings import as_own_work
from gdopt._types import PyTree

_MOST = 3  # the entries of a dimension of the params that are tried
_STEPS = 40  # of random gradients, and then as many of a constant one
_RATE = 1e-4  # low, so that the params stay where they are
_SCALES = np.array([1e-3, 1.0, 1e3], np.float32)
_ALIKE = 3.0  # the most that the size of the update may change over all scales, if it does not depend on them
_MOMENTUM = 2.0  # the sum of the updates of one gradient over it, from which on it counts as momentum


class Response(NamedTuple):
    """The size of an optimizer's updates over its rate."""

    is_scale_free: bool  # whether the updates do not depend on the size of the gradient
    of_noise: float  # for independent normal gradients
    of_constant: float  # for a gradient of ones that stays the same: with momentum 0.9 it is 10

    @property
    def has_momentum(self) -> bool:
        """Tell whether the updates of one gradient add up to more than twice the gradient times the rate."""
        return self.of_constant > _MOMENTUM


@as_own_work
def response(
    factory: Callable[[Any], Any], params: PyTree, before: Callable[[], Any] = lambda: None
) -> Response | None:
    """Measure a factory's optimizer on params of the same structure with a few entries; None if that fails.

    ``before`` is called before something is compiled for that, and may raise errors.
    """
    identity = function_identity(factory)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)), jax.tree.structure(params)
    key = identity, shapes
    if identity is None or key not in _known:
        before()
        try:
            found = _measured(factory, params)
        except Exception:  # It may need params of the full shape; its error comes when it is used.
            found = None
        if identity is None:
            return found
        _known[key] = found
    return _known[key]


_known: dict[Any, Response | None] = {}


def _measured(factory: Callable[[Any], Any], params: PyTree) -> Response:
    leaves, treedef = jax.tree.flatten(params)
    draws = np.random.default_rng(0)
    shapes = [tuple(min(size, _MOST) for size in leaf.shape) for leaf in leaves]
    start = treedef.unflatten([jnp.asarray(draws.normal(size=shape), jnp.float32) for shape in shapes])
    noise = treedef.unflatten([jnp.asarray(draws.normal(size=(_STEPS, *shape)), jnp.float32) for shape in shapes])
    optimizer = factory(jnp.float32(_RATE))

    def size_of(grads: PyTree) -> jax.Array:
        def step(state: PyTree, grad: PyTree) -> tuple[PyTree, jax.Array]:
            asked = lambda _: jnp.float32(0)
            updates, state = apply(optimizer, grad, state, start, **extra_arguments(asked, jnp.float32(0), grad))
            return _trees.strong(state), _trees.vdot(updates, updates)

        _, squares = jax.lax.scan(step, _trees.strong(optimizer.init(start)), grads)
        return jnp.sqrt(jnp.mean(squares[_STEPS // 2 :]) / sum(leaf.size for leaf in jax.tree.leaves(start))) / _RATE

    scaled = jax.jit(jax.vmap(lambda scale: size_of(jax.tree.map(lambda leaf: scale * leaf, noise))))
    small, normal, large = map(float, scaled(_SCALES))
    constant = float(jax.jit(size_of)(jax.tree.map(jnp.ones_like, noise)))
    sizes = np.array([small, normal, large])
    is_free = bool(sizes.min() > 0 and sizes.max() < _ALIKE * sizes.min())
    return Response(is_free, normal, constant)
