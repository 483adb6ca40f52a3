"""One step: evaluate, test, update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gdopt import _stopping, _trees
from gdopt._compile import program
from gdopt._errors import InputError
from gdopt._loop.state import Inputs, Kept, Settings, State
from gdopt._optimizers.rule import Rule, extra_arguments, inject, owned_rate, search
from gdopt._optimizers.trials import MAX_REJECTED
from gdopt._problem.data import Batches
from gdopt._problem.task import Task
from gdopt._status import RUNNING
from gdopt._stopping import Epoch, Evaluation, Search
from gdopt._types import PyTree


def loss_arguments(
    inputs: Inputs, order: PyTree, step: jax.Array, batches: Batches | None, *, with_key: bool
) -> tuple[PyTree, PyTree, jax.Array | None]:
    """Return what the loss is called with at a step besides the params: data, args and the key."""
    data = batches.take(inputs.data, order, step) if batches else inputs.data
    key = jax.random.fold_in(jax.random.fold_in(inputs.key, 1), step) if with_key else None
    return data, inputs.args, key


def start_and_step(
    task: Task,
    rule: Rule,
    inputs: Inputs,
    traced_loss: program.Traced,
    schedule: program.Traced | None,
    settings: Settings,
    asked_again: list[bool],
) -> tuple[Callable[[Inputs], State], Callable[[State, Inputs], tuple[State, tuple]]]:
    """The state before the first step, and a step."""
    batches, keep_best = settings.batches, settings.keep_best
    (loss, aux), _ = traced_loss.out
    loss_dtype = jnp.promote_types(loss.dtype, jnp.float32)
    norm_dtype = _trees.norm_dtype(inputs.start)
    eps = float(jnp.finfo(loss.dtype).eps)

    def loss_inputs(inputs: Inputs, order: PyTree, step: jax.Array) -> tuple[tuple, PyTree]:
        if batches and not settings.inside:  # there `_whole` shuffles
            key = jax.random.fold_in(inputs.key, 0)
            drawn = functools.partial(batches.order, key, step)
            order = lax.cond(step % batches.per_epoch == 0, drawn, lambda: order)
        data, args, key = loss_arguments(inputs, order, step, batches, with_key=settings.with_key)
        data = settings.layout.batch(data) if batches and settings.layout else data
        return (data, args, key), order

    def epoch_of(inputs: Inputs, step: jax.Array) -> Epoch | None:
        if not settings.noisy or inputs.epoch is not None:
            return inputs.epoch
        steps = batches.per_epoch if batches else 1
        return Epoch(step % steps == 0, step % steps == steps - 1, steps)

    def rate_at(inputs: Inputs, step: jax.Array) -> Any:
        """The rate of a step: the schedule's, a number, or of a ladder the step's own, from its end on over again."""
        if schedule is not None:
            return schedule.replay(inputs.numbers, step)
        return inputs.rate[step % len(inputs.rate)] if jnp.ndim(inputs.rate) else inputs.rate

    def start(inputs: Inputs) -> State:
        nan = jnp.full((), jnp.nan, loss_dtype)
        norm = jnp.full((), jnp.nan, norm_dtype)
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), aux)
        optimizer = rule.init(rate_at(inputs, jnp.int32(0)), inputs.start)
        if settings.noisy and search(optimizer) is not None:
            raise InputError(
                "optimizer holds gdopt.spectral() or gdopt.quasi_newton(), which compare one value of the loss with "
                "the next: they are not for mini-batches or random keys. Pass gdopt.gd with a learning_rate, or leave "
                "batch_size out."
            )
        if not keep_best and search(optimizer) is not None:
            raise InputError(
                "keep_best=False was given with a rate that is found at each step, as gdopt.quasi_newton() and "
                "gdopt.spectral() do: the last point may be a trial that is to be taken back. Pass a learning_rate, or "
                "leave keep_best out."
            )
        best = _trees.copy(settings.compact(inputs.start)) if keep_best else None
        state = State(
            step=jnp.int32(0),
            code=jnp.int32(RUNNING),
            params=_trees.copy(inputs.start),
            optimizer=_trees.copy(_trees.strong(optimizer)),
            order=batches.first_order() if batches else None,
            watch=_stopping.first_watch(loss_dtype, norm.dtype),
            kept=Kept(best, jnp.int32(0), nan, norm, blank),
            ending=_stopping.first_ending(loss_dtype),
        )
        return settings.in_place(state)

    def step(state: State, inputs: Inputs) -> tuple[State, tuple]:
        k, params = state.step, state.params
        given, order = loss_inputs(inputs, state.order, k)
        (loss, aux), grad = traced_loss.replay(traced_loss.constants, params, inputs.constants, *given)
        value, grad_norm = loss.astype(loss_dtype), _trees.norm(settings.compact(grad))

        here = settings.compact(params)
        away = jax.tree.map(jnp.subtract, here, settings.compact(inputs.start))
        distance = _trees.quick_norm(away)
        finite = lax.cond(jnp.isfinite(distance), lambda: jnp.asarray(True), lambda: _trees.all_finite(here))
        largest = _trees.largest(settings.compact(grad)) if settings.tests_gradient else None
        point = Evaluation(k, value, grad_norm, distance, finite, largest)
        found = search(state.optimizer)
        if found is not None:
            found = Search(found.rejected >= MAX_REJECTED, found.accepted, found.left.astype(loss_dtype))
        epoch = epoch_of(inputs, k)
        code, watch = _stopping.judge(state.watch, state.kept.loss, point, inputs.limits, found, eps, epoch)
        running = code == RUNNING
        if not settings.noisy:
            finite &= jnp.isfinite(grad_norm) & jnp.isfinite(value)
            lower = (value < state.kept.loss) | ((value == state.kept.loss) & (grad_norm == 0))
            keep = (k == 0) | (finite & lower)
        else:
            failed = _stopping.failed(code)
            keep = (k == 0) | jnp.where(running, _stopping.is_good(watch, value), ~failed)
        kept = Kept(here if keep_best else None, k, value, grad_norm, _trees.strong(aux))
        kept = _trees.select(keep, kept, state.kept) if keep_best else kept

        def asked(params: PyTree) -> jax.Array:
            asked_again.append(True)
            return task.value(params, *given)[0]

        rate = None if rule.owns_rate else jnp.asarray(rate_at(inputs, k))

        def update(params: PyTree, optimizer: PyTree) -> tuple[PyTree, PyTree]:
            optimizer = optimizer if rate is None else inject(optimizer, rate)
            updates, optimizer = rule.update(rate, grad, optimizer, params, **extra_arguments(asked, loss, grad))
            # Nothing else may read the updates: XLA would then round them before it adds them, where a loop written by
            # hand fuses both, and last bits would differ.
            return optax.apply_updates(params, updates), _trees.strong(optimizer)

        # Selected rather than under a cond, which costs more than it saves: all but a run's last step are made. That
        # one leaves the watch as it was, too: a save may go on under other limits, and make the evaluation again.
        new, old = (*update(params, state.optimizer), watch), (params, state.optimizer, state.watch)
        params, optimizer, watch = _trees.select(running, new, old)
        used = owned_rate(optimizer) if rate is None else rate
        record = (value, grad_norm, jnp.where(running, used, jnp.nan))
        new = State(k + running, code, params, optimizer, order, watch, kept, state.ending)
        return settings.in_place(new), record

    return start, step
