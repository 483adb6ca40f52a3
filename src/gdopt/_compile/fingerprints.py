"""Fingerprints, which are equal for traces of the same program.

A wrong fingerprint is silent: the second program would run as the first one. So a trace with anything that is not known
to be a value gets no fingerprint, and its program is compiled for that call alone.
"""

from __future__ import annotations

import enum
import functools
import sys
import weakref
from collections.abc import Hashable, Iterator
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _jax, _trees
from gdopt._compile.copies import SMALL, Slot
from gdopt._compile.replays import CALLS, RULES, Hole, is_number, scan_counts


class _Unshareable(Exception):
    """The program depends on something that cannot be compared, or may change: it is compiled for this call alone."""


def fingerprint(jaxpr: Any, *, lifted: bool = False, rules: bool = False) -> Hashable | None:
    """Return everything that the compiled program of a `Copy` depends on, by value; None if a value is not comparable.

    With ``lifted``, the numbers that a replay is given count only by their kind. With ``rules``, for a trace that is to
    be differentiated, policies of checkpoints count, and a function with other derivative rules than JAX's own gets no
    fingerprint.
    """
    try:
        return tuple(_items(jaxpr, lifted, rules))
    except Exception:  # It is _Unshareable, or an unknown object raised something else.
        return None


def _items(jaxpr: Any, lifted: bool, rules: bool) -> Iterator[Hashable]:
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
        if not _jax.is_own(eqn.primitive):  # Its rules may read what changes.
            raise _Unshareable
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
            if rules:
                yield key, _rule(eqn) if key in RULES[name] else _value(value)
        elif key == "policy" and name in ("checkpoint", "remat2"):  # No value depends on what a gradient stores.
            if rules:
                yield key, None if value is None else _Itself(value)
        elif key == "computation" and name == "reduce" and "jaxpr" in eqn.params:
            continue  # It is the function that this trace was made of.
        elif key in ("ft_in", "ft_out") and name == "scan":
            yield key, scan_counts(eqn)
        else:
            yield key, _value(value, inside, rules)


def _rule(eqn: Any) -> Hashable:
    """Return what tells a derivative rule of JAX's own functions, such as `jax.nn.relu`, from others.

    JAX calls a rule at each differentiation, and what any other one reads may have changed by then.
    """
    rule, treedef = _jax.rule_of(eqn) or (None, None)
    if not isinstance(rule, FunctionType) or treedef is None or not _trees.is_plain(treedef):
        raise _Unshareable
    if is_known(rule, *_OWNERS):
        return rule, treedef
    if rule.__qualname__ != "custom_jvp.defjvps.<locals>.jvp" or not is_of(rule, *_OWNERS):
        raise _Unshareable
    parts = _jax.cell(rule, "jvps")  # one for each argument, often without a name
    if not all(part is None or (is_of(part, *_OWNERS) and not part.__closure__) for part in parts):
        raise _Unshareable
    return parts, treedef


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
        return tuple(_items(value, lifted, rules)), tuple(map(_value, _jax.consts(value)))
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
        case Hole() | enum.Enum() | np.dtype():
            return value
        case Slot():
            return value.place
        case float() | complex() | np.generic():  # The bytes also distinguish the signs of nan and 0.0.
            return np.asarray(value).dtype, np.asarray(value).tobytes()
        case int():  # It is JAX's own kind of int, with a dtype.
            return getattr(value, "dtype", None), int(value)
        case np.ndarray() | jax.Array():
            return _array(value)
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
    if array.nbytes > SMALL:
        raise _Unshareable
    return array.shape, array.dtype, getattr(array, "weak_type", False), jax.device_get(array).tobytes()


def _attributes(value: Any) -> Hashable:
    """Describe an object of JAX's own by everything that it holds."""
    held = _jax.attributes(value)
    compiled = (isinstance(vars(kind).get("__new__"), BuiltinFunctionType) for kind in type(value).__mro__[:-1])
    # Compiled code does not show what it holds, nor does a class that inherits from such code, as partial functions do.
    if any(compiled) or (not held and not hasattr(value, "__dict__")):
        raise _Unshareable
    return tuple((name, _value(item)) for name, item in held.items())


def _is_jaxs_own(kind: Any) -> bool:
    return kind.__module__.split(".")[0] in _OWNERS


def is_of(function: Any, *owners: str) -> bool:
    """Tell whether the code of a function is in one of these packages: `functools.wraps` copies only names."""
    if not isinstance(function, FunctionType):
        return False
    name = function.__globals__.get("__name__", "")
    return name.split(".")[0] in owners and getattr(sys.modules.get(name), "__dict__", None) is function.__globals__


def is_known(function: FunctionType, *owners: str) -> bool:
    """Tell whether it is a function of a library that nobody changes, found by its name, and closes over nothing."""
    owned = is_of(function, "gdopt", "optax", *owners) and not function.__closure__
    return owned and function.__globals__.get(function.__name__) is function
