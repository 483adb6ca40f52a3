"""The callback of a run: its argument, and the meaning of its answer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gdopt import _error_notes, _trees
from gdopt._checkpoint.resume import NoSaves, Saves
from gdopt._checks import number
from gdopt._devices.current import callers_code, for_caller
from gdopt._errors import InputError
from gdopt._loop import recorded
from gdopt._loop.state import Carry, Rows, State, is_running, params_to_return
from gdopt._optimizers.optax_state import evaluation_params
from gdopt._problem.limits import LAST_STEP
from gdopt._problem.problem import Problem
from gdopt._result import History, Report, Result
from gdopt._run.sources import InMemory, Streamed
from gdopt._run.validation import NoValidation, Validator
from gdopt._settings import as_own_work, own_promotion, own_work
from gdopt._signals import Interrupted
from gdopt._status import FAILURES, Status

# Evaluate the point of a carry as the end of a run does: return the carry to continue with, and the evaluated state.
Look = Callable[[Carry], tuple[Carry, State]]


class Watcher:
    """The observer of a run between two chunks: progress bar, validation, and the callback, which may stop the run."""

    def __init__(
        self,
        callback: Callable | None,
        every: int | str | None,
        validator: Validator | NoValidation,
        problem: Problem,
        source: InMemory | Streamed,
        advance: Callable,
    ):
        self.failure: Exception | None = None  # the exception of the callback
        self.validator = validator
        self._callback, self._every, self._task, self._source, self._advance = callback, every, problem, source, advance
        self._rate = math.nan  # the last one that is known
        self._seen = -1  # the number of the last evaluation that was reported
        self._told = -1  # the step of the last report

    def begin(self, saves: Saves | NoSaves, state: State, records: list[Rows]) -> Status | None:
        """Take up a run where its checkpoint is; return what ended it, if it is not to continue."""
        self.validator.resume(saves, state, records)
        for rows in records:
            self._note(rows)
        return Status.EARLY_STOPPED if self.validator.is_over else None

    def end(self, step: int) -> int:
        """Return the step before which a chunk ends that begins at this one."""
        lengths, asks = [], self._callback is not None
        by_epochs = asks and (self._task.batches is not None or self._every == "epoch")
        if isinstance(self._source, InMemory) and (by_epochs or self.validator.is_given):  # A stream ends them itself.
            lengths.append(self._source.steps_per_epoch or 1)
        if asks and isinstance(self._every, int):
            lengths.append(self._every)
        if asks and step == 0:
            lengths.append(1)  # It is called after the first step.
        return min([(step // length + 1) * length for length in lengths], default=LAST_STEP)

    def __call__(self, step: int, carry: Carry, state: State, rows: Rows, look: Look) -> tuple[Carry, Status | None]:
        """Return what is to end the run, if anything is, and the carry with which it continues."""
        self._advance(step, rows.loss[-1])
        self._note(rows)
        self.validator.note(rows)
        runs, ended = is_running(state), self._source.ends_epoch(step)
        if runs and ended:
            self.validator.validate(state)
        over = Status.EARLY_STOPPED if self.validator.is_over else None
        if self._callback is None or not (self._is_due(step, ended) or not runs):
            return carry, over
        # A point between two chunks is not evaluated yet. By the clock, the one before it is reported. With noise that
        # may be an old one, because batches had higher losses than the first since then.
        averages = has_average(state) and int(state.code) not in FAILURES
        told = self._task.noisy and int(state.kept.step) <= self._told
        looks = averages or (runs and (self._every is not None or ended or told or state.kept.params is None))
        seen = step - (runs and not looks)
        if seen == self._seen:
            return carry, over
        self._seen = seen
        if looks:
            carry, state = look(carry)
        return carry, Status.STOPPED if self._asks(state, step, ended) else over

    def _note(self, rows: Rows) -> None:
        if self._callback is None:
            return
        known = rows.learning_rate[~np.isnan(rows.learning_rate)]
        self._rate = float(known[-1]) if known.size else self._rate

    def history(self, rows: Rows, width: int) -> History:
        """Return the history of a run; with a ``width`` its rows hold the params."""
        history = self.validator.history(rows)
        return history._replace(params=recorded.params_of(rows.params, self._task.objective)) if width else history

    def _is_due(self, step: int, ended: bool) -> bool:
        if self._every is None:
            return True
        return ended if self._every == "epoch" else step % int(self._every) == 0

    def _asks(self, state: State, step: int, ended: bool) -> bool:
        """Call the callback; tell whether the run is to stop."""
        assert self._callback is not None
        try:
            report = self._report(state, step, ended)
            self._told = report.step
            with callers_code():
                return _wants_stop(self._callback(report))
        except Interrupted:  # A range test in the callback ended at a signal, which ends this run as well.
            return False
        except Exception as error:  # The run ends as if the callback had stopped it, and then raises this.
            self.failure = error
            if isinstance(error, KeyError):
                self._note_metrics(error)
            return True

    def _note_metrics(self, error: KeyError) -> None:
        """Note which metrics there are, if the callback may have looked up one that is not there."""
        found, name = self.validator.latest(), error.args[0] if error.args else None
        known = list({**found.get("metrics", {}), **found.get("validation_metrics", {})})
        if name in known:
            return
        what = f"hold {', '.join(map(repr, known))}."
        if not self.validator.is_given:
            what = "are empty without validation=, because only a run with one records the aux of each step."
        elif not found:
            what = 'are empty before the end of the first epoch. Pass callback_every="epoch".'
        elif not known:
            what = "are empty, because the loss returns no scalars in an aux: see has_aux=True."
        error.add_note(f"gdopt: report.metrics and report.validation_metrics {what}")

    @as_own_work
    def _report(self, state: State, step: int, ended: bool) -> Report:
        kept = state.kept
        return Report(
            step=int(kept.step),
            epoch=self._source.epoch(step),
            params=for_caller(self._task.objective.whole(_trees.copy(params_to_return(state)))),
            loss=float(kept.loss),
            grad_norm=float(kept.grad_norm),
            learning_rate=self._rate,
            epoch_ended=ended,
            **self.validator.latest(),
        )

    def raise_failure(self, result: Result) -> None:
        """Raise the exception of the callback, with the result so far."""
        if self.failure is not None and self._callback is not None:
            if result.status is Status.STOPPED:  # Nobody wanted this stop.
                result = dataclasses.replace(result, success=False)
            _error_notes.add_result(self.failure, self._callback, result)
            raise self.failure


def has_average(state: State) -> bool:
    """Tell whether the optimizer keeps an average of the params, which is to be returned."""
    with own_work(), own_promotion():
        return evaluation_params(state.optimizer, state.params) is not state.params


def check_callback(callback: Any, every: Any, data: Any) -> int | str | None:
    """Raise InputError for a callback that is not a function, or steps of it that cannot be; return these."""
    if callback is not None and not callable(callback):
        raise InputError(f"callback={callback!r} is not a function. Pass one that is called with a gdopt.Report.")
    if every is None:
        return None
    if callback is None:
        raise InputError(f"callback_every={every!r} was given without a callback. Pass callback=, or leave it out.")
    if not isinstance(every, str) or every != "epoch":
        wanted = 'a whole number from 1 to 10**9, or "epoch"'
        return int(number("callback_every", every, lambda x: 1 <= x <= 10**9 and x % 1 == 0, wanted))
    if data is None:
        raise InputError('callback_every="epoch" was given without data. Pass data=, or a number of steps.')
    return every


def _wants_stop(answer: Any) -> bool:
    """Tell whether the callback said stop; refuse other answers, such as the length of a line that it wrote."""
    if answer is None:
        return False
    value = jax.device_get(answer) if isinstance(answer, jax.Array) else answer
    if isinstance(value, bool | np.bool_ | np.ndarray) and np.shape(value) == () and np.asarray(value).dtype == bool:
        return bool(value)
    raise InputError(f"callback returned {answer!r}. Return True to stop the run, and None or False to continue.")
