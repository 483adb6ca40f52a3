"""Copies of traces that may be kept: they hold nothing that belongs to the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _jax
from gdopt._compile.replays import Hole, Mode, bodies

SMALL = 1024  # bytes; a larger array within an operation that is not replayed is not compared, and not kept


class Slot:
    """The placeholder in a kept trace for a function that the program calls on the host; each run has its own."""

    def __init__(self, table: list[Callable], place: int):
        self.table, self.place = table, place

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.table[self.place](*args, **options)


CALLBACKS = frozenset({"pure_callback", "io_callback", "debug_callback", "debug_print"})


class Copy:
    """The copy of a trace for a `Replay` of this mode, which may be kept: nothing of the caller's is in it.

    Attributes:
        jaxpr: the trace, with a hole for each array that a replay can be given, and with copies of others.
        arrays: the arrays of the holes, each one once.
        callbacks: with ``slots``, the functions that the program calls on the host; ``jaxpr`` looks them up here.
        effects: the side effects of the trace, without the calls of these functions.
    """

    def __init__(self, closed: Any, mode: Mode, *, slots: bool = False):
        self.arrays: list[Any] = []
        self.callbacks: list[Callable] = []
        self._mode, self._slots = mode, slots
        self._called: set = set()  # the effects of the callbacks
        self._numbers: dict[int, int] = {}
        jaxpr = _jax.opened(closed)
        bare = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars]) if _jax.consts(jaxpr) else jaxpr
        self.jaxpr = self._copied(bare)
        self.effects = frozenset(closed.effects) - self._called

    def _copied(self, jaxpr: Any, replayed: bool = True) -> Any:
        """Copy a trace; return it unchanged if nothing is replaced. If ``replayed``, a replay evaluates it."""
        eqns = [self._eqn(eqn, replayed) for eqn in jaxpr.eqns]
        outvars = list(map(_own_literal, jaxpr.outvars))
        if _same(eqns, jaxpr.eqns) and _same(outvars, jaxpr.outvars):
            return jaxpr
        return jaxpr.replace(eqns=eqns, outvars=outvars)

    def _closed(self, closed: Any, replayed: bool) -> Any:
        """Copy a nested trace, with holes or copies in place of its arrays."""
        consts = [self._hole(array) if replayed else _own(array) for array in _jax.consts(closed)]
        jaxpr = _jax.opened(closed)
        copied = self._copied(jaxpr, replayed)
        if copied is jaxpr and not consts:
            return closed
        return closed.replace(jaxpr=copied, consts=consts) if consts else _with_body(closed, copied)

    def _hole(self, array: Any) -> Hole:
        if id(array) not in self._numbers:
            self._numbers[id(array)] = len(self.arrays)
            self.arrays.append(array)
        return Hole(self._numbers[id(array)])

    def _eqn(self, eqn: Any, replayed: bool) -> Any:
        invars = list(map(_own_literal, eqn.invars))
        replayed = replayed and bool(bodies(eqn, self._mode))
        params = {name: self._value(value, replayed) for name, value in eqn.params.items()}
        if self._mode is Mode.PROGRAM and params.get("policy") is not None:
            params["policy"] = None  # It only decides what a gradient stores, and may hold arrays.
        if self._slots and eqn.primitive.name in CALLBACKS and callable(params.get("callback")):
            params["callback"] = Slot(self.callbacks, len(self.callbacks))
            self.callbacks.append(eqn.params["callback"])
        if self._slots and eqn.primitive.name in CALLBACKS:  # One without a function is a print.
            self._called.update(eqn.effects)
        if _same(invars, eqn.invars) and _same(params.values(), eqn.params.values()):
            return eqn
        return eqn.replace(invars=invars, params=params)

    def _value(self, value: Any, replayed: bool) -> Any:
        if _jax.is_jaxpr(value):
            return self._closed(value, replayed)
        if isinstance(value, np.ndarray | jax.Array):
            return _own(value)
        if type(value) in (tuple, list) or hasattr(value, "_fields"):
            items = [self._value(item, replayed) for item in value]
            if _same(items, value):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value


def _with_body(closed: Any, jaxpr: Any) -> Any:
    return jaxpr if _jax.opened(closed) is closed else closed.replace(jaxpr=jaxpr)


def _same(new: Iterable, old: Iterable) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def _own(array: Any) -> Any:
    """Copy an array for a kept program: NumPy's may be changed in place, and JAX's must not be held."""
    if not isinstance(array, np.ndarray | jax.Array) or array.nbytes > SMALL:
        return array  # It gets no fingerprint.
    if isinstance(array, np.ndarray):  # Its class stays: those of a trace are weakly typed, or have 64 bits among 32.
        return np.array(array, copy=True, subok=True)
    if _jax.is_tracer(array):
        return array
    with jax.ensure_compile_time_eval():
        return jnp.array(array, copy=True)


def _own_literal(atom: Any) -> Any:
    """Copy a literal, which may be the caller's own array without axes."""
    if _jax.is_literal(atom) and isinstance(atom.val, np.ndarray):
        return type(atom)(_own(atom.val), atom.aval)
    return atom
