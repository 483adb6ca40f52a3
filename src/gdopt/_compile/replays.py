"""Traces of functions, and their replay with other arrays and numbers."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdopt import _jax
from gdopt._types import PyTree


def trace(function: Callable, *args: PyTree) -> tuple[Any, PyTree]:
    """Trace a function now; return the trace, and the shapes of the outputs."""
    # The wrapper is new, because JAX caches the trace of a known function, even if what the function reads has changed.
    new = lambda *args: function(*args)
    closed, out = jax.make_jaxpr(new, return_shape=True)(*args)
    return closed, out


class Hole(NamedTuple):
    """The place of an array that a nested trace held; the replay puts the array of this number there."""

    number: int


# Operations whose only meaning is the trace that they call.
CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "eval_jaxpr": "call_jaxpr"}
# Functions with their own derivative rules, and the parameters that hold these.
RULES = {"custom_jvp_call": ("jvp_jaxpr_fun",), "custom_vjp_call": ("fwd_jaxpr_thunk", "bwd")}


class Mode(enum.Enum):
    """The purpose of a replay, which decides what it evaluates operation by operation."""

    LOSS = "a function that may be differentiated: calls, but no function with derivative rules, which it keeps"
    FINAL = "one that is not: calls, functions with derivative rules, and whatever holds one"
    PROGRAM = "a whole program: nothing but what holds arrays"


def bodies(eqn: Any, mode: Mode) -> list[Any]:
    """Return the traces within an operation that a replay evaluates itself; none if it repeats the operation.

    A replay evaluates loops, branches and checkpoints that hold arrays, because only then these become arguments.
    """
    name = eqn.primitive.name
    if name in CALLS or name in RULES:
        inner = [eqn.params[CALLS.get(name, "call_jaxpr")]]
        through = mode is Mode.FINAL or (mode is Mode.LOSS and name in CALLS)
        return inner if through or (mode is Mode.PROGRAM and _holds(inner[0])) else []
    if name not in _BUILDERS or not _BUILDERS[name].knows(eqn):
        return []
    inner = list(_jax.inner_jaxprs(eqn.params))
    return inner if any(_holds(body, rules=mode is Mode.FINAL) for body in inner) else []


def _holds(closed: Any, *, rules: bool = False) -> bool:
    """Tell whether there are arrays in a trace or, with ``rules``, functions with derivative rules, however deep."""
    if _jax.consts(closed):
        return True
    for eqn in _jax.opened(closed).eqns:
        if rules and eqn.primitive.name in RULES:
            return True
        if any(_holds(body, rules=rules) for body in _jax.inner_jaxprs(eqn.params)):
            return True
    return False


class Replay(NamedTuple):
    """An evaluation of a trace, operation by operation, with other values for what was lifted out of it."""

    mode: Mode
    arrays: Sequence = ()  # the arrays for the holes
    numbers: Iterator | None = None  # for the literals that `numbers` lists; None leaves them as they are

    def __call__(self, closed: Any, arguments: Sequence, constants: Sequence | None = None) -> list:
        """Return the outputs; the constants of a nested trace are its own."""
        jaxpr = _jax.opened(closed)
        held = [self._filled(constant) for constant in _jax.consts(closed)] if constants is None else constants
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*held, *arguments], strict=True))

        def read(atom: Any) -> Any:
            if not _jax.is_literal(atom):
                return values[atom]
            return atom.val if self.numbers is None or not is_number(atom) else next(self.numbers)

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            values.update(zip(eqn.outvars, self._outputs(eqn, inputs), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _outputs(self, eqn: Any, inputs: list) -> list:
        inner = bodies(eqn, self.mode)
        if not inner:
            return _jax.bind(eqn, inputs)
        if eqn.primitive.name in _BUILDERS:
            return _BUILDERS[eqn.primitive.name].build(eqn, inputs, self._replace(numbers=None))
        return self(inner[0], inputs)

    def _filled(self, constant: Any) -> Any:
        return self.arrays[constant.number] if isinstance(constant, Hole) else constant


def as_it_is(closed: Any, arguments: Sequence, constants: Sequence | None = None) -> list:
    """Return the outputs of a trace, with its own constants or with others."""
    return Replay(Mode.PROGRAM)(closed, arguments, constants)


class _Builder(NamedTuple):
    """A builder that makes a loop, a branch or a checkpoint anew, with the public function of JAX for it."""

    parameters: set[str]  # the known parameters; with any other the operation is left as it is
    fits: Callable[[Any], bool]
    build: Callable[[Any, list, Replay], list]  # (operation, inputs, replay) -> outputs

    def knows(self, eqn: Any) -> bool:
        return eqn.params.keys() <= self.parameters and self.fits(eqn)


def scan_counts(eqn: Any) -> tuple[int, int]:
    """Return how many inputs of a scan are constants, and how many are carried.

    The parameters for these have other names in each JAX, but a row has one axis less in the body than outside.
    """
    body = _jax.opened(eqn.params["jaxpr"])
    same = lambda outer, inner: len(outer.aval.shape) == len(inner.aval.shape)
    carried = sum(map(same, eqn.outvars, body.outvars))
    return sum(map(same, eqn.invars, body.invars)) - carried, carried


def _scan(eqn: Any, inputs: list, replay: Replay) -> list:
    params, (consts, carried) = eqn.params, scan_counts(eqn)
    held, carry, rows = inputs[:consts], inputs[consts : consts + carried], inputs[consts + carried :]

    def step(carry: list, row: list) -> tuple[list, list]:
        outputs = replay(params["jaxpr"], [*held, *carry, *row])
        return outputs[:carried], outputs[carried:]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, rows = lax.scan(step, carry, rows, **options)
    return [*carry, *rows]


def _while(eqn: Any, inputs: list, replay: Replay) -> list:
    goes_on, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    first = eqn.params["cond_nconsts"]
    last = first + eqn.params["body_nconsts"]
    asked, held = inputs[:first], inputs[first:last]
    return lax.while_loop(
        lambda carry: replay(goes_on, [*asked, *carry])[0], lambda carry: replay(body, [*held, *carry]), inputs[last:]
    )


def _cond(eqn: Any, inputs: list, replay: Replay) -> list:
    branches = [lambda *given, branch=branch: replay(branch, given) for branch in eqn.params["branches"]]
    return lax.switch(inputs[0], branches, *inputs[1:])


def _checkpoint(eqn: Any, inputs: list, replay: Replay) -> list:
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(lambda *given: replay(eqn.params["jaxpr"], given), **options)(*inputs)


def _has_scalar_predicate(eqn: Any) -> bool:
    return _jax.opened(eqn.params["cond_jaxpr"]).outvars[0].aval.shape == ()  # A vmap may give it more axes.


_SCAN = ("jaxpr", "length", "reverse", "unroll", "linear", "num_consts", "num_carry", "ft_in", "ft_out")
_WHILE = ("cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts")
_BUILDERS = {
    "scan": _Builder({*_SCAN, "_split_transpose"}, lambda eqn: not eqn.params.get("_split_transpose"), _scan),
    "while": _Builder({*_WHILE}, _has_scalar_predicate, _while),
    "cond": _Builder(
        {"branches", "branches_platforms"}, lambda eqn: eqn.params.get("branches_platforms") is None, _cond
    ),
    # In a gradient, a checkpoint must not be merged with its first run. JAX marks it, for which there is no public way.
    "checkpoint": _Builder(
        {"jaxpr", "prevent_cse", "differentiated", "policy"}, lambda eqn: not eqn.params["differentiated"], _checkpoint
    ),
}
_BUILDERS["remat2"] = _BUILDERS["checkpoint"]


def numbers(closed: Any) -> Iterator[Any]:
    """Yield the literals that a `Replay` meets, in its order; it meets none within loops and branches."""
    jaxpr = _jax.opened(closed)
    for eqn in jaxpr.eqns:
        yield from filter(is_number, eqn.invars)
        if eqn.primitive.name in CALLS or eqn.primitive.name in RULES:
            yield from numbers(bodies(eqn, Mode.FINAL)[0])
    yield from filter(is_number, jaxpr.outvars)


def is_number(atom: Any) -> bool:
    """Tell whether an operand is a number that is written into the trace."""
    return _jax.is_literal(atom) and np.shape(atom.val) == ()


def number(literal: Any) -> Any:
    """Return the value of a literal, as an argument of the same dtype and weakness."""
    value = np.asarray(literal.val, literal.aval.dtype)
    python = value.item()
    weak = literal.aval.weak_type and jnp.result_type(type(python)) == value.dtype
    return python if weak else value[()]
