"""Validation of arguments. Every error names the argument, its value and the fix."""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from collections.abc import Callable, Iterator, MappingView, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _jax, _trees
from gdopt._errors import InputError
from gdopt._result import Result
from gdopt._types import PyTree

_BETWEEN = ("gdopt", "jax", "contextlib")  # the modules between the caller and a warning
UNORDERED = (Set, MappingView)  # sets, and the views of a dict
TO_NUMBERS = "convert it with .astype(float), or names of classes with numpy.unique(names, return_inverse=True)[1]"
_LARGEST_COUNT = 10**9  # steps; the sum of two such counts fits the 32-bit counter


def number(name: str, value: Any, valid: Callable[[float], bool], wanted: str) -> float:
    """Return the value as Python's float if it is one finite real number and valid; else raise InputError."""
    try:
        array = _trees.on_host(value)
        real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
        if real and array.ndim == 0 and math.isfinite(array) and valid(float(array)):
            return float(array)
    except jax.errors.TracerArrayConversionError:
        raise InputError(f"{name} is traced and has no value yet. Pass it outside of jit.") from None
    except ValueError:  # Ragged lists raise this.
        pass
    raise InputError(f"{name}={value!r} is not {wanted}.")


def warn(message: str) -> None:
    """Issue a UserWarning at the caller's line that called gdopt."""
    frame, level = sys._getframe(1), 2  # pyright: ignore[reportPrivateUsage]
    while frame is not None and str(frame.f_globals.get("__name__")).split(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def rate(name: str, value: Any, *, zero: bool = False) -> float:
    """Check a learning rate, or another number that only has to be positive."""
    wanted = "a finite number, 0 or above" if zero else "a finite number above 0, such as 0.1"
    return number(name, value, lambda x: x > 0 or (zero and x == 0), wanted)


def whole_number(name: str, value: Any, least: int = 1, upto: str = "10**9") -> int:
    """Check a number of steps, rows or epochs; ``upto`` names another upper limit in the message."""
    wanted = f"a whole number from {least} to {upto}"
    return int(number(name, value, lambda x: least <= x <= _LARGEST_COUNT and x % 1 == 0, wanted))


def check_flags(**given: Any) -> None:
    """Raise InputError for values other than True and False: a text such as "no" would count as True."""
    for name, value in given.items():
        if not isinstance(value, bool | np.bool_):
            raise InputError(f"{name}={value!r} is not a bool. Pass True or False.")


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    """Check a choice by name."""
    if value not in known:
        raise InputError(f"{name}={value!r} is unknown. Pass one of {', '.join(map(repr, known))}.")
    return value


def refuse_no_arrays(name: str, tree: PyTree) -> None:
    """Raise InputError for arrays that JAX cannot use, and for dicts that it cannot sort."""
    if not any(fault(leaf, carried=True) for leaf in flatten(name, tree)[0]):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if why := fault(leaf, carried=True):
            raise InputError(f"{_trees.path_name(path, name)} {why}.")


def refuse_result(name: str, given: Any, field: str) -> None:
    """Raise InputError for a result in place of one of its fields: it is a pytree, so JAX would take it."""
    if isinstance(given, Result):
        raise InputError(f"{name} is a gdopt.Result. Pass one of its fields: {name}=result.{field}.")


def flatten(name: str, tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Any]:
    """Call ``jax.tree.flatten``, and raise InputError for dicts that JAX cannot sort."""
    try:
        return jax.tree.flatten(tree, is_leaf)
    except (TypeError, ValueError) as error:  # JAX's error does not say where the dict is.
        nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_unsortable)
        for path, node in nodes:
            if _is_unsortable(node):
                kinds = " and ".join(sorted({type(key).__name__ for key in node}))
                raise InputError(
                    f"{_trees.path_name(path, name)} is a dict whose keys are of the types {kinds}, which JAX cannot "
                    "sort. Use keys of one type (for example str)."
                ) from error
        raise


def _is_unsortable(node: Any) -> bool:
    if not isinstance(node, dict):
        return False
    try:
        sorted(node)
    except TypeError:
        return True
    return False


def fault(leaf: Any, carried: bool) -> str:
    """Say what is wrong with a leaf, and the fix; "" if nothing is."""
    if isinstance(leaf, jax.Array):
        if _jax.is_tracer(leaf) or not leaf.is_deleted():
            return ""
        return (
            f"is an array of dtype {leaf.dtype} and shape {leaf.shape} that was deleted, or donated to a jitted "
            "function (donate_argnums). Pass an array that still exists (for example a copy made before)"
        )
    if isinstance(leaf, np.ma.MaskedArray):
        return (
            "is a masked array, which JAX does not support. Pass its .filled(value), and its mask as a separate array "
            "if the loss needs it"
        )
    if isinstance(leaf, np.ndarray | np.generic):
        if _trees.is_array(leaf):
            return _wrapped(leaf)
        if leaf.dtype.kind in "biufcV":
            return f"is of dtype {leaf.dtype}, which JAX does not support: {_other_dtype(leaf.dtype)}"
        if isinstance(leaf, np.generic) or carried:
            return ""
        return f"is an array of dtype {leaf.dtype}, not of numbers: {TO_NUMBERS}"
    return "" if carried else _unfit(leaf)


def _unfit(leaf: Any) -> str:
    """Say what is wrong with a leaf of another type than an array, where numbers are expected."""
    if isinstance(leaf, type | int | float | complex):
        return ""
    if isinstance(leaf, Iterator):
        return _once(leaf)
    if is_foreign(leaf) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
        return (
            f"is a {type(leaf).__module__}.{type(leaf).__name__}, not an array of NumPy or JAX: convert it with "
            "numpy.asarray"
        )
    return f"is a {type(leaf).__name__}: pass float(...) of it" if isinstance(leaf, numbers.Number) else ""


def is_foreign(leaf: Any) -> bool:
    """Tell whether a leaf is an array of another library (such as a torch tensor or a pandas Series)."""
    if isinstance(leaf, jax.Array | np.ndarray | np.generic | type) or hasattr(leaf, "__jax_array__"):
        return False
    return hasattr(leaf, "__array__") and hasattr(leaf, "shape")


def refuse_misread(name: str, tree: PyTree) -> None:
    """Raise InputError for objects that hold numbers but count as a function or a text does.

    An iterator would be empty from the second trace of the loss on, and then so would be its gradient.
    """
    if any(map(_misread, flatten(name, tree, _is_warned_of)[0])):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_warned_of):
            if why := _misread(leaf):
                raise InputError(f"{_trees.path_name(path, name)} {why}.")


def _is_warned_of(node: Any) -> bool:
    """Tell whether JAX warns of a leaf, unless it is told to stop there. Iterators of others may be pytrees."""
    return isinstance(node, Iterator | MappingView) and type(node).__module__ in ("builtins", "itertools")


def _misread(leaf: Any) -> str:
    if isinstance(leaf, jax.Array | str | int | float):
        return ""
    if isinstance(leaf, Iterator):
        return _once(leaf)
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OMm":
        return f"is an array of dtype {leaf.dtype}, not of numbers: convert it with .astype(float), or pass a list"
    items: Any = leaf if isinstance(leaf, UNORDERED) else ()
    if any(isinstance(item, float | complex | np.ndarray | jax.Array) for item in items):
        return f"is a {type(leaf).__name__}, which holds numbers but is no array: pass a tuple of its items"
    return ""


def _once(leaf: Any) -> str:
    what = f"is a {type(leaf).__name__}, which can be read only once, but the loss is called more often"
    return f"{what}: pass a tuple of its items"


def _wrapped(leaf: np.ndarray | np.generic) -> str:
    """Say what is wrong with 64-bit integers that JAX would wrap around when it converts them to 32 bits."""
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if leaf.dtype.kind not in "iu" or dtype == leaf.dtype or not leaf.size:
        return ""
    limits = jnp.iinfo(dtype)
    least, most = int(leaf.min()), int(leaf.max())
    if limits.min <= least and most <= limits.max:
        return ""
    return (
        f"holds integers up to {max(most, -least)}, beyond the range of {dtype}: convert it with "
        ".astype(float), or call jax.config.update('jax_enable_x64', True) first"
    )


def _other_dtype(dtype: np.dtype) -> str:
    """Say how to convert a dtype to one that JAX knows."""
    if dtype.fields is not None:
        return "pass its fields as separate arrays"
    native = dtype.newbyteorder("=")
    name = native.name if native in _trees.NUMBERS else {"f": "float64", "c": "complex128"}.get(dtype.kind, "float64")
    return f"convert it with .astype({name!r})"
