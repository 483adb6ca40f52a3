"""Modules of Flax's nnx: some variables are no parameters, and a loss may write to them. Flax is not imported here."""

from __future__ import annotations

import sys
from typing import Any

import jax

from gdopt import _trees
from gdopt._errors import InputError
from gdopt._types import PyTree


def in_state(treedef: Any) -> list[bool]:
    """Tell which leaves belong to variables other than Params: batch statistics, random keys, counts.

    ``nnx.Optimizer(model, tx, wrt=nnx.Param)`` leaves the same ones alone.
    """
    nnx = sys.modules.get("flax.nnx")  # A caller with such a module has imported it.
    if nnx is None:
        return [False] * treedef.num_leaves

    def walk(treedef: Any) -> list[bool]:
        data = treedef.node_data()
        if data is not None and issubclass(data[0], nnx.Variable):
            return [not issubclass(data[0], nnx.Param)] * treedef.num_leaves
        children = treedef.children()
        return [flag for child in children for flag in walk(child)] if children else [False] * treedef.num_leaves

    return walk(treedef)


def refuse_shared(params: PyTree) -> None:
    """Raise InputError for a Param in two places: as two leaves of a tree, its values would differ soon."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    paths: dict[int, tuple] = {}
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        if isinstance(node, nnx.Param) and paths.setdefault(id(node), path) is not path:
            raise InputError(
                f"{_trees.path_name(paths[id(node)])} and {_trees.path_name(path)} are one variable, and would be "
                "optimised as two. Pass the state of graphdef, state, rest = nnx.split(model, nnx.Param, ...), which "
                "has it once, and rebuild the model in the loss with nnx.merge(graphdef, state, rest)."
            )


def refuse_writes(rest: _trees.Rest, whole: PyTree) -> None:
    """Raise InputError if the loss wrote to a variable that is carried along: the new value would be lost."""
    state = in_state(rest.treedef)
    if not any(state):
        return
    given = rest.leaves()
    now = dict(jax.tree_util.tree_leaves_with_path(whole))
    for path, place in jax.tree_util.tree_leaves_with_path(rest.treedef.unflatten(range(len(state)))):
        if state[place] and not rest.kept[place] and now.get(path) is not given[place]:
            raise InputError(
                f"the loss writes to {_trees.path_name(path)}, and that would be lost: each step begins with the state "
                "that was passed. To carry it along, take it out with nnx.split(model, nnx.Param, ...), and pass it as "
                "state=. For fresh random numbers pass with_key=True, and use the key as rngs=nnx.Rngs(key). "
                "If it may be lost (for example batch statistics that are computed again after the training), let the "
                "loss begin with model = nnx.clone(model)."
            )
