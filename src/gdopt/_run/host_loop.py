"""The host's side of a run: chunks of steps, sized by time. Between two chunks it reports, and checks for Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np

from gdopt import _error_notes, _signals, _trees
from gdopt._checkpoint.resume import NoSaves, Saves
from gdopt._devices.processes import peers
from gdopt._loop import while_loops
from gdopt._loop.state import Carry, Compiled, Inputs, State
from gdopt._optimizers.optax_state import evaluation_params
from gdopt._problem.limits import LAST_STEP
from gdopt._result import History, concatenated
from gdopt._run.callback import Watcher
from gdopt._run.sources import InMemory, Streamed
from gdopt._settings import own_promotion, own_work
from gdopt._status import FAILURES, RUNNING, Status

_FIRST_CHUNK = 1  # steps of a chunk before their time is known
_CHUNK_SECONDS = 0.05  # the time of a chunk, for which Ctrl-C and the progress bar wait
_GROWTH = 4  # the most steps of a chunk over those that the run has made: later ones may take longer
_LONGEST = 0.4  # the seconds that a chunk may take if the time of its steps was seen in one step alone
_PATIENCE = 5  # the factor on _CHUNK_SECONDS if several processes have to agree on each chunk
_HOST_SECONDS = 2e-4  # the overhead of the host per chunk


def begin(compiled: Compiled, inputs: Inputs) -> Carry:
    """Return the state before the first step, with everything compiled, if necessary by a chunk of no steps."""
    carry = compiled.start(inputs)
    if not compiled.pace:
        carry, _ = compiled.chunk(carry, np.int32(0), np.int32(0), inputs)
    return jax.block_until_ready(carry)


def at_start(compiled: Compiled, source: InMemory | Streamed, inputs: Inputs) -> tuple[Inputs, State, History, Status]:
    """Evaluate the start, and make no step. Return the inputs of that, too."""
    inputs = inputs._replace(limits=inputs.limits._replace(max_steps=0))
    carry = source.evaluate(begin(compiled, inputs), inputs, 0)
    state = carry[0].tree()
    return source.last_inputs(inputs), state, _history(carry, 1), Status(int(state.code))


def advance(
    compiled: Compiled,
    source: InMemory | Streamed,
    carry: Carry,
    inputs: Inputs,
    between: Callable[[int, State, History], bool],
    *,
    saves: Saves | NoSaves,
    until: int = LAST_STEP,
    boundary: int = LAST_STEP,
) -> tuple[Carry, History, Status | None]:
    """Run chunk after chunk to the end, or to the step ``until``, or until ``between`` says stop, or Ctrl-C.

    ``between`` is called after each chunk with the steps made, the state and the chunk's records. No chunk crosses a
    multiple of ``boundary`` steps. Chunks are sized by time, and their sizes change no bit of the result. After a stop,
    the last point of the state is still evaluated. Return what stopped the run from outside, if anything did.
    """
    limits, cause, stop = inputs.limits, None, False
    carry, records = saves.restored(carry, limits)
    state = carry[0].tree()
    step, running = int(state.step), _is_running(state)
    source.resume(step + (not running), saves)  # A run that ended by itself evaluated one more batch.
    if not running:  # The saved run is complete.
        return carry, concatenated(records), None
    source.begin()
    sizes = _Sizes(compiled.pace)
    while running and step != until:
        limit = min(step + sizes.next(), (step // boundary + 1) * boundary, until)
        limit = saves.limited(step, limit, limits)
        notes = peers().exchange(limit=limit, stop=stop, leave=_signals.pressed(), saves=saves.tells())
        limit = notes[0]["limit"]  # of the first process
        stop, leave = (any(note[name] for note in notes) for name in ("stop", "leave"))
        saves.hears([note["saves"] for note in notes])
        last = stop or leave or source.ended
        if records:
            saves.update(state, records, limits, last=last)
        if last:
            cause = _cause(stop, leave, source.why)
            here = limits._replace(max_steps=step)
            inputs = inputs._replace(limits=here)  # With this limit, the loop evaluates once more and ends.
        began = time.perf_counter()
        way = (carry, inputs, step)
        carry = source.evaluate(*way) if last else source.advance(*way, limit)
        state = carry[0].tree()  # This waits for the chunk.
        seconds = time.perf_counter() - began
        if compiled.verify is not None:
            carry, cause = _verified(compiled.verify, carry, inputs, cause)
            state = carry[0].tree()
        running, reached = _is_running(state), int(state.step)
        count = reached - step + (not running)
        records.append(_history(carry, count))
        if count:
            sizes.measure(count, seconds)
            step = reached
            stop = cause is None and between(step, state, records[-1])
    if not running:
        saves.finish(state, records, limits)
    return carry, concatenated(records), cause


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
    often the farther it gets. So a run begins with one step, and looks only as far ahead as it has looked back.
    """

    def __init__(self, pace: list[float]):
        self._pace, self._known = pace, pace[0] if pace else 0.0  # the seconds of a step in the last run
        self._made = 0
        self._seconds = 0.0  # of a step in the chunk before
        self._slowest = 0.0  # of a step in any chunk but the first, of which the host takes the larger part
        self._estimate = 0.0  # of a step in the next chunk
        self._most = _FIRST_CHUNK

    def next(self) -> int:
        """Return the number of steps of the next chunk."""
        size, seconds = self._most, _CHUNK_SECONDS * (_PATIENCE if peers().several else 1)
        if self._made:
            size = min(size, int(seconds / self._estimate))
        return min(max(size, 1), while_loops.CAPACITY)

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


def _is_running(state: State) -> bool:
    """Tell whether any of the runs side by side continues."""
    return bool((_trees.on_host(state.code) == RUNNING).any())


def _cause(stop: bool, leave: bool, why: str) -> Status | None:
    """Return the status of a run that ends from outside: by Ctrl-C, the callback, or a stream that ended too early."""
    if leave:
        return Status.INTERRUPTED
    if stop:
        return Status.STOPPED
    return Status.DATA_EXHAUSTED if why else None


def _history(carry: Carry, count: int) -> History:
    """Return the first rows that the carry holds."""
    return History(*np.array(np.moveaxis(_trees.on_host(carry[1])[:count], -1, 0)))


def run(
    compiled: Compiled, source: InMemory | Streamed, inputs: Inputs, watcher: Watcher, saves: Saves | NoSaves
) -> tuple[float, State, History, Status]:
    """Compile and run to the end: see `advance`. Return the time at which all was compiled, too.

    If an optimizer keeps an average of the params, the average is evaluated last.
    """
    with _error_notes.memory(params=inputs.start, state=compiled.carry, data=inputs.data, args=inputs.args):
        carry = begin(compiled, inputs)
        compiled_at = time.perf_counter()
        carry, history, cause = advance(
            compiled, source, carry, inputs, watcher, saves=saves, boundary=watcher.boundary
        )
        state = carry[0].tree()
        code = Status(int(state.code))
        status = cause if cause and code is Status.MAX_STEPS else code
        with own_work(), own_promotion():
            average = evaluation_params(state.optimizer, state.params)
        if average is not state.params and status not in FAILURES:
            step = int(state.step)
            last = inputs._replace(limits=inputs.limits._replace(max_steps=step))
            again = _trees.pack(state._replace(code=np.int32(RUNNING), params=average))
            state = source.evaluate((again, carry[1]), last, step)[0].tree()
    return compiled_at, state, history, status
