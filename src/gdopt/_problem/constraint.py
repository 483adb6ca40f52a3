"""The set to which the params are confined: bounds, a projection or a proximal step, checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _jax, _trees
from gdopt._checks import fault, warn
from gdopt._compile import program
from gdopt._devices.sharding import on_one_mesh
from gdopt._errors import InputError
from gdopt._problem.objective import Objective
from gdopt._problem.problem import Problem
from gdopt._settings import own_promotion, own_work
from gdopt._types import PyTree

_MOVES = 1e3  # the most that a projection may move its own result, in eps of the largest entry

_PAIR = "Pass a pair (lower, upper) of trees like params, or of prefixes of params: numbers, arrays or None"


class Constraint(NamedTuple):
    """A constraint on the params that are optimised, of one of three kinds."""

    bounds: tuple[PyTree, PyTree] | None = None  # lower and upper, arrays that broadcast to the params
    project: Callable[[PyTree], PyTree] | None = None
    prox: Callable[[PyTree, Any], PyTree] | None = None
    penalty: Callable[[PyTree], Any] | None = None  # that of the prox; None if it is not known

    def scaled(self, sizes: PyTree) -> Constraint:
        """Return the bounds of ``params / sizes``."""
        if self.bounds is None:
            name = "project" if self.prox is None else "prox"
            raise InputError(
                f"{name}= was given with scale=. The nearest point in scaled params is another one. Leave scale out."
            )
        return self._replace(bounds=tuple(jax.tree.map(jnp.divide, bound, sizes) for bound in self.bounds))


def constrained(problem: Problem, bounds: Any, project: Any, prox: Any) -> Problem:
    """Return the problem with its constraint, and with a start that fulfils it; raise InputError for an unfit one."""
    given = {"bounds": bounds, "project": project, "prox": prox}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return problem
    if len(names) > 1:
        raise InputError(f"{names[0]} and {names[1]} were both given. Pass one of bounds, project and prox.")
    objective = problem.objective
    if bounds is not None:
        with own_work():
            both = _checked_bounds(bounds, objective)
        start = _within(objective.params, both)
        return problem._replace(objective=objective._replace(params=start), constraint=Constraint(both))
    (name,) = names
    if not callable(given[name]):
        raise InputError(f"{name}={given[name]!r} is not a function. Pass one of {_TAKES[name]}.")
    with own_work(), own_promotion():
        objective = objective._replace(params=on_one_mesh({"params": objective.params})[0]["params"])
        problem = problem._replace(objective=objective)
        if prox is None:
            step = _whole(objective, project, name)
            _check_step(objective.params, step, name)
            _check_rest(objective, project, name)
            return _projected(problem, step)
        step = _whole(objective, prox, name)
        _check_step(objective.params, step, name, _rate(objective.params))
        _check_rest(objective, prox, name, _rate(objective.params))
        penalty = _penalty(objective, prox)
        problem = problem._replace(objective=_where_finite(objective, step, penalty))
        return problem._replace(constraint=Constraint(prox=step, penalty=penalty))


_TAKES = {"project": "params -> params", "prox": "(params, rate) -> params (for example gdopt.prox.l1(0.1))"}


def _checked_bounds(bounds: Any, objective: Objective) -> tuple[PyTree, PyTree]:
    """Return the lower and the upper bounds, in the dtypes of the params; raise InputError for unfit ones."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(objective.params):
        if jnp.iscomplexobj(leaf):
            raise InputError(
                f"{_trees.path_name(path)} is complex, and complex numbers have no order for bounds=. Optimise its "
                "real and its imaginary part."
            )
    pair = _as_pair(bounds, objective)
    both = [_spread(name, bound, sign, objective) for name, bound, sign in zip(_NAMES, pair, (-1, 1), strict=True)]
    for path, leaf, lower, upper in _paths(objective.params, *both):
        _check_order(path, leaf, lower, upper)
    return jax.tree.map(_nan_if_crossed, *both), both[1]


_NAMES = ("bounds[0]", "bounds[1]")  # the roots of the paths of both


def _as_pair(bounds: Any, objective: Objective) -> tuple[Any, Any]:
    """Return (lower, upper) of all forms that bounds may have."""
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):  # scipy.optimize.Bounds
        return bounds.lb, bounds.ub
    whole = objective.rest.treedef
    one = jax.tree.leaves(objective.params)
    flat = jax.tree_util.treedef_is_leaf(whole) and len(one) == 1 and one[0].ndim == 1
    if flat and _are_pairs(bounds, len(one[0])):
        low, high = zip(*bounds, strict=True)
        number = lambda entries, missing: np.asarray([missing if x is None else x for x in entries], float)
        return number(low, -math.inf), number(high, math.inf)
    if isinstance(bounds, tuple | list) and len(bounds) == 2:
        return bounds[0], bounds[1]
    listed = ", or for one array with one axis a list of a pair for each entry" if flat else ""
    raise InputError(f"bounds={_trees.summary(bounds)} is not a pair. {_PAIR}{listed}.")


def _are_pairs(bounds: Any, count: int) -> bool:
    """Tell whether it is a list of so many (low, high). A tuple of two is (lower, upper) if its parts are arrays."""
    if isinstance(bounds, np.ndarray):
        return bounds.shape == (count, 2) and count != 2
    if not isinstance(bounds, list | tuple) or len(bounds) != count:
        return False
    is_number = lambda x: x is None or (_trees.is_array(x) and np.ndim(x) == 0)
    return all(isinstance(pair, tuple | list) and len(pair) == 2 and all(map(is_number, pair)) for pair in bounds)


def _spread(name: str, bound: Any, sign: int, objective: Objective) -> PyTree:
    """Return an array, in its dtype, for each leaf that is optimised."""
    is_none = lambda node: node is None
    whole = objective.whole(objective.params)
    try:
        # Whether each bound names its leaf.
        own = jax.tree.structure(bound, is_leaf=is_none) == jax.tree.structure(whole, is_leaf=is_none)
        filled = jax.tree.map(lambda leaf: sign * math.inf if leaf is None else leaf, bound, is_leaf=is_none)
        leaves = _trees.spread(filled, whole)
    except (ValueError, TypeError) as error:
        # SciPy's bounds are lists, which are trees here.
        cure = " For an array, pass np.array([...]) instead of a list." if isinstance(bound, list | tuple) else ""
        raise InputError(f"{name}={_trees.summary(bound)} does not fit params. {_PAIR}.{cure} ({error})") from error
    paths = jax.tree_util.tree_leaves_with_path(whole)
    for (path, leaf), entry, kept in zip(paths, leaves, objective.rest.kept, strict=True):
        if own and not kept and _trees.is_array(leaf) and not _is_open(entry):
            raise InputError(
                f"{_trees.path_name(path, name)} is a bound for {_trees.path_name(path)}, which is not optimised. Pass "
                "None there."
            )
    tree = objective.rest.only(leaves)
    return jax.tree_util.tree_map_with_path(lambda path, leaf, b: _bound(path, name, leaf, b), objective.params, tree)


def _is_open(bound: Any) -> bool:
    return _trees.is_array(bound) and not _jax.is_tracer(bound) and bool(np.isinf(np.asarray(bound)).all())


def _bound(path: tuple, name: str, leaf: jax.Array, bound: Any) -> Any:
    """Return one bound in the dtype of its leaf."""
    name = _trees.path_name(path, name)
    if why := fault(bound, carried=True):
        raise InputError(f"{name} {why}.")
    if not _trees.is_array(bound) or _trees.is_key(bound) or jnp.result_type(bound).kind in "bc":
        raise InputError(f"{name} is {bound!r}. Pass a real number, an array of them, or None for no bound.")
    try:
        fits = np.broadcast_shapes(np.shape(bound), leaf.shape) == leaf.shape
    except ValueError:
        fits = False
    if not fits:
        raise InputError(
            f"{name} has shape {np.shape(bound)}, but {_trees.path_name(path)} has {leaf.shape}. Pass one number, or "
            "an array of that shape."
        )
    if isinstance(bound, jax.Array):
        array: Any = bound.astype(leaf.dtype)
    else:
        with np.errstate(over="ignore"):
            array = np.asarray(bound).astype(leaf.dtype)
    return array if np.ndim(array) == 0 else jnp.broadcast_to(array, leaf.shape)


def _paths(params: PyTree, *trees: PyTree) -> list[tuple]:
    paths = jax.tree_util.tree_leaves_with_path(params)
    others = zip(*map(jax.tree.leaves, trees), strict=True)
    return [(path, leaf, *rest) for (path, leaf), rest in zip(paths, others, strict=True)]


def _check_order(path: tuple, leaf: jax.Array, lower: Any, upper: Any) -> None:
    """Raise InputError for bounds with no number between them."""
    if not _trees.have_values(lower, upper):
        return
    low, high = (np.broadcast_to(_trees.on_host(bound), leaf.shape) for bound in (lower, upper))
    for name, bound, missing in zip(_NAMES, (low, high), (np.inf, -np.inf), strict=True):
        if np.isnan(bound).any() or (bound == missing).any():
            bad = np.argwhere(np.isnan(bound) | (bound == missing))[0]
            raise InputError(
                f"{_trees.path_name(path, name)} holds {bound[tuple(bad)]}{_at(bad)}. Pass a number, or None for no "
                "bound."
            )
    if (low > high).any():
        bad = np.argwhere(low > high)[0]
        place = tuple(bad)
        raise InputError(
            f"bounds of {_trees.path_name(path)} have the lower one above the upper one{_at(bad)}: {low[place]} > "
            f"{high[place]}. Pass lower <= upper."
        )


def _nan_if_crossed(lower: Any, upper: Any) -> Any:
    """Return lower bounds; NaN where traced ones, which cannot raise, have no number between them."""
    return lower if _trees.have_values(lower, upper) else jnp.where(lower <= upper, lower, jnp.nan)


def _at(index: Any) -> str:
    at = tuple(map(int, index))
    return f" at index {at}" if at else ""


def _within(params: PyTree, bounds: tuple[PyTree, PyTree]) -> PyTree:
    """Return the start within the bounds, and warn if it had to be moved."""
    moved = []

    def clip(path: tuple, leaf: jax.Array, lower: Any, upper: Any) -> jax.Array:
        if not _trees.have_values(leaf, lower, upper):
            return jnp.clip(leaf, lower, upper)
        here = _trees.on_host(leaf)
        there = np.clip(here, _trees.on_host(lower), _trees.on_host(upper))
        if (here == there).all():
            return leaf
        bad = np.argwhere(here != there)[0]
        moved.append(f"{_trees.path_name(path)} starts with {here[tuple(bad)]}{_at(bad)}")
        there = there.astype(leaf.dtype)  # NumPy makes float32 of bfloat16.
        return _trees.on_device(there) if leaf.size <= _trees.SMALL else jnp.clip(leaf, lower, upper)

    with own_work(), own_promotion():
        start = jax.tree_util.tree_map_with_path(clip, params, *bounds)
    if moved:
        warn(f"{moved[0]}, which is outside of its bounds. The run starts at the nearest point within them.")
    return start


def _whole(objective: Objective, function: Callable, name: str) -> Callable[..., PyTree]:
    """Make a function of the optimised leaves of one that takes and returns the whole params."""
    rest = objective.rest

    def step(params: PyTree, *rate: Any) -> PyTree:
        whole = rest.combine(params)
        try:
            out = function(whole, *rate)
        except InputError:
            raise
        except Exception as error:
            error.add_note(f"gdopt: raised by {name}={function!r}, called with {'params, rate' if rate else 'params'}.")
            raise
        try:
            leaves = rest.treedef.flatten_up_to(out)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{name} returned {_trees.summary(out)} for params={_trees.summary(whole)}. Return the same structure. "
                f"({error})"
            ) from error
        same = lambda path, x, new: _same_kind(path, name, x, new)
        return jax.tree_util.tree_map_with_path(same, params, rest.only(leaves))

    return step


def _same_kind(path: tuple, name: str, leaf: jax.Array, new: Any) -> jax.Array:
    """Return a leaf of a step; raise InputError if it has another shape or dtype."""
    if not _trees.is_array(new):
        raise InputError(
            f"{name} returned a {type(new).__name__} for {_trees.path_name(path)}. Return the same structure."
        )
    shape, dtype = np.shape(new), jnp.result_type(new)
    if (shape, dtype) != (leaf.shape, leaf.dtype):
        raise InputError(
            f"{name} returned {dtype}{list(shape)} for {_trees.path_name(path)}, which is {leaf.dtype}"
            f"{list(leaf.shape)}. Return the same shape and dtype."
        )
    return jnp.asarray(new)


def _run(step: Callable, *args: PyTree) -> PyTree:
    """Call a step compiled; equal ones share the program."""
    return program.share(step, *args).call(*args)


def _rate(params: PyTree) -> jax.Array:
    """Return a rate of 1 in the dtype of norms."""
    return _trees.on_device(np.ones((), _trees.norm_dtype(params)))


def _check_step(params: PyTree, step: Callable, name: str, *rate: Any) -> None:
    """Trace the function once: its own checks name what is wrong."""
    try:
        jax.eval_shape(step, params, *rate)
    except TypeError as error:
        raise InputError(f"{name}= cannot be called as {_TAKES[name]}. ({error})") from error


def _check_rest(objective: Objective, function: Callable, name: str, *rate: Any) -> None:
    """Raise InputError if the step of the params depends on a leaf that it moves, but that is not optimised.

    The run drops what the function returns for such leaves. That is right if it treats each leaf by itself.
    """
    rest = objective.rest
    given = {number: leaf for number, leaf in enumerate(rest.leaves()) if _trees.is_array(leaf)}

    def both(params: PyTree, *rate: Any) -> tuple[PyTree, PyTree, dict[int, Any]]:
        """Return the step; the same with these leaves moved; and the leaves that may be moved."""
        whole = rest.combine(params)
        leaves = rest.treedef.flatten_up_to(function(whole, *rate))
        moved = {number: leaves[number] for number, leaf in given.items() if leaves[number] is not leaf}
        mixed = [moved.get(number, leaf) for number, leaf in enumerate(rest.treedef.flatten_up_to(whole))]
        again = rest.treedef.flatten_up_to(function(rest.treedef.unflatten(mixed), *rate))
        return rest.only(leaves), rest.only(again), moved

    if not given or not jax.eval_shape(both, objective.params, *rate)[2]:
        return
    for point in _beside(objective.params):  # A start within the set moves nothing.
        step, again, moved = _run(both, point, *rate)
        if any(_differs(one, other) for _, one, other in _paths(step, again)):
            paths = jax.tree_util.tree_leaves_with_path(rest.combine(objective.params))
            raise InputError(
                f"{name} moves {_trees.path_name(paths[min(moved)][0])} together with the params, but it is not "
                f"optimised. Leave it out of {name}, or let trainable= include it."
            )


def _penalty(objective: Objective, prox: Callable) -> Callable[[PyTree], Any] | None:
    """Return the penalty of a prox, if it has one."""
    value = getattr(prox, "value", None)
    if not callable(value):
        return None

    def penalty(params: PyTree) -> jax.Array:
        out = jnp.asarray(value(objective.rest.combine(params)))
        if out.shape != () or not jnp.issubdtype(out.dtype, jnp.floating):
            raise InputError(f"prox.value returned {out.dtype}{list(out.shape)}. Return a real scalar.")
        return out

    return penalty


_INFINITE = "the penalty of prox= is infinite at the start. The run begins at the point that prox returns for it."


def _where_finite(objective: Objective, step: Callable, penalty: Callable | None) -> Objective:
    """Return the objective; if the penalty is infinite at its start, as outside of a set, begin at the prox of it."""
    params = objective.params
    if penalty is None or not _trees.have_values(*jax.tree.leaves(params)):
        return objective
    value = penalty(params)
    if not _trees.have_values(value) or not np.isposinf(_trees.on_host(value)):
        return objective
    warn(_INFINITE)
    return objective._replace(params=_run(step, params, _rate(params)))


def _projected(problem: Problem, step: Callable) -> Problem:
    """Return the problem with its start projected, and warn if that moved it."""
    start = problem.objective.params
    there = _run(step, start)
    problem = problem._replace(objective=problem.objective._replace(params=there), constraint=Constraint(project=step))
    if not _trees.have_values(*jax.tree.leaves((start, there))):
        return problem  # Within jit, what project returns for a known start is traced, too.
    _check_projected(there)
    _check_idempotent(step, start)
    _warn_if_moved(start, there)
    return problem


def _check_projected(there: PyTree) -> None:
    """Raise InputError for a projection that is not finite at the start."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(there):
        bad = (values := _trees.on_host(leaf))[~np.isfinite(values)]
        if bad.size:
            raise InputError(
                f"project returned {bad[0]} for {_trees.path_name(path)} at the start. Start where it is finite."
            )


def _warn_if_moved(start: PyTree, there: PyTree) -> None:
    """Warn if the projection has moved the start."""
    for path, leaf, new in _paths(start, there):
        if _differs(leaf, new):
            warn(
                f"{_trees.path_name(path)} starts outside of the set of project=. The run starts at the point that "
                "project returns for it."
            )
            break


def _check_idempotent(step: Callable, start: PyTree) -> None:
    """Raise InputError if the projection of the start, or of a point beside it, is moved by another one.

    A projection rounds by the largest entry that it was given, also where the set is far smaller.
    """
    for point in _beside(start):
        size = max(float(np.max(np.abs(_trees.on_host(leaf)), initial=0)) for leaf in jax.tree.leaves(point))
        there = _run(step, point)
        for path, leaf, new in _paths(there, _run(step, there)):
            if _differs(leaf, new, size):
                raise InputError(
                    f"project moves its own result: {_trees.path_name(path)} changes if it is projected twice. Pass a "
                    "projection, that is, the nearest point of a convex set."
                )


def _beside(params: PyTree) -> list[PyTree]:
    """Return params, and a point beside them if they are known."""
    known = _trees.have_values(*jax.tree.leaves(params))
    return [params, jax.tree.map(_shaken, params)] if known else [params]


def _shaken(leaf: jax.Array) -> jax.Array:
    chance = np.sin(1e3 * np.arange(1, leaf.size + 1)).reshape(leaf.shape)
    return leaf + (chance * np.maximum(np.max(np.abs(_trees.on_host(leaf)), initial=0), 1)).astype(leaf.dtype)


def _differs(leaf: jax.Array, new: jax.Array, size: float = 0.0) -> bool:
    """Tell whether two leaves differ by more than rounding; entries as large as ``size`` may have rounded, too."""
    if not _trees.have_values(leaf, new):
        return False
    a, b = _trees.on_host(leaf), _trees.on_host(new)
    size = max(size, np.max(np.abs(a), initial=0), np.max(np.abs(b), initial=0))
    return bool(np.max(np.abs(a - b), initial=0) > _MOVES * float(jnp.finfo(leaf.dtype).eps) * size)


class Entrance(NamedTuple):
    """The way of a start into the set, compiled once for many starts."""

    bounds: tuple[PyTree, PyTree] | None = None  # in the units in which params are given
    project: program.Shared | None = None
    prox: program.Shared | None = None
    penalty: program.Shared | None = None

    def __call__(self, params: PyTree) -> PyTree:
        """Return the start that `constrained` would make of these params, with its warnings."""
        if self.bounds is not None:
            return _within(params, self.bounds)
        with own_work(), own_promotion():
            if self.project is not None:
                there = self.project.call(params)
                if _trees.have_values(*jax.tree.leaves((params, there))):
                    _check_projected(there)
                    _warn_if_moved(params, there)
                return there
            if self.prox is None or self.penalty is None or not _trees.have_values(*jax.tree.leaves(params)):
                return params
            value = self.penalty.call(params)
            if not _trees.have_values(value) or not np.isposinf(_trees.on_host(value)):
                return params
            warn(_INFINITE)
            return self.prox.call(params, _rate(params))


def frozen(constraint: Constraint | None, start: PyTree) -> tuple[Constraint | None, Entrance]:
    """Return a constraint with its functions as they are now, and the way of other starts into its set."""
    if constraint is None or constraint.bounds is not None:
        return constraint, Entrance(None if constraint is None else constraint.bounds)
    given = {"project": (start,), "prox": (start, _rate(start)), "penalty": (start,)}
    functions = {name: function for name in given if (function := getattr(constraint, name)) is not None}
    with own_work(), own_promotion():
        made = {name: _as_it_is(function, *given[name]) for name, function in functions.items()}
        shared = {name: program.share(function, *given[name]) for name, function in made.items()}
        for name, ready in shared.items():
            ready.call(*given[name])  # This compiles it.
    return constraint._replace(**made), Entrance()._replace(**shared)


def _as_it_is(function: Callable, *args: PyTree) -> Callable[..., PyTree]:
    """Return the function as its trace of now."""
    traced = program.trace(function, *args, rules=True, owned=True)
    return lambda *args: traced.replay(traced.constants, *args)
