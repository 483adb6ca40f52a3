"""The loop, once: ``step`` (evaluate, test, update), compiled as ``chunk`` (many steps, for `run` to call again and
again), or inside of somebody's ``jit``, ``vmap`` or ``grad`` as ``whole`` (all steps)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gdopt import _stopping, _trees
from gdopt._checks import warn
from gdopt._compile import program
from gdopt._compile.program import value_and_grad
from gdopt._devices.processes import described, peers
from gdopt._devices.sharding import Layout, explicit_mesh, mapped_mesh, placed
from gdopt._errors import InputError
from gdopt._loop.implicit import differentiable
from gdopt._optimizers.rule import Rule, evaluation_params, extra_arguments, inject, owned_rate, restarted, search
from gdopt._optimizers.trials import MAX_REJECTED
from gdopt._problem import lints
from gdopt._problem.data import Batches
from gdopt._problem.task import Task
from gdopt._result import History
from gdopt._settings import as_own_work, own_promotion, own_work
from gdopt._status import RUNNING, Status
from gdopt._stopping import Ending, Epoch, Evaluation, Limits, Search, Watch
from gdopt._trees import Packed
from gdopt._types import PyTree
from gdopt._verify.claim import Claim, settle
from gdopt._verify.hindsight import Hindsight, look_back
from gdopt._verify.places import InTrace, OnHost, Probe

CAPACITY = 4096  # rows of the history that a carry has room for
_SMALL = 4096  # entries of an array that is computed with together with others
LAST_STEP = 2**31 - 1
_TRIAL_INSIDE = (
    "lr_find was called inside jit, vmap or grad, by itself or by learning_rate='auto' for a loss or an optimizer that "
    "needs a range test: its curve is read in Python. Call gdopt.lr_find outside, and pass its suggestion as the "
    "learning_rate."
)


class Inputs(NamedTuple):
    """The arguments of the compiled program that stay the same over a run: new values compile nothing.

    Arrays are on the device, Python's numbers are left as they are. Runs side by side each have their own ``key`` and
    ``rate``, by a leading axis.
    """

    start: PyTree
    data: PyTree
    args: PyTree
    key: Any  # None for a single run that draws nothing
    rate: Any  # a number, or a ladder of them, the rates of the steps one by one
    limits: Limits
    constants: list[Any]  # that the loss closes over
    numbers: list[Any] | None  # of the schedule
    epoch: Epoch | None = None  # of a stream, whose batches are the data in turn


class Kept(NamedTuple):
    """The point that comes back if the run ends badly: the best so far, or with a noisy loss the last good one.

    Where no params are to be kept, the last point evaluated, whose params are the state's: see `returned_params`.
    """

    params: Packed | None
    step: jax.Array
    loss: jax.Array
    grad_norm: jax.Array
    aux: PyTree


class State(NamedTuple):
    """The state of a run. For runs side by side, which keep step, all but ``step`` has a leading axis."""

    step: jax.Array  # updates made, which is the number of the point in ``params``
    code: jax.Array  # RUNNING, or the Status that the last evaluation led to
    params: PyTree
    optimizer: PyTree
    order: PyTree  # the epoch's shuffled row numbers
    watch: Watch
    kept: Kept
    ending: Ending


Carry = tuple[Packed, jax.Array]  # the state, and the rows of the history that the host has not read yet


class Outcome(NamedTuple):
    """The end of ``whole``."""

    params: PyTree
    loss: jax.Array
    grad_norm: jax.Array
    aux: PyTree
    steps: jax.Array
    code: jax.Array
    success: jax.Array
    ending: Ending


class Compiled(NamedTuple):
    """A problem made ready to run."""

    start: Callable[[Inputs], Carry]
    # (carry, step of the first row, limit, inputs) -> (carry, code)
    chunk: Callable[[Carry, Any, Any, Inputs], tuple[Carry, jax.Array]]
    carry: PyTree  # the shapes of it
    eps: float  # of the dtype in which the loss is computed
    pace: list[float]  # the seconds of a step in the last run, where there was one
    probes: dict[bool, Programs]  # that verify a claim, once there was one: see `Verifier.programs`
    # Of a loss that is the same function at each step: verifies what a run claims at its end, ...
    verify: Callable[[Carry, Inputs], Carry] | None = None
    # ... and looks at the loss there; its last argument is the rate of plain gradient descent
    look_back: Callable[[State, Inputs, float | None], Hindsight] | None = None


class Whole(NamedTuple):
    """A problem made ready to run inside of a transformation, all steps at once."""

    solve: Callable[[list, Inputs], Outcome]
    constants: list[Any]  # that the optimizer closes over


def compile(task: Task, *args: Any, **options: Any) -> tuple[Compiled | Whole, Inputs]:
    """Traces the loss once and shares the compiled loop with every equal problem; it is to be given these inputs.

    On a mesh with Explicit axes the loss is traced as on one with Auto axes, where it need not say how to split each
    operation. If that fails, as in a `shard_map` over that mesh, it is traced as it is.
    """
    try:
        return _compile(task, *args, **options)
    except InputError:
        raise
    except Exception as error:
        mesh = explicit_mesh(task.problem.params, task.data, task.args)
        key = task.key if task.with_key else None
        with contextlib.suppress(Exception):
            if mesh is None and not any(note.startswith("gdopt") for note in getattr(error, "__notes__", ())):
                # The loss itself can be traced, and says which mesh it maps over.
                mesh = mapped_mesh(task.value, task.problem.params, task.batch, task.args, key)
            if mesh is not None:
                return _compile(task._replace(explicit=mesh), *args, **options)
        raise


def _compile(
    task: Task,
    rule: Rule,
    rate: Any,
    limits: Limits,
    key: jax.Array | None,
    *,
    trial: bool = False,
    keep_best: bool = True,
    has_target: bool = False,
) -> tuple[Compiled | Whole, Inputs]:
    """``compile`` as the task has it.

    Where one of them is being traced by jit, vmap or grad, so is all of the loop.

    Where there are many keys, it is the loop of as many runs side by side, each with its own key and rate. They
    keep step, and one that has ended is left as it is. A ``trial`` is to show what its rates do, however small they
    are: only failures and the number of steps end it. Without ``keep_best`` there is no point to fall back on.
    """
    noisy = task.noisy or trial
    # Before it is traced, so that it is traced for where it will run.
    given, _ = placed({"params": task.problem.params, "data": task.data, "args": task.args})
    start, data, args = given.values()
    batch = task._replace(data=data).batch
    one_key = jax.ShapeDtypeStruct((), key.dtype) if key is not None and task.with_key else None
    value = program.trace(task.value, start, batch, args, one_key, rules=True)
    if value.jaxpr is not None and (n := lints.rows_of_all_pairs(value.jaxpr)):
        warn(
            f"the loss subtracts shapes ({n}, 1) and ({n},), which gives all {n} * {n} differences, and sums up their "
            "squares: bring both to one shape, with prediction[:, 0] or y[:, None], say."
        )

    with own_promotion():
        schedule = None if rule.schedule is None else program.trace(rule.rate_at, np.int32(0), lift=True)
    numbers = schedule and schedule.constants
    epoch = None if task.stream is None else Epoch(begins=True, ends=False, steps=1)
    inputs = Inputs(start, data, args, key, rate, limits, value.constants, numbers, epoch)
    inputs, layout = _placed(inputs, constants_stay=task.explicit is not None)
    inside = program.is_traced(inputs)
    if inside and trial:
        raise InputError(_TRIAL_INSIDE)
    tests_gradient = limits.grad_tol is not None
    settings = Settings(
        noisy, task.batches, task.with_key, keep_best, tests_gradient, inside, None if inside else layout
    )
    options = rule.identity, schedule and schedule.identity, settings, inside and has_target
    known = rule.identity is not None and (schedule is None or schedule.identity is not None)

    def finished(made: Compiled | Whole) -> Compiled | Whole:
        """With what belongs to this call alone."""
        if isinstance(made, Whole):
            return _differentiable(made, value, noisy)
        if noisy:
            return made
        verifier = Verifier(task, rule, None, schedule, settings, made.eps)
        programs = functools.partial(verifier.programs, value, made.probes, {})
        return made._replace(
            verify=functools.partial(verifier.on_host, programs),
            look_back=functools.partial(verifier.look_back, programs),
        )

    # A trace of the loss tells its gradient, too; but if it has derivative rules, only a trace of that does.
    seen = program.place_for((value.identity, *options) if known and value.identity else None, inputs, passing=True)
    if not seen:
        loss, value = program.with_gradient(value, task.value, start, batch, args, one_key)
        kept = program.place_for((loss.identity, *options) if known and loss.identity else None, inputs)
        if not kept:
            with own_promotion():
                made, closed = _make(task, rule, inputs, loss, schedule, settings, has_target)
            if not closed:
                return finished(made), inputs
            kept.append(made)
        seen.append(kept[0])
    return finished(seen[0]), inputs


def digests(task: Task, rule: Rule) -> tuple[str, str]:
    """Checksums of the loss and of the optimizer, to be compared with those of another time."""
    given = task.problem.params, task.batch, task.args, task.key

    def update(rate: Any, params: PyTree, *given: PyTree) -> PyTree:
        extras = extra_arguments(lambda params: task.value(params, *given)[0], jnp.zeros((), float), params)
        return rule.update(rate, params, rule.init(rate, params), params, **extras)

    with own_promotion():
        updates = program.digest(update, 0.1, *given)
    return program.digest(task.value, *given), updates


def loss_arguments(
    inputs: Inputs, order: PyTree, step: jax.Array, batches: Batches | None, *, with_key: bool
) -> tuple[PyTree, PyTree, jax.Array | None]:
    """Return what the loss is called with at a step besides the params: data, args and the key."""
    data = batches.take(inputs.data, order, step) if batches else inputs.data
    key = jax.random.fold_in(jax.random.fold_in(inputs.key, 1), step) if with_key else None
    return data, inputs.args, key


def warn_of_no_gradient(task: Task) -> None:
    """For a run whose gradient was exactly zero at the start: does the loss use the params at all?"""
    key = task.key if task.with_key else None
    grad = lambda *given: value_and_grad(task.value)(*given)[1]
    if not lints.depends(grad, task.problem.params, task.batch, task.args, key):
        warn(
            "the gradient is exactly zero everywhere: the loss does not depend on the params, or only through what has "
            "no gradient (stop_gradient, argmax, round, comparisons). Nothing was optimised."
        )


def is_inside(task: Task) -> bool:
    """Tell whether jit, vmap or grad traces any of what the task's loss reads."""
    problem, key = task.problem, task.key if task.with_key else None
    given = problem.params, task.data, task.args, task.given_key
    return program.is_traced(given, program.trace(task.value, problem.params, task.batch, task.args, key).constants)


def check_alike(task: Task, **given: Any) -> None:
    """Raises InputError where a call is one of several processes that were not made alike."""
    others = peers()
    if others is None:
        return
    if callable(given.get("learning_rate")):
        with own_work():
            given["learning_rate"] = [float(given["learning_rate"](step)) for step in (0, 1, 10, 100, 1000)]
    others.compare(
        loss=program.text(task.value, task.problem.params, task.batch, task.args, task.key),
        params=described(task.problem.params),
        data=described(task.data),
        args=described(task.args),
        key=described(task.key),
        batches=task.batches,
        **given,
    )


class Settings(NamedTuple):
    """The settings that a program depends on besides traces and the shapes of its inputs; hashable."""

    noisy: bool  # the loss is another function at each step
    batches: Batches | None
    with_key: bool
    keep_best: bool
    tests_gradient: bool  # its largest entry
    inside: bool  # of a jit, vmap or grad
    layout: Layout | None = None  # of many devices

    def compact(self, params: PyTree) -> Packed:
        """The params as few arrays, which costs much less per step where there are many small ones.

        Not those on many devices: bringing them together costs more than it saves.
        """
        return _trees.pack(params, _SMALL if self.layout is None else 1)

    def in_place(self, state: State) -> State:
        """The state with its arrays on the devices where the params are."""
        layout = self.layout
        if layout is None:
            return state
        kept = state.kept
        if kept.params is not None:
            kept = kept._replace(params=layout.packed(kept.params))
        params, optimizer = layout.like_params(state.params), layout.like_params(state.optimizer)
        return state._replace(params=params, optimizer=optimizer, kept=kept)


def _differentiable(made: Whole, value: program.Traced, noisy: bool) -> Whole:
    """Give a run inside of a transformation the derivatives of a minimum."""

    def of(params: PyTree, constants: list, *given: PyTree) -> tuple[jax.Array, PyTree]:
        return value.replay(constants, params, *given, None)

    known = lambda _, inputs: (inputs.constants, inputs.data, inputs.args)
    return made._replace(solve=differentiable(made.solve, of, known, defined=not noisy))


def _placed(inputs: Inputs, *, constants_stay: bool) -> tuple[Inputs, Layout | None]:
    """The inputs on the devices that some of them are on."""
    names = {"start": "params", "data": "data", "args": "args", "constants": "what the loss closes over"}
    names |= {"key": "key", "rate": "learning_rate", "numbers": "what the schedule closes over"}
    stay = {names["constants"]} if constants_stay else ()
    trees, layout = placed({name: getattr(inputs, field) for field, name in names.items()}, stay)
    return inputs._replace(**{field: trees[name] for field, name in names.items()}), layout


def _make(
    task: Task,
    rule: Rule,
    inputs: Inputs,
    traced_loss: program.Traced,
    schedule: program.Traced | None,
    settings: Settings,
    has_target: bool,
) -> tuple[Compiled | Whole, bool]:
    """The loop around a traced loss, and whether it depends on nothing else than on that trace and its inputs."""
    asked_again: list[bool] = []  # whether an optimizer has called the loss itself, in a trace of its own
    start, step = _functions(task, rule, inputs, traced_loss, schedule, settings, asked_again)
    eps = float(jnp.finfo(traced_loss.out[0][0].dtype).eps)
    if not settings.inside:
        if inputs.key is not None and inputs.key.ndim:
            start, step = _side_by_side(start, step)
        everywhere = settings.layout.everywhere if settings.layout else lambda tree: tree
        first = program.share(_first(start, inputs, traced_loss, everywhere), inputs)
        many = program.share(_chunk(step, everywhere), first.out, np.int32(0), np.int32(0), inputs, donate_first=True)
        if not program.is_traced(first.constants, many.constants):
            closed = first.closed and many.closed and not asked_again
            return Compiled(as_own_work(first.call), as_own_work(many.call), first.out, eps, [], {}), closed
        if inputs.key is not None and inputs.key.ndim:
            raise InputError(_TRIAL_INSIDE)
        settings = settings._replace(inside=True)  # an optimizer closes over what is being traced
        start, step = _functions(task, rule, inputs, traced_loss, schedule, settings, asked_again)
    verifier = Verifier(task, rule, traced_loss, schedule, settings, eps)
    verify = (lambda state, _: state) if settings.noisy else verifier.in_trace
    whole = program.share(_whole(start, step, verify, settings, has_target), inputs)
    return Whole(whole.run, whole.constants), whole.closed and not asked_again


def _functions(
    task: Task,
    rule: Rule,
    inputs: Inputs,
    traced_loss: program.Traced,
    schedule: program.Traced | None,
    settings: Settings,
    asked_again: list[bool],
) -> tuple[Callable[[Inputs], State], Callable[[State, Inputs], tuple[State, tuple]]]:
    """The state before the first step, and a step."""
    batches, keep_best = settings.batches, settings.keep_best
    (loss, aux), _ = traced_loss.out
    loss_dtype = jnp.promote_types(loss.dtype, jnp.float32)
    norm_dtype = _trees.norm_dtype(inputs.start)
    eps = float(jnp.finfo(loss.dtype).eps)

    def loss_inputs(inputs: Inputs, order: PyTree, step: jax.Array) -> tuple[tuple, PyTree]:
        if batches and not settings.inside:  # there `_whole` shuffles
            key = jax.random.fold_in(inputs.key, 0)
            drawn = functools.partial(batches.order, key, step)
            order = lax.cond(step % batches.per_epoch == 0, drawn, lambda: order)
        data, args, key = loss_arguments(inputs, order, step, batches, with_key=settings.with_key)
        data = settings.layout.batch(data) if batches and settings.layout else data
        return (data, args, key), order

    def epoch_of(inputs: Inputs, step: jax.Array) -> Epoch | None:
        if not settings.noisy or inputs.epoch is not None:
            return inputs.epoch
        steps = batches.per_epoch if batches else 1
        return Epoch(step % steps == 0, step % steps == steps - 1, steps)

    def rate_at(inputs: Inputs, step: jax.Array) -> Any:
        """The rate of a step: the schedule's, a number, or of a ladder the step's own, from its end on over again."""
        if schedule is not None:
            return schedule.replay(inputs.numbers, step)
        return inputs.rate[step % len(inputs.rate)] if jnp.ndim(inputs.rate) else inputs.rate

    def start(inputs: Inputs) -> State:
        nan = jnp.full((), jnp.nan, loss_dtype)
        norm = jnp.full((), jnp.nan, norm_dtype)
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), aux)
        optimizer = rule.init(rate_at(inputs, jnp.int32(0)), inputs.start)
        if settings.noisy and search(optimizer) is not None:
            raise InputError(
                "optimizer holds gdopt.spectral() or gdopt.quasi_newton(), which compare one value of the loss with "
                "the next: they are not for mini-batches or random keys. Pass gdopt.gd with a learning_rate, or leave "
                "batch_size out."
            )
        if not keep_best and search(optimizer) is not None:
            raise InputError(
                "keep_best=False was given with a rate that is found at each step, as gdopt.quasi_newton() and "
                "gdopt.spectral() do: the last point may be a trial that is to be taken back. Pass a learning_rate, or "
                "leave keep_best out."
            )
        best = _trees.copy(settings.compact(inputs.start)) if keep_best else None
        state = State(
            step=jnp.int32(0),
            code=jnp.int32(RUNNING),
            params=_trees.copy(inputs.start),
            optimizer=_trees.copy(_trees.strong(optimizer)),
            order=batches.first_order() if batches else None,
            watch=_stopping.first_watch(loss_dtype, norm.dtype),
            kept=Kept(best, jnp.int32(0), nan, norm, blank),
            ending=_stopping.first_ending(loss_dtype),
        )
        return settings.in_place(state)

    def step(state: State, inputs: Inputs) -> tuple[State, tuple]:
        k, params = state.step, state.params
        given, order = loss_inputs(inputs, state.order, k)
        (loss, aux), grad = traced_loss.replay(traced_loss.constants, params, inputs.constants, *given)
        value, grad_norm = loss.astype(loss_dtype), _trees.norm(settings.compact(grad))

        here = settings.compact(params)
        away = jax.tree.map(jnp.subtract, here, settings.compact(inputs.start))
        distance = _trees.quick_norm(away)
        finite = lax.cond(jnp.isfinite(distance), lambda: jnp.asarray(True), lambda: _trees.all_finite(here))
        largest = _trees.largest(settings.compact(grad)) if settings.tests_gradient else None
        point = Evaluation(k, value, grad_norm, distance, finite, largest)
        found = search(state.optimizer)
        if found is not None:
            found = Search(found.rejected >= MAX_REJECTED, found.accepted, found.left.astype(loss_dtype))
        epoch = epoch_of(inputs, k)
        code, watch = _stopping.judge(state.watch, state.kept.loss, point, inputs.limits, found, eps, epoch)
        running = code == RUNNING
        if not settings.noisy:
            finite &= jnp.isfinite(grad_norm) & jnp.isfinite(value)
            lower = (value < state.kept.loss) | ((value == state.kept.loss) & (grad_norm == 0))
            keep = (k == 0) | (finite & lower)
        else:
            failed = _stopping.failed(code)
            keep = (k == 0) | jnp.where(running, _stopping.is_good(watch, value), ~failed)
        kept = Kept(here if keep_best else None, k, value, grad_norm, _trees.strong(aux))
        kept = _trees.select(keep, kept, state.kept) if keep_best else kept

        def asked(params: PyTree) -> jax.Array:
            asked_again.append(True)
            return task.value(params, *given)[0]

        rate = None if rule.owns_rate else jnp.asarray(rate_at(inputs, k))

        def update(params: PyTree, optimizer: PyTree) -> tuple[PyTree, PyTree]:
            optimizer = optimizer if rate is None else inject(optimizer, rate)
            updates, optimizer = rule.update(rate, grad, optimizer, params, **extra_arguments(asked, loss, grad))
            # Nothing else may read the updates: XLA would then round them before it adds them, where a loop written by
            # hand fuses both, and last bits would differ.
            return optax.apply_updates(params, updates), _trees.strong(optimizer)

        # Selected rather than under a cond, which costs more than it saves: all but a run's last step are made. That
        # one leaves the watch as it was, too: a save may go on under other limits, and make the evaluation again.
        new, old = (*update(params, state.optimizer), watch), (params, state.optimizer, state.watch)
        params, optimizer, watch = _trees.select(running, new, old)
        used = owned_rate(optimizer) if rate is None else rate
        record = (value, grad_norm, jnp.where(running, used, jnp.nan))
        new = State(k + running, code, params, optimizer, order, watch, kept, state.ending)
        return settings.in_place(new), record

    return start, step


class Programs(NamedTuple):
    """The compiled parts of a verification."""

    probe: Any  # a `program.Shared`, on many devices of all of it; None if the loss has no second derivatives
    free: program.Shared | None  # tells which entries the optimizer holds, if it may hold any
    closed: bool  # whether they depend on nothing else than on the traces and their inputs


class Verifier(NamedTuple):
    """Verifies a claim to be at a minimum: see `verification.settle`."""

    task: Task
    rule: Rule
    loss: program.Traced | None  # with its gradient; None if that is traced once there is a claim
    schedule: program.Traced | None
    settings: Settings
    eps: float

    def in_trace(self, state: State, inputs: Inputs) -> State:
        """The state with its claim verified, or withdrawn: then the run goes on."""

        def verify(state: State) -> State:
            params = returned_params(state)
            tree, exact = self._tree(params), True

            def at(xs: list) -> tuple[Any, list]:
                grad, loss = self._gradient(inputs, tree(xs))
                return loss, grad

            probe = Probe(at, lambda xs, ways: self._probe(tree(xs), tree(ways), inputs)[2])
            differences = lambda xs, ways: self._probe_by_differences(tree(xs), tree(ways), inputs)[2]
            try:
                jax.eval_shape(self._probe, *(_trees.as_real(params)[0],) * 2, inputs)
            except Exception:  # JAX raises various ones for a loss that has no second derivatives
                probe, exact = probe._replace(times=differences), False
            free = self.free(state, inputs) if self.rule.may_project else None
            return self._settled(InTrace, probe, differences, free, state, inputs, exact=exact)

        return lax.cond(_claims(state), verify, lambda state: state, state)

    @as_own_work
    def on_host(self, programs: Callable[..., Programs], carry: Carry, inputs: Inputs) -> Carry:
        """The same for a run that is not traced: what it computes with the loss is compiled now, if it was not yet."""
        state = carry[0].tree()
        if not _claims(state):
            return carry
        compiled = programs(state, inputs)
        if self.settings.layout is not None:
            return compiled.probe.call(carry[0], inputs), carry[1]
        free = compiled.free and jax.tree.map(_trees.on_host, compiled.free.call(state, inputs))
        params = returned_params(state)
        tree, exact = self._tree(params), compiled.probe is not None
        still = tree([np.zeros_like(block) for block in self._blocks(params)])
        first = compiled if exact else programs(state, inputs, exact=False)

        def at(xs: list) -> tuple[Any, list]:
            loss, grad, _ = first.probe.call(tree(xs), still, inputs)
            return _trees.on_host(loss)[()], list(map(_trees.on_host, grad))

        def times(xs: list, ways: list) -> list:
            return list(map(_trees.on_host, first.probe.call(tree(xs), tree(ways), inputs)[2]))

        def differences(xs: list, ways: list) -> list:
            second = programs(state, inputs, exact=False)
            return list(map(_trees.on_host, second.probe.call(tree(xs), tree(ways), inputs)[2]))

        with np.errstate(all="ignore"):
            probe = Probe(at, times)
            state = self._settled(OnHost, probe, differences, free, state, inputs, exact=exact)
        return _trees.pack(state), carry[1]

    @as_own_work
    def look_back(
        self, programs: Callable[..., Programs], state: State, inputs: Inputs, rate: float | None
    ) -> Hindsight:
        """Look at the loss where a run ended that did not get to a minimum: see `hindsight`."""
        params = returned_params(state)
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        if self.settings.layout is not None or any(jnp.iscomplexobj(leaf) for _, leaf in paths):
            return Hindsight()
        compiled = programs(state, inputs)
        compiled = compiled if compiled.probe else programs(state, inputs, exact=False)
        real = lambda leaves: _trees.as_real(treedef.unflatten(leaves))[0]
        tree = self._tree(params)

        def probe(xs: list, ways: list) -> Any:
            _, grad, product = compiled.probe.call(real(xs), real(ways), inputs)
            grad, product = (list(map(_trees.on_host, blocks)) for blocks in (grad, product))
            return jax.tree.leaves(tree(grad)), jax.tree.leaves(tree(product))

        names = [_trees.path_name(path) for path, _ in paths]
        with np.errstate(all="ignore"):
            return look_back(probe, names, [_trees.on_host(leaf) for _, leaf in paths], rate)

    def programs(
        self,
        value: program.Traced,
        shared: dict[bool, Programs],
        own: dict[bool, Programs],
        state: State,
        inputs: Inputs,
        *,
        exact: bool = True,
    ) -> Programs:
        """The programs of earlier calls or of this one, made when they are first asked for.

        Products of the Hessian are ``exact``, or differences of gradients.
        """
        if exact not in shared and exact not in own:
            made = self._programs(value, state, inputs, exact=exact)
            (shared if made.closed else own)[exact] = made
        return shared[exact] if exact in shared else own[exact]

    def _programs(self, value: program.Traced, state: State, inputs: Inputs, *, exact: bool) -> Programs:
        task = self.task
        batch = task._replace(data=inputs.data).batch
        loss, _ = program.with_gradient(value, task.value, inputs.start, batch, inputs.args, None)
        traced = self._replace(loss=loss)
        if self.settings.layout is not None:
            whole = lambda packed, inputs: _trees.pack(traced.in_trace(packed.tree(), inputs))
            made = program.share(whole, _trees.pack(state), inputs)
            return Programs(made, None, made.closed)
        real, _ = _trees.as_real(returned_params(state))
        try:
            made = program.share(traced._probe if exact else traced._probe_by_differences, real, real, inputs)
        except Exception:
            if not exact:
                raise
            made = None  # JAX raises various ones for a loss that has no second derivatives
        free = program.share(traced.free, state, inputs) if exact and self.rule.may_project else None
        parts = [part for part in (made, free) if part]
        return Programs(made, free, all(part.closed for part in parts))

    def _probe(self, xs: PyTree, ways: PyTree, inputs: Inputs) -> tuple[jax.Array, list, list]:
        """The loss, its gradient, and the Hessian times a direction.

        Given trees of real leaves: those of one shape are compiled once, slices of a vector each for itself.
        """
        gradient = functools.partial(self._gradient, inputs)
        grad, product, loss = jax.jvp(gradient, (xs,), (ways,), has_aux=True)
        return loss, grad, product

    def _probe_by_differences(self, xs: PyTree, ways: PyTree, inputs: Inputs) -> tuple[jax.Array, list, list]:
        """The same for a loss that has no second derivatives: an entry moves by a share of its direction."""
        grad, loss = self._gradient(inputs, xs)
        share = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(xs)) ** (1 / 3)
        beside = lambda share: jax.tree.map(lambda x, way: x + share * way, xs, ways)
        (above, _), (below, _) = (self._gradient(inputs, beside(sign * share)) for sign in (1, -1))
        return loss, grad, [(a - b) / (2 * share) for a, b in zip(above, below, strict=True)]

    def _gradient(self, inputs: Inputs, xs: PyTree) -> tuple[list, jax.Array]:
        _, back = _trees.as_real(inputs.start)
        loss, grad = self._value_and_grad(inputs, back(xs))
        return self._blocks(grad), loss

    def _value_and_grad(self, inputs: Inputs, params: PyTree) -> tuple[jax.Array, PyTree]:
        traced: Any = self.loss
        given = inputs.constants, inputs.data, inputs.args, None
        (loss, _), grad = traced.replay(traced.constants, params, *given)
        return loss, grad

    def _blocks(self, tree: PyTree) -> list:
        """A tree like the params as a few real arrays."""
        return jax.tree.leaves(self.settings.compact(_trees.as_real(tree)[0]))

    def _tree(self, params: PyTree) -> Callable[[list], PyTree]:
        """Back from `_blocks` to the tree of real leaves from which they were made."""
        treedef = jax.tree.structure(self.settings.compact(_trees.as_real(params)[0]))
        return lambda blocks: treedef.unflatten(blocks).tree()

    def free(self, state: State, inputs: Inputs) -> list:
        """0 for entries that the optimizer holds at a bound: that it moves against the gradient alone, not along it."""
        params, rule = returned_params(state), self.rule
        loss, grad = self._value_and_grad(inputs, params)
        given = inputs.data, inputs.args, None
        rate = None
        if not rule.owns_rate:
            rate = self.schedule.replay(inputs.numbers, state.step) if self.schedule else jnp.asarray(inputs.rate)

        def moved(number: jax.Array) -> PyTree:
            turned = jax.tree.map(lambda g: (1 - 2 * number).astype(g.real.dtype) * g, grad)
            extras = extra_arguments(lambda params: self.task.value(params, *given)[0], loss, turned)
            updates, _ = rule.update(rate, turned, state.optimizer, params, **extras)
            return jax.tree.map(jnp.not_equal, optax.apply_updates(params, updates), params)

        both = lax.map(moved, lax.iota(jnp.int32, 2))
        return self._blocks(jax.tree.map(lambda m, x: jnp.where(~m[0] & m[1], 0, 1).astype(x.dtype), both, params))

    def _settled(
        self,
        place: Any,
        probe: Probe,
        differences: Callable,
        free: list | None,
        state: State,
        inputs: Inputs,
        *,
        exact: bool,
    ) -> State:
        kept, np = state.kept, place.np
        params = jax.tree.map(np.asarray, returned_params(state))
        real, back = _trees.as_real(params)
        searches = search(state.optimizer) is not None
        claim = Claim(
            state.code,
            state.step,
            self._arrays(place, real),
            self._arrays(place, _trees.as_real(jax.tree.map(np.subtract, params, inputs.start))[0]),
            kept.loss,
            kept.grad_norm,
            state.watch,
            free,
        )
        new = settle(place, probe, differences, claim, inputs.limits, self.eps, exact=exact, searches=searches)
        state = state._replace(code=new.code, watch=new.watch, ending=new.ending)
        if not searches:
            return state
        there = back(self._tree(params)(new.point))
        there = jax.tree.map(lambda x, old: np.asarray(x, old.dtype), there, params)
        optimizer = place.select(new.restarts, restarted(state.optimizer), state.optimizer)
        params = place.select(new.moves, there, state.params)
        return state._replace(step=(state.step + new.moves).astype(np.int32), params=params, optimizer=optimizer)

    def _arrays(self, place: Any, tree: PyTree) -> list:
        return [place.np.asarray(leaf) for leaf in jax.tree.leaves(self.settings.compact(tree))]


def _claims(state: State) -> Any:
    return (state.code == Status.CONVERGED) | (state.code == Status.PRECISION_LIMIT)


def _first(
    start: Callable[[Inputs], State], inputs: Inputs, traced_loss: program.Traced, everywhere: Callable
) -> Callable[[Inputs], Carry]:
    """``start`` with room for the first rows of the history; what the host reads is to be ``everywhere``."""
    loss = traced_loss.out[0][0].dtype
    dtype = jnp.result_type(loss, jnp.float32, _trees.norm_dtype(inputs.start), float)

    def first(inputs: Inputs) -> Carry:
        state = start(inputs)
        records = jnp.zeros((CAPACITY, *state.code.shape, len(History._fields)), dtype)
        return _read_by_host((_trees.pack(state), records), everywhere)

    return first


def _read_by_host(carry: Carry, everywhere: Callable) -> Carry:
    return dataclasses.replace(carry[0], vectors=everywhere(carry[0].vectors)), everywhere(carry[1])


def _chunk(step: Callable[[State, Inputs], tuple[State, tuple]], everywhere: Callable) -> Callable:
    """Many steps, up to a limit or the end, as one ``while_loop``."""

    def chunk(carry: Carry, first: jax.Array, limit: jax.Array, inputs: Inputs) -> tuple[Carry, jax.Array]:
        def body(carry: Carry) -> Carry:
            state, records = carry[0].tree(), carry[1]
            at = state.step - first
            state, record = step(state, inputs)
            row = jnp.stack([entry.astype(records.dtype) for entry in record], axis=-1)
            return _trees.pack(state), lax.dynamic_update_index_in_dim(records, row, at, 0)

        def goes_on(carry: Carry) -> jax.Array:
            state = carry[0].tree()
            return (state.code == RUNNING).any() & (state.step < limit)

        carry = _read_by_host(lax.while_loop(goes_on, body, carry), everywhere)
        return carry, carry[0].tree().code

    return chunk


def _whole(
    start: Callable, step: Callable, verify: Callable, settings: Settings, has_target: bool
) -> Callable[[Inputs], Outcome]:
    """All steps in one program. Mini-batches take a loop in a loop, so that a vmap of it shuffles once per epoch and
    not at each step, where a batched ``cond`` would do both of what it is to choose from."""
    batches = settings.batches

    def steps(packed: Packed, inputs: Inputs, limit: Any = LAST_STEP) -> Packed:
        def goes_on(packed: Packed) -> jax.Array:
            state = packed.tree()
            return (state.code == RUNNING) & (state.step < limit)

        return lax.while_loop(goes_on, lambda packed: _trees.pack(step(packed.tree(), inputs)[0]), packed)

    def shuffled(state: State, inputs: Inputs) -> State:
        return state._replace(order=batches.order(jax.random.fold_in(inputs.key, 0), state.step)) if batches else state

    def epoch(packed: Packed, inputs: Inputs, per_epoch: int) -> Packed:
        state = shuffled(packed.tree(), inputs)
        return steps(_trees.pack(state), inputs, (state.step // per_epoch + 1) * per_epoch)

    def whole(inputs: Inputs) -> Outcome:
        packed = _trees.pack(start(inputs))
        if batches:
            running = lambda packed: packed.tree().code == RUNNING
            per_epoch = batches.per_epoch
            packed = lax.while_loop(running, lambda packed: epoch(packed, inputs, per_epoch), packed)
        elif settings.noisy:
            packed = steps(packed, inputs)
        else:  # a claim that does not hold is withdrawn, and the run goes on
            running = lambda packed: packed.tree().code == RUNNING
            rounds = lambda packed: _trees.pack(verify(steps(packed, inputs).tree(), inputs))
            packed = lax.while_loop(running, rounds, packed)
        state = ended = packed.tree()
        average = evaluation_params(state.optimizer, state.params)
        if average is not state.params:
            last = inputs._replace(limits=inputs.limits._replace(max_steps=state.step))
            again = shuffled(state._replace(code=jnp.int32(RUNNING), params=average), inputs)
            failed = _stopping.failed(state.code)
            state = _trees.select(failed, state, step(again, last)[0])
        params, kept = returned_params(state), state.kept
        success = _stopping.succeeded(ended.code, ended.watch, noisy=settings.noisy, has_target=has_target)
        return Outcome(params, kept.loss, kept.grad_norm, kept.aux, ended.step, ended.code, success, ended.ending)

    return whole


def _side_by_side(start: Callable, step: Callable) -> tuple[Callable, Callable]:
    """Both for many runs by ``vmap``. The step's number is left out of it, so that epochs are shuffled under a true
    ``cond``: batched, it would be a ``select``, and each step would pay for a shuffle."""
    each_inputs = Inputs._make(0 if name in ("key", "rate") else None for name in Inputs._fields)
    each_state = State._make(None if name == "step" else 0 for name in State._fields)

    def one(state: State, inputs: Inputs) -> tuple[State, tuple]:
        running = state.code == RUNNING
        new, record = step(state, inputs)
        record = jax.tree.map(lambda entry: jnp.where(running, entry, jnp.nan), record)
        # All but the order of the rows, which is large and of no use to a run that has ended.
        kept = _trees.select(running, new._replace(order=()), state._replace(order=()))
        return kept._replace(step=state.step, order=new.order), record

    def steps(state: State, inputs: Inputs) -> tuple[State, tuple]:
        each = jax.vmap(one, in_axes=(each_state, each_inputs), out_axes=(each_state, 0))
        new, records = each(state, inputs)
        return new._replace(step=state.step + (new.code == RUNNING).any()), records

    return lambda inputs: jax.vmap(start, (each_inputs,), each_state)(inputs), steps


def returned_params(state: State) -> PyTree:
    """The params that ``state.kept`` tells the loss of."""
    return state.params if state.kept.params is None else state.kept.params.tree()
