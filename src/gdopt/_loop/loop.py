"""The compiled loop around ``step`` (evaluate, test, update).

It is ``chunk`` (many steps, which `run` calls repeatedly), or inside ``jit``, ``vmap`` or ``grad`` ``whole`` (all
steps).
"""

from __future__ import annotations

import contextlib
from collections import ChainMap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _jax
from gdopt._compile import digests, program
from gdopt._devices.current import callers_mesh
from gdopt._devices.processes import Alone, comparable, peers
from gdopt._devices.sharding import CLOSED_OVER, Layout, anywhere, explicit_mesh, mapped_mesh, on_one_mesh
from gdopt._errors import InputError
from gdopt._loop import recorded
from gdopt._loop.implicit import differentiable
from gdopt._loop.region import Region, region_of
from gdopt._loop.state import Compiled, Inputs, Settings, Whole
from gdopt._loop.step import Step
from gdopt._loop.verifier import Verifier
from gdopt._loop.while_loops import chunk_loop, first_carry, side_by_side, whole_loop
from gdopt._optimizers.method import Method
from gdopt._problem import lints
from gdopt._problem.problem import Problem
from gdopt._settings import as_own_work, own_promotion, own_work
from gdopt._stopping import Epoch, Limits
from gdopt._types import PyTree

_TRIAL_INSIDE = (
    "lr_find was called inside jit, vmap or grad, directly or by learning_rate='auto' for a loss or an optimizer that "
    "needs a range test, but its curve is read in Python. Call gdopt.lr_find outside, and pass its suggestion as the "
    "learning_rate."
)


def compile(problem: Problem, *args: Any, **options: Any) -> tuple[Compiled | Whole, Inputs]:
    """Trace the loss once, and return the compiled loop, which all equal problems share, with its inputs.

    On a mesh with Explicit axes the loss is traced as on Auto axes, on which it need not say how to split each
    operation. If that fails, as in a `shard_map` over that mesh, it is traced on the Explicit axes.
    """
    try:
        return _compile(problem, *args, **options)
    except InputError:
        raise
    except Exception as error:
        mesh = explicit_mesh(problem.objective.params, problem.data, problem.args, problem.state) or callers_mesh()
        key = problem.key if problem.with_key else None
        with contextlib.suppress(Exception):
            if mesh is None and not any(note.startswith("gdopt") for note in getattr(error, "__notes__", ())):
                # The loss itself can be traced, and its trace shows the mesh that it maps over.
                given = problem.objective.params, problem.batch, problem.args, key, problem.state
                mesh = mapped_mesh(problem.value, *given)
            if mesh is not None:
                return _compile(problem._replace(explicit=mesh), *args, **options)
        raise


def _compile(
    problem: Problem,
    method: Method,
    limits: Limits,
    key: jax.Array | None,
    *,
    trial: bool = False,
    keep_best: bool = True,
    metrics: bool = False,
    params: bool = False,
) -> tuple[Compiled | Whole, Inputs]:
    """Compile the loop of a problem; with ``metrics`` it records the scalars of the aux, with ``params`` these.

    If jit, vmap or grad traces any of the inputs, it traces all of the loop.

    With many keys it is the loop of as many runs side by side, each with its own key and rate. All make the same step,
    and a run that has ended stays as it is. A ``trial`` shows what its rates do, however small they are: only failures
    and the number of steps end it. Without ``keep_best`` there is no point to fall back on.
    """
    noisy = problem.noisy or trial
    start, data, args, state = _placed(problem)
    batch = problem._replace(data=data).batch
    one_key = jax.ShapeDtypeStruct((), key.dtype) if key is not None and problem.with_key else None
    given = batch, args, one_key, state
    value = program.trace(problem.value, start, *given, rules=True)
    lints.warn_of_all_pairs(value.jaxpr)
    with own_promotion():
        schedule = None if method.schedule is None else program.trace(method.rate_at, np.int32(0), lift=True)
        region, confines = region_of(problem.constraint, start)
    numbers = schedule and schedule.constants
    epoch = None if problem.stream is None else Epoch(begins=True, ends=False, steps=1)
    rate, warm = None if schedule else method.rate, problem.optimizer_state
    inputs = Inputs(start, data, args, key, rate, limits, value.constants, numbers, state, warm, confines, epoch)
    inputs, layout = _inputs_on_one_mesh(inputs, constants_stay=problem.explicit is not None)
    inside = program.is_traced(inputs)
    if inside and trial:
        raise InputError(_TRIAL_INSIDE)
    if inside:
        _check_mapped(inputs.start, value)
    tests_gradient = limits.grad_tol is not None
    flags = problem.with_key, keep_best, tests_gradient, metrics, params, inside
    settings = Settings(noisy, problem.batches, *flags, None if inside else layout)
    options = method.identity, schedule.identity if schedule else (), settings, inside and limits.has_target
    options = options if region is None else (*options, *region.identities)

    # A trace of the loss identifies its gradient, too. But if it has derivative rules, only a trace of that does.
    seen = program.place_for((value.identity, *options), inputs, passing=True)
    if not seen:
        loss, value = program.with_gradient(value, problem.value, start, *given)
        kept = program.place_for((loss.identity, *options), inputs)
        if not kept:
            with own_promotion():
                made, closed = _make(problem, method, inputs, loss, schedule, settings, region)
            if not closed:
                return _finished(problem, method, value, schedule, settings, made, region), inputs
            kept.append(made)
        seen.append(kept[0])
    return _finished(problem, method, value, schedule, settings, seen[0], region), inputs


def _placed(problem: Problem) -> list[PyTree]:
    """Return params, data, args and state on the devices on which the loss, which is traced for these, will run."""
    trees = {"params": problem.objective.params, "data": problem.data, "args": problem.args, "state": problem.state}
    return list(on_one_mesh(trees)[0].values())


def frozen(problem: Problem) -> Problem:
    """Trace the loss, and return the problem with that trace in place of it: changes from here on do not count."""
    start, data, args, state = _placed(problem)
    batch = problem._replace(data=data).batch
    key = jax.ShapeDtypeStruct((), problem.key.dtype) if problem.with_key else None
    traced = program.trace(problem.value, start, batch, args, key, state, rules=True, owned=True)
    return problem._replace(traced=traced)


def layout_of(inputs: Inputs) -> Layout | None:
    """Return the placement of inputs on many devices."""
    return _inputs_on_one_mesh(inputs, constants_stay=False)[1]


def renewed(inputs: Inputs, layout: Layout | None, **changes: Any) -> Inputs:
    """Return inputs with other values in some fields, in their places; raise InputError if these are other places."""
    placed, found = _inputs_on_one_mesh(inputs._replace(**changes), constants_stay=False)
    if found != layout:
        raise InputError(
            "the arrays of a prepared call are split over the devices in another way than at its preparation. Place "
            "them alike (for example with gdopt.shard), or call gdopt.prepare again."
        )
    return placed


def _check_mapped(params: PyTree, value: program.Traced) -> None:
    """Raise InputError, inside a `shard_map`, for a run that its devices would end at different steps.

    They would wait for each other for ever, or JAX would refuse the loop because it tracks what differs.
    """
    mapped = jax.sharding.get_abstract_mesh().manual_axes
    if not mapped:
        return
    each = "For a run on each of them return the loss of the device alone, and pass check_vma=False to jax.shard_map."
    differ = _jax.varying(value.out[0]).union(*map(_jax.varying, jax.tree.leaves(params)))
    for axis in sorted(differ):
        raise InputError(
            f"inside jax.shard_map the loss or the params differ between the devices of {axis!r}. For one run on all "
            f"of them return jax.lax.pmean(loss, {axis!r}), and pass params that are the same on each. {each}"
        )
    sums = () if value.jaxpr is None else _jax.calls(value.jaxpr, "psum")
    for axis in sorted({axis for eqn in sums for axis in eqn.params.get("axes", ())} & {*mapped}):
        raise InputError(
            f"inside jax.shard_map with check_vma=False, or jax.pmap, the loss is summed up over {axis!r}, but JAX "
            f"does not sum up its gradient. For one run on all devices pass check_vma=True to jax.shard_map. {each}"
        )


def _finished(
    problem: Problem,
    method: Method,
    value: program.Traced,
    schedule: program.Traced | None,
    settings: Settings,
    made: Compiled | Whole,
    region: Region | None,
) -> Compiled | Whole:
    """Add what belongs only to this call: derivatives, or the check of a claim."""
    if isinstance(made, Whole):
        return _differentiable(made, value, settings.noisy, region)
    if settings.noisy:
        return made
    known = ChainMap({}, made.probes)
    verifier = Verifier(problem, method, None, schedule, settings, made.eps, value, known, region)
    looks = {"look_back": verifier.look_back, "noise": verifier.noise}
    return made._replace(verify=verifier.on_host, ready=verifier.make_ready, **looks)


def is_inside(problem: Problem) -> bool:
    """Tell whether jit, vmap or grad traces any of what the loss of a problem reads."""
    traced, _ = traced_anywhere(problem, problem.key if problem.with_key else None)
    given = problem.objective.params, problem.data, problem.args, problem.given_key
    with own_promotion():
        _, confines = region_of(problem.constraint, problem.objective.params)
    given = *given, problem.state, problem.optimizer_state, confines
    return program.is_traced(given, traced.constants)


def traced_anywhere(problem: Problem, key: jax.Array | None) -> tuple[program.Traced, tuple]:
    """Trace the loss without the places of its arrays, and return what it was traced with, too.

    If it needs the places, as a `shard_map` over Explicit axes does, it is traced with them.
    """
    given = problem.objective.params, problem.batch, problem.args, key, problem.state
    bare = jax.tree.map(anywhere, given)
    try:
        return program.trace(problem.value, *bare, rules=True), bare
    except Exception as error:
        if not _jax.misplaced(error):
            raise
        return program.trace(problem.value, *given, rules=True), given


def check_alike(problem: Problem, **given: Any) -> None:
    """Raise InputError if several processes were called with different arguments."""
    others = peers()
    if isinstance(others, Alone):
        return
    if callable(given.get("learning_rate")):
        with own_work():
            given["learning_rate"] = [float(given["learning_rate"](step)) for step in (0, 1, 10, 100, 1000)]
    others.compare(
        loss=digests.text(
            problem.value, problem.objective.params, problem.batch, problem.args, problem.key, problem.state
        ),
        params=comparable(problem.objective.params),
        data=comparable(problem.data),
        args=comparable(problem.args),
        key=comparable(problem.key),
        batches=problem.batches,
        state=comparable(problem.state),
        optimizer_state=comparable(problem.optimizer_state),
        **given,
    )


def _differentiable(made: Whole, value: program.Traced, noisy: bool, region: Region | None) -> Whole:
    """Give a run inside a transformation the derivatives of a minimum."""

    def of(params: PyTree, constants: list, data: PyTree, args: PyTree, _: Any) -> tuple[jax.Array, PyTree]:
        return value.replay(constants, params, data, args, None, None)

    known = lambda _, inputs: (inputs.constants, inputs.data, inputs.args, inputs.constraint)
    confined = None if region is None else region.confined
    return made._replace(solve=differentiable(made.solve, of, known, defined=not noisy, confined=confined))


def _inputs_on_one_mesh(inputs: Inputs, *, constants_stay: bool) -> tuple[Inputs, Layout | None]:
    """Place the inputs on the devices that some of them are on."""
    names = {"start": "params", "data": "data", "args": "args", "constants": CLOSED_OVER}
    names |= {"state": "state", "optimizer_state": "optimizer_state", "constraint": "the constraint"}
    names |= {"key": "key", "rate": "learning_rate", "numbers": "what the schedule closes over"}
    stay = {names["constants"]} if constants_stay else ()
    trees, layout = on_one_mesh({name: getattr(inputs, field) for field, name in names.items()}, stay)
    return inputs._replace(**{field: trees[name] for field, name in names.items()}), layout


def _make(
    problem: Problem,
    method: Method,
    inputs: Inputs,
    traced_loss: program.Traced,
    schedule: program.Traced | None,
    settings: Settings,
    region: Region | None,
) -> tuple[Compiled | Whole, bool]:
    """Return the loop around a traced loss, and whether it depends on nothing but that trace and its inputs."""
    step = Step(problem, method, traced_loss, schedule, settings, region)
    eps = float(jnp.finfo(traced_loss.out[0][0].dtype).eps)
    if not settings.inside:
        many_runs = inputs.key is not None and inputs.key.ndim
        start, steps = side_by_side(step.start, step) if many_runs else (step.start, step)
        everywhere = settings.layout.everywhere if settings.layout else lambda tree: tree
        first = program.share(first_carry(start, everywhere, metrics=settings.metrics, params=settings.params), inputs)
        many = program.share(
            chunk_loop(steps, everywhere, params=settings.params),
            first.out,
            np.int32(0),
            np.int32(0),
            inputs,
            donate_first=True,
        )
        if not program.is_traced(first.constants, many.constants):
            closed = first.closed and many.closed and not step.asks_again
            width = recorded.width(inputs.start) if settings.params else 0
            calls = as_own_work(first.call), as_own_work(many.call)
            return Compiled(*calls, first.out, eps, width, [], {}), closed
        if many_runs:
            raise InputError(_TRIAL_INSIDE)
        settings = settings._replace(inside=True)  # An optimizer closes over traced values.
        step = Step(problem, method, traced_loss, schedule, settings, region)
    verifier = Verifier(problem, method, traced_loss, schedule, settings, eps, region=region)
    verify = (lambda state, _: state) if settings.noisy else verifier.in_trace
    loop = whole_loop(step.start, step, verify, verifier.held, settings, inputs.limits.has_target)
    whole = program.share(loop, inputs)
    return Whole(whole.run, whole.constants), whole.closed and not step.asks_again
