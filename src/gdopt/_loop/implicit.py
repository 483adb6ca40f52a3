"""Derivatives of a minimum with respect to what the loss depends on, by the implicit function theorem.

At a minimum x*(θ) the gradient g(x, θ) is zero for every θ, so H dx* = -(dg/dθ) dθ with the Hessian H of the loss
(Krantz & Parks, "The Implicit Function Theorem", section 1.3). The steps that led there do not matter, so neither do
the start, the rate and the number of steps. No step is kept in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg

from gdopt import _jax, _trees
from gdopt._compile import replays
from gdopt._compile.self_check import is_reliable
from gdopt._errors import InputError
from gdopt._loop import fixed_point
from gdopt._loop.fixed_point import all_moving
from gdopt._settings import own_promotion, own_work
from gdopt._types import PyTree

_ROUNDS = 5  # the most rounds of conjugate gradients
_DENSE = 256  # the most params whose Hessian may be singular
_RANK = 2  # the least curvature, in eps times the largest one and the root of the number of params
_RESIDUAL = 1e-3  # the residual over the right side above which there is no derivative


def differentiable(
    solve: Callable[..., Any],
    value: Callable[..., tuple],
    known: Callable[..., tuple],
    *,
    defined: bool,
    confined: Confined | None = None,
) -> Callable[..., Any]:
    """Return ``solve`` with its derivatives, of any order, forward and reverse.

    ``solve(*inputs)`` returns an `Outcome`, whose ``params``, ``loss`` and ``aux`` belong to
    ``value(params, *known(*inputs)) -> (loss, aux)``. Derivatives are NaN if it is no smooth minimum, or if H dx = r
    has no solution. Those of the numbers that a minimum does not decide, such as the gradient norm, are always NaN. If
    they are not ``defined``, asking for them raises InputError. ``confined`` has what a constraint changes.
    """

    @jax.custom_jvp
    def solution(*inputs: Any) -> Any:
        return solve(*inputs)

    def derivative(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        if not defined:
            raise InputError(
                "minimize was differentiated through a run of mini-batches, random keys or a state. Its end depends "
                "on each of its steps, so the derivative of a minimum is not defined. Differentiate a full-batch run, "
                "or put jax.lax.stop_gradient around the result."
            )
        out = solution(*primals)
        given, treedef = jax.tree.flatten(known(*primals))
        ways = jax.tree.leaves(known(*tangents))
        moving = [number for number, way in enumerate(ways) if not _is_zero(way)]

        def filled(some: list) -> tuple:
            """Return what the loss depends on, with other values for the leaves that move."""
            leaves = list(given)
            for number, leaf in zip(moving, some, strict=True):
                leaves[number] = leaf
            return treedef.unflatten(leaves)

        # With jit, no operation is compiled by itself outside another jit.
        moved = jax.jit(functools.partial(_moves, value, filled, confined or Confined()))
        with own_promotion():
            params_dot, loss_dot, aux_dot = moved(
                out.params,
                (out.is_smooth_minimum, out.free),
                [given[number] for number in moving],
                [ways[number] for number in moving],
            )
        still = jax.tree.map(_zero_tangent, out)
        aux_dot = jax.tree.map(lambda zero, moved: zero if moved is None else moved, still.aux, aux_dot)
        all_ways = [way for way in jax.tree.leaves(tangents) if not _is_zero(way)]
        if all_ways:
            with own_work(), own_promotion():
                norm_dot, left_dot = _unknown((out.grad_norm, out.ending.left), all_ways)
            still = still._replace(grad_norm=norm_dot, ending=still.ending._replace(left=left_dot))
        return out, still._replace(params=params_dot, loss=loss_dot.astype(out.loss.dtype), aux=aux_dot)

    # Constants of the loss do not move, so a function of custom_vjp may close over them.
    solution.defjvp(derivative, symbolic_zeros=True)
    return solution


class Confined(NamedTuple):
    """The functions of a constraint that its derivatives need; the last argument is what the loss depends on."""

    pinned: Callable[..., PyTree] | None = None  # (params, known) -> the bounds of the entries that are held
    step: Callable[..., PyTree] | None = None  # (params, rate, known) -> the projection or the proximal point
    total: Callable[..., jax.Array] | None = None  # (params, loss, known) -> the loss with the penalty


def _moves(
    value: Callable[..., tuple],
    filled: Callable[[list], tuple],
    confined: Confined,
    params: PyTree,
    minimum: tuple[jax.Array, PyTree],
    some: list,
    ways: list,
) -> tuple[PyTree, PyTree, PyTree]:
    """Return the tangents of params, loss and aux if ``some`` of what the loss depends on moves along ``ways``.

    ``minimum`` tells whether the params are a smooth minimum, and which entries are free to move; None if all are.
    """
    is_minimum, free = minimum
    real, back = _trees.as_real(params)

    def gradient(real: PyTree, some: list) -> PyTree:
        given = filled(some)
        return jax.grad(lambda real: value(back(real), *given)[0])(real)

    if confined.step is not None:
        step = confined.step
        nearest = lambda real, rate, some: _trees.as_real(step(back(real), rate, filled(some)))[0]
        way = fixed_point.moves(gradient, nearest, real, some, ways)
    else:
        pins = None
        if confined.pinned is not None:
            pinned = confined.pinned
            bound = lambda some: _trees.as_real(pinned(params, filled(some)))[0]
            pins = jax.tree.map(lambda free, way: jnp.where(free == 0, way, 0), free, _tangents(bound, some, ways))
        way = _by_hessian(gradient, real, some, ways, free, pins)
    way = _nan_unless(is_minimum, way)
    params_dot = jax.jvp(back, (real,), (way,))[1]

    def values(at: tuple) -> tuple:
        given = filled(at[1])
        loss, aux = value(at[0], *given)
        return (loss if confined.total is None else confined.total(at[0], loss, given)), aux

    loss_dot, aux_dot = _tangents(values, (params, some), (params_dot, ways))
    aux_dot = jax.tree.map(lambda leaf: None if _is_zero(leaf) else leaf, aux_dot)
    loss_dot, aux_dot = _nan_unless(is_minimum, all_moving((loss_dot, aux_dot), ways))
    return params_dot, loss_dot, aux_dot


def _by_hessian(gradient: Callable, real: PyTree, some: list, ways: list, free: PyTree, pins: PyTree) -> PyTree:
    """Return the way of the real params, of which those that are not ``free`` stay, or move as ``pins`` do."""
    freed = lambda way: way if free is None else jax.tree.map(jnp.multiply, free, way)
    right = freed(all_moving(_tangents(lambda some: gradient(real, some), some, ways), ways))
    times = lambda real, some, x: freed(_hessian_times(lambda real: gradient(real, some), real, freed(x)))
    if pins is not None:
        right = jax.tree.map(jnp.add, right, freed(_hessian_times(lambda real: gradient(real, some), real, pins)))
    known = lax.stop_gradient((real, some))
    across = lambda way: jax.vjp(lambda some: gradient(known[0], some), known[1])[1](freed(way))[0]
    singular = _of_least_norm(functools.partial(times, *known), across, known[0])
    way = freed(_solved(functools.partial(times, real, some), right, singular))
    way = jax.tree.map(jnp.negative, way)
    return way if pins is None else jax.tree.map(jnp.add, way, pins)


def _nan_unless(defined: Any, way: PyTree) -> PyTree:
    """Return a tangent if it is defined, NaN if not.

    In reverse mode a cotangent of zero stays zero. With NaN as a factor, results that nobody differentiates would make
    all derivatives NaN.
    """

    def forward(_: Callable, way: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.where(defined, leaf, jnp.full_like(leaf, jnp.nan)), way)

    def backward(_: Callable, way: PyTree) -> PyTree:
        used = functools.reduce(jnp.logical_or, [(leaf != 0).any() for leaf in jax.tree.leaves(way)])
        return jax.tree.map(lambda leaf: jnp.where(defined | ~used, leaf, jnp.full_like(leaf, jnp.nan)), way)

    return lax.custom_linear_solve(lambda way: way, way, forward, transpose_solve=backward)


@jax.jit
def _unknown(numbers: PyTree, ways: list) -> PyTree:
    """Return the tangents of numbers that depend on each step of a run if the inputs of the run move: NaN."""
    return _nan_unless(False, all_moving(jax.tree.map(jnp.zeros_like, numbers), ways))


def _tangents(function: Callable[[PyTree], PyTree], x: PyTree, way: PyTree) -> PyTree:
    """Return the tangents of a function's outputs if its argument moves along a way.

    A function of `jax.custom_vjp` inside has no rule for forward mode. Then reverse mode gives the tangents, one entry
    of the output after the other. Their derivatives in reverse mode take a single pass.
    """
    closed, out = replays.trace(function, x)
    if not _has_rules_for_reverse_alone(closed):
        return jax.jvp(function, (x,), (way,))[1]
    shapes, treedef = jax.tree.flatten(out)
    inexact = [number for number, leaf in enumerate(shapes) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    outputs = lambda x: [leaf for number, leaf in enumerate(jax.tree.leaves(function(x))) if number in inexact]
    tangents: list[Any] = [np.zeros(leaf.shape, jax.dtypes.float0) for leaf in shapes]
    for number, tangent in zip(inexact, _tangents_by_reverse(outputs, x, way), strict=True):
        tangents[number] = tangent
    return treedef.unflatten(tangents)


def _tangents_by_reverse(outputs: Callable[[PyTree], list], x: PyTree, way: PyTree) -> list:
    """Return J way with the Jacobian J of the outputs, which JAX can only multiply from the left.

    `lax.custom_linear_solve` takes both products, and batches them, for (way, outputs) -> (0, J way).
    """
    out, backward = jax.vjp(outputs, x)
    nothing, still = jax.tree.map(jnp.zeros_like, (out, way))

    def entry(number: int, way: PyTree, at: jax.Array) -> jax.Array:
        one = nothing[number].reshape(-1).at[at].set(1).reshape(nothing[number].shape)
        (row,) = backward([*nothing[:number], one, *nothing[number + 1 :]])
        products = jax.tree.map(lambda a, b: jnp.sum(a * b), row, way)
        total = sum(jax.tree.leaves(products), jnp.zeros((), one.dtype))
        return (total if jnp.iscomplexobj(one) else jnp.real(total)).astype(one.dtype)

    def forward(_: Callable, at: tuple) -> tuple:
        rows = [functools.partial(entry, number, at[0]) for number in range(len(out))]
        pairs = zip(rows, out, strict=True)
        return still, [lax.map(row, jnp.arange(leaf.size)).reshape(leaf.shape) for row, leaf in pairs]

    return lax.custom_linear_solve(
        lambda at: at,
        (way, all_moving(nothing, way)),
        forward,
        transpose_solve=lambda _, at: (backward(at[1])[0], nothing),
    )[1]


def _hessian_times(gradient: Callable[[PyTree], PyTree], x: PyTree, way: PyTree) -> PyTree:
    """Return the derivative of a gradient along a way."""
    if _has_rules_for_reverse_alone(replays.trace(gradient, x)[0]):
        return jax.vjp(gradient, x)[1](way)[0]  # The Hessian is symmetric.
    return jax.jvp(gradient, (x,), (way,))[1]


def _has_rules_for_reverse_alone(closed: Any) -> bool:
    """Tell whether forward mode would fail in a trace, which JAX reports only when it compiles."""
    return is_reliable() and any(True for _ in _jax.calls(closed, "custom_vjp_call"))


def _of_least_norm(
    times: Callable[[PyTree], PyTree], across: Callable[[PyTree], PyTree], x: PyTree
) -> tuple[jax.Array, Callable[[PyTree], PyTree], jax.Array] | None:
    """Tell whether the Hessian of few params is singular at x, as with more params than rows, and solve with it.

    Return the solution of least norm and least squares, too, and whether the gradient does not move along what the
    Hessian maps to zero; ``across`` is how a gradient's direction depends on what moves.
    """
    flat, whole = ravel_pytree(x)
    if flat.size > _DENSE or not flat.size:
        return None
    rows = lax.map(lambda way: ravel_pytree(times(whole(way)))[0], jnp.eye(flat.size, dtype=flat.dtype))
    rows = rows.astype(_trees.norm_dtype(x))  # There are no eigenvalues in half precision.
    matrix = jnp.where(jnp.isfinite(rows).all(), rows + rows.T, 0) / 2
    values, vectors = jnp.linalg.eigh(matrix)
    least = _RANK * flat.size**0.5 * float(jnp.finfo(flat.dtype).eps) * jnp.max(jnp.abs(values))
    regular = jnp.abs(values) > least
    inverse = jnp.where(regular, 1 / jnp.where(regular, values, 1), 0)
    chance = jnp.sin(1e3 * lax.iota(rows.dtype, flat.size) + 1)  # Any direction will do that is not special.
    lost = vectors @ jnp.where(regular, 0, vectors.T @ chance)
    moved, all_moved = (_trees.norm(across(whole(way.astype(flat.dtype)))) for way in (lost, chance))

    def solution(right: PyTree) -> PyTree:
        projected = vectors.T @ ravel_pytree(right)[0].astype(rows.dtype)
        return whole((vectors @ (inverse * projected)).astype(flat.dtype))

    # A Hessian of zeros is that of no smooth minimum: JAX takes the second derivative of |z| at 0 as 0, for example.
    return ~regular.all(), solution, (moved <= _RESIDUAL * all_moved) & (values != 0).any()


def _solved(times_hessian: Callable[[PyTree], PyTree], right: PyTree, singular: tuple | None) -> PyTree:
    """Return x with H x = right, by conjugate gradients; NaN if they found none.

    If H is ill-conditioned, the residual of the iteration soon differs from the true one. So the true residual is
    measured at the end, and the iteration begins anew with it, as long as that helps. If H is singular, x is the
    solution of least norm, if there is one.
    """

    def solve(times: Callable[[PyTree], PyTree], right: PyTree, *, backward: bool = False) -> PyTree:
        eps = float(jnp.finfo(_trees.norm_dtype(right)).eps)
        most: Any = 10 * sum(leaf.size for leaf in jax.tree.leaves(right)) + 100
        scale = _trees.norm(right)
        scale = jnp.where(scale > 0, scale, 1)  # The scaled right side has a square that does not vanish.
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

        unit_size = size = _trees.norm(unit)
        start = jax.tree.map(jnp.zeros_like, unit), unit, size, jnp.full_like(size, jnp.inf), 0
        found, _, size, _, _ = lax.while_loop(goes_on, improve, start)
        solved = size <= _RESIDUAL
        if singular is not None:
            is_singular, of_least_norm, defined = singular
            least = jax.tree.map(lambda new, old: new.astype(old.dtype), of_least_norm(unit), found)
            solved &= ~is_singular  # Rounding may have made it regular.
            found, at_all = _trees.select(solved, found, least), is_singular & defined
            if not backward:  # A cotangent may have a part that the Hessian maps to zero.
                left = _trees.norm(jax.tree.map(jnp.subtract, unit, times(least)))
                at_all &= left <= _RESIDUAL
            solved = solved | at_all
        if backward:  # Nobody asks for these derivatives.
            solved = solved | (unit_size == 0)
        factor = jnp.where(solved, scale, jnp.nan)
        return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), found)

    behind = functools.partial(solve, backward=True)
    return lax.custom_linear_solve(times_hessian, right, solve, transpose_solve=behind, symmetric=True)


def _is_zero(tangent: Any) -> bool:
    """Tell whether a tangent is zero for certain: that of an integer, or of an input that is not differentiated."""
    is_symbolic = isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    return is_symbolic or getattr(tangent, "dtype", None) == jax.dtypes.float0


def _zero_tangent(leaf: Any) -> Any:
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return jnp.zeros_like(leaf) if inexact else np.zeros(leaf.shape, jax.dtypes.float0)
