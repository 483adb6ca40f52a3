"""The saver: a thread that writes checkpoints beside the run."""

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
from gdopt._checkpoint.file import SPREAD, Arrays, Meta, is_own, read, write
from gdopt._checkpoint.folder import Checkpoint, beside, check_directory, directories, save_at, saves_of
from gdopt._checkpoint.lock import acquire, release
from gdopt._checks import warn
from gdopt._errors import CheckpointError
from gdopt._signals import at_end, shielded


class Saver:
    """A writer of checkpoints at one path. It holds the lock from entry to exit; until exit nobody waits for the disk.

    Call `newest` inside, because before that another run may still be writing. Use it from one thread. Nothing but
    `__enter__` raises. A later failure becomes one warning per checkpoint, issued in the caller's thread by the next
    call of any method.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._base = os.fspath(checkpoint.path)
        self._every, self._keep = checkpoint.every_seconds, checkpoint.keep
        self._lock: int | None = None
        self._writer: threading.Thread | None = None
        self._host: dict[str, np.ndarray] = {}  # the last copies, whose memory the next ones reuse
        self._failures: list[str] = []
        self._since = math.inf

    def __enter__(self) -> Saver:
        """Take the lock, and remove what a killed writer left behind.

        Raise InputError for a directory that does not exist or is not writable, and for a path that a live run uses, in
        this process or another.
        """
        check_directory(self._base)
        with shielded():
            self._lock = acquire(self._base)
            at_end(self.close)
        _holding.add(self)
        for match in beside(self._base, r"\.\d{12}\.gdopt\.[0-9a-f]{8}\.tmp"):
            part = os.path.join(os.path.dirname(self._base), match.string)
            with contextlib.suppress(OSError):
                if is_own(part):
                    os.unlink(part)
        self._remove_parts()
        self._since = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def due(self) -> bool:
        """Tell whether it is time for a checkpoint, and none is being written."""
        self._report()
        return not self._busy() and time.monotonic() - self._since >= self._every

    def save(self, step: int, arrays: Arrays, meta: Meta, spread: Callable[[], Meta] | None = None) -> bool:
        """Begin to save, and return; return False if the last save is still being written, or this one cannot begin.

        After the return the caller may change or donate the arrays. Arrays on an accelerator are copied there. The
        caller does not wait for that copy, but its next program does; the thread moves the copy to the host. Arrays in
        the host's memory, NumPy's and those of JAX on a CPU, are copied at once. Arrays that are spread over processes,
        and typed keys, have to be converted to plain arrays first. The thread calls ``spread`` before it writes the
        file, to save and describe what is not in ``arrays``.
        """
        self._report()
        if self._busy() or self._lock is None:
            return False
        try:
            self._host = _host_copies(arrays, self._host)
            given = (step, {**_device_copies(arrays), **self._host}, copy.deepcopy(meta), spread)
            writer = threading.Thread(target=self._write, args=given, name="gdopt checkpoint", daemon=True)
            with shielded():  # Nobody could wait for a thread that is started but not known.
                writer.start()
                self._writer = writer
        except Exception as error:  # There is no memory for the copies, or for a thread.
            self._writer = None
            self._fail(step, error)
            return False
        return True

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def close(self, final: tuple[int, Arrays, Meta] | None = None, spread: Callable[[], Meta] | None = None) -> None:
        """Finish the checkpoint that is being written, write the final one (see `save`), and release the lock.

        All of that is done when it returns. A second call does nothing.
        """
        try:
            self.wait()
            self._host = {}
            if final is not None and self._lock is not None:
                self._write(*final, spread)
        finally:
            with shielded():
                lock, self._lock = self._lock, None  # Never close a descriptor twice: it may be another file by then.
                if lock is not None:
                    release(self._base, lock)
        self._report()

    def forget(self) -> None:
        """Remove the checkpoints that were made before: a run begins anew."""
        with contextlib.suppress(OSError):
            for file in filter(is_own, saves_of(self._base).values()):
                with contextlib.suppress(OSError):
                    os.unlink(file)
        self._remove_parts()

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
            self._remove_parts()  # Otherwise a full disk would stay full.
        else:
            self._remove_old(step)
        self._since = time.monotonic()

    def _remove_old(self, step: int) -> None:
        """Remove old checkpoints. Later ones than this are damaged, and stay until the run has passed their step."""
        with contextlib.suppress(OSError):
            files = [file for at, file in saves_of(self._base).items() if at <= step and is_own(file)]
            for file in files[: -self._keep]:
                with contextlib.suppress(OSError):
                    os.unlink(file)
        self._remove_parts()

    def _remove_parts(self) -> None:
        """Remove the directories that belong to no checkpoint."""
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
    """Return the directories of a step that its checkpoint names; all of them if it cannot be read."""
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

    Copying is the smaller part: each page of fresh memory has to come from the system first. `jax.device_put` takes so
    many small pages that all of it takes five times as long.
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
    """Tell whether NumPy sees the array's own memory: an array on several devices would be gathered first."""
    if not isinstance(array, jax.Array):
        return True
    devices = array.sharding.device_set
    return len(devices) == 1 and all(device.platform == "cpu" for device in devices)


_holding: weakref.WeakSet[Saver] = weakref.WeakSet()


def _after_fork() -> None:
    """Close the locks in a loader's workers: a lock lives as long as any process has it open."""
    for saver in _holding:
        saver.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
