"""The identity of a run: what a checkpoint says about the call that made it, to compare it with the next call."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import zlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

from gdopt import _trees
from gdopt._compile import digests
from gdopt._devices.sharding import anywhere
from gdopt._loop import loop
from gdopt._loop.state import Carry
from gdopt._optimizers.method import Method
from gdopt._problem.problem import Problem
from gdopt._problem.validation import Validation
from gdopt._settings import own_promotion
from gdopt._stopping import Limits
from gdopt._types import PyTree

_LONGEST = 200  # the most characters of a description


def run_identity(problem: Problem, validation: Validation | None, *, keep_best: bool) -> dict[str, str]:
    """Describe, by name, everything that has to be the same when a run is resumed."""
    return {
        "params": _shapes_of(problem.objective.params),
        "data": "a stream" if problem.stream else with_checksum(problem.data),
        "batch_size": repr(problem.batches and problem.batches.batch_size),
        "args": with_checksum(problem.args),
        "held params": with_checksum(problem.objective.rest.arrays),
        "key": _trees.on_host(jax.random.key_data(problem.key)).tobytes().hex() if problem.noisy else "none",
        "keep_best": repr(keep_best),
        "state": _shapes_of(problem.state) or "nothing",
        "validation": _validation(validation),
        "scale": with_checksum(problem.objective.sizes),
        "constraint": _constraint(problem),
        "float": jax.dtypes.canonicalize_dtype(float).name,
    }


def _constraint(problem: Problem) -> str:
    """Describe the bounds by a checksum, a projection or a prox by its trace."""
    given = problem.constraint
    if given is None:
        return "nothing"
    if given.bounds is not None:
        return f"bounds {with_checksum(given.bounds)}"
    params = jax.tree.map(anywhere, problem.objective.params)
    if given.prox is None:
        return f"project with the checksum {digests.digest(given.project, params)}"
    texts = [digests.digest(given.prox, params, jnp.ones((), _trees.norm_dtype(params)))]
    if given.penalty is not None:
        texts.append(digests.digest(given.penalty, params))
    return f"prox with the checksum {' '.join(texts)}"


def validation_identity(problem: Problem, validation: Validation | None) -> str:
    """Return the checksum of the trace of a validation loss; "" if it is that of the run, or cannot be traced."""
    if validation is None or validation.loss is None:
        return ""
    judged = validation.problem(problem)
    given = judged.objective.params, judged.data, judged.args, judged.key, judged.state
    with contextlib.suppress(Exception):  # The run raises it, with what helps.
        return digests.digest(judged.value, *jax.tree.map(anywhere, given))
    return ""


def _validation(validation: Validation | None) -> str:
    if validation is None:
        return "nothing"
    return "a stream" if validation.stream else with_checksum(validation.data)


def program_identity(problem: Problem, method: Method) -> tuple[dict[str, Any], Callable[[], str]]:
    """Describe the loss and the optimizer, by checksums of their traces and of all that these hold.

    Return a function, too, that gives a checksum of what their functions on the host read at the moment. All is traced
    as on one device, because a run may resume on others. The gradient is traced, too: only its trace shows the rules of
    custom_jvp and custom_vjp.
    """
    traced, given = loop.traced_anywhere(problem, problem.key)
    value: Any = problem.value
    if any(map(_is_split, traced.constants)):  # The text of the trace would show their mesh.
        here = [_trees.on_host(array) if _is_split(array) else array for array in traced.constants]
        value = functools.partial(traced.replay, here)

    def gradient(params: PyTree, *given: PyTree) -> PyTree:
        return jax.grad(lambda params: value(params, *given)[0])(params)

    def update(rate: Any, params: PyTree) -> PyTree:
        one = lambda params: sum(jnp.sum(leaf * leaf.conj()).real for leaf in jax.tree.leaves(params))  # any loss
        return method.update(rate, params, method.init(rate, params), params, one, jnp.zeros((), float))

    with own_promotion():
        made = [digests.Digest(update, 0.1, given[0])]
    made.append(digests.Digest(value, *given))
    with contextlib.suppress(Exception):  # The loop raises it, with what helps.
        made.append(digests.Digest(gradient, *given))
    updates, loss, rules = (*(digest.text for digest in made), "")[:3]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "optax", "gdopt"))
    text = short(repr(method.optimizer))
    told = {"loss": loss, "gradient": rules, "optimizer": {"text": text, "updates": updates, "versions": versions}}
    return told, lambda: "".join(digest.host() for digest in made)


def _is_split(array: Any) -> bool:
    """Tell whether an array is on many devices of this process."""
    return isinstance(array, jax.Array) and array.is_fully_addressable and len(array.sharding.device_set) > 1


def layout_of(carry: Carry) -> str:
    """Describe what the last bits depend on: kind and number of devices and, on a CPU, cores, by which XLA splits."""
    arrays = [leaf for leaf in jax.tree.leaves(carry) if isinstance(leaf, jax.Array)]
    devices = set().union(*(array.sharding.device_set for array in arrays))
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    text = f"{kinds}, {len(devices)} device{'s' * (len(devices) != 1)}"
    config: Any = jax.config  # It creates its attributes on demand.
    if not config.jax_threefry_partitionable:
        text += ", jax_threefry_partitionable=False"  # Other random numbers.
    if all(device.platform != "cpu" for device in devices):
        return text
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{text}, {cores} core{'s' * (cores != 1)}"


def numbers_of(limits: Limits) -> list[str]:
    """Write the limits in full, but for the number of steps, which is in the state."""
    return [repr(limit if limit is None else float(limit)) for limit in limits[1:]]


def short(text: str) -> str:
    """Leave addresses out of a representation, and its end if it is long."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)[:_LONGEST]


def with_checksum(tree: PyTree) -> str:
    """Describe a tree by its shapes, its dtypes and a checksum."""
    return f"{_shapes_of(tree)} with the checksum {digests.checksum(tree)}" if jax.tree.leaves(tree) else "nothing"


def _shapes_of(tree: PyTree) -> str:
    """Describe a tree by paths, dtypes and shapes, and by a checksum if it has many leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    text = ", ".join(
        f"{jax.tree_util.keystr(path)} {leaf.dtype.name}{list(leaf.shape)}" if hasattr(leaf, "dtype") else repr(leaf)
        for path, leaf in leaves
    )
    text = text.strip()  # A single array has no path.
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}... ({len(leaves)} leaves, {zlib.crc32(text.encode()):x})"
