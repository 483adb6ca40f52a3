"""Fingerprints, which are equal for traces of the same program, and copies of traces that may be kept.

A wrong fingerprint is silent: the second program would run as the first one. So a trace with anything that is not known
to be a value gets no fingerprint, and its program is compiled for that call alone. `is_reliable` tests this on traps
before the first program is shared.
"""

from __future__ import annotations

import enum
import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from types import FunctionType, NoneType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdopt import _jax, _trees
from gdopt._checks import warn
from gdopt._compile.replays import CALLS, RULES, Hole, Mode, Replay, bodies, is_number, scan_counts, trace

_SMALL = 1024  # bytes; a larger array within an operation that is not replayed is not compared, and not kept

# ------------------------------------------------------------------------------------------------- copies to be kept


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
    if not isinstance(array, np.ndarray | jax.Array) or array.nbytes > _SMALL:
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


# ------------------------------------------------------------------------------------------------------ fingerprints


class _Unshareable(Exception):
    """The program depends on something that cannot be compared, or may change: it is compiled for this call alone."""


def fingerprint(jaxpr: Any, *, lifted: bool = False, rules: bool = False) -> Hashable | None:
    """Return everything that the compiled program of a `Copy` depends on, by value; None if a value is not comparable.

    With ``lifted``, the numbers that a replay is given count only by their kind. With ``rules``, for a trace that is to
    be differentiated, policies of checkpoints count, and a function with derivative rules gets no fingerprint.
    """
    try:
        return tuple(_parts(jaxpr, lifted, rules))
    except Exception:  # It is _Unshareable, or an unknown object raised something else.
        return None


def _parts(jaxpr: Any, lifted: bool, rules: bool) -> Iterator[Hashable]:
    jaxpr, order = _jax.opened(jaxpr), {}

    def bind(var: Any) -> Hashable:
        order[var] = len(order)
        return _value(var.aval)

    def read(atom: Any) -> Hashable:
        if not _jax.is_literal(atom):
            return order[atom]
        return "literal", _value(atom.aval), None if lifted and is_number(atom) else _value(atom.val)

    yield tuple(map(bind, jaxpr.constvars)), tuple(map(bind, jaxpr.invars))
    for eqn in jaxpr.eqns:
        yield eqn.primitive, _value(eqn.ctx), tuple(map(read, eqn.invars))
        yield tuple(_params(eqn, lifted, rules))
        yield tuple(map(bind, eqn.outvars))
    yield tuple(map(read, jaxpr.outvars))


def _params(eqn: Any, lifted: bool, rules: bool) -> Iterator[Hashable]:
    name = eqn.primitive.name
    inside = lifted and (name in CALLS or name in RULES)
    for key, value in eqn.params.items():
        if name in RULES and key not in ("call_jaxpr", "name"):
            # Nothing differentiates the finished program, so only the function itself counts there, not its rules.
            if rules and key in RULES[name]:
                raise _Unshareable  # JAX calls it at each differentiation, and what it reads may have changed.
        elif key == "policy" and name in ("checkpoint", "remat2"):  # No value depends on what a gradient stores.
            if rules:
                yield key, None if value is None else _Itself(value)
        elif key in ("ft_in", "ft_out") and name == "scan":
            yield key, scan_counts(eqn)
        else:
            yield key, _value(value, inside, rules)


class _Itself:
    """A function as a part of a fingerprint, equal only to itself. It may hold arrays, and is not kept alive."""

    def __init__(self, function: Any):
        self._ref, self._id = weakref.ref(function), id(function)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._ref() is not None and self._ref() is other._ref()

    def __hash__(self) -> int:
        return self._id


# Objects of JAX that compare by value, and compile to the same if they are equal. JAX's own caches rely on that.
_COMPARED = (
    *("ShapedArray", "JaxprEqnContext", "NamedSharding", "SingleDeviceSharding", "GSPMDSharding", "UnspecifiedValue"),
    *("P", "PartitionSpec", "Mesh", "AbstractMesh", "Device", "ArrayCopySemantics", "MemorySpace"),
    *("KeyTy", "PRNGImpl"),
)
_OWNERS = ("jax", "jaxlib")


def _value(value: Any, lifted: bool = False, rules: bool = False) -> Hashable:
    """Return a value for a fingerprint. Equal must mean "compiles to the same", unlike 0.0 == -0.0 and 1 == True."""
    kind: type = type(value)
    if kind in (NoneType, bool, int, str, bytes) or (kind.__name__ in _COMPARED and _is_jaxs_own(kind)):
        return kind, value
    if _jax.is_jaxpr(value):  # An inner jit keeps the arrays that it closes over in its trace.
        return tuple(_parts(value, lifted, rules)), tuple(map(_value, _jax.consts(value)))
    inner = functools.partial(_value, lifted=lifted, rules=rules)
    if kind in (tuple, list) or (isinstance(value, tuple) and _is_jaxs_own(kind)):
        return kind, tuple(map(inner, value))
    if isinstance(value, dict) and kind is dict:
        return kind, tuple((name, inner(item)) for name, item in value.items())
    if kind in (set, frozenset) and all(type(item) in (int, str) for item in value):
        return kind, frozenset(value)
    return kind, _leaf(value)


def _leaf(value: Any) -> Hashable:
    """Describe a value that is no container."""
    match value:
        case Hole() | enum.Enum():
            return value
        case Slot():
            return value.place
        case float() | complex() | np.generic():  # The bytes also distinguish the signs of nan and 0.0.
            return np.asarray(value).dtype, np.asarray(value).tobytes()
        case int():  # It is JAX's own kind of int, with a dtype.
            return getattr(value, "dtype", None), int(value)
        case np.ndarray() | jax.Array():
            return _array(value)
        case np.dtype():
            return value
        case jax.tree_util.PyTreeDef() if _trees.is_plain(value):
            return value
        case FunctionType() if is_known(value, *_OWNERS, "numpy"):
            return value
        case _:
            pass
    if isinstance(value, type):
        return value
    if _is_jaxs_own(type(value)) and not _jax.is_tracer(value):
        return _attributes(value)
    raise _Unshareable


def _array(array: Any) -> Hashable:
    if _jax.is_tracer(array) or array.dtype == object or jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise _Unshareable
    if array.nbytes > _SMALL:
        raise _Unshareable
    return array.shape, array.dtype, getattr(array, "weak_type", False), jax.device_get(array).tobytes()


def _attributes(value: Any) -> Hashable:
    """Describe an object of JAX's own by everything that it holds."""
    slots = itertools.chain(*(getattr(kind, "__slots__", ()) for kind in type(value).__mro__))
    names = [name for name in slots if name != "__weakref__" and hasattr(value, name)]
    held = {name: getattr(value, name) for name in names} | getattr(value, "__dict__", {})
    if not held and not hasattr(value, "__dict__"):  # Compiled code does not show what it holds.
        raise _Unshareable
    return tuple((name, _value(item)) for name, item in held.items())


def _is_jaxs_own(kind: type) -> bool:
    return kind.__module__.split(".")[0] in _OWNERS


def is_known(function: FunctionType, *owners: str) -> bool:
    """Tell whether it is a function of a library that nobody changes, found by its name, and closes over nothing."""
    name = function.__module__ or ""
    owned = name.split(".")[0] in ("gdopt", "optax", *owners)
    return owned and not function.__closure__ and vars(sys.modules.get(name)).get(function.__name__) is function


# --------------------------------------------------------------------------------------------------------- self-check


def _jitted(c: Any) -> Callable:
    return jax.jit(lambda x: x - c)


def _with_jvp(c: Any) -> Callable:
    function = jax.custom_jvp(_jitted(c))
    function.defjvp(lambda primals, tangents: (function(*primals), tangents[0]))
    return function


def _with_vjp(c: Any) -> Callable:
    function = jax.custom_vjp(_jitted(c))
    function.defvjp(lambda x: (function(x), None), lambda _, g: (g,))
    return function


def _nothing(x: Any) -> Any:
    return x


# The places in which a trace can keep an array; each entry makes a function of an array. Optimizers and schedules are
# traced like any other function.
TRAPS: dict[str, Callable[[Any], Callable]] = {
    "number": lambda c: lambda x: x * c[0],
    "scan": lambda c: _around("scan", _jitted(c)),
    "while": lambda c: _around("while", _jitted(c)),
    "cond": lambda c: _around("cond", _jitted(c)),
    "switch": lambda c: lambda x: lax.switch(lax.convert_element_type(x[0], "int32"), [_nothing, _jitted(c)], x),
    "checkpoint": lambda c: _around("checkpoint", _jitted(c)),
    "vmap": lambda c: jax.vmap(_jitted(c[0])),
    "custom_jvp": _with_jvp,
    "custom_vjp": _with_vjp,
}


def _around(name: str, f: Callable) -> Callable:
    """Put a function into an operation that a replay can make anew."""
    return {
        "scan": lambda x: lax.scan(lambda s, _: (f(s), None), x, None, length=2)[0],
        "while": lambda x: lax.while_loop(lambda s: s[0] < 1, f, x),
        "cond": lambda x: lax.cond(x[0] > 0, f, _nothing, x),
        "checkpoint": jax.checkpoint(f),
    }[name]


def _look_alike(make: Callable) -> bool:
    """Tell whether two functions that differ only in their array look alike, in any use of their traces."""
    x, arrays = np.ones(2, np.float32), [np.full(2, value, np.float32) for value in (2, 3)]
    traces = [trace(make(array), x)[0] for array in arrays]
    copies = [[Copy(closed, mode) for closed in traces] for mode in Mode]
    before = [[_told_by(closed, kept) for closed, kept in zip(traces, pair, strict=True)] for pair in copies]
    arrays[0] += 100  # The copies must not see this change.
    after = [fingerprint(pair[0].jaxpr) for pair in copies]
    return any(
        told[0] == told[1] or told[0][0] is None or now != told[0][0] for told, now in zip(before, after, strict=True)
    )


def _told_by(closed: Any, kept: Copy) -> tuple[Hashable | None, list[bytes]]:
    """Return what distinguishes a trace: its fingerprint, and the arrays that a replay is given."""
    return fingerprint(kept.jaxpr), [np.asarray(array).tobytes() for array in (*_jax.consts(closed), *kept.arrays)]


def _make_anew() -> None:
    """Replay a trace in which each operation that a replay can make anew is made anew."""
    x, around = np.ones(2, np.float32), _jitted(np.ones(2, np.float32))
    for name in ("checkpoint", "cond", "while", "scan"):
        around = _around(name, around)
    closed, _ = trace(around, x)
    kept = Copy(closed, Mode.PROGRAM)
    jax.eval_shape(lambda x: Replay(Mode.PROGRAM, kept.arrays)(kept.jaxpr, [*_jax.consts(closed), x]), x)


@functools.cache
def is_reliable() -> bool:
    """Tell whether fingerprints distinguish traces on this JAX; tested once per process, in about 30 ms.

    If not, a warning says so once, and no program is shared: each call compiles anew, and gives right results.
    """
    try:
        with jax.disable_jit(False), jax.numpy_dtype_promotion("standard"):
            alike = [name for name, make in TRAPS.items() if _look_alike(make)]
            _make_anew()
        why = f"those that differ only in an array look alike (in {', '.join(alike)})" if alike else ""
    except Exception as error:
        why = f"traces cannot be read ({type(error).__name__}: {error})"
    if why:
        warn(
            f"gdopt cannot tell compiled programs apart on JAX {jax.__version__}: {why}. Results are right, but each "
            "call compiles anew, and gdopt.diagnose may find nothing. Use a JAX release that gdopt's README names."
        )
    return not why
