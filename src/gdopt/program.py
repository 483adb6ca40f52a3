"""One executable per program: equal programs share it, whatever function objects and arrays they were made from.

A loss is traced at each call, so a rebound global or a changed closure is always seen; the arrays that it closes over
become arguments, so fresh data compiles nothing. What makes two programs equal is decided here and nowhere else, and
this is the one module that touches JAX's semi-public parts (`jax.extend.core`, `jax.core.eval_jaxpr`).
"""

from __future__ import annotations

import dataclasses
import functools
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from gdopt import _trees
from gdopt._types import PyTree

_PROGRAMS = 128  # compiled programs kept, the least recently used go first
_SMALL = 1024  # bytes; a program with a larger array deep in its control flow is not kept: it would keep the array


@functools.cache
def _core() -> Any:
    from jax.extend import core  # here, because it takes 20 ms: it brings Pallas with it

    return core


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
    closed, out = _jaxpr(function, *args)
    treedef, jaxpr, count = jax.tree.structure(out), closed.jaxpr, len(closed.consts)

    def replay(constants: Sequence, *args: PyTree) -> PyTree:
        numbers = iter(constants[count:]) if lift else None
        leaves = jax.tree.leaves(args)
        found = _evaluate(jaxpr, constants[:count], leaves, numbers, rules)
        # What depends on no argument may be a number that was written into the trace.
        pairs = zip(found, jax.tree.leaves(out), strict=True)
        return treedef.unflatten(x if isinstance(x, jax.Array) else jnp.asarray(x, of.dtype) for x, of in pairs)

    constants = [jnp.asarray(constant) for constant in closed.consts]
    numbers = list(map(_number, _numbers(jaxpr))) if lift else []
    identity = None if closed.effects else _fingerprint(jaxpr, lift, rules)
    return Traced(replay, constants + numbers, out, identity, jaxpr)


_RULES = {"custom_jvp_call": ("jvp_jaxpr_fun",), "custom_vjp_call": ("fwd_jaxpr_thunk", "bwd")}
# Calls whose inner jaxpr may be written out in place; those with rules where nothing differentiates the replay.
_CALLS = {"jit": "jaxpr"} | dict.fromkeys(_RULES, "call_jaxpr")


def _rules(jaxpr: Any) -> Iterator[Hashable]:
    """The derivative rules in a trace: by weak references, as they may close over the caller's arrays."""
    for eqn in jaxpr.eqns:
        for name in _RULES.get(eqn.primitive.name, ()):
            yield weakref.ref(getattr(eqn.params[name], "f", eqn.params[name]))
        for inner in _core().jaxprs_in_params(eqn.params):
            yield from _rules(inner)


def _evaluate(
    jaxpr: Any, constants: Sequence, arguments: Sequence, numbers: Iterator | None, rules: bool = False
) -> list:
    """``jax.core.eval_jaxpr`` with calls written out, and with ``numbers`` in the places of those that were lifted.

    The arrays that an inner jit closes over are then constants of the outer trace, and become arguments like all
    others; and without ``rules`` those of custom_jvp and custom_vjp, with what they close over, are dropped.
    """
    literal = _core().Literal
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(atom: Any) -> Any:
        if not isinstance(atom, literal):
            return values[atom]
        return atom.val if numbers is None or not _is_number(atom) else next(numbers)

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        inner = None if rules and name in _RULES else eqn.params.get(_CALLS.get(name, ""))
        if inner is not None:
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs, numbers, rules)
        else:
            with eqn.ctx.manager:
                outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _numbers(jaxpr: Any) -> Iterator[Any]:
    """The literals that `_evaluate` comes by, in its order."""
    for eqn in jaxpr.eqns:
        yield from filter(_is_number, eqn.invars)
        inner = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
        if inner is not None:
            yield from _numbers(inner.jaxpr)
    yield from filter(_is_number, jaxpr.outvars)


def _is_number(atom: Any) -> bool:
    return isinstance(atom, _core().Literal) and np.shape(atom.val) == ()


def _number(literal: Any) -> Any:
    """The value of a literal, as an argument of the same dtype and weakness."""
    value = np.asarray(literal.val, literal.aval.dtype)
    python = value.item()
    weak = literal.aval.weak_type and jnp.result_type(type(python)) == value.dtype
    return python if weak else value[()]


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
    closed, out = _jaxpr(function, *args)
    treedef = jax.tree.structure(out)
    donated = len(jax.tree.leaves(args[0])) if donate_first else 0
    program = _Program(_fingerprint(closed.jaxpr), closed.jaxpr, donated)
    shareable = program.fingerprint is not None and not closed.effects
    run = _executable(program) if shareable else _executable.__wrapped__(program)
    constants = [jnp.asarray(constant) for constant in closed.consts]

    def call(constants: list, *args: PyTree) -> PyTree:
        leaves = jax.tree.leaves(args)
        return jax.tree.unflatten(treedef, run(leaves[:donated], leaves[donated:], constants))

    return Shared(call, constants, out, shareable)


def text(function: Callable, *args: PyTree) -> str:
    """The function's trace to be read, or to be compared with that of another process."""
    return str(_jaxpr(function, *args)[0].jaxpr)


def depends(function: Callable, *args: PyTree) -> bool:
    """Whether anything that the function returns is computed from its arguments."""
    jaxpr, literal = _jaxpr(function, *args)[0].jaxpr, _core().Literal
    reached = set(jaxpr.invars)
    is_reached = lambda atom: not isinstance(atom, literal) and atom in reached
    for eqn in jaxpr.eqns:
        if any(map(is_reached, eqn.invars)):
            reached.update(eqn.outvars)
    return any(map(is_reached, jaxpr.outvars))


def rows_of_all_pairs(jaxpr: Any) -> int | None:
    """The n of a sum over all squares of (n, 1) - (n,), where surely the n differences were meant; None without one.

    A trace does not tell ``a - b`` from ``a - b[None, :]``, and other sums over all pairs have their uses, such as that
    of |a - b|. That of squares knows nothing of which is paired with which: its minimum is at the means. Left alone are
    columns that were made of a vector: ``a[:, None] - b[None, :]`` is written on purpose.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "reduce_sum":
            shape = eqn.invars[0].aval.shape
            if len(shape) == len(eqn.params["axes"]) == 2 and 1 < shape[0] == shape[1] and _is_all_pairs(eqn, jaxpr):
                return shape[0]
        for inner in _core().jaxprs_in_params(eqn.params):
            if n := rows_of_all_pairs(inner):
                return n
    return None


def _is_all_pairs(total: Any, jaxpr: Any) -> bool:
    made = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}

    def by(atom: Any, *names: str) -> Any:
        """The equation that made it, if it is one of these."""
        eqn = None if isinstance(atom, _core().Literal) else made.get(atom)
        return eqn if eqn is not None and eqn.primitive.name in names else None

    square = by(total.invars[0], "square", "integer_pow", "mul")
    if square is None or square.params.get("y", 2) != 2 or square.invars[0] is not square.invars[-1]:
        return False
    difference = by(square.invars[0], "sub")
    if difference is None:
        return False
    column, row = sorted(difference.invars, key=lambda atom: atom.aval.shape[-1:])
    n, broadcast = total.invars[0].aval.shape[0], by(row, "broadcast_in_dim", "reshape")
    if (column.aval.shape, row.aval.shape) != ((n, 1), (1, n)) or broadcast is None:
        return False
    if len(broadcast.invars[0].aval.shape) != 1:
        return False
    todo, seen = [column], set()
    while todo:  # back to where the column is made as one
        atom = todo.pop()
        eqn = made.get(atom)
        if eqn is None or atom in seen or eqn.primitive.name == "dot_general":
            continue
        seen.add(atom)
        inputs = [atom for atom in eqn.invars if not isinstance(atom, _core().Literal)]
        if eqn.primitive.name in ("broadcast_in_dim", "reshape") and inputs and inputs[0].aval.shape == (n,):
            return False
        todo += [atom for atom in inputs if atom.aval.shape == (n, 1)]
    return True


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


def _jaxpr(function: Callable, *args: PyTree) -> tuple[Any, PyTree]:
    """The trace, made now, and the shapes of what the function returns."""
    # Wrapped anew: JAX keeps the trace of a function that it knows, whatever that reads may have changed.
    new = lambda *args: function(*args)
    closed, out = jax.make_jaxpr(new, return_shape=True)(*args)
    return closed, out


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


def _fingerprint(jaxpr: Any, lifted: bool = False, rules: bool = False) -> Hashable | None:
    """Everything that the compiled program depends on, by value; None where a value cannot be compared."""
    try:
        return tuple(_jaxpr_parts(jaxpr, lifted)), tuple(_rules(jaxpr)) if rules else ()
    except _Unshareable:
        return None


def _jaxpr_parts(jaxpr: Any, lifted: bool = False) -> Iterator[Hashable]:
    """With ``lifted``, the numbers that `_numbers` finds count by their kind alone."""
    numbers: dict[Any, int] = {}
    literal = _core().Literal

    def bind(var: Any) -> Hashable:
        numbers[var] = len(numbers)
        return var.aval

    def read(atom: Any) -> Hashable:
        if not isinstance(atom, literal):
            return numbers[atom]
        return "literal", atom.aval, None if lifted and _is_number(atom) else _value(atom.val)

    yield tuple(map(bind, jaxpr.constvars)), tuple(map(bind, jaxpr.invars))
    for eqn in jaxpr.eqns:
        yield eqn.primitive, eqn.ctx, tuple(map(read, eqn.invars))
        call = _CALLS.get(eqn.primitive.name)
        yield tuple(
            (name, _value(value, lifted and name == call))
            for name, value in eqn.params.items()
            # Nothing differentiates the finished program, so the rules of custom_jvp and custom_vjp, which print alike
            # when they differ, are out of play: only the primal function is compiled.
            if not (eqn.primitive.name in _RULES and name not in ("call_jaxpr", "name"))
        )
        yield tuple(map(bind, eqn.outvars))
    yield tuple(map(read, jaxpr.outvars))


def _value(value: Any, lifted: bool = False) -> Hashable:
    """A value as part of a fingerprint. Equality must mean "compiles to the same": 0.0 == -0.0 and 1 == True do not."""
    core = _core()
    match value:
        case core.Jaxpr():
            return tuple(_jaxpr_parts(value))
        case core.ClosedJaxpr():  # an inner jit keeps the arrays that it closes over here
            return tuple(_jaxpr_parts(value.jaxpr, lifted)), tuple(map(_value, value.consts))
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
