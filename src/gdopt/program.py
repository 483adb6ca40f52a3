"""One executable per program: equal programs share it, whatever function objects and arrays they were made from.

A loss is traced at each call, so a rebound global or a changed closure is always seen; the arrays that it closes over
become arguments, so fresh data compiles nothing. What makes two programs equal is decided here and nowhere else, and
this is the one module that touches JAX's semi-public parts (`jax.extend.core`, `jax.core.eval_jaxpr`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from gdopt._types import PyTree

_PROGRAMS = 128  # compiled programs kept, the least recently used go first


def trace(function: Callable, *args: PyTree, **kwargs: PyTree) -> tuple[Callable, PyTree]:
    """The function traced once: a callable that replays the trace, and the shapes of what it returns."""
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)

    def replay(*args: PyTree, **kwargs: PyTree) -> PyTree:
        return jax.tree.unflatten(
            treedef, jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *jax.tree.leaves((args, kwargs)))
        )

    treedef = jax.tree.structure(out)
    return replay, out


def share(function: Callable, *args: PyTree, donate_first: bool = False) -> tuple[Callable, PyTree]:
    """``jit`` for this function at these arguments, compiled anew only if no equal program ran before.

    The function is traced now. Returns a callable for arguments of the same structure, shapes and dtypes, and the
    shapes of what it returns. With ``donate_first`` the first argument's buffers are reused: they must not be the
    caller's.
    """
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    treedef = jax.tree.structure(out)
    donated = len(jax.tree.leaves(args[0])) if donate_first else 0
    program = _Program(_fingerprint(closed.jaxpr, donated), closed.jaxpr, donated)
    # A program with effects (callbacks, prints) is tied to the Python objects of this very trace.
    run = _executable.__wrapped__(program) if closed.effects else _executable(program)
    constants = [jnp.asarray(constant) for constant in closed.consts]

    def call(*args: PyTree) -> PyTree:
        leaves = jax.tree.leaves(args)
        return jax.tree.unflatten(treedef, run(leaves[:donated], leaves[donated:], constants))

    return call, out


@dataclasses.dataclass(frozen=True)
class _Program:
    """Compared by its fingerprint. It keeps the jaxpr, not its constants: those would keep the first data set alive."""

    fingerprint: Hashable
    jaxpr: Any = dataclasses.field(compare=False)
    donated: int


@functools.lru_cache(maxsize=_PROGRAMS)
def _executable(program: _Program) -> Callable:
    def run(donated: list, arguments: list, constants: list) -> list:
        return jax.core.eval_jaxpr(program.jaxpr, constants, *donated, *arguments)

    return jax.jit(run, donate_argnums=0)


def _fingerprint(jaxpr: Any, donated: int) -> Hashable:
    """Everything that the compiled program depends on, by value; by identity where a value cannot be seen whole."""
    return donated, tuple(_jaxpr_parts(jaxpr))


def _jaxpr_parts(jaxpr: Any) -> Iterator[Hashable]:
    numbers: dict[Any, int] = {}

    def bind(var: Any) -> Hashable:
        numbers[var] = len(numbers)
        return var.aval

    def read(atom: Any) -> Hashable:
        if isinstance(atom, core.Literal):
            return "literal", atom.aval, _value(atom.val)
        return numbers[atom]

    yield tuple(map(bind, jaxpr.constvars)), tuple(map(bind, jaxpr.invars))
    for eqn in jaxpr.eqns:
        yield eqn.primitive, eqn.ctx, tuple(map(read, eqn.invars))
        yield tuple(
            (name, _value(value))
            for name, value in eqn.params.items()
            # Nothing differentiates the finished program, so the rules of custom_jvp and custom_vjp, which print alike
            # when they differ, are out of play: only the primal function is compiled.
            if not (eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call") and name not in ("call_jaxpr", "name"))
        )
        yield tuple(map(bind, eqn.outvars))
    yield tuple(map(read, jaxpr.outvars))


def _value(value: Any) -> Hashable:
    """A value as part of a fingerprint. Equality must mean "compiles to the same": 0.0 == -0.0 and 1 == True do not."""
    match value:
        case core.Jaxpr():
            return tuple(_jaxpr_parts(value))
        case core.ClosedJaxpr():  # an inner jit keeps the arrays that it closes over here
            return tuple(_jaxpr_parts(value.jaxpr)), tuple(map(_value, value.consts))
        case tuple() | list():
            return type(value), tuple(map(_value, value))
        case dict():
            return type(value), tuple((name, _value(item)) for name, item in value.items())
        case bool() | int() | str() | bytes() | None:
            return type(value), value
        case float() | complex():
            return type(value), repr(value)
        case np.ndarray() | np.generic() if value.dtype != object:  # may be changed in place, so by its bytes
            array = np.asarray(value)
            return type(value), array.shape, array.dtype, hashlib.blake2b(array.tobytes()).digest()
        case jax.Array():
            return _Same(value)
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value), value


class _Same:
    """Equal to itself only. Holds the object, so that its address is not given to another."""

    def __init__(self, value: Any):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)
