"""An optimizer and its rate as the loop uses them: checked to fit together, with one interface for all kinds."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Generator, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdopt import _error_notes, _trees
from gdopt._errors import InputError
from gdopt._optimizers import trials
from gdopt._optimizers.distance import rate_of_distance
from gdopt._optimizers.factory import function_identity, is_transformation
from gdopt._optimizers.identity import identity_of
from gdopt._optimizers.optax_state import apply, check_fits, extra_arguments, owned_rate, restarted, trials_in
from gdopt._optimizers.quasi_newton import PAIRS, affordable_memory, quasi_newton
from gdopt._optimizers.spectral import check_learning_rate, gd, spectral
from gdopt._types import Optimizer, PyTree, Schedule


class Rates(enum.Enum):
    """The party that decided the rates of a run, which determines what a message suggests to try next."""

    PLAIN = "given, and each step was x - lr * g"
    GIVEN = "given to another optimizer"
    OWNED = "the optimizer's own"
    SEARCHED = "found by trial at each step"


# A number, a schedule, or the rates of a range test one by one; None if the optimizer owns it.
Rate = float | Schedule | np.ndarray | jax.Array | None


class Method(NamedTuple):
    """An optimizer with its rate, checked to fit together."""

    optimizer: Any
    rate: Rate = None
    chosen: int | None = None  # the number of pairs, if gdopt chose `quasi_newton`
    tried: int | None = None  # the number of tries before this one, if gdopt chose the rates
    lower: Callable[[], Method] | None = None  # the method of another try, should this one fail

    @property
    def owns_rate(self) -> bool:
        """Tell whether the optimizer is a transformation with its own rate: see `rate_used`."""
        return self.rate is None

    def rates(self, state: PyTree) -> Rates:
        """Tell who decides the rates, by the optimizer's state: one of its parts may search for them."""
        if trials_in(state) is not None:
            return Rates.SEARCHED
        if self.owns_rate:
            return Rates.OWNED
        return Rates.PLAIN if self.optimizer is gd or self.optimizer is optax.sgd else Rates.GIVEN

    def rate_used(self, rate: Any, state: PyTree) -> Any:
        """Return the rate of the last update, which was ``rate`` if the optimizer does not own it."""
        if self.owns_rate:
            return owned_rate(state)
        return rate_of_distance(state, rate)

    def with_rate(self, rate: Any) -> Any:
        """Build the transformation for a rate inside the trace, so that no rate is ever compiled in."""
        if self.owns_rate:
            return self.optimizer
        built = self.optimizer(rate)
        if not is_transformation(built):
            raise InputError(
                f"optimizer={self.optimizer!r} returned a {type(built).__name__} for a learning rate. Pass a factory "
                "that returns an optax transformation (for example optax.adam)."
            )
        return built

    @property
    def keeps_its_state(self) -> bool:
        """Tell whether the update leaves the state as it is if it is told that it is not made: see `trials.update`.

        A wrapper may not pass that on.
        """
        return self.owns_rate and getattr(self.optimizer, "update", None) is trials.update

    def init(self, rate: Any, params: PyTree) -> PyTree:
        """Return the optimizer's state before the first update."""
        with self.told():
            return self.with_rate(rate).init(params)

    def begin(self, rate: Any, params: PyTree, given: PyTree) -> PyTree:
        """Return the optimizer's state before the first update: the one ``given``, if it fits, or a fresh one."""
        if given is None:
            return self.init(rate, params)
        check_fits(given, jax.eval_shape(self.init, rate, params))
        return restarted(given)  # A search compares losses, and this loss may be another one.

    def update(
        self,
        rate: Any,
        updates: PyTree,
        state: PyTree,
        params: PyTree,
        loss: Callable,
        value: jax.Array,
        **of_searches: Any,
    ) -> tuple[PyTree, PyTree]:
        """The optimizer's update at a rate, where the loss has this value; the others are for those that search."""
        with self.told():
            extras = extra_arguments(loss, value, updates, **of_searches)
            out = apply(self.with_rate(rate), updates, state, params, **extras)
        if not (isinstance(out, tuple | list) and len(out) == 2):
            raise InputError(
                f"optimizer={self.optimizer!r} has an update that returned a {type(out).__name__}. Return (updates, "
                "state)."
            )
        for what, new, old in (("updates", out[0], params), ("a state", out[1], state)):
            if not _fits(new, old):
                raise InputError(
                    f"optimizer={self.optimizer!r} returned {what} with another structure or other shapes than it "
                    f"received: {_trees.summary(new)} instead of {_trees.summary(old)}. Return the same structure."
                )
        return tuple(out)

    @contextlib.contextmanager
    def told(self) -> Generator[None]:
        """Name the optimizer in its errors: many functions that take one argument look like a factory."""
        try:
            yield
        except (AttributeError, TypeError) as error:
            raise InputError(
                f"optimizer={self.optimizer!r} does not work as an optimizer. Pass an optax transformation (for "
                "example optax.adam(1e-3)) or a factory learning_rate -> transformation (for example optax.adam), and "
                f"check which params it takes. ({type(error).__name__}: {error})"
            ) from error
        except Exception as error:
            if not isinstance(error, InputError):
                error.add_note(f"gdopt: raised by optimizer={self.optimizer!r} during tracing.")
            raise

    @property
    def schedule(self) -> Any:
        """The schedule, if the rate is one."""
        return self.rate if callable(self.rate) else None

    def rate_at(self, step: jax.Array) -> Any:
        """Return the schedule's rate of a step."""
        schedule = self.schedule
        try:
            rate = schedule(step)
        except TypeError as error:  # JAX also raises type errors for Python's `if` on traced values.
            hint = _error_notes.hint(error)
            raise InputError(
                f"learning_rate={schedule!r} does not work as a schedule, which is called with the step, a traced "
                f"integer{hint and ': '}{hint}. ({error})"
            ) from error
        except Exception as error:
            error.add_note(f"gdopt: raised by learning_rate={schedule!r}, called with the step, a traced integer.")
            raise
        if not _trees.is_array(rate) or jnp.ndim(rate) != 0:
            what = f"shape {jnp.shape(rate)}" if _trees.is_array(rate) else f"a {type(rate).__name__}"
            other = " Pass an optimizer as optimizer=." if is_transformation(rate) else ""
            raise InputError(f"the schedule returned {what} for a step. Return one number.{other}")
        dtype = jnp.result_type(rate)
        if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
            raise InputError(f"the schedule returned dtype {dtype} for a step. Return one real number.")
        return rate

    @property
    def name(self) -> str:
        """The name of an optimizer that gdopt chose, for messages; "" for others."""
        if self.chosen is None:
            return ""
        fewer = "" if self.chosen == PAIRS else f"(memory={self.chosen}), because more pairs would take too much memory"
        return f"gdopt.quasi_newton{fewer}"

    @property
    def may_project(self) -> bool:
        """Tell whether the optimizer may hold params at a bound, as a composed or an unknown one may."""
        parts = (self.optimizer.init, self.optimizer.update) if self.owns_rate else (self.optimizer,)
        return None in map(function_identity, parts)

    @property
    def identity(self) -> Hashable | None:
        """An identity, equal only for optimizers that make the same updates; None if only their traces show that."""
        if not self.owns_rate:
            return function_identity(self.optimizer)
        both = identity_of(self.optimizer.init), identity_of(self.optimizer.update)
        return None if None in both else both


def _fits(new: PyTree, old: PyTree) -> bool:
    """Tell whether the structures are equal, and the new shapes broadcast to the old ones."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        return False
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    try:
        return all(np.broadcast_shapes(np.shape(x), np.shape(y)) == np.shape(y) for x, y in pairs)
    except ValueError:
        return False


def check_rate(optimizer: Optimizer | None, learning_rate: Any) -> Any:
    """Return the rate, checked; raise InputError if it does not fit the optimizer, or is no rate."""
    if is_transformation(optimizer):
        if not is_auto(learning_rate):
            raise InputError(
                f"learning_rate={learning_rate!r} was given with an optimizer that owns its rate. Leave learning_rate "
                "out, or pass the factory itself (for example optax.adam instead of optax.adam(1e-3))."
            )
        return learning_rate
    if learning_rate is None:
        raise InputError('learning_rate=None is no rate. Pass a number or a schedule, or leave it out for "auto".')
    return learning_rate if is_auto(learning_rate) else check_learning_rate(learning_rate)


def make_method(optimizer: Optimizer | None, learning_rate: Any, params: PyTree = None) -> Method:
    """Check that either the optimizer or the caller decides the rate.

    "auto" stands for `spectral`, and without an optimizer for `quasi_newton` with as many pairs as there is memory for.
    """
    checked = check_rate(optimizer, learning_rate)
    if is_transformation(optimizer):
        return Method(optimizer)
    if is_auto(learning_rate):
        if optimizer is not None:
            return Method(spectral())
        memory = affordable_memory(params)
        return Method(quasi_newton(memory), chosen=memory)
    return Method(optimizer, checked)


def is_auto(learning_rate: Any) -> bool:
    """Tell whether gdopt is to choose the rate."""
    return isinstance(learning_rate, str) and learning_rate == "auto"
