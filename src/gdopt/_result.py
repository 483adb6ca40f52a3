"""The results that runs return."""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from gdopt import _html, _jax, _trees
from gdopt._errors import GdoptError, NotConvergedError
from gdopt._settings import as_own_work, own_work
from gdopt._status import Status
from gdopt._types import PyTree

_SECONDS = ("compile_seconds", "run_seconds")
_NOT_COMPARED = ("message", "_evidence", *_SECONDS)  # A message describes the numbers.


def _equal(one: Any, other: Any) -> bool:
    """Tell whether two tuples of one type hold the same numbers; a tuple of arrays by itself cannot tell."""
    return type(one) is type(other) and _trees.same(tuple(one), tuple(other))


def equal_fields(one: Any, other: Any) -> bool:
    """Tell whether two results hold the same numbers, whatever their messages say and however long they took."""
    if type(one) is not type(other):
        return NotImplemented
    names = [field.name for field in dataclasses.fields(one) if field.name not in _NOT_COMPARED]
    return _trees.same([getattr(one, name) for name in names], [getattr(other, name) for name in names])


_NONE = np.zeros(0)  # the entries of what was not recorded


class History(NamedTuple):
    """The record of a run, as NumPy arrays. Entry k of the first three belongs to the point after k updates.

    N updates make N + 1 entries of these. ``learning_rate[k]`` is the rate of the update that was made *from* point k.
    It is NaN for the last point, and for a point at which a claim was withdrawn: the check led from there to the next
    point. An optimizer that owns its rate reports it as ``learning_rate`` in its state, as `spectral` and
    ``optax.lbfgs`` do; for others it is NaN. If the optimizer takes points back, all its trials are here. Their loss
    may be high, infinite or NaN, and their rate is that of the step from the last accepted point.

    With ``validation`` the other fields have an entry for each epoch, and one for a last epoch that is not complete;
    otherwise they are empty. ``validation_loss[k]`` is the validation loss after ``validation_steps[k]`` updates.
    ``validation_metrics`` holds the scalars of the aux there by name, such as "accuracy", and ``metrics`` the mean over
    the batches of the epoch before. A nested aux has names such as "top/accuracy". Arrays in the aux are left out.

    With ``record_params=True`` the field ``params`` holds the params of all points: a tree of NumPy arrays like params,
    in their own units and dtypes, with a leading axis. Entry k belongs to ``loss[k]``. It is a point that the optimizer
    tried, which need not be the best one, nor an average that is returned. None stands for a leaf that is not
    optimised. Without it the field is None.

    Example:
        >>> import gdopt
        >>> gdopt.minimize(lambda x: x**2, 1.0, learning_rate=0.25, max_steps=2).history.loss
        array([1.    , 0.25  , 0.0625], dtype=float32)
        >>> gdopt.minimize(lambda x: x**2, 1.0, learning_rate=0.25, max_steps=2, record_params=True).history.params
        array([1.  , 0.5 , 0.25], dtype=float32)
    """

    loss: np.ndarray
    grad_norm: np.ndarray
    learning_rate: np.ndarray
    validation_loss: np.ndarray = _NONE
    metrics: dict[str, np.ndarray] = {}  # noqa: RUF012
    validation_metrics: dict[str, np.ndarray] = {}  # noqa: RUF012
    validation_steps: np.ndarray = _NONE
    params: PyTree = None

    def __eq__(self, other: object) -> bool:
        return _equal(self, other)

    def __ne__(self, other: object) -> bool:
        return not _equal(self, other)

    __array_ufunc__ = None  # Otherwise NumPy would compare each entry of an array with it.


class Report(NamedTuple):
    """The argument of a callback, between two compiled chunks of a run.

    ``params``, ``loss`` and ``grad_norm`` belong to one point, and ``step`` is the number of updates that led to it:
    the best so far of a full-batch loss, the latest good one with mini-batches, the average if an optimizer keeps one.
    At the steps of ``callback_every`` and at the end of an epoch, the result would return this point if the run stopped
    there. The callback may keep ``params``, which is a copy.

    ``epoch`` is the number of whole epochs so far (steps, for a full batch), and ``epoch_ended`` tells whether one has
    just ended. ``learning_rate`` is the last rate used. ``validation_loss``, ``metrics`` and ``validation_metrics`` are
    those of the last epoch that ended: see `History`. They are NaN and empty before, and without ``validation``: only a
    run with one records the aux of each step.

    Example:
        >>> import gdopt
        >>> def good_enough(report):
        ...     return report.loss < 0.9
        >>> gdopt.minimize(lambda x: x**2, 1.0, learning_rate=1e-4, callback=good_enough).status.name
        'STOPPED'
    """

    step: int
    epoch: int
    params: PyTree
    loss: float
    grad_norm: float
    learning_rate: float
    epoch_ended: bool = False
    validation_loss: float = math.nan
    metrics: dict[str, float] = {}  # noqa: RUF012
    validation_metrics: dict[str, float] = {}  # noqa: RUF012

    def __repr__(self) -> str:
        epoch = f"{self.epoch}{', which has just ended' if self.epoch_ended else ''}"
        rows = {"step": str(self.step), "epoch": epoch, "loss": _number(self.loss, ".6g")}
        rows["grad_norm"] = _number(self.grad_norm, ".3g")
        if not math.isnan(self.learning_rate):  # quasi_newton has none.
            rows["learning_rate"] = _number(self.learning_rate, ".3g")
        if not math.isnan(self.validation_loss):
            rows["validation_loss"] = _number(self.validation_loss, ".6g")
        for name, found in {"metrics": self.metrics, "validation_metrics": self.validation_metrics}.items():
            if found:
                rows[name] = ", ".join(f"{key} {_number(value, '.4g')}" for key, value in found.items())
        return table("gdopt.Report", {**rows, "params": _trees.summary(self.params)})

    def __eq__(self, other: object) -> bool:
        return _equal(self, other)

    def __ne__(self, other: object) -> bool:
        return not _equal(self, other)

    __array_ufunc__ = None  # Otherwise NumPy would compare each entry of an array with it.


class Refinement(NamedTuple):
    """The losses of a suggestion and its neighbours, trained side by side on the same batches.

    ``loss[k]`` is the mean loss of the last steps with the constant rate ``learning_rate[k]``; infinite if the run
    ended early.

    Example:
        >>> import gdopt, jax.numpy as jnp
        >>> test = gdopt.lr_find(lambda x: jnp.sum(x**2), jnp.ones(3), refine=True)
        >>> len(test.refinement.learning_rate), test.refinement.best == test.suggestion
        (4, True)
    """

    learning_rate: np.ndarray
    loss: np.ndarray

    def __eq__(self, other: object) -> bool:
        return _equal(self, other)

    def __ne__(self, other: object) -> bool:
        return not _equal(self, other)

    __array_ufunc__ = None  # Otherwise NumPy would compare each entry of an array with it.

    @property
    def best(self) -> float:
        """The rate with the lowest loss."""
        return float(self.learning_rate[np.argmin(self.loss)])


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class RangeTest:
    """The losses of a range test, rate by rate, and the rate that they suggest.

    As in a `History`, all entries k belong to the same point. ``loss[k]`` is the loss there, on the batch whose
    gradient made the step with ``learning_rate[k]``. Entry 0 is the start.

    Attributes:
        learning_rate: (n,) the rates tried, until the last repeat ended.
        loss: (n,) the mean over the repeats; NaN once the first of them ended.
        smoothed_loss: (n,) its exponential moving average, with a factor of 0.9 and bias-corrected; the rules read it.
        losses: (repeats, n) the losses of each repeat; NaN once it ended.
        smoothed_losses: (repeats, n) their moving averages.
        status: the reason why it stopped. DIVERGED is the blow-up that a range test ends with: a smoothed loss is four
            times its best and above its first. NON_FINITE: a loss or gradient became infinite or NaN. MAX_STEPS: the
            last rate was tried.
        message: a sentence that says so, with the suggestion, or with what to change to get one.
        suggestion: the rate to use; None if the curve offers none.
        suggestions: by rule, on ``smoothed_loss``. "basin", the middle of the basin around the minimum, is the default.
            "steep", "valley", "slide" and "minimum" are fastai's, and None if they have too few points.
        refinement: a `Refinement` with ``refine=True``, whose best rate is then the suggestion; else None.
    """

    learning_rate: np.ndarray
    loss: np.ndarray
    smoothed_loss: np.ndarray
    losses: np.ndarray
    smoothed_losses: np.ndarray
    status: Status
    message: str
    suggestion: float | None
    suggestions: dict[str, float | None]
    refinement: Refinement | None

    def __eq__(self, other: object) -> bool:
        return equal_fields(self, other)

    __array_ufunc__ = None  # Otherwise NumPy would compare each entry of an array with it.

    def _rows(self) -> dict[str, str]:
        rates = {"suggestion": self.suggestion, **self.suggestions}
        told = {name: "none" if rate is None else _number(rate, ".3g") for name, rate in rates.items()}
        rows = {"status": ends(self.status), "message": self.message, "suggestion": told.pop("suggestion")}
        rows["by rule"] = ", ".join(f"{name} {rate}" for name, rate in told.items())
        return rows

    def __repr__(self) -> str:
        return table("gdopt.RangeTest", self._rows())

    def _repr_html_(self) -> str:
        return _html.table("gdopt.RangeTest", self._rows(), self.smoothed_loss, "smoothed loss by rate")


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Result:
    """The params that a run found, and how it ended.

    A pytree: you can pass it to ``jit``, ``vmap`` and the like, and return it from them. Inside these all numbers
    become arrays (with a leading axis after a vmap), ``status`` holds the number of a `Status`, and ``message`` is
    lost. If `minimize` was called inside these, there is no history either, because its length is not known.

    After a vmap it holds many runs: ``result[3]`` is one of them, ``result[2:5]`` are some, ``len(result)`` counts
    them, and a loop goes through them. Two results are equal if all their numbers are. NaN equals NaN, and neither the
    seconds nor the messages count.

    Attributes:
        params: the best point of a full-batch loss, the last one with mini-batches; after a failure, the best or the
            last good one. With ``validation``, the point with the lowest validation loss, whatever ended the run. They
            have the structure, dtypes and containers of the params that were given.
        loss: the loss of ``params`` (with mini-batches, on a single batch). It is the training loss also with
            ``validation``.
        grad_norm: the 2-norm of the gradient at ``params``, over all trainable leaves; with ``scale`` the gradient by
            ``params / scale``. With bounds it is that of the projected gradient, ``x - P(x - g)``; with ``project`` or
            ``prox`` that of ``(x - P(x - t g)) / t``, with a t that makes the step as long as params.
        steps: the updates made. The loss was evaluated ``steps + 1`` times.
        status: a `Status`; ``Status(int(result.status))`` after a jit.
        message: a sentence that says what happened and, if that helps, what to try.
        success: whether the run ended as asked: CONVERGED, PRECISION_LIMIT, TARGET_REACHED or EARLY_STOPPED. For a
            noisy loss without a target also MAX_STEPS, if nothing else was asked for and the mean loss of the last
            epoch is at most the loss of the start. STOPPED is one, too, unless the run stands above its start.
        left: an estimate of what is left to gain at ``params``, in units of the loss: the gain of the next step of
            Newton's method, or the rounding of the loss there, if that is more. At a kink the gradients around it give
            the estimate. NaN if it is not known.
        verified: whether ``left`` was checked at ``params`` at the end, by the curvature of the loss or, at a kink, by
            neighbours drawn at random and the gradients around it. Their evaluations are not among the steps.
        history: a `History`; None inside jit, vmap and grad.
        steps_per_epoch: the updates of an epoch of mini-batches (for a stream, of its first pass; 1 for a loss with
            keys alone). None for a deterministic loss, and for a stream that did not reach its end.
        range_test: the `RangeTest` by which ``learning_rate="auto"`` chose the rate; None if there was none.
        aux: the second value that the loss returned at ``params``; None without ``has_aux``.
        compile_seconds: spent before the loop: tracing, compiling (near zero if an equal program ran before), and the
            range test if there was one.
        run_seconds: spent in the loop.
        state: the model's state that belongs to ``params``: evaluate them with it, or pass both to go on. With the last
            params it is the newest one, from the batch of the last update. None without ``state``.
        optimizer_state: the optimizer's state after the last update, as ``optimizer.init`` makes it for the params that
            are optimised (None in place of the others). Pass it to `minimize` to go on with it. It holds the arrays of
            the run, without a copy: with Adam twice the memory of the params, as long as the result lives. After a
            failure it may hold NaN.
        at_bounds: with ``bounds``, arrays of bools like params that tell which entries are at their bounds, False in
            place of leaves that are not optimised. None without bounds.

    Example:
        >>> import gdopt
        >>> result = gdopt.minimize(lambda x: (x - 3.0) ** 2, 0.0, learning_rate=0.4)
        >>> result.status.name, round(float(result.params), 2)
        ('CONVERGED', 3.0)
    """

    params: PyTree
    loss: float
    grad_norm: float
    steps: int
    status: Status
    message: str
    success: bool
    left: float
    verified: bool
    history: History | None
    steps_per_epoch: int | None
    range_test: RangeTest | None
    aux: Any
    compile_seconds: float
    run_seconds: float
    state: PyTree = None
    optimizer_state: PyTree = None
    at_bounds: PyTree = None
    # The record that `diagnose` needs, if the last evaluation was not finite: no child of the pytree, and not pickled.
    _evidence: Any = None

    def __eq__(self, other: object) -> bool:
        return equal_fields(self, other)

    __array_ufunc__ = None  # Otherwise NumPy would compare each entry of an array with it.

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_evidence": None}

    def __copy__(self) -> Result:
        return dataclasses.replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Result:
        # Nothing changes the record, which may be as large as the data. A copied function would not equal the original.
        copied = lambda leaf: copy.deepcopy(leaf, memo) if _trees.is_array(leaf) else leaf
        fields = {name: jax.tree.map(copied, getattr(self, name)) for name in _numbers_of(Result)}
        return dataclasses.replace(self, **fields)

    def __bool__(self) -> bool:
        return True  # also with no runs, and of a single run, which has no length

    def __len__(self) -> int:
        return self._runs()[0]

    def __iter__(self) -> Iterator[Result]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, index: int | slice) -> Result:
        """Return one run of many side by side, or some of them."""
        runs, count = self._runs(), len(self)
        if isinstance(index, slice):
            return self._part(index, self.message)
        if not hasattr(index, "__index__"):
            cure = "result[0][1] for two axes" if isinstance(index, tuple) else "result[3] or result[2:5]"
            raise TypeError(f"index={index!r} is not a whole number or a slice. Pass one ({cure}).")
        number = operator.index(index)
        if not -count <= number < count:
            raise IndexError(f"the result holds {count} runs, so there is no run {number}.")
        number %= count
        if len(runs) > 1 or _jax.is_tracer(self.status):
            return self._part(number, NO_MESSAGE)
        return self._part(number, f"run {number} of {count}. Its sentence was {_LOST}.")._with_numbers()

    def _runs(self) -> tuple[int, ...]:
        """Return how many runs it holds, along each axis."""
        shape = np.shape(self.status)
        if not shape:
            raise TypeError("the result is of a single run. Only a result of many, as a vmap returns it, has parts.")
        return shape

    @as_own_work
    def _part(self, index: int | slice, message: str) -> Result:
        fields = {name: getattr(self, name) for name in _numbers_of(Result)}
        return Result(**jax.tree.map(lambda leaf: leaf[index], fields), message=message)

    def _with_numbers(self) -> Result:
        """Return it with Python's numbers, as of a run outside of transformations."""
        kinds = {"loss": float, "grad_norm": float, "left": float, "steps": int, "success": bool, "verified": bool}
        kinds |= {"status": _as_status, "steps_per_epoch": int} | dict.fromkeys(_SECONDS, float)
        with own_work():
            found = jax.device_get({name: getattr(self, name) for name in [*kinds, "history"]})
        numbers = {name: None if found[name] is None else kind(found[name]) for name, kind in kinds.items()}
        return dataclasses.replace(self, **numbers, history=found["history"])

    def raise_for_status(self) -> Result:
        """Return this result if the run ended with success; raise an error if not.

        Raises:
            NotConvergedError: if the run had no success. It has the message, and the result as its ``result``. For many
                runs side by side, the message counts them by how they ended.

        Example:
            >>> import gdopt
            >>> gdopt.minimize(lambda x: x**2, 1.0, learning_rate=0.4).raise_for_status().success
            True
        """
        if _jax.is_tracer(self.success):
            raise GdoptError("raise_for_status was called inside jit, vmap or grad, where nothing can be raised yet.")
        status, success = jax.device_get((self.status, self.success))
        if np.all(success):
            return self
        if np.ndim(status) == 0:
            raise NotConvergedError(f"{Status(int(status))}: {self.message}", self)
        failed = np.asarray(status)[~np.asarray(success)]
        message = f"{failed.size} of {np.size(success)} runs ended without success: {ends(failed)}."
        raise NotConvergedError(message, self)

    def _titled_rows(self) -> tuple[str, dict[str, str]]:
        shape = np.shape(self.status)
        rows = {
            "status": ends(self.status),
            "message": self.message,
            "loss": _number(self.loss, ".6g"),
            "grad_norm": _number(self.grad_norm, ".3g"),
            "steps": _number(self.steps, ""),
            "params": _trees.summary(self.params),
        }
        if self.aux is not None:
            rows["aux"] = _trees.summary(self.aux)
        many = f" of {' x '.join(map(str, shape))} runs" if shape else ""
        return f"gdopt.Result{many}", rows

    def __repr__(self) -> str:
        return table(*self._titled_rows())

    def _repr_html_(self) -> str:
        losses = getattr(self.history, "loss", None)
        return _html.table(*self._titled_rows(), losses, "loss by step")


_LOST = "lost in jit, vmap, grad or tree.map, which keep only numbers"
NO_MESSAGE = f"{_LOST}: status is the number of a gdopt.Status."


def _as_status(code: Any) -> int:
    """Return the status with this number; the number if there is none."""
    try:
        return Status(int(code))
    except ValueError:  # Arithmetic with results may make any number.
        return int(code)


class _Sentence:
    """The message of a result, as the part of a pytree that is no leaf.

    All messages count as equal. So two results have one structure, and jit compiles nothing for another message. A
    message belongs to the numbers that it describes; beside other numbers, `NO_MESSAGE` replaces it. The same goes for
    the record that `diagnose` needs. A reference to the result does not keep it alive: jit keeps structures, and would
    keep the data of a run with them.
    """

    def __init__(self, result: Any, numbers: list[Any]):
        self._text, self._of, self._result = result.message, _as_text(numbers), weakref.ref(result)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Sentence)

    def __hash__(self) -> int:
        return hash(_Sentence)

    def beside(self, numbers: list[Any]) -> dict[str, Any]:
        """Return the fields that describe these numbers; `NO_MESSAGE` if they describe others."""
        if self._of is None or self._of != _as_text(numbers):
            return {"message": NO_MESSAGE}
        evidence = getattr(self._result(), "_evidence", None)
        return {"message": self._text} | ({} if evidence is None else {"_evidence": evidence})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_result": _nothing}


def _as_text(numbers: list[Any]) -> str | None:
    """Return scalars as text to be compared; None if one is no number (for example a tracer)."""
    try:
        scalars = jax.device_get(numbers)
        single = all(np.ndim(x) == 0 for x in scalars)
        return repr([x if x is None else float(x) for x in scalars]) if single else None
    except Exception:  # A pytree's leaves may be anything.
        return None


def _nothing() -> None:
    """Stand for a reference to a result that is gone."""


def _numbers_of(cls: type) -> list[str]:
    """Return the names of the fields that are children of the pytree."""
    return [field.name for field in dataclasses.fields(cls) if field.name not in ("message", "_evidence")]


def _make_pytree(cls: type, *telling: str) -> None:
    """Register a class as a pytree. All fields are children but the message, which describes those ``telling``."""
    names = _numbers_of(cls)

    def flatten(result: Any) -> tuple[list[tuple[Any, Any]], _Sentence]:
        told = _Sentence(result, [getattr(result, name) for name in telling])
        return [(jax.tree_util.GetAttrKey(name), getattr(result, name)) for name in names], told

    def unflatten(told: _Sentence, children: Iterable[Any]) -> Any:
        fields = dict(zip(names, children, strict=True))
        return cls(**fields, **told.beside([fields[name] for name in telling]))

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)


_make_pytree(RangeTest, "status", "suggestion")
_make_pytree(Result, "status", "steps", "loss")


def ends(status: Any) -> str:
    """Return the name of a status; for many, the number of runs that ended in each way."""
    try:
        codes = np.asarray(jax.device_get(status))
        if codes.ndim == 0:
            return Status(codes.item()).name
        found = zip(*np.unique(codes, return_counts=True), strict=True)
        return ", ".join(f"{Status(code.item())} ({count})" for code, count in found)
    except Exception:  # A leaf may be traced, or replaced by anything else.
        return _trees.summary(status)


def _number(value: Any, spec: str) -> str:
    try:
        return format(np.asarray(jax.device_get(value)).item(), spec)
    except Exception:
        return _trees.summary(value)


def table(title: str, rows: dict[str, str]) -> str:
    """Format a title, and below it a row for each name."""
    width = max(map(len, rows)) + 1
    return "\n".join([title, *(f"  {name:{width}}{value}" for name, value in rows.items())])
