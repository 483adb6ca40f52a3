"""An optimizer and its rate as the loop uses them: checked to fit together, and asked in one way whatever they are."""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Hashable, Iterator
from types import FunctionType, NoneType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import ScheduleFreeState, schedule_free_eval_params

from gdopt import _error_notes, _trees
from gdopt._errors import InputError
from gdopt._optimizers.quasi_newton import PAIRS, QuasiNewtonState, affordable_memory, quasi_newton
from gdopt._optimizers.spectral import check_learning_rate, gd, spectral
from gdopt._optimizers.trials import Trials
from gdopt._types import Optimizer, PyTree, Schedule


class Rates(enum.Enum):
    """Who decided the rates of a run, which says what to try next."""

    PLAIN = "given, and each step was x - lr * g"
    GIVEN = "given to another optimizer"
    OWNED = "the optimizer's own"
    SEARCHED = "found by trial at each step"


class Rule(NamedTuple):
    """An optimizer and its rate, checked to fit together."""

    optimizer: Any
    schedule: Schedule | None = None  # None: the rate is a number, or the optimizer owns it
    rate: float = float("nan")  # of the number; NaN where a schedule or the optimizer has it
    chosen: int | None = None  # the pairs of the `quasi_newton` that the caller left to be chosen

    @property
    def rates(self) -> Rates:
        """Who decides the rates; whether an optimizer searches for them, its state tells: see `search`."""
        if self.owns_rate:
            return Rates.OWNED
        return Rates.PLAIN if self.optimizer is gd or self.optimizer is optax.sgd else Rates.GIVEN

    @property
    def owns_rate(self) -> bool:
        """Tell whether the optimizer is ready and has its own rate: see `owned_rate`."""
        return is_transformation(self.optimizer)

    def with_rate(self, rate: Any) -> Any:
        """The transformation for a rate, built inside the trace, so that no rate is ever compiled in."""
        if self.owns_rate:
            return self.optimizer
        built = self.optimizer(rate)
        if not is_transformation(built):
            raise InputError(
                f"optimizer={self.optimizer!r} returned a {type(built).__name__} for a learning rate: a factory such "
                "as optax.adam returns an optax transformation."
            )
        return built

    def init(self, rate: Any, params: PyTree) -> PyTree:
        """The optimizer's state before the first update."""
        with self._told():
            return self.with_rate(rate).init(params)

    def update(self, rate: Any, updates: PyTree, state: PyTree, params: PyTree, **extras: Any) -> tuple[PyTree, PyTree]:
        """The optimizer's update at a rate; see `apply`."""
        with self._told():
            out = apply(self.with_rate(rate), updates, state, params, **extras)
        if not (isinstance(out, tuple | list) and len(out) == 2):
            raise InputError(
                f"optimizer={self.optimizer!r} has an update that returned a {type(out).__name__}: return (updates, "
                "state)."
            )
        for what, new, old in (("updates", out[0], params), ("a state", out[1], state)):
            if not _fits(new, old):
                raise InputError(
                    f"optimizer={self.optimizer!r} returned {what} of another structure or other shapes than it was "
                    f"given: {_trees.summary(new)} in place of {_trees.summary(old)}."
                )
        return tuple(out)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the optimizer, with its name: many functions that take one argument look like a factory."""
        try:
            yield
        except (AttributeError, TypeError) as error:
            raise InputError(
                f"optimizer={self.optimizer!r} does not work as one: pass an optax transformation such as "
                "optax.adam(1e-3), or a factory learning_rate -> transformation such as optax.adam; and see what it "
                f"takes as params. ({type(error).__name__}: {error})"
            ) from error
        except Exception as error:
            if not isinstance(error, InputError):
                error.add_note(f"gdopt: raised by optimizer={self.optimizer!r}, as it was traced.")
            raise

    def rate_at(self, step: jax.Array) -> Any:
        """The schedule's rate of a step."""
        schedule: Any = self.schedule
        try:
            rate = schedule(step)
        except TypeError as error:  # JAX's complaints of Python's `if` on traced values are type errors, too
            hint = _error_notes.hint(error)
            raise InputError(
                f"learning_rate={schedule!r} does not work as a schedule: it is called with the step, a traced "
                f"integer{hint and ': '}{hint}. ({error})"
            ) from error
        except Exception as error:
            error.add_note(f"gdopt: raised by learning_rate={schedule!r}, called with the step, a traced integer.")
            raise
        if not _trees.is_array(rate) or jnp.ndim(rate) != 0:
            what = f"shape {jnp.shape(rate)}" if _trees.is_array(rate) else f"a {type(rate).__name__}"
            other = " An optimizer is given as optimizer=." if is_transformation(rate) else ""
            raise InputError(f"the schedule gave {what} for a step: return one number.{other}")
        dtype = jnp.result_type(rate)
        if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
            raise InputError(f"the schedule gave dtype {dtype} for a step: return one real number.")
        return rate

    @property
    def name(self) -> str:
        """The name for messages of an optimizer that gdopt chose; "" for others."""
        if self.chosen is None:
            return ""
        fewer = "" if self.chosen == PAIRS else f"(memory={self.chosen}), as more pairs would take too much memory"
        return f"gdopt.quasi_newton{fewer}"

    @property
    def may_project(self) -> bool:
        """Tell whether the optimizer may hold params at a bound: one that is put together, or not known, may."""
        return _identity(self.optimizer) is None and self.identity is None

    @property
    def identity(self) -> Hashable | None:
        """Equal only for optimizers that make the same updates; None where that shows in their trace alone."""
        if not self.owns_rate:
            return _identity(self.optimizer)
        both = _identity(self.optimizer.init), _identity(self.optimizer.update)
        return None if None in both else both


def _identity(function: Any) -> Hashable | None:
    """The identity of a function that nobody changes, or of a partial that gives numbers to one; None for others."""
    if type(function) is not functools.partial:
        return function if _is_fixed(function) else None
    numbers = (*function.args, *function.keywords.values())
    if not _is_fixed(function.func) or not all(type(x) in (bool, int, float, str, NoneType) for x in numbers):
        return None
    return function.func, tuple(function.keywords), tuple((type(x), repr(x)) for x in numbers)


def _is_fixed(function: Any) -> bool:
    """Tell whether it is one of optax's or gdopt's own functions, which nobody changes, and closes over nothing."""
    if not isinstance(function, FunctionType) or function.__closure__:
        return False
    name = function.__module__ or ""
    return name.split(".")[0] in ("gdopt", "optax") and vars(sys.modules[name]).get(function.__name__) is function


def _fits(new: PyTree, old: PyTree) -> bool:
    """Tell whether the structures are one, and the shapes come to be the old ones by broadcasting."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        return False
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    try:
        return all(np.broadcast_shapes(np.shape(x), np.shape(y)) == np.shape(y) for x, y in pairs)
    except ValueError:
        return False


def make_rule(optimizer: Optimizer | None, learning_rate: Any, params: PyTree = None) -> Rule:
    """Check that one party decides the rate, the optimizer or the caller.

    "auto" makes it `spectral`, and without an optimizer `quasi_newton`, with as many pairs as there is memory for.
    """
    if is_transformation(optimizer):
        if not is_auto(learning_rate):
            raise InputError(
                f"learning_rate={learning_rate!r} was given with an optimizer that is ready and owns its rate: leave "
                "learning_rate out, or pass the factory itself, such as optax.adam in place of optax.adam(1e-3)."
            )
        return Rule(optimizer)
    if is_auto(learning_rate):
        if optimizer is not None:
            return Rule(spectral())
        memory = affordable_memory(params)
        return Rule(quasi_newton(memory), chosen=memory)
    if learning_rate is None:
        raise InputError("learning_rate=None: leave it out to have it chosen, or pass a number or a schedule.")
    checked = check_learning_rate(learning_rate)
    return Rule(optimizer, schedule=checked) if callable(checked) else Rule(optimizer, rate=checked)


def is_auto(learning_rate: Any) -> bool:
    """Tell whether the rate is to be chosen."""
    return isinstance(learning_rate, str) and learning_rate == "auto"


def check_optimizer(optimizer: Any, *, searched: bool) -> None:
    """Raise InputError for what is neither a transformation nor a factory.

    A rate is ``searched`` for with "auto" and in a range test. That makes sense only if the factory needs one.
    """
    if optimizer is None or is_transformation(optimizer):
        return
    if not callable(optimizer) or isinstance(optimizer, type):
        raise InputError(
            f"optimizer={optimizer!r} is unknown: pass an optax transformation such as optax.adam(1e-3), or a factory "
            "learning_rate -> transformation such as optax.adam or gdopt.gd."
        )
    try:
        known = _known.setdefault(optimizer, {})
    except TypeError:  # it is not hashable, or takes no weak reference
        known = {}
    if searched not in known:
        known[searched] = _no_factory(optimizer, searched)
    if why := known[searched]:
        raise InputError(f"optimizer={_name(optimizer)} {why}")


# What `_no_factory` says of a function, with and without a search: a signature takes as long as two checks of a call.
_known: weakref.WeakKeyDictionary[Any, dict[bool, str]] = weakref.WeakKeyDictionary()


def _no_factory(function: Any, searched: bool) -> str:
    """Say why a function does not make an optimizer of a learning rate, with the cure; "" if it may.

    Functions of optax's and gdopt's call the rate ``learning_rate``, or a name that ends like that, and put it first.
    If it has a default, the optimizer needs none: it chooses its own steps. Other functions may use any name.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions that are written in C have none
        return ""
    name, needed = _name(function), [p.name for p in signature.parameters.values() if p.default is p.empty]
    called = "." if name.startswith("<") else f": optimizer={name}({'...' if needed else ''})."
    if _is_optaxs(function):
        first = next(iter(signature.parameters.values()), None)
        if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD) or not _is_rate(first.name):
            return f"takes no learning rate, as optax.adam does. Pass the optimizer that it returns{called}"
        if first.default is not first.empty and searched:
            return (
                f"needs no learning rate: call it, optimizer={name}(). To search for a rate all the same, pass "
                f"optimizer=lambda rate: {name}(rate)."
            )
    try:
        signature.bind(0.1)
    except TypeError:
        if not signature.parameters:
            return f"takes no learning rate. Pass the optimizer that it returns{called}"
        others = ", ".join(f"{other}=..." for other in needed[1:])
        if not others:
            return "takes no learning rate as its first argument: pass a function that does."
        return f"needs more than a learning rate. Pass functools.partial of it, with {others}."
    return ""


def _is_rate(name: str) -> bool:
    return name.endswith("learning_rate")


def _is_optaxs(function: Any) -> bool:
    """Tell whether a function, or what a partial calls, is one of optax's or gdopt's."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", None)).split(".")[0] in ("optax", "gdopt")


def _name(function: Any) -> str:
    """The function as one writes it, if it is public in optax or gdopt; otherwise its repr."""
    if isinstance(function, functools.partial):
        return f"functools.partial({_name(function.func)}, ...)"
    for place in ("optax", "optax.contrib", "gdopt"):
        name = getattr(function, "__name__", "")
        if name and vars(sys.modules[place]).get(name) is function:
            return f"{place}.{name}"
    return repr(function)


def is_transformation(optimizer: Any) -> bool:
    """Tell whether it is ready: optax's protocol is a pair of functions (MultiSteps has it without being a tuple)."""
    if isinstance(optimizer, type):  # the class itself, MultiSteps say
        return False
    return callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))


def apply(
    transformation: Any, updates: PyTree, state: PyTree, params: PyTree, /, **extras: Any
) -> tuple[PyTree, PyTree]:
    """``update`` with those of the extra arguments that it takes: some optimizers need them and others reject them.

    What it takes cannot be read off: wrappers declare that they take everything, and hand it on to what does not.
    """
    while True:
        try:
            return transformation.update(updates, state, params, **extras)
        except TypeError as error:
            refused = re.search(r"(?:unexpected keyword argument|multiple values for argument) '(\w+)'", str(error))
            if not refused or refused[1] not in extras:
                raise
            del extras[refused[1]]


def extra_arguments(loss: Callable[[PyTree], jax.Array], value: jax.Array, grad: PyTree) -> dict[str, Any]:
    """All that the update of an optimizer may ask for, under each of the names that optax has for it."""

    # optax's line searches refuse extra arguments that nobody takes: these names are for other optimizers.
    def value_fn(params: PyTree, obj_fn: Any = None, grad_fn: Any = None) -> jax.Array:
        return loss(params)

    def grad_fn(params: PyTree, _: Any) -> PyTree:
        return jax.tree.map(jnp.conj, jax.grad(value_fn)(params))

    return {"value": value, "grad": grad, "value_fn": value_fn, "obj_fn": value_fn, "grad_fn": grad_fn}


def evaluation_params(state: PyTree, params: PyTree) -> PyTree:
    """Return the optimizer's answer: the params, or the average that schedule-free methods keep."""
    for averaged in _parts(state, ScheduleFreeState):

        def evaluate(z: Any, y: Any, averaged: Any = averaged) -> Any:
            if isinstance(z, optax.MaskedNode):  # left to another optimizer
                return y
            return schedule_free_eval_params(averaged._replace(z=z), y).astype(y.dtype)

        params = jax.tree.map(evaluate, averaged.z, params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    return params


def owned_rate(state: PyTree) -> jax.Array:
    """The rate of the last update of an optimizer that owns it, by optax's name for it; NaN where it does not tell."""
    found = [leaf for _, leaf in optax.tree.get_all_with_path(state, "learning_rate") if _trees.is_array(leaf)]
    rates = [rate for rate in found if jnp.ndim(rate) == 0]
    return rates[0] if len(rates) == 1 else jnp.asarray(jnp.nan)


def inject(state: PyTree, rate: jax.Array) -> PyTree:
    """The state with this rate in it, where ``optax.inject_hyperparams`` keeps one: it would go on with its first."""
    kept = [part for part in _parts(state, optax.InjectStatefulHyperparamsState) if "learning_rate" in part.hyperparams]
    if len(kept) != 1:
        return state

    def replace(node: Any) -> Any:
        if node is not kept[0]:
            return node
        old = node.hyperparams["learning_rate"]
        return node._replace(hyperparams={**node.hyperparams, "learning_rate": rate.astype(old.dtype)})

    return jax.tree.map(replace, state, is_leaf=lambda node: node is kept[0])


def search(state: PyTree) -> Trials | None:
    """The trials of an optimizer that takes bad points back, wherever they stand in its state; None for all others."""
    return next(iter(_parts(state, Trials)), None)


def restarted(state: PyTree) -> PyTree:
    """The state of an optimizer that takes bad points back, in which the next one is where its search starts."""
    fresh = lambda node: node._replace(rejected=node.rejected * 0, accepted=node.accepted * 0)
    is_trials = lambda node: isinstance(node, Trials)
    return jax.tree.map(lambda node: fresh(node) if is_trials(node) else node, state, is_leaf=is_trials)


def learns_scales(state: PyTree) -> bool:
    """Tell whether an optimizer of ours learns a scale for each entry of the params."""
    return bool(_parts(state, QuasiNewtonState))


def _parts(state: PyTree, kind: type) -> list[Any]:
    """The states of this kind within an optimizer's."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]
