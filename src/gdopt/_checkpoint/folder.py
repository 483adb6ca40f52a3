"""The checkpoints at a path: where they are, and the newest that can be read."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gdopt._checkpoint import sharded
from gdopt._checkpoint.file import SPREAD, Meta, read
from gdopt._checks import number, warn, whole_number
from gdopt._errors import CheckpointError, InputError


class Saved(NamedTuple):
    """The contents of a checkpoint, and its file."""

    file: str
    arrays: dict[str, np.ndarray]
    meta: Meta


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The path at which a run saves itself, how often it does, and how many checkpoints it keeps.

    Each checkpoint is one file, ``path`` followed by its step: ``run.000000001200.gdopt`` for the path ``run``. The
    file is complete or not there at all, and checked to the last byte when it is read. A thread writes it from a copy
    while the run continues. The run waits for that copy, and on a CPU keeps its memory for the next one. A checkpoint
    that cannot be written (for example on a full disk) is a warning. The older ones stay, and the run tries again. Only
    one run at a time can use a path. Arrays that are split over several processes are in a directory beside the file,
    ``run.000000001200.5f0c66d2.orbax``, written by orbax.

    Attributes:
        path: the common path of the checkpoints, without the step; its directory has to exist.
        every_seconds: from the end of one checkpoint to the next; 0 for as often as possible.
        keep: the number of checkpoints that are kept, the newest. Older ones are removed once a new one is safely on
            the disk.

    Raises:
        InputError: for a path that is a directory, or in a directory that does not exist; for numbers out of range.

    Example:
        >>> import os, tempfile
        >>> import gdopt
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     checkpoint = gdopt.Checkpoint(os.path.join(directory, "run"), every_seconds=600)
        >>> checkpoint.every_seconds, checkpoint.keep
        (600.0, 3)
    """

    path: str | os.PathLike[str]
    every_seconds: float = 60.0
    keep: int = 3

    def __post_init__(self) -> None:
        try:
            path = os.fspath(self.path)
        except TypeError:
            path = None
        if not isinstance(path, str) or "\0" in path:
            raise InputError(f"checkpoint path={self.path!r} is not a path: pass a str or a pathlib.Path.")
        try:
            os.fsencode(path)
        except UnicodeEncodeError as error:
            raise InputError(
                f"checkpoint path={path!a} has characters that file names cannot have here, where they are encoded in "
                f"{error.encoding}. Set the environment variable PYTHONUTF8=1, or pass another path."
            ) from None
        if os.path.basename(path) in ("", ".", "..") or os.path.isdir(path):
            cure = os.path.join(path, "run")
            raise InputError(f"checkpoint path={path!r} names a directory. Pass a file name (for example {cure!r}).")
        one = re.fullmatch(r"(.+)\.\d{12}\.gdopt", path)
        if one:
            raise InputError(
                f"checkpoint path={path!r} is a single checkpoint, not the path of all. Pass {one[1]!r}: the run "
                "resumes from the newest checkpoint that can be read."
            )
        check_directory(path)
        object.__setattr__(self, "path", os.path.abspath(path))  # The working directory may change later.
        every_seconds = number("every_seconds", self.every_seconds, lambda x: x >= 0, "a finite number, 0 or above")
        object.__setattr__(self, "every_seconds", every_seconds)
        object.__setattr__(self, "keep", whole_number("keep", self.keep))


def check_directory(path: str) -> None:
    directory = os.path.dirname(path) or os.curdir
    if not os.path.isdir(directory):
        what = "is not a directory" if os.path.exists(directory) else "does not exist"
        raise InputError(
            f"checkpoint path={path!r} is in {directory!r}, which {what}. Make that directory first, or pass another "
            "path."
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(
            f"checkpoint path={path!r} is in {directory!r}, where this process may not write. Allow it, or pass a path "
            "in another directory."
        )
    longest = os.pathconf(directory, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    room = longest - len(f".{0:012d}.gdopt.{0:08x}.tmp")
    if len(os.fsencode(os.path.basename(path))) > room:
        raise InputError(
            f"checkpoint path={path!r} has a name that is too long for its files. Pass a name of at most {room} bytes."
        )


_LOOKS = 100  # how often the directory is listed anew if files vanish meanwhile


def newest(
    checkpoint: Checkpoint,
    prepared: Callable[[Saved], Saved] = lambda saved: saved,
    *,
    before: int | None = None,
) -> Saved | None:
    """Return the newest checkpoint that can be used, and warn of each newer one; None if there are no checkpoints.

    ``prepared`` checks the contents, and returns those to use. Only checkpoints ``before`` a step count. Raise
    CheckpointError if no checkpoint can be used: a new run would replace them in time.
    """
    for _ in range(_LOOKS):
        with contextlib.suppress(_GoneError):
            return _newest(checkpoint, prepared, before)
    return _newest(checkpoint, prepared, before, still=True)


class _GoneError(Exception):
    """A listed checkpoint was removed before it was read, as the run that saved a newer one does."""


def _newest(
    checkpoint: Checkpoint, prepared: Callable[[Saved], Saved], before: int | None, *, still: bool = False
) -> Saved | None:
    """Look once; raise `_GoneError` if a file has vanished, unless the files should stand ``still``."""
    skipped = []
    files = saves_of(os.fspath(checkpoint.path))
    for file in [files[step] for step in reversed(files) if before is None or step < before]:
        try:
            saved = prepared(Saved(file, *read(file)))
            if SPREAD in saved.meta:
                sharded.check(file, saved.meta[SPREAD])
        except CheckpointError as error:
            if not still and not os.path.lexists(file):
                raise _GoneError from error
            skipped.append(str(error))
            continue
        if skipped:
            warn(f"resuming from the checkpoint {file!r}, because newer ones were skipped: {' '.join(skipped)}")
        return saved
    if skipped:
        raise CheckpointError(
            f"none of the checkpoints at path={checkpoint.path!r} can be used: {' '.join(skipped)} Move them away to "
            "begin anew, or pass another path."
        )
    return None


def save_at(base: str, step: int) -> str:
    """Return the file of the checkpoint of a step."""
    return f"{base}.{step:012d}.gdopt"


def step_of(file: str) -> int:
    """Return the step in the name of a checkpoint."""
    return int(file.split(".")[-2])


def saves_of(base: str) -> dict[int, str]:
    """Return the files of a path by their steps, in ascending order."""
    files = {int(match[1]): match.string for match in beside(base, r"\.(\d{12})\.gdopt")}
    directory = os.path.dirname(base)
    return {step: os.path.join(directory, files[step]) for step in sorted(files)}


def directories(base: str) -> dict[int, set[str]]:
    """Return the directories of a path's checkpoints, complete or not, by their steps."""
    found: dict[int, set[str]] = {}
    for match in beside(base, r"\.(\d{12})\.[0-9a-f]{8}\.orbax"):
        found.setdefault(int(match[1]), set()).add(os.path.join(os.path.dirname(base), match.string))
    return found


def beside(base: str, ending: str) -> list[re.Match[str]]:
    """Return the file names in the directory that are the base with such an ending."""
    directory, name = os.path.split(base)
    pattern = re.compile(re.escape(name) + ending, re.ASCII)
    return [match for match in map(pattern.fullmatch, os.listdir(directory)) if match]
