"""An optimizer's update and state, with one interface for all optimizers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax.contrib import ScheduleFreeState, schedule_free_eval_params

from gdopt import _trees
from gdopt._errors import InputError
from gdopt._optimizers.quasi_newton import QuasiNewtonState
from gdopt._optimizers.trials import Trials
from gdopt._types import PyTree

_MOST_STEPS = 100_000  # the steps of an update after which counting them ends


def apply(
    transformation: Any, updates: PyTree, state: PyTree, params: PyTree, /, **extras: Any
) -> tuple[PyTree, PyTree]:
    """Call ``update`` with those extra arguments that it takes: some optimizers need them and others reject them.

    Its signature does not say what it takes: wrappers accept everything, and pass it on to others that do not.
    """
    while True:
        try:
            return transformation.update(updates, state, params, **extras)
        except TypeError as error:
            refused = re.search(r"(?:unexpected keyword argument|multiple values for argument) '(\w+)'", str(error))
            if not refused or refused[1] not in extras:
                raise
            del extras[refused[1]]


def extra_arguments(
    loss: Callable[[PyTree], jax.Array], value: jax.Array, grad: PyTree, **of_searches: Any
) -> dict[str, Any]:
    """Return all that the update of an optimizer may ask for, under each of the names that optax has for it.

    What is not None of the others is for gdopt's own searches: see `trials.update`.
    """

    # optax's line searches reject unknown extra arguments. These two names are for other optimizers.
    def value_fn(params: PyTree, obj_fn: Any = None, grad_fn: Any = None) -> jax.Array:
        return loss(params)

    def grad_fn(params: PyTree, _: Any) -> PyTree:
        return jax.tree.map(jnp.conj, jax.grad(value_fn)(params))

    given = {"value": value, "grad": grad, "value_fn": value_fn, "obj_fn": value_fn, "grad_fn": grad_fn}
    return given | {name: value for name, value in of_searches.items() if value is not None}


def evaluation_params(state: PyTree, params: PyTree) -> PyTree:
    """Return the optimizer's answer: the params, or the average that schedule-free methods keep."""
    for averaged in states_of(state, ScheduleFreeState):

        def evaluate(z: Any, y: Any, averaged: Any = averaged) -> Any:
            if isinstance(z, optax.MaskedNode):  # This leaf is left to another optimizer.
                return y
            return schedule_free_eval_params(averaged._replace(z=z), y).astype(y.dtype)

        params = jax.tree.map(evaluate, averaged.z, params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    return params


def owned_rate(state: PyTree) -> jax.Array:
    """Return the rate that the state reports of the last update, by optax's name for it; NaN if it reports none."""
    found = [leaf for _, leaf in optax.tree.get_all_with_path(state, "learning_rate") if _trees.is_array(leaf)]
    rates = [rate for rate in found if jnp.ndim(rate) == 0]
    return rates[0] if len(rates) == 1 else jnp.asarray(jnp.nan)


def inject(state: PyTree, rate: jax.Array) -> PyTree:
    """Put this rate into a state of ``optax.inject_hyperparams``, which would otherwise keep using its first rate."""
    kept = [
        part for part in states_of(state, optax.InjectStatefulHyperparamsState) if "learning_rate" in part.hyperparams
    ]
    if len(kept) != 1:
        return state

    def replace(node: Any) -> Any:
        if node is not kept[0]:
            return node
        old = node.hyperparams["learning_rate"]
        return node._replace(hyperparams={**node.hyperparams, "learning_rate": rate.astype(old.dtype)})

    return jax.tree.map(replace, state, is_leaf=lambda node: node is kept[0])


def steps_per_update(optimizer: Any, params: PyTree) -> int:
    """Return the number of steps that `optax.MultiSteps` accumulates for its first update; 1 without it.

    Its state does not hold the number, so its counter is run until it begins again, on gradients of zero.
    """
    if not states_of(jax.eval_shape(optimizer.init, params), optax.MultiStepsState):
        return 1

    def counted() -> jax.Array:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
        start = optimizer.init(zeros)
        extras = extra_arguments(lambda _: jnp.float32(0), jnp.float32(0), zeros)

        def step(count: jax.Array) -> jax.Array:
            # XLA drops all of the update but its counter, so this takes no memory for the params.
            _, state = apply(optimizer, zeros, _at_mini_step(start, count), zeros, **extras)
            following = states_of(state, optax.MultiStepsState)[0].mini_step
            return jnp.where(following == 0, -count - 1, count + 1)

        return -lax.while_loop(lambda count: (count >= 0) & (count < _MOST_STEPS), step, jnp.int32(0))

    return abs(int(jax.jit(counted)()))


def _at_mini_step(state: PyTree, count: jax.Array) -> PyTree:
    is_one = lambda node: isinstance(node, optax.MultiStepsState)
    move = lambda node: node._replace(mini_step=count) if is_one(node) else node
    return jax.tree.map(move, state, is_leaf=is_one)


def trials_in(state: PyTree) -> Trials | None:
    """Return the trials in the state of an optimizer that takes bad points back; None for other optimizers."""
    return next(iter(states_of(state, Trials)), None)


def may_skip(state: PyTree) -> bool:
    """Tell whether the optimizer has a wrapper that may skip gradients which are not finite.

    ``optax.MultiSteps`` has a state for that only if it was given a function which decides.
    """
    counts = [part for part in states_of(state, optax.MultiStepsState) if jax.tree.leaves(part.skip_state)]
    return bool(counts or states_of(state, optax.ApplyIfFiniteState))


def took_care(new: PyTree, old: PyTree) -> Any:
    """Tell whether a wrapper dealt with a gradient that is not finite, if the params are finite after the update.

    ``optax.apply_if_finite`` lets it through once it gives up. Within ``optax.MultiSteps`` it sees sums of gradients,
    and not each of them. ``optax.MultiSteps`` itself adds a gradient to its sum unless it skips it.
    """
    if states_of(new, optax.ApplyIfFiniteState):
        return True
    pairs = zip(states_of(new, optax.MultiStepsState), states_of(old, optax.MultiStepsState), strict=True)
    still = [(a.mini_step == b.mini_step) & (a.gradient_step == b.gradient_step) for a, b in pairs]
    return functools.reduce(jnp.logical_or, still)


def restarted(state: PyTree) -> PyTree:
    """Restart an optimizer that takes bad points back: its search starts at the next point."""
    fresh = lambda node: node._replace(rejected=node.rejected * 0, accepted=node.accepted * 0)
    is_trials = lambda node: isinstance(node, Trials)
    return jax.tree.map(lambda node: fresh(node) if is_trials(node) else node, state, is_leaf=is_trials)


def check_fits(given: PyTree, fresh: PyTree) -> None:
    """Raise InputError, with the first difference, unless a state has the leaves and structure of a fresh one."""
    kind = lambda leaf: f"{leaf.dtype}{list(leaf.shape)}"
    theirs, mine = (
        {name: kind(leaf) for name, leaf in _trees.named_leaves(tree, "optimizer_state").items()}
        for tree in (given, fresh)
    )
    names = [name for name in [*mine, *theirs] if theirs.get(name) != mine.get(name)]
    if not names and jax.tree.structure(given) == jax.tree.structure(fresh):
        return
    if names:
        name = names[0]
        differ = f"{name} is {theirs.get(name, 'nothing')}, but the optimizer has {mine.get(name, 'nothing')} there"
    else:
        differ = f"optimizer_state is {_parts_of(given)}, but the optimizer has {_parts_of(fresh)}"
        if _parts_of(given) == _parts_of(fresh):
            differ = (
                f"optimizer_state is {jax.tree.structure(given)}, but the optimizer has {jax.tree.structure(fresh)}"
            )
    raise InputError(
        f"{differ}. Pass the optimizer_state of a gdopt.Result with the same optimizer, the same kind of learning_rate "
        '("auto", a number or a schedule), the same trainable= and params of the same shapes, or leave it out.'
    )


def _parts_of(state: PyTree) -> str:
    """Name the states of the parts of an optimizer, such as those of a chain."""
    is_part = lambda node: hasattr(node, "_fields")
    names = [type(node).__name__ for node in jax.tree.leaves(state, is_leaf=is_part)]
    return f"a {type(state).__name__} of {', '.join(names)}"


def learns_scales(state: PyTree) -> bool:
    """Tell whether the optimizer learns a scale for each entry of the params, as `quasi_newton` does."""
    return bool(states_of(state, QuasiNewtonState))


def states_of(state: PyTree, kind: type) -> list[Any]:
    """Return the states of this kind within an optimizer's state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]
