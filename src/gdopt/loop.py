"""The loop, once: ``step`` (evaluate, test, update), ``chunk`` (many steps, compiled), ``run`` (chunk after chunk)."""

from __future__ import annotations

import contextlib
import functools
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
from gdopt._trees import Packed
from gdopt._types import PyTree
from gdopt.errors import InputError
from gdopt.optimizers import MAX_REJECTED
from gdopt.problem import value_and_grad
from gdopt.result import History
from gdopt.rule import Rule, apply, evaluation_params, inject, owned_rate, search
from gdopt.stopping import RUNNING, Evaluation, Limits, Status, Watch
from gdopt.task import Task

_CAPACITY = 4096  # records that a chunk has room for
_SMALL = 4096  # entries of an array that is computed with together with others
_FIRST_CHUNK = 16  # steps, before their time is known
LAST_STEP = 2**31 - 1
_CHUNK_SECONDS = 0.05  # Ctrl-C and the progress bar wait for one chunk
_BOUNDARY_SECONDS = 2e-4  # what the host takes between two


class Inputs(NamedTuple):
    """What stays the same over a run, as arguments of the compiled program: new values compile nothing.

    Arrays are on the device, Python's numbers are left as they are. Runs side by side each have their own ``key`` and
    ``rate``, by a leading axis.
    """

    start: PyTree
    data: PyTree
    args: PyTree
    key: Any  # None for a single run that draws nothing
    rate: Any  # a number, or a ladder of them, the rates of the steps one by one
    limits: Limits
    constants: list[Any]  # that the loss closes over
    numbers: list[Any] | None  # of the schedule


class Kept(NamedTuple):
    """The point that comes back if the run ends badly: the best so far, or with a noisy loss the last good one.

    Where no params are to be kept, the last point evaluated, whose params are the state's: see `returned_params`.
    """

    params: Packed | None
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

    start: Callable[[Inputs], Packed]
    # (state, limit, inputs) -> (state, rows of the history)
    chunk: Callable[[Packed, Any, Inputs], tuple[Packed, jax.Array]]
    steps_per_epoch: int | None  # None: the loss is the same function at each step
    eps: float  # of the dtype in which the loss is computed
    pace: list[float]  # the seconds of a step in the last run, where there was one


def compile(
    task: Task,
    rule: Rule,
    rate: Any,
    limits: Limits,
    key: jax.Array | None,
    *,
    trial: bool = False,
    keep_best: bool = True,
) -> tuple[Compiled, Inputs]:
    """Traces the loss once and shares the compiled loop with every equal problem; it is to be given these inputs.

    Where there are many keys, it is the loop of as many runs side by side, each with its own key and rate. They
    keep step, and one that has ended is left as it is. A ``trial`` is to show what its rates do, however small they
    are: only failures and the number of steps end it. Without ``keep_best`` there is no point to fall back on.
    """
    steps_per_epoch = 1 if trial and task.steps_per_epoch is None else task.steps_per_epoch
    start = task.problem.params
    batch = task.batches.shapes(task.data) if task.batches else task.data
    one_key = jax.ShapeDtypeStruct((), key.dtype) if key is not None and task.with_key else None
    value = program.trace(task.value, start, batch, task.args, one_key, rules=True)

    def differentiated() -> program.Traced:
        both = value_and_grad(lambda params, constants, *given: value.replay(constants, params, *given))
        return program.trace(both, start, value.constants, batch, task.args, one_key)

    schedule = None if rule.schedule is None else program.trace(rule.rate_at, np.int32(0), lift=True)
    inputs = Inputs(start, task.data, task.args, key, rate, limits, value.constants, schedule and schedule.constants)
    options = rule.identity, schedule and schedule.identity, task.batches, steps_per_epoch, task.with_key, keep_best
    known = rule.identity is not None and (schedule is None or schedule.identity is not None)

    # A trace of the loss tells its gradient, too; but where it has new derivative rules, only a trace of that does.
    seen = program.place_for((value.identity, *options) if known and value.identity else None, inputs, passing=True)
    if not seen:
        loss = differentiated()
        kept = program.place_for((loss.identity, *options) if known and loss.identity else None, inputs)
        if not kept:
            compiled, closed = _make(task, rule, inputs, loss, schedule, steps_per_epoch, keep_best)
            if not closed:
                return compiled, inputs
            kept.append(compiled)
        seen.append(kept[0])
    return seen[0], inputs


def compact(params: PyTree) -> Packed:
    """The params as few arrays, which costs much less per step where there are many small ones."""
    return _trees.pack(params, _SMALL)


def _make(
    task: Task,
    rule: Rule,
    inputs: Inputs,
    traced_loss: program.Traced,
    schedule: program.Traced | None,
    steps_per_epoch: int | None,
    keep_best: bool,
) -> tuple[Compiled, bool]:
    """The loop around a traced loss, and whether it depends on nothing else than on that trace and its inputs."""
    batches = task.batches
    (loss, aux), _ = traced_loss.out
    loss_dtype = jnp.promote_types(loss.dtype, jnp.float32)
    norm_dtype = _trees.norm_dtype(inputs.start)
    record_dtype = jnp.result_type(loss_dtype, norm_dtype, float)
    eps = float(jnp.finfo(loss.dtype).eps)
    asked_again = []  # whether an optimizer has called the loss itself, in a trace of its own

    def loss_inputs(inputs: Inputs, order: PyTree, step: jax.Array) -> tuple[tuple, PyTree]:
        data = inputs.data
        if batches:
            data, order = batches.take(data, order, jax.random.fold_in(inputs.key, 0), step)
        key = jax.random.fold_in(jax.random.fold_in(inputs.key, 1), step) if task.with_key else None
        return (data, inputs.args, key), order

    def rate_at(inputs: Inputs, step: jax.Array) -> Any:
        """The rate of a step: the schedule's, a number, or of a ladder the step's own, from its end on over again."""
        if schedule is not None:
            return schedule.replay(inputs.numbers, step)
        return inputs.rate[step % len(inputs.rate)] if jnp.ndim(inputs.rate) else inputs.rate

    def start(inputs: Inputs) -> State:
        nan = jnp.full((), jnp.nan, loss_dtype)
        norm = jnp.full((), jnp.nan, norm_dtype)
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), aux)
        optimizer = rule.with_rate(rate_at(inputs, jnp.int32(0))).init(inputs.start)
        if steps_per_epoch is not None and search(optimizer) is not None:
            raise InputError(
                "optimizer holds gdopt.spectral(), which compares one value of the loss with the next: it is not for "
                "mini-batches or random keys. Pass gdopt.gd with a learning_rate, or leave batch_size out."
            )
        if not keep_best and search(optimizer) is not None:
            raise InputError(
                "keep_best=False was given with a rate that is found at each step, by gdopt.spectral(): the last point "
                "may be a trial that is to be taken back. Pass a learning_rate, or leave keep_best out."
            )
        return State(
            step=jnp.int32(0),
            code=jnp.int32(RUNNING),
            params=_trees.copy(inputs.start),
            optimizer=_trees.copy(_trees.strong(optimizer)),
            order=batches.first_order() if batches else None,
            watch=stopping.first_watch(loss_dtype, norm.dtype),
            kept=Kept(_trees.copy(compact(inputs.start)) if keep_best else None, jnp.int32(0), nan, norm, blank),
        )

    def step(state: State, inputs: Inputs) -> tuple[State, tuple]:
        k, params = state.step, state.params
        given, order = loss_inputs(inputs, state.order, k)
        (loss, aux), grad = traced_loss.replay(traced_loss.constants, params, inputs.constants, *given)
        value, grad_norm = loss.astype(loss_dtype), _trees.norm(compact(grad))

        here = compact(params)
        away = jax.tree.map(jnp.subtract, here, compact(inputs.start))
        point = Evaluation(k, value, grad_norm, _trees.quick_norm(away))
        found = search(state.optimizer)
        gave_up = None if found is None else found.rejected >= MAX_REJECTED
        code, watch = stopping.judge(state.watch, state.kept.loss, point, inputs.limits, gave_up, eps, steps_per_epoch)
        running = code == RUNNING
        if steps_per_epoch is None:
            keep = (k == 0) | (jnp.isfinite(grad_norm) & jnp.isfinite(value) & (value < state.kept.loss))
        else:
            failed = functools.reduce(jnp.logical_or, [code == status for status in stopping.FAILURES])
            keep = (k == 0) | jnp.where(running, stopping.is_good(watch, state.kept.loss, value), ~failed)
        kept = Kept(here if keep_best else None, k, value, grad_norm, _trees.strong(aux))
        kept = _trees.select(keep, kept, state.kept) if keep_best else kept

        # optax's line searches refuse extra arguments that nobody takes: these names are for other optimizers.
        def value_fn(params: PyTree, obj_fn: Any = None, grad_fn: Any = None) -> jax.Array:
            asked_again.append(True)
            return task.value(params, *given)[0]

        def grad_fn(params: PyTree, _: Any) -> PyTree:
            return jax.tree.map(jnp.conj, jax.grad(value_fn)(params))

        rate = None if rule.owns_rate else jnp.asarray(rate_at(inputs, k))

        def update(params: PyTree, optimizer: PyTree) -> tuple[PyTree, PyTree]:
            optimizer = optimizer if rate is None else inject(optimizer, rate)
            extras = {"value": loss, "grad": grad, "value_fn": value_fn, "obj_fn": value_fn, "grad_fn": grad_fn}
            updates, optimizer = apply(rule.with_rate(rate), grad, optimizer, params, **extras)
            # Nothing else may read the updates: XLA would then round them before it adds them, where a loop written by
            # hand fuses both, and last bits would differ.
            return optax.apply_updates(params, updates), _trees.strong(optimizer)

        # Selected rather than under a cond, which costs more than it saves: all but a run's last step are made.
        params, optimizer = _trees.select(running, update(params, state.optimizer), (params, state.optimizer))
        used = owned_rate(optimizer) if rate is None else rate
        record = (value, grad_norm, jnp.where(running, used, jnp.nan))
        return State(k + running, code, params, optimizer, order, watch, kept), record

    if inputs.key is not None and inputs.key.ndim:
        start, step = _side_by_side(start, step)

    def packed_start(inputs: Inputs) -> Packed:
        return _trees.pack(start(inputs))

    def chunk(packed: Packed, limit: jax.Array, inputs: Inputs) -> tuple[Packed, jax.Array]:
        state = packed.tree()
        first = state.step
        records = jnp.zeros((_CAPACITY, *state.code.shape, len(History._fields)), record_dtype)

        def body(carry: tuple[Packed, jax.Array]) -> tuple[Packed, jax.Array]:
            state, records = carry[0].tree(), carry[1]
            at = state.step - first
            state, record = step(state, inputs)
            row = jnp.stack([entry.astype(record_dtype) for entry in record], axis=-1)
            return _trees.pack(state), lax.dynamic_update_index_in_dim(records, row, at, 0)

        def goes_on(carry: tuple[Packed, jax.Array]) -> jax.Array:
            state = carry[0].tree()
            return (state.code == RUNNING).any() & (state.step < limit)

        return lax.while_loop(goes_on, body, (packed, records))

    first = program.share(packed_start, inputs)
    many = program.share(chunk, first.out, np.int32(0), inputs, donate_first=True)
    closed = first.closed and many.closed and not asked_again
    return Compiled(first.call, many.call, steps_per_epoch, eps, pace=[]), closed


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


def begin(compiled: Compiled, inputs: Inputs) -> Packed:
    """The state before the first step, with everything compiled: where nothing ran yet, by a chunk of no steps."""
    state = compiled.start(inputs)
    if not compiled.pace:
        state, _ = compiled.chunk(state, np.int32(0), inputs)
    return jax.block_until_ready(state)


def advance(
    compiled: Compiled,
    packed: Packed,
    inputs: Inputs,
    between: Callable[[int, State, History], bool],
    *,
    until: int = LAST_STEP,
    boundary: int | None = None,
) -> tuple[Packed, History, Status | None]:
    """Runs chunk after chunk to the end, or to the step ``until``, or until ``between`` says stop, or Ctrl-C.

    ``between`` is called after each chunk with the steps made, the state and the chunk's records. No chunk crosses a
    multiple of ``boundary`` steps. Chunks are sized by time; their sizes change no bit of the result. After a stop, the
    state's last point is evaluated still. Returns what stopped it from outside, if anything did.
    """
    step, cause, records = int(packed.tree().step), None, []
    with _ctrl_c() as interrupted:
        while True:
            size = max(1, int(_CHUNK_SECONDS / compiled.pace[0])) if compiled.pace else _FIRST_CHUNK
            limit = step + min(size, _CAPACITY)
            limit = limit if boundary is None else min(limit, (step // boundary + 1) * boundary)
            began = time.perf_counter()
            packed, buffer = compiled.chunk(packed, np.int32(min(limit, until)), inputs)
            state = packed.tree()  # waits for the chunk
            reached, running = int(state.step), bool((np.asarray(state.code) == RUNNING).any())
            seconds = time.perf_counter() - began
            count = reached - step + (not running)
            records.append(History(*np.array(np.moveaxis(np.asarray(buffer)[:count], -1, 0))))
            compiled.pace[:] = [max(seconds - _BOUNDARY_SECONDS, seconds / 10, 1e-9) / max(count, 1)]
            step = reached
            stop = cause is None and between(step, state, records[-1])
            if not running or step == until:
                break
            if interrupted or stop:
                cause = Status.INTERRUPTED if interrupted else Status.STOPPED
                here = inputs.limits._replace(max_steps=step)
                inputs = inputs._replace(limits=here)  # evaluates once more, and ends
    return packed, History(*(np.concatenate(entries) for entries in zip(*records, strict=True))), cause


def run(
    compiled: Compiled,
    packed: Packed,
    inputs: Inputs,
    between: Callable[[int, State, History], bool],
    boundary: int | None,
) -> tuple[State, History, Status]:
    """Runs to the end: see `advance`. Of an optimizer that keeps an average, the average is evaluated last."""
    packed, history, cause = advance(compiled, packed, inputs, between, boundary=boundary)
    state = packed.tree()
    code = Status(int(state.code))
    status = cause if cause and code is Status.MAX_STEPS else code
    average = evaluation_params(state.optimizer, state.params)
    if average is not state.params and status not in stopping.FAILURES:
        step = int(state.step)
        last = inputs._replace(limits=inputs.limits._replace(max_steps=step))
        again = _trees.pack(state._replace(code=np.int32(RUNNING), params=average))
        state = compiled.chunk(again, np.int32(step + 1), last)[0].tree()
    return state, history, status


def returned_params(state: State) -> PyTree:
    """The params that ``state.kept`` tells the loss of."""
    params = state.params if state.kept.params is None else state.kept.params.tree()

    def placed(leaf: Any, like: Any) -> jax.Array:
        if isinstance(leaf, jax.Array):
            return leaf
        array = jax.device_put(leaf)
        shared = isinstance(like, jax.Array) and array.sharding != like.sharding
        return jax.device_put(leaf, like.sharding) if shared else array

    return jax.tree.map(placed, params, state.params)


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
