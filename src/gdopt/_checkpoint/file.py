"""The file of a checkpoint, checked to the last byte.

A file is, with all numbers little-endian::

    prefix   36 bytes: magic, format (uint32), length of the header (uint64), length of the file (uint64), CRC-32 of the
             header, CRC-32 of the 32 bytes before
    header   JSON: {"arrays": [{"name", "shape", "dtype", "offset", "nbytes", "crc32"}, ...], "meta": {...}}
    arrays   their bytes in C order, one after the other without gaps; offsets count from the end of the header

So every byte is under a checksum, and the number of bytes is known before any of them is interpreted.

Arrays that are spread over processes are in a directory of orbax's beside the file. The entry "spread" of ``meta``
lists its contents with checksums: see `sharded`. The file is written last and removed first, so that it stands for
both.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
import struct
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gdopt import _trees
from gdopt._errors import CheckpointError

_MAGIC = b"\x89gdopt\r\n"  # the first bytes, as in PNG: a transfer as text or in 7 bits damages them
_FORMAT = 1
SPREAD = "spread"  # the entry of meta that describes a directory beside the file
_PREFIX = struct.Struct("<8sIQQI")
_CRC = struct.Struct("<I")
_START = _PREFIX.size + _CRC.size  # the offset of the header
_LARGEST_HEADER = 2**24  # bytes, enough for some 100,000 arrays; so a wrong length costs no memory
_MOST_AXES = 64  # the most axes that NumPy supports
_FIELDS = {"name": str, "shape": list, "dtype": str, "offset": int, "nbytes": int, "crc32": int}
# The known dtypes by name: `np.dtype` would also accept types that are not plain numbers, such as pointers.
_DTYPES = {dtype.name: dtype for dtype in _trees.NUMBERS}
Meta = dict[str, Any]  # values that JSON can hold
Arrays = Mapping[str, Any]  # JAX's or NumPy's, by name


def write(file: str, arrays: Mapping[str, np.ndarray], meta: Meta) -> None:
    """Write a file that after a crash at any moment is either the whole new one or the old one.

    Raise OSError for failures of the disk, CheckpointError for arrays of anything but numbers or if somebody else's
    file has the name, TypeError for a ``meta`` that JSON cannot hold. In these cases, too, the old file stays.
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
        raise CheckpointError(f"{file!r} cannot be written: meta is too large. Pass long lists as arrays.")
    length = _START + len(header) + offset
    prefix = _PREFIX.pack(_MAGIC, _FORMAT, len(header), length, zlib.crc32(header))
    # The name is unique, so a writer that was given up cannot harm the next one.
    temporary = f"{file}.{os.urandom(4).hex()}.tmp"
    try:
        with open(temporary, "xb") as stream:
            for part in (prefix, _CRC.pack(zlib.crc32(prefix)), header, *data):
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        if os.path.lexists(file) and not is_own(file):
            raise CheckpointError(f"{file!r} is in its place, and is not a checkpoint of gdopt. Move it away.")
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(os.path.dirname(file) or os.curdir)


def is_own(file: str) -> bool:
    """Tell whether gdopt may replace or remove a file: it begins as a checkpoint does, or is empty, and is no link."""
    try:
        if not stat.S_ISREG(os.lstat(file).st_mode):
            return False
        with open(file, "rb") as stream:
            return stream.read(len(_MAGIC)) in (b"", _MAGIC)
    except OSError:
        return False


def _native(name: str, array: Any) -> np.ndarray:
    """Return the array in C order and in the byte order of the file, if it holds numbers."""
    array = np.asarray(_trees.on_host(array), order="C")
    dtype = _DTYPES.get(array.dtype.name)
    if dtype is None:
        raise CheckpointError(f"the array {name!r} is of {array.dtype}, which cannot be saved. Pass one of numbers.")
    return _little_endian(array.astype(dtype, copy=False))


def _little_endian(array: np.ndarray) -> np.ndarray:
    return array.byteswap() if sys.byteorder == "big" else array


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def sync_directory(directory: str) -> None:
    """Make a new name durable, if the system can: Windows cannot, nor can some network disks."""
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
    """Return the arrays and the meta that `write` got, the arrays in new memory.

    Raise CheckpointError, which says what is wrong, for every other file. Before that, take no more memory than the
    file has bytes.
    """

    def check(good: bool, why: str) -> None:
        if not good:
            raise CheckpointError(f"{file!r} cannot be read: {why}.")

    try:
        check(stat.S_ISREG(os.stat(file).st_mode), "it is not a regular file")  # Opening a pipe would block.
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(_START)
            check(prefix[: len(_MAGIC)] == _MAGIC[: len(prefix)], "it is not a checkpoint of gdopt")
            check(len(prefix) == _START, f"it ends after {size} bytes, within the first {_START}")
            crc = zlib.crc32(prefix[: _PREFIX.size])
            check(_CRC.unpack_from(prefix, _PREFIX.size) == (crc,), "it is damaged in its first bytes")
            _, version, header_length, length, header_crc = _PREFIX.unpack_from(prefix)
            check(version == _FORMAT, f"it is of format {version}, but this version of gdopt reads format {_FORMAT}")
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
                except ValueError:  # One axis is longer than possible, and another one is empty.
                    raise CheckpointError(f"{file!r} cannot be read: {name!r} has the shape {shape}.") from None
                view = _bytes(array)
                complete = stream.readinto(view) == len(view)
                check(complete and zlib.crc32(view) == crc, f"it is damaged in the array {name!r}")
                arrays[name] = _little_endian(array)
    except OSError as error:
        raise CheckpointError(f"{file!r} cannot be read: {error.strerror or error}.") from error
    return arrays, meta


def _parsed(header: bytes, room: int, check: Callable[[bool, str], None]) -> tuple[list[tuple], Meta]:
    """Return the name, shape, dtype and checksum of each array, and the meta; the arrays fill the room exactly."""
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
        check(all(type(entry[field]) is kind for field, kind in _FIELDS.items()), why)  # True does not count as an int.
        name, shape, dtype = entry["name"], entry["shape"], _DTYPES.get(entry["dtype"])
        check(name not in names, f"it holds two arrays with the name {name!r}")
        check(len(shape) <= _MOST_AXES and all(type(n) is int and 0 <= n < 2**63 for n in shape), why)
        check(dtype is not None, f"{name!r} is of an unknown dtype, {entry['dtype'][:60]!r}")
        assert dtype is not None
        exact = entry["nbytes"] == math.prod(shape) * dtype.itemsize and entry["offset"] == position
        position += entry["nbytes"]
        check(exact and position <= room, f"the bytes of {name!r} are not where they should be")
        names.add(name)
        entries.append((name, tuple(shape), dtype, entry["crc32"]))
    check(position == room, f"its arrays take {position} bytes, but it has {room}")
    return entries, meta
