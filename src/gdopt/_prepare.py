"""``prepare``: check, trace and compile once, for many runs."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any, Literal

import jax

from gdopt import _jax, _trees
from gdopt._checkpoint.resume import NoSaves
from gdopt._compile import program
from gdopt._devices.current import callers_mesh, on_auto_axes
from gdopt._devices.processes import joined, peers
from gdopt._devices.sharding import Layout, explicit_mesh
from gdopt._errors import InputError
from gdopt._loop import loop
from gdopt._loop.state import Carry, Compiled, Inputs
from gdopt._loop.step import loss_arguments
from gdopt._minimize import Call, Ready, carried_out, check_call, choose, needs_rates, tried
from gdopt._optimizers.method import Method, check_rate, is_auto
from gdopt._outcome.diagnose import recorded
from gdopt._outcome.ending import arrays_of
from gdopt._outcome.messages import explain
from gdopt._problem.lints import warn_of_no_gradient
from gdopt._problem.problem import Problem
from gdopt._problem.template import Template, template_of
from gdopt._result import Result
from gdopt._run import host_loop
from gdopt._settings import own_work
from gdopt._signals import check, interruptible
from gdopt._types import Loss, Optimizer, PyTree, Scalar, Schedule


class Prepared:
    """A call of `minimize` that `prepare` has checked, traced and compiled. Call it with other numbers.

    Args:
        params: the start, of the structure, shapes and dtypes of the params of the preparation. Leaves that are not
            optimised have to be those of the preparation. By default (None) the start of the preparation.
        args: the arguments of the loss, alike as well: arrays and numbers may change, functions and texts may not. By
            default (None) those of the preparation.
        data: arrays of the same shapes and dtypes. By default (None) those of the preparation.
        learning_rate: a number, if the call was prepared with a number. By default (None) that one.

    Returns:
        The `Result` that `minimize` returns. ``compile_seconds`` is the time before the loop. Inside ``jit``, ``vmap``
        and ``grad`` the call is traced as one of `minimize` is.

    Raises:
        InputError: for numbers that do not look like those of the preparation, and if a setting of JAX has changed
            since then (such as ``jax_enable_x64``).

    Example:
        >>> import gdopt, jax.numpy as jnp
        >>> solve = gdopt.prepare(lambda x, a: jnp.sum((x - a) ** 2), jnp.zeros(2), args=(jnp.ones(2),))
        >>> [round(float(solve(args=(jnp.full(2, a),)).params[0]), 2) for a in (1.0, 2.0, 3.0)]
        [1.0, 2.0, 3.0]
    """

    def __init__(self, template: Any, ready: Any, layout: Any):
        """Keep what `prepare` made."""
        self._template: Template = template
        self._ready: Ready = ready
        self._layout: Layout | None = layout
        self._settings = _jax.settings()

    @interruptible
    @on_auto_axes
    @joined
    def __call__(
        self,
        params: PyTree = None,
        *,
        args: tuple | None = None,
        data: PyTree = None,
        learning_rate: Scalar | None = None,
    ) -> Result:
        """Run from a start, with these numbers; see the class."""
        began = time.perf_counter()
        if names := _jax.changed(self._settings):
            raise InputError(
                f"{' and '.join(names)} changed since the call was prepared. Call gdopt.prepare again, or set it back."
            )
        problem = self._template.renewed(params, args, data)
        method, call = self._method(learning_rate), self._ready.call._replace(problem=problem)
        start = problem.objective.params
        if program.is_traced(start, problem.args, problem.data, method.rate):
            rate = call.learning_rate if learning_rate is None else method.rate
            return tried(call._replace(learning_rate=rate), began)
        rate = self._ready.inputs.rate if learning_rate is None else method.rate
        changes = {"start": start, "args": problem.args, "data": problem.data, "rate": rate}
        inputs = loop.renewed(self._ready.inputs, self._layout, **changes)
        ready = self._ready._replace(call=call, method=method, inputs=inputs)
        ended, _, times = carried_out(ready, NoSaves())
        seconds = {"compile_seconds": times[0] - began, "run_seconds": times[1] - times[0]}
        return ended.result(explain(ended), **seconds)

    def _method(self, learning_rate: Any) -> Method:
        """Return the optimizer at another rate; raise InputError if it was prepared without a number as its rate."""
        method = self._ready.method
        if learning_rate is None:
            return method
        fixed = isinstance(method.rate, float)
        rate = check_rate(method.optimizer, learning_rate) if fixed else None
        if rate is None or callable(rate) or is_auto(rate):
            prepared = "a schedule" if method.schedule else repr(self._ready.call.learning_rate)
            raise InputError(
                f"learning_rate={learning_rate!r} was given, but the call was prepared with {prepared}. Only a number "
                "may become another number. Call gdopt.prepare again."
            )
        return method._replace(rate=rate)

    def __repr__(self) -> str:
        objective = self._template.problem.objective
        return f"<gdopt.Prepared of {objective.loss!r} from {_trees.summary(objective.whole(objective.params))}>"


@interruptible
@on_auto_axes
@joined
def prepare(
    loss: Loss,
    params: PyTree,
    *,
    args: tuple = (),
    data: PyTree = None,
    batch_size: int | None = None,
    optimizer: Optimizer | None = None,
    learning_rate: Scalar | Schedule | Literal["auto"] = "auto",
    max_steps: int | None = None,
    epochs: int | None = None,
    tol: float | None = None,
    grad_tol: float | None = None,
    target: float | None = None,
    has_aux: bool = False,
    with_key: bool = False,
    key: jax.Array | None = None,
    trainable: Any = None,
    bounds: PyTree = None,
    project: Callable[[PyTree], PyTree] | None = None,
    prox: Callable[[PyTree, jax.Array], PyTree] | None = None,
    scale: PyTree | Literal["curvature"] = None,
    state: PyTree = None,
    optimizer_state: PyTree = None,
    keep_best: bool = True,
    record_params: bool = False,
    **others: Any,
) -> Prepared:
    """Check, trace and compile a call of `minimize` once, for many runs with other numbers.

    ``solve = prepare(loss, params, ...)`` takes the arguments of `minimize`. Then ``solve(params, args=..., data=...,
    learning_rate=...)`` returns the result that `minimize` would return for these, bit for bit, and neither calls the
    loss nor traces anything. Use it for many small fits, of which `minimize` traces each. Some ends are examined
    by a program that is traced at the first of their kind: a run which became NaN, a noisy run which did not fall, and
    with ``project`` or ``prox`` a claim to be at a minimum.

    The loss is what it was when it was prepared, with everything that it closes over: a global, a closure or an array
    that changes later does not count. So it is with ``project``, ``prox``, ``bounds``, ``scale`` (for ``"curvature"``
    the sizes at the start of the preparation), ``key``, ``state`` and all other arguments. Arrays of NumPy are copied.
    Weak types of arrays (that of ``jnp.full(3, 1.0)``) are dropped.

    Args:
        loss, params, args, data, batch_size, optimizer, learning_rate: as for `minimize`, with the same defaults.
            Shapes and dtypes are fixed here, numbers may change in each run. Data have to be arrays. Mini-batches, keys
            and states need a learning_rate or a ready optimizer (``optax.adam(1e-3)``), because "auto" would look for
            rates anew in each run.
        max_steps, epochs, tol, grad_tol, target, has_aux, with_key, key, trainable: as for `minimize`.
        bounds, project, prox, scale, state, optimizer_state, keep_best, record_params: as for `minimize`.
        others: none. The remaining arguments of `minimize` are for long runs: a callback, a progress bar, a checkpoint,
            validation. Call `minimize` for these. In place of ``throw=True`` call `Result.raise_for_status`.

    Returns:
        A `Prepared`: call it as often as you like, also in several threads. It keeps its compiled programs and the
        arrays that it was prepared with for as long as it lives.

    Raises:
        InputError: for bad input, before anything compiles, as `minimize` does; for an argument that is not supported;
            and inside ``jit``, ``vmap`` and ``grad``, if they trace what the loss reads. Prepare outside of these.

    Example:
        >>> import gdopt, jax.numpy as jnp
        >>> def loss(params, x, y):
        ...     return jnp.mean((params["slope"] * x + params["offset"] - y) ** 2)
        >>> x = jnp.linspace(-1.0, 1.0, 50)
        >>> start = {"slope": 0.0, "offset": 0.0}
        >>> solve = gdopt.prepare(loss, start, args=(x, x))
        >>> [round(float(solve(args=(x, k * x)).params["slope"]), 2) for k in (1, 2, 3)]
        [1.0, 2.0, 3.0]
    """
    given = locals()
    _refuse(**given.pop("others"))
    call = check_call(**given)
    _check_supported(call)
    template = template_of(call.problem, params, args, data, state, optimizer_state, bounds)
    method, _ = choose(template.problem, optimizer, learning_rate, call.steps, NoSaves())
    live, made = template.problem, None
    with contextlib.suppress(jax.errors.UnexpectedTracerError):
        made = _compiled(call, template._replace(problem=loop.frozen(live)), method, live)
    if made is None:  # A derivative rule closes over a value of the loss, so only the loss itself has a gradient.
        made = _compiled(call, template, method, live)
    if made is None:
        raise InputError("prepare was called inside jit, vmap or grad. Prepare outside of these.")
    if call.problem.constraint is None:
        warn_of_no_gradient(template.problem)
    check()
    return made


def _refuse(**others: Any) -> None:
    """Raise an error for arguments that `prepare` does not take."""
    for name in others:
        if name not in _OF_LONG_RUNS:
            raise TypeError(f"prepare() got an unexpected keyword argument {name!r}")
        cure = "Call .raise_for_status() of its results." if name == "throw" else "Call gdopt.minimize."
        raise InputError(
            f"{name}={_trees.summary(others[name])} was given to prepare, whose runs do not support it. {cure}"
        )


_OF_LONG_RUNS = (
    *("validation", "validation_loss", "patience", "callback", "callback_every", "progress", "checkpoint", "throw"),
)


def _check_supported(call: Call) -> None:
    """Raise InputError for calls that need the host in each run, or cannot be prepared where they are."""
    problem = call.problem
    if problem.stream is not None:
        raise InputError("data is a stream, which each run would read anew. Pass arrays to prepare, or call minimize.")
    if needs_rates(problem, call.optimizer, call.learning_rate):
        raise InputError(
            'learning_rate="auto" was given to prepare for mini-batches, keys, a state or an optimizer whose rates are '
            "looked for in each run. Pass a learning_rate, or a ready optimizer such as optax.adam(1e-3)."
        )
    if peers().several:
        raise InputError("prepare was called by several processes, which agree on each run. Call gdopt.minimize.")
    if loop.is_inside(problem):
        raise InputError(
            "prepare was called inside jit, vmap or grad, which trace what the loss reads. Prepare outside of these, "
            "or call gdopt.minimize."
        )
    arrays = problem.objective.params, problem.data, problem.args, problem.state
    if callers_mesh() is not None or explicit_mesh(*arrays) is not None:
        raise InputError("prepare was called on a mesh with Explicit axes. Use Auto axes, as gdopt.shard does.")


def _compiled(call: Call, template: Template, method: Method, live: Problem) -> Prepared | None:
    """Compile everything that a run may need; return None if something is traced."""
    problem = template.problem
    call = call._replace(problem=problem)
    compiled, inputs = call.compile(method, problem.data)
    if not isinstance(compiled, Compiled):
        return None
    carry = host_loop.begin(compiled, inputs)
    if compiled.ready is not None:
        compiled.ready(carry, inputs)
    template = template._replace(problem=problem._replace(record=_record(live, carry, inputs)))
    # A compiled identity takes a sixth of the time of `jax.device_put`.
    to_device = functools.partial(_trees.to_device, convert=jax.jit(lambda leaves: leaves))
    arrays_of(carry[0].tree(), to_device)  # This compiles it.
    ready = Ready(call, method, compiled, inputs, to_device=to_device)
    return Prepared(template, ready, loop.layout_of(inputs))


def _record(problem: Problem, carry: Carry, inputs: Inputs) -> Any:
    """Return a trace of the loss for `diagnose`; None if it cannot be traced once more."""
    state = carry[0].tree()
    with own_work(), contextlib.suppress(Exception):
        given = loss_arguments(inputs, state, problem.batches, with_key=problem.with_key)
        return recorded(problem, state.params, given)
    return None
