"""``load``: the params of a checkpoint, without the run that made it."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _trees
from gdopt._checkpoint import older
from gdopt._checkpoint.folder import Checkpoint, Saved, newest
from gdopt._checkpoint.packing import packings
from gdopt._checkpoint.restore import kinds_of, restored_tree
from gdopt._checks import refuse_result
from gdopt._devices.sharding import put_like
from gdopt._errors import CheckpointError, InputError
from gdopt._problem.objective import Objective, make_objective, times
from gdopt._settings import own_work
from gdopt._status import FAILURES
from gdopt._types import PyTree

_LAST, _KEPT, _BEST, _SIZES = "state.params", "state.kept.params", "validation.best[0]", "scale"


def load(path: str | os.PathLike[str] | Checkpoint, like: PyTree) -> PyTree:
    """Read the params from the newest checkpoint at a path.

    They are those that the run would return if it ended there: the best by validation, else the best of a deterministic
    loss, else the last ones, or the last good ones after a failure. Nothing is locked or changed on the disk, so the
    run may still be going on.

    Args:
        path: the ``checkpoint`` of the call that made it.
        like: params of the same structure, shapes and dtypes, such as the start of that call. What is carried along
            (functions, strings, frozen leaves) comes from here, and arrays go to the devices of these.

    Returns:
        Params like ``like``, in their own units.

    Raises:
        CheckpointError: if there is no checkpoint at the path, or none that can be read.
        InputError: if the directory of the path does not exist; if ``like`` does not fit; and for an optimizer that
            returns an average of the params, which only the call itself can compute.

    Example:
        >>> import gdopt, jax.numpy as jnp, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run"
        >>> loss = lambda params: jnp.sum((params["w"] - 1) ** 2)
        >>> result = gdopt.minimize(loss, {"w": jnp.zeros(2)}, checkpoint=path)
        >>> gdopt.load(path, like={"w": jnp.zeros(2)})["w"]
        Array([1., 1.], dtype=float32)
    """
    refuse_result("like", like, "params")
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint(path)
    base = os.fspath(checkpoint.path)
    found = newest(checkpoint, older.usable)
    if found is None:
        raise CheckpointError(f"path={base!r} has no checkpoint. Pass the checkpoint= of the call that made it.")
    with own_work():
        return _params_of(found, like)


def _params_of(found: Saved, like: PyTree) -> PyTree:
    saved = kinds_of(found)
    if any(name.endswith(".z") or ".z[" in name for name in saved if name.startswith("state.optimizer")):
        raise InputError(
            f"the checkpoint {found.file!r} is of an optimizer that returns an average of the params. Repeat the call "
            "that made it: its result has the average."
        )
    names = {name for name in saved if name.startswith(_LAST)}
    leaves, treedef = jax.tree.flatten(like)
    mine = [_trees.path_name(path, _LAST) for path, _ in jax.tree_util.tree_leaves_with_path(like)]
    if missing := sorted(names.difference(mine)):
        raise InputError(f"like has no leaf {_named(missing[0])}, but the checkpoint {found.file!r} has one.")
    objective = make_objective(lambda _: 0, like, trainable=treedef.unflatten([name in names for name in mine]))
    for name, leaf in zip(mine, leaves, strict=True):
        if name in names:
            _check_kind(found, name, saved[name], leaf)
        elif found.meta["given"]["held params"] == "nothing" and _is_optimised(leaf):
            raise InputError(f"{_named(name, 'like')} is not in the checkpoint {found.file!r}. Leave it out.")
    return objective.rest.combine(_in_units(found, objective, _restored(found, objective.params)))


def _restored(found: Saved, params: PyTree) -> PyTree:
    """Return the params of the best point in units of the run."""
    names = kinds_of(found)
    if any(name.startswith(_BEST) for name in names):
        return restored_tree(found, params, _BEST)
    noisy, failed = found.meta["given"]["key"] != "none", int(found.arrays["state.code"]) in FAILURES
    if (noisy and not failed) or not any(name.startswith(_KEPT) for name in names):
        return restored_tree(found, params, _LAST)
    for packed in packings(params):
        if all(name in names for name in _trees.named_leaves(packed, _KEPT)):
            return jax.tree.map(put_like, restored_tree(found, packed, _KEPT).tree(), params)
    raise CheckpointError(f"the checkpoint {found.file!r} keeps its best params in a form that is not known.")


def _in_units(found: Saved, objective: Objective, params: PyTree) -> PyTree:
    if found.meta["given"].get("scale", "nothing") == "nothing":
        return params
    named = _trees.named_leaves(objective.params, _SIZES)
    if not all(name in found.arrays for name in named):
        raise InputError(
            f"the checkpoint {found.file!r} is of a scaled run, and does not hold the sizes. Repeat the call."
        )
    sizes = jax.tree.structure(params).unflatten([jnp.asarray(found.arrays[name]) for name in named])
    return jax.tree.map(times, params, sizes)


def _check_kind(found: Saved, name: str, theirs: tuple, leaf: Any) -> None:
    mine = np.shape(leaf), jnp.result_type(leaf)
    if (tuple(theirs[0]), np.dtype(theirs[1])) != (mine[0], np.dtype(mine[1])):
        one, other = (f"{np.dtype(dtype)}{list(shape)}" for shape, dtype in (mine, theirs))
        raise InputError(f"{_named(name, 'like')} is {one}, but in the checkpoint {found.file!r} it is {other}.")


def _is_optimised(leaf: Any) -> bool:
    return _trees.is_array(leaf) and not _trees.is_key(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _named(name: str, root: str = "params") -> str:
    return root + name.removeprefix(_LAST)
