"""Derivatives of a minimum within a set, or with a penalty, by the implicit function theorem.

There x = T(x - t g(x, θ), t, θ) for every θ and each t > 0, with the projection or the proximal step T. So
(I - J (I - t H)) dx = -t J (dg/dθ) dθ + (dT/dθ) dθ, with the derivative J of T in its first argument.

Source: Blondel et al., "Efficient and modular implicit differentiation", 2022, section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import gmres

from gdopt import _trees
from gdopt._types import PyTree

_DENSE = 256  # the most params whose matrix is built
_ROUNDS = 3  # of refinement, or restarts of GMRES
_RESIDUAL = 1e-3  # the residual over the right side above which there is no derivative
_BESIDE = 0.75  # the distance of the points that are compared, as a power of eps
_BENT = 0.1  # the change of the derivative of T next to the point above which T has a kink there


def moves(gradient: Callable, nearest: Callable, x: PyTree, some: list, ways: list) -> PyTree:
    """Return the tangent of the minimum x if ``some`` of what it depends on moves along ``ways``.

    It is NaN where T has a kink, as at a degenerate vertex, and where the minimum is not unique.
    """
    fixed = lax.stop_gradient((x, some))
    rate = _rate(lambda x: gradient(x, fixed[1]), fixed[0])
    down = lambda x, some: jax.tree.map(lambda x, g: x - rate.astype(x.dtype) * g, x, gradient(x, some))
    moved = lambda x, some: nearest(down(x, some), rate, some)
    left = lambda x, some, way: jax.tree.map(jnp.subtract, way, jax.jvp(lambda x: moved(x, some), (x,), (way,))[1])
    right = all_moving(jax.jvp(lambda some: moved(x, some), (some,), (ways,))[1], ways)
    smooth = _is_smooth(lambda x: nearest(x, rate, fixed[1]), down(*fixed))

    def solve(times: Callable, right: PyTree) -> PyTree:
        return _solved(times, right, smooth)

    return lax.custom_linear_solve(lambda way: left(x, some, way), right, solve, transpose_solve=solve)


def all_moving(tree: PyTree, way: PyTree) -> PyTree:
    """Add zero times a way to a tree: `lax.custom_linear_solve` requires each of its leaves to depend on it."""
    moved = sum((jnp.sum(jnp.real(leaf)) for leaf in jax.tree.leaves(way)), jnp.zeros(()))
    return jax.tree.map(lambda leaf: leaf + (0 * moved).astype(leaf.dtype), tree)


def _rate(gradient: Callable, x: PyTree) -> jax.Array:
    """Return about one over the largest curvature, by three products with the Hessian."""

    def product(way: PyTree) -> tuple[PyTree, jax.Array]:
        out = jax.jvp(gradient, (x,), (way,))[1]
        size = _trees.norm(out)
        scale = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
        return jax.tree.map(lambda leaf: leaf / scale.astype(leaf.dtype), out), size

    way, _ = product(jax.tree.map(_chance, x))
    way, _ = product(way)
    _, size = product(way)
    return lax.stop_gradient(jnp.where((size > 0) & jnp.isfinite(size), 1 / size, 1))


def _chance(leaf: jax.Array) -> jax.Array:
    return jnp.sin(1e3 * lax.iota(jnp.float32, leaf.size) + 1).reshape(leaf.shape).astype(leaf.dtype)


def _is_smooth(step: Callable, at: PyTree) -> jax.Array:
    """Tell whether the derivative of T is the same on both sides of a point."""
    way = jax.tree.map(_chance, at)

    def beside(sign: int) -> PyTree:
        def shift(leaf: jax.Array) -> jax.Array:
            share = float(jnp.finfo(leaf.dtype).eps) ** _BESIDE
            size = jnp.max(jnp.abs(leaf), initial=0)
            return leaf + (sign * share * size).astype(leaf.dtype) * jnp.cos(_chance(leaf) * 7)

        return jax.tree.map(shift, at)

    one, other = (jax.jvp(step, (beside(sign),), (way,))[1] for sign in (1, -1))
    return _trees.norm(jax.tree.map(jnp.subtract, one, other)) <= _BENT * _trees.norm(way)


def _solved(times: Callable, right: PyTree, smooth: jax.Array) -> PyTree:
    """Return x with A x = right; NaN if there is none."""
    flat, whole = ravel_pytree(right)
    apply = lambda vector: ravel_pytree(times(whole(vector)))[0]
    size = jnp.max(jnp.abs(flat), initial=0)
    unit = flat / jnp.where(size > 0, size, 1)
    if flat.size <= _DENSE:
        matrix = lax.map(apply, jnp.eye(flat.size, dtype=flat.dtype)).T
        wide = matrix.astype(jnp.promote_types(flat.dtype, jnp.float32))
        inverse: Any = lambda vector: jnp.linalg.solve(wide, vector.astype(wide.dtype)).astype(flat.dtype)
    else:
        inverse = lambda vector: gmres(apply, vector, restart=min(100, flat.size), maxiter=_ROUNDS)[0]
    found = inverse(unit)
    for _ in range(_ROUNDS - 1):
        found = found + inverse(unit - apply(found))
    left = jnp.linalg.norm(unit - apply(found))
    defined = smooth & (left <= _RESIDUAL * jnp.linalg.norm(unit))
    defined = defined | (size == 0)
    return whole(jnp.where(defined, size * found, jnp.nan))
