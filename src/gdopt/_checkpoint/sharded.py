"""Arrays that are spread over processes, on disk: one directory of orbax's per checkpoint, checked to the last byte.

Each process writes the parts that are on its own devices, and the first one makes one checkpoint of them. Orbax's
checkpointers make processes wait for each other, at barriers and in common computations. So only its handler is called
here. It may run in a thread while the run computes, and if one process fails, no other one waits for it. The caller has
to find out whether all have written.

Orbax silently loads flipped bits, converts dtypes, and takes half a directory for a whole one. So every file is listed
with its size and checksum, and checked before orbax reads it. Shapes and dtypes are listed, too.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdopt._errors import CheckpointError, GdoptError
from gdopt._types import PyTree

_BLOCK = 2**20  # bytes that are read at once
_MARK = "gdopt-checkpoint"  # a file in each directory of gdopt's, without which it is not removed
_TOKEN = re.compile(r"\.[0-9a-f]{8}\.orbax", re.ASCII)  # the ending after a path with its step

Listing = dict[str, Any]  # the record that `complete` makes for `check` and `load`


def is_spread(leaf: Any) -> bool:
    """Tell whether no process can read all of an array. One without entries counts as whole; orbax saves none."""
    if not isinstance(leaf, jax.Array):
        return False
    return not (leaf.is_fully_addressable or leaf.is_fully_replicated or leaf.size == 0)


def check_installed(tree: PyTree) -> None:
    """Raise GdoptError, before the first checkpoint is due, if the tree needs orbax and it is missing."""
    if any(map(is_spread, jax.tree.leaves(tree))):
        _orbax()


def _orbax() -> tuple[Any, Any]:
    """Import orbax, and its class of paths."""
    try:
        import orbax.checkpoint
        from etils import epath
    except ImportError as error:
        raise GdoptError(
            "checkpoint= needs orbax for params that are spread over several processes. Run "
            'pip install "gdopt[checkpoint]"'
        ) from error
    return orbax.checkpoint, epath.Path


@contextlib.contextmanager
def _handler() -> Any:
    """Make a new handler each time: one that failed would report that again at the next save, and not make that one."""
    orbax, _ = _orbax()
    everyone = set(range(jax.process_count()))
    options = orbax.options.MultiprocessingOptions(primary_host=0, active_processes=everyone)
    # The numbers of a run hardly compress, and the run needs the processor.
    handler = orbax.PyTreeCheckpointHandler(multiprocessing_options=options, use_compression=False)
    try:
        yield handler
    finally:
        handler.close()


def copies(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Copy each part on its device, without compiling, and without waiting for another process."""
    copied = {}
    for name, array in arrays.items():
        own = [shard.data for shard in array.addressable_shards]
        own = jax.device_put(own, [part.sharding for part in own], may_alias=False)
        copied[name] = jax.make_array_from_single_device_arrays(array.shape, array.sharding, own)
    return copied


def directory_name(base: str, step: int, token: str) -> str:
    """Name one attempt at a checkpoint, with 8 random hexadecimal digits, so that no leftovers are in its way."""
    return f"{base}.{step:012d}.{token}.orbax"


def write(directory: str, arrays: Mapping[str, jax.Array]) -> None:
    """Write the parts that are on this process's devices, and return when they are on the disk."""
    orbax, path_class = _orbax()
    os.makedirs(directory, exist_ok=True)  # Any process may be the first.
    with open(os.path.join(directory, _MARK), "wb") as stream:
        stream.write(b"gdopt\n")
    with _handler() as handler:
        handler.save(path_class(directory), args=orbax.args.PyTreeSave(_numbered(arrays)))


def complete(directory: str, arrays: Mapping[str, Any]) -> Listing:
    """Make one checkpoint of the parts of all processes, in the first one."""
    _, path_class = _orbax()
    with _handler() as handler:
        handler.finalize(path_class(directory))
    files = {name: list(_checksum(os.path.join(directory, name))) for name in _files(directory)}
    kinds = {name: [list(arrays[name].shape), arrays[name].dtype.name] for name in sorted(arrays)}
    return {"directory": os.path.basename(directory), "files": files, "arrays": kinds}


def _numbered(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Name the arrays by numbers: orbax would take names for paths, which might collide."""
    return {str(number): arrays[name] for number, name in enumerate(sorted(arrays))}


def _files(directory: str) -> list[str]:
    found = (os.path.join(root, name) for root, _, names in os.walk(directory) for name in names)
    return sorted(os.path.relpath(file, directory).replace(os.sep, "/") for file in found)


def _checksum(file: str) -> tuple[int, int]:
    """Return the size and the CRC-32 of a file."""
    if not stat.S_ISREG(os.stat(file).st_mode):  # Opening a pipe would block.
        raise OSError(f"{os.path.basename(file)!r} is not a regular file")
    size = crc = 0
    with open(file, "rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def check(file: str, listing: Any) -> None:
    """Raise CheckpointError if a file in the directory of the checkpoint ``file`` has changed."""
    place = directory(file, listing)
    try:
        kinds(listing)
        files = {str(name): (int(size), int(crc)) for name, (size, crc) in listing["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{file!r} cannot be read: its list of parts is not that of a checkpoint.") from None
    for name, expected in files.items():
        if os.path.isabs(name) or ".." in name.split("/"):
            raise CheckpointError(f"{file!r} cannot be read: it lists {name!r}, which is not in {place!r}.")
        try:
            size, crc = _checksum(os.path.join(place, *name.split("/")))
        except OSError as error:
            why = error.strerror or error
            raise CheckpointError(f"{file!r} cannot be read: {name!r} in {place!r}: {why}.") from error
        if size != expected[0]:
            why = f"has {size} bytes and should have {expected[0]}"
        elif crc != expected[1]:
            why = "is damaged"
        else:
            continue
        raise CheckpointError(f"{file!r} cannot be read: {name!r} in {place!r} {why}.")


def directory(file: str, listing: Listing) -> str:
    """Return the directory of a checkpoint: it is beside the file, and its name has the step, whatever is listed."""
    name = listing.get("directory") if isinstance(listing, dict) else None
    stem = os.path.basename(file).removesuffix(".gdopt")
    if not isinstance(name, str) or not name.startswith(stem) or not _TOKEN.fullmatch(name[len(stem) :]):
        raise CheckpointError(f"{file!r} cannot be read: {name!r} is not its directory.")
    return os.path.join(os.path.dirname(file), name)


def kinds(listing: Listing) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return the shapes and dtypes of the arrays, by name."""
    return {name: (tuple(shape), jnp.dtype(dtype)) for name, (shape, dtype) in listing["arrays"].items()}


def load(file: str, listing: Listing, places: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Load the arrays of the checkpoint ``file`` that have places, on the devices and processes that there are now.

    The caller has compared the shapes and dtypes, and the first process has checked the files.
    """
    orbax, path_class = _orbax()
    found = kinds(listing)
    names = {number: name for number, name in _numbered({name: name for name in found}).items() if name in places}
    like = {number: jax.ShapeDtypeStruct(*found[name], sharding=places[name]) for number, name in names.items()}
    options = {"restore_args": orbax.checkpoint_utils.construct_restore_args(like), "partial_restore": True}
    args = orbax.args.PyTreeRestore(item=like, **options)
    try:
        with _handler() as handler:
            loaded = handler.restore(path_class(directory(file, listing)), args=args)
    except Exception as error:  # orbax raises many kinds.
        raise CheckpointError(f"{file!r} cannot be read: {type(error).__name__}: {error}") from error
    return {name: loaded[number] for number, name in names.items()}


def remove(directory: str) -> None:
    """Remove a directory that `write` made, as far as the disk permits."""
    mark = os.path.join(directory, _MARK)
    if os.path.isfile(mark) and not os.path.islink(mark):
        shutil.rmtree(directory, ignore_errors=True)  # This follows no links.
