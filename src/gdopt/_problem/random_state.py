"""Detection of losses that draw random numbers from NumPy or Python, by the states of the generators they reach."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import random
import threading
import time
from collections.abc import Callable, Hashable
from types import FunctionType, MethodType
from typing import Any, cast

import numpy as np

_WORDS = 625  # words of MT19937's state: its key and the position in it
_WATCHED = 0.1  # the seconds in which other threads show that they draw


def states(function: Callable) -> dict[str, Hashable]:
    """Return the states of NumPy's global generator and of those that the function closes over or names, by name."""
    named: dict[str, Any] = {"numpy.random": cast(Any, np.random).get_bit_generator()}
    for name, value in _reach(function):
        owner = _of(value, "__self__") if callable(value) else None
        value = owner if isinstance(owner, np.random.Generator | np.random.RandomState | random.Random) else value
        if isinstance(value, np.random.Generator):
            named[name] = value.bit_generator
        elif isinstance(value, np.random.RandomState):
            named[name] = cast(Any, value)._bit_generator
        elif value is random or isinstance(value, random.Random):  # Reading it takes 10 µs.
            named[name] = cast(Any, value).getstate
    return {name: _state(generator) for name, generator in named.items()}


def drawn(function: Callable, before: dict[str, Hashable], again: Callable[[], Any]) -> str:
    """Name the generators from which the function drew since ``before``; ``again`` calls it once more.

    Another thread may have drawn from them meanwhile. So if there is one, a generator is named only if it moves in a
    second call as well, and not while nothing is called.
    """
    names = _moved(function, before)
    if names and threading.active_count() > 1:
        before = states(function)
        with contextlib.suppress(Exception):
            again()
        names = names & _moved(function, before)
    if names and threading.active_count() > 1:
        before = states(function)
        time.sleep(_WATCHED)
        names = names - _moved(function, before)
    return " and ".join(name for name in before if name in names)


def _moved(function: Callable, before: dict[str, Hashable]) -> set[str]:
    now = states(function)
    return {name for name, state in before.items() if now.get(name) != state}


def _state(generator: Any) -> Hashable:
    if not isinstance(generator, np.random.BitGenerator):
        return generator()
    if type(generator) is np.random.MT19937:  # Its .state would cost each call of minimize 40 µs.
        return ctypes.string_at(generator.ctypes.state_address, 4 * _WORDS)
    return repr(generator.state)


def _reach(function: Any, *, deep: bool = True) -> list[tuple[str, Any]]:
    """Return what a function closes over, is bound to, has as defaults or names as globals, one function deep."""
    found: list[tuple[str, Any]] = []
    while isinstance(function, functools.partial):
        found += [("functools.partial", value) for value in (*function.args, *function.keywords.values())]
        function = function.func
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType):
        owner = _of(function, "__self__")
        attributes = _of(function if owner is None else owner, "__dict__") or {}
        found += [(f"self.{name}", value) for name, value in attributes.items()]
    if not isinstance(function, FunctionType | MethodType):
        function = type(function).__call__ if callable(function) else None
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType):
        return found
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append((name, cell.cell_contents))
        except ValueError:  # The variable is not bound yet.
            continue
    defaults = zip(reversed(code.co_varnames[: code.co_argcount]), reversed(function.__defaults__ or ()), strict=False)
    found += [*defaults, *(function.__kwdefaults__ or {}).items()]
    found += [(name, function.__globals__[name]) for name in code.co_names if name in function.__globals__]
    if deep:
        for _, value in list(found):
            if isinstance(value, FunctionType):
                found += _reach(value, deep=False)
    return found


def _of(value: Any, name: str) -> Any:
    """Return an attribute; None if there is none, or if reading it fails, as for lazily loaded modules."""
    try:
        return getattr(value, name, None)
    except Exception:
        return None
