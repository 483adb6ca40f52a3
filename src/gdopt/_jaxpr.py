"""Jaxprs, the traces of functions: read, compared, evaluated, and searched for what went wrong.

This is the one module that touches JAX's semi-public parts (`jax.extend.core`, `jax.core.eval_jaxpr`).
"""

from __future__ import annotations

import functools
import itertools
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from gdopt._types import PyTree

_SMALL = 1024  # bytes; a program with a larger array deep in its control flow is not kept: it would keep the array


@functools.cache
def _core() -> Any:
    from jax.extend import core  # here, because it takes 20 ms: it brings Pallas with it

    return core


def trace(function: Callable, *args: PyTree) -> tuple[Any, PyTree]:
    """The trace, made now, and the shapes of what the function returns."""
    # Wrapped anew: JAX keeps the trace of a function that it knows, whatever that reads may have changed.
    new = lambda *args: function(*args)
    closed, out = jax.make_jaxpr(new, return_shape=True)(*args)
    return closed, out


def call(jaxpr: Any, constants: Sequence, *arguments: Any) -> list:
    """What the traced function returns."""
    return jax.core.eval_jaxpr(jaxpr, constants, *arguments)


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


def evaluate(
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
            outputs = evaluate(inner.jaxpr, inner.consts, inputs, numbers, rules)
        else:
            with eqn.ctx.manager:
                outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def numbers(jaxpr: Any) -> Iterator[Any]:
    """The literals that `evaluate` comes by, in its order."""
    for eqn in jaxpr.eqns:
        yield from filter(_is_number, eqn.invars)
        inner = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
        if inner is not None:
            yield from numbers(inner.jaxpr)
    yield from filter(_is_number, jaxpr.outvars)


def _is_number(atom: Any) -> bool:
    return isinstance(atom, _core().Literal) and np.shape(atom.val) == ()


def number(literal: Any) -> Any:
    """The value of a literal, as an argument of the same dtype and weakness."""
    value = np.asarray(literal.val, literal.aval.dtype)
    python = value.item()
    weak = literal.aval.weak_type and jnp.result_type(type(python)) == value.dtype
    return python if weak else value[()]


def depends(function: Callable, *args: PyTree) -> bool:
    """Whether anything that the function returns is computed from its arguments."""
    jaxpr, literal = trace(function, *args)[0].jaxpr, _core().Literal
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


_SHAPES = ("reshape", "broadcast_in_dim", "squeeze", "slice", "dynamic_slice", "transpose", "convert_element_type")


def _is_all_pairs(total: Any, jaxpr: Any) -> bool:
    made = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}

    def by(atom: Any, *names: str) -> Any:
        """The equation that made it, if it is one of these."""
        eqn = None if isinstance(atom, _core().Literal) else made.get(atom)
        return eqn if eqn is not None and eqn.primitive.name in names else None

    summed = total.invars[0]
    while (scaled := by(summed, "mul")) is not None and isinstance(scaled.invars[0], _core().Literal):
        summed = scaled.invars[1]  # half of the square, say
    square = by(summed, "square", "integer_pow", "mul")
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

    def whole(atom: Any) -> Any:
        """What the numbers were taken from, whatever their shape was there."""
        while (eqn := by(atom, *_SHAPES)) is not None:
            atom = eqn.invars[0]
        return atom

    if whole(column) is whole(row):  # a column and itself: all pairs were meant
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


class _Unshareable(Exception):
    """The program depends on what cannot be compared, or may change later: it is compiled for this one call."""


def fingerprint(jaxpr: Any, lifted: bool = False, rules: bool = False) -> Hashable | None:
    """Everything that the compiled program depends on, by value; None where a value cannot be compared."""
    try:
        return tuple(_jaxpr_parts(jaxpr, lifted)), tuple(_rules(jaxpr)) if rules else ()
    except _Unshareable:
        return None


def _jaxpr_parts(jaxpr: Any, lifted: bool = False) -> Iterator[Hashable]:
    """With ``lifted``, the numbers that `numbers` finds count by their kind alone."""
    order: dict[Any, int] = {}
    literal = _core().Literal

    def bind(var: Any) -> Hashable:
        order[var] = len(order)
        return var.aval

    def read(atom: Any) -> Hashable:
        if not isinstance(atom, literal):
            return order[atom]
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


class Origin(NamedTuple):
    """An equation that makes NaN or infinity of what is not."""

    primitive: str | None  # None: a constant is it from the beginning
    value: Any  # what came out
    inputs: list[Any]
    backward: bool  # in the part of a trace that JAX's reverse mode added
    lines: list[tuple[str, int, str]]  # file, line and function that it was traced from, innermost first


def origins(jaxpr: Any, constants: Sequence, arguments: Sequence, out: int) -> tuple[list[Origin], int | None]:
    """Which equations made an output of a trace NaN or infinite, as all of it is computed one by one.

    The last one first: what made the first NaN and, where that was made of infinities, what made the first of these.
    And the number of the argument that it came in by, where nothing else had made it.
    """
    found: list[Origin] = []
    return found, _search(jaxpr, constants, arguments, out, [], found)


def _search(
    jaxpr: Any, constants: Sequence, arguments: Sequence, out: int, lines: list, found: list[Origin]
) -> int | None:
    """Goes back from an output to where it became what it is; adds to ``found``, or returns an argument's number."""
    literal = _core().Literal
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))
    made = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, literal) else values[atom]

    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, _outputs(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        made.update((var, (eqn, place)) for place, var in enumerate(eqn.outvars))
    atom = jaxpr.outvars[out]
    while not isinstance(atom, literal) and atom in made:
        eqn, place = made[atom]
        inputs, here = [read(atom) for atom in eqn.invars], _lines(eqn) + lines
        if eqn.primitive.name in ("scan", "while"):
            source = _search_rounds(eqn, inputs, place, values[atom], here, found)
        elif body := _body(eqn, inputs):
            inner, skipped = body
            source = _search(inner.jaxpr, inner.consts, inputs[skipped:], place, here, found)
            source = None if source is None else source + skipped
        else:
            source = _source(eqn, inputs, values[atom])
            if eqn.primitive.name in ("concatenate", "stack"):  # of which a part may be used
                source = _healing(jaxpr, values, eqn, inputs, jaxpr.outvars[out], source)
            if source is None or (is_nan(values[atom]) and not is_nan(inputs[source])):
                found.append(_origin(eqn, values[atom], inputs, here))
        if source is None:
            return None
        atom = eqn.invars[source]
    if not isinstance(atom, literal) and atom in jaxpr.invars:
        return jaxpr.invars.index(atom)
    found.append(Origin(None, read(atom), [], False, lines))
    return None


def _healing(jaxpr: Any, values: dict, eqn: Any, inputs: list, out: Any, source: int | None) -> int | None:
    """Of several inputs that are not finite the one without which the output is; or else the ``source`` given."""
    bad = [number for number, given in enumerate(inputs) if is_bad(given)]
    if len(bad) < 2 or not is_bad(values[out]):
        return source
    later, literal = jaxpr.eqns[jaxpr.eqns.index(eqn) + 1 :], _core().Literal

    def without(number: int) -> Any:
        """The output, as it is where this input is finite."""
        given = [filled(x) if n == number else x for n, x in enumerate(inputs)]
        new = dict(zip(eqn.outvars, _outputs(eqn, given), strict=True))
        for eqn_after in later:
            if any(not isinstance(atom, literal) and atom in new for atom in eqn_after.invars):
                given = [a.val if isinstance(a, literal) else new.get(a, values[a]) for a in eqn_after.invars]
                new.update(zip(eqn_after.outvars, _outputs(eqn_after, given), strict=True))
        return new.get(out, values[out])

    return next((number for number in bad if not is_bad(without(number))), source)


def _outputs(eqn: Any, inputs: list) -> list:
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return outputs if eqn.primitive.multiple_results else [outputs]


def _body(eqn: Any, inputs: list) -> tuple[Any, int] | None:
    """The jaxpr that an equation calls, closed, and how many inputs come before those that it is called with."""
    if eqn.primitive.name == "cond":
        branches = eqn.params["branches"]
        return branches[min(max(int(inputs[0]), 0), len(branches) - 1)], 1
    name = {"remat2": "jaxpr", "checkpoint": "jaxpr", "closed_call": "call_jaxpr", **_CALLS}.get(eqn.primitive.name)
    if name is None:
        return None
    body = eqn.params[name]
    return (body if isinstance(body, _core().ClosedJaxpr) else _core().ClosedJaxpr(body, ())), 0


def _search_rounds(eqn: Any, inputs: list, place: int, value: Any, lines: list, found: list[Origin]) -> int | None:
    """``_search`` in the first round of a loop that has made NaN, or before it the first infinity that led to it."""
    params, is_scan = eqn.params, eqn.primitive.name == "scan"
    body = params["jaxpr"] if is_scan else params["body_jaxpr"]
    skipped = 0 if is_scan else params["cond_nconsts"]
    consts = params["num_consts"] if is_scan else params["body_nconsts"]
    carried = params["num_carry"] if is_scan else len(body.out_avals)
    bad, before = is_nan if is_nan(value) else is_bad, None
    while True:
        rounds = itertools.islice(enumerate(_rounds(eqn, inputs, body, skipped, consts, carried)), before)
        hits = ((n, given, [at for at, x in enumerate(outputs) if bad(x)]) for n, (given, outputs) in rounds)
        number, given, places = next((hit for hit in hits if hit[-1]), (0, [], []))
        if not places:  # computed by itself, no round makes it
            found.append(_origin(eqn, value, inputs, lines))
            return None
        place = place if place in places else places[0]
        source = _search(body.jaxpr, body.consts, given, place, lines, found)
        if source is None or number == 0 or not consts <= source < consts + carried:
            return None if source is None else source + skipped
        place, bad, before = source - consts, is_bad, number


def _rounds(eqn: Any, inputs: list, body: Any, skipped: int, consts: int, carried: int) -> Iterator[tuple[list, list]]:
    """Arguments and outputs of a loop's body, round by round."""
    run, first = jax.jit(_core().jaxpr_as_fun(body)), skipped + consts
    held, carry, rows = inputs[skipped:first], inputs[first : first + carried], inputs[first + carried :]
    if eqn.primitive.name == "scan":
        numbers = range(eqn.params["length"])
        for number in reversed(numbers) if eqn.params["reverse"] else numbers:
            given = [*held, *carry, *(row[number] for row in rows)]
            outputs = run(*given)
            yield given, outputs
            carry = outputs[:carried]
        return
    goes_on = jax.jit(_core().jaxpr_as_fun(eqn.params["cond_jaxpr"]))
    while (on := goes_on(*inputs[:skipped], *carry)[0]).any():
        given = [*held, *carry]
        after = run(*given)
        if on.ndim:  # under a vmap the runs that are over stay as they are
            kept = lambda new, old: jnp.where(jax.lax.expand_dims(on, range(on.ndim, new.ndim)), new, old)
            after = list(map(kept, after, carry))
        carry = after
        yield given, carry


def _source(eqn: Any, inputs: list, value: Any) -> int | None:
    """The input that the value has its NaN or infinity of; of several the one that has it in the same place."""
    kind = is_nan if is_nan(value) else is_bad
    if not any(map(is_bad, inputs)):
        return None
    at = jnp.argmax(jnp.ravel(jnp.isnan(value) if kind is is_nan else ~jnp.isfinite(value)))
    if eqn.primitive.name == "select_n":
        return 1 + int(jnp.ravel(inputs[0])[at] if np.shape(inputs[0]) else inputs[0])
    some = [number for number, given in enumerate(inputs) if kind(given)] or [
        n for n, given in enumerate(inputs) if is_bad(given)
    ]
    there = [number for number in some if np.shape(inputs[number]) == np.shape(value)]
    return next((number for number in there if kind(jnp.ravel(inputs[number])[at])), some[0])


def _origin(eqn: Any, value: Any, inputs: list, lines: list) -> Origin:
    return Origin(eqn.primitive.name, value, inputs, "transpose" in str(eqn.source_info.name_stack), lines)


def _lines(eqn: Any) -> list[tuple[str, int, str]]:
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback else []
    return [(frame.file_name, frame.line_num, frame.function_name) for frame in frames]


def is_nan(value: Any) -> bool:
    """Whether there is a NaN among the numbers."""
    return _is_inexact(value) and bool(_any_nan(value))


def is_bad(value: Any) -> bool:
    """Whether there is a NaN or an infinity among the numbers."""
    return _is_inexact(value) and not bool(_all_finite(value))


def filled(value: Any) -> Any:
    """With zeros in the places of NaN and infinity."""
    return jnp.where(jnp.isfinite(value), value, jnp.zeros_like(value))


def _is_inexact(value: Any) -> bool:
    return jnp.issubdtype(jax.dtypes.result_type(value), jnp.inexact)


# jit, as they run on arrays that are spread over processes, too.
_any_nan = jax.jit(lambda value: jnp.isnan(value).any())
_all_finite = jax.jit(lambda value: jnp.isfinite(value).all())
