"""The packing of the best params in a checkpoint: it differs between one device and many, and a run may change them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import jax
import numpy as np

from gdopt import _trees
from gdopt._devices.sharding import put_like
from gdopt._loop.state import State
from gdopt._types import PyTree

_ROOT = "state.kept.params"


def as_saved(fresh: State, names: Iterable[str]) -> State:
    """Return a fresh state whose best params are packed as in the checkpoint that has arrays of these names."""
    saved = {name for name in names if name.startswith(_ROOT)}
    if fresh.kept.params is None or _names(fresh.kept.params) == saved:
        return fresh
    for packed in packings(fresh.params):
        if _names(packed) == saved:
            return fresh._replace(kept=fresh.kept._replace(params=packed))
    return fresh


def packings(params: PyTree) -> Iterator[_trees.Packed]:
    """Yield params in the forms that checkpoints have. Of a vector only the shape counts, so nothing is computed."""
    for most in (1, _trees.SMALL):
        bare = jax.tree.map(lambda x, most=most: np.zeros(x.shape, x.dtype) if x.size <= most else x, params)
        yield _trees.pack(bare, most)


def as_fresh(state: State, fresh: State) -> State:
    """Return a restored state whose best params are packed, and placed, as those of the fresh one."""
    packed, like = state.kept.params, fresh.kept.params
    if packed is None or like is None or packed.places == like.places:
        return state
    leaves = jax.tree.leaves(packed.tree())
    vectors = [np.concatenate([_trees.on_host(leaves[i]).reshape(-1) for i, _ in group]) for group in like.places]
    others = [None if there is None else leaf for leaf, there in zip(leaves, like.others, strict=True)]
    packed = jax.tree.map(put_like, _trees.Packed(vectors, others, like.treedef, like.places), like)
    return state._replace(kept=state.kept._replace(params=packed))


def _names(packed: _trees.Packed) -> set[str]:
    return {_trees.path_name(path, _ROOT) for path, _ in jax.tree_util.tree_leaves_with_path(packed)}
