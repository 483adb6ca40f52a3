"""What comes back from a run."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from gdopt import _jax, _trees
from gdopt._types import PyTree
from gdopt.errors import GdoptError, NotConvergedError
from gdopt.stopping import Status


class History(NamedTuple):
    """One entry per evaluation, as NumPy arrays; all three of entry k are of the same point, the one after k updates.

    N updates make N + 1 entries. ``learning_rate[k]`` is the rate of the update that was made *from* point k; the last
    point has none: NaN. An optimizer that owns its rate tells it by a ``learning_rate`` in its state, as `spectral` and
    ``optax.lbfgs`` do; else NaN. Of a rate that is found at each step all trials are here, also those that were taken
    back: their loss may be high, infinite or NaN, and their rate is that of the step from the last accepted point.

    Example:
        >>> import gdopt
        >>> gdopt.minimize(lambda x: x**2, 1.0, learning_rate=0.25, max_steps=2).history.loss
        array([1.    , 0.25  , 0.0625], dtype=float32)
    """

    loss: np.ndarray
    grad_norm: np.ndarray
    learning_rate: np.ndarray


class Report(NamedTuple):
    """What a callback gets, between two compiled chunks of a run.

    ``params``, ``loss`` and ``grad_norm`` belong to one point: the best so far of a full-batch loss, the latest good
    one with mini-batches. ``params`` is a copy that the callback may keep. ``step`` is the number of updates made so
    far, ``epoch`` the number of whole epochs (steps, for a full batch), ``learning_rate`` the last rate used.

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


class Refinement(NamedTuple):
    """What the neighbours of a suggestion came to when they were trained side by side on the same batches.

    ``loss[k]`` is the mean loss of the last steps with the constant rate ``learning_rate[k]``; infinite where the run
    did not last.

    Example:
        >>> import gdopt, jax.numpy as jnp
        >>> test = gdopt.lr_find(lambda x: jnp.sum(x**2), jnp.ones(3), refine=True)
        >>> len(test.refinement.learning_rate), test.refinement.best == test.suggestion
        (4, True)
    """

    learning_rate: np.ndarray
    loss: np.ndarray

    @property
    def best(self) -> float:
        """The rate with the lowest loss."""
        return float(self.learning_rate[np.argmin(self.loss)])


@dataclasses.dataclass(frozen=True, repr=False)
class RangeTest:
    """What a range test found, rate by rate.

    As in a `History`, all entries k are of the same point: ``loss[k]`` is the loss there, on the batch whose gradient
    the step with ``learning_rate[k]`` was made with. Entry 0 is the start.

    Attributes:
        learning_rate: (n,) the rates tried, up to where the last repeat ended.
        loss: (n,) the mean over the repeats; NaN from where the first of them ended.
        smoothed_loss: (n,) its exponential moving average, with a factor of 0.9 and bias-corrected; the rules read it.
        losses: (repeats, n) the losses of each repeat; NaN from where it ended.
        smoothed_losses: (repeats, n) their moving averages.
        status: why it stopped: DIVERGED at the blow-up that a range test ends with, where a smoothed loss is four times
            its best and above where it began; NON_FINITE where a loss or gradient became infinite or NaN; MAX_STEPS at
            the last rate.
        message: a sentence that says so, with the suggestion, or what to change to get one.
        suggestion: the rate to use; None where the curve offers none.
        suggestions: by rule, on ``smoothed_loss``: "basin", the middle of the basin around the minimum, is the default;
            "steep", "valley", "slide" and "minimum" are fastai's, and None where they have too few points.
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

    def __repr__(self) -> str:
        by_rule = ", ".join(f"{n} {'none' if r is None else f'{r:.3g}'}" for n, r in self.suggestions.items())
        rows = {
            "status": self.status.name,
            "message": self.message,
            "suggestion": "none" if self.suggestion is None else f"{self.suggestion:.3g}",
            "by rule": by_rule,
        }
        return table("gdopt.RangeTest", rows)


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """How a run ended, and what it found.

    A pytree, which may be returned from ``jit``, ``vmap`` and the like. Where `minimize` was called inside of these,
    all numbers are arrays, with a leading axis after a vmap; ``status`` holds the number of a `Status`; and there is no
    history, as its length is not known.

    Attributes:
        params: the best point of a full-batch loss, the last one with mini-batches; after a failure, the best or the
            last good one. In the structure, dtypes and containers of the params that were given.
        loss: the loss of ``params`` (with mini-batches, on the last batch).
        grad_norm: the 2-norm of the gradient at ``params``, over all trainable leaves.
        steps: the updates made. The loss was evaluated ``steps + 1`` times.
        status: a `Status`; ``Status(int(result.status))`` after a jit.
        message: a sentence that says what happened and, where that helps, what to try.
        success: whether the run ended as asked: CONVERGED or TARGET_REACHED; PRECISION_LIMIT where the loss fell and
            the gradient says that little is left; for a noisy loss without a target MAX_STEPS, where nothing else was
            asked for.
        history: a `History`; None inside of jit, vmap and grad.
        steps_per_epoch: the updates of an epoch of mini-batches (1 for a loss with keys alone), of a stream those of
            its first pass; None for a loss that is the same function at each step, and for a stream that went no
            further.
        range_test: the `RangeTest` that ``learning_rate="auto"`` chose the rate by; None where none was made.
        aux: what the loss returned besides its value at ``params``; None without ``has_aux``.
        compile_seconds: spent before the loop: tracing, compiling (near zero when an equal program ran before), and the
            range test where there was one.
        run_seconds: spent in the loop.

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
    history: History
    steps_per_epoch: int | None
    range_test: RangeTest | None
    aux: Any
    compile_seconds: float
    run_seconds: float
    # What `diagnose` needs, of a run whose last evaluation was not finite: no child of the pytree, and not pickled.
    _evidence: Any = dataclasses.field(default=None, init=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_evidence": None}

    def raise_for_status(self) -> Result:
        """This result, if the run ended with success.

        Raises:
            NotConvergedError: otherwise, with the message, and the result as its ``result``; of many runs side by side,
                with how many ended how.

        Example:
            >>> import gdopt
            >>> gdopt.minimize(lambda x: x**2, 1.0, learning_rate=0.4).raise_for_status().success
            True
        """
        if _jax.is_tracer(self.success):
            raise GdoptError("raise_for_status was called inside jit, vmap or grad: nothing can be raised there yet.")
        if np.all(self.success):
            return self
        if self.history is not None:
            raise NotConvergedError(f"{self.status.name}: {self.message}", self)
        codes, counts = np.unique(np.asarray(self.status)[~np.asarray(self.success)], return_counts=True)
        ends = ", ".join(f"{Status(code).name} ({count})" for code, count in zip(codes, counts, strict=True))
        raise NotConvergedError(f"{counts.sum()} of {np.size(self.success)} runs ended without success: {ends}.", self)

    def __repr__(self) -> str:
        outside = self.history is not None
        rows = {
            "status": self.status.name if outside else _trees.summary(self.status),
            "message": self.message,
            "loss": f"{self.loss:.6g}" if outside else _trees.summary(self.loss),
            "grad_norm": f"{self.grad_norm:.3g}" if outside else _trees.summary(self.grad_norm),
            "steps": f"{self.steps}" if outside else _trees.summary(self.steps),
            "params": _trees.summary(self.params),
        }
        if self.aux is not None:
            rows["aux"] = _trees.summary(self.aux)
        return table("gdopt.Result", rows)


def _make_pytree(cls: type, *meta: str) -> None:
    """All fields but these are its children."""
    data = [field.name for field in dataclasses.fields(cls) if field.init and field.name not in meta]
    jax.tree_util.register_dataclass(cls, data, meta)


_make_pytree(RangeTest, "status", "message")
_make_pytree(Result, "message", "steps_per_epoch", "compile_seconds", "run_seconds")


def table(title: str, rows: dict[str, str]) -> str:
    """How results print: a title, and below it a row for each name."""
    width = max(map(len, rows)) + 1
    return "\n".join([title, *(f"  {name:{width}}{value}" for name, value in rows.items())])
