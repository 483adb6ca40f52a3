"""The range test: a short training whose rate climbs a ladder, and the rate that its curve suggests."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _error_notes, _trees
from gdopt._checkpoint.resume import NoSaves, Saves
from gdopt._checks import check_flags, whole_number
from gdopt._devices.current import on_auto_axes
from gdopt._devices.processes import check_joined, joined
from gdopt._errors import InputError
from gdopt._loop import loop
from gdopt._loop.state import Carry, Compiled, Inputs, Rows, State
from gdopt._optimizers.factory import check_optimizer, is_transformation
from gdopt._optimizers.method import Method
from gdopt._optimizers.optax_state import steps_per_update
from gdopt._optimizers.response import Response, response
from gdopt._optimizers.spectral import gd
from gdopt._outcome.diagnose import named_inputs
from gdopt._problem.limits import LAST_STEP, Steps
from gdopt._problem.objective import make_objective
from gdopt._problem.problem import Problem, make_problem
from gdopt._problem.scaling import scaled
from gdopt._rate_finder import rules
from gdopt._result import RangeTest, Refinement
from gdopt._run import host_loop
from gdopt._run.callback import Look
from gdopt._run.sources import InMemory, Streamed, source_of
from gdopt._settings import own_promotion, own_work
from gdopt._signals import Interrupted, interruptible
from gdopt._status import RUNNING, Status
from gdopt._stopping import Limits
from gdopt._types import Loss, Optimizer, PyTree, Scalar
from gdopt.schedules import ladder

START_LR, END_LR, NUM_STEPS = 1e-5, 10.0, 300  # 50 rates to a decade
_EXTENSIONS = 2  # sections at most, beyond each end of the ladder
_NEIGHBOURS = 3.0 ** np.array([-1, -0.5, 0, 0.5])  # the rates of a refinement, over the suggestion
_REFINING_STEPS = 100
_JUDGED = 50  # the last steps, whose losses are compared
_ALL_STEPS = Steps(LAST_STEP, None, None)


@interruptible
@on_auto_axes
@joined
def lr_find(
    loss: Loss,
    params: PyTree,
    *,
    args: tuple = (),
    data: PyTree = None,
    batch_size: int | None = None,
    optimizer: Optimizer = gd,
    start_lr: Scalar = START_LR,
    end_lr: Scalar = END_LR,
    num_steps: int = NUM_STEPS,
    mode: str = "exponential",
    repeats: int = 1,
    refine: bool = False,
    has_aux: bool = False,
    with_key: bool = False,
    key: jax.Array | None = None,
    trainable: Any = None,
    scale: PyTree | Literal["curvature"] = None,
    state: PyTree = None,
) -> RangeTest:
    """Find a learning rate by Smith's range test: a short training whose rate rises until the loss blows up.

    It is a pure function: every try starts from ``params``, and nothing of the caller's changes. One program is
    compiled for the whole test, and none for new rates, data of the same shape or a fresh lambda that computes the
    same. Ctrl-C raises KeyboardInterrupt after the current step, because part of a curve offers no rate; SIGTERM ends
    the process then.

    Args:
        loss: ``loss(params, *args)``, or with data ``loss(params, batch, *args)``, as in `minimize`.
        params: any pytree, as in `minimize`.
        args: further arguments of the loss.
        data: a pytree of arrays with a shared leading axis, such as ``(X, y)``; or a stream of batches, as in
            `minimize`, that can be read more than once: no iterator.
        batch_size: rows per step, the same as for the training: the best rate grows with it. By default all rows.
        optimizer: the factory ``learning_rate -> transformation`` to find a rate for: ``gdopt.gd``, ``optax.adam``,
            ``functools.partial(optax.sgd, momentum=0.9)``. ``optax.MultiSteps`` keeps each rate for all the steps that
            it accumulates (of its first update, if their number is a schedule).
        start_lr: the rate of the first step, tried exactly; by default 1e-5.
        end_lr: the rate of step ``num_steps``, tried exactly unless the loss blows up before; by default 10. An
            exponential ladder that turns out too short at an end is prolonged there, up to twice: ``learning_rate`` of
            the result says which rates were tried.
        num_steps: the number of rates, and of updates; by default 300, which is 50 to a decade. With fewer, the loss
            has no time to show what a rate does, and the suggestion gets more cautious. Below 15 to a decade it is
            rough, and below 1.5 there is none.
        mode: "exponential" (equal ratios, the default) or "linear" (equal differences, as in the paper).
        repeats: the number of tests that run side by side, each with its own order of batches (and random keys). The
            rules read their mean curve: five cut the spread of the suggestion about in half. Takes the memory of as
            many runs.
        refine: train with four rates side by side for 100 steps, from a third of the suggestion to 1.7 times it. The
            one with the lowest loss is suggested. Takes about as long as the test, and the memory of four runs for each
            repeat.
        has_aux: the loss returns ``(value, aux)``.
        with_key: the loss takes a keyword ``key``, a fresh one at each step.
        key: the source of the shuffling and of those keys, so that the answer is the same each time; by default
            ``jax.random.key(0)``.
        trainable: the params to optimise, as in `minimize`.
        scale: typical sizes of the params, as in `minimize`. The rates are those of the scaled params.
        state: the state of the model, as in `minimize`. Each try begins with it, and the last one is thrown away.

    Returns:
        A `RangeTest`. Pass its ``suggestion`` to `minimize` as it stands: as a constant rate, or as the highest one of
        a cycle. It is None if the curve offers none; the ``message`` then says what to change.

    Raises:
        InputError: for bad input, before anything compiles.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, arXiv 1506.01186, section 3.3. The
    rules that read the curve were chosen by measurement, see ``benchmarks/README.md``.

    Example:
        >>> import gdopt, jax.numpy as jnp
        >>> x = jnp.linspace(-1.0, 1.0, 256)
        >>> def loss(params, batch):
        ...     x, y = batch
        ...     return jnp.mean((params[0] * x + params[1] - y) ** 2)
        >>> test = gdopt.lr_find(loss, jnp.zeros(2), data=(x, 3 * x + 1), batch_size=32)
        >>> 0.1 < test.suggestion < 1.0
        True
    """
    steps = check_ladder(start_lr, end_lr, num_steps, mode)
    repeats = whole_number("repeats", repeats)
    _check_factory(optimizer)
    check_flags(refine=refine, has_aux=has_aux, with_key=with_key)
    objective = make_objective(loss, params, has_aux=has_aux, trainable=trainable)
    batches = {"data": data, "batch_size": batch_size}
    problem = make_problem(objective, args=args, **batches, with_key=with_key, key=key, state=state)
    return range_test(scaled(problem, scale), optimizer, steps, repeats=repeats, refine=refine)


class Ladder(NamedTuple):
    """The rates to try. Further sections of as many rungs prolong it beyond both of its ends.

    Not of a linear one, which would soon be below zero.
    """

    start: float
    end: float
    num_steps: int
    mode: str
    extensions: int = _EXTENSIONS  # the most sections beyond each of its ends
    most: int | None = None  # the most rates that a test may try in all; None for any number

    def section(self, number: int) -> np.ndarray:
        """Return the rates of a section: 0 is the ladder that was asked for, -1 the section below it."""
        shift = (self.end / self.start) ** (number * self.num_steps / (self.num_steps - 1)) if number else 1.0
        return ladder(self.start * shift, self.end * shift, self.num_steps, self.mode)

    def without(self, tried: int) -> Ladder:
        """Return the ladder after a test that tried so many rates."""
        return self if self.most is None else self._replace(most=self.most - tried)


def check_ladder(start_lr: Scalar, end_lr: Scalar, num_steps: int, mode: str) -> Ladder:
    """Raise InputError for rates that are no rates, or do not rise."""
    rates = ladder(start_lr, end_lr, num_steps, mode)
    if rates[0] >= rates[-1]:
        raise InputError(f"start_lr={start_lr!r} is not below end_lr={end_lr!r}: a range test raises the rate.")
    return Ladder(float(rates[0]), float(rates[-1]), len(rates), mode)


def _check_factory(optimizer: Any) -> None:
    check_optimizer(optimizer, searched=True)
    if is_transformation(optimizer):
        raise InputError(
            "optimizer is a transformation that owns its rate, so no other can be tried. Pass the factory itself (for "
            "example optax.adam instead of optax.adam(1e-3))."
        )


def range_test(
    problem: Problem,
    optimizer: Any,
    steps: Ladder,
    *,
    repeats: int = 1,
    refine: bool = False,
    updates: rules.Updates | None = None,
) -> RangeTest:
    """Run `lr_find` for a checked problem. ``updates`` are `updates_of` the optimizer's response, if known."""
    if problem.stream is not None and problem.stream.once:
        raise InputError(
            "data is an iterator, which can be read only once, but a range test reads the first batches before the "
            "training does. Pass a function that returns a new iterator each time, or pass a learning_rate."
        )
    loop.check_alike(problem, optimizer=optimizer, ladder=tuple(steps), repeats=repeats, refine=refine)
    if updates is None:
        traced = lambda: loop.is_inside(problem)  # for its errors
        updates = updates_of(None if optimizer is gd else response(optimizer, problem.objective.params, traced))
    with own_work():
        keys = jax.random.fold_in(problem.key, 2)  # 0 and 1 are the training's
        keys = keys if repeats == 1 else jax.random.split(keys, repeats)  # a run without vmap traces twice as fast
    with _error_notes.memory(params=problem.objective.params, data=problem.data, args=problem.args):
        every = steps_per_rate(problem, optimizer)
        climb = functools.partial(_climb, problem, optimizer, steps, keys, every, updates)
        curve, verdict = climb(lowest := 0)
        while verdict.missing == "lower" and steps.mode == "exponential" and lowest > -steps.extensions:
            steps = steps.without(curve.end)
            if steps.most is not None and steps.most < steps.num_steps + curve.end:  # It climbs as far again.
                break
            climb = functools.partial(_climb, problem, optimizer, steps, keys, every, updates)
            curve, verdict = climb(lowest := lowest - 1)
        suggestion, refinement = verdict.suggestion, None
        if suggestion is None and steps.most is not None:
            suggestion = verdict.modest
        if refine and suggestion is not None:
            refinement = _refine(problem, optimizer, suggestion, keys, every)
            suggestion = refinement.best
    if suggestion is None:
        holding = named_inputs(problem)
        if holding:  # no other rate helps
            reason = verdict.reason if curve.end == 0 else ""
            verdict = verdict._replace(reason=(reason + holding).strip())
    return _result(curve, verdict, suggestion, refinement, steps.num_steps)


def updates_of(kind: Response | None) -> rules.Updates:
    """Return what the updates of an optimizer with this response make of a curve."""
    if kind is None:
        return rules.PLAIN
    if kind.is_scale_free:
        return rules.SCALE_FREE
    return rules.WITH_MOMENTUM if kind.has_momentum else rules.PLAIN


def steps_per_rate(problem: Problem, optimizer: Any) -> int:
    """Return the number of steps from one update to the next: more than 1 if the optimizer accumulates gradients."""
    method = Method(optimizer, 1.0)
    with method.told(), own_work(), own_promotion():
        return steps_per_update(method.with_rate(_trees.on_device(np.float32(1))), problem.objective.params)


class _Curve(NamedTuple):
    """The losses by rate, one row per repeat, and how far each of them got."""

    rates: np.ndarray  # the whole ladder, reached or not
    losses: np.ndarray
    ends: list[int]

    @property
    def end(self) -> int:
        return min(self.ends)

    def combined(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rates, mean losses and smoothed mean losses, as far as all repeats got."""
        losses = self.losses[:, : self.end].mean(axis=0)
        return self.rates[: self.end], losses, rules.smooth(losses)


def _climb(
    problem: Problem, optimizer: Any, steps: Ladder, keys: jax.Array, every: int, updates: rules.Updates, lowest: int
) -> tuple[_Curve, Any]:
    """Climb from the given section upwards until the curve says enough; every repeat begins at the start.

    An optimizer that accumulates gradients makes ``every`` steps at each rate.
    """
    rates_of = lambda section: _each(np.repeat(steps.section(section), every), keys)
    advance, state, inputs = _begin(problem, optimizer, keys, rates_of(lowest))
    rates, records, seen = np.empty(0), [], np.empty(0)
    head = rules.head_of(steps.num_steps)

    def all_over(rows: Rows, state: State) -> bool:
        nonlocal seen
        measured = np.isfinite(rows.grad_norm) & np.isfinite(rows.loss)
        losses = np.where(measured, rows.loss.astype(float), np.nan)
        records.append(losses.reshape(len(losses), -1))  # (steps, repeats)
        seen = _without_skipped(np.concatenate(records), state)
        complete = seen[: len(seen) // every * every]
        return all(rules.end(row, head) < len(row) for row in _by_update(complete, every))

    section = lowest
    while True:
        rates = np.append(rates, steps.section(section))[: steps.most]
        inputs = inputs._replace(rate=rates_of(section))
        state, _ = advance(state, inputs, all_over, len(rates) * every)
        losses = _by_update(seen[: len(rates) * every], every)
        curve = _Curve(rates, losses, [rules.end(row, head) for row in losses])
        verdict = _verdict(curve, head, updates)
        is_last = steps.mode == "linear" or section >= lowest + steps.extensions or len(rates) == steps.most
        if verdict.missing != "higher" or is_last:
            return curve, verdict
        section += 1


def _by_update(losses: np.ndarray, every: int) -> np.ndarray:
    """Return the mean losses of the steps of each update, one row per repeat: the params are the same at all of them.

    The last update of a run that has ended may lack some steps.
    """
    firsts = np.arange(0, len(losses), every)
    counts = np.minimum(every, len(losses) - firsts)
    return np.add.reduceat(losses, firsts, axis=0).T / counts if len(losses) else losses.T


def _without_skipped(losses: np.ndarray, state: State) -> np.ndarray:
    """Put the loss before in place of each that is not finite, if the optimizer skipped it and the run continued."""
    finite = np.isfinite(losses)
    if finite.all():
        return losses
    rows = np.arange(len(losses))[:, None]
    last = np.where(_trees.on_host(state.code).reshape(-1) == RUNNING, len(losses), np.where(finite, rows, -1).max(0))
    known = np.maximum.accumulate(np.where(finite, rows, 0))
    known = np.where(known == 0, finite.argmax(0), known)  # those before the first one that is finite
    return np.where(finite | (rows > last), losses, np.take_along_axis(losses, known, 0))


def _each(rates: np.ndarray, keys: jax.Array) -> jax.Array:
    """Repeat the rates for each key."""
    return _trees.on_device(np.broadcast_to(rates, (*keys.shape, len(rates))))


def _begin(problem: Problem, optimizer: Any, keys: jax.Array, rates: jax.Array) -> tuple[Callable, Carry, Inputs]:
    """Return how runs side by side advance, one per key and row of rates, and their state before the first step."""
    method = Method(optimizer, rates)

    def compile(data: PyTree) -> tuple[Any, Inputs]:
        limits = Limits(LAST_STEP, 0.0, None, -math.inf)
        return loop.compile(problem._replace(data=data), method, limits, keys, trial=True)

    compiled, inputs = compile(problem.data)
    assert isinstance(compiled, Compiled)  # Inside jit, InputError was raised before.
    check_joined(inputs)
    source = source_of(problem, compiled, compile, _ALL_STEPS, pause=False)

    def advance(carry: Carry, inputs: Inputs, is_over: Callable, until: int) -> tuple[Carry, Rows]:
        carry, rows, cause = host_loop.advance(
            compiled, source, carry, inputs, _Climb(is_over), saves=NoSaves(), until=until
        )
        if cause is Status.INTERRUPTED:
            raise Cut(method, compiled, source, inputs)
        if cause is Status.DATA_EXHAUSTED:
            raise InputError("data ended during a range test, which needs some hundred batches. Pass more batches.")
        return carry, rows

    return advance, host_loop.begin(compiled, inputs), inputs


class _Climb(NamedTuple):
    """A `Between` that ends the steps of a range test once their losses say enough."""

    is_over: Callable[[Rows, State], bool]

    def begin(self, saves: Saves | NoSaves, state: State, records: list[Rows]) -> Status | None:
        """Begin at the start."""

    def end(self, step: int) -> int:
        """Return the step before which a chunk has to end: any will do."""
        return LAST_STEP

    def __call__(self, step: int, carry: Carry, state: State, rows: Rows, look: Look) -> tuple[Carry, Status | None]:
        return carry, Status.STOPPED if self.is_over(rows, state) else None


class Cut(Interrupted):
    """The end of a range test by a signal. It holds what a run needs to evaluate the start without compiling."""

    def __init__(self, method: Method, compiled: Compiled, source: InMemory | Streamed, inputs: Inputs):
        super().__init__()
        self.method, self.compiled, self.source, self.inputs = method, compiled, source, inputs


def _verdict(curve: _Curve, head: int, updates: rules.Updates) -> rules.Verdict:
    if curve.end == 0:
        reason = "The loss or its gradient is not finite at the start. Start from params at which both are finite."
        return rules.Verdict(None, reason)
    rates, losses, _ = curve.combined()
    return rules.suggest(rates, losses, blew_up=curve.end < len(curve.rates), head=head, updates=updates)


def _refine(problem: Problem, optimizer: Any, suggestion: float, keys: jax.Array, every: int) -> Refinement:
    """Train the neighbours of a suggestion on the same batches, and compare their last losses."""
    rates = suggestion * _NEIGHBOURS
    with own_work():
        keys = jnp.atleast_1d(keys)
        lanes, many = _trees.on_device(np.repeat(rates, len(keys))[:, None]), jnp.tile(keys, len(rates))
    advance, state, inputs = _begin(problem, optimizer, many, lanes)
    state, rows = advance(state, inputs, lambda *_: False, _REFINING_STEPS * every)
    losses = _without_skipped(rows.loss, state[0].tree())
    last = np.full((_JUDGED * every, len(lanes)), np.inf)  # A run that ended early counts as infinite.
    measured = losses[(_REFINING_STEPS - _JUDGED) * every :]
    last[: len(measured)] = np.where(np.isfinite(measured), measured, np.inf)
    return Refinement(rates, last.mean(axis=0).reshape(len(rates), -1).mean(axis=1))


def _result(
    curve: _Curve, verdict: rules.Verdict, suggestion: float | None, refinement: Refinement | None, num_steps: int
) -> RangeTest:
    rates, loss, smoothed = curve.combined()
    count = max(curve.ends)
    inside = np.arange(count) < np.reshape(curve.ends, (-1, 1))
    losses = np.where(inside, curve.losses[:, :count], np.nan)
    smoothed_losses = np.where(inside, rules.smooth(np.where(inside, losses, 0)), np.nan)
    if curve.end == len(curve.rates):
        status, why = Status.MAX_STEPS, ", and the loss stayed finite"
    else:
        ended = curve.losses[int(np.argmin(curve.ends)), : curve.end + 1]
        status = Status.DIVERGED if np.isfinite(ended).all() else Status.NON_FINITE
        at = f"the rate {curve.rates[max(curve.end - 1, 0)]:.2g}"
        why = f": the loss blew up at {at}" if status is Status.DIVERGED else f": the loss was not finite after {at}"
    tried = f"tried 1 rate, {curve.rates[0]:.2g}"
    if curve.end > 1:
        tried = f"tried {curve.end} rates from {curve.rates[0]:.2g} to {curve.rates[curve.end - 1]:.2g}"
    found = f"Suggestion: {suggestion:.3g}." if suggestion is not None else f"No suggestion. {verdict.reason}"
    pad = np.full(count - curve.end, np.nan)
    return RangeTest(
        learning_rate=curve.rates[:count],
        loss=np.append(loss, pad),
        smoothed_loss=np.append(smoothed, pad),
        losses=losses,
        smoothed_losses=smoothed_losses,
        status=status,
        message=f"{tried}{why}. {found}",
        suggestion=suggestion,
        suggestions={"basin": verdict.suggestion, **rules.by_rule(rates, smoothed, num_steps)},
        refinement=refinement,
    )
