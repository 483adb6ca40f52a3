"""The saver: a thread that writes saves beside the run."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gdopt import _trees
from gdopt._checkpoint import sharded
from gdopt._checkpoint.file import SPREAD, Arrays, Meta, read, write
from gdopt._checkpoint.folder import Checkpoint, beside, check_directory, directories, save_at, saves_of
from gdopt._checkpoint.lock import acquire, release
from gdopt._checks import warn
from gdopt._errors import CheckpointError


class Saver:
    """Saves at one path, of which it has the lock from entry to exit; until then the caller waits for no disk.

    Call `newest` within: before, another run may still be writing.
    Use it from one thread. Nothing but `__enter__` raises: what goes wrong later is a warning, once for each save,
    given in the caller's thread by the next call of whichever method.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._base = os.fspath(checkpoint.path)
        self._every, self._keep = checkpoint.every_seconds, checkpoint.keep
        self._lock: int | None = None
        self._writer: threading.Thread | None = None
        self._host: dict[str, np.ndarray] = {}  # the last copies, which the next ones are written over
        self._failures: list[str] = []
        self._since = math.inf

    def __enter__(self) -> Saver:
        """Takes the lock, and removes what a writer that was killed left behind.

        Raises InputError for a directory that is not there or not to be written in, and for a path that a live run
        uses, in this process or another.
        """
        check_directory(self._base)
        self._lock = acquire(self._base)
        _holding.add(self)
        for match in beside(self._base, r"\.\d{12}\.gdopt\.[0-9a-f]{8}\.tmp"):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(os.path.dirname(self._base), match.string))
        self._remove_parts()
        self._since = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def due(self) -> bool:
        """Tell whether it is time for a save, and none is being written."""
        self._report()
        return not self._busy() and time.monotonic() - self._since >= self._every

    def save(self, step: int, arrays: Arrays, meta: Meta, spread: Callable[[], Meta] | None = None) -> bool:
        """Begins to save, and returns; False where the last save is still being written, or this one cannot begin.

        After the return the arrays are the caller's again, to be changed or donated. Those of an accelerator are copied
        there, which the caller does not wait for but what it runs next does; the way to the host is the thread's. Those
        in the host's memory, NumPy's and those of JAX on a CPU, are copied at once. An array that is spread over
        processes, and a typed key, must be made a plain one before. ``spread`` is called in the
        thread before the file is written, to save what is not in ``arrays``, and to tell of it.
        """
        self._report()
        if self._busy() or self._lock is None:
            return False
        try:
            self._host = _host_copies(arrays, self._host)
            given = (step, {**_device_copies(arrays), **self._host}, copy.deepcopy(meta), spread)
            self._writer = threading.Thread(target=self._write, args=given, name="gdopt checkpoint", daemon=True)
            self._writer.start()
        except Exception as error:  # no memory for the copies, or for a thread
            self._writer = None
            self._fail(step, error)
            return False
        return True

    def wait(self) -> None:
        """Waits for the save on its way."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def close(self, final: tuple[int, Arrays, Meta] | None = None, spread: Callable[[], Meta] | None = None) -> None:
        """Waits for the save on its way, saves the final one, given as to `save`, and gives the lock back.

        All that is done when it returns. It may be called again, and does nothing then.
        """
        try:
            self.wait()
            self._host = {}
            if final is not None and self._lock is not None:
                self._write(*final, spread)
        finally:
            if self._lock is not None:
                release(self._base, self._lock)
                self._lock = None
        self._report()

    def let_go(self) -> None:
        """Closes the lock, which another process keeps open."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _busy(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    def _write(self, step: int, arrays: Arrays, meta: Meta, spread: Callable[[], Meta] | None = None) -> None:
        try:
            if spread is not None:
                meta = {**meta, SPREAD: spread()}
            write(save_at(self._base, step), {name: _trees.on_host(arrays[name]) for name in arrays}, meta)
        except Exception as error:
            self._fail(step, error)
            self._remove_parts()  # a full disk would stay full
        else:
            self._remove_old(step)
        self._since = time.monotonic()

    def _remove_old(self, step: int) -> None:
        """Later saves than this one are damaged, or it would not have been made: they count when it has passed them."""
        with contextlib.suppress(OSError):
            files = [file for at, file in saves_of(self._base).items() if at <= step]
            for file in files[: -self._keep]:
                os.unlink(file)
        self._remove_parts()

    def _remove_parts(self) -> None:
        """Removes the directories that belong to no save."""
        with contextlib.suppress(OSError):
            saves = saves_of(self._base)
            for step, found in directories(self._base).items():
                for directory in found - _named(saves.get(step), found):
                    sharded.remove(directory)

    def _fail(self, step: int, error: Exception) -> None:
        self._since = time.monotonic()
        self._failures.append(f"the checkpoint of step {step} was not saved: {type(error).__name__}: {error}")

    def _report(self) -> None:
        while self._failures:
            warn(f"{self._failures.pop(0)}. Older ones are kept, and the next is tried when it is due.")


def _named(file: str | None, found: set[str]) -> set[str]:
    """Return the directories of a step that its save names; all of them if the save cannot be read."""
    if file is None:
        return set()
    if len(found) == 1:
        return found
    try:
        _, meta = read(file)
        return {sharded.directory(file, meta[SPREAD])} if SPREAD in meta else set()
    except CheckpointError:
        return found


def _device_copies(arrays: Arrays) -> dict[str, jax.Array]:
    """Copy the arrays that are not in the host's memory, all at once and without compiling anything."""
    on_device = {name: array for name, array in arrays.items() if not _in_memory(array)}
    shardings = {name: array.sharding for name, array in on_device.items()}
    return jax.device_put(on_device, shardings, may_alias=False)


def _host_copies(arrays: Arrays, old: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copy the arrays in the host's memory, over the old copies if these fit: nobody reads them any more.

    To copy is the smaller part. Each page of fresh memory has to come from the system first, and of the small pages
    that `jax.device_put` takes there are so many that it all takes five times as long.
    """
    copies = {}
    for name, array in arrays.items():
        if not _in_memory(array):
            continue
        plain, mine = _trees.on_host(array), old.get(name)
        if mine is not None and (mine.shape, mine.dtype) == (plain.shape, plain.dtype):
            np.copyto(mine, plain)
        else:
            mine = np.array(plain)
        copies[name] = mine
    return copies


def _in_memory(array: Any) -> bool:
    """Tell whether NumPy sees the array's own memory: one on several devices would be put together first."""
    if not isinstance(array, jax.Array):
        return True
    devices = array.sharding.device_set
    return len(devices) == 1 and all(device.platform == "cpu" for device in devices)


_holding: weakref.WeakSet[Saver] = weakref.WeakSet()


def _after_fork() -> None:
    """A lock lives as long as any process has it open. It is not for a loader's workers to outlive the run with it."""
    for saver in _holding:
        saver.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
