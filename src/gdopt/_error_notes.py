"""Notes on errors of others: where they come from, and what to try. The errors propagate unchanged."""

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

_LONGEST = 300  # the most characters of an argument that a note shows
_INSTALLED = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib"))
_NOT_THEIRS = (os.path.dirname(__file__) + os.sep, "<frozen", *_INSTALLED)
_CALL = (
    "gdopt calls loss(params, *args), or with data loss(params, batch, *args). A batch is one argument: write x, y = "
    "batch in the loss. with_key=True adds the keyword key, and state= the keyword state."
)
_HINTS = (
    (jax.errors.TracerBoolConversionError, "choose with jnp.where or jax.lax.cond instead of if, and, or, while"),
    (jax.errors.TracerArrayConversionError, "compute with jax.numpy instead of numpy"),
    (jax.errors.TracerIntegerConversionError, "a traced number can only index arrays, so use jnp.asarray(...)"),
    (jax.errors.NonConcreteBooleanIndexError, "use jnp.where(mask, x, 0) instead of x[mask]"),
    (
        jax.errors.UnexpectedTracerError,
        "a value kept from one call of the loss cannot be used in another, so return it with has_aux",
    ),
    (jax.errors.ConcretizationTypeError, "leave out float(), int() and .item(), and use jnp.sin instead of math.sin"),
)


def add_call(error: Exception, function: Callable, args: tuple, kwargs: dict) -> None:
    """Note the line of the caller's code at which a loss raised, and the arguments of the loss."""
    lines = [f"gdopt: raised at {_place(error, function)}"]
    if known := hint(error):
        lines.append(f"The loss is traced with stand-ins for arrays, which have no values yet: {known}.")
    given = [_shown(value) for value in args] + [f"{name}={_shown(value)}" for name, value in kwargs.items()]
    lines.append(f"The loss was called with ({', '.join(given)}).")
    if isinstance(error, TypeError) and not _theirs(error):
        lines.append(_CALL)
    error.add_note("\n".join(lines))


def add_validation(error: Exception, shapes: str) -> None:
    """Note that a loss raised on validation data."""
    error.add_note(
        f"gdopt: raised by the validation loss, on validation={shapes}. It is called as the loss is, and returns what "
        "that returns."
    )


def hint(error: Exception) -> str:
    """Say what to do about an error that JAX raised because a traced value was read; "" for other errors."""
    return next((text for kind, text in _HINTS if isinstance(error, kind)), "")


def _place(error: Exception, function: Callable) -> str:
    """Return the innermost line of the caller's code; the function itself if there is none."""
    if theirs := _theirs(error):
        at = theirs[-1]
        return f"{at.filename}, line {at.lineno}, in {at.name}: {at.line}"
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(inspect.unwrap(function), "__code__", None)
    where = f" of {code.co_filename}, line {code.co_firstlineno}" if code else ""
    return f"the call of {getattr(function, '__name__', repr(function))}{where}"


def _theirs(error: Exception) -> list[traceback.FrameSummary]:
    """Return the lines of the caller's code that an error passed through below gdopt's."""
    return [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THEIRS)]


def line(frames: list[tuple[str, int, str]]) -> str | None:
    """Return the innermost line of the caller's code among frames (file, line, function); None if there is none."""
    theirs = [frame for frame in frames if not frame[0].startswith(_NOT_THEIRS)]
    if not theirs:
        return None
    file, number, function = theirs[0]
    return f"{file}, line {number}, in {function}: {linecache.getline(file, number).strip()}"


def _shown(tree: PyTree) -> str:
    text = _trees.summary(tree)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def add_result(error: Exception, callback: Callable, result: Any) -> None:
    """Attach the result of the run to the callback's error that ended it, unless the error has one already."""
    note = f"gdopt: raised by callback={callback!r} after {result.steps} step{'' if result.steps == 1 else 's'}."
    if not hasattr(error, "result"):
        with contextlib.suppress(AttributeError):  # The class of the error may take no attributes.
            cast(Any, error).result = result
            note += " The result so far is this error's .result."
    error.add_note(note)


@contextlib.contextmanager
def memory(**trees: PyTree) -> Generator[None]:
    """Note on out-of-memory errors how much memory each tree takes, and what to try."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            sizes = ", ".join(f"{name.replace('_', ' ')} {_bytes(tree)}" for name, tree in trees.items())
            error.add_note(
                f"gdopt: out of memory. The run holds: {sizes}; the rest is intermediate values of the loss, its "
                "gradient and the update. Try a smaller batch_size, data as a stream of batches, keep_best=False, "
                "jax.checkpoint around parts of the loss, or more devices with gdopt.shard."
            )
        raise


def _bytes(tree: PyTree) -> str:
    count = float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")))
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
