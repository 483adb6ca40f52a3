"""The step of `quasi_newton` within bounds: about the minimum of its quadratic model over the box."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdopt import _trees
from gdopt._trees import Packed
from gdopt._types import PyTree

_LARGEST = 1e18  # the largest multiplier over the largest gradient; its square is in the range of float32
_ROUNDS = 12  # the most sets of active bounds that are tried for one step


class Box(NamedTuple):
    """The bounds of the params, packed like them."""

    lower: Packed
    upper: Packed


class Model(NamedTuple):
    """A Hessian over its largest curvature in compact form, D - U M^-1 U'.

    Source: Byrd, Nocedal & Schnabel, "Representations of quasi-Newton matrices and their use in limited memory
    methods", 1994, eq. 3.5.
    """

    diagonal: PyTree  # D
    rows: PyTree  # U', with a leading axis
    middle: jax.Array | None  # M; None without pairs


def clipped(tree: PyTree, box: Box) -> PyTree:
    """Return the nearest point within the bounds."""
    return jax.tree.map(jnp.clip, tree, box.lower, box.upper)


def leads_out(x: jax.Array, g: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Tell which entries are at a bound that descent would cross."""
    return ((x <= low) & (g > 0)) | ((x >= high) & (g < 0))


def reduced(grad: PyTree, x: PyTree, box: Box) -> PyTree:
    """Return the gradient without the entries that lead out of the bounds: they stay where they are."""

    def leaf(g: jax.Array, x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        return jnp.where(leads_out(x, g, low, high), 0, g)

    return jax.tree.map(leaf, grad, x, box.lower, box.upper)


def unit(grad: PyTree, x: PyTree, box: Box) -> tuple[PyTree, jax.Array]:
    """Divide a gradient by the size of its largest entry that may move, and return that size.

    Entries that are held may be far larger. They keep their signs and are cut off.
    """
    _, size = _trees.unit(reduced(grad, x, box))
    cut = lambda g: jnp.clip(g / size.astype(g.dtype), -_LARGEST, _LARGEST)
    return jax.tree.map(cut, grad), size


def limits(grad: PyTree, size: jax.Array, x: PyTree, box: Box) -> tuple[PyTree, PyTree]:
    """Return the least and the largest way w for which ``x - size * w`` is within the bounds."""

    def span(g: jax.Array, x: jax.Array, end: jax.Array) -> jax.Array:
        return (x.astype(g.dtype) - end.astype(g.dtype)) / size.astype(g.dtype)

    return jax.tree.map(span, grad, x, box.upper), jax.tree.map(span, grad, x, box.lower)


def direction(model: Model, grad: PyTree, least: PyTree, most: PyTree) -> PyTree:
    """Return about the minimum of the model -g'w + w'Bw / 2 within these limits of w.

    It is found by the primal-dual active set method (Hintermüller, Ito & Kunisch, "The primal-dual active set strategy
    as a semismooth Newton method", 2003). That may go round in circles, so the best of its points, each moved into the
    limits, is taken.
    """

    def first(g: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        return jnp.where((g > 0) & (high <= 0), 1, jnp.where((g < 0) & (low >= 0), -1, 0))

    def moved(at: jax.Array, w: jax.Array, push: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        outside = jnp.where(w > high, 1, jnp.where(w < low, -1, 0))
        return jnp.where(at == 0, outside, jnp.where(at * push >= 0, at, 0))

    def attempt(search: tuple) -> tuple:
        number, at, best, lowest, _ = search
        way = _on_face(model, grad, at, least, most)
        push = jax.tree.map(jnp.subtract, grad, _times(model, way))  # the multipliers
        new = jax.tree.map(moved, at, way, push, least, most)
        same = jnp.stack([jnp.all(a == b) for a, b in zip(*map(jax.tree.leaves, (new, at)), strict=True)]).all()
        way = jax.tree.map(jnp.clip, way, least, most)
        value = _trees.vdot(way, _times(model, way)) / 2 - _trees.vdot(grad, way)
        better = value < lowest  # NaN is not.
        return number + 1, new, _trees.select(better, way, best), jnp.where(better, value, lowest), same

    at = jax.tree.map(first, grad, least, most)
    zero = jnp.zeros((), _trees.norm_dtype(grad))
    begin = jnp.int32(0), at, jax.tree.map(jnp.zeros_like, grad), zero, jnp.asarray(False)
    return lax.while_loop(lambda search: (search[0] < _ROUNDS) & ~search[-1], attempt, begin)[2]


def model_of(diagonal: PyTree, largest: jax.Array, pairs: Any, learned: jax.Array) -> Model:
    """Return the Hessian of `quasi_newton` from its diagonal and its last pairs, each step scaled to s'Ds = 1."""
    if pairs is None:
        return Model(diagonal, None, None)
    memory = pairs.ratios.shape[0]
    oldest = (learned + jnp.arange(memory)) % memory  # first
    known = jnp.arange(memory) >= memory - learned
    dtype = pairs.products.dtype

    def rows(rows: jax.Array, d: jax.Array, weights: jax.Array) -> jax.Array:
        wide = rows[oldest].astype(jnp.promote_types(rows.dtype, d.dtype))
        return jnp.where(_down(known, wide), wide * _down(weights, wide).astype(wide.dtype), 0)

    plain = jax.tree.map(lambda r, d: rows(r, d, jnp.ones(memory, dtype)), pairs.steps, diagonal)
    size = jnp.sqrt(jnp.diagonal(_among(jax.tree.map(jnp.multiply, plain, _lifted(diagonal)), plain)))
    one = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
    steps = jax.tree.map(lambda leaf: leaf * _down(one, leaf).astype(leaf.dtype), plain)
    unit = jnp.where(known, one * (pairs.ratios[oldest] / largest).astype(dtype), 0)
    changes = jax.tree.map(lambda r, d: rows(r, d, unit), pairs.changes, diagonal)
    bent = jax.tree.map(jnp.multiply, steps, _lifted(diagonal))
    products = _among(steps, changes)
    later = jnp.tril(products, -1)
    missing = jnp.where(known, 0, 1).astype(dtype)
    corner = jnp.diag(jnp.diagonal(products) + missing)
    middle = jnp.block([[_among(bent, steps) + jnp.diag(missing), later], [later.T, -corner]])
    return Model(diagonal, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), bent, changes), middle)


def _down(column: jax.Array, rows: jax.Array) -> jax.Array:
    return column.reshape(-1, *[1] * (rows.ndim - 1))


def _lifted(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _on_face(model: Model, grad: PyTree, at: PyTree, least: PyTree, most: PyTree) -> PyTree:
    """Minimise the model over the entries that are at no limit, with the others at theirs."""

    def put(at: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        return jnp.where(at > 0, high, jnp.where(at < 0, low, 0))

    held = jax.tree.map(put, at, least, most)
    free = lambda at, leaf: jnp.where(at == 0, leaf, 0)
    right = jax.tree.map(free, at, jax.tree.map(jnp.subtract, grad, _times(model, held)))
    way = jax.tree.map(jnp.divide, right, model.diagonal)
    if model.middle is not None:
        rows = jax.tree.map(free, _lifted(at), model.rows)
        over = jax.tree.map(jnp.divide, rows, _lifted(model.diagonal))
        weights = jnp.linalg.solve(model.middle - _among(over, rows), _with(over, right))
        way = jax.tree.map(jnp.add, way, _summed(weights, over, way))
    return jax.tree.map(jnp.add, way, held)


def _times(model: Model, way: PyTree) -> PyTree:
    straight = jax.tree.map(jnp.multiply, model.diagonal, way)
    if model.middle is None:
        return straight
    weights = jnp.linalg.solve(model.middle, _with(model.rows, way))
    return jax.tree.map(jnp.subtract, straight, _summed(weights, model.rows, way))


def _among(a: PyTree, b: PyTree) -> jax.Array:
    """Return the inner products of rows with rows."""
    dtype = _trees.norm_dtype(a)

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        axes = tuple(range(1, a.ndim))
        return jnp.tensordot(a.astype(dtype), b.astype(dtype), (axes, axes), precision="highest")

    first, *others = jax.tree.leaves(jax.tree.map(leaf, a, b))
    return functools.reduce(jnp.add, others, first)


def _with(rows: PyTree, tree: PyTree) -> jax.Array:
    """Return the inner products of rows with a tree."""
    return _among(rows, _lifted(tree))[:, 0]


def _summed(weights: jax.Array, rows: PyTree, like: PyTree) -> PyTree:
    """Return the sum of the rows, each times its weight."""

    def leaf(rows: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.tensordot(weights.astype(like.dtype), rows.astype(like.dtype), 1, precision="highest")

    return jax.tree.map(leaf, rows, like)
