"""The callback of a run: what it is given, and what its answer means."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from gdopt import _trees
from gdopt._errors import InputError
from gdopt._loop.state import State
from gdopt._problem.objective import Problem
from gdopt._result import History, Report
from gdopt._run import host_loop
from gdopt._settings import as_own_work


def wants_stop(answer: Any) -> bool:
    """Tell whether the callback said stop. Other answers were hardly meant as one (the length of a line written)."""
    if answer is None:
        return False
    value = jax.device_get(answer) if isinstance(answer, jax.Array) else answer
    if isinstance(value, bool | np.bool_ | np.ndarray) and np.shape(value) == () and np.asarray(value).dtype == bool:
        return bool(value)
    raise InputError(f"callback returned {answer!r}: return True to stop the run, and None or False to let it go on.")


@as_own_work
def report(problem: Problem, step: int, epoch: int, state: State, records: History) -> Report:
    kept = state.kept
    return Report(
        step=step,
        epoch=epoch,
        params=problem.whole(_trees.copy(host_loop.params_to_return(state))),
        loss=float(kept.loss),
        grad_norm=float(kept.grad_norm),
        learning_rate=float(records.learning_rate[-1]),
    )
