"""Warnings of losses that probably do not mean what they compute, judged by their traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gdopt import _jax
from gdopt._checks import warn
from gdopt._compile.program import value_and_grad
from gdopt._compile.replays import trace
from gdopt._problem.problem import Problem
from gdopt._types import PyTree


def warn_of_no_gradient(problem: Problem) -> None:
    """Warn, after a gradient that was exactly zero at the start, if the loss does not use the params at all."""
    key = problem.key if problem.with_key else None
    grad = lambda *given: value_and_grad(problem.value)(*given)[1]
    if not _depends(grad, problem.objective.params, problem.batch, problem.args, key):
        warn(
            "the gradient is exactly zero everywhere, and nothing was optimised: the loss does not depend on the "
            "params, or only through operations without a gradient (stop_gradient, argmax, round, comparisons)."
        )


def warn_of_all_pairs(jaxpr: Any) -> None:
    """Warn of a sum over all squares of (n, 1) - (n,), if the loss that was traced to this has one."""
    if jaxpr is not None and (n := _rows_of_all_pairs(jaxpr)):
        warn(
            f"the loss subtracts shapes ({n}, 1) and ({n},), which gives all {n} * {n} differences, and sums up their "
            "squares. Bring both to one shape (for example with prediction[:, 0] or y[:, None])."
        )


def _depends(function: Callable, *args: PyTree) -> bool:
    """Tell whether anything that the function returns is computed from its arguments."""
    jaxpr = _jax.opened(trace(function, *args)[0])
    reached = set(jaxpr.invars)
    is_reached = lambda atom: not _jax.is_literal(atom) and atom in reached
    for eqn in jaxpr.eqns:
        if any(map(is_reached, eqn.invars)):
            reached.update(eqn.outvars)
    return any(map(is_reached, jaxpr.outvars))


def _rows_of_all_pairs(jaxpr: Any) -> int | None:
    """Return the n of a sum over all squares of (n, 1) - (n,), which was surely meant for n pairs; None without one.

    A trace does not distinguish ``a - b`` from ``a - b[None, :]``, and other sums over all pairs have their uses, such
    as that of |a - b|. A sum of squares ignores which entries are paired: its minimum is at the means. Columns that
    were made from a vector are left alone: ``a[:, None] - b[None, :]`` is written on purpose.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "reduce_sum":
            shape = eqn.invars[0].aval.shape
            if len(shape) == len(eqn.params["axes"]) == 2 and 1 < shape[0] == shape[1] and _is_all_pairs(eqn, jaxpr):
                return shape[0]
        for inner in _jax.inner_jaxprs(eqn.params):
            if n := _rows_of_all_pairs(_jax.opened(inner)):
                return n
    return None


_SHAPES = ("reshape", "broadcast_in_dim", "squeeze", "slice", "dynamic_slice", "transpose", "convert_element_type")


def _is_all_pairs(total: Any, jaxpr: Any) -> bool:
    made = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}

    def by(atom: Any, *names: str) -> Any:
        """Return the equation that made it, if it is one of these."""
        eqn = None if _jax.is_literal(atom) else made.get(atom)
        return eqn if eqn is not None and eqn.primitive.name in names else None

    summed = total.invars[0]
    while (scaled := by(summed, "mul")) is not None and _jax.is_literal(scaled.invars[0]):
        summed = scaled.invars[1]  # The square may be halved.
    square = by(summed, "square", "integer_pow", "mul")
    if square is None or square.params.get("y", 2) != 2 or square.invars[0] is not square.invars[-1]:
        return False
    difference = by(square.invars[0], "sub")
    if difference is None:
        return False
    column, row = sorted(difference.invars, key=lambda atom: atom.aval.shape[-1:])
    n, broadcast = total.invars[0].aval.shape[0], by(row, "broadcast_in_dim", "reshape")
    if (column.aval.shape, row.aval.shape) != ((n, 1), (1, n)) or broadcast is None:
        return False
    if len(broadcast.invars[0].aval.shape) != 1:
        return False

    def whole(atom: Any) -> Any:
        """Return the array that the numbers come from, before changes of shape."""
        while (eqn := by(atom, *_SHAPES)) is not None:
            atom = eqn.invars[0]
        return atom

    if whole(column) is whole(row):  # All pairs of an array with itself are intended.
        return False
    todo, seen = [column], set()
    while todo:  # Go back to the equation that made the column.
        atom = todo.pop()
        eqn = made.get(atom)
        if eqn is None or atom in seen or eqn.primitive.name == "dot_general":
            continue
        seen.add(atom)
        inputs = [atom for atom in eqn.invars if not _jax.is_literal(atom)]
        if eqn.primitive.name in ("broadcast_in_dim", "reshape") and inputs and inputs[0].aval.shape == (n,):
            return False
        todo += [atom for atom in inputs if atom.aval.shape == (n, 1)]
    return True
