"""The rates of "auto" for mini-batches, random keys and factories: a range test, and then cycles."""

from __future__ import annotations

from typing import Any

import numpy as np

from gdopt import _trees
from gdopt._errors import InputError
from gdopt._problem.limits import Steps
from gdopt._problem.problem import Problem
from gdopt._rate_finder import lr_find as lr_finder
from gdopt._result import RangeTest
from gdopt._status import Status
from gdopt._types import Schedule
from gdopt.schedules import triangular2

_LEAST_TEST = 50  # the fewest steps of a range test
_PEAK = 2.0  # the peak of the cycles over the suggestion of the test; measured by benchmarks/auto_training.py


def rates_by_test(problem: Problem, optimizer: Any, steps: Steps, made: RangeTest | None) -> tuple[RangeTest, Schedule]:
    """Return the range test of `"auto"`, unless one was made before, and the schedule that it leads to."""
    max_steps = steps.expected
    if max_steps is None:
        raise InputError(
            f"epochs={steps.epochs} was given with a stream that does not report how many batches it has, but "
            "learning_rate='auto' plans its cycles over all steps. Pass max_steps as well, or a learning_rate."
        )
    if made is not None and made.suggestion is not None:
        return made, _cycles(_PEAK * made.suggestion, max_steps)
    fewest = max(max_steps // 5, _LEAST_TEST)
    for num_steps in (min(fewest, lr_finder.NUM_STEPS), lr_finder.NUM_STEPS):  # Noise may drown a short test.
        ladder = lr_finder.Ladder(lr_finder.START_LR, lr_finder.END_LR, num_steps, "exponential")
        test = lr_finder.range_test(problem, optimizer, ladder)
        if test.suggestion is not None:
            return test, _cycles(_PEAK * test.suggestion, max_steps)
    cure = "Or pass a learning_rate."
    if test.status is Status.NON_FINITE:
        cure = "With a learning_rate there is a result, and gdopt.diagnose(result) finds the cause."
    raise InputError(f"learning_rate='auto' found no rate: {test.message} {cure}")


def _cycles(peak: float, steps: int) -> Schedule:
    """Return Smith's three cycles of halving height. The peak is an array, so another one recompiles nothing."""
    highest, shape = _trees.on_device(np.asarray(peak)), triangular2(0.25, 1.0, step_size_up=max(steps // 6, 1))
    return lambda step: highest * shape(step)
