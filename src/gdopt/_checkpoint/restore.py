"""The state of a run, as a checkpoint holds it, in the place of a fresh one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gdopt import _trees
from gdopt._checkpoint import older, sharded
from gdopt._checkpoint.file import SPREAD
from gdopt._checkpoint.folder import Saved
from gdopt._checkpoint.packing import as_fresh, as_saved
from gdopt._devices.sharding import put_like
from gdopt._errors import InputError
from gdopt._loop.state import State, returned_params


def refuse_other(found: Saved, name: str, theirs: Any, mine: Any) -> None:
    """Raise InputError if something is another one than in the checkpoint."""
    if theirs != mine:
        raise InputError(
            f"the checkpoint {found.file!r} is of another run: its {name} is {theirs}, but here it is {mine}. Make the "
            "same call, or pass another path."
        )


def restored_state(found: Saved, fresh: State) -> State:
    """Return the saved state, packed as and on the devices of a fresh one; raise InputError if it is another kind."""
    arrays, spread, now = found.arrays, found.meta.get(SPREAD), fresh
    stays_fresh = older.stays_fresh(found, fresh)
    fresh = as_saved(fresh, {*arrays, *({} if spread is None else sharded.kinds(spread))})
    places = _places(found, fresh, stays_fresh)
    if spread is not None:
        arrays = {**arrays, **sharded.load(found.file, spread, places)}

    def put(name: str, leaf: Any) -> Any:
        if stays_fresh(name):
            return leaf
        saved = arrays[name]
        if not isinstance(leaf, jax.Array):
            return np.asarray(saved)[()]
        if not isinstance(saved, jax.Array):  # what comes from orbax is in its place
            saved = put_like(saved, plain(leaf))
        return jax.random.wrap_key_data(saved, impl=jax.random.key_impl(leaf)) if _trees.is_key(leaf) else saved

    named = _trees.named_leaves(fresh, "state")
    state = jax.tree.structure(fresh).unflatten([put(name, leaf) for name, leaf in named.items()])
    if stays_fresh("state.optimizer"):  # A search begins at the best point. The last one may have been a trial.
        state = state._replace(params=returned_params(state))
    return as_fresh(state, now)


def names_in(found: Saved) -> set[str]:
    """Return the names of all arrays of a checkpoint."""
    return {*kinds_of(found)}


def kinds_of(found: Saved) -> dict[str, tuple]:
    """Return the shapes and dtypes of all arrays of a checkpoint, by name."""
    spread = found.meta.get(SPREAD)
    kinds = {name: (array.shape, array.dtype) for name, array in found.arrays.items()}
    return kinds | ({} if spread is None else sharded.kinds(spread))


def restored_tree(found: Saved, like: Any, root: str) -> Any:
    """Return a tree of arrays that was saved under a name, on the devices of one like it."""
    spread = found.meta.get(SPREAD)
    named, elsewhere = _trees.named_leaves(like, root), {} if spread is None else sharded.kinds(spread)
    for name, leaf in named.items():
        theirs = elsewhere.get(name)
        if name in found.arrays:
            theirs = found.arrays[name].shape, found.arrays[name].dtype
        refuse_other(found, name, theirs, (leaf.shape, leaf.dtype))
    places = {name: getattr(leaf, "sharding", None) for name, leaf in named.items() if name in elsewhere}
    loaded = sharded.load(found.file, spread, places) if spread is not None and places else {}
    leaves = [loaded[name] if name in loaded else put_like(found.arrays[name], leaf) for name, leaf in named.items()]
    return jax.tree.structure(like).unflatten(leaves)


def _places(found: Saved, fresh: State, stays_fresh: Callable[[str], bool]) -> dict[str, Any]:
    """Return where each leaf belongs; raise InputError if the checkpoint has other ones."""
    kinds = kinds_of(found)
    kind = lambda shape, dtype: f"{dtype}{list(shape)}"
    places, unknown = {}, {name for name in kinds if name.startswith("state") and not stays_fresh(name)}
    for name, leaf in _trees.named_leaves(fresh, "state").items():
        like = plain(leaf)
        if not stays_fresh(name):
            theirs = kind(*kinds[name]) if name in kinds else "nothing"
            refuse_other(found, name, theirs, kind(like.shape, like.dtype))
            unknown.discard(name)
            places[name] = getattr(like, "sharding", None)
    for name in sorted(unknown):
        refuse_other(found, name, kind(*kinds[name]), "nothing")
    return places


def plain(leaf: Any) -> Any:
    """Return the numbers of a typed key, and other leaves as they are."""
    return jax.random.key_data(leaf) if _trees.is_key(leaf) else leaf
