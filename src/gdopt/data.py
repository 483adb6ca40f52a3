"""Batches of data that lives on the device: shuffled anew in every epoch, each row at most once per epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdopt import _trees
from gdopt._checks import whole_number
from gdopt._types import PyTree
from gdopt.errors import InputError


class Batches(NamedTuple):
    """How ``rows`` rows are cut into batches; the rows that fill no batch sit an epoch out, other ones each time."""

    rows: int
    batch_size: int

    @property
    def per_epoch(self) -> int:
        return self.rows // self.batch_size

    def first_order(self) -> jax.Array:
        """The place of the shuffled order in the loop's state, before the first epoch."""
        return jnp.zeros(self.rows, jnp.int32)

    def shapes(self, data: PyTree) -> PyTree:
        """What a batch looks like."""

        def batch(rows: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.batch_size, *rows.shape[1:]), rows.dtype, weak_type=rows.weak_type)

        return jax.tree.map(batch, data)

    def take(self, data: PyTree, order: jax.Array, key: jax.Array, step: jax.Array) -> tuple[PyTree, jax.Array]:
        """The batch of a step, and the order of its epoch, which is drawn from the key and the epoch's number alone."""

        def shuffle():
            return jax.random.permutation(jax.random.fold_in(key, step // self.per_epoch), self.rows).astype(jnp.int32)

        position = step % self.per_epoch
        order = lax.cond(position == 0, shuffle, lambda: order)
        index = lax.dynamic_slice(order, (position * self.batch_size,), (self.batch_size,))
        return jax.tree.map(lambda array: array[index], data), order


def check_data(data: PyTree, batch_size: Any) -> tuple[PyTree, Batches | None]:
    """The data as device arrays, and how to batch them; None where each step sees all of them."""
    if data is None:
        if batch_size is not None:
            raise InputError(f"batch_size={batch_size!r} was given without data: pass data=, or leave batch_size out.")
        return None, None
    leaves = jax.tree_util.tree_leaves_with_path(data, is_leaf=_is_stream)
    lengths = {}
    for path, leaf in leaves:
        name = _trees.path_name(path, "data")
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise InputError(
                f"{name} is a {type(leaf).__name__}, not an array: data is a pytree of arrays with a shared leading "
                "axis, such as (X, y); convert lists with numpy.asarray."
            )
        if not leaf.shape:
            raise InputError(f"{name} is a scalar and has no rows: pass constants in args=, not in data=.")
        lengths[name] = leaf.shape[0]
    if len(set(lengths.values())) != 1:
        what = ", ".join(f"{name} has {length}" for name, length in lengths.items()) or "it has no arrays"
        raise InputError(f"data needs one number of rows (leading axis) in all its arrays: {what}.")
    rows = next(iter(lengths.values()))
    if rows == 0:
        raise InputError("data has zero rows: pass at least one.")
    if batch_size is not None:
        batch_size = whole_number("batch_size", batch_size)
        if batch_size > rows:
            raise InputError(
                f"batch_size={batch_size} is over the {rows} rows of data: pass at most {rows}, or None for all rows."
            )
    batches = None if batch_size in (None, rows) else Batches(rows, batch_size)
    return jax.tree.map(jnp.asarray, data), batches


def _is_stream(node: Any) -> bool:
    """Whether it yields batches rather than holding arrays: a generator, a loader; JAX warns before it says so."""
    return isinstance(node, Iterable) and not isinstance(node, Mapping | Sequence) and not hasattr(node, "shape")
