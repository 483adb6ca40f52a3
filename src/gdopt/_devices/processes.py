"""Several processes that run one program: they agree on what the host decides, and end together.

Each process of ``jax.distributed`` runs the same Python. The devices compute the same in all of them. But the hosts
decide some things by their clock, a callback or Ctrl-C, and if two decided differently, both would wait for ever. So
every decision goes through `Peers.exchange`, which takes some milliseconds.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import re
import zlib
from collections.abc import Callable, Generator
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

from gdopt import _jax, _trees
from gdopt._errors import GdoptError, InputError
from gdopt._settings import own_work
from gdopt._types import PyTree

_BYTES = 8192  # the bytes of a note
_LONGEST_ERROR = 1000  # the most characters of an error, of up to 6 bytes each
_LONGEST = 60  # the most characters of a value that is compared and shown as it is

P = ParamSpec("P")
T = TypeVar("T")


class Alone:
    """The only process of a run, which agrees with itself."""

    several = False

    def exchange(self, **note: Any) -> list[dict[str, Any]]:
        """Return the note."""
        return [note]


class Peers:
    """The processes of a run, of which this is one."""

    several = True

    def exchange(self, **note: Any) -> list[dict[str, Any]]:
        """Return the notes of all processes, in their order; raise GdoptError if one of them failed instead."""
        from jax.experimental import multihost_utils

        text = json.dumps(note).encode()[:_BYTES]
        page = np.zeros(_BYTES, np.uint8)
        page[: len(text)] = np.frombuffer(text, np.uint8)
        with own_work():
            pages = np.asarray(multihost_utils.process_allgather(page)).reshape(-1, _BYTES)
        notes = [json.loads(page.tobytes().rstrip(b"\0")) for page in pages]
        for number, other in enumerate(notes):
            if "error" in other and number != jax.process_index():
                raise _PeerError(f"process {number} ended the run: {other['error']}")
        return notes

    def compare(self, **settings: Any) -> None:
        """Raise InputError if the processes were called with different settings."""
        mine = {name: _short(value) for name, value in settings.items()}
        for number, theirs in enumerate(self.exchange(**mine)):
            different = [name for name in mine if theirs.get(name) != mine[name]]
            if different:
                name = different[0]
                raise InputError(
                    f"the processes were called with another {' and '.join(different)}: {name} is {mine[name]} in "
                    f"process {jax.process_index()}, and {theirs.get(name)} in process {number}. Make the same call "
                    "with the same values in every process; only the part of the data that it holds may differ."
                )


class _PeerError(GdoptError):
    """The error of a process that heard of a failure in another one."""


_alone = Alone()
_current: contextvars.ContextVar[Alone | Peers] = contextvars.ContextVar("peers", default=_alone)


def peers() -> Alone | Peers:
    """Return the processes of the current call."""
    return _current.get()


def joined(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a function so that it ends in all processes if it fails in one.

    This holds if its arrays are spread over several processes. If each process has its own arrays (for example one
    model each), they run independently.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if jax.process_count() == 1 or not _is_spread((args, kwargs)):
            return function(*args, **kwargs)
        with _together(Peers()):
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _together(peers: Peers) -> Generator[None]:
    token = _current.set(peers)
    try:
        yield
        peers.exchange(done=True)  # The others hear of a failure after the last chunk, too.
    except _PeerError:
        raise
    except BaseException as error:
        with contextlib.suppress(_PeerError):
            peers.exchange(error=f"{type(error).__name__}: {error}"[:_LONGEST_ERROR])
        raise
    finally:
        _current.reset(token)


def check_joined(inputs: PyTree) -> None:
    """Raise InputError for inputs that are spread over processes although no argument is."""
    if not peers().several and jax.process_count() > 1 and _is_spread(inputs):
        raise InputError(
            "the run is spread over several processes, but neither params, data nor args are. Place the params there "
            "with gdopt.shard(params, mesh), and pass arrays that the loss closes over in args=."
        )


def comparable(tree: PyTree) -> str:
    """Describe a tree by its structure, shapes and places, and by its values if each process holds all of them."""
    parts = [str(jax.tree.structure(tree))]
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            parts.append(f"{leaf.dtype} {leaf.shape} {getattr(leaf.sharding, 'spec', None)}")
        elif _trees.is_key(leaf):
            parts.append(comparable(jax.random.key_data(leaf)))
        elif _trees.is_array(leaf):
            array = _trees.on_host(leaf)
            parts.append(f"{array.dtype} {array.shape} {zlib.crc32(array.tobytes())}")
        else:
            parts.append(repr(leaf))
    return " ".join(parts)


def _is_spread(tree: PyTree) -> bool:
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return any(not _jax.is_tracer(leaf) and not leaf.is_fully_addressable for leaf in arrays)


def _short(value: Any) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", value if isinstance(value, str) else repr(value))
    return text if len(text) <= _LONGEST else f"{text[:20]}... (checksum {zlib.crc32(text.encode()):x})"
