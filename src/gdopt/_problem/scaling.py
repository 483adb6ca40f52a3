"""A run in scaled variables: each entry of the params is divided by its typical size."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from gdopt import _jax, _trees
from gdopt._compile import program
from gdopt._errors import InputError
from gdopt._problem.objective import Problem, check_start
from gdopt._problem.task import Task
from gdopt._settings import own_promotion, own_work
from gdopt._types import PyTree

_PROBES = 10  # the Hessian products with random signs that estimate the diagonal
_EXACT = 64  # the most entries that have a Hessian product each


def scaled(task: Task, scale: PyTree) -> Task:
    """Return the task in the variables ``params / scale``.

    Sizes are rounded to powers of two, so that dividing and multiplying by them loses no digit.
    """
    if scale is None:
        return task
    problem = task.problem
    with own_work(), own_promotion():
        sizes = _by_curvature(task, scale) if isinstance(scale, str) else _given(problem, scale)
        sizes = jax.tree.map(_power_of_two, sizes, problem.params)
        start = jax.tree.map(jnp.divide, problem.params, sizes)
    check_start(start, "params / scale")
    return task._replace(problem=problem._replace(params=start, sizes=sizes))


def _given(problem: Problem, scale: PyTree) -> PyTree:
    """Return a size, or an array of them, for each leaf that is optimised."""
    try:
        sizes = _trees.spread(scale, problem.whole(problem.params))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"scale={_trees.summary(scale)} does not fit params. Pass a positive number for each leaf or subtree of "
            "params, an array (not a list) of the shape of a leaf, or 'curvature'."
        ) from error
    optimised = [size if kept else None for size, kept in zip(sizes, problem.rest.kept, strict=True)]
    return jax.tree_util.tree_map_with_path(_checked, problem.params, problem.rest.treedef.unflatten(optimised))


def _checked(path: tuple, leaf: jax.Array, size: Any) -> jax.Array:
    """Return the size in the leaf's precision; raise InputError if it is not a size."""
    name = _trees.path_name(path, "scale")
    dtype = jnp.finfo(leaf.dtype).dtype
    if not _trees.is_array(size) or jnp.issubdtype(jnp.result_type(size), jnp.complexfloating):
        raise InputError(f"{name} is {size!r}. Pass a positive number, or an array of them.")
    if jnp.ndim(size) and jnp.shape(size) != leaf.shape:
        raise InputError(
            f"{name} has shape {jnp.shape(size)}, but {_trees.path_name(path)} has {leaf.shape}. Pass one number, or "
            "an array of that shape."
        )
    array = jnp.asarray(size, dtype)
    if not _jax.is_tracer(array) and array.is_fully_addressable:
        bad = ~(np.isfinite(array) & (np.asarray(array) > 0))
        if bad.any():
            raise InputError(f"{name} holds {np.asarray(size)[bad].flat[0]}. Pass finite sizes above 0 in {dtype}.")
    return array


def _power_of_two(size: jax.Array, leaf: jax.Array) -> jax.Array:
    """Return the nearest power of two that the dtype has."""
    limits = jnp.finfo(leaf.dtype)
    wide = size.astype(jnp.promote_types(size.dtype, jnp.float32))
    exponent = jnp.clip(jnp.round(jnp.log2(wide)), limits.minexp, limits.maxexp - 1).astype(int)
    power = lax.stop_gradient(jnp.ldexp(jnp.ones_like(wide), exponent).astype(limits.dtype))
    spread = power.ndim > 0 and not (_jax.is_tracer(power) or _jax.is_tracer(leaf))
    return jax.device_put(power, leaf.sharding) if spread else power


def _by_curvature(task: Task, scale: str) -> PyTree:
    """Return 1 / sqrt(|d|) with the diagonal d of the Hessian at the start, in which all curvatures are 1."""
    if scale != "curvature":
        raise InputError(f"scale={scale!r} is unknown. Pass 'curvature', or a tree of positive sizes.")
    if task.noisy:
        raise InputError(
            "scale='curvature' was given for a noisy loss, whose curvature differs from step to step. Pass a tree of "
            "typical sizes (for example {'w': 1e-3, 'b': 1.0})."
        )
    params, given = task.problem.params, (task.data, task.args, None)
    value = program.trace(task.value, params, *given, rules=True)
    inputs = params, value.constants, *given

    def make() -> program.Shared:
        loss, _ = program.with_gradient(value, task.value, params, *given)
        try:
            return program.share(functools.partial(_sizes, loss), *inputs)
        except InputError:
            raise
        except Exception as error:  # JAX raises various ones.
            raise InputError(
                "scale='curvature' needs second derivatives, but the loss has none. Pass a tree of typical sizes. "
                f"({type(error).__name__}: {error})"
            ) from error

    return program.shared_for(scaled, value, inputs, make).call(*inputs)


def _sizes(loss: program.Traced, params: PyTree, constants: list, *given: PyTree) -> PyTree:
    """Return 1 / sqrt(|d|); d is estimated by products with random signs, or computed if there are few entries.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989; Bekas, Kokiopoulou & Saad,
    "An estimator for the diagonal of a matrix", 2007.
    """
    real, back = _trees.as_real(params)
    leaves, treedef = jax.tree.flatten(real)
    flat, whole = ravel_pytree(real)
    is_exact = flat.size <= _EXACT

    def gradient(real: PyTree) -> PyTree:
        _, grad = loss.replay(loss.constants, back(real), constants, *given)
        return _trees.as_real(grad)[0]

    def signs(number: jax.Array) -> PyTree:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), len(leaves))
        drawn = [jax.random.rademacher(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
        return treedef.unflatten(drawn)

    def unit(number: jax.Array) -> PyTree:
        return whole((lax.iota(jnp.int32, flat.size) == number).astype(flat.dtype))

    def diagonal(number: jax.Array) -> PyTree:
        way = unit(number) if is_exact else signs(number)
        product = jax.jvp(gradient, (real,), (way,))[1]
        return jax.tree.map(jnp.multiply, way, product)

    count, shared = (flat.size, 1) if is_exact else (_PROBES, _PROBES)
    rows = lax.map(diagonal, lax.iota(jnp.int32, count))
    summed = jax.tree.map(lambda rows: jnp.abs(rows.sum(axis=0) / shared), rows)
    curvatures = jax.tree.map(lambda _, parts: sum(parts) / len(parts), params, summed)
    return jax.tree.map(lambda curvature: 1 / jnp.sqrt(curvature), _filled(curvatures))


def _filled(curvatures: PyTree) -> PyTree:
    """Give entries whose curvature is zero or not finite the geometric mean of the others."""
    known = jax.tree.map(lambda c: jnp.isfinite(c) & (c > 0), curvatures)
    logs = jax.tree.map(lambda c, known: jnp.log(jnp.where(known, c, 1)), curvatures, known)
    total = sum(log.astype(jnp.float32).sum() for log in jax.tree.leaves(logs))
    count = sum(flags.sum() for flags in jax.tree.leaves(known))
    mean = jnp.exp(total / jnp.maximum(count, 1))
    return jax.tree.map(lambda c, known: jnp.where(known, c, mean.astype(c.dtype)), curvatures, known)
