"""The origin of NaN and infinity, found by computing the step that ended a run again, operation by operation."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _error_notes, _html, _jax, _trees
from gdopt._compile import replays
from gdopt._compile.program import value_and_grad
from gdopt._devices.current import on_auto_axes
from gdopt._devices.sharding import on_one_mesh
from gdopt._errors import InputError
from gdopt._outcome import nan_search
from gdopt._problem.problem import Problem
from gdopt._result import History, Result, ends, equal_fields, table
from gdopt._settings import as_own_work, own_work
from gdopt._status import Status
from gdopt._types import PyTree

_NAMED = 3  # the most leaves that a message names
_SHOWN = 6  # the most entries of an array that a message shows


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Diagnosis:
    """The operation that made the loss of a run, or its gradient, NaN or infinite.

    Attributes:
        step: the number of the evaluation, as in ``Result.steps``.
        learning_rate: of the update that led to it; None at the start, and if the optimizer does not report it.
        leaves: the paths of the params that are not finite there (such as ``"params['w']"``). If all params are finite,
            the paths of those whose gradient is not.
        primitive: JAX's name of the operation that made the first NaN or, without a NaN, the first infinity: ``"log"``.
            None if no operation of the loss did: the update before made the params infinite, or it was in the data.
        place: the line of your code that the operation comes from, with its file and function; for an operation of the
            gradient, the line whose gradient it is. None if there is none.
        message: all of this in sentences, and what to try.

    Example:
        >>> import gdopt, jax.numpy as jnp
        >>> result = gdopt.minimize(lambda x: jnp.sum(jnp.sqrt(x)), jnp.ones(2), learning_rate=1.5)
        >>> found = gdopt.diagnose(result)
        >>> found.step, found.primitive, found.leaves
        (2, 'sqrt', ('params',))
    """

    step: int
    learning_rate: float | None
    leaves: tuple[str, ...]
    primitive: str | None
    place: str | None
    message: str

    def __eq__(self, other: object) -> bool:
        return equal_fields(self, other)

    __array_ufunc__ = None  # Otherwise NumPy would compare each entry of an array with it.

    def __hash__(self) -> int:
        return hash((self.step, self.leaves, self.primitive, self.place))  # The rate may be NaN.

    def _rows(self) -> dict[str, str]:
        rate = "none" if self.learning_rate is None else f"{self.learning_rate:.3g}"
        rows = {"step": f"{self.step}", "learning_rate": rate, "leaves": ", ".join(self.leaves) or "none"}
        rows |= {"primitive": self.primitive or "none", "place": self.place or "none", "message": self.message}
        return rows

    def __repr__(self) -> str:
        return table("gdopt.Diagnosis", self._rows())

    def _repr_html_(self) -> str:
        return _html.table("gdopt.Diagnosis", self._rows())


class Evidence(NamedTuple):
    """An evaluation that was not finite, ready to be computed again."""

    step: int
    learning_rate: float | None
    trace: Any  # the trace of ((loss, aux), gradient)
    arguments: list[Any]
    names: list[str]  # the names of the arguments, those of params first
    outputs: list[str]  # the names of the outputs; "" for those of aux
    bad_params: list[str]  # the paths of leaves
    bad_gradients: list[str]
    bad_inputs: list[str]  # the paths of data, args and frozen params that brought in NaN or infinity

    @property
    def leaves(self) -> list[str]:
        """The params that are not finite or else those whose gradient is not."""
        return self.bad_params or self.bad_gradients

    @property
    def sentence(self) -> str:
        """The sentence for a run's message."""
        if self.bad_inputs:
            return f" {_hold(self.bad_inputs)} {'NaN' if self._holds_nan(self.bad_inputs) else 'infinity'}."
        if not self.leaves:
            return " gdopt.diagnose(result) finds the cause."
        some, verb = _some(self.leaves), "is" if len(self.leaves) == 1 else "are"
        what = f"{some} {verb} not finite" if self.bad_params else f"the gradient of {some} is not finite"
        return f" There {what}; gdopt.diagnose(result) finds the cause."

    @property
    def cure(self) -> str:
        """The advice for a run's message; "" if there is none."""
        if self.bad_inputs:
            what = "NaN" if self._holds_nan(self.bad_inputs) else "infinite"
            return f"Leave out what is {what}, or fill it; gdopt.diagnose(result) says where it is."
        if self.learning_rate is not None and not np.isfinite(self.learning_rate):
            return "Correct the schedule."
        if not self.bad_params:
            return ""
        cure = "Try a smaller learning rate, or an optimizer that clips gradients"
        if self._holds_nan(self.bad_params):
            cure += "; if a gradient is zero, an optimizer that divides by its size needs an eps above 0"
        return f"{cure}."

    @as_own_work
    def _holds_nan(self, names: list[str]) -> bool:
        return any(nan_search.is_nan(self.arguments[self.names.index(name)]) for name in names)


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more {'leaf' if more == 1 else 'leaves'}" if more > 0 else "")


def _hold(names: list[str]) -> str:
    return f"{_some(names)} {'holds' if len(names) == 1 else 'hold'}"


def _named(**trees: PyTree) -> list[tuple[str, Any]]:
    """Return the leaves with their paths."""
    leaves = [(root, leaf) for root, tree in trees.items() for leaf in jax.tree_util.tree_leaves_with_path(tree)]
    return [(_trees.path_name(path, root), leaf) for root, (path, leaf) in leaves]


def make_evidence(problem: Problem, params: PyTree, given: tuple, step: int, rate: float | None) -> Evidence | None:
    """Collect the facts on a step whose loss or gradient is not finite.

    Return None if that step cannot be computed again: the result matters more than its explanation.
    """
    try:
        rest = problem.objective.rest
        trace, out = problem.record or recorded(problem, params, given)
        params = problem.objective.natural(params)
        named, whole = _named(params=params), _named(params=rest.combine(params))
        count = len(named)
        named += [(name, held) for (name, _), held in zip(whole, rest.arrays, strict=True) if held is not None]
        named += _named(**dict(zip(("data", "args", "key", "state"), given, strict=True)))
        names, arguments = [name for name, _ in named], [leaf for _, leaf in named]
        (_, aux), _ = out
        outputs = ["the loss"] + [""] * len(jax.tree.leaves(aux))
        outputs += [f"the gradient of {name}" for name in names[:count]]

        @jax.jit
        def finite(constants: list, arguments: list) -> list[list]:
            """Tell which params and gradients are finite, and whether the loss is, in one program, as in the run."""
            value, *results = replays.as_it_is(trace, arguments, constants)
            some = arguments[:count], results[-count:], [value]
            return [[jnp.isfinite(leaf).all() for leaf in leaves] for leaves in some]

        here, gradient, _ = finite(_jax.consts(trace), arguments)
        bad = lambda flags: [name for name, flag in zip(names, flags, strict=False) if not flag]
        bad_inputs = [name for name, leaf in named[count:] if nan_search.is_bad(leaf)]
        if bad_inputs and (problem.noisy or step == 0):
            filled = [nan_search.filled(leaf) if name in bad_inputs else leaf for name, leaf in named]
            # The loss may mask them out, or they may be intended. They are to blame if it is finite without them.
            bad_inputs = bad_inputs if all(itertools.chain(*finite(_jax.consts(trace), filled))) else []
        else:  # They did no harm at the start.
            bad_inputs = []
        return Evidence(step, rate, trace, arguments, names, outputs, bad(here), bad(gradient), bad_inputs)
    except Exception:
        return None


def recorded(problem: Problem, params: PyTree, given: tuple) -> tuple[Any, PyTree]:
    """Trace ((loss, aux), gradient) anew, because the trace of the loop has lost the lines of its source.

    Return the shapes of the outputs, too. Its arguments are params, the arrays that are carried along with them, and
    those ``given``.
    """
    objective = problem.objective
    rest, params = objective.rest, objective.natural(params)
    problem = problem._replace(objective=objective._replace(params=objective.natural(objective.params), sizes=None))

    def value(params: PyTree, held: tuple, *given: Any) -> Any:
        objective = problem.objective._replace(rest=dataclasses.replace(rest, arrays=held))
        return problem._replace(objective=objective).value(params, *given)

    return replays.trace(value_and_grad(value), params, rest.arrays, *given)


@as_own_work
def named_inputs(problem: Problem) -> str:
    """Return a sentence on the data and args that hold NaN; "" if none does."""
    trees, _ = on_one_mesh({"data": problem.data, "args": problem.args})  # the places in which the run had them
    names = [name for name, leaf in _named(**trees) if nan_search.is_nan(leaf)]
    return f" {_hold(names)} NaN. Leave it out, or fill it." if names else ""


@on_auto_axes
def diagnose(result: Result) -> Diagnosis:
    """Find the operation that made the loss or its gradient NaN or infinite, by computing that step again.

    It computes each operation of the loss and of its gradient by itself, and follows the first NaN or infinity back to
    the operation that made it, through jit, checkpoint, cond, scan and while. That takes seconds, and the memory of all
    intermediate values. It finds nothing if only the compiled program, which rounds differently, became infinite.

    Args:
        result: one that ended with NON_FINITE. It holds the params of that point and the data of that step.

    Returns:
        A `Diagnosis`. If there are several processes, all have to call it.

    Raises:
        InputError: for any other result: one that ended well, one that was made inside jit, vmap or grad or passed
            through them, and one that was pickled, because a pickle holds neither the loss nor the data. Copies made
            by ``copy`` or ``jax.device_get`` keep the record.

    Example:
        >>> import gdopt, jax.numpy as jnp
        >>> def loss(w):
        ...     return jnp.sum(w - jnp.log(w))
        >>> result = gdopt.minimize(loss, jnp.full(3, 2.0), learning_rate=5.0)
        >>> result.status.name, gdopt.diagnose(result).primitive
        ('NON_FINITE', 'log')
    """
    if not isinstance(result, Result):
        raise InputError(f"result={result!r} is not a gdopt.Result. Pass what gdopt.minimize returned.")
    if np.ndim(result.status):
        raise InputError(
            f"result holds {len(result)} runs side by side, which leave no record. Call gdopt.minimize for one of them "
            "by itself, outside of jit and vmap, and pass its result."
        )
    if result.history is None:
        raise InputError(
            "result is of a run inside jit, vmap or grad, which leaves no record. Call gdopt.minimize outside of these."
        )
    ended = ends(result.status)
    if ended != Status.NON_FINITE.name:
        raise InputError(f"result ended with {ended}, not with NON_FINITE: there is nothing to diagnose.")
    case: Evidence | None = result._evidence  # pyright: ignore[reportPrivateUsage]
    if case is None:
        raise InputError(
            "result holds no record of its last step: either it was pickled, or it went through jit, vmap or grad, or "
            "that step could not be computed again. Call gdopt.minimize again (for example from result.params), and "
            "pass its result."
        )
    with own_work():
        primitive, place, message = _of_update(case, result.history) if case.bad_params else _of_loss(case)
    return Diagnosis(case.step, case.learning_rate, tuple(case.leaves), primitive, place, message)


def _of_update(case: Evidence, history: History) -> tuple[None, None, str]:
    name = case.bad_params[0]
    array, norm = case.arguments[case.names.index(name)], history.grad_norm[case.step - 1]
    rate = "" if case.learning_rate is None else f" with the learning rate {case.learning_rate:.3g}"
    return (
        None,
        None,
        f"At step {case.step} {name} is {_shown(array)} before anything is computed: the update{rate} made it from a "
        f"gradient of norm {norm:.3g} at the step before. {case.cure}",
    )


def _of_loss(case: Evidence) -> tuple[str | None, str | None, str]:
    """Return the primitive, its place, and the message."""
    values = replays.as_it_is(case.trace, case.arguments)
    bad = [number for number, name in enumerate(case.outputs) if name and not jnp.isfinite(values[number]).all()]
    if not bad:
        return (
            None,
            None,
            f"At step {case.step} the loss and its gradient are finite when each operation is computed by itself: the "
            "compiled program rounds differently, and left the range of the dtype. Scale the loss, or use float64.",
        )
    number = bad[0]
    found, source = nan_search.origins(case.trace, case.arguments, number)
    told = [f"At step {case.step} {case.outputs[number]} is {_kind(values[number])}."]
    told += [_told(origin, "The first" if origin is found[0] else "The") for origin in found]
    if source is not None:
        told.append(f"{'It' if not found else 'That'} comes from {case.names[source]}: {_where(case, source)}.")
    made = next((origin for origin in found if origin.primitive), None)
    if made is None:
        return None, None, " ".join(told)
    if number > 0 and _kind(made.value) == "NaN":
        told.append(
            "The loss is finite there, but in its gradient NaN times zero is NaN. If it comes from the branch that a "
            "jnp.where did not pick, give that branch a harmless argument. Otherwise keep away from that point (for "
            "example with jnp.sqrt(x + 1e-12))."
        )
    return made.primitive, _error_notes.line(made.lines), " ".join(told)


def _told(origin: nan_search.Origin, which: str) -> str:
    if origin.primitive is None:
        return f"A constant of the loss is {_kind(origin.value)}: {_shown(origin.value)}."
    what = "NaN" if _kind(origin.value) == "NaN" else "infinity"
    of = " and ".join(map(_shown, origin.inputs)) or "nothing"
    line = _error_notes.line(origin.lines)
    at = "" if line is None else f", in the gradient of {line}" if origin.backward else f", at {line}"
    return f"{which} {what} was made by {origin.primitive} from {of}{at}."


def _where(case: Evidence, number: int) -> str:
    """Say which entries of an argument are not finite."""
    array = case.arguments[number]
    if not jnp.shape(array):
        return f"it is {array}"
    count = int((~jnp.isfinite(array)).sum())
    first = jnp.unravel_index(jnp.argmax(~jnp.isfinite(array)), array.shape)
    at = ", ".join(str(int(place)) for place in first)
    return f"{count} of its {array.size} entries {'is' if count == 1 else 'are'} not finite, the first at [{at}]"


def _kind(value: Any) -> str:
    return "NaN" if nan_search.is_nan(value) else "infinite"


def _shown(value: Any) -> str:
    """Show a few numbers as they are, and many by their dtype, shape and range."""
    array = jnp.asarray(value)
    if array.size <= _SHOWN and array.is_fully_addressable:
        form: Any = {"float_kind": "{:.4g}".format}
        return np.array2string(np.asarray(array), separator=", ", formatter=form).replace("\n", "")
    text = f"{array.dtype.name}{list(array.shape)}"
    if not array.size or not jnp.issubdtype(array.dtype, jnp.floating):
        return text
    return f"{text} from {float(jnp.nanmin(array)):.3g} to {float(jnp.nanmax(array)):.3g}" + (
        " with NaN" if nan_search.is_nan(array) else ""
    )
