"""The end of a run: its success and its sentence, and the result of a run inside of a transformation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from gdopt import _trees
from gdopt._errors import InputError
from gdopt._optimizers.rule import (
    Rates,
)
from gdopt._outcome.messages import Told, chosen_rates, explain
from gdopt._problem.task import Task
from gdopt._result import NO_MESSAGE, History, RangeTest, Result
from gdopt._status import Status
from gdopt._stopping import Ending, Limits, Watch, is_better, succeeded
from gdopt._types import PyTree
from gdopt._verify.hindsight import Hindsight


class Ended(NamedTuple):
    """The end of a run, with everything that its message depends on."""

    status: Status
    history: History
    returned_step: int
    ending: Ending
    watch: Watch
    farthest: float
    noisy: bool
    has_target: bool
    has_steps: bool  # or epochs
    steps_per_epoch: int | None
    limits: Limits
    eps: float
    rates: Rates
    optimizer: str  # that was chosen
    range_test: RangeTest | None
    why_exhausted: str
    not_finite: tuple[str, str]  # what is known of it, and what to try
    hindsight: Hindsight

    @property
    def steps(self) -> int:
        return len(self.history.loss) - 1

    @property
    def is_claim(self) -> bool:
        """Tell whether what is known of the returned point belongs to this status."""
        return self.status in (Status.CONVERGED, Status.PRECISION_LIMIT, Status.STALLED)

    @property
    def left(self) -> float:
        return float(self.ending.left) if self.is_claim else math.nan

    @property
    def verified(self) -> bool:
        return self.is_claim and bool(self.ending.verified)

    @property
    def success(self) -> bool:
        if self.status is Status.DATA_EXHAUSTED:  # all there is to ask for where nothing else was
            return not (self.has_steps or self.has_target) and bool(is_better(self.watch))
        return bool(succeeded(self.status, self.watch, noisy=self.noisy, has_target=self.has_target))

    @property
    def message(self) -> str:
        told = Told(
            steps=self.steps,
            returned_step=self.returned_step,
            history=self.history,
            limits=self.limits,
            noisy=self.noisy,
            steps_per_epoch=self.steps_per_epoch,
            eps=self.eps,
            how=self.rates,
            success=self.success,
            ending=self.ending,
            farthest=self.farthest,
            not_finite=self.not_finite,
            is_better=bool(is_better(self.watch)),
            overshoots=self.hindsight.overshoots,
            apart=self.hindsight.apart is not None,
            stable=self.hindsight.stable,
        )
        message = explain(self.status, told)
        if self.status is Status.DATA_EXHAUSTED and not self.success:
            message += f" {self.why_exhausted}"
        if self.hindsight.apart is not None:
            larger, smaller = self.hindsight.apart
            other, out = " and another learning_rate", "optimizer and the learning_rate"
            if self.rates is Rates.SEARCHED:
                other, out = "", "optimizer"
            message += (
                f" {larger} and {smaller} differ in scale by 100 times or more: pass scale='curvature'{other}, or "
                f"leave the {out} out."
            )
        if self.optimizer:
            message += f" The optimizer was {self.optimizer}."
        elif self.rates is Rates.SEARCHED:
            message += chosen_rates(self.history.learning_rate)
        if self.range_test is not None:
            message += (
                f" The learning rate was chosen by a range test of {len(self.range_test.learning_rate)} steps, which "
                f"suggested {self.range_test.suggestion:.3g}: three cycles (triangular2) from half of that up to twice "
                "of it."
            )
        return message


def refuse_host_visits(**options: Any) -> None:
    for name, value in options.items():
        if value is not None and value is not False:
            raise InputError(
                f"{name}={value!r} was given to minimize inside jit, vmap or grad, where the whole run is one compiled "
                f"program that nobody can look into or stop: leave {name} out, and look at the result."
            )


def result_inside(outcome: Any, task: Task) -> Result:
    """The result of a run that is being traced: its numbers are arrays, so that no vmap has to move one."""
    zero = _trees.on_device(0.0)
    return Result(
        params=task.problem.whole(outcome.params),
        loss=outcome.loss,
        grad_norm=outcome.grad_norm,
        steps=outcome.steps,
        status=outcome.code,
        message=NO_MESSAGE,
        success=outcome.success,
        left=outcome.ending.left,
        verified=outcome.ending.verified > 0,
        history=cast(Any, None),
        steps_per_epoch=jax.tree.map(_trees.on_device, task.steps_per_epoch),
        range_test=None,
        aux=outcome.aux,
        compile_seconds=cast(Any, zero),
        run_seconds=cast(Any, zero),
    )


def farthest(params: PyTree) -> float:
    """The largest entry, on the host; 0 if other processes hold some of them."""
    leaves = [leaf for leaf in jax.tree.leaves(params) if getattr(leaf, "is_fully_addressable", True)]
    return max((float(np.max(np.abs(leaf), initial=0)) for leaf in jax.device_get(leaves)), default=0.0)
