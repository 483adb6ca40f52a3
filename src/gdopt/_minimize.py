"""``minimize``: check, compile, run, report."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from gdopt import _trees
from gdopt._checkpoint.folder import Checkpoint
from gdopt._checkpoint.resume import NoSaves, Saves, saves_at
from gdopt._checks import check_flags
from gdopt._compile import program
from gdopt._devices.current import on_auto_axes
from gdopt._devices.processes import check_joined, joined
from gdopt._loop import loop, recorded
from gdopt._loop.state import Compiled, Inputs, Whole
from gdopt._optimizers.distance import distance_adamw, distance_gd
from gdopt._optimizers.factory import check_optimizer, is_transformation
from gdopt._optimizers.method import Method, check_rate, is_auto, make_method
from gdopt._optimizers.spectral import gd
from gdopt._outcome.ending import Ended, refuse_host_visits, result_inside
from gdopt._outcome.messages import explain, failure
from gdopt._problem.constraint import constrained
from gdopt._problem.limits import Steps, check_grad_tol, check_steps, check_target, check_tol
from gdopt._problem.lints import warn_of_no_gradient
from gdopt._problem.objective import make_objective
from gdopt._problem.problem import Problem, make_problem
from gdopt._problem.scaling import scaled
from gdopt._problem.validation import Validation, check_validation
from gdopt._rate_finder.auto import rates_found
from gdopt._rate_finder.lr_find import Cut
from gdopt._result import RangeTest, Report, Result
from gdopt._run import host_loop
from gdopt._run.callback import Watcher, check_callback
from gdopt._run.progress import progress_bar
from gdopt._run.sources import source_of
from gdopt._run.validation import check_loss, validator_of
from gdopt._signals import check, interruptible
from gdopt._status import Status
from gdopt._stopping import Limits
from gdopt._types import Loss, Optimizer, PyTree, Scalar, Schedule


@interruptible
@on_auto_axes
@joined
def minimize(
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
    validation: PyTree = None,
    validation_loss: Loss | None = None,
    patience: int | None = None,
    callback: Callable[[Report], Any] | None = None,
    callback_every: int | Literal["epoch"] | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    throw: bool = False,
) -> Result:
    """Minimise a differentiable loss by gradient descent, or by any optax optimizer, in one compiled loop.

    If you pass only a loss and params, `quasi_newton` finds every step. Each step evaluates the loss and its gradient,
    tests whether to stop, and then updates. So N updates make N + 1 evaluations, and every reported loss belongs to the
    params beside it. Nothing is recompiled for a new rate, limit or number in ``args``, for new data of the same shape,
    or for a fresh lambda that computes the same.

    Args:
        loss: ``loss(params, *args)``, or with data ``loss(params, batch, *args)``: a real floating-point scalar.
        params: any pytree. Float and complex leaves (arrays, and numbers in dicts, lists and tuples) are optimised in
            their own dtype. Functions, strings, None, random keys and numbers inside modules are carried along. So are
            all variables of Flax's nnx but its Params, unless ``trainable`` names them.
        args: further arguments of the loss, any pytrees. Arrays and numbers are traced, as by ``jax.jit``. Arrays of
            other libraries (torch tensors, pandas objects) become arrays of JAX.
        data: a pytree of arrays with a shared leading axis, such as ``(X, y)``, kept on the device; or a stream. A
            stream is an iterable of batches (a torch ``DataLoader``, a grain loader), read once per epoch, or a
            function that returns one. Batches are pytrees of NumPy or JAX arrays, torch tensors or pandas objects. All
            have the containers, the axes and the kinds of numbers of the first; the lengths of axes may differ. They
            move to the device while the step before is computed. Each makes one update, also a last one with fewer
            rows. The point after the last update is evaluated on the last batch once more (with arrays, on the next
            one). The loss takes a batch as one argument: write ``X, y = batch`` in it.
        batch_size: rows per step, for arrays. Rows are shuffled anew in each epoch, and those that fill no batch sit
            that epoch out. By default (None) each step sees all rows, unshuffled.
        optimizer: an optax transformation, which owns its rate (``optax.lbfgs()``), or a factory ``learning_rate ->
            transformation``: ``gdopt.gd``; ``optax.adam``; ``functools.partial(optax.sgd, momentum=0.9)``. The default
            (None) is `quasi_newton` for a deterministic loss, with fewer pairs if params would take too much memory. It
            is `distance_adamw` for mini-batches and random keys, and `gd` if a learning_rate is given. Wrappers that
            skip gradients which are not finite decide about these with a noisy loss: ``optax.apply_if_finite``, and
            ``optax.MultiSteps`` with a ``should_skip_update_fn`` that returns a state. The run goes on until they give
            up and let one through. The history shows the skipped losses, but means, ``target`` and the returned point
            leave them out, and the model's ``state`` stays as it was. Without a wrapper the first NaN ends a run.
        learning_rate: ``"auto"``, the default; a positive number; or a schedule ``step -> rate`` of gdopt's, optax's or
            your own. With `gd` on a deterministic loss, "auto" is short for ``optimizer=gdopt.spectral()``, which finds
            the rate at every step. With mini-batches, random keys and other factories, it depends on what the updates
            do to a scaled gradient. If they do not depend on its scale (`distance_adamw`, Adam, Lion), "auto" is one
            cycle over all steps, times an estimated distance. If they do (`gd`, momentum), a range test of about 15 %
            of the steps comes first, and then three cycles, `triangular2`, around what it suggests; 0.01 with a warning
            if it suggests nothing. If the loss then diverges, ends above its start, or rises again by a quarter of
            its fall (told from the epochs of arrays, without ``state`` and validation), the run is repeated at a tenth
            of these rates, at most twice; not inside jit, nor with several processes or a stream that can be read only
            once. So ask for no more steps than you mean to make.
        max_steps: the updates after which to stop; by default 10,000, or as many as ``epochs`` has.
        epochs: passes over the data after which to stop; for arrays, ``rows // batch_size`` updates each.
        tol: a full-batch run has converged once what is left to gain is at most ``tol`` of what about the second half
            of the run has gained, or is lost in the rounding of the loss (30 eps of it). `quasi_newton` and `spectral`
            estimate what is left from the curvature they learn. For other optimizers it is at most ``|g| |x - x0|`` if
            the loss is convex. At the end the estimate is verified at the point that is returned: see ``Result.left``.
            ``tol`` has no scale: multiplying the loss or the params changes nothing. Default 1e-4; 0 asks for all that
            the dtype gives. Not for mini-batches, whose noisy gradients cannot tell.
        grad_tol: a full-batch run has converged as well once the largest entry of the gradient is at most this, which
            SciPy calls ``gtol``. Pass ``tol=0`` beside it to stop by this test alone. It has the units of the loss over
            those of the params. Default None: not tested.
        target: stop once the loss is at or below this value; with mini-batches or keys, the mean loss of an epoch.
        has_aux: the loss returns ``(value, aux)``; ``Result.aux`` is the aux of the returned params.
        with_key: the loss takes a keyword ``key``, a fresh one at each step.
        key: the source of those keys and of the shuffling; by default ``jax.random.key(0)``.
        trainable: the params to optimise: a pytree of bools that is a prefix of params, or a function of params that
            returns such a mask, as in ``optax.masked``. The rest, integers too, is passed to the loss unchanged.
        bounds: a pair ``(lower, upper)`` between which the params stay, both included: numbers, arrays of the shape of
            a leaf, trees like params or prefixes of them; None or infinity for no bound. SciPy's
            ``scipy.optimize.Bounds``, and for one array with one axis a list of a pair for each entry, are taken, too.
            A start outside is moved to the nearest point within, with a warning. The loss is never evaluated outside.
            With bounds `quasi_newton` minimises its quadratic model over the box. After the update of any other
            optimizer, also on mini-batches, the params are moved back into the bounds. Not for complex params. Default
            None: no bounds.
        project: a function params -> params that returns the nearest point of a convex set, such as
            ``optax.projections.projection_simplex``. It is applied to the start and after each update. By default
            `spectral` finds the rates: see there. On mini-batches the default is gradient descent with momentum at one
            rate for all entries, which follows an estimated distance as that of `distance_adamw` does. Adam and its
            like scale each entry by itself, and then end elsewhere than at the minimum within a set that is no box.
        prox: a function ``(params, rate) -> params``, the proximal step of a convex penalty that the loss leaves out,
            such as ``gdopt.prox.l1(0.1)``. It is applied after each update, at its rate. If it has a method ``value``,
            as those of `gdopt.prox` have, then the penalty ``prox.value(params)`` is added to each loss that is
            compared and reported. Otherwise losses are without it, and the last accepted point is returned. Pass one of
            bounds, project and prox. Arrays that they hold or close over may change without a new compilation.
        scale: typical sizes of the params, which R's ``optim`` calls ``parscale``: a positive number for each leaf or
            subtree of params, or an array of the shape of a leaf. Each is rounded to a power of two, so that no digit
            is lost. The run is exactly that of ``loss(scale * z)`` from ``params / scale``, with any optimizer and
            rate. ``"curvature"`` takes ``1 / sqrt(|d|)`` with the diagonal d of the Hessian at the start. It computes
            one product of the Hessian for each of up to 64 entries, and estimates d by ten for more. Params keep their
            own units in the loss, in callbacks and in the result. Rates, ``grad_tol``, ``grad_norm`` and derivatives of
            least norm are those of the scaled params. A checkpoint resumes only with the same sizes. Default None: not
            scaled. `quasi_newton` learns such sizes by itself, but starts sooner with them.
        state: what the model carries along beside its params, such as the running statistics of a batch norm or a count
            of batches: any pytree. The loss takes it as the keyword ``state``, and returns the next one beside its
            value: ``(value, state)``, or ``(value, (state, aux))`` with ``has_aux``. Each step passes on what it got
            from the loss. Arrays and numbers may change, but no structure, shape or dtype; the rest stays as it is. A
            loss with a state is another function at each step. So it counts as noisy, as one with mini-batches does.
            Default None: no state.
        optimizer_state: the optimizer's state to begin with, in place of a fresh one: the ``optimizer_state`` of a
            `Result`, or what ``optimizer.init(params)`` returns. Moments, counts and steps of a schedule inside the
            optimizer go on from there; steps and a ``learning_rate`` schedule of gdopt begin at 0. It has to fit the
            optimizer and the params that are optimised, with the same ``scale``. A range test begins with it, too.
            If gdopt plans one cycle, it is lower after a long training (down to a tenth of the distance in the state),
            because a higher one would lead away from a trained point. `quasi_newton` and `spectral` compare values of
            one loss, so their search begins anew at the start. Default None: a fresh one.
        keep_best: keep a copy of the best point (of a noisy run, the last good one) and return it, whatever comes after
            it. With False the last point is returned, be it good or not, and the run needs less memory: one copy of
            params less, and on a CPU another that XLA makes for its sake. Not if the rate is found at each step,
            because the last point is then a trial.
        record_params: keep the params of every step: see ``History.params``. It is for small params, which
            `gdopt.plot` draws: more than 1 GiB for all steps is an error. The run is the same to the last bit. Not
            inside ``jit``, ``vmap`` or ``grad``, and not with a checkpoint, which does not hold them.
        validation: data that the run does not learn from, of the structure of a batch: arrays with any number of rows,
            or a stream that can be read again. At the end of each epoch one compiled program evaluates their mean loss,
            without a gradient, in parts of at most 1024 rows (or ``batch_size``, if that is more). The losses are in
            ``Result.history``, and the params with the lowest one are returned; with ``keep_best=False``, the last
            ones. With ``has_aux`` the scalars of the aux are averaged per epoch, too, for training and validation. Only
            for mini-batches and streams, and for data with keys, of which an epoch is one step. A loss with a key gets
            the same key each time.
        validation_loss: a function called like the loss, which returns what the loss does; used for validation in its
            place (for example ``functools.partial(loss, training=False)``). With ``state`` it returns a state, too,
            which is not used. By default the loss itself.
        patience: the epochs without a new low of the validation loss after which the run stops, with success
            (EARLY_STOPPED). Default None: it does not stop for that.
        callback: called with a `Report` between two compiled chunks. It returns True to stop the run, and None or False
            to continue. If it raises, the run ends, and the error has its `Result` as ``error.result``. In a notebook
            `gdopt.plot.live` draws the loss.
        callback_every: the steps after which the callback is called, in each run the same, or "epoch" for the end of
            each epoch; and at the end of the run. Each such report costs one evaluation of the loss and its gradient,
            two if the optimizer keeps an average. By default (None) it is called after the first step, then about every
            50 ms (at first more often), and at the end of each epoch of mini-batches. Pass "epoch" to read
            ``validation_loss`` and metrics: before the end of the first epoch there are none.
        progress: show a progress bar (needs tqdm).
        checkpoint: a path, or a `Checkpoint`, at which the run saves itself every minute and at its end. Repeat the
            call with the same path to resume from the newest checkpoint that can be used. On the same machine the
            result is bit-for-bit that of an uninterrupted run; other devices or another number of cores are a warning.
            With more steps or epochs, a run that ended resumes beyond its end, by the same range test if there was one.
            Changed limits, a changed learning_rate (with both rates), loss or start, and other batches of a stream are
            warnings; any other difference (data, args, the optimizer) is an error. If the iterators of a stream have
            ``get_state`` and ``set_state``, as grain's do, and the state is bytes or what JSON holds, the stream is set
            to the last batch that was used. Other streams are replayed up to that point, as the result's message then
            says. Several processes give one path on a disk that they share; params that are split over them need orbax
            (``gdopt[checkpoint]``).
        throw: raise an error if the run does not end with success, instead of saying so in the result.

    Returns:
        A `Result`, also inside ``jit``, ``vmap`` and ``grad``. Inside these the whole run is one ``while_loop``, and
        numbers are arrays. Derivatives with respect to ``args``, ``data`` and what the loss closes over are those of
        the minimum, by the implicit function theorem. They are NaN unless the run ended at a smooth minimum: with
        success, at no kink, and not merely at ``target``. They are zero for the start and the rate, and an error for
        mini-batches and keys. ``params``, ``loss`` and ``aux`` have them; those of ``grad_norm`` and ``left``, which
        depend on each step, are NaN. Params that an optimizer holds at a bound do not move, and those at ``bounds=``
        move with the bound. They are NaN if the loss does not fall towards the bound of such an entry, and where a
        projection or prox has a kink, because they then have two sides. If the minimum is not
        unique, as with more params than rows, derivatives are those of least norm for up to 256 params. They are NaN
        for more params, or if the minimum jumps. They are as exact as the minimum, so lower ``tol`` for them. Call
        ``jax.jit`` around what you differentiate more than once.

        A full-batch run returns the best point it has seen, a noisy one its last; after DIVERGED or NON_FINITE the best
        or the last good one. The first Ctrl-C or SIGTERM, at any moment of a call in the main thread, ends the run with
        a result (INTERRUPTED) after the current step, and with a last checkpoint if it has a path for one. In a range
        test the result is the start. A second Ctrl-C raises KeyboardInterrupt, also if it comes within two seconds in a
        later call. Runs in other threads see no signals.

    Raises:
        InputError: for bad input, before anything compiles; and if the loss is not finite at the start of a range
            test.
        NotConvergedError: with ``throw=True``, if ``Result.success`` would be False; it carries the result.

    Source: the estimate g'H^-1 g / 2 of what is left is that of Minuit (James & Roos, "Minuit: a system for function
    minimization and analysis of the parameter errors and correlations", 1975), the bound ``|g| |x - x*|`` is of Boyd &
    Vandenberghe, "Convex Optimization", section 9.1.2. Bounds: Hintermüller, Ito & Kunisch, "The primal-dual active set
    strategy as a semismooth Newton method", 2003. Projections: Birgin, Martínez & Raydan, "Nonmonotone spectral
    projected gradient methods on convex sets", 2000. Proximal steps: Wright, Nowak & Figueiredo, "Sparse reconstruction
    by separable approximation", 2009. Their derivatives: Blondel et al., "Efficient and modular implicit
    differentiation", 2022.

    Example:
        >>> import gdopt, jax.numpy as jnp
        >>> def loss(params, x, y):
        ...     return jnp.mean((params["slope"] * x + params["offset"] - y) ** 2)
        >>> x = jnp.linspace(-1.0, 1.0, 50)
        >>> start = {"slope": 0.0, "offset": 0.0}
        >>> result = gdopt.minimize(loss, start, args=(x, 3 * x + 1))
        >>> result.status.name, round(float(result.params["slope"]), 2)
        ('CONVERGED', 3.0)
    """
    given = locals()
    began = time.perf_counter()
    result = tried(check_call(**given), began)
    return result.raise_for_status() if throw else result


class Call(NamedTuple):
    """The checked arguments of a call."""

    problem: Problem
    optimizer: Any
    learning_rate: Any
    steps: Steps
    limits: Limits
    has_steps: bool  # whether the caller gave max_steps or epochs
    keep_best: bool
    record_params: bool
    validation: Validation | None
    callback: Callable[[Report], Any] | None
    callback_every: int | str | None
    progress: bool
    checkpoint: str | os.PathLike[str] | Checkpoint | None
    refused: dict[str, Any]  # the arguments that a run inside a transformation does not support

    def compile(self, method: Method, data: PyTree) -> tuple[Any, Inputs]:
        """Return the compiled loop for data of these shapes, with its inputs."""
        key, some = self.problem.key if self.problem.noisy else None, self.problem._replace(data=data)
        metrics = self.problem.objective.has_aux and self.validation is not None
        record = {"metrics": metrics, "params": self.record_params}
        return loop.compile(some, method, self.limits, key, keep_best=self.keep_best, **record)


class Ready(NamedTuple):
    """A call that is compiled."""

    call: Call
    method: Method
    compiled: Compiled
    inputs: Inputs
    range_test: RangeTest | None = None
    to_device: Callable[[PyTree], PyTree] = _trees.to_device


def check_call(
    loss: Any,
    params: Any,
    *,
    args: Any,
    data: Any,
    batch_size: Any,
    optimizer: Any,
    learning_rate: Any,
    max_steps: Any,
    epochs: Any,
    tol: Any,
    grad_tol: Any,
    target: Any,
    has_aux: Any,
    with_key: Any,
    key: Any,
    trainable: Any,
    bounds: Any,
    project: Any,
    prox: Any,
    scale: Any,
    state: Any,
    optimizer_state: Any,
    keep_best: Any,
    record_params: Any,
    validation: Any = None,
    validation_loss: Any = None,
    patience: Any = None,
    callback: Any = None,
    callback_every: Any = None,
    progress: Any = False,
    checkpoint: Any = None,
    throw: Any = False,
) -> Call:
    """Check all arguments; raise InputError, before anything is compiled, for those that cannot be used."""
    check_optimizer(optimizer, searched=is_auto(learning_rate))
    every = check_callback(callback, callback_every, data)
    flags = {"keep_best": keep_best, "record_params": record_params, "progress": progress, "throw": throw}
    check_flags(has_aux=has_aux, with_key=with_key, **flags)
    objective = make_objective(loss, params, has_aux=has_aux, trainable=trainable)
    batches = {"data": data, "batch_size": batch_size}
    states = {"state": state, "optimizer_state": optimizer_state}
    problem = make_problem(objective, args=args, **batches, with_key=with_key, key=key, **states)
    steps = check_steps(max_steps, epochs, problem)
    noisy = problem.noisy
    limits = Limits(steps.most, check_tol(tol, noisy), check_grad_tol(grad_tol, noisy), check_target(target))
    if record_params:
        recorded.check(objective.params, steps, checkpoint)
    check_rate(optimizer, learning_rate)
    validated = check_validation(validation, validation_loss, patience, problem)
    check_loss(validated, problem)
    problem = scaled(constrained(problem, bounds, project, prox), scale)
    options = {"callback": callback, "checkpoint": checkpoint, "validation": validated}
    asked = {"learning_rate": learning_rate, "optimizer": optimizer, "limits": (*steps, *limits)}
    asked |= {"patience": patience, "callback_every": every}
    given = {name: value is not None for name, value in options.items()}
    loop.check_alike(problem, **asked, **given, keep_best=keep_best, record_params=record_params)
    if checkpoint is not None and loop.is_inside(problem):
        refuse_host_visits(checkpoint=checkpoint)
    has_steps = max_steps is not None or epochs is not None
    chosen = optimizer, learning_rate
    refused = {**options, "record_params": record_params, "progress": progress, "throw": throw}
    refused |= {"data": None if problem.stream is None else data}
    watched = validated, callback, every, progress, checkpoint
    return Call(problem, *chosen, steps, limits, has_steps, keep_best, bool(record_params), *watched, refused)


def tried(call: Call, began: float, before: Saves | NoSaves | None = None) -> Result:
    """Return the result of a run, or that of another try at lower rates if gdopt chose the rates and they failed."""
    problem, steps = call.problem, call.steps
    with saves_at(call.checkpoint, before) as saves:
        saves.compare(problem, steps, call.validation, keep_best=call.keep_best)
        try:
            method, range_test = choose(problem, call.optimizer, call.learning_rate, steps, saves)
        except Cut as cut:
            return _result_of_start(cut, call, began)
        compiled, inputs = call.compile(method, problem.data)
        if isinstance(compiled, Whole):
            refuse_host_visits(**call.refused)
            check()
            result = result_inside(compiled, inputs, problem)
            check()  # A vmap without a jit runs all steps there, where nothing can be interrupted.
            return result
        check_joined(inputs)
        ended, watcher, times = carried_out(Ready(call, method, compiled, inputs, range_test), saves)
        if ended.history.grad_norm[0] == 0 and problem.constraint is None:
            warn_of_no_gradient(problem)
    if method.lower is not None and ended.wants_lower_rates:
        saves.failed = *saves.failed, failure(ended)
        return tried(call, began, saves)
    message = explain(ended) + "".join(f" {sentence}" for sentence in saves.failed) + saves.told
    result = ended.result(message, compile_seconds=times[0] - began, run_seconds=times[1] - times[0])
    watcher.raise_failure(result)
    return result


def carried_out(ready: Ready, saves: Saves | NoSaves) -> tuple[Ended, Watcher, tuple[float, float]]:
    """Run to the end. Return the times at which all was compiled, and at which the run ended, too."""
    call, method, compiled, inputs, range_test, to_device = ready
    problem, steps = call.problem, call.steps
    pause = call.callback is not None or call.validation is not None
    source = source_of(problem, compiled, functools.partial(call.compile, method), steps, pause=pause)
    validator = validator_of(call.validation, problem, keep_best=call.keep_best)
    with progress_bar(call.progress, steps.expected) as advance:
        watcher = Watcher(call.callback, call.callback_every, validator, problem, source, advance)
        compiled_at, end, history, status = host_loop.run(compiled, source, inputs, watcher, saves)
    ended_at = time.perf_counter()
    last, known = source.last_inputs(inputs), (source.steps_per_epoch, source.why, validator.judgement)
    facts = problem, method, compiled, last, end, history, status, call.has_steps, range_test, *known
    ended = Ended(*facts, to_device=to_device)
    return ended, watcher, (compiled_at, ended_at)


def needs_rates(problem: Problem, optimizer: Any, learning_rate: Any) -> bool:
    """Tell whether gdopt is to find rates that it then keeps, by a range test or by the number of steps."""
    finds_steps = is_transformation(optimizer) or (not problem.noisy and (optimizer is None or optimizer is gd))
    return is_auto(learning_rate) and not finds_steps


def choose(
    problem: Problem, optimizer: Any, learning_rate: Any, steps: Steps, saves: Saves | NoSaves
) -> tuple[Method, RangeTest | None]:
    """Choose the optimizer and the rates that the caller left open, by a range test if they need one."""
    if optimizer is None and (problem.noisy or problem.moves or not is_auto(learning_rate)):
        # A run of gdopt 0.1 that resumes has a range test, and goes on by it. Steps that scale each entry by itself
        # would end elsewhere than at the minimum within a set that is no box.
        adapts = is_auto(learning_rate) and saves.range_test is None and problem.noisy
        optimizer = gd if not adapts else distance_gd if problem.moves else distance_adamw
    test = None
    if needs_rates(problem, optimizer, learning_rate):
        method, test = rates_found(problem, optimizer, steps, saves)
        for _ in saves.failed:
            method = method.lower() if method.lower is not None else method
    else:
        method = make_method(optimizer, learning_rate, problem.objective.params)
    saves.range_test = test
    saves.compare_programs(problem, method)
    return method, test


def _result_of_start(cut: Cut, call: Call, began: float) -> Result:
    """Return the result of a call that a signal ended in its range test."""
    now, problem = time.perf_counter(), call.problem
    inputs, state, history, code = host_loop.at_start(cut.compiled, cut.source, cut.inputs)
    if call.record_params:
        history = history._replace(params=recorded.of_start(problem.objective))
    status = Status.INTERRUPTED if code is Status.MAX_STEPS else code
    per_epoch = cut.source.steps_per_epoch
    ended = Ended(problem, cut.method, cut.compiled, inputs, state, history, status, True, None, per_epoch, "")
    message = explain(ended) + " The range test for the learning rate was not complete, so the start is returned."
    return ended.result(message, compile_seconds=now - began, run_seconds=time.perf_counter() - now)


def clear_cache() -> None:
    """Forget all compiled programs, which frees their memory; the next call compiles again.

    You need not call it: none of your arrays is kept, and only the 128 most recently used programs are.

    Example:
        >>> import gdopt
        >>> gdopt.clear_cache()
    """
    program.clear()
