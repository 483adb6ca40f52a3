"""Derivatives of a minimum with respect to what the loss depends on, by the implicit function theorem.

At a minimum x*(θ) the gradient g(x, θ) is zero whatever θ is, so H dx* = -(dg/dθ) dθ with the Hessian H of the loss
(Krantz & Parks, "The Implicit Function Theorem", section 1.3). The steps that led there do not matter, so neither do
the start, the rate and the number of steps, and nothing of the way is kept in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.sparse.linalg import cg

from gdopt import _trees
from gdopt._types import PyTree
from gdopt.errors import InputError

_ROUNDS = 5
_RESIDUAL = 1e-3  # of the right side: above it, there is no derivative to speak of


def differentiable(
    solve: Callable[..., Any], value: Callable[..., tuple], known: Callable[..., tuple], *, defined: bool
) -> Callable[..., Any]:
    """``solve`` with its derivatives, of any order, forward and reverse.

    ``solve(*inputs)`` returns a tuple with ``params``, ``loss``, ``aux`` and ``success``, which belong to
    ``value(params, *known(*inputs)) -> (loss, aux)``. Derivatives are NaN where it had no success, or where H dx = r
    has no solution. Where they are not ``defined``, asking for them raises InputError.
    """

    @jax.custom_jvp
    def solution(*inputs: Any) -> Any:
        return solve(*inputs)

    @solution.defjvp
    def derivative(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        if not defined:
            raise InputError(
                "minimize was differentiated through a run of mini-batches or random keys: where that ends depends on "
                "each of its batches, so the derivative of a minimum is not defined for it. Differentiate a full-batch "
                "run, or put jax.lax.stop_gradient around what comes back."
            )
        out = solution(*primals)
        params_dot, loss_dot, aux_dot = _compiled(moves)(out.params, out.success, known(*primals), known(*tangents))
        still = jax.tree.map(_zero_tangent, out)
        aux_dot = jax.tree.map(lambda zero, moved: zero if moved is None else moved, still.aux, aux_dot)
        return out, still._replace(params=params_dot, loss=loss_dot.astype(out.loss.dtype), aux=aux_dot)

    def moves(params: PyTree, success: jax.Array, given: tuple, moved: tuple) -> tuple[PyTree, PyTree, PyTree]:
        """The tangents of params, loss and aux where what the loss depends on is ``given`` and ``moved``."""
        real, back = _as_real(params)

        def gradient(real: PyTree, *given: Any) -> PyTree:
            return jax.grad(lambda real: value(back(real), *given)[0])(real)

        _, right = jax.jvp(lambda *given: gradient(real, *given), given, moved)
        way = _solved(lambda x: jax.jvp(lambda real: gradient(real, *given), (real,), (x,))[1], right)
        sign = jnp.where(success, -1.0, jnp.nan)  # a factor, as it is to be seen from behind, too
        way = jax.tree.map(lambda leaf: (sign * leaf).astype(leaf.dtype), way)
        params_dot = jax.jvp(back, (real,), (way,))[1]
        _, (loss_dot, aux_dot) = jax.jvp(value, (params, *given), (params_dot, *moved))
        return params_dot, loss_dot, jax.tree.map(lambda leaf: None if _is_float0(leaf) else leaf, aux_dot)

    return solution


def _compiled(function: Callable) -> Callable:
    """``jit``, which outside of another one saves compiling each operation; tangents of integers cannot be passed."""

    def call(*args: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(args)
        given = [None if _is_float0(leaf) else leaf for leaf in leaves]

        @jax.jit
        def compiled(given: list) -> PyTree:
            filled = [old if new is None else new for old, new in zip(leaves, given, strict=True)]
            return function(*treedef.unflatten(filled))

        return compiled(given)

    return call


def _solved(times_hessian: Callable[[PyTree], PyTree], right: PyTree) -> PyTree:
    """x with H x = right, by conjugate gradients; NaN where they found none.

    Where H is ill-conditioned, what the iteration takes for its residual is soon no longer the true one. So this is
    measured at its end, and the iteration begun anew on what is left, as long as that helps.
    """

    def solve(times: Callable[[PyTree], PyTree], right: PyTree) -> PyTree:
        eps = float(jnp.finfo(_trees.norm_dtype(right)).eps)
        most: Any = 10 * sum(leaf.size for leaf in jax.tree.leaves(right)) + 100
        scale = _trees.norm(right)
        scale = jnp.where(scale > 0, scale, 1)  # of which the square must not vanish
        unit = jax.tree.map(lambda leaf: (leaf / scale).astype(leaf.dtype), right)

        def goes_on(search: tuple) -> jax.Array:
            _, _, size, before, rounds = search
            return (size > eps) & (size < 0.5 * before) & (rounds < _ROUNDS)

        def improve(search: tuple) -> tuple:
            found, left, size, _, rounds = search
            more, _ = cg(times, left, tol=eps, maxiter=most)
            found = jax.tree.map(jnp.add, found, more)
            left = jax.tree.map(jnp.subtract, unit, times(found))
            return found, left, _trees.norm(left), size, rounds + 1

        size = _trees.norm(unit)
        start = jax.tree.map(jnp.zeros_like, unit), unit, size, jnp.full_like(size, jnp.inf), 0
        found, _, size, _, _ = lax.while_loop(goes_on, improve, start)
        factor = jnp.where(size <= _RESIDUAL, scale, jnp.nan)
        return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), found)

    return lax.custom_linear_solve(times_hessian, right, solve, symmetric=True)


def _as_real(params: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """The params with (real, imaginary) in place of complex leaves, of which a real loss is no complex-linear function,
    and the way back."""
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, params)
    split = lambda leaf: (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)
    join = lambda dtype, parts: (lax.complex(*parts) if len(parts) == 2 else parts[0]).astype(dtype)
    return jax.tree.map(split, params), lambda real: jax.tree.map(join, dtypes, real)


def _is_float0(leaf: Any) -> bool:
    return getattr(leaf, "dtype", None) == jax.dtypes.float0


def _zero_tangent(leaf: Any) -> Any:
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return jnp.zeros_like(leaf) if inexact else np.zeros(leaf.shape, jax.dtypes.float0)
