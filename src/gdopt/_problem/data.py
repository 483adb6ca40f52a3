"""Data on the device, checked, and their batches, which are shuffled anew in every epoch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdopt import _jax, _trees
from gdopt._checks import UNORDERED, fault, flatten, is_foreign, whole_number
from gdopt._errors import InputError
from gdopt._problem.stream import Stream, is_stream, numbers_of
from gdopt._types import PyTree


class Batches(NamedTuple):
    """The division of ``rows`` rows into batches; rows that fill no batch sit an epoch out, other ones each time."""

    rows: int
    batch_size: int

    @property
    def per_epoch(self) -> int:
        return self.rows // self.batch_size

    def shapes(self, data: PyTree) -> PyTree:
        """Return the shapes and dtypes of a batch."""

        def batch(rows: jax.Array) -> Any:
            if _jax.is_tracer(rows) and _jax.varying(rows):  # A shape does not say over which devices it differs.
                return rows[: self.batch_size]
            return jax.ShapeDtypeStruct((self.batch_size, *rows.shape[1:]), rows.dtype, weak_type=rows.weak_type)

        return jax.tree.map(batch, data)

    def order(self, key: jax.Array, step: jax.Array) -> jax.Array:
        """Draw the shuffled order of a step's epoch, from nothing but the key and the number of the epoch."""
        shuffled = jax.random.permutation(jax.random.fold_in(key, step // self.per_epoch), self.rows)
        return shuffled.astype(jnp.int32)

    def take(self, data: PyTree, order: jax.Array, step: jax.Array) -> PyTree:
        """Return the batch of a step."""
        begin = step % self.per_epoch * self.batch_size
        index = lax.dynamic_slice(order, (begin,), (self.batch_size,))
        return jax.tree.map(lambda array: array[index], data)


def check_data(data: PyTree, batch_size: Any, name: str = "data") -> tuple[PyTree, Batches | None, Stream | None]:
    """Return the data as device arrays, and how to batch them; None if each step sees all of them.

    For a stream, return its first batch as the data. The ``name`` is that of the argument.
    """
    if isinstance(data, UNORDERED):
        raise InputError(
            f"{name} is a {type(data).__name__}, which is neither a pytree of arrays nor a stream of batches. Pass a "
            "tuple of its items."
        )
    if is_stream(data):
        if batch_size is not None:
            raise InputError(
                f"batch_size={batch_size!r} was given with data that come in batches. Leave batch_size out, or pass "
                "arrays."
            )
        stream = Stream(data, name)
        return stream.example, None, stream
    if data is None:
        if batch_size is not None:
            raise InputError(f"batch_size={batch_size!r} was given without data. Pass data=, or leave batch_size out.")
        return None, None, None
    _, treedef = flatten(name, data)
    paths = jax.tree_util.tree_leaves_with_path(data)
    arrays = {_trees.path_name(path, name): leaf for path, leaf in paths}
    arrays = {path: _array(path, leaf, name) for path, leaf in arrays.items()}
    rows = _shared_rows({path: array.shape[0] for path, array in arrays.items()}, name)
    if batch_size is not None:
        batch_size = whole_number("batch_size", batch_size, upto=f"{rows}, the rows of data")
        if batch_size > rows:
            raise InputError(
                f"batch_size={batch_size} is over the {rows} rows of data. Pass at most {rows}, or None for all rows."
            )
    batches = None if batch_size in (None, rows) else Batches(rows, batch_size)
    return treedef.unflatten(map(_trees.on_device, arrays.values())), batches, None


def _array(name: str, leaf: Any, of: str) -> Any:
    """Check a leaf of the data, and convert it unless it is an array already."""
    known = isinstance(leaf, jax.Array | np.ndarray)
    if why := known and fault(leaf, carried=False):
        raise InputError(f"{name} {why}.")
    if not hasattr(leaf, "shape") or not (hasattr(leaf, "dtype") or is_foreign(leaf)):
        shown = f"{name}={leaf!r}" if name == of and isinstance(leaf, int | float) else name
        raise InputError(
            f"{shown} is a {type(leaf).__name__}, not an array. Pass a pytree of arrays with a shared leading axis "
            "(for example (X, y)). Convert lists with numpy.asarray, and put a torch Dataset into a DataLoader."
        )
    if not leaf.shape:
        raise InputError(f"{name} is a scalar and has no rows. Pass constants in args=, not in {of}=.")
    return leaf if known else numbers_of(name, leaf)


def _shared_rows(lengths: dict[str, int], of: str) -> int:
    """Return the number of rows of all arrays; raise InputError if there is none."""
    if len(set(lengths.values())) != 1:
        what = ", ".join(f"{name} has {length}" for name, length in lengths.items()) or "it has no arrays"
        raise InputError(f"{of} needs the same number of rows (leading axis) in all its arrays: {what}.")
    rows = next(iter(lengths.values()))
    if rows == 0:
        raise InputError(f"{of} has zero rows. Pass at least one.")
    return rows
