"""The checkpoints of a run that is spread over several processes.

Each process writes its own parts of the arrays that no process holds, in a thread; see `sharded`. The first one writes
everything else. It has the lock, decides by its clock when a checkpoint is due, and writes the file that completes it
once all have written their parts. No thread waits for the thread of another process. The processes exchange their
progress when they agree on the next chunk. So all of them hear of a failure anywhere, give the checkpoint up, and try
again.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

from gdopt._checkpoint import sharded
from gdopt._checkpoint.file import Arrays, Meta, read
from gdopt._checkpoint.folder import Checkpoint, Saved, newest, save_at, step_of
from gdopt._checkpoint.lock import holder_of
from gdopt._checkpoint.older import usable
from gdopt._checkpoint.saver import Saver
from gdopt._devices.processes import Alone, Peers
from gdopt._errors import CheckpointError, InputError

_LONGEST = 500  # the most characters of a failure


@contextlib.contextmanager
def opened(checkpoint: Checkpoint, peers: Alone | Peers) -> Generator[tuple[JointSaver, Saved | None]]:
    """Open the checkpoints at a path in all processes together, and find the one from which they resume.

    The first process finds it, so that all resume from the same one.
    """
    base, first = os.fspath(checkpoint.path), not peers.several or jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        saver = stack.enter_context(Saver(checkpoint)) if first else None
        found = newest(checkpoint, usable) if first else None
        step = None if found is None else step_of(found.file)
        told = peers.exchange(step=step, holder=holder_of(base))[0]
        if holder_of(base) != told["holder"]:
            raise InputError(
                f"checkpoint path={base!r} is another place in process {jax.process_index()} than in process 0. Pass "
                "one on a disk that all of them share."
            )
        if not first and told["step"] is not None:
            file = save_at(base, told["step"])
            found = usable(Saved(file, *read(file)))
        joint = JointSaver(base, peers, saver)
        stack.callback(joint.close)
        yield joint, found


class JointSaver:
    """The `Saver` of a run on several processes, of which only the first one has an actual `Saver`.

    All processes call `save` at the same step, and `close` with a final checkpoint. Before each `due` they exchange
    what `tells` returns.
    """

    def __init__(self, base: str, peers: Alone | Peers, saver: Saver | None):
        self._base, self._peers, self._saver = base, peers, saver
        self._part: _Part | None = None  # the part of the checkpoint that is being written
        self._thread: threading.Thread | None = None
        self._begin: str | None = None
        self._closed = False

    def forget(self) -> None:
        """Remove the checkpoints that were made before."""
        if self._saver is not None:
            self._saver.forget()

    def tells(self) -> dict[str, Any]:
        """Return the progress of this process; the first one also tells whether a checkpoint is to begin."""
        due = self._saver is not None and self._saver.due()
        return {"begin": _token() if due else None, "part": self._part and self._part.told}

    def hears(self, told: list[dict[str, Any]]) -> None:
        """Take in the progress of all processes, in their order."""
        self._begin = told[0]["begin"]
        if self._part is not None and self._part.settled([note["part"] for note in told]):
            self._part = None

    def due(self) -> bool:
        """Tell whether all have heard that a checkpoint is to begin."""
        return self._begin is not None

    def save(self, step: int, arrays: Arrays, meta: Meta) -> None:
        """Begin to save, and return: see `Saver.save`."""
        assert self._begin is not None
        spread, here = _sorted(arrays)
        token, self._begin = self._begin, None
        if not spread:
            if self._saver is not None:
                self._saver.save(step, here, meta)
            return
        part = self._part = _Part(sharded.directory_name(self._base, step, token), spread)
        part.try_to(part.copy)
        if self._saver is not None:
            if not self._saver.save(step, here, meta, part.write_and_complete):
                part.tell("it could not begin")
            return
        self._thread = threading.Thread(target=part.write, name="gdopt checkpoint", daemon=True)
        part.try_to(self._thread.start)

    def close(self, final: tuple[int, Arrays, Meta] | None = None) -> None:
        """Finish the checkpoint that is being written, and write the final one together with all other processes.

        Without a final one, do not wait for other processes.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if final is not None:
                self._finish(*final)
        finally:
            if self._part is not None:
                self._part.give_up()
            if self._saver is not None:
                self._saver.close()
            elif self._thread is not None and self._thread.ident is not None:
                self._thread.join()

    def _finish(self, step: int, arrays: Arrays, meta: Meta) -> None:
        if self._part is not None:
            self._part.written.wait()
            self._part.settled([note["part"] for note in self._peers.exchange(part=self._part.told)])
        if self._saver is not None:
            self._saver.wait()  # A save ends by removing files that belong to no checkpoint, so nobody may write yet.
        token = self._peers.exchange(begin=_token())[0]["begin"]
        spread, here = _sorted(arrays)
        complete = None
        if spread:
            part = _Part(sharded.directory_name(self._base, step, token), spread)
            part.write()
            part.settled([note["part"] for note in self._peers.exchange(part=part.told)])
            complete = part.complete
        if self._saver is not None:
            self._saver.close((step, here, meta), complete)
        self._peers.exchange(saved=True)


class _Part:
    """The part of one checkpoint that one process has to write, and what it knows of the others."""

    def __init__(self, directory: str, arrays: dict[str, jax.Array]):
        self.told: str | None = None  # the note to the others: None until it is written, then "" or the failure
        self.written = threading.Event()  # set when it is written, or has failed
        self._directory = directory
        self._arrays, self._kinds = arrays, {name: jax.typeof(array) for name, array in arrays.items()}
        self._all_told = threading.Event()
        self._failures = ["the run ended before all of it was written"]

    def tell(self, what: str) -> None:
        """Keep the first note."""
        if self.told is None:
            self.told = what
        self.written.set()

    def try_to(self, do: Callable[[], None]) -> None:
        """Call a function. If it fails, all processes hear of it, and none raises."""
        try:
            do()
        except Exception as error:
            self.tell(f"{type(error).__name__}: {error}"[:_LONGEST])

    def copy(self) -> None:
        """Copy the arrays, so that the caller may donate them."""
        self._arrays = sharded.copies(self._arrays)

    def write(self) -> None:
        """Write this process's part."""
        if self.told is None:
            self.try_to(lambda: sharded.write(self._directory, self._arrays))
        self._arrays = {}
        self.tell("")

    def complete(self) -> Meta:
        """Complete the checkpoint, in the first process, when all have written their parts or failed."""
        self._all_told.wait()
        if self._failures:
            raise CheckpointError("; ".join(self._failures))
        return sharded.complete(self._directory, self._kinds)

    def write_and_complete(self) -> Meta:
        """Do both, in the thread of a `Saver`."""
        self.write()
        return self.complete()

    def settled(self, told: list[str | None]) -> bool:
        """Tell whether all have written or failed."""
        if None in told:
            return False
        self._failures = [f"process {number}: {failure}" for number, failure in enumerate(told) if failure]
        self._all_told.set()
        return True

    def give_up(self) -> None:
        """Stop waiting: the others will report nothing more."""
        self._all_told.set()


def _token() -> str:
    return os.urandom(4).hex()


def _sorted(arrays: Arrays) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Return the arrays that no process holds, and the others as this one holds them."""
    spread = {name: array for name, array in arrays.items() if sharded.is_spread(array)}
    here = {name: _own(array) for name, array in arrays.items() if name not in spread}
    return spread, here


def _own(array: Any) -> Any:
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return array
    return array.addressable_data(0) if array.is_fully_replicated else np.empty(array.shape, array.dtype)
