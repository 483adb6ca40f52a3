"""The numbers of a prepared call: new ones have to look like those of the preparation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _jax, _trees
from gdopt._checks import fault, flatten, refuse_no_arrays, refuse_result
from gdopt._errors import InputError
from gdopt._problem import constraint
from gdopt._problem.constraint import Entrance
from gdopt._problem.data import check_data
from gdopt._problem.objective import check_start
from gdopt._problem.problem import Problem, split_args
from gdopt._problem.scaling import divided
from gdopt._settings import own_promotion, own_work
from gdopt._types import PyTree

_CURE = "Pass what looks alike, or call gdopt.prepare again."


class Template(NamedTuple):
    """A problem with the loss and the constraint of its preparation, into which other numbers are put."""

    problem: Problem
    entrance: Entrance

    def renewed(self, params: PyTree, args: Any, data: PyTree) -> Problem:
        """Return the problem with other numbers; None leaves those of the preparation."""
        problem = self.problem
        if params is None:
            refuse_no_arrays("params", problem.objective.params)  # They may have been deleted since then.
        else:
            start = self._start(params)
            problem = problem._replace(objective=problem.objective._replace(params=start))
        if args is None:
            refuse_no_arrays("args", problem.args)
        else:
            problem = problem._replace(args=self._args(args))
        if data is None:
            refuse_no_arrays("data", problem.data)
        else:
            problem = problem._replace(data=self._data(data))
        return problem

    def _start(self, params: PyTree) -> PyTree:
        """Return a start as `make_objective`, `constrained` and `scaled` make it."""
        refuse_result("params", params, "params")
        objective = self.problem.objective
        rest, old = objective.rest, jax.tree.leaves(objective.params)
        leaves, treedef = flatten("params", params)
        if treedef != rest.treedef:
            raise InputError(f"params is {treedef}, prepared with {rest.treedef}. {_CURE}")
        others = _others(leaves, rest.kept)
        if not (all(map(_fits, _chosen(leaves, rest.kept), old)) and all(map(_same, others, rest.leaves()))):
            self._explain(params)
        start = _trees.strong(rest.only(leaves))
        check_start(start)
        start = self.entrance(start)
        return start if objective.sizes is None else divided(start, objective.sizes)

    def _explain(self, params: PyTree) -> None:
        """Raise InputError for the first leaf of the params that does not fit."""
        rest = self.problem.objective.rest
        whole = rest.combine(self.problem.objective.params)
        paths = jax.tree_util.tree_leaves_with_path(params)
        for (path, new), old, kept in zip(paths, jax.tree.leaves(whole), rest.kept, strict=True):
            name = _trees.path_name(path)
            if kept and not _fits(new, old):
                raise InputError(_differs(name, new, old))
            if not kept and not _same(new, old):
                raise InputError(
                    f"{name} is not optimised, and differs from that of the preparation. Pass it in args=, or call "
                    "gdopt.prepare again."
                )

    def _args(self, args: Any) -> PyTree:
        arrays, rest = split_args(args)
        known = self.problem.args_rest
        if rest.treedef != known.treedef:
            raise InputError(f"args is {rest.treedef}, prepared with {known.treedef}. {_CURE}")
        if rest.kept != known.kept:
            raise InputError(
                f"args holds a number or an array where it was prepared with another object, or the reverse. {_CURE}"
            )
        if not _trees.same([rest.arrays, rest.others], [known.arrays, known.others]):
            raise InputError(f"args holds other functions or texts than those of the preparation. {_CURE}")
        arrays = _firm(arrays)
        _check_alike("args", arrays, self.problem.args)
        return arrays

    def _data(self, data: PyTree) -> PyTree:
        if self.problem.data is None:
            raise InputError(f"data was given, but the call was prepared without. {_CURE}")
        batches = self.problem.batches
        arrays, _, stream = check_data(data, None if batches is None else batches.batch_size)
        if stream is not None:
            raise InputError("data is a stream, but the call was prepared with arrays. Pass arrays.")
        if jax.tree.structure(arrays) != jax.tree.structure(self.problem.data):
            raise InputError(
                f"data is {jax.tree.structure(arrays)}, prepared with {jax.tree.structure(self.problem.data)}. {_CURE}"
            )
        arrays = _firm(arrays)
        _check_alike("data", arrays, self.problem.data)
        return arrays


def template_of(problem: Problem, *given: PyTree) -> Template:
    """Keep a checked problem with its constraint as it is now. The arrays that were ``given`` may change later."""
    objective = problem.objective
    confined, entrance = constraint.frozen(problem.constraint, objective.params)
    if objective.sizes is not None and entrance.bounds is not None:
        with own_work(), own_promotion():
            natural = [jax.tree.map(jnp.multiply, bound, objective.sizes) for bound in entrance.bounds]
        entrance = entrance._replace(bounds=(natural[0], natural[1]))
    known = {id(leaf) for leaf in jax.tree.leaves(given) if isinstance(leaf, jax.Array)}
    own = lambda tree: jax.tree.map(lambda leaf: leaf if id(leaf) in known else _owned(leaf), tree)
    names = "args", "data", "state", "optimizer_state"
    problem = problem._replace(
        objective=objective._replace(params=own(objective.params)),
        constraint=confined if confined is None else confined._replace(bounds=own(confined.bounds)),
        **{name: _firm(own(getattr(problem, name))) for name in names},
    )
    return Template(problem, entrance._replace(bounds=own(entrance.bounds)))


def _firm(tree: PyTree) -> PyTree:
    """Remove the weak types of arrays, which ``jnp.full(3, 1.0)`` has, so that these are like any other array."""
    return jax.tree.map(lambda leaf: _trees.strong(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def _owned(leaf: Any) -> Any:
    """Return a leaf that shares no memory with an array of NumPy or torch from which it may have been made."""
    if isinstance(leaf, np.ndarray):
        return _trees.owned(leaf)
    if not isinstance(leaf, jax.Array) or leaf.committed or _trees.is_key(leaf):
        return leaf
    return _trees.on_device(_trees.owned(_trees.on_host(leaf)))


def _chosen(leaves: list[Any], kept: tuple[bool, ...]) -> list[Any]:
    return [leaf for leaf, keep in zip(leaves, kept, strict=True) if keep]


def _others(leaves: list[Any], kept: tuple[bool, ...]) -> list[Any]:
    return [None if keep else leaf for leaf, keep in zip(leaves, kept, strict=True)]


def _same(new: Any, old: Any) -> bool:
    return new is old or not (_jax.is_tracer(new) or not _trees.same(new, old))


def _fits(new: Any, old: jax.Array) -> bool:
    """Tell whether a leaf of params can take the place of another one."""
    if not _trees.is_array(new) or fault(new, carried=False):
        return False
    return (
        np.shape(new) == old.shape and (new.dtype if isinstance(new, jax.Array) else jnp.result_type(new)) == old.dtype
    )


def _check_alike(name: str, new: PyTree, old: PyTree) -> None:
    """Raise InputError for the first leaf that differs in more than its numbers from that of the preparation."""
    pairs = list(zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True))
    if all(_kind(leaf) == _kind(other) for leaf, other in pairs):
        return
    for (path, leaf), (_, other) in zip(jax.tree_util.tree_leaves_with_path(new), pairs, strict=True):
        if _kind(leaf) != _kind(other):
            raise InputError(_differs(_trees.path_name(path, name), leaf, other))


def _kind(leaf: Any) -> Any:
    """Return everything about an array or a number that a program depends on."""
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype
    return ((), jnp.result_type(leaf)) if isinstance(leaf, np.generic) else type(leaf)


def _differs(name: str, new: Any, old: Any) -> str:
    """Say in which way a leaf differs from that of the preparation."""
    if why := fault(new, carried=False):
        return f"{name} {why}."
    if np.shape(new) != np.shape(old):
        return f"{name} has shape {np.shape(new)}, prepared with {np.shape(old)}. {_CURE}"
    return f"{name} is {_named(new)}, prepared with {_named(old)}. {_CURE}"


def _named(leaf: Any) -> str:
    return f"an array of {leaf.dtype}" if hasattr(leaf, "dtype") else f"a Python {type(leaf).__name__}"
