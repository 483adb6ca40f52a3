"""Saves of a run, and resuming from them: bit for bit as if the run had never stopped.

A save holds the state between two steps and the history up to it. All random numbers are drawn from the run's key and
the number of the step, so nothing else is needed; but for a stream, of which it holds where that was.
"""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
import numpy as np

from gdopt import _trees
from gdopt._checkpoint import sharded
from gdopt._checkpoint.file import SPREAD
from gdopt._checkpoint.folder import Checkpoint, Saved, newest
from gdopt._checkpoint.multi_process import JointSaver, opened
from gdopt._checkpoint.saver import Saver
from gdopt._checks import warn
from gdopt._compile import program
from gdopt._devices.processes import peers
from gdopt._errors import InputError
from gdopt._loop import loop
from gdopt._loop.state import Carry, State
from gdopt._optimizers.rule import Rule, search
from gdopt._problem.data import Feed, Position
from gdopt._problem.task import Task
from gdopt._result import History, RangeTest
from gdopt._settings import own_promotion
from gdopt._status import FAILURES, RUNNING, Status
from gdopt._types import PyTree

_LONGEST = 200  # characters of a description


class Saves:
    """The saves of a run: the one that it goes on from, if there is one, and those that it makes."""

    def __init__(self, saver: Saver | JointSaver, found: Saved | None):
        self.found = found
        self.range_test: RangeTest | None = None if found is None else _range_test(found)
        self.feed: Feed | None = None  # of a run on a stream
        self._saver = saver
        self._meta: dict[str, Any] = {}
        self._ended: Status | None = None  # how the run that was saved did, where nothing goes on

    @property
    def position(self) -> Position | None:
        """The place of the stream; None if there is none, or the stream could not tell."""
        told = _stream(self.found)
        if self.found is None or "state" not in told:
            return None
        state = self.found.arrays["stream"].tobytes()
        place = told["number"], told["passes"], told["steps"]
        return Position(*place, state if told["state"] == "bytes" else state.decode())

    @property
    def steps_per_epoch(self) -> int | None:
        """The steps of an epoch of the stream, as far as they were known."""
        return _stream(self.found).get("steps_per_epoch")

    @property
    def told(self) -> str:
        """A sentence on where the run went on from, to be put behind others; "" if it began anew."""
        if self.found is None:
            return ""
        step, again = int(self.found.arrays["state.step"]), ""
        if self.feed is not None and self.feed.pulled and self.feed.first == 0 and step > 0:
            before = "the batch before it was" if step == 1 else f"the {step} batches before it were"
            again = f", and {before} gone through again"
        file = os.path.basename(self.found.file)
        if self._ended in (*FAILURES, Status.PRECISION_LIMIT):
            return f" That was the end of the run saved in {file!r}: to make another one, pass another path."
        return f" It went on from step {step}, saved in {file!r}{again}."

    def compare(self, task: Task, *, keep_best: bool) -> None:
        """Raises InputError where the save is of another run."""
        sharded.check_installed(task.problem.params)
        given = {
            "params": _described(task.problem.params),
            "data": "a stream" if task.stream else _with_checksum(task.data),
            "batch_size": repr(task.batches and task.batches.batch_size),
            "args": _with_checksum(task.args),
            "held params": _with_checksum(task.problem.rest.arrays),
            "key": _trees.on_host(jax.random.key_data(task.key)).tobytes().hex() if task.noisy else "none",
            "keep_best": repr(keep_best),
            "scale": _with_checksum(task.problem.sizes),
            "float": jax.dtypes.canonicalize_dtype(float).name,
        }
        self._meta = {"given": given, "start": program.checksum(task.problem.params)}
        if self.found is None:
            return
        theirs = self.found.meta.get("given", {})
        for name, mine in given.items():
            # Saves of old tell of no scale.
            self._refuse_other(name, theirs.get(name, "nothing" if name == "scale" else None), mine)
        if self.found.meta.get("start") != self._meta["start"]:
            warn(f"params are others than those that the run of {self.found.file!r} began with: it goes on from there.")

    def compare_programs(self, task: Task, rule: Rule) -> None:
        """Raise InputError if the save is of another optimizer; another loss or learning rate is a warning."""
        loss, updates = loop.digests(task, rule)
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(rule.optimizer))[:_LONGEST]
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "optax", "gdopt"))
        self._meta |= {"loss": loss, "optimizer": {"text": text, "updates": updates, "versions": versions}}
        if self.range_test is None:  # by which a run with more steps has longer cycles
            schedule = rule.schedule
            with own_promotion():
                rate = repr(rule.rate) if schedule is None else program.digest(schedule, np.int32(0))
            self._meta["learning_rate"] = rate
        if self.found is None:
            return
        theirs = self.found.meta.get("optimizer", {})
        if theirs.get("versions") != versions:  # by which traces differ
            self._refuse_other("optimizer", theirs.get("text"), text)
        elif theirs["updates"] != updates:
            told = f"{theirs['text']} with updates of the checksum {theirs['updates']}"
            self._refuse_other("optimizer", told, f"{text} with {updates}")
        if self.found.meta.get("loss") != loss:
            warn(f"the loss is no longer that of the checkpoint {self.found.file!r}: the run goes on with the new one.")

    def _refuse_other(self, name: str, theirs: Any, mine: Any) -> None:
        if theirs != mine:
            raise InputError(
                f"the checkpoint {self.found and self.found.file!r} is of another run: its {name} is {theirs}, and "
                f"here it is {mine}. Make the same call, or pass another path."
            )

    def restored(self, carry: Carry, limits: tuple) -> tuple[Carry, list[History]]:
        """The carry in the place of a fresh one, and the history so far."""
        fresh = carry[0].tree()
        sharded.check_installed(fresh)
        self._meta["layout"] = here = _layout(carry)
        if self.found is None:
            return carry, []
        there = self.found.meta.get("layout", here)  # saves of old do not tell
        if there != here:
            warn(
                f"the checkpoint {self.found.file!r} was made on {there}, and here it is {here}: the run goes on, but "
                "not to the same last bits as one that never stopped."
            )
        arrays = self.found.arrays
        kinds = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        spread = self.found.meta.get(SPREAD)
        kinds |= {} if spread is None else sharded.kinds(spread)
        history = History(*(arrays[f"history.{name}"] for name in History._fields))

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
            arrays = {**arrays, **sharded.load(self.found.file, spread, places)}

        def put(path: tuple, leaf: Any) -> Any:
            saved = arrays[_trees.path_name(path, "state")]
            if not isinstance(leaf, jax.Array):
                return np.asarray(saved)[()]
            if _trees.is_key(leaf):
                data = _placed(saved, _plain(leaf).sharding)
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
            return _placed(saved, leaf.sharding)

        state: State = jax.tree_util.tree_map_with_path(put, fresh)
        ended = int(state.code)
        others = self.found.meta["limits"] != _limits(limits)
        if self.found.meta["loss"] != self._meta["loss"]:  # what was measured of the old one says nothing
            others, best = True, np.full_like(state.kept.loss, np.inf)
            state = state._replace(watch=fresh.watch, kept=state.kept._replace(loss=best))
            if search(state.optimizer) is not None:
                state = state._replace(optimizer=fresh.optimizer)
        # What ended by limits goes on where these are others now: its last point is evaluated once more.
        if ended == Status.MAX_STEPS or (ended != RUNNING and others):
            state = state._replace(code=np.int32(RUNNING))
            history = History(*(entries[:-1] for entries in history))
        elif ended != RUNNING:
            self._ended = Status(ended)
        rate = self._meta.get("learning_rate")
        if self._ended is None and self.found.meta.get("learning_rate", rate) != rate:  # saves of old do not tell
            warn(
                f"learning_rate is not the one with which the checkpoint {self.found.file!r} was made: the run goes on "
                "with the new one."
            )
        return (_trees.pack(state), carry[1]), [history]

    def tells(self) -> Any:
        """Return what the other processes have to hear of the saves before each `due`."""
        return self._saver.tells() if isinstance(self._saver, JointSaver) else None

    def hears(self, told: list) -> None:
        """Take what all processes have told."""
        if isinstance(self._saver, JointSaver):
            self._saver.hears(told)

    def due(self) -> bool:
        """Tell whether it is time for a save."""
        return self._saver.due()

    def save(self, state: State, history: History, limits: tuple) -> None:
        """Begins to save the state between two steps, of which the arrays may be donated to the next."""
        self._saver.save(*self._contents(state, history, limits))

    def finish(self, state: State, history: History, limits: tuple) -> None:
        """Saves the last state, and waits until it is on the disk."""
        self._saver.close(final=self._contents(state, history, limits))

    def _contents(self, state: State, history: History, limits: tuple) -> tuple[int, dict[str, Any], dict[str, Any]]:
        leaves = jax.tree_util.tree_leaves_with_path(state)
        arrays = {_trees.path_name(path, "state"): _plain(leaf) for path, leaf in leaves}
        arrays |= {f"history.{name}": entries for name, entries in history._asdict().items()}
        meta = {**self._meta, "limits": _limits(limits), "range_test": None}
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
def saves_at(checkpoint: str | os.PathLike[str] | Checkpoint | None) -> Iterator[Saves | None]:
    """The saves at a path, which are this run's alone until it ends; None without one."""
    if checkpoint is None:
        yield None
        return
    given = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    others = peers()
    if others is not None:
        with opened(given, others) as (joint, found):
            yield Saves(joint, found)
        return
    with Saver(given) as saver:
        yield Saves(saver, newest(given))


_TEST_ARRAYS = ("learning_rate", "loss", "smoothed_loss", "losses", "smoothed_losses")


def _range_test(saved: Saved) -> RangeTest | None:
    told = saved.meta.get("range_test")
    if told is None:
        return None
    arrays = {name: saved.arrays[f"range_test.{name}"] for name in _TEST_ARRAYS}
    return RangeTest(**arrays, **{**told, "status": Status(told["status"])}, refinement=None)


def _stream(saved: Saved | None) -> dict[str, Any]:
    return {} if saved is None else saved.meta.get("stream", {})


def _layout(carry: Carry) -> str:
    """Describe what the last bits depend on: kind and number of devices; of a CPU the cores, by which XLA cuts work."""
    arrays = [leaf for leaf in jax.tree.leaves(carry) if isinstance(leaf, jax.Array)]
    devices = set().union(*(array.sharding.device_set for array in arrays))
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    text = f"{kinds}, {len(devices)} device{'s' * (len(devices) != 1)}"
    if all(device.platform != "cpu" for device in devices):
        return text
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{text}, {cores} core{'s' * (cores != 1)}"


def _limits(limits: tuple) -> list[str]:
    return [
        repr(limit if limit is None else float(limit)) for limit in limits[1:]
    ]  # how many steps is told by the state itself


def _placed(array: Any, place: Any) -> jax.Array:
    """The array there; of one that each process holds, each its part. What comes from orbax is there."""
    if isinstance(array, jax.Array):
        return array
    if place.is_fully_addressable:
        return jax.device_put(array, place)
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _trees.is_key(leaf) else leaf


def _with_checksum(tree: PyTree) -> str:
    return f"{_described(tree)} with the checksum {program.checksum(tree)}" if jax.tree.leaves(tree) else "nothing"


def _described(tree: PyTree) -> str:
    """Paths, dtypes and shapes; of many leaves a checksum."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    text = ", ".join(
        f"{jax.tree_util.keystr(path)} {leaf.dtype.name}{list(leaf.shape)}" if hasattr(leaf, "dtype") else repr(leaf)
        for path, leaf in leaves
    )
    text = text.strip()
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}... ({len(leaves)} leaves, {zlib.crc32(text.encode()):x})"
