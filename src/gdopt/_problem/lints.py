"""Warnings of losses that probably do not mean what they compute, judged by their traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from gdopt import _jax
from gdopt._checks import warn
from gdopt._compile.program import value_and_grad
from gdopt._compile.replays import trace
from gdopt._devices.sharding import anywhere
from gdopt._problem.problem import Problem
from gdopt._types import PyTree


def warn_of_no_gradient(problem: Problem) -> None:
    """Warn, after a gradient that was exactly zero at the start, if the loss does not use the params at all."""
    key = problem.key if problem.with_key else None
    grad = lambda *given: value_and_grad(problem.value)(*given)[1]
    given = problem.objective.params, problem.batch, problem.args, key, problem.state
    try:
        depends = _depends(grad, *given)
    except Exception as error:  # The run had these arrays in other places.
        if not _jax.misplaced(error):
            raise
        depends = _depends(grad, *jax.tree.map(anywhere, given))
    if not depends:
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


class _Made:
    """The equations of a trace by what they make."""

    def __init__(self, jaxpr: Any):
        self._made = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}

    def by(self, atom: Any, *names: str) -> Any:
        """Return the equation that made an atom, if it is one of these; of any name if none is given."""
        eqn = None if _jax.is_literal(atom) else self._made.get(atom)
        return eqn if eqn is not None and (not names or eqn.primitive.name in names) else None

    def whole(self, atom: Any) -> Any:
        """Return the array that the numbers come from, before changes of shape."""
        while (eqn := self.by(atom, *_SHAPES)) is not None:
            atom = eqn.invars[0]
        return atom

    def squared(self, total: Any) -> Any:
        """Return the equation of the difference whose squares are summed, if it is one."""
        summed = total.invars[0]
        while (scaled := self.by(summed, "mul")) is not None and _jax.is_literal(scaled.invars[0]):
            summed = scaled.invars[1]  # The square may be halved.
        square = self.by(summed, "square", "integer_pow", "mul")
        if square is None or square.params.get("y", 2) != 2 or square.invars[0] is not square.invars[-1]:
            return None
        return self.by(square.invars[0], "sub")

    def is_column_of_a_vector(self, column: Any, n: int) -> bool:
        """Tell whether a vector of n entries was made a column on the way to this one."""
        todo, seen = [column], set[Any]()
        while todo:
            atom = todo.pop()
            eqn = self.by(atom)
            if eqn is None or atom in seen or eqn.primitive.name == "dot_general":
                continue
            seen.add(atom)
            inputs = [atom for atom in eqn.invars if not _jax.is_literal(atom)]
            if eqn.primitive.name in ("broadcast_in_dim", "reshape") and inputs and inputs[0].aval.shape == (n,):
                return True
            todo += [atom for atom in inputs if atom.aval.shape == (n, 1)]
        return False


def _is_all_pairs(total: Any, jaxpr: Any) -> bool:
    made = _Made(jaxpr)
    difference = made.squared(total)
    if difference is None:
        return False
    column, row = sorted(difference.invars, key=lambda atom: atom.aval.shape[-1:])
    n, broadcast = total.invars[0].aval.shape[0], made.by(row, "broadcast_in_dim", "reshape")
    if (column.aval.shape, row.aval.shape) != ((n, 1), (1, n)) or broadcast is None:
        return False
    if len(broadcast.invars[0].aval.shape) != 1:
        return False
    # All pairs of an array with itself are intended.
    return made.whole(column) is not made.whole(row) and not made.is_column_of_a_vector(column, n)
