"""Notes on errors that are not gdopt's own: where they come from, and what to try. The errors stay what they are."""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
import os
import sysconfig
import traceback
from collections.abc import Callable, Generator
from typing import Any, cast

import jax

from gdopt import _trees
from gdopt._types import PyTree

_LONGEST = 300  # characters of the arguments that are shown
_INSTALLED = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib"))
_NOT_THEIRS = (os.path.dirname(__file__) + os.sep, "<frozen", *_INSTALLED)
_HINTS = (
    (jax.errors.TracerBoolConversionError, "choose with jnp.where or jax.lax.cond in place of if, and, or, while"),
    (jax.errors.TracerArrayConversionError, "compute with jax.numpy in place of numpy"),
    (jax.errors.TracerIntegerConversionError, "what a traced number indexes has to be an array: jnp.asarray(...)"),
    (jax.errors.NonConcreteBooleanIndexError, "in place of x[mask] take jnp.where(mask, x, 0)"),
    (
        jax.errors.UnexpectedTracerError,
        "what one call of the loss keeps is of no use to another: return it, by has_aux",
    ),
    (jax.errors.ConcretizationTypeError, "leave out float(), int() and .item(), and take jnp.sin for math.sin, say"),
)


def add_call(error: Exception, function: Callable, args: tuple, kwargs: dict) -> None:
    """Note the line in the caller's code at which a loss raised, and what the loss was called with."""
    lines = [f"gdopt: raised at {_place(error, function)}"]
    if known := hint(error):
        lines.append(f"The loss is traced, on stand-ins for arrays that have no values yet: {known}.")
    given = [_shown(value) for value in args] + [f"{name}={_shown(value)}" for name, value in kwargs.items()]
    lines.append(f"The loss was called with ({', '.join(given)}).")
    error.add_note("\n".join(lines))


def hint(error: Exception) -> str:
    """Say what to do about an error of JAX's that came of reading a traced value; "" for other errors."""
    return next((text for kind, text in _HINTS if isinstance(error, kind)), "")


def _place(error: Exception, function: Callable) -> str:
    """The innermost line that is the caller's; where there is none, the function itself."""
    theirs = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THEIRS)]
    if theirs:
        at = theirs[-1]
        return f"{at.filename}, line {at.lineno}, in {at.name}: {at.line}"
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(inspect.unwrap(function), "__code__", None)
    where = f" of {code.co_filename}, line {code.co_firstlineno}" if code else ""
    return f"the call of {getattr(function, '__name__', repr(function))}{where}"


def line(frames: list[tuple[str, int, str]]) -> str | None:
    """The innermost line that is the caller's, of files, lines and functions; None where there is none."""
    theirs = [frame for frame in frames if not frame[0].startswith(_NOT_THEIRS)]
    if not theirs:
        return None
    file, number, function = theirs[0]
    return f"{file}, line {number}, in {function}: {linecache.getline(file, number).strip()}"


def _shown(tree: PyTree) -> str:
    text = _trees.summary(tree)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def add_result(error: Exception, callback: Callable, result: Any) -> None:
    """The result of the run that a callback's error ended; one that the error has already is left alone."""
    note = f"gdopt: raised by callback={callback!r} after {result.steps} step{'' if result.steps == 1 else 's'}."
    if not hasattr(error, "result"):
        with contextlib.suppress(AttributeError):  # of a class that takes none
            cast(Any, error).result = result
            note += " The result so far is this error's .result."
    error.add_note(note)


@contextlib.contextmanager
def memory(**trees: PyTree) -> Generator[None]:
    """Note on errors for lack of memory what takes how much of it, and what to try."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            sizes = ", ".join(f"{name.replace('_', ' ')} {_bytes(tree)}" for name, tree in trees.items())
            error.add_note(
                f"gdopt: out of memory. It takes: {sizes}; the rest is what the loss, its gradient and the update "
                "compute in between. Try a smaller batch_size, data as a stream of batches, keep_best=False, "
                "jax.checkpoint around parts of the loss, or more devices, with gdopt.shard."
            )
        raise


def _bytes(tree: PyTree) -> str:
    count = float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")))
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
