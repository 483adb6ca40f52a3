"""The host's side of a run: chunk after chunk, sized by time; between two it reports, and listens for Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from gdopt import _trees
from gdopt._checkpoint.resume import Saves
from gdopt._checks import warn
from gdopt._devices.processes import peers
from gdopt._errors import InputError
from gdopt._loop.state import Carry, Compiled, Inputs, State, returned_params
from gdopt._loop.while_loops import CAPACITY
from gdopt._optimizers.rule import evaluation_params
from gdopt._problem.data import Batch, Feed
from gdopt._problem.limits import LAST_STEP
from gdopt._result import History
from gdopt._settings import own_promotion, own_work
from gdopt._status import FAILURES, RUNNING, Status
from gdopt._stopping import Epoch
from gdopt._types import PyTree

_FIRST_CHUNK = 16  # steps, before their time is known
_CHUNK_SECONDS = 0.05  # Ctrl-C and the progress bar wait for one chunk
_PATIENCE = 5  # times that, where several processes have to agree on each
_BOUNDARY_SECONDS = 2e-4  # what the host takes between two
_SHAPES = 2  # of batches that are taken without a word: full ones, and one that is not


def begin(compiled: Compiled, inputs: Inputs) -> Carry:
    """The state before the first step, with everything compiled: where nothing ran yet, by a chunk of no steps."""
    carry = compiled.start(inputs)
    if not compiled.pace:
        carry, _ = compiled.chunk(carry, np.int32(0), np.int32(0), inputs)
    return jax.block_until_ready(carry)


class Streamed:
    """Steps on the batches of a stream: as one is computed, the next one waits and the batch after that is fetched.

    A batch in NumPy's memory is an argument of its step as it is. JAX moves it to the device when the step is
    dispatched, while the one before is computed, and takes a fraction of the host's time that `jax.device_put` takes.
    """

    def __init__(self, feed: Feed, compile_for: Callable[[PyTree], tuple[Any, Inputs]], *, pause: bool):
        self.feed = feed
        self.ended = False
        self._compile_for, self._pause = compile_for, pause  # at the end of each pass
        self._programs: dict[Any, tuple[Compiled, list]] = {}  # by the shapes of batches
        self._given: Batch | None = None
        self._next: Batch | None = None
        self._made: int | None = None  # steps before the first of this call
        self._begun = False

    @property
    def passes_made(self) -> int:
        """Passes that are complete with the batch given last."""
        return self._given.passes if self._given else 0

    def go_on(self, made: int, saves: Saves | None) -> None:
        """Says how many batches were used before; pulls none yet. Once: later it knows by itself."""
        if self._made is not None:
            return
        self._made = made
        if saves is not None:
            saves.feed = self.feed
            # Each process has a stream of its own, and a save has room for one: there, they skip.
            self.feed.go_on(made, saves.position, saves.steps_per_epoch, keeps=peers() is None)

    def begin(self) -> None:
        """Pulls the last batch that was used before, of a stream that has no positions all of those, and the next."""
        if self._begun:
            return
        self._begun, made = True, self._made or 0
        self._next = self.feed.next()
        for count in range(self.feed.first, made):
            if self._next is None:
                raise InputError(
                    f"data ended after {count} batches, and the checkpoint is of a run that used {made}: give the same "
                    "batches as before, or pass another path."
                )
            self._given, self._next = self._next, self.feed.next()

    def advance(self, carry: Carry, inputs: Inputs, first: int, limit: int, interrupted: list) -> Carry:
        """From step ``first`` to ``limit``, or less."""
        before, others = None, peers()
        for step in range(first, limit):
            leave = bool(interrupted) and step > first
            if leave and not others:
                break
            batch = self._next
            ended = batch is None
            if others:  # each process has its own part of each batch, and may have fewer of them
                notes = others.exchange(ended=ended, leave=leave)
                ended, leave = (any(note[name] for note in notes) for name in ("ended", "leave"))
            if batch is None or ended or leave:
                self.ended = ended
                break
            given, self._given = self._given, batch
            carry, code = self._step(carry, inputs, first, step, batch)
            if before is not None and not (_trees.on_host(before) == RUNNING).any():
                self._given = given
                break  # so this step was none, and the batches ahead are not needed
            before = code
            self._next = self.feed.next()  # now, as the step is computed
            if self._pause and batch.ends:
                break
        return carry

    @property
    def data(self) -> PyTree:
        """The batch that the last evaluation was of."""
        return self._last().data

    def evaluate(self, carry: Carry, inputs: Inputs, step: int) -> Carry:
        """The point of a step on the batch given last, once more."""
        return self._step(carry, inputs, step, step, self._last()._replace(ends=False))[0]

    def _last(self) -> Batch:
        self.begin()
        batch = self._given or self._next
        assert batch is not None
        return batch

    def _step(self, carry: Carry, inputs: Inputs, first: int, step: int, batch: Batch) -> tuple[Carry, jax.Array]:
        compiled, constants = self._program(batch.data)
        epoch = Epoch(batch.begins, batch.ends, batch.steps)
        given = inputs._replace(data=batch.data, constants=constants, epoch=epoch)
        return compiled.chunk(carry, np.int32(first), np.int32(step + 1), given)

    def _program(self, data: PyTree) -> tuple[Compiled, list]:
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(data))
        if shapes not in self._programs:
            if len(self._programs) == _SHAPES:
                warn(
                    f"the batches of data come in more than {_SHAPES} shapes, now with {list(shapes)}, and the step is "
                    "compiled anew for each: pad them, or leave out those that are not full."
                )
            compiled, inputs = self._compile_for(data)
            for other, _ in self._programs.values():
                if jax.tree.map(_kind, compiled.carry) != jax.tree.map(_kind, other.carry):
                    raise InputError(
                        f"the loss returned an aux whose shapes depend on those of the batch, {list(shapes)}: return "
                        "one that does not, or give batches of one shape."
                    )
            self._programs[shapes] = compiled, inputs.constants
        return self._programs[shapes]


def _kind(leaf: Any) -> tuple:
    return leaf.shape, leaf.dtype


def advance(
    compiled: Compiled,
    carry: Carry,
    inputs: Inputs,
    between: Callable[[int, State, History], bool],
    *,
    until: int = LAST_STEP,
    boundary: int | None = None,
    streamed: Streamed | None = None,
    saves: Saves | None = None,
) -> tuple[Carry, History, Status | None]:
    """Runs chunk after chunk to the end, or to the step ``until``, or until ``between`` says stop, or Ctrl-C.

    ``between`` is called after each chunk with the steps made, the state and the chunk's records. No chunk crosses a
    multiple of ``boundary`` steps. Chunks are sized by time; their sizes change no bit of the result. After a stop, the
    state's last point is evaluated still. Returns what stopped it from outside, if anything did. With ``saves`` it goes
    on from the one that was found, and makes others.
    """
    limits, records = inputs.limits, []
    if saves is not None:
        carry, records = saves.restored(carry, limits)
    state = carry[0].tree()
    step, cause, running = int(state.step), None, bool((_trees.on_host(state.code) == RUNNING).any())
    if streamed is not None:
        streamed.go_on(step + (not running), saves)  # what ended by itself has looked at one more
    if not running:  # all of it was saved
        return carry, joined(records), None
    if streamed is not None:
        streamed.begin()
    stop, others = False, peers()
    seconds_of_chunk = _CHUNK_SECONDS * (_PATIENCE if others else 1)
    with ctrl_c() as interrupted:
        while True:
            size = max(1, int(seconds_of_chunk / compiled.pace[0])) if compiled.pace else _FIRST_CHUNK
            limit = step + min(size, CAPACITY)
            limit = limit if boundary is None else min(limit, (step // boundary + 1) * boundary)
            if saves is not None and step < int(limits.max_steps):
                limit = min(limit, int(limits.max_steps))  # to save before the last point is evaluated
            limit, pressed = min(limit, until), bool(interrupted)
            if others:
                limit, stop, pressed, told = others.agree(limit, stop, pressed, saves and saves.tells())
                if saves is not None:
                    saves.hears(told)
            ended = streamed is not None and streamed.ended
            last = stop or pressed or ended
            if saves is not None and records:
                if last or step >= int(limits.max_steps):  # of which the end may be put off by another call
                    saves.finish(state, joined(records), limits)
                elif saves.due():
                    saves.save(state, joined(records), limits)
            if last:
                if pressed or stop:
                    cause = Status.INTERRUPTED if pressed else Status.STOPPED
                elif streamed is not None and streamed.feed.why:
                    cause = Status.DATA_EXHAUSTED
                here = inputs.limits._replace(max_steps=step)
                inputs = inputs._replace(limits=here)  # evaluates once more, and ends
            began = time.perf_counter()
            if streamed is None:
                carry, _ = compiled.chunk(carry, np.int32(step), np.int32(limit), inputs)
            elif last:
                carry = streamed.evaluate(carry, inputs, step)
            else:
                carry = streamed.advance(carry, inputs, step, limit, interrupted)
            state = carry[0].tree()  # waits for the chunk
            seconds = time.perf_counter() - began
            if compiled.verify is not None:
                carry = compiled.verify(carry, inputs)
                state = carry[0].tree()
            reached, running = int(state.step), bool((_trees.on_host(state.code) == RUNNING).any())
            count = reached - step + (not running)
            records.append(_history(carry, count))
            if count:
                compiled.pace[:] = [max(seconds - _BOUNDARY_SECONDS, seconds / 10, 1e-9) / count]
                step = reached
                stop = cause is None and between(step, state, records[-1])
            if not running or step == until:
                break
        if saves is not None and not running:
            saves.finish(state, joined(records), limits)
    return carry, joined(records), cause


def _history(carry: Carry, count: int) -> History:
    """The first rows that the carry holds."""
    return History(*np.array(np.moveaxis(_trees.on_host(carry[1])[:count], -1, 0)))


def joined(records: list[History]) -> History:
    """One history of many."""
    return History(*(np.concatenate(entries) for entries in zip(*records, strict=True)))


def run(
    compiled: Compiled,
    carry: Carry,
    inputs: Inputs,
    between: Callable[[int, State, History], bool],
    *,
    boundary: int | None,
    streamed: Streamed | None,
    saves: Saves | None,
) -> tuple[State, History, Status]:
    """Runs to the end: see `advance`. Of an optimizer that keeps an average, the average is evaluated last."""
    carry, history, cause = advance(compiled, carry, inputs, between, boundary=boundary, streamed=streamed, saves=saves)
    state = carry[0].tree()
    code = Status(int(state.code))
    status = cause if cause and code is Status.MAX_STEPS else code
    with own_work(), own_promotion():
        average = evaluation_params(state.optimizer, state.params)
    if average is not state.params and status not in FAILURES:
        step = np.int32(state.step)
        last = inputs._replace(limits=inputs.limits._replace(max_steps=int(step)))
        again = _trees.pack(state._replace(code=np.int32(RUNNING), params=average))
        if streamed is None:
            carry, _ = compiled.chunk((again, carry[1]), step, step + 1, last)
        else:
            carry = streamed.evaluate((again, carry[1]), last, int(step))
        state = carry[0].tree()
    return state, history, status


def params_to_return(state: State) -> PyTree:
    """The params that ``state.kept`` tells the loss of, on the devices where the params are."""

    def placed(leaf: Any, like: Any) -> jax.Array:
        if isinstance(leaf, jax.Array):
            return leaf
        array = jax.device_put(leaf)
        shared = isinstance(like, jax.Array) and array.sharding != like.sharding
        return jax.device_put(leaf, like.sharding) if shared else array

    return jax.tree.map(placed, returned_params(state), state.params)


@contextlib.contextmanager
def ctrl_c() -> Iterator[list[bool]]:
    """A list that is no longer empty after Ctrl-C or SIGTERM, which then ends the run with its state intact.

    An exception would come between any two bytecodes, also where the old state is donated and the new one not yet
    bound. SIGTERM, by which schedulers tell a process to end, is taken in the same way. After the first one, the usual
    handlers are back: a second Ctrl-C raises KeyboardInterrupt. Somebody else's handler, or another thread, is left
    alone.
    """
    pressed: list[bool] = []
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    taken = [number for number, handler in usual.items() if signal.getsignal(number) is handler]

    def give_back() -> None:
        for number in taken:
            if signal.getsignal(number) is handler:  # and not one that a callback has put in its place
                signal.signal(number, usual[number])

    def handler(signum: int, frame: Any) -> None:
        pressed.append(True)
        give_back()

    for number in taken:
        signal.signal(number, handler)
    _taken.append(give_back)
    try:
        yield pressed
    finally:
        _taken.remove(give_back)
        give_back()


_taken: list[Callable[[], None]] = []


def _after_fork() -> None:
    """A loader's workers, forked from a run, are to end by a signal, as a pool's do by SIGTERM."""
    for give_back in reversed(_taken):
        give_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
