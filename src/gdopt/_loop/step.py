"""One step: evaluate, test, update."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gdopt import _stopping, _trees
from gdopt._compile import program
from gdopt._errors import InputError
from gdopt._loop.region import Region
from gdopt._loop.state import Inputs, Kept, Settings, State
from gdopt._optimizers.method import Method
from gdopt._optimizers.optax_state import evaluation_params, inject, may_skip, took_care, trials_in
from gdopt._optimizers.trials import MAX_REJECTED
from gdopt._problem import model_state
from gdopt._problem.data import Batches
from gdopt._problem.problem import Problem
from gdopt._problem.validation import metrics_in
from gdopt._status import RUNNING
from gdopt._stopping import Epoch, Evaluation, Search, Watch
from gdopt._trees import Packed
from gdopt._types import PyTree


def loss_arguments(
    inputs: Inputs, state: State, batches: Batches | None, *, with_key: bool
) -> tuple[PyTree, PyTree, jax.Array | None, PyTree]:
    """Return the arguments of the loss at a step besides the params: data, args, the key and the model's state."""
    data = batches.take(inputs.data, state.order, state.step) if batches else inputs.data
    key = jax.random.fold_in(jax.random.fold_in(inputs.key, 1), state.step) if with_key else None
    return data, inputs.args, key, state.model


def rate_of(method: Method, schedule: program.Traced | None, inputs: Inputs, k: jax.Array) -> Any:
    """Return the rate of a step; None if the optimizer owns it.

    A range test has a rate for each step, and begins again after its last one.
    """
    if method.owns_rate:
        return None
    if schedule is not None:
        return jnp.asarray(schedule.replay(inputs.numbers, k))
    return jnp.asarray(inputs.rate[k % len(inputs.rate)] if jnp.ndim(inputs.rate) else inputs.rate)


class Step:
    """One step of a problem: evaluate, measure, judge, keep the best, update."""

    def __init__(
        self,
        problem: Problem,
        method: Method,
        loss: program.Traced,
        schedule: program.Traced | None,
        settings: Settings,
        region: Region | None = None,
    ):
        self.asks_again = False  # whether an optimizer has called the loss itself, in its own trace
        self._task, self._method, self._loss, self._schedule, self._settings = problem, method, loss, schedule, settings
        self._region = region
        (value, extra), _ = loss.out
        _, self._aux = model_state.of(extra)
        self._loss_dtype = jnp.promote_types(value.dtype, jnp.float32)
        self._eps = float(jnp.finfo(value.dtype).eps)

    def __call__(self, state: State, inputs: Inputs) -> tuple[State, tuple]:
        """Return the next state, and the record of this evaluation: loss, norm of the gradient, rate, and metrics."""
        k, x, settings = state.step, state.params, self._settings
        given, order = self._given(state, inputs)
        (loss, extra), grad = self._loss.replay(self._loss.constants, x, inputs.constants, *given)
        model, aux = model_state.of(extra)
        loss, measured = self._confined(x, loss, grad, inputs)
        point, here = self._measured(state, loss, measured, inputs)
        update = functools.partial(self._updated, state, inputs, loss, grad, given)
        skips = settings.noisy and may_skip(state.optimizer)
        tried = update() if skips or self._keeps_accepted else None
        skipped = self._skipped(state, point, tried) if skips and tried else None
        code, watch = self._judged(state, point, inputs, skipped)
        running = code == RUNNING
        accepted = self._accepted(tried) if self._keeps_accepted and tried else None
        kept = self._kept(state, point, here, aux, (code, running, skipped, accepted), watch)
        model = model if skipped is None else _trees.select(skipped, state.model, model)
        stays = tried is None and self._method.keeps_its_state
        new_x, optimizer, rate = tried or update(running if stays else None)
        # A select is cheaper than a cond here, because only the last step of a run is not made. The last step leaves
        # the watch as it was, too: a checkpoint may be resumed with other limits, and repeats the evaluation.
        x, watch, model = _trees.select(running, (new_x, watch, model), (x, state.watch, state.model))
        optimizer = optimizer if stays else _trees.select(running, optimizer, state.optimizer)
        used = self._method.rate_used(rate, optimizer)
        metrics = metrics_in(aux).values() if settings.metrics else ()
        record = (point.loss, point.grad_norm, jnp.where(running, used, jnp.nan), *map(jnp.asarray, metrics))
        new = State(k + running, code, x, optimizer, order, watch, kept, state.ending, model)
        return settings.in_place(new), record

    def start(self, inputs: Inputs) -> State:
        """Return the state before the first step."""
        settings = self._settings
        nan = jnp.full((), jnp.nan, self._loss_dtype)
        norm = jnp.full((), jnp.nan, _trees.norm_dtype(inputs.start))
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._aux)
        rate = rate_of(self._method, self._schedule, inputs, jnp.int32(0))
        optimizer = self._method.begin(rate, inputs.start, inputs.optimizer_state)
        if trials_in(optimizer) is not None:
            _check_search(settings)
        if self._region is not None:
            _check_confined(self._region, self._method, optimizer, inputs.start)
        best = _trees.copy(settings.compact(inputs.start)) if settings.keep_best else None
        state = State(
            step=jnp.int32(0),
            code=jnp.int32(RUNNING),
            params=_trees.copy(inputs.start),
            optimizer=_trees.copy(_trees.strong(optimizer)),
            order=jnp.zeros(settings.batches.rows, jnp.int32) if settings.batches else None,
            watch=_stopping.first_watch(self._loss_dtype, norm.dtype, skips=settings.noisy and may_skip(optimizer)),
            kept=Kept(best, jnp.int32(0), nan, norm, blank, _trees.copy(inputs.state) if settings.keep_best else None),
            ending=_stopping.first_ending(self._loss_dtype),
            model=_trees.copy(inputs.state),
        )
        return settings.in_place(state)

    @property
    def _keeps_accepted(self) -> bool:
        """Tell whether the point to return is the last good one, because the values do not hold the whole penalty."""
        return self._region is not None and not self._region.known_value and not self._settings.noisy

    def _accepted(self, tried: tuple) -> jax.Array:
        found = trials_in(tried[1])
        return jnp.asarray(True) if found is None else found.rejected == 0

    def _confined(self, x: PyTree, loss: jax.Array, grad: PyTree, inputs: Inputs) -> tuple[jax.Array, PyTree]:
        """Return the loss with the penalty, and the projected gradient; without a constraint both as they are."""
        if self._region is None:
            return loss, grad
        given = inputs.constraint
        return self._region.total(given, x, loss), self._region.residual(given, x, grad)

    def _given(self, state: State, inputs: Inputs) -> tuple[tuple, PyTree]:
        """Return the arguments of the loss besides the params, and the order of this epoch's rows."""
        settings, k, order = self._settings, state.step, state.order
        batches = settings.batches
        if batches and not settings.inside:  # Inside a transformation, `whole_loop` shuffles.
            key = jax.random.fold_in(inputs.key, 0)
            drawn = functools.partial(batches.order, key, k)
            order = lax.cond(k % batches.per_epoch == 0, drawn, lambda: order)
        state = state._replace(order=order)
        data, *others = loss_arguments(inputs, state, batches, with_key=settings.with_key)
        data = settings.layout.batch(data) if batches and settings.layout else data
        return (data, *others), order

    def _measured(self, state: State, loss: jax.Array, grad: PyTree, inputs: Inputs) -> tuple[Evaluation, Packed]:
        """Measure a point; return the facts, and the point in few arrays."""
        settings = self._settings
        value, grad, here = loss.astype(self._loss_dtype), settings.compact(grad), settings.compact(state.params)
        needs_distance = not settings.noisy and trials_in(state.optimizer) is None
        away = jax.tree.map(jnp.subtract, here, settings.compact(inputs.start)) if needs_distance else here
        squares = _trees.vdots((grad, grad), (away, away))
        grad_norm, length = _trees.norm_from(squares[0], grad), jnp.sqrt(squares[1])
        finite = lax.cond(jnp.isfinite(length), lambda: jnp.asarray(True), lambda: _trees.all_finite(here))
        largest = _trees.largest(grad) if settings.tests_gradient else None
        return Evaluation(state.step, value, grad_norm, length if needs_distance else None, finite, largest), here

    def _skipped(self, state: State, point: Evaluation, tried: tuple) -> jax.Array:
        """Tell whether the loss or its gradient is not finite, but the optimizer skips it and keeps the params finite.

        Without noise it would skip the same gradient at each further step.
        """
        params, optimizer, _ = tried
        bad = point.finite & ~(jnp.isfinite(point.loss) & jnp.isfinite(point.grad_norm))
        stays_finite = lax.cond(bad, lambda: _trees.all_finite(params), lambda: jnp.asarray(False))
        return bad & stays_finite & took_care(optimizer, state.optimizer)

    def _judged(
        self, state: State, point: Evaluation, inputs: Inputs, skipped: jax.Array | None
    ) -> tuple[jax.Array, Watch]:
        found = trials_in(state.optimizer)
        if found is not None:
            found = Search(found.rejected >= MAX_REJECTED, found.accepted, found.left.astype(self._loss_dtype))
        epoch = self._epoch(inputs, point.step)
        return _stopping.judge(state.watch, state.kept.loss, point, inputs.limits, found, self._eps, epoch, skipped)

    def _epoch(self, inputs: Inputs, k: jax.Array) -> Epoch | None:
        if not self._settings.noisy or inputs.epoch is not None:
            return inputs.epoch
        steps = self._settings.batches.per_epoch if self._settings.batches else 1
        return Epoch(k % steps == 0, k % steps == steps - 1, steps)

    def _kept(self, state: State, point: Evaluation, here: Packed, aux: PyTree, ended: tuple, watch: Watch) -> Kept:
        """Return the best point so far; for a noisy run the last good one."""
        last, (code, running, skipped, accepted) = state.kept, ended
        k, value, grad_norm = point.step, point.loss, point.grad_norm
        if not self._settings.noisy:
            finite = point.finite & (jnp.isfinite(grad_norm) & jnp.isfinite(value))
            lower = (value < last.loss) | ((value == last.loss) & (grad_norm == 0))
            keep = (k == 0) | (finite & (lower if accepted is None else accepted))
        else:
            failed = _stopping.is_failure(code)
            keep = (k == 0) | jnp.where(running, value <= watch.first_loss, ~failed)
            keep = keep if skipped is None else keep & ((k == 0) | ~skipped)
        keep_best = self._settings.keep_best
        point_kept, model = (here, state.model) if keep_best else (None, None)
        kept = Kept(point_kept, k, value, grad_norm, _trees.strong(aux), model)
        return _trees.select(keep, kept, last) if keep_best else kept

    def _updated(
        self, state: State, inputs: Inputs, loss: jax.Array, grad: PyTree, given: tuple, made: jax.Array | None = None
    ) -> tuple[PyTree, PyTree, jax.Array | None]:
        """Return the params and the optimizer's state after the update, and its rate.

        ``made`` is for an optimizer that returns its old state if the update is not made.
        """
        x, rate = state.params, rate_of(self._method, self._schedule, inputs, state.step)

        def asked(params: PyTree) -> jax.Array:
            self.asks_again = True
            return self._task.value(params, *given)[0]

        optimizer = state.optimizer if rate is None else inject(state.optimizer, rate)
        region, searches = self._region, trials_in(optimizer) is not None
        within = region.within(inputs.constraint, x) if region is not None and searches else None
        updates, optimizer = self._method.update(rate, grad, optimizer, x, asked, loss, within=within, made=made)
        # Nothing else may read the updates. Otherwise XLA rounds them before it adds them, whereas a hand-written loop
        # fuses both, and the last bits differ.
        new, optimizer = optax.apply_updates(x, updates), _trees.strong(optimizer)
        if region is not None and not (searches and region.is_prox):  # The trial of a search is a proximal point.
            new = region.nearest(inputs.constraint, new, self._method.rate_used(rate, optimizer))
        return new, optimizer, rate


def _check_confined(region: Region, method: Method, optimizer: PyTree, params: PyTree) -> None:
    if evaluation_params(optimizer, params) is not params:
        raise InputError(
            f"optimizer={method.optimizer!r} returns an average of its points, which may lie outside of bounds=, "
            "project= or prox=. Pass another optimizer (for example gdopt.gd or optax.adam)."
        )
    if region.is_prox and method.owns_rate and trials_in(optimizer) is None:
        raise InputError(
            f"optimizer={method.optimizer!r} owns its rate, which prox(params, rate) needs. Pass the factory and a "
            "learning_rate (for example optimizer=gdopt.gd, learning_rate=0.1)."
        )


def _check_search(settings: Settings) -> None:
    if settings.noisy:
        raise InputError(
            "optimizer holds gdopt.spectral() or gdopt.quasi_newton(), which compare one value of the loss with "
            "the next, so they are not for mini-batches, random keys or a model with a state. Leave the optimizer out, "
            "or pass gdopt.gd with a learning_rate."
        )
    if not settings.keep_best:
        raise InputError(
            "keep_best=False was given with a rate that is found at each step (by gdopt.quasi_newton() or "
            "gdopt.spectral()), so the last point may be a trial that is to be taken back. Pass a learning_rate, or "
            "leave keep_best out."
        )
