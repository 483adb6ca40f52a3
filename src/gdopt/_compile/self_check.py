"""Traps for fingerprints and copies, tried on the installed JAX before the first program is shared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax import lax

from gdopt import _jax
from gdopt._checks import warn
from gdopt._compile.copies import Copy
from gdopt._compile.fingerprints import fingerprint
from gdopt._compile.replays import Mode, Replay, trace


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
