"""The state of a model beside its params, such as the statistics of a batch norm: each step hands it to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdopt import _trees
from gdopt._errors import InputError
from gdopt._types import PyTree


class Stateful(NamedTuple):
    """The part that a loss with state returns beside its value."""

    state: PyTree  # the arrays alone
    aux: PyTree


def of(extra: Any) -> tuple[PyTree, PyTree]:
    """Return the state and the aux of what a loss returned beside its value; the state is None without one."""
    return extra if isinstance(extra, Stateful) else (None, extra)


def updated(given: PyTree, rest: _trees.Rest, new: Any) -> PyTree:
    """Return the arrays of a new state; raise InputError if the next step could not take it in place of the old one."""
    whole = rest.combine(given)
    leaves, treedef = jax.tree.flatten(new)
    if treedef != rest.treedef:
        raise InputError(
            f"the loss returned a state of another structure than it was given: {_shown(new, treedef)} instead of "
            f"{_shown(whole, rest.treedef)}. Return (value, state) with the same structure at each "
            "step; with has_aux=True, (value, (state, aux))."
        )
    paths = jax.tree_util.tree_leaves_with_path(whole)
    fitting = [
        _fitting(_trees.path_name(path, "state"), old, leaf, kept)
        for (path, old), leaf, kept in zip(paths, leaves, rest.kept, strict=True)
    ]
    return rest.treedef.unflatten(leaf if kept else None for leaf, kept in zip(fitting, rest.kept, strict=True))


def _fitting(name: str, old: Any, new: Any, kept: bool) -> Any:
    """Return a leaf of a new state; raise InputError if it differs from the old one in more than its numbers."""
    if not kept:
        if new is old or (type(new) is type(old) and bool(new == old)):
            return old
        raise InputError(f"{name} is {old!r}, but the loss returned {new!r}. Only arrays can change.")
    if _trees.is_key(new) and new.dtype == old.dtype and new.shape == old.shape:
        return new
    if not (_trees.is_array(new) or hasattr(new, "__jax_array__")):
        returned = type(new).__name__
        raise InputError(f"{name} is {_kind(old)}, but the loss returned a {returned}. Return an array.")
    array = new if isinstance(new, jax.Array) else jnp.asarray(new)
    weak = not _trees.is_key(old) and getattr(array, "weak_type", False) and jnp.result_type(old, array) == old.dtype
    array = array.astype(old.dtype) if weak else array
    if (array.shape, array.dtype) != (old.shape, old.dtype):
        raise InputError(
            f"{name} is {_kind(old)}, but the loss returned {_kind(array)} for it. Return the same shape and dtype "
            f"(for example with .astype({old.dtype.name!r}))."
        )
    return _trees.strong(array)


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype.name}{list(leaf.shape)}"


def _shown(tree: PyTree, treedef: Any) -> str:
    """Show a tree by its dtypes and shapes; by its structure if it has no readable form."""
    text = _trees.summary(tree)
    return text if len(text) <= 200 else f"{str(treedef)[:200]}..."
