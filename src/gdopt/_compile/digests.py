"""Checksums of functions and numbers, which are compared with those of another process or of a checkpoint."""

from __future__ import annotations

import contextlib
import enum
import functools
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import jax
import numpy as np

from gdopt import _jax, _trees
from gdopt._compile import replays
from gdopt._compile.copies import CALLBACKS
from gdopt._types import PyTree


def text(function: Callable, *args: PyTree) -> str:
    """Write the function's trace as text, to compare it with that of another process or time."""
    return _text(_jax.opened(replays.trace(function, *args)[0]))


class Digest:
    """The checksum of a function's trace and of all arrays in it, those in inner jits, loops and branches included."""

    def __init__(self, function: Callable, *args: PyTree):
        closed = _traced(function, *args)
        self.text = f"{zlib.crc32(_text(_jax.opened(closed)).encode()):08x}{checksum(list(_held(closed)))}"
        callbacks = [eqn for name in sorted(CALLBACKS) for eqn in _jax.calls(closed, name)]
        self._called = [eqn.params.get("callback") for eqn in callbacks]

    def host(self) -> str:
        """Return a checksum of what the functions that the trace calls on the host would read now; "" without any."""
        if not self._called:
            return ""
        crc, reader = 0, _Reader()
        for function in self._called:
            for number in reader.numbers(function):
                crc = zlib.crc32(number, crc)
        return f"{crc:08x}"


def _traced(function: Callable, *args: PyTree) -> Any:
    """Trace a function outside of the mesh that is set, if it can do without: a run may resume on another one."""
    if not jax.sharding.get_abstract_mesh().empty:
        with contextlib.suppress(Exception), jax.set_mesh(jax.sharding.Mesh(np.empty((), dtype=object), ())):
            return replays.trace(function, *args)[0]
    return replays.trace(function, *args)[0]


def digest(function: Callable, *args: PyTree) -> str:
    """Return the checksum of a function's trace and of all arrays in it."""
    return Digest(function, *args).text


def _text(jaxpr: Any) -> str:
    ordered = lambda found: ", ".join(sorted(found[1].split(", ")))
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(jaxpr))  # JAX writes colours for a terminal.
    text = re.sub(r"frozenset\(\{(.*?)\}\)", ordered, text)  # Strings have another order in each process.
    return re.sub(r"\b0x[0-9a-f]+", "0x", text)  # Addresses differ, above all those of functions.


def checksum(tree: PyTree) -> str:
    """Return a checksum of the numbers in a tree, as far as this process holds them."""
    crc = 0
    for leaf in jax.tree.leaves(tree):
        leaf = jax.random.key_data(leaf) if _trees.is_key(leaf) else leaf
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if not leaf.is_fully_replicated:
                continue
            leaf = leaf.addressable_data(0)
        crc = zlib.crc32(np.ascontiguousarray(_trees.on_host(leaf)).reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def _held(closed: Any) -> Iterator[Any]:
    """Yield the arrays that a trace holds, and those of the traces inside it."""
    yield from _arrays(_jax.consts(closed))
    for eqn in _jax.opened(closed).eqns:
        for value in eqn.params.values():
            yield from _arrays([value])
            module: Any = getattr(value, "mlir_module", None)
            if callable(module):  # It is a function of jax.export.
                bare = re.sub(r"^#loc.*\n?|loc\(#loc\d*\)", "", cast(str, module()), flags=re.M)  # no lines of sources
                yield np.frombuffer(bare.strip().encode(), np.uint8)
        for inner in _jax.inner_jaxprs(eqn.params):
            yield from _held(inner)


def _arrays(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        known = isinstance(value, np.ndarray | jax.Array | np.generic) and not _jax.is_tracer(value)
        if known and (value.dtype in _trees.NUMBERS or _trees.is_key(value)):
            yield value


class _Reader:
    """A walk through what a function on the host reads: what it closes over, its defaults, and its module's numbers.

    Lists and objects count with all that they hold, although they may be records of the calls. Checkpoints allow for
    that: see `Saves`.
    """

    def __init__(self) -> None:
        self._seen: list[Any] = []  # functions and objects refer to each other in circles

    def numbers(self, value: Any) -> Iterator[bytes]:
        """Yield the numbers and texts in a value, each as bytes that no other one has."""
        if isinstance(value, _SCALARS):
            yield f"{type(value).__name__} {value!r};".encode()
        elif isinstance(value, np.ndarray | jax.Array | np.generic):
            for array in _arrays([value]):
                yield f"{array.dtype}{list(np.shape(array))} {checksum([array])};".encode()
        elif not any(value is other for other in self._seen):
            self._seen.append(value)
            parts = _parts(value)
            yield f"{type(value).__name__} {len(parts)};".encode()
            for part in parts:
                yield from self.numbers(part)


_SCALARS = bool, int, float, complex, str, bytes


def _parts(value: Any) -> Sequence[Any]:
    """Return the values in a value that may hold numbers."""
    match value:
        case tuple() | list():
            return value
        case dict():
            return [part for pair in value.items() for part in pair]
        case functools.partial():
            return value.func, value.args, value.keywords
        case MethodType():
            return value.__func__, value.__self__
        case CellType():
            return (_contents(value),)
        case CodeType():
            return value.co_code, value.co_names, value.co_consts
        case FunctionType():
            return _parts_of_function(value)
        case type() | ModuleType():
            return ()
        case _:
            return _parts_of_object(value)


def _parts_of_function(function: FunctionType) -> Sequence[Any]:
    if not _is_users(function):  # Libraries stay as they are.
        return function.__module__, function.__qualname__
    found = list(_globals(function, function.__code__))
    return [function.__code__, function.__closure__, function.__defaults__, function.__kwdefaults__, *found]


def _parts_of_object(value: Any) -> Sequence[Any]:
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, enum.Enum):
        return (repr(value),)
    if type(value).__module__.split(".")[0] in ("jax", "jaxlib"):  # It wraps the user's function.
        return [part for part in _jax.attributes(value).values() if callable(part)]
    call = vars(type(value)).get("__call__")
    name = getattr(value, "__name__", None)  # of NumPy's functions
    return [name, call if isinstance(call, FunctionType) else None, getattr(value, "__dict__", None)]


def _globals(function: FunctionType, code: CodeType) -> Iterator[Any]:
    """Yield what code finds in its module, and in other modules of the user's by their names there."""
    for name in code.co_names:
        found = function.__globals__.get(name)
        if isinstance(found, ModuleType):
            yield from (vars(found)[inner] for inner in code.co_names if _is_plain(vars(found).get(inner)))
        else:
            yield found
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals(function, inner)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (*_SCALARS, np.ndarray, FunctionType))


def _is_users(function: FunctionType) -> bool:
    """Tell whether a function is of no installed library."""
    return not function.__code__.co_filename.startswith((*_LIBRARIES, "<frozen"))


_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # It is still empty.
        return None
