"""The loops over steps: chunks for the host, all steps inside a transformation, and runs side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gdopt import _stopping, _trees
from gdopt._loop import recorded
from gdopt._loop.state import Carry, Inputs, Outcome, Settings, State, returned_model, returned_params
from gdopt._optimizers.optax_state import evaluation_params
from gdopt._problem.limits import LAST_STEP
from gdopt._problem.validation import metrics_in
from gdopt._status import RUNNING
from gdopt._trees import Packed

CAPACITY = 4096  # the rows of the history for which a carry has room
_MOST = 2**20  # the most numbers in these rows, if they hold the params
_COLUMNS = 3  # the loss, the norm of its gradient, and the rate


def first_carry(
    start: Callable[[Inputs], State], everywhere: Callable, *, metrics: bool, params: bool
) -> Callable[[Inputs], Carry]:
    """Give ``start`` room for the first rows of the history; what the host reads is copied ``everywhere``."""

    def first(inputs: Inputs) -> Carry:
        state = start(inputs)
        dtype = jnp.result_type(state.kept.loss, state.kept.grad_norm, float)
        columns = _COLUMNS + (len(metrics_in(state.kept.aux)) if metrics else 0)
        rows = CAPACITY
        if params:
            columns += recorded.width(state.params)
            rows = max(min(rows, _MOST // columns), 1)
        records = jnp.zeros((rows, *state.code.shape, columns), dtype)
        return _read_by_host((_trees.pack(state, by_bits=True), records), everywhere)

    return first


def _read_by_host(carry: Carry, everywhere: Callable) -> Carry:
    return dataclasses.replace(carry[0], vectors=everywhere(carry[0].vectors)), everywhere(carry[1])


def chunk_loop(step: Callable[[State, Inputs], tuple[State, tuple]], everywhere: Callable, *, params: bool) -> Callable:
    """Make one ``while_loop`` of many steps, up to a limit or the end; with ``params`` the rows hold these, too."""

    def chunk(carry: Carry, first: jax.Array, limit: jax.Array, inputs: Inputs) -> tuple[Carry, jax.Array]:
        def body(carry: Carry) -> Carry:
            state, records = carry[0].tree(), carry[1]
            at = state.step - first
            before, (state, record) = state, step(state, inputs)
            row = jnp.stack([entry.astype(records.dtype) for entry in record], axis=-1)
            if params:
                row = jnp.concatenate([row, recorded.row(before.params, records.dtype)])
            return _trees.pack(state, by_bits=True), lax.dynamic_update_index_in_dim(records, row, at, 0)

        def goes_on(carry: Carry) -> jax.Array:
            state = carry[0].tree()
            return (state.code == RUNNING).any() & (state.step < limit)

        carry = _read_by_host(lax.while_loop(goes_on, body, carry), everywhere)
        return carry, carry[0].tree().code

    return chunk


def whole_loop(
    start: Callable, step: Callable, verify: Callable, held: Callable, settings: Settings, has_target: bool
) -> Callable[[Inputs], Outcome]:
    """Make one program of all steps.

    Mini-batches take a loop in a loop, so that a vmap of it shuffles once per epoch. A batched ``cond`` would compute
    both branches, and so shuffle at each step.
    """
    batches = settings.batches

    def steps(packed: Packed, inputs: Inputs, limit: Any = LAST_STEP) -> Packed:
        def goes_on(packed: Packed) -> jax.Array:
            state = packed.tree()
            return (state.code == RUNNING) & (state.step < limit)

        return lax.while_loop(goes_on, lambda packed: _trees.pack(step(packed.tree(), inputs)[0]), packed)

    def shuffled(state: State, inputs: Inputs) -> State:
        return state._replace(order=batches.order(jax.random.fold_in(inputs.key, 0), state.step)) if batches else state

    def epoch(packed: Packed, inputs: Inputs, per_epoch: int) -> Packed:
        state = shuffled(packed.tree(), inputs)
        return steps(_trees.pack(state), inputs, (state.step // per_epoch + 1) * per_epoch)

    def whole(inputs: Inputs) -> Outcome:
        packed = _trees.pack(start(inputs))
        running = lambda packed: packed.tree().code == RUNNING
        if batches:
            per_epoch = batches.per_epoch
            packed = lax.while_loop(running, lambda packed: epoch(packed, inputs, per_epoch), packed)
        elif settings.noisy:
            packed = steps(packed, inputs)
        else:  # A claim that does not hold is withdrawn, and the run continues.
            rounds = lambda packed: _trees.pack(verify(steps(packed, inputs).tree(), inputs))
            packed = lax.while_loop(running, rounds, packed)
        state = ended = packed.tree()
        average = evaluation_params(state.optimizer, state.params)
        if average is not state.params:
            last = inputs._replace(limits=inputs.limits._replace(max_steps=state.step))
            again = shuffled(state._replace(code=jnp.int32(RUNNING), params=average), inputs)
            failed = _stopping.is_failure(state.code)
            state = _trees.select(failed, state, step(again, last)[0])
        params, kept = returned_params(state), state.kept
        success = _stopping.succeeded(ended.code, ended.watch, noisy=settings.noisy, has_target=has_target)
        found = params, kept.loss, kept.grad_norm, kept.aux
        ends = ended.step, ended.code, success, ended.ending, held(state, inputs)
        return Outcome(*found, *ends, returned_model(state), state.optimizer)

    return whole


def side_by_side(start: Callable, step: Callable) -> tuple[Callable, Callable]:
    """Make both for many runs by ``vmap``.

    The step's number is not batched, so that epochs are shuffled under a true ``cond``. A batched one would become a
    ``select``, and each step would pay for a shuffle.
    """
    each_inputs = Inputs._make(0 if name in ("key", "rate") else None for name in Inputs._fields)
    each_state = State._make(None if name == "step" else 0 for name in State._fields)

    def one(state: State, inputs: Inputs) -> tuple[State, tuple]:
        running = state.code == RUNNING
        new, record = step(state, inputs)
        record = jax.tree.map(lambda entry: jnp.where(running, entry, jnp.nan), record)
        # The order of the rows is left out, because it is large and a run that has ended does not use it.
        kept = _trees.select(running, new._replace(order=()), state._replace(order=()))
        return kept._replace(step=state.step, order=new.order), record

    def steps(state: State, inputs: Inputs) -> tuple[State, tuple]:
        each = jax.vmap(one, in_axes=(each_state, each_inputs), out_axes=(each_state, 0))
        new, records = each(state, inputs)
        return new._replace(step=state.step + (new.code == RUNNING).any()), records

    return lambda inputs: jax.vmap(start, (each_inputs,), each_state)(inputs), steps
