"""The data for the steps of a run: all of it in memory, or batch by batch from a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gdopt import _signals, _trees
from gdopt._checkpoint.identity import with_checksum
from gdopt._checkpoint.resume import NoSaves, Saves
from gdopt._checks import warn
from gdopt._devices.processes import peers
from gdopt._devices.sharding import CLOSED_OVER, anchor, on_one_mesh
from gdopt._errors import InputError
from gdopt._loop.state import Carry, Compiled, Inputs
from gdopt._problem.limits import Steps
from gdopt._problem.problem import Problem
from gdopt._problem.stream import Batch, Feed
from gdopt._status import RUNNING
from gdopt._stopping import Epoch
from gdopt._types import PyTree

_BATCH = "a batch of data"
_SHAPES = 2  # the shapes of batches that cause no warning: full ones, and the last of a pass


class InMemory:
    """Steps on data that the device holds, many in each call of the program."""

    ended, why = False, ""

    def __init__(self, problem: Problem, compiled: Compiled):
        self.steps_per_epoch = problem.steps_per_epoch
        self._compiled = compiled

    def resume(self, made: int, saves: Saves | NoSaves) -> None:
        """Do nothing: the state holds the number of steps."""

    def begin(self) -> None:
        """Do nothing: all data are on the device."""

    def epoch(self, step: int) -> int:
        """Return how many passes over the data are complete after so many steps."""
        return step // (self.steps_per_epoch or 1)

    def ends_epoch(self, step: int) -> bool:
        """Tell whether an epoch ends with so many steps."""
        return step > 0 and step % (self.steps_per_epoch or 1) == 0

    def advance(self, carry: Carry, inputs: Inputs, first: int, limit: int) -> Carry:
        """Make the steps from ``first`` to ``limit``."""
        return self._compiled.chunk(carry, np.int32(first), np.int32(limit), inputs)[0]

    def evaluate(self, carry: Carry, inputs: Inputs, step: int) -> Carry:
        """Evaluate the point of a step once more."""
        return self.advance(carry, inputs, step, step + 1)

    def last_inputs(self, inputs: Inputs) -> Inputs:
        """Return the inputs of the last evaluation."""
        return inputs


class Streamed:
    """Steps on the batches of a stream: while one is computed, the next one waits and the batch after that is fetched.

    A batch in NumPy's memory is passed to its step unchanged. JAX moves it to the device when the step is dispatched,
    while the previous one is computed. That takes a fraction of the host time of `jax.device_put`.
    """

    def __init__(self, feed: Feed, compile_for: Callable[[PyTree], tuple[Any, Inputs]], *, pause: bool):
        self.ended = False
        self._feed = feed
        self._compile_for, self._pause = compile_for, pause  # whether to pause at the end of each pass
        self._programs: dict[Any, tuple[Compiled, list]] = {}  # by the shapes of batches
        self._given: Batch | None = None
        self._next: Batch | None = None
        self._made: int | None = None  # the steps before this call
        self._begun = False
        self._saves: NoSaves | Saves = NoSaves()
        self._anchor: dict[str, jax.Array] = {}  # an array that has to stay on its devices

    @property
    def why(self) -> str:
        """The reason why the stream ended too early; "" if it did not."""
        return self._feed.why

    @property
    def steps_per_epoch(self) -> int | None:
        """The number of batches in the first pass, once it is known."""
        return self._feed.steps_per_epoch

    def resume(self, made: int, saves: Saves | NoSaves) -> None:
        """Note the number of batches that were used before, and pull none yet. Only the first call counts."""
        if self._made is not None:
            return
        self._made, self._saves = made, saves
        saves.feed, saves.batches = self._feed, self.checksums
        self._feed.go_on(made, saves.position, saves.steps_per_epoch, keeps=saves.keeps_positions)

    def begin(self) -> None:
        """Pull the last batch that was used before, and the next. A stream without positions replays all before."""
        if self._begun:
            return
        self._begun, made = True, self._made or 0
        self._next = self._feed.next()
        for count in range(self._feed.first, made):
            if self._next is None:
                raise InputError(
                    f"data ended after {count} batches, but the checkpoint is of a run that used {made}. Pass the same "
                    "batches as before, or another path."
                )
            if _signals.pressed() and not peers().several:
                break  # The run ends at its checkpoint, and any batch will do for the last evaluation.
            self._given, self._next = self._next, self._feed.next()
        self._saves.compare_batches(self.checksums)

    def checksums(self) -> dict[str, str]:
        """Return the checksums of the batch given last and of the next one, by their numbers."""
        around = [batch for batch in (self._given, self._next) if batch is not None]
        return {str(batch.number): with_checksum(batch.data) for batch in around}

    def epoch(self, step: int) -> int:
        """Return how many passes are complete with the batch given last."""
        return self._given.passes if self._given else 0

    def ends_epoch(self, step: int) -> bool:
        """Tell whether a pass ends with the batch given last."""
        return self._given is not None and self._given.ends and self._given.number == step - 1

    def advance(self, carry: Carry, inputs: Inputs, first: int, limit: int) -> Carry:
        """Make the steps from ``first`` to ``limit``, or less."""
        before, others = None, peers()
        for step in range(first, limit):
            leave = step > first and _signals.pressed()
            if leave and not others.several:
                break
            batch = self._next
            # Each process has its own part of each batch, and may have fewer of them.
            notes = others.exchange(ended=batch is None, leave=leave)
            ended, leave = (any(note[name] for note in notes) for name in ("ended", "leave"))
            if batch is None or ended or leave:
                self.ended = ended
                break
            given, self._given = self._given, batch
            carry, code = self._step(carry, inputs, first, step, batch)
            if before is not None and not (_trees.on_host(before) == RUNNING).any():
                self._given = given
                break  # The run had ended before this step, so the batches ahead are not needed.
            before = code
            self._next = self._feed.next()  # The batch is fetched while the step is computed.
            if self._pause and batch.ends:
                break
        return carry

    def evaluate(self, carry: Carry, inputs: Inputs, step: int) -> Carry:
        """Evaluate the point of a step once more, on the batch given last."""
        return self._step(carry, inputs, step, step, self._last()._replace(ends=False))[0]

    def last_inputs(self, inputs: Inputs) -> Inputs:
        """Return the inputs of the last evaluation, with its batch."""
        return inputs._replace(data=self._last().data)

    def _last(self) -> Batch:
        self.begin()
        batch = self._given or self._next
        assert batch is not None
        return batch

    def _step(self, carry: Carry, inputs: Inputs, first: int, step: int, batch: Batch) -> tuple[Carry, jax.Array]:
        data = self._placed(batch.data, inputs)
        compiled, constants = self._program(data, batch)
        epoch = Epoch(batch.begins, batch.ends, batch.steps)
        given = inputs._replace(data=data, constants=constants, epoch=epoch)
        return compiled.chunk(carry, np.int32(first), np.int32(step + 1), given)

    def _placed(self, data: PyTree, inputs: Inputs) -> PyTree:
        """Place the arrays of a batch on the devices of the run; those of the host go there with the step."""
        if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(data)):
            return data
        if not self._anchor:
            given = {"params": inputs.start, "args": inputs.args, CLOSED_OVER: inputs.constants}
            self._anchor = anchor({**given, "the first batch of data": inputs.data})
        placed = on_one_mesh({**self._anchor, _BATCH: data})[0][_BATCH]
        self._anchor = self._anchor or anchor({"an earlier batch of data": placed})
        return placed

    def _program(self, data: PyTree, batch: Batch) -> tuple[Compiled, list]:
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(data))
        if shapes not in self._programs:
            if len(self._programs) == _SHAPES:
                warn(
                    f"the batches of data have more than {_SHAPES} shapes, now {list(shapes)}, and the step is "
                    "recompiled for each. Pad them, or leave out those that are not full."
                )
            try:
                compiled, inputs = self._compile_for(data)
            except Exception as error:
                self._feed.refuse(batch, error)
                raise
            for other, _ in self._programs.values():
                if jax.tree.map(_kind, compiled.carry) != jax.tree.map(_kind, other.carry):
                    raise InputError(
                        f"the loss returned an aux whose shapes depend on those of the batch, {list(shapes)}. Return "
                        "one that does not, or pass batches of one shape."
                    )
            self._programs[shapes] = compiled, inputs.constants
        return self._programs[shapes]


def source_of(
    problem: Problem,
    compiled: Compiled,
    compile_for: Callable[[PyTree], tuple[Any, Inputs]],
    steps: Steps,
    *,
    pause: bool,
) -> InMemory | Streamed:
    """Return the source of a problem's steps; ``compile_for`` compiles the step for batches of another shape."""
    if problem.stream is None:
        return InMemory(problem, compiled)
    return Streamed(Feed(problem.stream, steps.epochs, steps.most), compile_for, pause=pause)


def _kind(leaf: Any) -> tuple:
    return leaf.shape, leaf.dtype
