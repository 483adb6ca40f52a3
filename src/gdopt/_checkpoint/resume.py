"""Checkpoints of a run, and resuming from them: bit-for-bit as if the run had never stopped.

A checkpoint holds the state between two steps and the history up to it. All random numbers are drawn from the run's key
and the number of the step. So nothing else is needed, but for the position of a stream.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

from gdopt import _trees
from gdopt._checkpoint import older, sharded
from gdopt._checkpoint.changes import changed_limits, changed_rates, rates_at, rates_of
from gdopt._checkpoint.folder import Checkpoint, Saved, newest, step_of
from gdopt._checkpoint.identity import layout_of, numbers_of, program_identity, run_identity, validation_identity
from gdopt._checkpoint.multi_process import JointSaver, opened
from gdopt._checkpoint.restore import names_in, plain, refuse_other, restored_state, restored_tree
from gdopt._checkpoint.schema import TEST_ARRAYS, VALIDATION_ARRAYS
from gdopt._checks import warn
from gdopt._compile import digests
from gdopt._devices.processes import peers
from gdopt._errors import CheckpointError, InputError
from gdopt._loop.state import Carry, Rows, State, joined_rows
from gdopt._optimizers.method import Method
from gdopt._optimizers.optax_state import trials_in
from gdopt._problem.limits import LAST_STEP, Steps
from gdopt._problem.problem import Problem
from gdopt._problem.stream import Feed, Position
from gdopt._problem.validation import Validation
from gdopt._result import RangeTest
from gdopt._status import FAILURES, RUNNING, Status
from gdopt._stopping import Limits
from gdopt._types import PyTree

_BEST = "validation.best"  # the name of the best point by validation
_MOST_HOSTS = 16  # checksums of what functions on the host have read
_read_here: dict[str, str] = {}  # by path, what they read when the last run of this process ended there


class NoSaves:
    """A run without a checkpoint: nothing is restored, and nothing is saved."""

    range_test: RangeTest | None = None
    peak: float | None = None
    failed: tuple[str, ...] = ()  # the sentences on tries that failed at higher rates
    feed: Feed | None = None
    batches: Callable[[], dict[str, str]] = dict
    validated: Callable[[], dict[str, Any]] = dict
    position = steps_per_epoch = None
    keeps_positions = False
    told = ""

    def nothing(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    compare = compare_programs = compare_batches = tells = hears = update = finish = nothing

    def restored(self, carry: Carry, limits: Limits) -> tuple[Carry, list[Rows]]:
        """Return the fresh carry, and no history."""
        return carry, []

    def limited(self, step: int, limit: int, limits: Limits) -> int:
        """Return the limit of a chunk unchanged."""
        return limit

    def restored_validation(self, point: PyTree) -> dict[str, Any]:
        """Return nothing."""
        return {}


class Saves:
    """The checkpoints of a run: the one from which it resumes, if there is one, and those that it makes."""

    def __init__(self, checkpoint: Checkpoint, saver: JointSaver, found: Saved | None):
        self.found = found
        # The sentences on tries that failed at higher rates, before this one or before the checkpoint was made.
        self.failed: tuple[str, ...] = () if found is None else tuple(found.meta.get("failed", ()))
        self.batches: Callable[[], dict[str, str]] = dict  # the checksums of the batches around a step of a stream
        self.validated: Callable[[], dict[str, Any]] = dict  # the validation so far
        self.range_test: RangeTest | None = None if found is None else _restored_test(found)
        self.peak = None if found is None else older.peak_of(found)  # the highest rate after the range test
        self.feed: Feed | None = None  # None without a stream
        self._stream: dict[str, Any] = {} if found is None else found.meta.get("stream", {})
        self._checkpoint, self._saver, self._path = checkpoint, saver, os.fspath(checkpoint.path)
        self._rates_there: list[float] = []  # the rates of this call at the steps that the checkpoint lists
        self._meta: dict[str, Any] = {}
        self._sizes: dict[str, Any] = {}
        self._host: Callable[[], str] = str  # what functions on the host read
        self._hosts: set[str] = set()  # what they read before this run, and during equal ones
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

    def compare(self, problem: Problem, steps: Steps, validation: Validation | None, *, keep_best: bool) -> None:
        """Raise InputError if the checkpoint is of another run."""
        sharded.check_installed(problem.objective.params)
        self._steps = steps
        asked = {"max_steps": None if steps.most == LAST_STEP else steps.most, "epochs": steps.epochs}
        asked["patience"] = None if validation is None else validation.patience
        given = run_identity(problem, validation, keep_best=keep_best)
        judged = validation_identity(problem, validation)
        self._sizes = _trees.named_leaves(problem.objective.sizes, "scale")  # for `load`
        start = problem.objective.params
        if problem.has_state or problem.optimizer_state is not None:
            start = start, problem.state, problem.optimizer_state
        self._meta = {"validation_loss": judged, "given": given, "start": digests.checksum(start), "asked": asked}
        if self.found is None:
            return
        self._refuse_other_calls(self.found)
        if self.found.meta.get("validation_loss", "") != self._meta["validation_loss"]:
            warn(
                f"validation_loss is not that of the checkpoint {self.found.file!r}. The run resumes with the new one."
            )
        if self.found.meta["start"] != self._meta["start"]:
            what = "params" if start is problem.objective.params else "params, state or optimizer_state"
            warn(f"{what} differ from the start of the run saved in {self.found.file!r}, whose {what} are used.")

    def _refuse_other_calls(self, found: Saved) -> None:
        # Old checkpoints have none of these.
        theirs = {
            "scale": "nothing",
            "constraint": "nothing",
            "state": "nothing",
            "validation": "nothing",
            **found.meta["given"],
        }
        for name, mine in self._meta["given"].items():
            refuse_other(found, name, theirs.get(name), mine)

    def compare_programs(self, problem: Problem, method: Method) -> None:
        """Raise InputError if the checkpoint is of another optimizer; warn of another loss."""
        found = self.found
        told, self._host = program_identity(problem, method)
        self._meta |= told
        self._hosts = {self._host()}
        at = () if found is None else found.meta.get("rates", {}).get("steps", ())
        self._meta["rates"] = rates_of(method, self._steps.most, by_test=self.range_test is not None)
        self._rates_there = rates_at(method, at) if found and at else []
        if found is None:
            return
        self._refuse_other_optimizers(found)
        if (why := self._other_loss(found)) is not None:
            warn(f"the loss is not that of the checkpoint {found.file!r}{why}. The run resumes with the new loss.")
        else:
            self._hosts |= set(found.meta.get("host", ()))

    def _refuse_other_optimizers(self, found: Saved) -> None:
        theirs, mine = found.meta["optimizer"], self._meta["optimizer"]
        if theirs["versions"] != mine["versions"]:  # Traces differ between versions.
            refuse_other(found, "optimizer", older.text_of_optimizer(theirs["text"]), mine["text"])
        elif theirs["updates"] != mine["updates"]:
            told = f"{theirs['text']} with updates of the checksum {theirs['updates']}"
            refuse_other(found, "optimizer", told, f"{mine['text']} with {mine['updates']}")

    def _other_loss(self, found: Saved) -> str | None:
        """Return how the loss differs: its trace, its numbers, its derivatives or what it reads on the host."""
        known = ("loss", "gradient") if found.meta.get("gradient") else ("loss",)
        if any(found.meta[name] != self._meta[name] for name in known):
            versions = [meta["optimizer"]["versions"] for meta in (found.meta, self._meta)]
            return "" if versions[0] == versions[1] else f", or its trace differs between {' and '.join(versions)}"
        if self._hosts.isdisjoint([*found.meta.get("host", self._hosts), _read_here.get(self._path, "")]):
            return ": its functions on the host read other values"
        return None

    def restored(self, carry: Carry, limits: Limits) -> tuple[Carry, list[Rows]]:
        """Return the carry that replaces a fresh one, and the history so far."""
        fresh = carry[0].tree()
        sharded.check_installed(fresh)
        self._meta["layout"] = here = layout_of(carry)
        if self.found is None:
            return carry, []
        state = self._first_that_fits(fresh)
        found = self.found
        self._warn_of_places(found, here)
        rows = _restored_rows(found)
        ended = int(state.code)
        others = found.meta["limits"] != numbers_of(limits)
        if self._other_loss(found) is not None:  # Measurements of the old loss do not hold for the new one.
            others, best = True, np.full_like(state.kept.loss, np.inf)
            state = state._replace(watch=fresh.watch, kept=state.kept._replace(loss=best))
            if trials_in(state.optimizer) is not None:
                state = state._replace(optimizer=fresh.optimizer)
        # A run that ended at its limits continues if the limits have changed: its last point is evaluated once more.
        if ended == Status.MAX_STEPS or (ended != RUNNING and others):
            state = state._replace(code=np.int32(RUNNING))
            rows = Rows(*(entries[:-1] for entries in rows))
        elif ended != RUNNING:
            self._ended = Status(ended)
        self._warn_of_changes(found, limits)
        return (_trees.pack(state), carry[1]), [rows]

    def restored_validation(self, point: PyTree) -> dict[str, Any]:
        """Return the validation so far; ``point`` is like its best one: the params and the model's state."""
        assert self.found is not None
        found = {name: self.found.arrays[f"validation.{name}"] for name in VALIDATION_ARRAYS}
        has_best = any(name.startswith(_BEST) for name in names_in(self.found))
        return {**found, "best": restored_tree(self.found, point, _BEST) if has_best else None}

    def _warn_of_places(self, found: Saved, here: str) -> None:
        """Warn if other devices, cores or versions made the checkpoint."""
        there, then = found.meta.get("layout", here), found.meta["optimizer"]["versions"]  # Old ones have no layout.
        now = self._meta["optimizer"]["versions"]
        if (there, then) != (here, now):
            old, new = (there, here) if then == now else (f"{there} with {then}", f"{here} with {now}")
            warn(
                f"the checkpoint {found.file!r} was made on {old}, but this is {new}. The run resumes, but its last "
                "bits may differ from those of an uninterrupted run."
            )

    def _warn_of_changes(self, found: Saved, limits: Limits) -> None:
        """Warn of what a run may change when it resumes, with both values."""
        made, most = int(found.arrays["state.step"]), int(limits.max_steps)
        changes = [*changed_rates(found.meta.get("rates"), self._meta["rates"], self._rates_there, made)]
        told = "The run resumes with the new values."
        if self._ended is not None:
            told = "It had ended, and its result is returned. Pass another path to make another run."
        else:
            changes = [*changed_limits(found.meta, self._meta | {"limits": numbers_of(limits)}), *changes]
        if most < made:
            told += f" The point of step {most} is gone."
            changes = changes or [f"max_steps={most}"]
        if changes:
            warn(
                f"this call differs from the run saved in {found.file!r}, which made {made} steps: "
                f"{', '.join(changes)}. {told}"
            )

    def compare_batches(self, batches: Callable[[], dict[str, str]]) -> None:
        """Warn if a stream gives other batches than before the resume, by the checksums of those around it."""
        others = peers()
        if self.found is None or (others.several and jax.process_index()):
            return
        theirs = self.found.meta.get("batches", {})
        for number, mine in batches().items():
            if theirs.get(number, mine) != mine:
                warn(
                    f"data gives other batches than to the run saved in {self.found.file!r}: batch {number} is {mine}, "
                    f"and was {theirs[number]}. The run resumes, but it will differ from an "
                    "uninterrupted one. Pass a stream that gives the same batches each time (for example a loader "
                    "with a seed)."
                )
                return

    def _first_that_fits(self, fresh: State) -> State:
        """Return the state of the newest checkpoint whose arrays have the shapes of a fresh one, and take that one."""
        assert self.found is not None
        found, first = self.found, None
        while found is not None:
            try:
                self._refuse_other_calls(found)
                self._refuse_other_optimizers(found)
                state = restored_state(found, fresh)
            except InputError as error:
                first = first or error
                found = self._before(found)
                continue
            if first is not None:
                warn(f"resuming from the checkpoint {found.file!r}, because a newer one was skipped: {first}")
            self.found, self._stream = found, found.meta.get("stream", {})
            return state
        assert first is not None
        raise first

    def _before(self, found: Saved) -> Saved | None:
        with contextlib.suppress(CheckpointError):
            return newest(self._checkpoint, older.usable, before=step_of(found.file))
        return None

    def remember(self) -> None:
        """Remember what functions on the host read at the end of the run, which may keep records of their calls."""
        _read_here[self._path] = self._host()

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

    def update(self, state: State, records: list[Rows], limits: Limits, *, last: bool) -> None:
        """Save the state between two steps if it is time; its arrays may then be donated to the next step.

        The ``last`` state is always saved, and so is one at max_steps, which another call may raise.
        """
        if last or int(state.step) >= int(limits.max_steps):
            self.finish(state, records, limits)
        elif self._saver.due():
            self._saver.save(*self._contents(state, joined_rows(records), limits))

    def finish(self, state: State, records: list[Rows], limits: Limits) -> None:
        """Save the last state, and wait until it is on the disk."""
        self._saver.close(final=self._contents(state, joined_rows(records), limits))

    def _contents(self, state: State, rows: Rows, limits: Limits) -> tuple[int, dict[str, Any], dict[str, Any]]:
        arrays: dict[str, Any] = {name: plain(leaf) for name, leaf in _trees.named_leaves(state, "state").items()}
        arrays |= {
            f"history.{name}": entries
            for name, entries in rows._asdict().items()
            if entries.size or name in Rows._fields[:3]
        }
        arrays |= {name: plain(leaf) for name, leaf in self._sizes.items()}
        validated = self.validated()
        arrays |= {f"validation.{name}": validated[name] for name in VALIDATION_ARRAYS if validated}
        arrays |= {name: plain(leaf) for name, leaf in _trees.named_leaves(validated.get("best"), _BEST).items()}
        hosts = sorted(self._hosts | {self._host()})[:_MOST_HOSTS]  # before the run, and now: some keep records
        meta = {**self._meta, "host": hosts, "limits": numbers_of(limits), "range_test": None}
        meta |= {"failed": [*self.failed], "peak": self.peak}
        if self.range_test is not None:
            test = self.range_test
            arrays |= {f"range_test.{name}": getattr(test, name) for name in TEST_ARRAYS}
            told = {"message": test.message, "suggestion": test.suggestion, "suggestions": test.suggestions}
            meta["range_test"] = {"status": int(test.status), **told}
        if self.feed is not None:
            known = self.feed.steps_per_epoch
            meta["stream"] = {"steps_per_epoch": known}
            meta["batches"] = self.batches()
            position = self.feed.position(int(state.step))
            if position is not None and position.state is not None:
                raw, place = position.state, position._asdict()
                meta["stream"] |= {**place, "state": "bytes" if isinstance(raw, bytes) else "json"}
                arrays["stream"] = np.frombuffer(raw if isinstance(raw, bytes) else raw.encode(), np.uint8)
        return int(state.step), arrays, meta


@contextlib.contextmanager
def saves_at(
    checkpoint: str | os.PathLike[str] | Checkpoint | None, before: Saves | NoSaves | None = None
) -> Generator[Saves | NoSaves]:
    """Open the checkpoints at a path for this run alone, until it ends.

    After a try that failed, remove its own, and begin anew with its range test and the rate that this led to.
    """
    if checkpoint is None:
        yield _after(NoSaves(), before)
        return
    given = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    with opened(given, peers()) as (saver, found):
        if before is not None:
            saver.forget()
        saves = Saves(given, saver, found if before is None else None)
        try:
            yield _after(saves, before)
        finally:
            saves.remember()


def _after(saves: Saves | NoSaves, before: Saves | NoSaves | None) -> Saves | NoSaves:
    """Give the saves of a try what was found out in those before it."""
    if before is not None:
        saves.failed, saves.range_test, saves.peak = before.failed, before.range_test, before.peak
    return saves


def _restored_rows(saved: Saved) -> Rows:
    loss, grad_norm, rate = (saved.arrays[f"history.{name}"] for name in Rows._fields[:3])
    return Rows(loss, grad_norm, rate, saved.arrays.get("history.metrics", np.zeros((len(loss), 0))))


def _restored_test(saved: Saved) -> RangeTest | None:
    told = saved.meta.get("range_test")
    if told is None:
        return None
    arrays = {name: saved.arrays[f"range_test.{name}"] for name in TEST_ARRAYS}
    rest: dict[str, Any] = {**told, "status": Status(told["status"])}
    return RangeTest(**arrays, **rest, refinement=None)
