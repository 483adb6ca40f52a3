"""The rates of "auto" for mini-batches, random keys and factories."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _trees
from gdopt._checkpoint.resume import NoSaves, Saves
from gdopt._checks import warn
from gdopt._errors import InputError
from gdopt._loop import loop
from gdopt._optimizers.distance import (
    FIRST,
    DistanceState,
    distance_adamw,
    distance_gd,
    following,
    steps_of_distance,
)
from gdopt._optimizers.method import Method
from gdopt._optimizers.response import Response, response
from gdopt._problem.limits import Steps
from gdopt._problem.problem import Problem
from gdopt._rate_finder import lr_find as lr_finder
from gdopt._rate_finder import rules
from gdopt._result import RangeTest
from gdopt._settings import own_work
from gdopt._types import PyTree, Schedule
from gdopt.schedules import constant, one_cycle, triangular2

_SHARE = 0.15  # the part of the steps that a range test may take
_NOISE_OF_ADAM = 0.2557  # the size of Adam's updates over its rate for normal gradients: see `response`
_FEWER, _MORE = 0.1, 3.0  # the limits of a first distance over Adam's
_PEAK, _PEAK_OF_MOMENTUM = 1.33, 1.0  # the peak of the cycles over the suggestion; see benchmarks/auto_training.py
_FEWEST = 10  # the fewest rates of a range test
_BASE, _BASE_IF_SHORT = 0.45, 0.8  # the part of a range test within the usual rates; the rest is for others
_START_IF_SHORT = 1e-4  # the lowest of the usual rates if there are few
_DEFAULT = 1e-2  # the peak of the cycles if a range test finds nothing
_SHORT = 3  # the most steps without a cycle, whose ends would be most of it
_WARM = 0.1  # the lowest peak of a cycle that begins with a distance, over that of the run which estimated it
_YOUNG = 30.0  # the steps of that run with which the peak is half of its
_LOWER = 0.1  # the rate of another try over that of the one before
_TRIES = 2  # the further tries


def rates_found(
    problem: Problem, optimizer: Any, steps: Steps, saves: Saves | NoSaves
) -> tuple[Method, RangeTest | None]:
    """Return a factory with its schedule, and the range test if one was needed and not made by the run that resumes."""
    total = steps.expected
    if total is None:
        raise InputError(
            f"epochs={steps.epochs} was given with a stream that does not report how many batches it has, and without "
            "a learning_rate the schedule is planned over all steps. Pass max_steps as well, or a learning_rate."
        )
    made, shape = saves.range_test, one_cycle(1.0, total) if total > _SHORT else constant(1.0)
    if optimizer in (distance_adamw, distance_gd):
        return _in_one_cycle(optimizer, shape, problem.optimizer_state), None
    kind = response(optimizer, problem.objective.params, lambda: _check(problem, optimizer))
    if kind is not None and kind.is_scale_free and made is None:
        first = FIRST * float(np.clip(_NOISE_OF_ADAM / kind.of_noise, _FEWER, _MORE))
        grown = functools.partial(following, optimizer, first=first)
        return _in_one_cycle(grown, shape, problem.optimizer_state), None
    # Within a set a loss does not blow up, so its curve would not show the highest rate.
    test = made or _tested(problem._replace(constraint=None), optimizer, total, lr_finder.updates_of(kind))
    peak = saves.peak = saves.peak or _peak(test, kind, total)
    return _with_tries(_cycling(optimizer, peak, total), lambda low: _cycling(optimizer, low * peak, total)), test


def _check(problem: Problem, optimizer: Any) -> None:
    """Raise InputError for a loss that cannot be traced, and for an optimizer's state that does not fit."""
    loop.is_inside(problem)
    given, params = problem.optimizer_state, problem.objective.params
    if given is not None:
        factory = functools.partial(following, optimizer) if isinstance(given, DistanceState) else optimizer
        Method(factory, 1.0).begin(_trees.on_device(np.float32(1)), params, given)


def _in_one_cycle(optimizer: Any, shape: Schedule, given: PyTree) -> Method:
    """Return the method of one cycle. A further try has a lower one, and its distance may grow as well.

    Params that have gone their distance are near a minimum, from which a cycle as high as the first would lead away.
    So with a distance in the ``given`` state the cycles are lower, the more so the more steps were made with it.
    """
    steps = steps_of_distance(given)
    if steps is None:
        return _with_tries(Method(optimizer, shape), lambda low: Method(optimizer, _at_peak(low, shape)))
    with own_work():
        peak = jnp.maximum(_WARM, _YOUNG / (_YOUNG + steps))
        lower = lambda low: Method(optimizer, _at_peak(low * peak, shape))
        return _with_tries(lower(1.0), lower)


def _at_peak(peak: float | jax.Array, shape: Schedule) -> Schedule:
    """Scale a shape. The peak is an array, so another one recompiles nothing."""
    highest = peak if isinstance(peak, jax.Array) else _trees.on_device(np.asarray(peak))
    return lambda step: highest * shape(step)


def _with_tries(method: Method, lower: Any, tried: int = 0) -> Method:
    """Give a method the one that is tried if it fails."""
    low = _LOWER ** (tried + 1)
    again = lambda: _with_tries(lower(low), lower, tried + 1)
    return method._replace(tried=tried, lower=again if tried < _TRIES else None)


def _cycling(optimizer: Any, peak: float, steps: int) -> Method:
    """Return an optimizer with Smith's three cycles of halving height."""
    return Method(optimizer, _at_peak(peak, triangular2(0.25, 1.0, step_size_up=max(steps // 6, 1))))


def _tested(problem: Problem, optimizer: Any, total: int, updates: rules.Updates) -> RangeTest | None:
    """Make the range test. It takes its share of the steps, and no more; None if that is too few."""
    rates = _SHARE * total / lr_finder.steps_per_rate(problem, optimizer)
    if rates < _FEWEST:
        return None
    is_short = _BASE * rates < 2 * _FEWEST
    start, share = (_START_IF_SHORT, _BASE_IF_SHORT) if is_short else (lr_finder.START_LR, _BASE)
    count = min(max(int(share * rates), _FEWEST - 1), lr_finder.NUM_STEPS)
    # One section more, at one of the ends, is within the share, too.
    ladder = lr_finder.Ladder(start, lr_finder.END_LR, count, "exponential", extensions=1, most=int(rates))
    test = lr_finder.range_test(problem, optimizer, ladder, updates=updates)
    if not len(test.loss):  # not even the loss of the start
        raise InputError(
            f"learning_rate='auto' found no rate: {test.message} With a learning_rate there is a result, and "
            "gdopt.diagnose(result) finds the cause."
        )
    return test


def _peak(test: RangeTest | None, kind: Response | None, total: int) -> float:
    """Return the highest rate of the cycles after a range test."""
    if test is None:
        warn(
            f"learning_rate='auto' takes {_DEFAULT:g}, because {total} steps leave too few for a range test (15 %). "
            "Pass more steps, or a learning_rate, or leave the optimizer out."
        )
        return _DEFAULT
    if test.suggestion is None:
        warn(
            f"learning_rate='auto' found no rate, so it takes {_DEFAULT:g}: {test.message} The inputs or the targets "
            "may have large or very different scales. Divide them by their standard deviations, or pass a "
            "learning_rate, or leave the optimizer out."
        )
        return _DEFAULT
    return (_PEAK_OF_MOMENTUM if kind is not None and kind.has_momentum else _PEAK) * test.suggestion
