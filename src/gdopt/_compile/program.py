"""One executable per program: equal programs share it, whatever function objects and arrays they were made from.

A loss is traced at each call, so a rebound global or a changed closure is always seen. The arrays that it closes over
become arguments, so fresh data recompiles nothing. Only this module decides which programs are equal, by the
`fingerprints` of their traces.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _jax, _trees
from gdopt._compile import fingerprints, replays
from gdopt._compile.copies import Copy
from gdopt._compile.self_check import is_reliable
from gdopt._settings import own_work
from gdopt._types import PyTree

_PROGRAMS = 128  # the most compiled programs that are kept; the least recently used go first


class Traced(NamedTuple):
    """A function as its trace, apart from the arrays that it closes over."""

    replay: Callable[..., PyTree]  # (constants, *args) -> outputs
    constants: list[Any]
    out: PyTree  # the shapes of the outputs
    identity: Hashable | None  # equal only for traces that are, up to the constants' values; None if not known
    jaxpr: Any  # None if JAX's traces cannot be read
    level: int = 0  # of the tracers with which the function was called, which have expired


def trace(function: Callable, *args: PyTree, lift: bool = False, rules: bool = False, owned: bool = False) -> Traced:
    """Trace a function once.

    With ``lift``, the numbers written into it become constants like its arrays. The compiler then knows nothing about
    them, so this is for small functions such as schedules, which are made anew with other numbers.

    With ``rules``, the replay may be differentiated: it keeps the rules of custom_jvp and custom_vjp. A trace with such
    rules, but for JAX's own, has no identity: they are called when it is differentiated, and what they read may have
    changed by then.

    With ``owned``, arrays of NumPy are copied, because they may change before the trace is used.
    """
    if not is_reliable():
        made, out, constants = _converted(function, *args)
        return Traced(made, constants, out, None, None)
    levels: list[int] = []

    def watched(*args: PyTree) -> PyTree:
        levels.extend(map(_jax.level, filter(_jax.is_tracer, jax.tree.leaves(args)[:1])))
        return function(*args)

    closed, out = replays.trace(watched, *args)
    mode = replays.Mode.LOSS if rules else replays.Mode.FINAL
    kept = Copy(closed, mode)
    treedef, jaxpr, count = jax.tree.structure(out), kept.jaxpr, len(_jax.consts(closed))
    nested = count + len(kept.arrays)

    def replay(constants: Sequence, *args: PyTree) -> PyTree:
        numbers = iter(constants[nested:]) if lift else None
        run = replays.Replay(mode, constants[count:nested], numbers)
        found = run(jaxpr, [*constants[:count], *jax.tree.leaves(args)])
        # An output that depends on no argument may be a number that was written into the trace.
        pairs = zip(found, jax.tree.leaves(out), strict=True)
        return treedef.unflatten(x if isinstance(x, jax.Array) else jnp.asarray(x, of.dtype) for x, of in pairs)

    held = *_jax.consts(closed), *kept.arrays
    constants = list(map(_trees.on_device, map(_trees.owned, held) if owned else held))
    numbers = list(map(replays.number, replays.numbers(jaxpr))) if lift else []
    identity = None if kept.effects else fingerprints.fingerprint(jaxpr, lifted=lift, rules=rules)
    identity = (identity, count, len(numbers), treedef) if identity and _trees.is_plain(treedef) else None
    return Traced(replay, constants + numbers, out, identity, jaxpr, *levels)


def _converted(function: Callable, *args: PyTree) -> tuple[Callable, PyTree, list[Any]]:
    """Use the function itself instead of its trace; values of an outer trace that it closes over are constants."""
    new = lambda *args: function(*args)
    made, constants = jax.closure_convert(new, *args)  # This takes out what may be differentiated by.
    count = len(constants)
    closed, out = replays.trace(function, *args)
    others = [constant for constant in getattr(closed, "consts", ()) if _jax.is_tracer(constant)]
    return lambda constants, *args: made(*args, *constants[:count]), out, [*constants, *others]


def value_and_grad(value: Callable[..., tuple]) -> Callable[..., tuple[tuple, PyTree]]:
    """Make ((loss, aux), gradient) of a function that returns (loss, aux), with respect to its first argument.

    JAX's gradient of a complex leaf is the conjugate of the steepest ascent.
    """

    def both(*args: Any) -> tuple[tuple, PyTree]:
        value_and_aux, grad = jax.value_and_grad(value, has_aux=True)(*args)
        return value_and_aux, jax.tree.map(jnp.conj, grad)

    return both


def with_gradient(value: Traced, function: Callable, params: PyTree, *given: PyTree) -> tuple[Traced, Traced]:
    """Trace ((loss, aux), gradient) at ``(params, constants, *given)`` of a function that was traced with ``rules``.

    Return also the trace of the function for further derivatives. It calls the function itself if a derivative rule
    closes over a value that the function computes, because JAX differentiates that only during the call.
    """
    for replayed in (value, value._replace(replay=lambda _, *args: function(*args), identity=None)):
        replay = replayed.replay
        both = value_and_grad(lambda params, constants, *given, replay=replay: replay(constants, params, *given))
        try:
            traced = trace(both, params, value.constants, *given)
        except jax.errors.UnexpectedTracerError:
            if replayed is value:
                continue
            raise
        if not any(_jax.is_tracer(constant) and _jax.level(constant) == value.level for constant in traced.constants):
            break
    return traced, replayed


class Shared(NamedTuple):
    """A function as an executable."""

    run: Callable[..., PyTree]  # (constants, *args) -> outputs
    constants: list[Any]  # the arrays that it closes over
    out: PyTree  # the shapes of the outputs
    closed: bool  # whether it depends on nothing but its arguments

    def call(self, *args: PyTree) -> PyTree:
        """Call the function."""
        return self.run(self.constants, *args)


def share(function: Callable, *args: PyTree, donate_first: bool = False) -> Shared:
    """Jit a function for these arguments, and compile it only if no equal program ran before.

    The function is traced now. Call the result with arguments of the same structure, shapes and dtypes. With
    ``donate_first`` the first argument's buffers are reused, so they must not be the caller's.
    """
    if not is_reliable():
        made, out, constants = _converted(function, *args)
        return Shared(jax.jit(made, donate_argnums=(1,) if donate_first else ()), constants, out, closed=False)
    closed, out = replays.trace(function, *args)
    # A traced call becomes part of the caller's program, which may outlive this call, so it keeps its callbacks.
    kept = Copy(closed, replays.Mode.PROGRAM, slots=not is_traced(_jax.consts(closed), args))
    treedef, count = jax.tree.structure(out), len(_jax.consts(closed))
    donated = len(jax.tree.leaves(args[0])) if donate_first else 0
    identity = None if kept.effects else fingerprints.fingerprint(kept.jaxpr)
    program = _Program(identity, kept.jaxpr, count, donated, kept.callbacks)
    executable = _executable(program) if identity is not None else _Executable(program)
    if not executable.lease(program.callbacks):  # Another run is using it, with its own callbacks.
        executable = _Executable(program)
        executable.lease(program.callbacks)
    constants = list(map(_trees.on_device, (*_jax.consts(closed), *kept.arrays)))

    def call(constants: list, *args: PyTree) -> PyTree:
        leaves = jax.tree.leaves(args)
        return jax.tree.unflatten(treedef, executable.run(leaves[:donated], leaves[donated:], constants))

    if program.callbacks:
        weakref.finalize(call, executable.release)
    is_closed = identity is not None and not constants and not program.callbacks
    return Shared(call, constants, out, is_closed)


def is_traced(*trees: PyTree) -> bool:
    """Tell whether jit, vmap or grad traces one of these values or, as jit does, everything."""
    if any(map(_jax.is_tracer, jax.tree.leaves(trees))):
        return True
    if not _jax.is_tracing():  # Asking this first spares the array.
        return False
    with own_work():
        probe = jax.device_put(np.float32(0))  # `jnp.asarray` would compile a program.
    return _jax.is_tracer(probe)


def place_for(identity: Hashable | None, *args: PyTree, passing: bool = False) -> list:
    """Return the cache entry, a list that is empty at first, of a trace's identity and of such arguments.

    ``passing`` identities, many of which never come again, have a separate LRU cache, so that they do not evict
    reusable ones. An entry must depend on nothing but the identity, the structure, shapes and dtypes of the arguments,
    and JAX's settings. So a function in it has to be ``closed``.
    """
    leaves, treedef = jax.tree.flatten(args)
    if identity is None or (isinstance(identity, tuple) and None in identity) or not _trees.is_plain(treedef):
        return []
    kind = lambda number: (type(number), np.shape(number), np.result_type(number))
    kinds = tuple(leaf.aval if isinstance(leaf, jax.Array) else kind(leaf) for leaf in leaves)
    return (_passing_place if passing else _place)((identity, treedef, kinds, _jax.settings()))


_place, _passing_place = (functools.lru_cache(maxsize=_PROGRAMS)(lambda key: []) for _ in range(2))


def clear() -> None:
    """Forget all programs."""
    for cache in (_executable, _place, _passing_place):
        cache.cache_clear()


def shared_for(kind: Callable, value: Traced, given: tuple, make: Callable[[], Shared]) -> Shared:
    """The program of this kind that was made for an equal trace and such arguments; made now if there is none."""
    place = place_for((kind, value.identity), given, passing=True)
    made = place[0] if place else make()
    if made.closed and not place:
        place.append(made)
    return made


@dataclasses.dataclass(frozen=True)
class _Program:
    """The copy of a trace without the caller's arrays, compared by its fingerprint."""

    fingerprint: Hashable
    jaxpr: Any = dataclasses.field(compare=False)
    constants: int  # the number of arguments that stand for the trace's own arrays, without those of nested traces
    donated: int
    callbacks: list[Callable] = dataclasses.field(compare=False)  # the trace looks them up in this list


class _Executable:
    """A compiled program. If it calls functions on the host, which belong to a run, one run at a time may use it."""

    def __init__(self, program: _Program):
        def run(donated: list, arguments: list, constants: list) -> list:
            own, nested = constants[: program.constants], constants[program.constants :]
            return replays.Replay(replays.Mode.PROGRAM, nested)(program.jaxpr, [*own, *donated, *arguments])

        self.run = jax.jit(run, donate_argnums=0)
        self._table = program.callbacks
        self._is_free = threading.Lock()

    def lease(self, callbacks: list[Callable]) -> bool:
        """Set the functions that the program is to call; return False while another run uses it."""
        if not callbacks:
            return True
        if not self._is_free.acquire(blocking=False):
            return False
        self._table[:] = list(callbacks)
        return True

    def release(self) -> None:
        """Drop the functions."""
        self._table[:] = [_no_callback] * len(self._table)
        self._is_free.release()


def _no_callback(*_: Any, **__: Any) -> None:
    """Do nothing, for a program whose run is over."""


@functools.lru_cache(maxsize=_PROGRAMS)
def _executable(program: _Program) -> _Executable:
    return _Executable(program)
