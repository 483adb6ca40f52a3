"""The search for the operation that made the first NaN: it computes the operations of a trace one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _jax
from gdopt._compile.replays import CALLS, RULES, as_it_is, scan_counts


class Origin(NamedTuple):
    """An equation that makes NaN or infinity from other numbers."""

    primitive: str | None  # None: a constant holds it from the beginning
    value: Any  # the output
    inputs: list[Any]
    backward: bool  # whether JAX's reverse mode added it to the trace
    lines: list[tuple[str, int, str]]  # file, line and function that it was traced from, innermost first


def origins(closed: Any, arguments: Sequence, out: int) -> tuple[list[Origin], int | None]:
    """Find the equations that made an output of a trace NaN or infinite, by computing all of them one by one.

    The last one comes first: the equation that made the first NaN. If it made that from infinities, the one that made
    the first infinity follows. If no equation made it, return the number of the argument that brought it in, too.
    """
    found: list[Origin] = []
    return found, _search(closed, arguments, out, [], found)


def _search(closed: Any, arguments: Sequence, out: int, lines: list, found: list[Origin]) -> int | None:
    """Go back from an output to its origin. Add that to ``found``, or return the number of an argument."""
    jaxpr = _jax.opened(closed)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*_jax.consts(closed), *arguments], strict=True))
    made = {}

    def read(atom: Any) -> Any:
        return atom.val if _jax.is_literal(atom) else values[atom]

    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, _jax.bind(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        made.update((var, (eqn, place)) for place, var in enumerate(eqn.outvars))
    atom = jaxpr.outvars[out]
    while not _jax.is_literal(atom) and atom in made:
        eqn, place = made[atom]
        inputs, here = [read(atom) for atom in eqn.invars], _jax.lines(eqn) + lines
        if eqn.primitive.name in ("scan", "while"):
            source = _search_rounds(eqn, inputs, place, values[atom], here, found)
        elif body := _body(eqn, inputs):
            inner, skipped = body
            source = _search(inner, inputs[skipped:], place, here, found)
            source = None if source is None else source + skipped
        else:
            source = _source(eqn, inputs, values[atom])
            if eqn.primitive.name in ("concatenate", "stack"):  # Only a part of these may be used.
                source = _healing(jaxpr, values, eqn, inputs, jaxpr.outvars[out], source)
            if source is None or (is_nan(values[atom]) and not is_nan(inputs[source])):
                found.append(_origin(eqn, values[atom], inputs, here))
        if source is None:
            return None
        atom = eqn.invars[source]
    if not _jax.is_literal(atom) and atom in jaxpr.invars:
        return jaxpr.invars.index(atom)
    found.append(Origin(None, read(atom), [], False, lines))
    return None


def _healing(jaxpr: Any, values: dict, eqn: Any, inputs: list, out: Any, source: int | None) -> int | None:
    """Find the input, among several that are not finite, without which the output is finite; else ``source``."""
    bad = [number for number, given in enumerate(inputs) if is_bad(given)]
    if len(bad) < 2 or not is_bad(values[out]):
        return source
    later = jaxpr.eqns[jaxpr.eqns.index(eqn) + 1 :]

    def without(number: int) -> Any:
        """Return the output that a finite value of this input would give."""
        given = [filled(x) if n == number else x for n, x in enumerate(inputs)]
        new = dict(zip(eqn.outvars, _jax.bind(eqn, given), strict=True))
        for eqn_after in later:
            if any(not _jax.is_literal(atom) and atom in new for atom in eqn_after.invars):
                given = [a.val if _jax.is_literal(a) else new.get(a, values[a]) for a in eqn_after.invars]
                new.update(zip(eqn_after.outvars, _jax.bind(eqn_after, given), strict=True))
        return new.get(out, values[out])

    return next((number for number in bad if not is_bad(without(number))), source)


def _body(eqn: Any, inputs: list) -> tuple[Any, int] | None:
    """Return the closed jaxpr that an equation calls, and the number of inputs before its arguments."""
    if eqn.primitive.name == "cond":
        branches = eqn.params["branches"]
        return branches[min(max(int(inputs[0]), 0), len(branches) - 1)], 1
    names = {"remat2": "jaxpr", "checkpoint": "jaxpr", **CALLS, **dict.fromkeys(RULES, "call_jaxpr")}
    name = names.get(eqn.primitive.name)
    return None if name is None else (eqn.params[name], 0)


def _search_rounds(eqn: Any, inputs: list, place: int, value: Any, lines: list, found: list[Origin]) -> int | None:
    """Search in the first round of a loop that made NaN, then in earlier rounds for the infinity that led to it."""
    params, is_scan = eqn.params, eqn.primitive.name == "scan"
    body = params["jaxpr"] if is_scan else params["body_jaxpr"]
    skipped = 0 if is_scan else params["cond_nconsts"]
    consts, carried = scan_counts(eqn) if is_scan else (params["body_nconsts"], len(eqn.outvars))
    bad, before = is_nan if is_nan(value) else is_bad, None
    while True:
        rounds = itertools.islice(enumerate(_rounds(eqn, inputs, body, skipped, consts, carried)), before)
        hits = ((n, given, [at for at, x in enumerate(outputs) if bad(x)]) for n, (given, outputs) in rounds)
        number, given, places = next((hit for hit in hits if hit[-1]), (0, [], []))
        if not places:  # No round makes it when computed by itself.
            found.append(_origin(eqn, value, inputs, lines))
            return None
        place = place if place in places else places[0]
        source = _search(body, given, place, lines, found)
        if source is None or number == 0 or not consts <= source < consts + carried:
            return None if source is None else source + skipped
        place, bad, before = source - consts, is_bad, number


def _rounds(eqn: Any, inputs: list, body: Any, skipped: int, consts: int, carried: int) -> Iterator[tuple[list, list]]:
    """Yield the arguments and outputs of a loop's body, round by round."""
    run, first = _compiled(body), skipped + consts
    held, carry, rows = inputs[skipped:first], inputs[first : first + carried], inputs[first + carried :]
    if eqn.primitive.name == "scan":
        numbers = range(eqn.params["length"])
        for number in reversed(numbers) if eqn.params["reverse"] else numbers:
            given = [*held, *carry, *(row[number] for row in rows)]
            outputs = run(*given)
            yield given, outputs
            carry = outputs[:carried]
        return
    goes_on = _compiled(eqn.params["cond_jaxpr"])
    while (on := goes_on(*inputs[:skipped], *carry)[0]).any():
        given = [*held, *carry]
        after = run(*given)
        if on.ndim:  # Under vmap, runs that have ended stay as they are.
            kept = lambda new, old: jnp.where(jax.lax.expand_dims(on, range(on.ndim, new.ndim)), new, old)
            after = list(map(kept, after, carry))
        carry = after
        yield given, carry


def _compiled(body: Any) -> Callable[..., list]:
    return jax.jit(lambda *given: as_it_is(body, given))


def _source(eqn: Any, inputs: list, value: Any) -> int | None:
    """Return the input that brought in the NaN or infinity; among several, the one that has it in the same place."""
    kind = is_nan if is_nan(value) else is_bad
    if not any(map(is_bad, inputs)):
        return None
    at = jnp.argmax(jnp.ravel(jnp.isnan(value) if kind is is_nan else ~jnp.isfinite(value)))
    if eqn.primitive.name == "select_n":
        return 1 + int(jnp.ravel(inputs[0])[at] if np.shape(inputs[0]) else inputs[0])
    some = [number for number, given in enumerate(inputs) if kind(given)] or [
        n for n, given in enumerate(inputs) if is_bad(given)
    ]
    there = [number for number in some if np.shape(inputs[number]) == np.shape(value)]
    return next((number for number in there if kind(jnp.ravel(inputs[number])[at])), some[0])


def _origin(eqn: Any, value: Any, inputs: list, lines: list) -> Origin:
    return Origin(eqn.primitive.name, value, inputs, _jax.is_backward(eqn), lines)


def is_nan(value: Any) -> bool:
    """Tell whether there is a NaN among the numbers."""
    return _is_inexact(value) and bool(_any_nan(value))


def is_bad(value: Any) -> bool:
    """Tell whether there is a NaN or an infinity among the numbers."""
    return _is_inexact(value) and not bool(_all_finite(value))


def filled(value: Any) -> Any:
    """Replace NaN and infinity by zeros."""
    return jnp.where(jnp.isfinite(value), value, jnp.zeros_like(value))


def _is_inexact(value: Any) -> bool:
    return jnp.issubdtype(jax.dtypes.result_type(value), jnp.inexact)


# With jit, these also run on arrays that are spread over processes.
_any_nan = jax.jit(lambda value: jnp.isnan(value).any())
_all_finite = jax.jit(lambda value: jnp.isfinite(value).all())
