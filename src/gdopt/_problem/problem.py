"""The problem of a call with its arguments, its data and its random key, checked."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gdopt import _trees
from gdopt._checks import fault, is_foreign, refuse_misread, refuse_no_arrays, refuse_result
from gdopt._compile import program
from gdopt._devices.sharding import check_batch_size, explicitly
from gdopt._errors import InputError
from gdopt._problem import model_state
from gdopt._problem.data import Batches, check_data
from gdopt._problem.objective import Objective, check_start
from gdopt._problem.stream import Stream, numbers_of
from gdopt._settings import own_work
from gdopt._types import PyTree


class Problem(NamedTuple):
    """A problem, and all arguments of its loss besides the params."""

    objective: Objective
    args: PyTree  # the traced ones; None in place of functions and the like
    args_rest: _trees.Rest
    data: PyTree  # for a stream, its first batch
    batches: Batches | None
    stream: Stream | None
    with_key: bool
    given_key: jax.Array | None
    state: PyTree = None  # the arrays of the model's state before the first step
    state_rest: _trees.Rest | None = None  # None if the loss has no state
    optimizer_state: PyTree = None  # the optimizer's state before the first step; None for a fresh one
    constraint: Any = None  # what confines the params: see `constraint`
    explicit: Mesh | None = None  # the mesh whose axes are Explicit in the loss, as in the arrays that were given
    traced: program.Traced | None = None  # `value` as it was traced before, in place of the loss as it is now
    record: Any = None  # a trace of then for `diagnose`: see `diagnose.recorded`

    @property
    def key(self) -> jax.Array:
        """The key from which all random numbers of a call are drawn."""
        if self.given_key is not None:
            return self.given_key
        config: Any = jax.config  # It creates its attributes on demand.
        with own_work():
            if config.jax_default_prng_impl == "threefry2x32":  # Then this is the same key, and compiles nothing.
                return jax.random.wrap_key_data(_trees.on_device(np.zeros(2, np.uint32)))
            return jax.random.key(0)

    @property
    def has_state(self) -> bool:
        """Tell whether the loss takes a state and returns the next one."""
        return self.state_rest is not None

    @property
    def noisy(self) -> bool:
        """Tell whether the loss is another function at each step."""
        return self.with_key or self.has_state or self.batches is not None or self.stream is not None

    @property
    def moves(self) -> bool:
        """Tell whether a projection or a prox, which mix the entries, confines the params."""
        return self.constraint is not None and self.constraint.bounds is None

    @property
    def steps_per_epoch(self) -> int | None:
        """The steps of an epoch; None for a deterministic loss, and for a stream."""
        if self.stream is not None:
            return None
        return self.batches.per_epoch if self.batches else 1 if self.with_key or self.has_state else None

    @property
    def batch(self) -> PyTree:
        """The data that the loss gets at each step, or only the shapes of a batch."""
        return self.batches.shapes(self.data) if self.batches else self.data

    def value(
        self, params: PyTree, data: PyTree, args: PyTree, key: jax.Array | None, state: PyTree = None
    ) -> tuple[jax.Array, Any]:
        """Return (loss, aux) of all data or of a batch; with a state (loss, `Stateful`).

        The loss gets the key and the state only if it takes one.
        """
        if self.traced is not None:
            return self.traced.replay(self.traced.constants, params, data, args, key, state)
        if self.explicit is not None:
            given = self.objective.params, self.data, self.args, self.key if self.with_key else None, self.state
            inside = self._replace(explicit=None).value
            return explicitly(inside, self.explicit, given)(params, data, args, key, state)
        given = self.args_rest.combine(args)
        given = given if data is None else (data, *given)
        named = {"key": key} if self.with_key else {}
        if self.state_rest is None:
            return self.objective.value(params, *given, **named)
        value, (new, aux) = self.objective.value(params, *given, **named, state=self.state_rest.combine(state))
        return value, model_state.Stateful(model_state.updated(state, self.state_rest, new), aux)

    def whole_state(self, state: PyTree) -> PyTree:
        """Return a state as the loss takes it; None without one."""
        return None if self.state_rest is None else self.state_rest.combine(state)


def make_problem(
    objective: Objective,
    *,
    args: tuple,
    data: PyTree,
    batch_size: int | None,
    with_key: bool,
    key: jax.Array | None,
    state: PyTree = None,
    optimizer_state: PyTree = None,
) -> Problem:
    """Check everything that a run needs; raise InputError, before anything is traced, if it cannot be used."""
    data, batches, stream = check_data(data, batch_size)
    if batches is not None:
        check_batch_size(data, batches.batch_size)
    check_start(objective.params)
    traced, rest = split_args(args)
    problem = Problem(objective, traced, rest, data, batches, stream, with_key, _check_key(key))
    if state is not None:
        refuse_result("state", state, "state")
        arrays, others = _split("state", state)
        problem = problem._replace(state=_trees.strong(arrays), state_rest=others)
    return problem._replace(optimizer_state=_trees.strong(_only_arrays("optimizer_state", optimizer_state)))


def _only_arrays(name: str, tree: PyTree) -> PyTree:
    """Return the tree; raise InputError if a leaf is no array."""
    refuse_result(name, tree, name)
    refuse_no_arrays(name, tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not _trees.is_array(leaf):
            raise InputError(
                f"{_trees.path_name(path, name)} is a {type(leaf).__name__}, not an array. Pass the optimizer_state of "
                "a gdopt.Result, or what optimizer.init(params) returns."
            )
    return tree


def _check_key(key: Any) -> jax.Array | None:
    if key is None:
        return None
    if why := fault(key, carried=True):
        raise InputError(f"key {why}.")
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
        return key
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and key.ndim == 1:
        with contextlib.suppress(TypeError):  # It may have the wrong number of words.
            return jax.random.wrap_key_data(_trees.on_device(key))
    raise InputError(f"key={key!r} is not one random key. Pass one (for example jax.random.key(0)).")


def split_args(args: Any) -> tuple[PyTree, _trees.Rest]:
    """Split the arguments of a loss into arrays, which are traced, and all others; raise InputError for unfit ones."""
    if not isinstance(args, tuple):
        raise InputError(f"args is a {type(args).__name__}. Pass a tuple (for example args=(x,)).")
    return _split("args", args)


def _split(name: str, tree: PyTree) -> tuple[PyTree, _trees.Rest]:
    """Split a tree into arrays, which are traced, and all others; raise InputError for unfit ones."""
    refuse_misread(name, tree)
    refuse_no_arrays(name, tree)
    leaves, treedef = jax.tree.flatten(tree)
    limits = jnp.iinfo(jax.dtypes.canonicalize_dtype(int))
    if any(isinstance(leaf, int) or not _trees.is_array(leaf) for leaf in leaves):
        paths = jax.tree_util.tree_leaves_with_path(tree)
        leaves = [_argument(_trees.path_name(path, name), leaf, limits) for path, leaf in paths]
        tree = treedef.unflatten(leaves)
    some, rest = _trees.partition(tree, [_trees.is_array(leaf) for leaf in leaves])
    return jax.tree.map(lambda leaf: _trees.on_device(leaf) if isinstance(leaf, np.ndarray) else leaf, some), rest


def _argument(name: str, leaf: Any, limits: Any) -> Any:
    """Return a leaf, as an array if it is one of another library; raise InputError for an int too large."""
    if is_foreign(leaf):
        return numbers_of(name, leaf)
    if isinstance(leaf, int) and not limits.min <= leaf <= limits.max:
        raise InputError(
            f"{name} is an int of {leaf.bit_length()} bits, beyond the range of {limits.dtype}. Pass it as a float."
        )
    return leaf
