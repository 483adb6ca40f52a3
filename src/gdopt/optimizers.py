"""Vanilla gradient descent as an optax transformation, and what plugs in beside it."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax
from optax.contrib import ScheduleFreeState, schedule_free_eval_params

from gdopt import _trees
from gdopt._checks import number
from gdopt._types import Optimizer, PyTree, Scalar, Schedule
from gdopt.errors import InputError


def gd(learning_rate: Scalar | Schedule) -> optax.GradientTransformation:
    """Vanilla gradient descent, ``x - learning_rate * g``, as an optax transformation.

    Args:
        learning_rate: a positive number, or a schedule ``step -> rate``, step 0 first. May be traced.

    Returns:
        A transformation whose updates equal those of ``optax.sgd(learning_rate)`` bit for bit. It keeps no state but
        the step count of a schedule.

    Raises:
        InputError: for a rate that is negative, zero, NaN, infinite or not a scalar.

    Source: Cauchy, "Méthode générale pour la résolution des systèmes d'équations simultanées", 1847.

    Example:
        >>> import gdopt, jax, jax.numpy as jnp, optax
        >>> params = jnp.array([1.0, 2.0])
        >>> optimizer = gdopt.gd(0.1)
        >>> updates, state = optimizer.update(jax.grad(jnp.sum)(params), optimizer.init(params))
        >>> optax.apply_updates(params, updates)
        Array([0.9, 1.9], dtype=float32)
    """
    return optax.scale_by_learning_rate(check_learning_rate(learning_rate))


def check_learning_rate(learning_rate: Any) -> Any:
    """The rate as it plugs in: a schedule or a traced rate as it is, a number as Python's float.

    Python's float stays weakly typed in a trace: bfloat16 params keep their dtype then, and float64 ones their digits.
    """
    if callable(learning_rate):
        return learning_rate
    if isinstance(learning_rate, jax.core.Tracer):
        if learning_rate.shape != ():
            raise InputError(f"learning_rate has shape {learning_rate.shape}: pass one number for all parameters.")
        return learning_rate
    wanted = "a finite number above 0, such as 0.1, nor a schedule step -> rate"
    return number("learning_rate", learning_rate, lambda x: x > 0, wanted)


class Rule(NamedTuple):
    """An optimizer and its rate, checked to fit together."""

    optimizer: Any
    schedule: Schedule | None  # None: the rate is a number, or the optimizer owns it
    rate: float  # of the number; NaN where a schedule or the optimizer has it

    @property
    def plain(self) -> bool:
        """Whether each step is x - lr * g."""
        return self.optimizer is gd or self.optimizer is optax.sgd

    def at(self, step: jax.Array, rate: Any) -> tuple[Any, jax.Array]:
        """The transformation for a step and its rate, built inside the trace, so that no rate is ever compiled in."""
        if is_transformation(self.optimizer):
            return self.optimizer, jnp.asarray(jnp.nan)
        if self.schedule is not None:
            rate = _rate_at(self.schedule, step)
        built = self.optimizer(rate)
        if not is_transformation(built):
            raise InputError(
                f"optimizer={self.optimizer!r} returned a {type(built).__name__} for a learning rate: a factory such "
                "as optax.adam returns an optax transformation."
            )
        return built, jnp.asarray(rate)


def _rate_at(schedule: Schedule, step: jax.Array) -> Any:
    try:
        rate = schedule(step)
    except TypeError as error:  # JAX's complaints of Python's `if` on traced values are type errors, too
        raise InputError(
            f"learning_rate={schedule!r} does not work as a schedule: it is called with the step, a traced integer, so "
            f"choose with jnp.where instead of if. ({error})"
        ) from error
    if not _trees.is_array(rate) or jnp.ndim(rate) != 0:
        what = f"shape {jnp.shape(rate)}" if _trees.is_array(rate) else f"a {type(rate).__name__}"
        raise InputError(f"the schedule gave {what} for a step: return one number.")
    return rate


def make_rule(optimizer: Optimizer, learning_rate: Any) -> Rule:
    """Checks that the optimizer is one, and that it and not two parties decide the rate."""
    if is_transformation(optimizer):
        if learning_rate is not None:
            raise InputError(
                f"learning_rate={learning_rate!r} was given with an optimizer that is ready and owns its rate: leave "
                "learning_rate out, or pass the factory itself, such as optax.adam in place of optax.adam(1e-3)."
            )
        return Rule(optimizer, None, float("nan"))
    if not callable(optimizer) or isinstance(optimizer, type):
        raise InputError(
            f"optimizer={optimizer!r} is unknown: pass an optax transformation such as optax.adam(1e-3), or a factory "
            "learning_rate -> transformation such as optax.adam or gdopt.gd."
        )
    if learning_rate is None:
        raise InputError(
            "learning_rate was not given: pass a positive number such as 0.1 or a schedule step -> rate, or an "
            "optimizer that owns its rate, such as optax.lbfgs()."
        )
    checked = check_learning_rate(learning_rate)
    return Rule(optimizer, checked, float("nan")) if callable(checked) else Rule(optimizer, None, checked)


def is_transformation(optimizer: Any) -> bool:
    """Whether it is ready: optax's protocol is a pair of functions (MultiSteps has it without being a tuple)."""
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


def evaluation_params(state: PyTree, params: PyTree) -> PyTree:
    """Where the optimizer's answer lies: at the params, but for schedule-free methods at the average they keep."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, ScheduleFreeState))
    for averaged in (node for node in nodes if isinstance(node, ScheduleFreeState)):

        def evaluate(z: Any, y: Any, averaged: Any = averaged) -> Any:
            if isinstance(z, optax.MaskedNode):  # left to another optimizer
                return y
            return schedule_free_eval_params(averaged._replace(z=z), y).astype(y.dtype)

        params = jax.tree.map(evaluate, averaged.z, params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    return params
