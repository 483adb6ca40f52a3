"""The host's side of a run: chunks of steps, sized by time. Between two chunks it reports, and checks for Ctrl-C."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _error_notes, _signals, _trees
from gdopt._checkpoint.resume import NoSaves, Saves
from gdopt._devices.processes import peers
from gdopt._devices.sharding import put_like
from gdopt._loop.state import Carry, Compiled, Inputs, Rows, State, is_running, joined_rows
from gdopt._optimizers.optax_state import evaluation_params
from gdopt._problem.limits import LAST_STEP
from gdopt._result import History
from gdopt._run.callback import Look, Watcher
from gdopt._run.sources import InMemory, Streamed
from gdopt._run.validation import Best
from gdopt._settings import as_own_work, own_promotion, own_work
from gdopt._status import FAILURES, RUNNING, Status

_FIRST_CHUNK = 1  # steps of a chunk before their time is known
_FIRST_SECONDS = 2e-3  # the time of the first chunk if they are as fast as in the last run
_CHUNK_SECONDS = 0.05  # the time of a chunk, for which Ctrl-C and the progress bar wait
_GROWTH = 4  # the most steps of a chunk over those that the run has made: later ones may take longer
_LONGEST = 0.4  # the seconds that a chunk may take if the time of its steps was seen in one step alone
_PATIENCE = 5  # the factor on _CHUNK_SECONDS if several processes have to agree on each chunk
_HOST_SECONDS = 2e-4  # the overhead of the host per chunk
# A chunk gets its memory from the system, and gives it back. If this is much, it costs more than a step. So a chunk
# then has some more steps, though they take longer than others.
_LARGE = 2**24  # the bytes of a state from which on this counts
_STEPS, _SECONDS = 8, 2.0  # the steps of such a chunk, and the most seconds for them


def begin(compiled: Compiled, inputs: Inputs) -> Carry:
    """Return the state before the first step, with everything compiled, if necessary by a chunk of no steps."""
    carry = compiled.start(inputs)
    if compiled.pace:  # All is compiled, so the first chunk may follow at once.
        return carry
    carry, _ = compiled.chunk(carry, np.int32(0), np.int32(0), inputs)
    return jax.block_until_ready(carry)


def at_start(compiled: Compiled, source: InMemory | Streamed, inputs: Inputs) -> tuple[Inputs, State, History, Status]:
    """Evaluate the start, and make no step. Return the inputs of that, too."""
    inputs = inputs._replace(limits=inputs.limits._replace(max_steps=0))
    carry = source.evaluate(begin(compiled, inputs), inputs, 0)
    state = carry[0].tree()
    return source.last_inputs(inputs), state, History(*_rows(carry, 1, compiled.width)[:3]), Status(int(state.code))


class Between(Protocol):
    """The events between two chunks of a run."""

    def begin(self, saves: Saves | NoSaves, state: State, records: list[Rows]) -> Status | None:
        """Take up a run, with its rows so far; return what is to end it at once, if anything is."""
        ...

    def end(self, step: int) -> int:
        """Return the step before which a chunk has to end that begins at this one."""
        ...

    def __call__(self, step: int, carry: Carry, state: State, rows: Rows, look: Look) -> tuple[Carry, Status | None]:
        """Return what is to end the run after so many steps, if anything is, and the carry to continue with.

        The ``state`` is that of the carry.
        """
        ...


def advance(
    compiled: Compiled,
    source: InMemory | Streamed,
    carry: Carry,
    inputs: Inputs,
    between: Between,
    *,
    saves: Saves | NoSaves,
    until: int = LAST_STEP,
    fresh: bool = False,
) -> tuple[Carry, Rows, Status | None]:
    """Run chunk after chunk to the end, or to the step ``until``, or until ``between`` says stop, or Ctrl-C.

    Chunks are sized by time, and their sizes change no bit of the result. After a stop, the last point of the state is
    still evaluated. Return what stopped the run from outside, if anything did. Before a ``fresh`` run there is nothing
    to read in its state, for which the host would wait.
    """
    limits, cause = inputs.limits, None
    carry, records = saves.restored(carry, limits)
    step, running, stop = 0, True, None
    if fresh:
        source.resume(0, saves)
    else:
        state = carry[0].tree()
        step, running = int(state.step), is_running(state)
        source.resume(step + (not running), saves)  # A run that ended by itself evaluated one more batch.
        stop = between.begin(saves, state, records)
    if not running:  # The saved run is complete.
        return carry, joined_rows(records), None
    source.begin()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(compiled.carry[0]))
    sizes = _Sizes(compiled.pace, compiled.carry[1].shape[0], large=size >= _LARGE)
    ready = _ready(inputs)
    look = functools.partial(_look, source, ready)
    while running and step != until:
        limit = min(step + sizes.next(), between.end(step), until)
        limit = saves.limited(step, limit, limits)
        notes = peers().exchange(limit=limit, stop=stop, leave=_signals.pressed(), saves=saves.tells())
        limit = notes[0]["limit"]  # of the first process
        stop = next((Status(note["stop"]) for note in notes if note["stop"]), None)
        leave = any(note["leave"] for note in notes)
        saves.hears([note["saves"] for note in notes])
        last = bool(stop or leave or source.ended)
        if records:
            saves.update(carry[0].tree(), records, limits, last=last)
        if last:
            cause = _cause(stop, leave, source.why)
            here = limits._replace(max_steps=step)
            ready = inputs = inputs._replace(limits=here)  # With this limit, the loop evaluates once more and ends.
        began = time.perf_counter()
        way = (carry, ready, step)
        carry = source.evaluate(*way) if last else source.advance(*way, limit)
        state = carry[0].tree()  # This waits for the chunk.
        seconds = time.perf_counter() - began
        if compiled.verify is not None:
            carry, cause = _verified(compiled.verify, carry, inputs, cause)
            state = carry[0].tree()
        running, reached = is_running(state), int(state.step)
        count = reached - step + (not running)
        records.append(_rows(carry, count, compiled.width))
        if count:
            sizes.measure(count, seconds)
            step = reached
            if cause not in (Status.STOPPED, Status.INTERRUPTED):
                carry, stop = between(step, carry, state, records[-1], look)
    if not running:
        saves.finish(carry[0].tree(), records, limits)
    return carry, joined_rows(records), cause


def _ready(inputs: Inputs) -> Inputs:
    """Put the numbers of the inputs on the device once, as each call of a program would do. Meshes copy them."""
    leaves, treedef = jax.tree.flatten(inputs)
    if any(isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1 for leaf in leaves):
        return inputs
    return treedef.unflatten(map(_trees.on_device, leaves))


def _verified(
    verify: Callable[[Carry, Inputs], Carry], carry: Carry, inputs: Inputs, cause: Status | None
) -> tuple[Carry, Status | None]:
    """Verify the claim of a state. If Ctrl-C comes meanwhile, the run ends without the claim."""
    try:
        return verify(carry, inputs), cause
    except _signals.Interrupted:
        state = carry[0].tree()._replace(code=np.int32(Status.MAX_STEPS))
        return (_trees.pack(state), carry[1]), Status.INTERRUPTED


class _Sizes:
    """The sizes of a run's chunks. They are chosen by time, so that Ctrl-C and the progress bar wait for none long.

    A step may take longer than all before: another run of the same program had other data, and a loss may loop more
    often the farther it gets. So a run begins with one step, or with what took two milliseconds in the last run, and
    looks only as far ahead as it has looked back.
    """

    def __init__(self, pace: list[float], capacity: int, *, large: bool = False):
        self._capacity = capacity  # the rows for which a carry has room
        self._large = large
        self._pace, self._known = pace, pace[0] if pace else 0.0  # the seconds of a step in the last run
        self._made = 0
        self._seconds = 0.0  # of a step in the chunk before
        self._slowest = 0.0  # of a step in any chunk but the first, of which the host takes the larger part
        self._estimate = self._known  # of a step in the next chunk
        self._most = max(_FIRST_CHUNK, int(_FIRST_SECONDS / self._known)) if pace else _FIRST_CHUNK

    def next(self) -> int:
        """Return the number of steps of the next chunk."""
        size, seconds = self._most, _CHUNK_SECONDS * (_PATIENCE if peers().several else 1)
        if self._estimate:
            many = min(_STEPS, int(_SECONDS / self._estimate)) if self._large else 1
            size = min(size, max(int(seconds / self._estimate), many))
        return min(max(size, 1), self._capacity)

    def measure(self, count: int, seconds: float) -> None:
        """Take in how long a chunk took."""
        step = max(seconds - _HOST_SECONDS, seconds / 10, 1e-9) / count
        first, self._made = not self._made, self._made + count
        slower = max(step / self._seconds, 1) if self._seconds else 1  # Steps that get slower will do so again.
        self._estimate, self._seconds, self._most = step * slower, step, _GROWTH * self._made
        if first and self._known and step < 2 * max(self._known, _HOST_SECONDS):
            # One step is as fast as those of the last run, or too fast to measure. So trust that run for one chunk.
            self._estimate = max(self._known, step / 10)
            self._most = max(self._most, int(_LONGEST * count / seconds))
        self._slowest = 0.0 if first else max(step, self._slowest)
        self._pace[:] = [self._slowest or step]


def _cause(stop: Status | None, leave: bool, why: str) -> Status | None:
    """Return the status of a run that ends from outside: by Ctrl-C, by `Between`, or by a stream that ended early."""
    if leave:
        return Status.INTERRUPTED
    return stop or (Status.DATA_EXHAUSTED if why else None)


def _rows(carry: Carry, count: int, width: int) -> Rows:
    """Return the first rows that the carry holds; the last ``width`` numbers of each are params."""
    rows = _trees.on_host(carry[1])[:count]
    columns = rows.transpose(-1, *range(rows.ndim - 1))[:3]
    if not width:
        return Rows(*np.array(columns), metrics=np.array(rows[..., 3:]))
    return Rows(*np.array(columns), metrics=np.array(rows[:, 3:-width]), params=np.array(rows[:, -width:]))


def run(
    compiled: Compiled, source: InMemory | Streamed, inputs: Inputs, watcher: Watcher, saves: Saves | NoSaves
) -> tuple[float, State, History, Status]:
    """Compile and run to the end: see `advance`. Return the time at which all was compiled, too.

    If an optimizer keeps an average of the params, the average is evaluated last; with a validation, the best point is.
    """
    with _error_notes.memory(params=inputs.start, state=compiled.carry, data=inputs.data, args=inputs.args):
        validator = watcher.validator
        carry = begin(compiled, inputs)
        validator.prepare(carry)
        compiled_at = time.perf_counter()
        fresh = isinstance(saves, NoSaves) and not validator.is_given
        carry, rows, cause = advance(compiled, source, carry, inputs, watcher, saves=saves, fresh=fresh)
        state = carry[0].tree()
        code = Status(int(state.code))
        status = cause if cause and code is Status.MAX_STEPS else code
        if status not in FAILURES:
            if status is not Status.INTERRUPTED:
                validator.validate(state)
            carry = _averaged(source, inputs, carry)
        best, state = validator.best, carry[0].tree()
        if best is not None:
            state = _at_best(source, inputs, carry, best, rows, failed=status in FAILURES)
    return compiled_at, state, watcher.history(rows, compiled.width), status


def _evaluated(source: InMemory | Streamed, inputs: Inputs, carry: Carry, **changes: Any) -> Carry:
    """Evaluate the point of a state, with some changes, and make no step."""
    state = carry[0].tree()._replace(code=np.int32(RUNNING), **changes)
    step = int(state.step)
    here = inputs._replace(limits=inputs.limits._replace(max_steps=step))
    return source.evaluate((_packed(state, carry), carry[1]), here, step)


@as_own_work
def _packed(state: State, like: Carry) -> Any:
    """Pack a state, and place it as the one of a carry."""
    return jax.tree.map(put_like, _trees.pack(state), like[0])


def _averaged(source: InMemory | Streamed, inputs: Inputs, carry: Carry) -> Carry:
    """Evaluate the average of the params, if the optimizer keeps one."""
    state = carry[0].tree()
    with own_work(), own_promotion():
        average = evaluation_params(state.optimizer, state.params)
    return carry if average is state.params else _evaluated(source, inputs, carry, params=average)


@as_own_work
def _look(source: InMemory | Streamed, inputs: Inputs, carry: Carry) -> tuple[Carry, State]:
    """Evaluate the point of a carry as the end of a run does, and return the carry with which the run continues.

    That is the same to the last bit. So the best point is copied, because the evaluation may take its place. If the run
    has ended, only the average of an optimizer is left to evaluate.
    """
    before = carry[0].tree()
    kept = jax.tree.map(lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf, before.kept)
    if before.code == RUNNING:
        carry = _evaluated(source, inputs, carry)
    here = carry[0].tree()
    params = here.params
    with own_promotion():
        if evaluation_params(here.optimizer, params) is not params:  # Leaves without an average would be donated.
            params = _trees.copy(params)
    carry = _averaged(source, inputs, carry)
    state = carry[0].tree()
    return (_packed(state._replace(code=before.code, params=params, kept=kept), carry), carry[1]), state


def _at_best(
    source: InMemory | Streamed, inputs: Inputs, carry: Carry, best: Best, rows: Rows, *, failed: bool
) -> State:
    """Return the last state with the best point by validation, evaluated, as the one to return."""
    last = carry[0].tree()
    if best.step == int(last.step) and not failed:
        return last
    order = _trees.copy(last.order)  # The evaluation may shuffle anew.
    point = {"params": best.params, "model": best.model, "step": np.int32(best.step)}
    after = _evaluated(source, inputs, carry, **point)[0].tree()
    kept, is_average = after.kept, evaluation_params(after.optimizer, after.params) is not after.params
    # In the run, a stream gave another batch for it. If the loss is not finite on this one, nothing was kept.
    if int(kept.step) == best.step < len(rows.loss) and not is_average:
        measured = {name: np.asarray(getattr(rows, name)[best.step]) for name in ("loss", "grad_norm")}
        kept = kept._replace(**{name: x.astype(getattr(kept, name).dtype) for name, x in measured.items()})
    return last._replace(optimizer=after.optimizer, order=order, kept=kept, ending=after.ending)
