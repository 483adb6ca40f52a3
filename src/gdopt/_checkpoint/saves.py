"""Saves of a run: one file each, checked to the last byte, written by a thread beside the run.

A file is, with all numbers little-endian::

    prefix   36 bytes: magic, format (uint32), length of the header (uint64), length of the file (uint64), CRC-32 of the
             header, CRC-32 of the 32 bytes before
    header   JSON: {"arrays": [{"name", "shape", "dtype", "offset", "nbytes", "crc32"}, ...], "meta": {...}}
    arrays   their bytes in C order, one after the other without gaps; offsets count from the end of the header

so every byte is under a checksum, and how many there are is known before any is taken for what it says.

Where arrays are spread over processes, a directory of orbax's beside the file holds them, and ``meta`` tells under
"spread" what is in it, with checksums: see `sharded`. The file is written last and removed first, so that it stands
for both.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import json
import math
import os
import platform
import re
import stat
import struct
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gdopt import _trees
from gdopt._checkpoint import sharded
from gdopt._checks import number, warn, whole_number
from gdopt._errors import CheckpointError, InputError

try:
    import fcntl
except ImportError:  # Windows, where a second run at the same path is not noticed
    fcntl = None

_MAGIC = b"\x89gdopt\r\n"  # as PNG's: a transfer as text or in 7 bits damages it
_FORMAT = 1
SPREAD = "spread"  # the entry of meta that tells of a directory beside the file
_PREFIX = struct.Struct("<8sIQQI")
_CRC = struct.Struct("<I")
_START = _PREFIX.size + _CRC.size  # of the header
_LARGEST_HEADER = 2**24  # bytes, of some 100,000 arrays: so that a wrong length costs no memory
_MOST_AXES = 64  # that NumPy can do
_FIELDS = {"name": str, "shape": list, "dtype": str, "offset": int, "nbytes": int, "crc32": int}

# By name, and no other: `np.dtype` would take what is no plain number, pointers among it.
_DTYPES = {dtype.name: dtype for dtype in _trees.NUMBERS}

Meta = dict[str, Any]  # of what JSON holds
Arrays = Mapping[str, Any]  # JAX's or NumPy's, by name


class Saved(NamedTuple):
    """The contents of a save, and its file."""

    file: str
    arrays: dict[str, np.ndarray]
    meta: Meta


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The path at which a run saves itself, how often it does, and how many saves it keeps.

    A save is one file beside the others, ``path`` with its step behind: ``run.000000001200.gdopt`` for the path
    ``run``. It is complete or not there at all, and checked to the last byte when it is read. A thread writes it while
    the run goes on, from a copy that the run waits for, and whose memory a run on a CPU keeps for the next one. A save
    that fails, on a full disk say, is a warning; the older ones stay, and it is tried again. Only one run at a time can
    use a path. Arrays that are split over several processes are in a directory beside the file,
    ``run.000000001200.5f0c66d2.orbax``, written by orbax.

    Attributes:
        path: the saves' common path, without the step; its directory has to be there.
        every_seconds: from the end of one save to the next; 0 for as often as possible.
        keep: the newest saves that are kept. Older ones are removed once a new one is safely on the disk.

    Raises:
        InputError: for a path that is a directory, or in a directory that is not there; for numbers out of range.

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
        if os.path.basename(path) in ("", ".", "..") or os.path.isdir(path):
            cure = os.path.join(path, "run")
            raise InputError(f"checkpoint path={path!r} is no file's name but a directory's: pass {cure!r}, say.")
        one = re.fullmatch(r"(.+)\.\d{12}\.gdopt", path)
        if one:
            raise InputError(
                f"checkpoint path={path!r} is a single save, not the path of all of them: pass {one[1]!r}; the newest "
                "save that can be read is taken."
            )
        _check_directory(path)
        object.__setattr__(self, "path", os.path.abspath(path))  # so that a change of directory changes nothing
        every_seconds = number("every_seconds", self.every_seconds, lambda x: x >= 0, "a finite number, 0 or above")
        object.__setattr__(self, "every_seconds", every_seconds)
        object.__setattr__(self, "keep", whole_number("keep", self.keep))


def _check_directory(path: str) -> None:
    directory = os.path.dirname(path) or os.curdir
    if not os.path.isdir(directory):
        what = "is not a directory" if os.path.exists(directory) else "does not exist"
        raise InputError(
            f"checkpoint path={path!r} is in {directory!r}, which {what}: make it before, or pass a path in another."
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(
            f"checkpoint path={path!r} is in {directory!r}, where this process may not write: allow it, or pass a path "
            "in another directory."
        )
    longest = os.pathconf(directory, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    room = longest - len(f".{0:012d}.gdopt.{0:08x}.tmp")
    if len(os.fsencode(os.path.basename(path))) > room:
        raise InputError(
            f"checkpoint path={path!r} has a name that is too long for the files of its saves: pass one of at most "
            f"{room} bytes."
        )


def write(file: str, arrays: Mapping[str, np.ndarray], meta: Meta) -> None:
    """Writes a file that after a crash at any moment is the whole new one, or what it was before.

    Raises OSError for what the disk refuses, CheckpointError for arrays of anything but numbers, TypeError for a
    ``meta`` that JSON cannot hold. Then, too, the file is what it was.
    """
    data, entries, offset = [], [], 0
    for name in sorted(arrays):
        array = _native(name, arrays[name])
        data.append(_bytes(array))
        places = {"offset": offset, "nbytes": array.nbytes, "crc32": zlib.crc32(data[-1])}
        entries.append({"name": name, "shape": list(array.shape), "dtype": array.dtype.name, **places})
        offset += array.nbytes
    header = json.dumps({"arrays": entries, "meta": meta}, sort_keys=True).encode()
    if len(header) > _LARGEST_HEADER:
        raise CheckpointError(f"{file!r} cannot be written: meta is too large, give long lists as arrays.")
    length = _START + len(header) + offset
    prefix = _PREFIX.pack(_MAGIC, _FORMAT, len(header), length, zlib.crc32(header))
    # A name that nobody else has: what a writer that was given up does late is then no harm to the next.
    temporary = f"{file}.{os.urandom(4).hex()}.tmp"
    try:
        with open(temporary, "xb") as stream:
            for part in (prefix, _CRC.pack(zlib.crc32(prefix)), header, *data):
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(os.path.dirname(file) or os.curdir)


def _native(name: str, array: Any) -> np.ndarray:
    """The array in C order and in the file's order of bytes, if it is one of numbers."""
    array = np.asarray(_trees.on_host(array), order="C")
    dtype = _DTYPES.get(array.dtype.name)
    if dtype is None:
        raise CheckpointError(f"the array {name!r} is of {array.dtype}, which cannot be saved: give one of numbers.")
    return _little_endian(array.astype(dtype, copy=False))


def _little_endian(array: np.ndarray) -> np.ndarray:
    return array.byteswap() if sys.byteorder == "big" else array


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _sync_directory(directory: str) -> None:
    """Makes a new name last, where that can be asked for: not on Windows, nor on some disks of a network."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def read(file: str) -> tuple[dict[str, np.ndarray], Meta]:
    """Return what `write` was given, the arrays in memory of their own.

    Raises CheckpointError, which says what is wrong, for every other file; before that it takes no more memory than the
    file has bytes.
    """

    def check(good: bool, why: str) -> None:
        if not good:
            raise CheckpointError(f"{file!r} cannot be read: {why}.")

    try:
        check(stat.S_ISREG(os.stat(file).st_mode), "it is not a regular file")  # to open a pipe would take for ever
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(_START)
            check(prefix[: len(_MAGIC)] == _MAGIC[: len(prefix)], "it is no checkpoint of gdopt's")
            check(len(prefix) == _START, f"it ends after {size} bytes, within the first {_START}")
            crc = zlib.crc32(prefix[: _PREFIX.size])
            check(_CRC.unpack_from(prefix, _PREFIX.size) == (crc,), "it is damaged in its first bytes")
            _, version, header_length, length, header_crc = _PREFIX.unpack_from(prefix)
            check(version == _FORMAT, f"it is of format {version}, this version of gdopt reads format {_FORMAT}")
            check(size == length, f"it has {size} bytes and should have {length}")
            fits = header_length <= min(_LARGEST_HEADER, size - _START)
            check(fits, f"its header is of {header_length} bytes, which is too long")
            header = stream.read(header_length)
            check(zlib.crc32(header) == header_crc, "it is damaged in its header")
            entries, meta = _parsed(header, size - _START - header_length, check)
            arrays = {}
            for name, shape, dtype, crc in entries:
                try:
                    array = np.empty(shape, dtype)
                except ValueError:  # an axis is longer than any can be, and another one empty
                    raise CheckpointError(f"{file!r} cannot be read: {name!r} has the shape {shape}.") from None
                view = _bytes(array)
                complete = stream.readinto(view) == len(view)
                check(complete and zlib.crc32(view) == crc, f"it is damaged in the array {name!r}")
                arrays[name] = _little_endian(array)
    except OSError as error:
        raise CheckpointError(f"{file!r} cannot be read: {error.strerror or error}.") from error
    return arrays, meta


def _parsed(header: bytes, room: int, check: Callable[[bool, str], None]) -> tuple[list[tuple], Meta]:
    """Name, shape, dtype and checksum of each array, and the meta; the arrays fill the room exactly."""
    why = "its header is not that of a checkpoint"
    try:
        tree = json.loads(header)
    except (ValueError, RecursionError):
        tree = None
    listed, meta = (tree.get("arrays"), tree.get("meta")) if isinstance(tree, dict) and len(tree) == 2 else (None, None)
    check(isinstance(listed, list) and isinstance(meta, dict), why)
    assert isinstance(listed, list)
    assert isinstance(meta, dict)
    entries, position, names = [], 0, set()
    for entry in listed:
        check(isinstance(entry, dict) and entry.keys() == _FIELDS.keys(), why)
        check(all(type(entry[field]) is kind for field, kind in _FIELDS.items()), why)  # True is no int here
        name, shape, dtype = entry["name"], entry["shape"], _DTYPES.get(entry["dtype"])
        check(name not in names, f"it holds two arrays with the name {name!r}")
        check(len(shape) <= _MOST_AXES and all(type(n) is int and 0 <= n < 2**63 for n in shape), why)
        check(dtype is not None, f"{name!r} is of a dtype that is not known here, {entry['dtype'][:60]!r}")
        assert dtype is not None
        exact = entry["nbytes"] == math.prod(shape) * dtype.itemsize and entry["offset"] == position
        position += entry["nbytes"]
        check(exact and position <= room, f"the bytes of {name!r} are not where they should be")
        names.add(name)
        entries.append((name, tuple(shape), dtype, entry["crc32"]))
    check(position == room, f"its arrays take {position} bytes, where it has {room}")
    return entries, meta


def newest(checkpoint: Checkpoint) -> Saved | None:
    """The newest save that can be read, with a warning that names each newer one; None where there are no saves.

    Raises CheckpointError where there are some and none can be read: to begin anew would replace them in time.
    """
    skipped = []
    for file in reversed(_saves(base_of(checkpoint)).values()):
        try:
            saved = Saved(file, *read(file))
            if SPREAD in saved.meta:
                sharded.check(file, saved.meta[SPREAD])
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        if skipped:
            warn(f"the checkpoint {file!r} is taken, as newer ones were skipped: {' '.join(skipped)}")
        return saved
    if skipped:
        raise CheckpointError(
            f"none of the checkpoints at path={checkpoint.path!r} can be used: {' '.join(skipped)} Move them away to "
            "begin anew, or pass another path."
        )
    return None


def base_of(checkpoint: Checkpoint) -> str:
    """The path of the saves, without the step."""
    return os.fspath(checkpoint.path)


def save_at(base: str, step: int) -> str:
    """The file of the save of a step."""
    return f"{base}.{step:012d}.gdopt"


def _saves(base: str) -> dict[int, str]:
    """The files of a path by their steps, from the first to the last."""
    files = {int(match[1]): match.string for match in _beside(base, r"\.(\d{12})\.gdopt")}
    directory = os.path.dirname(base)
    return {step: os.path.join(directory, files[step]) for step in sorted(files)}


def _beside(base: str, ending: str) -> list[re.Match[str]]:
    """The names in the directory that are the base's with such an ending."""
    directory, name = os.path.split(base)
    pattern = re.compile(re.escape(name) + ending, re.ASCII)
    return [match for match in map(pattern.fullmatch, os.listdir(directory)) if match]


class Saver:
    """Saves at one path, of which it has the lock from entry to exit; until then the caller waits for no disk.

    Call `newest` within: before, another run may still be writing.
    Use it from one thread. Nothing but `__enter__` raises: what goes wrong later is a warning, once for each save,
    given in the caller's thread by the next call of whichever method.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._base = base_of(checkpoint)
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
        _check_directory(self._base)
        self._lock = _acquire(self._base)
        _holding.add(self)
        for match in _beside(self._base, r"\.\d{12}\.gdopt\.[0-9a-f]{8}\.tmp"):
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
                _release(self._base, self._lock)
                self._lock = None
        self._report()

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
            files = [file for at, file in _saves(self._base).items() if at <= step]
            for file in files[: -self._keep]:
                os.unlink(file)
        self._remove_parts()

    def _remove_parts(self) -> None:
        """Removes the directories that belong to no save."""
        with contextlib.suppress(OSError):
            saves = _saves(self._base)
            for step, found in sharded.directories(self._base).items():
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
        if saver._lock is not None:
            os.close(saver._lock)
            saver._lock = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _acquire(base: str) -> int:
    """The lock of a path, which ends with this process however that ends."""
    lock = f"{base}.lock"
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(
                f"checkpoint path={base!r} cannot be used: {lock!r} cannot be written, {error.strerror}. Pass another "
                "path."
            ) from error
        try:
            _flock(descriptor)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "not known which"
            os.close(descriptor)
            raise InputError(
                f"checkpoint path={base!r} is in use by a live run ({holder}): wait for its end, or pass another path."
            ) from None
        with contextlib.suppress(OSError):  # the one who had it may have removed it since it was opened here
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                break
        os.close(descriptor)
    with contextlib.suppress(OSError):
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
    return descriptor


def _flock(descriptor: int) -> None:
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass


def holder_of(base: str) -> str:
    """Who has the lock of a path, as far as its file tells; empty where there is none."""
    try:
        with open(f"{base}.lock", encoding="utf-8", errors="replace") as stream:
            return stream.read(200)
    except OSError:
        return ""


def _release(base: str, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(f"{base}.lock")
    os.close(descriptor)
