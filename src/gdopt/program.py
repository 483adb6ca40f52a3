"""One executable per program: equal programs share it, whatever function objects and arrays they were made from.

A loss is traced at each call, so a rebound global or a changed closure is always seen; the arrays that it closes over
become arguments, so fresh data compiles nothing. What makes two programs equal is decided here and nowhere else, and
this is the one module that touches JAX's semi-public parts (`jax.extend.core`, `jax.core.eval_jaxpr`).
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from gdopt._types import PyTree
from gdopt.errors import InputError

_PROGRAMS = 128  # compiled programs kept, the least recently used go first
_SMALL = 1024  # bytes; a program with a larger array deep in its control flow is not kept: it would keep the array


def trace(function: Callable, *args: PyTree, **kwargs: PyTree) -> tuple[Callable, PyTree]:
    """The function traced once: a callable that replays the trace, and the shapes of what it returns."""
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)

    def replay(*args: PyTree, **kwargs: PyTree) -> PyTree:
        return jax.tree.unflatten(treedef, _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves((args, kwargs))))

    treedef = jax.tree.structure(out)
    return replay, out


# Calls whose inner jaxpr may be written out in place: nothing differentiates a replayed trace any more.
_CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


def _evaluate(jaxpr: Any, constants: Sequence, arguments: Sequence) -> list:
    """``jax.core.eval_jaxpr`` with calls written out.

    The arrays that an inner jit closes over are then constants of the outer trace, and become arguments like all
    others; and the rules of custom_jvp and custom_vjp, with what they close over, are dropped.
    """
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))
    for eqn in jaxpr.eqns:
        inputs = [atom.val if isinstance(atom, core.Literal) else values[atom] for atom in eqn.invars]
        inner = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
        if inner is not None:
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        else:
            with eqn.ctx.manager:
                outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [atom.val if isinstance(atom, core.Literal) else values[atom] for atom in jaxpr.outvars]


def share(function: Callable, *args: PyTree, donate_first: bool = False) -> tuple[Callable, PyTree]:
    """``jit`` for this function at these arguments, compiled anew only if no equal program ran before.

    The function is traced now. Returns a callable for arguments of the same structure, shapes and dtypes, and the
    shapes of what it returns. With ``donate_first`` the first argument's buffers are reused: they must not be the
    caller's.
    """
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    treedef = jax.tree.structure(out)
    donated = len(jax.tree.leaves(args[0])) if donate_first else 0
    if any(isinstance(constant, jax.core.Tracer) for constant in closed.consts):
        raise InputError("the loss closes over a value that is being traced (by jit, vmap or grad): call it outside.")
    program = _Program(_fingerprint(closed.jaxpr, donated), closed.jaxpr, donated)
    shareable = program.fingerprint is not None and not closed.effects
    run = _executable(program) if shareable else _executable.__wrapped__(program)
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


class _Unshareable(Exception):
    """The program depends on what cannot be compared, or may change later: it is compiled for this one call."""


def _fingerprint(jaxpr: Any, donated: int) -> Hashable | None:
    """Everything that the compiled program depends on, by value; None where a value cannot be compared."""
    try:
        return donated, tuple(_jaxpr_parts(jaxpr))
    except _Unshareable:
        return None


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
        case float() | complex() | np.generic() | np.ndarray(shape=()):  # by the bytes: nan has a sign, as 0.0 has
            return type(value), np.asarray(value).dtype, np.asarray(value).tobytes()
        case jax.Array() if value.nbytes <= _SMALL and not jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return type(value), value.shape, value.dtype, np.asarray(value).tobytes()
        case jax.Array() | np.ndarray():  # NumPy's may be changed in place
            raise _Unshareable
        case object(callback_func=function, in_tree=tree):  # jax.pure_callback
            if not isinstance(function, types.FunctionType) or function.__closure__ or function.__defaults__:
                raise _Unshareable  # it has a state, which equality does not tell
            return type(value), function, tree
    try:
        hash(value)
    except TypeError:
        raise _Unshareable from None
    return type(value), value
