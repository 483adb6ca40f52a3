"""The loop, once: ``step`` (evaluate, test, update), ``chunk`` (many steps, compiled), ``run`` (chunk after chunk)."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gdopt import _trees, program, stopping
from gdopt._types import PyTree
from gdopt.errors import InputError
from gdopt.optimizers import MAX_REJECTED
from gdopt.result import History
from gdopt.rule import Rule, apply, evaluation_params, inject, owned_rate, search
from gdopt.stopping import RUNNING, Evaluation, Limits, Status, Watch
from gdopt.task import Task

_CAPACITY = 4096  # records that a chunk has room for
_FIRST_CHUNK = 16  # steps, before their time is known
LAST_STEP = 2**31 - 1
_CHUNK_SECONDS = 0.05  # Ctrl-C and the progress bar wait for one chunk
_BOUNDARY_SECONDS = 2e-4  # what the host takes between two


class Inputs(NamedTuple):
    """What stays the same over a run, as arguments of the compiled program: new values compile nothing.

    Runs side by side each have their own ``key`` and ``rate``, by a leading axis.
    """

    start: PyTree
    data: PyTree
    args: PyTree
    key: jax.Array
    rate: Any  # a number, or a ladder of them (see `Rule.at`)
    limits: Limits


class Kept(NamedTuple):
    """The point that comes back if the run ends badly: the best so far, or with a noisy loss the last good one."""

    params: PyTree
    step: jax.Array
    loss: jax.Array
    grad_norm: jax.Array
    aux: PyTree


class State(NamedTuple):
    """What the next step needs; of runs side by side, which keep step, all but ``step`` has a leading axis."""

    step: jax.Array  # updates made, which is the number of the point in ``params``
    code: jax.Array  # RUNNING, or the Status that the last evaluation led to
    params: PyTree
    optimizer: PyTree
    order: PyTree  # the epoch's shuffled row numbers
    watch: Watch
    kept: Kept


class Compiled(NamedTuple):
    """A problem made ready to run."""

    start: Callable[..., State]
    chunk: Callable[..., tuple[State, jax.Array]]  # (state, limit, inputs) -> (state, rows of History)
    steps_per_epoch: int | None  # None: the loss is the same function at each step
    eps: float  # of the dtype in which the loss is computed


def place(task: Task, rate: Any, limits: Limits, key: jax.Array) -> Inputs:
    """The inputs on the device: placed once and not at each chunk. Python's numbers stay weakly typed."""
    return jax.tree.map(jnp.asarray, Inputs(task.problem.params, task.data, task.args, key, rate, limits))


def compile(task: Task, rule: Rule, inputs: Inputs, *, trial: bool = False) -> Compiled:
    """Traces the loss once and shares the compiled loop with every equal problem.

    Where the inputs have many keys, it is the loop of as many runs side by side, each with its own key and rate. They
    keep step, and one that has ended is left as it is. A ``trial`` is to show what its rates do, however small they
    are: only failures and the number of steps end it.
    """
    problem, batches = task.problem, task.batches
    steps_per_epoch = 1 if trial and task.steps_per_epoch is None else task.steps_per_epoch
    side_by_side = jnp.ndim(inputs.key) > 0

    def loss_arguments(inputs: Inputs, order: PyTree, step: jax.Array) -> tuple[tuple, dict, PyTree]:
        data = inputs.data
        if batches:
            data, order = batches.take(data, order, jax.random.fold_in(inputs.key, 0), step)
        key = {"key": jax.random.fold_in(jax.random.fold_in(inputs.key, 1), step)} if task.with_key else {}
        return (() if data is None else (data,)) + task.args_rest.combine(inputs.args), key, order

    def evaluate(params: PyTree, inputs: Inputs, order: PyTree, step: jax.Array) -> tuple:
        args, key, order = loss_arguments(inputs, order, step)
        (loss, aux), grad = problem.value_and_grad(params, *args, **key)
        return loss, aux, grad, order

    order = batches.first_order() if batches else None
    one = inputs._replace(key=inputs.key[0], rate=inputs.rate[0]) if side_by_side else inputs
    evaluate, (loss, aux, _, _) = program.trace(evaluate, inputs.start, one, order, jnp.int32(0))
    loss_dtype = jnp.promote_types(loss.dtype, jnp.float32)
    norm_dtype = _trees.norm_dtype(inputs.start)
    record_dtype = jnp.result_type(loss_dtype, norm_dtype, float)
    eps = float(jnp.finfo(loss.dtype).eps)

    def start(inputs: Inputs) -> State:
        nan = jnp.full((), jnp.nan, loss_dtype)
        norm = jnp.full((), jnp.nan, norm_dtype)
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), aux)
        transformation, _ = rule.at(jnp.int32(0), inputs.rate)
        optimizer = transformation.init(inputs.start)
        if steps_per_epoch is not None and search(optimizer) is not None:
            raise InputError(
                "optimizer holds gdopt.spectral(), which compares one value of the loss with the next: it is not for "
                "mini-batches or random keys. Pass gdopt.gd with a learning_rate, or leave batch_size out."
            )
        return State(
            step=jnp.int32(0),
            code=jnp.int32(RUNNING),
            params=_trees.copy(inputs.start),
            optimizer=_trees.copy(_trees.strong(optimizer)),
            order=order,
            watch=stopping.first_watch(loss_dtype, norm.dtype),
            kept=Kept(_trees.copy(inputs.start), jnp.int32(0), nan, norm, blank),
        )

    def step(state: State, inputs: Inputs) -> tuple[State, tuple]:
        k, params = state.step, state.params
        loss, aux, grad, order = evaluate(params, inputs, state.order, k)
        value, grad_norm = loss.astype(loss_dtype), _trees.norm(grad)

        away = jax.tree.map(jnp.subtract, params, inputs.start)
        point = Evaluation(k, value, grad_norm, _trees.quick_norm(away))
        found = search(state.optimizer)
        gave_up = None if found is None else found.rejected >= MAX_REJECTED
        code, watch = stopping.judge(state.watch, state.kept.loss, point, inputs.limits, gave_up, eps, steps_per_epoch)
        running = code == RUNNING
        if steps_per_epoch is None:
            keep = (k == 0) | (jnp.isfinite(grad_norm) & jnp.isfinite(value) & (value < state.kept.loss))
        else:
            failed = jnp.isin(code, jnp.asarray(stopping.FAILURES, jnp.int32))
            keep = (k == 0) | jnp.where(running, stopping.is_good(watch, state.kept.loss, value), ~failed)
        kept = _trees.select(keep, Kept(params, k, value, grad_norm, _trees.strong(aux)), state.kept)

        transformation, rate = rule.at(k, inputs.rate)

        # optax's line searches refuse extra arguments that nobody takes: these names are for other optimizers.
        def value_fn(params: PyTree, obj_fn: Any = None, grad_fn: Any = None) -> jax.Array:
            args, key, _order = loss_arguments(inputs, order, k)
            return problem.value(params, *args, **key)[0]

        def grad_fn(params: PyTree, _: Any) -> PyTree:
            return jax.tree.map(jnp.conj, jax.grad(value_fn)(params))

        def update(params: PyTree, optimizer: PyTree) -> tuple[PyTree, PyTree]:
            optimizer = optimizer if rate is None else inject(optimizer, rate)
            extras = {"value": loss, "grad": grad, "value_fn": value_fn, "obj_fn": value_fn, "grad_fn": grad_fn}
            updates, optimizer = apply(transformation, grad, optimizer, params, **extras)
            # Nothing else may read the updates: XLA would then round them before it adds them, where a loop written by
            # hand fuses both, and last bits would differ.
            return optax.apply_updates(params, updates), _trees.strong(optimizer)

        params, optimizer = lax.cond(running, update, lambda *same: same, params, state.optimizer)
        rate = owned_rate(optimizer) if rate is None else rate
        record = (value, grad_norm, jnp.where(running, rate, jnp.nan))
        return State(k + running, code, params, optimizer, order, watch, kept), record

    if side_by_side:
        start, step = _side_by_side(start, step)

    def chunk(state: State, limit: jax.Array, inputs: Inputs) -> tuple[State, jax.Array]:
        first = state.step
        records = jnp.zeros((_CAPACITY, *state.code.shape, len(History._fields)), record_dtype)

        def body(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            state, records = carry
            at = state.step - first
            state, record = step(state, inputs)
            row = jnp.stack([entry.astype(record_dtype) for entry in record], axis=-1)
            return state, lax.dynamic_update_index_in_dim(records, row, at, 0)

        return lax.while_loop(
            lambda carry: (carry[0].code == RUNNING).any() & (carry[0].step < limit), body, (state, records)
        )

    first, state = program.share(start, inputs)
    many, _ = program.share(chunk, state, np.int32(0), inputs, donate_first=True)
    return Compiled(first, many, steps_per_epoch, eps)


def _side_by_side(start: Callable, step: Callable) -> tuple[Callable, Callable]:
    """Both for many runs by ``vmap``. The step's number is left out of it, so that epochs are shuffled under a true
    ``cond``: batched, it would be a ``select``, and each step would pay for a shuffle."""
    each_inputs = Inputs._make(0 if name in ("key", "rate") else None for name in Inputs._fields)
    each_state = State._make(None if name == "step" else 0 for name in State._fields)

    def one(state: State, inputs: Inputs) -> tuple[State, tuple]:
        running = state.code == RUNNING
        new, record = step(state, inputs)
        record = jax.tree.map(lambda entry: jnp.where(running, entry, jnp.nan), record)
        # All but the order of the rows, which is large and of no use to a run that has ended.
        kept = _trees.select(running, new._replace(order=()), state._replace(order=()))
        return kept._replace(step=state.step, order=new.order), record

    def steps(state: State, inputs: Inputs) -> tuple[State, tuple]:
        each = jax.vmap(one, in_axes=(each_state, each_inputs), out_axes=(each_state, 0))
        new, records = each(state, inputs)
        return new._replace(step=state.step + (new.code == RUNNING).any()), records

    return lambda inputs: jax.vmap(start, (each_inputs,), each_state)(inputs), steps


def begin(compiled: Compiled, inputs: Inputs) -> State:
    """The state before the first step, with everything compiled: by a chunk of no steps."""
    state, _ = compiled.chunk(compiled.start(inputs), np.int32(0), inputs)
    return jax.block_until_ready(state)


def advance(
    compiled: Compiled,
    state: State,
    inputs: Inputs,
    between: Callable[[int, State, History], bool],
    *,
    until: int = LAST_STEP,
    boundary: int | None = None,
) -> tuple[State, History, Status | None]:
    """Runs chunk after chunk to the end, or to the step ``until``, or until ``between`` says stop, or Ctrl-C.

    ``between`` is called after each chunk with the steps made, the state and the chunk's records. No chunk crosses a
    multiple of ``boundary`` steps. Chunks are sized by time; their sizes change no bit of the result. After a stop, the
    state's last point is evaluated still. Returns what stopped it from outside, if anything did.
    """
    step, size, cause, records = int(state.step), _FIRST_CHUNK, None, []
    with _ctrl_c() as interrupted:
        while True:
            size = min(size, _CAPACITY)
            limit = step + size if boundary is None else min(step + size, (step // boundary + 1) * boundary)
            began = time.perf_counter()
            state, buffer = compiled.chunk(state, np.int32(min(limit, until)), inputs)
            reached, running = int(state.step), bool((np.asarray(state.code) == RUNNING).any())  # waits for the chunk
            seconds = time.perf_counter() - began
            count = reached - step + (not running)
            records.append(History(*np.array(np.moveaxis(np.asarray(buffer)[:count], -1, 0))))
            step = reached
            stop = cause is None and between(step, state, records[-1])
            if not running or step == until:
                break
            if interrupted or stop:
                cause = Status.INTERRUPTED if interrupted else Status.STOPPED
                inputs = inputs._replace(
                    limits=inputs.limits._replace(max_steps=np.int32(step))
                )  # evaluates here, and ends
            computing = max(seconds - _BOUNDARY_SECONDS, seconds / 10, 1e-9)
            size = max(1, int(count * _CHUNK_SECONDS / computing))
    return state, History(*(np.concatenate(entries) for entries in zip(*records, strict=True))), cause


def run(
    compiled: Compiled,
    state: State,
    inputs: Inputs,
    between: Callable[[int, State, History], bool],
    boundary: int | None,
) -> tuple[State, History, Status]:
    """Runs to the end: see `advance`. Of an optimizer that keeps an average, the average is evaluated last."""
    state, history, cause = advance(compiled, state, inputs, between, boundary=boundary)
    code = Status(int(state.code))
    status = cause if cause and code is Status.MAX_STEPS else code
    average = evaluation_params(state.optimizer, state.params)
    if average is not state.params and status not in stopping.FAILURES:
        step = int(state.step)
        last = inputs._replace(limits=inputs.limits._replace(max_steps=np.int32(step)))
        state, _ = compiled.chunk(state._replace(code=np.int32(RUNNING), params=average), np.int32(step + 1), last)
    return state, history, status


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[bool]]:
    """A list that is no longer empty after Ctrl-C, which then ends the run with its state intact.

    An exception would come between any two bytecodes, also where the old state is donated and the new one not yet
    bound. A second Ctrl-C raises KeyboardInterrupt as ever. Somebody else's handler, or another thread, is left alone.
    """
    pressed: list[bool] = []
    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield pressed
        return

    def handler(signum: int, frame: Any) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, usual)
