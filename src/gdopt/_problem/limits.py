"""The limits of a run, checked: steps, epochs, tolerances and the target."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from gdopt._checks import number, whole_number
from gdopt._errors import InputError
from gdopt._problem.problem import Problem

LAST_STEP = 2**31 - 1  # the largest number of a step
_MAX_STEPS = 10_000  # the default number of steps
_TOL = 1e-4  # the default tolerance


class Steps(NamedTuple):
    """The number of steps that a run is asked to make."""

    most: int  # the most steps
    epochs: int | None  # the passes over a stream, which are counted as they come
    expected: int | None  # the expected steps; None if not known


def check_steps(max_steps: Any, epochs: Any, problem: Problem) -> Steps:
    data, batches, stream = problem.data, problem.batches, problem.stream
    asked = [] if max_steps is None else [whole_number("max_steps", max_steps)]
    if epochs is not None:
        if data is None:
            raise InputError(f"epochs={epochs!r} was given without data. Pass data=, or max_steps= instead of epochs.")
        epochs = whole_number("epochs", epochs)
    if stream is not None:
        most = asked[0] if asked else None if epochs else _MAX_STEPS
        of_epochs = epochs and stream.length and epochs * stream.length
        expected = min((steps for steps in (most, of_epochs) if steps), default=None)
        return Steps(LAST_STEP if most is None else most, epochs, expected)
    if epochs is not None:
        asked.append(epochs * (batches.per_epoch if batches else 1))
    most = whole_number("epochs times the steps of one", min(asked, default=_MAX_STEPS))
    return Steps(most, None, most)


def check_grad_tol(grad_tol: Any, noisy: bool) -> float | None:
    if grad_tol is None:
        return None
    if noisy:
        raise InputError(
            f"grad_tol={grad_tol!r} was given for a noisy loss, whose gradients do not become small. With mini-batches "
            "or keys, or with a state, pass target=, max_steps= or epochs=."
        )
    return number("grad_tol", grad_tol, lambda x: x >= 0, "a number of at least 0, such as 1e-5")


def check_tol(tol: Any, noisy: bool) -> float:
    if tol is None:
        return _TOL
    if noisy:
        raise InputError(
            f"tol={tol!r} was given for a noisy loss: the gradient of a batch, a random key or a state cannot tell "
            "convergence. Use target=, epochs= or max_steps=, or the full batch."
        )
    return number("tol", tol, lambda x: x >= 0, "a finite number, 0 or above, such as 1e-4")


def check_target(target: Any) -> float:
    return -math.inf if target is None else number("target", target, lambda x: True, "a finite number")
