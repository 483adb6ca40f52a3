"""A run in scaled variables: each entry of the params is divided by its typical size."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from gdopt import _jax, _trees
from gdopt._checks import fault
from gdopt._compile import program
from gdopt._devices.sharding import on_one_mesh
from gdopt._errors import InputError
from gdopt._problem.objective import Objective, check_start, times
from gdopt._problem.problem import Problem
from gdopt._settings import own_promotion, own_work
from gdopt._types import PyTree

_PROBES = 10  # the Hessian products with random signs that estimate the diagonal
_EXACT = 64  # the most entries that have a Hessian product each


def scaled(problem: Problem, scale: PyTree) -> Problem:
    """Return the problem in the variables ``params / scale``.

    Sizes are rounded to powers of two, so that dividing and multiplying by them loses no digit.
    """
    if scale is None:
        return problem
    given = {"params": problem.objective.params, "data": problem.data, "args": problem.args}
    placed, _ = on_one_mesh(given)
    objective = problem.objective._replace(params=placed["params"])
    problem = problem._replace(objective=objective, data=placed["data"], args=placed["args"])
    with own_work(), own_promotion():
        sizes = _by_curvature(problem, scale) if isinstance(scale, str) else _given(objective, scale)
        sizes = on_one_mesh(placed | {"scale": sizes})[0]["scale"]
        sizes = jax.tree.map(_power_of_two, sizes, objective.params)
        start = jax.tree.map(jnp.divide, objective.params, sizes)
        if isinstance(scale, str):
            sizes = jax.tree.map(_kept_in_range, sizes, objective.params, start)
            start = jax.tree.map(jnp.divide, objective.params, sizes)
    _check_scaled(objective.params, sizes, start)
    if problem.constraint is not None:
        with own_work(), own_promotion():
            problem = problem._replace(constraint=problem.constraint.scaled(sizes))
    return problem._replace(objective=objective._replace(params=start, sizes=sizes))


def divided(params: PyTree, sizes: PyTree) -> PyTree:
    """Return params divided by the sizes of an earlier problem; raise InputError if they lose digits."""
    with own_work(), own_promotion():
        start = jax.tree.map(jnp.divide, params, sizes)
    _check_scaled(params, sizes, start)
    return start


def _check_scaled(params: PyTree, sizes: PyTree, start: PyTree) -> None:
    check_start(start, "params / scale")
    jax.tree_util.tree_map_with_path(_check_digits, params, sizes, start)


def _given(objective: Objective, scale: PyTree) -> PyTree:
    """Return a size, or an array of them, for each leaf that is optimised."""
    try:
        sizes = _trees.spread(scale, objective.whole(objective.params))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"scale={_trees.summary(scale)} does not fit params. Pass a positive number for each leaf or subtree of "
            f"params, an array (not a list) of the shape of a leaf, or 'curvature'. ({error})"
        ) from error
    return jax.tree_util.tree_map_with_path(_checked, objective.params, objective.rest.only(sizes))


def _checked(path: tuple, leaf: jax.Array, size: Any) -> jax.Array:
    """Return the size in the leaf's precision; raise InputError if it is not a size."""
    name = _trees.path_name(path, "scale")
    dtype = jnp.finfo(leaf.dtype).dtype
    least, most = float(jnp.finfo(dtype).tiny), float(jnp.finfo(dtype).max)
    if isinstance(size, int) and not isinstance(size, bool):
        size = float(size) if abs(size) <= most else math.inf
    if why := fault(size, carried=True):
        raise InputError(f"{name} {why}.")
    if not _trees.is_array(size) or _trees.is_key(size) or jnp.result_type(size).kind in "bc":
        raise InputError(f"{name} is {size!r}. Pass a positive number, or an array of them.")
    if jnp.ndim(size) and jnp.shape(size) != leaf.shape:
        raise InputError(
            f"{name} has shape {jnp.shape(size)}, but {_trees.path_name(path)} has {leaf.shape}. Pass one number, or "
            "an array of that shape."
        )
    if isinstance(size, jax.Array):
        array = size.astype(dtype)
    else:  # On the host, a conversion compiles nothing before it is checked.
        with np.errstate(over="ignore"):
            array = _trees.on_device(np.asarray(size).astype(dtype))
    if _trees.have_values(array):
        bad = ~(np.isfinite(array) & (np.asarray(array) >= least))
        if bad.any():
            raise InputError(
                f"{name} holds {np.asarray(size)[bad].flat[0]:g}. Pass sizes from {least:.2g} to {most:.2g}, the "
                f"range of {dtype}."
            )
    return array


def _power_of_two(size: jax.Array, leaf: jax.Array) -> jax.Array:
    """Return the nearest power of two that the dtype has; NaN for a traced size that is none."""
    limits = jnp.finfo(leaf.dtype)
    wide = size.astype(jnp.promote_types(size.dtype, jnp.float32))
    exponent = jnp.clip(jnp.round(jnp.log2(wide)), limits.minexp, limits.maxexp - 1).astype(int)
    power = jnp.where(wide > 0, jnp.ldexp(jnp.ones_like(wide), exponent), jnp.nan)
    return _anywhere(lax.stop_gradient(power.astype(limits.dtype)))


def _anywhere(sizes: jax.Array) -> Any:
    """Return sizes that go to the devices of whatever they multiply: the loop may place the params elsewhere."""
    if _jax.is_tracer(sizes) or not (sizes.ndim and sizes.is_fully_addressable):
        return sizes
    return np.asarray(sizes)


def _kept_in_range(size: Any, leaf: jax.Array, start: jax.Array) -> Any:
    """Return the size, or 1 for entries whose start it would take out of the dtype's normal numbers."""
    entry = jnp.abs(start)
    limits = jnp.finfo(leaf.dtype)
    fits = (leaf == 0) | ((entry >= float(limits.tiny)) & (entry <= float(limits.max)))
    if jnp.ndim(size) == 0:
        fits = fits.all()
    return _anywhere(jnp.where(fits, size, jnp.ones_like(size)))


def _check_digits(path: tuple, leaf: jax.Array, size: Any, start: jax.Array) -> None:
    """Raise InputError for a start that loses digits by the division: it would begin elsewhere."""
    if not _trees.have_values(leaf, size, start):
        return
    lost = np.flatnonzero(np.asarray(times(start, size)) != np.asarray(leaf))
    if lost.size:
        entry, by = np.asarray(leaf).flat[lost[0]], np.broadcast_to(np.asarray(size), leaf.shape).flat[lost[0]]
        raise InputError(
            f"{_trees.path_name(path, 'scale')} holds {by}, and {_trees.path_name(path)} starts with {entry}, which "
            f"divided by it is too small for {leaf.dtype}. Pass a smaller size, or params of a wider dtype."
        )


def _by_curvature(problem: Problem, scale: str) -> PyTree:
    """Return 1 / sqrt(|d|) with the diagonal d of the Hessian at the start, in which all curvatures are 1."""
    if scale != "curvature":
        raise InputError(f"scale={scale!r} is unknown. Pass 'curvature', or a tree of positive sizes.")
    if problem.noisy:
        raise InputError(
            "scale='curvature' was given for a noisy loss, whose curvature differs from step to step. Pass a tree of "
            "typical sizes (for example {'w': 1e-3, 'b': 1.0})."
        )
    trees, _ = on_one_mesh({"params": problem.objective.params, "data": problem.data, "args": problem.args})
    params, given = trees["params"], (trees["data"], trees["args"], None)
    value = program.trace(problem.value, params, *given, rules=True)
    inputs = params, value.constants, *given

    def make() -> program.Shared:
        loss, _ = program.with_gradient(value, problem.value, params, *given)
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
    summed = jax.tree.map(lambda rows: jnp.abs((rows / shared).sum(axis=0)), rows)
    curvatures = jax.tree.map(lambda _, parts: sum(parts) / len(parts), params, summed)
    # Entries whose curvature is zero or not finite get the geometric mean of the others, through logarithms: the mean
    # of the curvatures themselves may be beyond the dtype's range.
    known = jax.tree.map(lambda c: jnp.isfinite(c) & (c > 0), curvatures)
    logs = jax.tree.map(lambda c, known: jnp.log(jnp.where(known, c, 1)), curvatures, known)
    total = sum(log.astype(jnp.promote_types(log.dtype, jnp.float32)).sum() for log in jax.tree.leaves(logs))
    mean = total / jnp.maximum(sum(flags.sum() for flags in jax.tree.leaves(known)), 1)

    def size(curvature: jax.Array, known: jax.Array) -> jax.Array:
        return jnp.where(known, 1 / jnp.sqrt(curvature), jnp.exp(-mean / 2).astype(curvature.dtype))

    return jax.tree.map(size, curvatures, known)
