"""Checkpoints of a run, and resuming from them: bit-for-bit as if the run had never stopped.

A checkpoint holds the state between two steps and the history up to it. All random numbers are drawn from the run's key
and the number of the step. So nothing else is needed, but for the position of a stream.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from importlib import metadata
from typing import Any

import jax
import numpy as np

from gdopt import _trees
from gdopt._checkpoint import sharded
from gdopt._checkpoint.file import SPREAD
from gdopt._checkpoint.folder import Checkpoint, Saved
from gdopt._checkpoint.identity import layout_of, numbers_of, run_identity, short
from gdopt._checkpoint.multi_process import JointSaver, opened
from gdopt._checkpoint.packing import as_fresh, as_saved
from gdopt._checks import warn
from gdopt._compile import program
from gdopt._devices.processes import peers
from gdopt._devices.sharding import put_like
from gdopt._errors import InputError
from gdopt._loop import loop
from gdopt._loop.state import Carry, State
from gdopt._optimizers.method import Method
from gdopt._optimizers.optax_state import trials_in
from gdopt._problem.problem import Problem
from gdopt._problem.stream import Feed, Position
from gdopt._result import History, RangeTest, concatenated
from gdopt._settings import own_promotion
from gdopt._status import FAILURES, RUNNING, Status
from gdopt._stopping import Limits


class NoSaves:
    """A run without a checkpoint: nothing is restored, and nothing is saved."""

    range_test: RangeTest | None = None
    feed: Feed | None = None
    position = steps_per_epoch = None
    keeps_positions = False
    told = ""

    def nothing(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    compare = compare_programs = tells = hears = update = finish = nothing

    def restored(self, carry: Carry, limits: Limits) -> tuple[Carry, list[History]]:
        """Return the fresh carry, and no history."""
        return carry, []

    def limited(self, step: int, limit: int, limits: Limits) -> int:
        """Return the limit of a chunk unchanged."""
        return limit


class Saves:
    """The checkpoints of a run: the one from which it resumes, if there is one, and those that it makes."""

    def __init__(self, saver: JointSaver, found: Saved | None):
        self.found = found
        self.range_test: RangeTest | None = None if found is None else _restored_test(found)
        self.feed: Feed | None = None  # None without a stream
        self._stream: dict[str, Any] = {} if found is None else found.meta.get("stream", {})
        self._saver = saver
        self._meta: dict[str, Any] = {}
        self._ended: Status | None = None  # how the saved run ended, if it does not continue

    @property
    def position(self) -> Position | None:
        """The position of the stream; None if there is none, or the stream did not report it."""
        told = self._stream
        if self.found is None or "state" not in told:
            return None
        state = self.found.arrays["stream"].tobytes()
        place = told["number"], told["passes"], told["steps"]
        return Position(*place, state if told["state"] == "bytes" else state.decode())

    @property
    def keeps_positions(self) -> bool:
        """Tell whether the position of a stream is saved, too. Several processes replay a stream each."""
        return not peers().several

    @property
    def steps_per_epoch(self) -> int | None:
        """The steps of an epoch of the stream, if they were known."""
        return self._stream.get("steps_per_epoch")

    @property
    def told(self) -> str:
        """A sentence on the step from which the run resumed, to follow others; "" if it began anew."""
        if self.found is None:
            return ""
        step, again = int(self.found.arrays["state.step"]), ""
        if self.feed is not None and self.feed.pulled and self.feed.first == 0 and step > 0:
            before = "the batch before it was" if step == 1 else f"the {step} batches before it were"
            again = f", and {before} replayed"
        file = os.path.basename(self.found.file)
        if self._ended in (*FAILURES, Status.PRECISION_LIMIT):
            return f" That was the end of the run saved in {file!r}. Pass another path to make another one."
        return f" It resumed from step {step}, saved in {file!r}{again}."

    def compare(self, problem: Problem, *, keep_best: bool) -> None:
        """Raise InputError if the checkpoint is of another run."""
        sharded.check_installed(problem.objective.params)
        given = run_identity(problem, keep_best=keep_best)
        self._meta = {"given": given, "start": program.checksum(problem.objective.params)}
        if self.found is None:
            return
        theirs = self.found.meta.get("given", {})
        for name, mine in given.items():
            # Old checkpoints have no scale.
            self._refuse_other(name, theirs.get(name, "nothing" if name == "scale" else None), mine)
        if self.found.meta.get("start") != self._meta["start"]:
            warn(f"params differ from the start of the run saved in {self.found.file!r}, which resumes all the same.")

    def compare_programs(self, problem: Problem, method: Method) -> None:
        """Raise InputError if the checkpoint is of another optimizer; warn of another loss or learning rate."""
        loss, updates = loop.digests(problem, method)
        text = short(repr(method.optimizer))
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "optax", "gdopt"))
        self._meta |= {"loss": loss, "optimizer": {"text": text, "updates": updates, "versions": versions}}
        if self.range_test is None:  # After a range test, a run with more steps has longer cycles.
            schedule = method.schedule
            with own_promotion():
                rate = repr(method.rate) if schedule is None else program.digest(schedule, np.int32(0))
            self._meta["learning_rate"] = rate
        if self.found is None:
            return
        theirs = self.found.meta.get("optimizer", {})
        if theirs.get("versions") != versions:  # Traces differ between versions.
            self._refuse_other("optimizer", theirs.get("text"), text)
        elif theirs["updates"] != updates:
            told = f"{theirs['text']} with updates of the checksum {theirs['updates']}"
            self._refuse_other("optimizer", told, f"{text} with {updates}")
        if self.found.meta.get("loss") != loss:
            warn(f"the loss is not that of the checkpoint {self.found.file!r}. The run resumes with the new loss.")

    def _refuse_other(self, name: str, theirs: Any, mine: Any) -> None:
        if theirs != mine:
            raise InputError(
                f"the checkpoint {self.found and self.found.file!r} is of another run: its {name} is {theirs}, but "
                f"here it is {mine}. Make the same call, or pass another path."
            )

    def restored(self, carry: Carry, limits: Limits) -> tuple[Carry, list[History]]:
        """Return the carry that replaces a fresh one, and the history so far."""
        fresh = carry[0].tree()
        sharded.check_installed(fresh)
        self._meta["layout"] = here = layout_of(carry)
        found = self.found
        if found is None:
            return carry, []
        there = found.meta.get("layout", here)  # Old checkpoints have no layout.
        if there != here:
            warn(
                f"the checkpoint {found.file!r} was made on {there}, but this is {here}. The run resumes, but its last "
                "bits will differ from those of an uninterrupted run."
            )
        state = as_fresh(self._state(found, fresh), fresh)
        history = History(*(found.arrays[f"history.{name}"] for name in History._fields))
        ended = int(state.code)
        others = found.meta["limits"] != numbers_of(limits)
        if found.meta["loss"] != self._meta["loss"]:  # Measurements of the old loss do not hold for the new one.
            others, best = True, np.full_like(state.kept.loss, np.inf)
            state = state._replace(watch=fresh.watch, kept=state.kept._replace(loss=best))
            if trials_in(state.optimizer) is not None:
                state = state._replace(optimizer=fresh.optimizer)
        # A run that ended at its limits continues if the limits have changed: its last point is evaluated once more.
        if ended == Status.MAX_STEPS or (ended != RUNNING and others):
            state = state._replace(code=np.int32(RUNNING))
            history = History(*(entries[:-1] for entries in history))
        elif ended != RUNNING:
            self._ended = Status(ended)
        rate = self._meta.get("learning_rate")
        if self._ended is None and found.meta.get("learning_rate", rate) != rate:  # Old checkpoints have none.
            warn(
                f"learning_rate is not that of the checkpoint {found.file!r}. The run resumes with the new "
                "learning_rate."
            )
        return (_trees.pack(state), carry[1]), [history]

    def _state(self, found: Saved, fresh: State) -> State:
        """Return the saved state, packed as it was, and each leaf on the devices of the fresh one."""
        arrays = found.arrays
        kinds = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        spread = found.meta.get(SPREAD)
        kinds |= {} if spread is None else sharded.kinds(spread)
        fresh = as_saved(fresh, kinds)
        kind = lambda shape, dtype: f"{dtype}{list(shape)}"
        places, unknown = {}, {name for name in kinds if name.startswith("state")}
        for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
            name, plain = _trees.path_name(path, "state"), _plain(leaf)
            theirs = kind(*kinds[name]) if name in kinds else "nothing"
            self._refuse_other(name, theirs, kind(plain.shape, plain.dtype))
            unknown.discard(name)
            places[name] = getattr(plain, "sharding", None)
        for name in sorted(unknown):
            self._refuse_other(name, kind(*kinds[name]), "nothing")
        if spread is not None:
            arrays = {**arrays, **sharded.load(found.file, spread, places)}

        def put(path: tuple, leaf: Any) -> Any:
            saved = arrays[_trees.path_name(path, "state")]
            if not isinstance(leaf, jax.Array):
                return np.asarray(saved)[()]
            if not isinstance(saved, jax.Array):  # what comes from orbax is in its place
                saved = put_like(saved, _plain(leaf))
            return jax.random.wrap_key_data(saved, impl=jax.random.key_impl(leaf)) if _trees.is_key(leaf) else saved

        return jax.tree_util.tree_map_with_path(put, fresh)

    def tells(self) -> Any:
        """Return what the other processes have to know about the checkpoints before each `due`."""
        return self._saver.tells()

    def hears(self, told: list) -> None:
        """Take in the notes of all processes."""
        self._saver.hears(told)

    def limited(self, step: int, limit: int, limits: Limits) -> int:
        """Limit a chunk to end at max_steps, so that this state is saved before its point is evaluated."""
        most = int(limits.max_steps)
        return min(limit, most) if step < most else limit

    def update(self, state: State, records: list[History], limits: Limits, *, last: bool) -> None:
        """Save the state between two steps if it is time; its arrays may then be donated to the next step.

        The ``last`` state is always saved, and so is one at max_steps, which another call may raise.
        """
        if last or int(state.step) >= int(limits.max_steps):
            self.finish(state, records, limits)
        elif self._saver.due():
            self._saver.save(*self._contents(state, concatenated(records), limits))

    def finish(self, state: State, records: list[History], limits: Limits) -> None:
        """Save the last state, and wait until it is on the disk."""
        self._saver.close(final=self._contents(state, concatenated(records), limits))

    def _contents(self, state: State, history: History, limits: Limits) -> tuple[int, dict[str, Any], dict[str, Any]]:
        leaves = jax.tree_util.tree_leaves_with_path(state)
        arrays = {_trees.path_name(path, "state"): _plain(leaf) for path, leaf in leaves}
        arrays |= {f"history.{name}": entries for name, entries in history._asdict().items()}
        meta = {**self._meta, "limits": numbers_of(limits), "range_test": None}
        if self.range_test is not None:
            test = self.range_test
            arrays |= {f"range_test.{name}": getattr(test, name) for name in _TEST_ARRAYS}
            told = {"message": test.message, "suggestion": test.suggestion, "suggestions": test.suggestions}
            meta["range_test"] = {"status": int(test.status), **told}
        if self.feed is not None:
            known = self.feed.steps_per_epoch
            meta["stream"] = {"steps_per_epoch": known}
            position = self.feed.position(int(state.step))
            if position is not None and position.state is not None:
                raw, place = position.state, position._asdict()
                meta["stream"] |= {**place, "state": "bytes" if isinstance(raw, bytes) else "json"}
                arrays["stream"] = np.frombuffer(raw if isinstance(raw, bytes) else raw.encode(), np.uint8)
        return int(state.step), arrays, meta


@contextlib.contextmanager
def saves_at(checkpoint: str | os.PathLike[str] | Checkpoint | None) -> Generator[Saves | NoSaves]:
    """Open the checkpoints at a path for this run alone, until it ends."""
    if checkpoint is None:
        yield NoSaves()
        return
    given = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    with opened(given, peers()) as (saver, found):
        yield Saves(saver, found)


_TEST_ARRAYS = ("learning_rate", "loss", "smoothed_loss", "losses", "smoothed_losses")


def _restored_test(saved: Saved) -> RangeTest | None:
    told = saved.meta.get("range_test")
    if told is None:
        return None
    arrays = {name: saved.arrays[f"range_test.{name}"] for name in _TEST_ARRAYS}
    rest: dict[str, Any] = {**told, "status": Status(told["status"])}
    return RangeTest(**arrays, **rest, refinement=None)


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _trees.is_key(leaf) else leaf
