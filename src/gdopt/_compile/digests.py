"""Checksums of functions and numbers, which are compared with those of another process or of a checkpoint."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import jax
import numpy as np

from gdopt import _jax, _trees
from gdopt._compile import replays
from gdopt._compile.copies import CALLBACKS
from gdopt._types import PyTree


def text(function: Callable, *args: PyTree) -> str:
    """Write the function's trace as text, to compare it with that of another process or time."""
    return _text(_jax.opened(replays.trace(function, *args)[0]))


def digest(function: Callable, *args: PyTree) -> str:
    """Return a checksum of the trace and of all numbers that it depends on.

    These are the arrays that the function closes over, those in inner jits, loops and branches, and what functions that
    run on the host read.
    """
    closed, _ = replays.trace(function, *args)
    return f"{zlib.crc32(_text(_jax.opened(closed)).encode()):08x}{checksum(list(_held(closed)))}"


def _text(jaxpr: Any) -> str:
    ordered = lambda found: ", ".join(sorted(found[1].split(", ")))
    text = re.sub(r"frozenset\(\{(.*?)\}\)", ordered, str(jaxpr))  # Strings have another order in each process.
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
    """Yield what a trace holds: its arrays, those of the traces inside it, and what its host functions read."""
    yield from _arrays(_jax.consts(closed))
    for eqn in _jax.opened(closed).eqns:
        yield from _arrays(value for value in eqn.params.values() if isinstance(value, np.ndarray | jax.Array))
        for inner in _jax.inner_jaxprs(eqn.params):
            yield from _held(inner)
        if eqn.primitive.name in CALLBACKS:
            yield from _Read().by(eqn.params.get("callback"))


def _arrays(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        known = isinstance(value, np.ndarray | jax.Array | np.generic) and not _jax.is_tracer(value)
        if known and (value.dtype in _trees.NUMBERS or _trees.is_key(value)):
            yield value


class _Read:
    """The numbers that a function on the host reads.

    Containers and objects may be records of the calls, such as a list that grows or a counter. So only their arrays
    count.
    """

    def __init__(self) -> None:
        self._seen: list[Any] = []  # the functions, which refer to each other in circles

    def by(self, value: Any) -> Iterator[Any]:
        """Yield the numbers in a function, in what it closes over, and in what it finds in its module."""
        if isinstance(value, FunctionType):
            if any(value is other for other in self._seen):
                return
            self._seen.append(value)
        yield from _numbers(value)
        for part in _parts(value):
            yield from self.by(part)


def _numbers(value: Any) -> Iterator[Any]:
    """Yield the numbers that stand in a value itself."""
    match value:
        case bool() | int() | float() | complex() | str() | bytes():
            yield np.frombuffer(repr(value).encode(), np.uint8)
        case CodeType():
            yield np.frombuffer(value.co_code, np.uint8)
        case list() | dict():
            yield from _arrays(_leaves(value))
        case MethodType():
            yield from _arrays(_leaves(vars(value.__self__) if hasattr(value.__self__, "__dict__") else None))
        case _ if callable(value) and not isinstance(value, type | FunctionType):
            yield from _arrays(_leaves(getattr(value, "__dict__", None)))
        case _:
            yield from _arrays([value])


def _leaves(tree: Any) -> list[Any]:
    try:
        return jax.tree.leaves(tree)
    except (TypeError, ValueError):  # JAX cannot sort the keys of a dict.
        return []


def _parts(value: Any) -> Iterable[Any]:
    """Return the values in a value that may hold numbers, too."""
    match value:
        case tuple():
            return value
        case functools.partial():
            return value.func, *value.args, *value.keywords.values()
        case MethodType():
            return (value.__func__,)
        case CellType():
            return (_contents(value),)
        case CodeType():
            return value.co_consts
        case FunctionType():
            defaults = *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()
            return value.__code__, *(value.__closure__ or ()), *defaults, *_globals(value)
        case _ if type(value).__module__.split(".")[0] in ("jax", "jaxlib"):  # It wraps the user's function.
            return [part for part in _jax.attributes(value).values() if callable(part)]
        case _ if callable(value) and not isinstance(value, type):
            return (vars(type(value)).get("__call__"),)
        case _:
            return ()


def _globals(function: FunctionType) -> Iterator[Any]:
    """Yield what a function finds in its module, but for the functions of other packages."""
    for name in function.__code__.co_names:
        found = function.__globals__.get(name)
        if not isinstance(found, FunctionType) or _package(found) == _package(function):
            yield found


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # It is still empty.
        return None


def _package(function: FunctionType) -> str:
    return (function.__module__ or "").split(".")[0]
