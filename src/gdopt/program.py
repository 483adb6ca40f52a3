"""One executable per program: equal programs share it, whatever function objects and arrays they were made from.

A loss is traced at each call, so a rebound global or a changed closure is always seen; the arrays that it closes over
become arguments, so fresh data compiles nothing. What makes two programs equal is decided here, by what `_jaxpr` tells
of their traces, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from gdopt import _jaxpr, _trees
from gdopt._types import PyTree

_PROGRAMS = 128  # compiled programs kept, the least recently used go first


class Traced(NamedTuple):
    """A function as its trace, apart from the arrays that it closes over."""

    replay: Callable[..., PyTree]  # (constants, *args) -> what the function returns
    constants: list[Any]
    out: PyTree  # the shapes of what it returns
    identity: Hashable | None  # equal only for traces that are, up to the constants' values; None: it cannot be told
    jaxpr: Any


def trace(function: Callable, *args: PyTree, lift: bool = False, rules: bool = False) -> Traced:
    """The function traced once.

    With ``lift``, the numbers written into it become constants like its arrays. That costs the compiler what it knows
    of them, so it is for small functions such as schedules, which are made anew with other numbers.

    With ``rules``, the replay may be differentiated: it keeps the rules of custom_jvp and custom_vjp, and the identity
    tells them apart, too. These are functions, made anew at each trace but where an inner jit keeps its own, so traces
    that are equal may have different identities.
    """
    closed, out = _jaxpr.trace(function, *args)
    treedef, jaxpr, count = jax.tree.structure(out), closed.jaxpr, len(closed.consts)

    def replay(constants: Sequence, *args: PyTree) -> PyTree:
        numbers = iter(constants[count:]) if lift else None
        leaves = jax.tree.leaves(args)
        found = _jaxpr.evaluate(jaxpr, constants[:count], leaves, numbers, rules)
        # What depends on no argument may be a number that was written into the trace.
        pairs = zip(found, jax.tree.leaves(out), strict=True)
        return treedef.unflatten(x if isinstance(x, jax.Array) else jnp.asarray(x, of.dtype) for x, of in pairs)

    constants = [jnp.asarray(constant) for constant in closed.consts]
    numbers = list(map(_jaxpr.number, _jaxpr.numbers(jaxpr))) if lift else []
    identity = None if closed.effects else _jaxpr.fingerprint(jaxpr, lift, rules)
    return Traced(replay, constants + numbers, out, identity, jaxpr)


class Shared(NamedTuple):
    """A function as an executable."""

    run: Callable[..., PyTree]  # (constants, *args) -> what the function returns
    constants: list[Any]  # that it closes over
    out: PyTree  # the shapes of what it returns
    shareable: bool

    @property
    def closed(self) -> bool:
        """Whether all that it depends on are its arguments."""
        return self.shareable and not self.constants

    def call(self, *args: PyTree) -> PyTree:
        """What the function returns."""
        return self.run(self.constants, *args)


def share(function: Callable, *args: PyTree, donate_first: bool = False) -> Shared:
    """``jit`` for this function at these arguments, compiled anew only if no equal program ran before.

    The function is traced now. What comes back is called with arguments of the same structure, shapes and dtypes. With
    ``donate_first`` the first argument's buffers are reused: they must not be the caller's.
    """
    closed, out = _jaxpr.trace(function, *args)
    treedef = jax.tree.structure(out)
    donated = len(jax.tree.leaves(args[0])) if donate_first else 0
    program = _Program(_jaxpr.fingerprint(closed.jaxpr), closed.jaxpr, donated)
    shareable = program.fingerprint is not None and not closed.effects
    run = _executable(program) if shareable else _executable.__wrapped__(program)
    constants = [jnp.asarray(constant) for constant in closed.consts]

    def call(constants: list, *args: PyTree) -> PyTree:
        leaves = jax.tree.leaves(args)
        return jax.tree.unflatten(treedef, run(leaves[:donated], leaves[donated:], constants))

    return Shared(call, constants, out, shareable)


def text(function: Callable, *args: PyTree) -> str:
    """The function's trace, to be compared with that of another process or time."""
    return _text(_jaxpr.trace(function, *args)[0].jaxpr)


def digest(function: Callable, *args: PyTree) -> str:
    """A checksum of the trace and of the arrays that the function closes over."""
    closed, _ = _jaxpr.trace(function, *args)
    return f"{zlib.crc32(_text(closed.jaxpr).encode()):08x}{checksum(closed.consts)}"


def _text(jaxpr: Any) -> str:
    ordered = lambda found: ", ".join(sorted(found[1].split(", ")))
    return re.sub(r"frozenset\(\{(.*?)\}\)", ordered, str(jaxpr))  # of strings: another order in each process


def checksum(tree: PyTree) -> str:
    """Of the numbers in a tree, as far as this process holds them."""
    crc = 0
    for leaf in jax.tree.leaves(tree):
        leaf = jax.random.key_data(leaf) if _trees.is_key(leaf) else leaf
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if not leaf.is_fully_replicated:
                continue
            leaf = leaf.addressable_data(0)
        crc = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def is_traced(*trees: PyTree) -> bool:
    """Whether there is no computing with these values now, as jit, vmap or grad traces one of them or, as jit does,
    everything."""
    leaves = *jax.tree.leaves(trees), jnp.asarray(0.0)
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def place_for(identity: Hashable | None, *args: PyTree, passing: bool = False) -> list:
    """Where to keep, and to find again, what was made from traces of this identity for such arguments.

    Places of ``passing`` identities, many of which may never come again, push out none but their own kind. Empty at
    first. What the caller puts into it must depend on nothing but the identity, the structure, shapes and dtypes of the
    arguments, and JAX's settings; so, for one, on nothing that is not ``closed``.
    """
    leaves, treedef = jax.tree.flatten(args)
    if identity is None or not _trees.is_plain(treedef):
        return []
    kinds = tuple(leaf.aval if isinstance(leaf, jax.Array) else _kind(leaf) for leaf in leaves)
    return (_passing_place if passing else _place)((identity, treedef, kinds, _settings()))


@functools.lru_cache(maxsize=_PROGRAMS)
def _place(key: Hashable) -> list:
    return []


@functools.lru_cache(maxsize=_PROGRAMS)
def _passing_place(key: Hashable) -> list:
    return []


def _kind(number: Any) -> Hashable:
    return type(number), np.shape(number), np.result_type(number)


_SETTINGS = tuple(name for name in jax.config.values if hasattr(jax.config, name))


def _settings() -> tuple:
    """All of them, as seen by this thread: which of them a trace depends on is JAX's own business."""
    return *(getattr(jax.config, name) for name in _SETTINGS), jax.sharding.get_abstract_mesh()


def clear() -> None:
    """Forgets all programs."""
    _executable.cache_clear()
    _place.cache_clear()
    _passing_place.cache_clear()


@dataclasses.dataclass(frozen=True)
class _Program:
    """Compared by its fingerprint. It keeps the jaxpr, not its constants: those would keep the first data set alive."""

    fingerprint: Hashable
    jaxpr: Any = dataclasses.field(compare=False)
    donated: int


@functools.lru_cache(maxsize=_PROGRAMS)
def _executable(program: _Program) -> Callable:
    def run(donated: list, arguments: list, constants: list) -> list:
        return _jaxpr.call(program.jaxpr, constants, *donated, *arguments)

    return jax.jit(run, donate_argnums=0)
