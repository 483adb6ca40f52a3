"""Optimizers as callers pass them: transformations, and factories that make one of a learning rate."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Hashable
from types import FunctionType, NoneType
from typing import Any

from gdopt._compile.fingerprints import is_known
from gdopt._errors import InputError

_NUMBERS = (bool, int, float, str, NoneType)


def check_optimizer(optimizer: Any, *, searched: bool) -> None:
    """Raise InputError if it is neither a transformation nor a factory.

    A rate is ``searched`` with "auto" and in a range test. That makes sense only if the factory needs one.
    """
    if optimizer is None or is_transformation(optimizer):
        return
    if not callable(optimizer) or isinstance(optimizer, type):
        raise InputError(
            f"optimizer={optimizer!r} is unknown. Pass an optax transformation (for example optax.adam(1e-3)), or a "
            "factory learning_rate -> transformation (for example optax.adam or gdopt.gd)."
        )
    try:
        known = _known.setdefault(optimizer, {})
    except TypeError:  # It is not hashable, or takes no weak reference.
        known = {}
    if searched not in known:
        known[searched] = _no_factory(optimizer, searched)
    if why := known[searched]:
        raise InputError(f"optimizer={_name(optimizer)} {why}")


# Answers of `_no_factory`, with and without a search: reading a signature takes as long as two checks of a call.
_known: weakref.WeakKeyDictionary[Any, dict[bool, str]] = weakref.WeakKeyDictionary()


def _no_factory(function: Any, searched: bool) -> str:
    """Say why a function does not make an optimizer of a learning rate, with the fix; "" if it may.

    Functions of optax and gdopt call the rate ``learning_rate``, or a name that ends in it, and put it first. If it has
    a default, the optimizer needs no rate: it chooses its own steps. Other functions may use any name.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # Some functions that are written in C have no signature.
        return ""
    name, needed = _name(function), [p.name for p in signature.parameters.values() if p.default is p.empty]
    called = "." if name.startswith("<") else f": optimizer={name}({'...' if needed else ''})."
    if _is_optaxs(function):
        first = next(iter(signature.parameters.values()), None)
        named = first is not None and first.name.endswith("learning_rate")
        if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD) or not named:
            return f"takes no learning rate, as optax.adam does. Pass the optimizer that it returns{called}"
        if first.default is not first.empty and searched:
            return (
                f"needs no learning rate. Pass optimizer={name}(). To search for a rate all the same, pass "
                f"optimizer=lambda rate: {name}(rate)."
            )
    try:
        signature.bind(0.1)
    except TypeError:
        if not signature.parameters:
            return f"takes no learning rate. Pass the optimizer that it returns{called}"
        others = ", ".join(f"{other}=..." for other in needed[1:])
        if not others:
            return "takes no learning rate as its first argument. Pass a function that does."
        return f"needs more than a learning rate. Pass functools.partial of it, with {others}."
    return ""


def _is_optaxs(function: Any) -> bool:
    """Tell whether a function, or the function of a partial, is one of optax's or gdopt's."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", None)).split(".")[0] in ("optax", "gdopt")


def _name(function: Any) -> str:
    """Return the public name of a function of optax or gdopt; for others the repr."""
    if isinstance(function, functools.partial):
        return f"functools.partial({_name(function.func)}, ...)"
    for place in ("optax", "optax.contrib", "gdopt"):
        name = getattr(function, "__name__", "")
        if name and vars(sys.modules[place]).get(name) is function:
            return f"{place}.{name}"
    return repr(function)


def is_transformation(optimizer: Any) -> bool:
    """Tell whether it has optax's protocol, ``init`` and ``update`` (MultiSteps has it without being a tuple)."""
    if isinstance(optimizer, type):  # The class itself (for example MultiSteps) is no transformation.
        return False
    return callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))


def function_identity(function: Any) -> Hashable | None:
    """Return the identity of a function that nobody changes, or of its partial with numbers and such functions.

    It is None for others.
    """
    if type(function) is not functools.partial:
        return function if _is_fixed(function) else None
    given = (*function.args, *function.keywords.values())
    parts = [(type(x), repr(x)) if type(x) in _NUMBERS else function_identity(x) for x in given]
    if not _is_fixed(function.func) or None in parts:
        return None
    return function.func, tuple(function.keywords), tuple(parts)


def _is_fixed(function: Any) -> bool:
    """Tell whether it is one of optax's or gdopt's own functions, which nobody changes, and closes over nothing."""
    return isinstance(function, FunctionType) and is_known(function)
