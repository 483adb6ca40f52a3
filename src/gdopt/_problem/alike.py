"""The batches of a stream compared with its first one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gdopt import _trees
from gdopt._errors import InputError
from gdopt._types import PyTree

_KINDS = (jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_, jax.dtypes.prng_key)


def shapes(tree: PyTree) -> str:
    """Show a tree by its dtypes and shapes."""
    return _trees.summary(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree))


def check_like(batch: PyTree, first: PyTree, name: str) -> None:
    """Raise InputError for a batch with other containers, other axes or another kind of numbers than the first.

    Axes may have other lengths. Whether the loss takes these is seen when it is traced.
    """
    (leaves, treedef), (firsts, structure) = jax.tree.flatten(batch), jax.tree.flatten(first)
    if treedef != structure:
        cure = "Give all batches the same containers and keys (a list is no tuple)."
    elif any(a.ndim != b.ndim for a, b in zip(leaves, firsts, strict=True)):
        cure = "Give all batches arrays with as many axes."
    elif any(a.dtype != b.dtype and _kind(a) != _kind(b) for a, b in zip(leaves, firsts, strict=True)):
        cure = "Give all batches numbers of one kind (for example floats, by .astype(float))."
    else:
        return
    raise InputError(f"{_differs(batch, first, name)}. {cure}")


def refuse_other_lengths(batch: PyTree, first: PyTree, name: str, error: Exception) -> None:
    """Raise InputError if a loss raised an error on a batch that differs from the first not only in its rows.

    If it has other rows alone, the error gets a note.
    """
    pairs = list(zip(jax.tree.leaves(batch), jax.tree.leaves(first), strict=True))
    lengths = {(b.shape[0], a.shape[0]) for a, b in pairs if a.shape}
    rows_alone = len(lengths) == len(dict(lengths))
    if not rows_alone or any((a.shape[1:], a.dtype) != (b.shape[1:], b.dtype) for a, b in pairs):
        raise InputError(
            f"{_differs(batch, first, name)}, and the loss cannot take it. Pass arrays of the same shape and dtype, "
            f"but for the number of rows. ({error})"
        ) from error
    if lengths != {(rows, rows) for rows, _ in lengths}:
        error.add_note(f"gdopt: {_differs(batch, first, name)}.")


def _differs(batch: PyTree, first: PyTree, name: str) -> str:
    return f"{name} is {shapes(batch)}, but the first was {shapes(first)}"


def _kind(leaf: Any) -> Any:
    return next((kind for kind in _KINDS if jnp.issubdtype(leaf.dtype, kind)), leaf.dtype)
