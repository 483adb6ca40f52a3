"""The params of each step as further numbers of the record's rows, and the way back to trees."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _trees
from gdopt._errors import InputError
from gdopt._problem.limits import Steps
from gdopt._problem.objective import Objective
from gdopt._settings import own_work
from gdopt._types import PyTree

_MOST = 2**30  # bytes of a record


def width(params: PyTree) -> int:
    """Return how many real numbers params hold."""
    leaves = jax.tree.leaves(params)
    return sum(math.prod(leaf.shape) * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in leaves)


def check(params: PyTree, steps: Steps, checkpoint: Any) -> None:
    """Raise InputError if the params of all steps would take too much memory, or cannot be kept."""
    if checkpoint is not None:
        raise InputError(
            f"checkpoint={checkpoint!r} was given with record_params=True, but a checkpoint does not hold the params "
            "of the steps before it. Leave one of them out."
        )
    if steps.expected is None:
        raise InputError(
            "record_params=True was given for a stream of unknown length, so nobody knows how much memory the params "
            "of all steps would take. Pass max_steps=."
        )
    count = width(params)
    size = (steps.expected + 1) * count * np.dtype(_trees.norm_dtype(params)).itemsize
    if size > _MOST:
        raise InputError(
            f"record_params=True would take {size / 2**30:.3g} GiB for {steps.expected} steps of {count} numbers, and "
            "the most is 1 GiB. Lower max_steps or epochs, name fewer leaves with trainable=, or keep what you need in "
            "a callback."
        )


def row(params: PyTree, dtype: np.dtype) -> jax.Array:
    """Return the numbers of params as one vector. No digit is lost, because the dtype of a record is the widest."""
    real, _ = _trees.as_real(params)
    return jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in jax.tree.leaves(real)])


def of_start(objective: Objective) -> PyTree:
    """Return the record of a run that evaluated nothing but its start."""
    with own_work():
        start = row(objective.params, _trees.norm_dtype(objective.params))
    return params_of(_trees.on_host(start)[None], objective)


def params_of(rows: np.ndarray, objective: Objective) -> PyTree:
    """Return the params of all rows in their own units, with a leading axis; None in place of other leaves."""
    leaves, treedef = jax.tree.flatten(objective.params)
    sizes = [None] * len(leaves) if objective.sizes is None else treedef.flatten_up_to(objective.sizes)
    found, begin = [], 0
    for leaf, size in zip(leaves, sizes, strict=True):
        parts = 2 if jnp.iscomplexobj(leaf) else 1
        end = begin + parts * math.prod(leaf.shape)
        real = rows[:, begin:end].astype(jnp.finfo(leaf.dtype).dtype).reshape(len(rows), parts, *leaf.shape)
        if size is not None:
            with own_work(), np.errstate(all="ignore"):
                real = real * np.asarray(size)
        found.append(real[:, 0] if parts == 1 else _complex(real, leaf.dtype))
        begin = end
    return treedef.unflatten(found)


def _complex(real: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Join real and imaginary parts. A sum would make NaN of an infinite part."""
    joined = np.empty((len(real), *real.shape[2:]), dtype)
    joined.real, joined.imag = real[:, 0], real[:, 1]
    return joined
