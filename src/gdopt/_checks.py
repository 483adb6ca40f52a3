"""Numbers that callers give: taken as Python's own, or refused with the argument's name, its value and the cure."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdopt.errors import InputError

_LARGEST_COUNT = 10**9  # the sum of two counts fits the 32-bit step counter


def number(name: str, value: Any, valid: Callable[[float], bool], wanted: str) -> float:
    """The value as Python's float where it is one finite real number and valid."""
    try:
        array = np.asarray(value)
        real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
        if real and array.ndim == 0 and math.isfinite(array) and valid(float(array)):
            return float(array)
    except jax.errors.TracerArrayConversionError:
        raise InputError(f"{name} is traced and has no value yet: give it outside of jit.") from None
    except ValueError:  # ragged lists
        pass
    raise InputError(f"{name}={value!r} is not {wanted}.")


def warn(message: str) -> None:
    """A UserWarning at the line of the caller's that called gdopt."""
    frame, level = sys._getframe(1), 2
    while frame is not None and str(frame.f_globals.get("__name__")).split(".")[0] in ("gdopt", "contextlib"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def rate(name: str, value: Any, *, zero: bool = False) -> float:
    """A learning rate, or another number of which only the sign is known."""
    wanted = "a finite number, 0 or above" if zero else "a finite number above 0, such as 0.1"
    return number(name, value, lambda x: x > 0 or (zero and x == 0), wanted)


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """A number of steps, rows, epochs."""
    wanted = f"a whole number from {least} to 10**9"
    return int(number(name, value, lambda x: least <= x <= _LARGEST_COUNT and x % 1 == 0, wanted))


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    """A choice by name."""
    if value not in known:
        raise InputError(f"{name}={value!r} is unknown: pass one of {', '.join(map(repr, known))}.")
    return value
