"""The callback of a run: its argument, and the meaning of its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gdopt import _error_notes, _trees
from gdopt._devices.current import callers_code, for_caller
from gdopt._errors import InputError
from gdopt._loop.state import State, params_to_return
from gdopt._problem.limits import LAST_STEP
from gdopt._problem.objective import Objective
from gdopt._problem.problem import Problem
from gdopt._result import History, Report, Result
from gdopt._run.sources import InMemory, Streamed
from gdopt._settings import as_own_work
from gdopt._signals import Interrupted


class Watcher:
    """The observer of a run between two chunks, for the progress bar and for the callback, which may stop the run."""

    def __init__(self, callback: Callable | None, problem: Problem, source: InMemory | Streamed, advance: Callable):
        self.failure: Exception | None = None  # the exception of the callback
        self._callback, self._task, self._source, self._advance = callback, problem, source, advance

    @property
    def boundary(self) -> int:
        """The number of steps at whose multiples a chunk ends, so that the callback is called there."""
        batches = self._task.batches
        return batches.per_epoch if batches and self._callback else LAST_STEP

    def __call__(self, step: int, state: State, records: History) -> bool:
        """Tell whether the run is to stop."""
        self._advance(step, records.loss[-1])
        if self._callback is None:
            return False
        try:
            report = _report(self._task.objective, step, self._source.epoch(step), state, records)
            with callers_code():
                return _wants_stop(self._callback(report))
        except Interrupted:  # A range test in the callback ended at a signal, which ends this run as well.
            return False
        except Exception as error:  # The run ends as if the callback had stopped it, and then raises this.
            self.failure = error
            return True

    def raise_failure(self, result: Result) -> None:
        """Raise the exception of the callback, with the result so far."""
        if self.failure is not None and self._callback is not None:
            _error_notes.add_result(self.failure, self._callback, result)
            raise self.failure


def check_callback(callback: Any) -> None:
    """Raise InputError for a callback that is not a function."""
    if callback is not None and not callable(callback):
        raise InputError(f"callback={callback!r} is not a function. Pass one that is called with a gdopt.Report.")


def _wants_stop(answer: Any) -> bool:
    """Tell whether the callback said stop; refuse other answers, such as the length of a line that it wrote."""
    if answer is None:
        return False
    value = jax.device_get(answer) if isinstance(answer, jax.Array) else answer
    if isinstance(value, bool | np.bool_ | np.ndarray) and np.shape(value) == () and np.asarray(value).dtype == bool:
        return bool(value)
    raise InputError(f"callback returned {answer!r}. Return True to stop the run, and None or False to continue.")


@as_own_work
def _report(objective: Objective, step: int, epoch: int, state: State, records: History) -> Report:
    kept = state.kept
    return Report(
        step=step,
        epoch=epoch,
        params=for_caller(objective.whole(_trees.copy(params_to_return(state)))),
        loss=float(kept.loss),
        grad_norm=float(kept.grad_norm),
        learning_rate=float(records.learning_rate[-1]),
    )
