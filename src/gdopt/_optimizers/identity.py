"""Optimizers compared by value: two calls of ``optax.adam(0.1)`` return different functions that compute the same."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable
from types import CellType, FunctionType, MethodType, NoneType
from typing import Any

import numpy as np

from gdopt._compile.fingerprints import is_known, is_of

_NUMBERS = (bool, int, float, complex, str, bytes, NoneType)
_OWNERS = ("gdopt", "optax")


class _Unknown(Exception):
    """A part is no value: it may change without being replaced."""


def identity_of(function: Any) -> Hashable | None:
    """Return an identity, equal only for functions that compute the same; None if only their traces show that.

    Functions of optax and gdopt, which nobody changes, are known by their code and by the values that they close over.
    These are read at each call, so a list that has changed since the last one is seen. An array, a function of the
    caller or any other object among them makes the identity unknown.
    """
    try:
        return _value(function, ())
    except _Unknown:
        return None


def _value(value: Any, around: tuple[Any, ...]) -> Hashable:
    """Return a value for an identity; the functions and containers that it is in are ``around`` it."""
    kind: type = type(value)
    if kind in _NUMBERS:
        return kind, repr(value)  # This distinguishes 1 from True, and 0.0 from -0.0.
    match value:
        case np.generic():
            return kind, value.tobytes()
        case np.dtype():
            return value
        case type():
            return _class(value)
        case FunctionType() if is_known(value):
            return value
        case _:
            pass
    for depth, outer in enumerate(around):
        if outer is value:  # Functions may refer to themselves.
            return "around", depth
    inner = functools.partial(_value, around=(*around, value))
    what, parts = _parts(value)
    return what, tuple(map(inner, parts))


def _parts(value: Any) -> tuple[Hashable, Iterable[Any]]:
    """Return what a value is, and everything on which it depends besides."""
    kind: type = type(value)
    match value:
        case tuple() | list():
            return _class(kind), value
        case dict() if kind is dict:
            return kind, [part for pair in value.items() for part in pair]
        case FunctionType() if is_of(value, *_OWNERS):
            held = value.__defaults__, value.__kwdefaults__, *map(_contents, value.__closure__ or ())
            return value.__code__, held
        case MethodType():
            return kind, (value.__func__, value.__self__)
        case functools.partial():
            return kind, (value.func, value.args, value.keywords)
        case _ if _owner(kind.__module__) in _OWNERS and hasattr(value, "__dict__"):
            return kind, (dict(vars(value)),)
        case _:
            raise _Unknown


def _class(kind: type) -> Hashable:
    """Return a class of a library; one of the caller's may get other methods."""
    if _owner(kind.__module__) not in (*_OWNERS, "builtins", "jax", "numpy", "ml_dtypes"):
        raise _Unknown
    return kind


def _owner(module: str) -> str:
    return module.split(".")[0]


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError as error:  # It is still empty.
        raise _Unknown from error
