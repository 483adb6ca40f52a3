"""The end of a run: its success and its message, and the result of a run inside a transformation."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gdopt import _trees
from gdopt._devices.current import for_caller
from gdopt._devices.processes import peers
from gdopt._errors import InputError
from gdopt._loop.state import (
    Compiled,
    Inputs,
    State,
    Whole,
    params_to_return,
    returned_model,
    returned_params,
)
from gdopt._loop.step import loss_arguments
from gdopt._optimizers.method import Method, Rates
from gdopt._optimizers.optax_state import learns_scales
from gdopt._outcome.comparison import is_at_most
from gdopt._outcome.diagnose import Evidence, make_evidence
from gdopt._problem.problem import Problem
from gdopt._problem.validation import Judgement
from gdopt._result import NO_MESSAGE, History, RangeTest, Result
from gdopt._settings import as_own_work, own_work
from gdopt._status import FAILURES, Status
from gdopt._stopping import Ending, Watch, is_better, succeeded
from gdopt._types import PyTree
from gdopt._verify.hindsight import LEAST_STEPS, Hindsight

_RISE = 0.25  # the rise of the loss over its fall from which on a run counts as failed
_NOISE = 4.0  # and the rise over its standard error
_FEWEST_PARTS, _MOST_PARTS = 4, 10  # the parts of a run whose means are compared
_LEAST_LOSSES = 8  # of a part, so that its noise is known
_FAR = 1e15  # an entry of the params, larger than any quantity that people measure
_FARTHER = 100  # and how much larger it is than the start


@dataclasses.dataclass(frozen=True, eq=False)
class Ended:
    """A run that has ended, with everything that its result and its message depend on."""

    problem: Problem
    method: Method
    compiled: Compiled
    inputs: Inputs  # those of the last evaluation, with its batch
    state: State
    history: History
    status: Status
    has_steps: bool  # whether the caller gave max_steps or epochs
    range_test: RangeTest | None
    steps_per_epoch: int | None
    why_exhausted: str
    judgement: Judgement | None = None  # by validation
    to_device: Callable[[PyTree], PyTree] = _trees.to_device  # how the small arrays of the state become JAX's

    def result(self, message: str, *, compile_seconds: float, run_seconds: float) -> Result:
        kept = self.state.kept
        _, model, optimizer = self.arrays
        return Result(
            params=for_caller(self.problem.objective.whole(self.params)),
            loss=float(kept.loss),
            grad_norm=float(kept.grad_norm),
            steps=self.steps,
            status=self.status,
            message=message,
            success=self.success,
            left=self.left,
            verified=self.verified,
            history=self.history,
            steps_per_epoch=self.steps_per_epoch,
            range_test=self.range_test,
            aux=for_caller(jax.tree.map(jax.device_put, kept.aux)),
            compile_seconds=compile_seconds,
            run_seconds=run_seconds,
            state=for_caller(self.problem.whole_state(model)),
            optimizer_state=for_caller(optimizer),
            at_bounds=for_caller(self.at_bounds),
            _evidence=self.evidence,
        )

    @functools.cached_property
    def params(self) -> PyTree:
        """The params to return."""
        return params_to_return(self.state, self.arrays[0])

    @functools.cached_property
    def arrays(self) -> tuple[PyTree, PyTree, PyTree]:
        """The params, the model's state and the optimizer's, as arrays of JAX."""
        return arrays_of(self.state, self.to_device)

    @functools.cached_property
    def at_bounds(self) -> PyTree:
        """Bools that tell which entries are at their bounds; None without bounds."""
        return _at_bounds(self.problem, self.inputs, self.params)

    @functools.cached_property
    def ending(self) -> Ending:
        return _trees.all_on_host(self.state.ending)

    @functools.cached_property
    def watch(self) -> Watch:
        return _trees.all_on_host(self.state.watch)

    @functools.cached_property
    def rates(self) -> Rates:
        """The party that decided the rates."""
        return self.method.rates(self.state.optimizer)

    @functools.cached_property
    def evidence(self) -> Evidence | None:
        """The facts on the last evaluation, if it was not finite."""
        if self.status is not Status.NON_FINITE:
            return None
        problem, state, step = self.problem, self.state, self.steps
        rate = float(self.history.learning_rate[step - 1]) if step else None
        if rate is not None and self.method.owns_rate and not math.isfinite(rate):  # The optimizer reports no rate.
            rate = None
        with own_work():
            given = loss_arguments(self.inputs, state, problem.batches, with_key=problem.with_key)
            return make_evidence(problem, state.params, given, step, rate)

    @functools.cached_property
    def hindsight(self) -> Hindsight:
        """An examination of the loss, if gradient descent ended without a minimum."""
        status, rates, learning_rate = self.status, self.rates, self.history.learning_rate
        ended = status in (Status.MAX_STEPS, Status.STALLED) and self.steps >= LEAST_STEPS
        failed = status in FAILURES and rates is Rates.PLAIN and self.steps > 0
        # Other optimizers have their own scales for the params, or may have them.
        descent = rates is Rates.PLAIN or (rates is Rates.SEARCHED and not learns_scales(self.state.optimizer))
        if not ((ended and descent) or failed) or self.compiled.look_back is None:
            return Hindsight()
        known = learning_rate[np.isfinite(learning_rate)]
        rate = float(known[-1]) if rates is Rates.PLAIN and known.size else None
        found = self.compiled.look_back(self.state, self.inputs, rate)
        return found._replace(apart=None) if status is Status.NON_FINITE else found

    @functools.cached_property
    def noise(self) -> float:
        """The noise of the loss at the end of a search that took all its steps, if it gained little else; otherwise 0.

        A search that ends before makes a claim, and the check of that measures the noise.
        """
        long = self.status is Status.MAX_STEPS and self.steps >= LEAST_STEPS and self.rates is Rates.SEARCHED
        return self.compiled.noise(self.state, self.inputs) if long and self.compiled.noise is not None else 0.0

    @property
    def steps(self) -> int:
        return len(self.history.loss) - 1

    @property
    def is_claim(self) -> bool:
        """Tell whether the status makes a claim about the returned point."""
        return self.status in (Status.CONVERGED, Status.PRECISION_LIMIT, Status.STALLED)

    @property
    def left(self) -> float:
        return float(self.ending.left) if self.is_claim else math.nan

    @property
    def verified(self) -> bool:
        return self.is_claim and bool(self.ending.verified)

    @property
    def success(self) -> bool:
        if self.status is Status.EARLY_STOPPED:
            return True
        if self.status is Status.STOPPED:  # The callback wanted it.
            return self.is_better if self.problem.noisy else bool(self.state.kept.loss <= self.watch.first_loss)
        if self.status is Status.DATA_EXHAUSTED:  # This is a success only if the caller set no other end.
            return not (self.has_steps or self.inputs.limits.has_target) and self.is_better
        noisy, has_target = self.problem.noisy, self.inputs.limits.has_target
        if noisy and not has_target and self.status is Status.MAX_STEPS:
            return self.is_better
        return bool(succeeded(self.status, self.watch, noisy=noisy, has_target=has_target))

    @property
    def returned_step(self) -> int:
        return int(self.state.kept.step)

    @functools.cached_property
    def is_better(self) -> bool:
        """Tell whether a noisy run ended below its start; if the first batch says no, compare on many."""
        if is_better(self.watch):
            return True
        return self.problem.noisy and is_at_most(self.problem, self.inputs, self.state, self.params)

    @property
    def wants_lower_rates(self) -> bool:
        """Tell whether the run failed, ended above its start or rose again, as it does if the rate is too high."""
        stream = self.problem.stream
        if self.steps == 0 or (stream is not None and stream.once) or peers().several:
            return False
        if self.evidence is not None and self.evidence.bad_inputs:  # No rate helps.
            return False
        losses = self.history.loss[np.isfinite(self.history.loss)]
        if self.status in FAILURES and losses.size and losses[-1] < losses[0]:  # It fell without a lower bound.
            return not self.ran_away
        return self.status in FAILURES or (self.status is Status.MAX_STEPS and (self.rose or not self.is_better))

    @functools.cached_property
    def rose(self) -> bool:
        """Tell whether the loss rose again after its lowest epochs, by a quarter of its fall and more than its noise.

        The same rows and the same loss come in each epoch, so only the rate can have led there. A stream or a state
        of the model may make another loss. With a validation the best point comes back anyway.
        """
        problem, per_epoch = self.problem, self.steps_per_epoch
        if problem.stream is not None or problem.has_state or self.judgement is not None or not per_epoch:
            return False
        losses = self.history.loss[:-1].astype(float)
        epochs = losses[: losses.size // per_epoch * per_epoch].reshape(-1, per_epoch)
        count = min(len(epochs) // 2, epochs.size // _LEAST_LOSSES, _MOST_PARTS)
        if count < _FEWEST_PARTS or not np.isfinite(epochs).all():
            return False
        parts = np.array_split(epochs, count)
        means, errors = (np.array([of(part) for part in parts]) for of in (np.mean, _standard_error))
        lowest = int(means.argmin())
        fall = max(losses[0], epochs[0].mean()) - means[lowest]
        noise = np.hypot(errors[lowest], errors[-1])
        return bool(means[-1] - means[lowest] > max(_RISE * fall, _NOISE * noise))

    @functools.cached_property
    def farthest(self) -> float:
        """The largest entry of the params, on the host; 0 if other processes hold some of them."""
        return self._largest(self.params)

    @property
    def ran_away(self) -> bool:
        """Tell whether the params grew beyond any quantity that people measure."""
        return self.farthest > max(_FAR, _FARTHER * self._largest(self.inputs.start))

    def _largest(self, params: PyTree) -> float:
        leaves = jax.tree.leaves(self.problem.objective.natural(params))
        leaves = [leaf for leaf in leaves if getattr(leaf, "is_fully_addressable", True)]
        return max((float(np.max(np.abs(leaf), initial=0)) for leaf in jax.device_get(leaves)), default=0.0)


def arrays_of(state: State, to_device: Callable[[PyTree], PyTree]) -> tuple[PyTree, PyTree, PyTree]:
    """Return the params, the model's state and the optimizer's to return, as arrays of JAX."""
    return to_device((returned_params(state), returned_model(state), state.optimizer))


def _standard_error(losses: np.ndarray) -> float:
    return float(losses.std() / np.sqrt(losses.size))


def refuse_host_visits(**options: Any) -> None:
    """Raise InputError for options that a run inside a transformation does not support."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise InputError(
                f"{name}={value!r} was given to minimize inside jit, vmap or grad, where the whole run is one compiled "
                f"program that nobody can watch or stop. Leave {name} out, and look at the result."
            )


@as_own_work
def _at_bounds(problem: Problem, inputs: Inputs, params: PyTree) -> PyTree:
    """Tell which entries are at their bounds; False stands for leaves that are not optimised."""
    if problem.constraint is None or problem.constraint.bounds is None:
        return None
    rest = problem.objective.rest
    at = jax.tree.map(lambda x, low, high: (x <= low) | (x >= high), params, *inputs.constraint.bounds)
    return rest.only(rest.treedef.flatten_up_to(at), other=False)


@as_own_work
def result_inside(whole: Whole, inputs: Inputs, problem: Problem) -> Result:
    """Return the result of a traced run. Its numbers are arrays on the device, so that no vmap has to move them."""
    outcome: Any = whole.solve(whole.constants, inputs)
    zero: Any = _trees.on_device(0.0)
    return Result(
        params=problem.objective.whole(outcome.params),
        loss=outcome.loss,
        grad_norm=outcome.grad_norm,
        steps=outcome.steps,
        status=outcome.code,
        message=NO_MESSAGE,
        success=outcome.success,
        left=outcome.ending.left,
        verified=outcome.ending.verified > 0,
        history=None,
        steps_per_epoch=jax.tree.map(_trees.on_device, problem.steps_per_epoch),
        range_test=None,
        aux=outcome.aux,
        compile_seconds=zero,
        run_seconds=zero,
        state=problem.whole_state(outcome.model),
        optimizer_state=outcome.optimizer,
        at_bounds=_at_bounds(problem, inputs, outcome.params),
    )
