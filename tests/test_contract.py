"""The contract of all plug-ins: one line in a list below is checked by all of these tests."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations, some_of
from jax.flatten_util import ravel_pytree
from optax import contrib
from problems import PROBLEMS, Problem

import gdopt
from gdopt import schedules
from gdopt._loop import while_loops
from gdopt._run import host_loop
from gdopt._status import FAILURES

# --- the lists; functions, so that a test can have everything made anew ---


def optimizers() -> dict[str, tuple[Any, Any]]:
    """Name -> (optimizer, learning_rate); a ready optimizer owns its rate, and has None here."""
    partial, chain, sgd, adam = functools.partial, optax.chain, optax.sgd, optax.adam
    adversary = chain(contrib.normalize(), sgd(0.01))
    part = {"w": "a", "b": "s"}

    def own(rate: Any) -> optax.GradientTransformation:
        update = lambda updates, state, params=None: (jax.tree.map(lambda g: -rate * g, updates), state)
        return optax.GradientTransformation(lambda params: (), update)

    return {
        "gd": (gdopt.gd, 0.3),
        "sgd": (sgd, 0.3),
        "momentum": (partial(sgd, momentum=0.9), 0.05),
        "nesterov": (partial(sgd, momentum=0.9, nesterov=True), 0.05),
        "noisy_sgd": (partial(optax.noisy_sgd, key=jax.random.key(0)), 0.1),
        "adam": (adam, 0.1),
        "adam_scheduled": (adam(schedules.one_cycle(0.2, 300)), None),
        "adamw": (optax.adamw, schedules.triangular2(0.05, 0.2, 7)),
        "adafactor": (partial(optax.adafactor, min_dim_size_to_factor=2), 0.1),
        "lamb": (optax.lamb, 0.1),
        "lion": (optax.lion, 0.02),
        "radam": (optax.radam, 0.1),
        "rmsprop": (optax.rmsprop, 0.02),
        "rprop": (optax.rprop, 0.1),
        "yogi": (optax.yogi, 0.1),
        "spectral": (gdopt.spectral(), None),
        "lbfgs": (optax.lbfgs(), None),
        "polyak_sgd": (optax.polyak_sgd(), None),
        "backtracking": (chain(sgd(1.0), optax.scale_by_backtracking_linesearch(15)), None),
        "muon": (contrib.muon, 0.1),
        "sam": (contrib.sam(sgd(0.3), adversary), None),
        "sam_clipped": (chain(optax.clip_by_global_norm(1.0), contrib.sam(sgd(0.3), adversary)), None),
        "sam_opaque": (contrib.sam(sgd(0.3), adversary, opaque_mode=True), None),
        "sophia": (contrib.sophia, 0.1),
        "cocob": (contrib.cocob, 1.0),
        "dadapt_adamw": (contrib.dadapt_adamw, 1.0),
        "dog": (contrib.dog, 1.0),
        "dowg": (contrib.dowg, 1.0),
        "mechanize": (contrib.mechanize(sgd(1.0)), None),
        "momo": (contrib.momo, 1.0),
        "momo_adam": (contrib.momo_adam, 0.1),
        "prodigy": (contrib.prodigy, 1.0),
        "reduce_on_plateau": (chain(adam(0.1), contrib.reduce_on_plateau(factor=0.5, patience=5)), None),
        "schedule_free_sgd": (contrib.schedule_free_sgd, 1.0),
        "schedule_free_adamw": (contrib.schedule_free_adamw(0.1, warmup_steps=10), None),
        "schedule_free_part": (optax.multi_transform({"a": contrib.schedule_free_sgd(1.0), "s": sgd(0.3)}, part), None),
        "multi_steps": (optax.MultiSteps(sgd(0.3), every_k_schedule=3), None),
        "apply_every": (chain(optax.apply_every(3), sgd(0.1)), None),
        "inject_hyperparams": (optax.inject_hyperparams(adam)(learning_rate=0.1), None),
        "inject_hyperparams_factory": (optax.inject_hyperparams(adam), 0.1),
        "clipped": (lambda rate: chain(optax.clip_by_global_norm(1.0), sgd(rate)), 0.3),
        "apply_if_finite": (optax.apply_if_finite(adam(0.1), max_consecutive_errors=3), None),
        "masked": (chain(optax.masked(optax.scale_by_adam(), {"w": True, "b": False}), optax.scale(-0.1)), None),
        "multi_transform": (optax.multi_transform({"a": adam(0.1), "s": sgd(0.3)}, part), None),
        "own": (own, 0.3),
    }


def stuck_optimizers() -> dict[str, tuple[Any, Any]]:
    """Return optimizers that do not reach the minimum in `_LONG` steps, and must not claim to."""
    half = {"w": "s", "b": "zero"}
    return {
        "tiny_rate": (gdopt.gd, 1e-5),
        "rate_zero": (gdopt.gd, schedules.constant(0.0)),
        "rates_run_out": (optax.adam, optax.cosine_decay_schedule(0.1, 10)),
        "slow_warmup": (optax.adam, optax.linear_schedule(0.0, 1e-2, 10**8)),
        "accumulates_for_long": (optax.MultiSteps(optax.sgd(0.3), every_k_schedule=1000), None),
        "subspace": (functools.partial(contrib.galore, rank=1), 0.1),
        "half_frozen": (optax.multi_transform({"s": optax.sgd(0.3), "zero": optax.set_to_zero()}, half), None),
        "oscillates": (optax.sign_sgd, 0.3),
        "too_large_rate": (gdopt.gd, 1.9),
    }


def all_schedules() -> dict[str, Any]:
    """Return name -> schedule, with turning points within `_RATES` steps."""
    return {
        "constant": schedules.constant(0.1),
        "range_test": schedules.range_test(1e-3, 0.5, 10),
        "cyclical": schedules.cyclical(0.1, 0.5, 3, 2, scale_fn=lambda c: 1 / c),
        "triangular": schedules.triangular(0.0, 0.5, 4),
        "triangular2": schedules.triangular2(0.1, 0.5, 2, 1),
        "exp_range": schedules.exp_range(0.1, 0.5, 3, gamma=0.9),
        "one_cycle": schedules.one_cycle(0.5, 12),
        "silver": schedules.silver(3.0),
        "optax_constant": optax.constant_schedule(0.1),
        "optax_linear": optax.linear_schedule(0.5, 0.1, 10),
        "optax_polynomial": optax.polynomial_schedule(0.5, 0.1, 2, 10),
        "optax_exponential": optax.exponential_decay(0.5, 3, 0.5, staircase=True),
        "optax_piecewise_constant": optax.piecewise_constant_schedule(0.5, {3: 0.5, 8: 0.1}),
        "optax_piecewise_interpolate": optax.piecewise_interpolate_schedule("cosine", 0.5, {3: 0.5, 8: 0.1}),
        "optax_cosine": optax.cosine_decay_schedule(0.5, 10),
        "optax_linear_onecycle": optax.linear_onecycle_schedule(12, 0.5),
        "optax_cosine_onecycle": optax.cosine_onecycle_schedule(12, 0.5),
        "optax_warmup_constant": optax.warmup_constant_schedule(0.0, 0.5, 4),
        "optax_warmup_cosine": optax.warmup_cosine_decay_schedule(0.1, 0.5, 4, 10),
        "optax_warmup_exponential": optax.warmup_exponential_decay_schedule(0.1, 0.5, 4, 3, 0.5),
        "optax_sgdr": optax.sgdr_schedule(
            [{"init_value": 0.1, "peak_value": 0.5, "warmup_steps": 2, "decay_steps": n} for n in (5, 8)]
        ),
        "optax_join": optax.join_schedules([schedules.one_cycle(0.5, 6), schedules.triangular(0.1, 0.3, 2)], [6]),
        "own_function": lambda k: 0.5 / (1 + k) ** 0.5,
        "own_whole_numbers": lambda k: 1,
    }


OPTIMIZERS, STUCK, SCHEDULES = optimizers(), stuck_optimizers(), all_schedules()

# What optimizers differ in by their own nature, where it is not the usual:
TRACES = {"backtracking": 3, "lbfgs": 5, "sam_opaque": 2, "sophia": 2}  # of the loss: these evaluate it by themselves
FIRST_MOVE = {"multi_steps": 3, "apply_every": 3, "rprop": 2, "schedule_free_adamw": 2}  # update: others are exactly 0
TAKES = {"sam": (), "sam_clipped": (), "sam_opaque": ("grad_fn",)}  # extra arguments of `update`: these refuse others
TAKES |= dict.fromkeys(("backtracking", "lbfgs"), ("value", "grad", "value_fn"))
TELLS_RATE = {"spectral", "lbfgs", "backtracking", "inject_hyperparams"}  # by `learning_rate` in its state
FULL_BATCH = {"spectral"}  # refuses a noisy loss
# Losses compared with a loop by hand, where not all: muon makes the gradient orthogonal, which near rank 1 turns on its
# rounding. Two loops by hand, from starts 1e-8 apart, agree to 1e-5 up to here, and to 1e-1 ten steps later.
COMPARED = {"muon": 17}
EXACT = {"gd", "sgd", "momentum", "nesterov"}  # the same bits as in a loop by hand, whatever XLA fuses

# Compiling takes a second for each, so one of each kind is run, and on batches fewer; the others with `make test-slow`.
# To the loop these are what the name beside them is: they differ in optax's arithmetic alone.
ALIKE = {
    "sgd": "gd",
    "nesterov": "momentum",
    "clipped": "own",
    "sam_clipped": "sam",
    "schedule_free_adamw": "schedule_free_sgd",
}
ALIKE |= dict.fromkeys(("adafactor", "lamb", "lion", "radam", "rmsprop", "yogi"), "adam")
ALIKE |= dict.fromkeys(("dog", "dowg", "cocob", "dadapt_adamw"), "prodigy")
ALIKE |= {"momo_adam": "momo", "apply_every": "multi_steps", "masked": "multi_transform"}
ON_BATCHES = {"gd", "multi_steps", "sam_opaque", "noisy_sgd", "schedule_free_sgd"}

_LONG, _SHORT, _RATES = 2500, 40, 16  # steps
_TOL = 1e-4  # the default of minimize
_ROWS, _BATCH = 12, 4


# --- the problem ---


class Regression:
    """A linear regression with an exact fit. It has fresh functions over fresh data, and counts their calls."""

    def __init__(self, seed: int = 0):
        random = np.random.default_rng(seed)
        X = random.normal(size=(_ROWS, 2))
        Y = X @ random.normal(size=(2, 3)) + 1
        X, Y = X.astype(np.float32), Y.astype(np.float32)
        self.traces = 0
        self.data = X, Y, np.float32(2.0) ** np.arange(-_ROWS, 0)
        self.loss = lambda params: self._half_mean_square(params, X, Y)
        self.coded_loss = lambda params, batch: self._coded(params, *batch)

    @staticmethod
    def start(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
        return {"w": jnp.zeros((2, 3), dtype), "b": jnp.zeros(3, dtype)}

    def _half_mean_square(self, params: Any, X: Any, Y: Any) -> jax.Array:
        self.traces += 1
        return jnp.sum((X @ params["w"] + params["b"][None] - Y) ** 2) / (2 * len(X))

    def _coded(self, params: Any, X: Any, Y: Any, bits: Any) -> jax.Array:
        """The regression's gradient, with a value that tells which rows were seen: a sum of powers of two."""
        value = self._half_mean_square(params, X, Y)
        return value - jax.lax.stop_gradient(value) + jnp.sum(bits)


def rows_seen(coded_loss: float) -> set[int]:
    return {row for row in range(_ROWS) if int(coded_loss * 2**_ROWS) >> row & 1}


class Fit(NamedTuple):
    """One call of minimize, and its costs."""

    result: gdopt.Result
    problem: Regression
    traces: int
    compiled: list[str]

    @property
    def gap(self) -> float:
        """The gain that is left, as a share of the gain so far; the minimum is 0."""
        gained = self.result.history.loss[0] - self.result.loss
        return self.result.loss / gained if gained > 0 else np.inf


def fit(optimizer: Any, rate: Any, *, start: Any = None, seed: int = 0, **options: Any) -> Fit:
    return _fit(Regression(seed), "loss", optimizer, rate, start, **options)


def fit_batches(optimizer: Any, rate: Any, *, start: Any = None, **options: Any) -> Fit:
    problem = Regression()
    batches = {"data": problem.data, "batch_size": _BATCH}
    return _fit(problem, "coded_loss", optimizer, rate, start, **batches, **options)


def _fit(problem: Regression, loss: str, optimizer: Any, rate: Any, start: Any, **options: Any) -> Fit:
    start = problem.start() if start is None else start
    with count_compilations() as compiled:
        rate = "auto" if rate is None else rate
        result = gdopt.minimize(getattr(problem, loss), start, optimizer=optimizer, learning_rate=rate, **options)
    return Fit(result, problem, problem.traces, compiled.names)


def single_steps(patch: pytest.MonkeyPatch) -> None:
    """Make each chunk one step long, without changing the compiled program."""
    patch.setattr(host_loop, "_FIRST_CHUNK", 1)
    patch.setattr(host_loop, "_CHUNK_SECONDS", 0.0)


def same_bits(a: Any, b: Any) -> bool:
    equal = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True), a, b)
    return all(jax.tree.leaves(equal))


def specs(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


# --- every optimizer ---


class Case(NamedTuple):
    """An optimizer, and the runs that several checks read, made once."""

    name: str
    optimizer: Any
    rate: Any
    long: Fit
    short: Fit  # no more than _SHORT steps
    stepwise: Fit  # the same in chunks of one step
    chunk_ends: list[int]
    anew: Fit  # another optimizer object, another rate, other data, another lambda


@pytest.fixture(scope="module", params=some_of(OPTIMIZERS, OPTIMIZERS.keys() - ALIKE.keys()))
def case(request: pytest.FixtureRequest) -> Case:
    name = request.param
    optimizer, rate = OPTIMIZERS[name]
    long = fit(optimizer, rate, max_steps=_LONG, callback=lambda report: None)  # a report copies the params
    short = fit(optimizer, rate, max_steps=_SHORT)
    chunk_ends: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        single_steps(patch)
        stepwise = fit(optimizer, rate, max_steps=_SHORT, callback=lambda report: chunk_ends.append(report.step))
    optimizer_anew, rate_anew = optimizers()[name]
    if isinstance(rate_anew, float):
        rate_anew *= 0.9
    anew = fit(optimizer_anew, rate_anew, seed=1, max_steps=_SHORT)
    return Case(name, optimizer, rate, long, short, stepwise, chunk_ends, anew)


def test_reaches_the_minimum(case: Case) -> None:
    assert case.long.gap <= 10 * _TOL, case.long.result


def test_status_is_honest(case: Case) -> None:
    for result, problem, *_ in (case.long, case.short, case.anew):
        assert result.status not in FAILURES
        assert result.steps == len(result.history.loss) - 1
        first = result.history.loss[0]
        np.testing.assert_allclose(result.loss, problem.loss(result.params), rtol=1e-5, atol=1e-7 * first)
    for run in (case.long, case.short, case.anew):
        assert run.gap <= 10 * _TOL or not run.result.success, run.result


def test_structure_and_dtypes_are_kept(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Regression.start()
    assert specs(case.long.result.params) == specs(start)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(case.long.result.params))

    # For two more dtypes: all of this is known once the loop is traced, and compiling is what takes the time.
    class Traced(Exception):
        pass

    def returned(packed: Any) -> Any:
        return packed.tree().kept.params.tree()

    def stop(compiled: Any, inputs: Any) -> None:
        state = jax.eval_shape(compiled.start, inputs)
        after, _ = jax.eval_shape(compiled.chunk, state, np.int32(0), np.int32(1), inputs)
        look = lambda carry: (carry, carry[0].tree().params, returned(carry[0]))
        raise Traced(state, *jax.eval_shape(look, after))

    monkeypatch.setattr(host_loop, "begin", stop)
    for run, dtype in ((fit, jnp.bfloat16), (fit if case.name in FULL_BATCH else fit_batches, jnp.float64)):
        with jax.enable_x64(dtype == jnp.float64):
            start = Regression.start(dtype)
            with pytest.raises(Traced) as caught:
                run(case.optimizer, case.rate, start=start)
        state, after, params, kept = caught.value.args
        assert specs(state) == specs(after)
        assert specs(params) == specs(kept) == specs(start)


def test_loss_is_traced_once(case: Case) -> None:
    """It is not traced once per chunk."""
    traces = {run.traces for run in (case.long, case.short, case.stepwise, case.anew)}
    assert traces == {TRACES.get(case.name, 1)}
    assert len(case.chunk_ends) >= 3


def test_new_values_compile_nothing(case: Case) -> None:
    assert [case.short.compiled, case.stepwise.compiled, case.anew.compiled] == [[], [], []]
    assert case.anew.result.history.loss[0] != case.short.result.history.loss[0]


def test_chunks_change_no_bit(case: Case) -> None:
    short, stepwise = case.short.result, case.stepwise.result
    assert len(case.chunk_ends) >= short.steps
    assert same_bits(stepwise.history, short.history)
    assert same_bits(stepwise.params, short.params)
    assert (stepwise.loss, stepwise.status) == (short.loss, short.status)
    assert same_bits(case.long.result.history.loss[: short.steps], short.history.loss[:-1])


def test_history_has_the_rates(case: Case) -> None:
    *rates, last = case.short.result.history.learning_rate
    assert np.isnan(last)
    if case.rate is None:
        assert (np.array(rates) > 0).all() if case.name in TELLS_RATE else np.isnan(rates).all()
    elif callable(case.rate):
        np.testing.assert_allclose(rates, np.asarray([case.rate(k) for k in range(len(rates))]), rtol=1e-6)
    else:
        assert set(rates) == {np.float32(case.rate)}


def test_equals_a_hand_written_loop(case: Case) -> None:
    """A loop as in optax's documentation, without anything from gdopt, has the same losses.

    They are equal bit for bit for EXACT. XLA may contract a * b + c into one rounding in only one of the two programs.
    If an optimizer feeds small differences back (prodigy), a few bits become several.
    """
    optimizer, rate, loss = case.optimizer, case.rate, case.short.problem.loss

    def at(rate: Any, k: Any) -> Any:
        return optimizer if rate is None else optimizer(rate(k) if callable(rate) else rate)

    @jax.jit
    def step(params: Any, state: Any, k: jax.Array, rate_now: Any) -> tuple[Any, Any, jax.Array]:
        value, grad = jax.value_and_grad(loss)(params)
        transformation = at(rate if callable(rate) else rate_now, k)
        functions = {"value_fn": loss, "obj_fn": loss, "grad_fn": lambda params, _: jax.grad(loss)(params)}
        extras = {"value": value, "grad": grad, **functions}
        if case.name in TAKES:
            extras = {name: extras[name] for name in TAKES[case.name]}
        else:
            transformation = optax.with_extra_args_support(transformation)
        updates, state = transformation.update(grad, state, params, **extras)
        return optax.apply_updates(params, updates), state, value

    history = case.short.result.history.loss[: COMPARED.get(case.name)]
    params, losses = Regression.start(), []
    state = at(0.1 if rate is not None else None, 0).init(params)
    for k in range(len(history)):
        params, state, value = step(params, state, k, None if callable(rate) else rate)
        losses.append(float(value))
    tolerance: dict[str, Any] = {"rtol": 0} if case.name in EXACT else {"rtol": 1e-5, "atol": 1e-7 * history[0]}
    np.testing.assert_allclose(history, np.array(losses), **tolerance)


def test_the_first_update_changes_the_loss(case: Case) -> None:
    losses, first = case.short.result.history.loss, FIRST_MOVE.get(case.name, 1)
    assert (losses[:first] == losses[0]).all()
    assert losses[first] != losses[0]


@pytest.mark.parametrize("name", some_of([n for n in OPTIMIZERS if n not in FULL_BATCH], ON_BATCHES))
def test_mini_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is used once per epoch, the first batch first. float64 is kept, the loss traced once, chunks change no
    bit.
    """
    per_epoch, first = _ROWS // _BATCH, FIRST_MOVE.get(name, 1)
    with jax.enable_x64(True):
        start = Regression.start(float)
        run, moved = (fit_batches(*OPTIMIZERS[name], start=start, max_steps=steps) for steps in (2 * per_epoch, first))
        single_steps(monkeypatch)
        stepwise = fit_batches(*OPTIMIZERS[name], start=start, epochs=2)

    assert (run.result.status, run.result.success) == (gdopt.Status.MAX_STEPS, True)
    batches = [rows_seen(value) for value in run.result.history.loss]
    assert [len(batch) for batch in batches] == [_BATCH] * (2 * per_epoch + 1)  # with that of the last point
    epochs = [set.union(*batches[i : i + per_epoch]) for i in (0, per_epoch)]
    assert epochs == [set(range(_ROWS))] * 2

    assert specs(run.result.params) == specs(start)
    assert not any(same_bits(moved.result.params[leaf], start[leaf]) for leaf in start)
    assert {run.traces, moved.traces, stepwise.traces} == {TRACES.get(name, 1)}
    assert (moved.compiled, stepwise.compiled) == ([], [])
    assert same_bits(stepwise.result.history, run.result.history)
    assert same_bits(stepwise.result.params, run.result.params)


@pytest.mark.parametrize("name", STUCK)
def test_a_stuck_optimizer_is_no_success(name: str) -> None:
    run = fit(*STUCK[name], max_steps=_LONG)
    assert run.gap > 10 * _TOL
    assert not run.result.success, run.result


# --- every schedule ---


def assert_rates_equal(rates: Any, expected: np.ndarray) -> None:
    """Allow a few roundings of the highest rate: XLA fuses formulas such as a cosine differently in each program."""
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-7 * expected.max())


def rates_of(schedule: Any) -> np.ndarray:
    return np.array([float(schedule(k)) for k in range(_RATES)])


@functools.lru_cache
def gd_step_by_hand() -> Any:
    loss = Regression().loss

    def step(params: Any, rate: Any) -> tuple[Any, jax.Array]:
        value, grad = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda x, g: x - rate * g, params, grad), value

    return jax.jit(step)


# Of optax's, which are all alike to the loop, and of the cyclical ones some are run, the others with `make test-slow`.
USUAL = {
    "constant",
    "range_test",
    "cyclical",
    "triangular2",
    "one_cycle",
    "silver",
    "own_function",
    "own_whole_numbers",
}


@pytest.mark.parametrize("name", some_of(SCHEDULES, USUAL | {"optax_cosine", "optax_join"}))
def test_schedule_in_minimize(name: str) -> None:
    run = fit(gdopt.gd, SCHEDULES[name], max_steps=_RATES, tol=0)
    assert run.result.history is not None
    losses, _, rates, *_ = run.result.history
    expected = rates_of(SCHEDULES[name])
    assert_rates_equal(rates[:-1], expected)
    assert np.isnan(rates[-1])
    assert (losses[1] != losses[0]) == (expected[0] != 0)  # the rate of step 0 is that of the first update

    params = Regression.start()
    for loss, rate in zip(losses, rates, strict=True):
        params, value = gd_step_by_hand()(params, rate)
        assert value == loss

    anew = fit(gdopt.gd, all_schedules()[name], seed=1, max_steps=_RATES, tol=0)
    assert anew.compiled == []
    assert run.traces == anew.traces == 1


@pytest.mark.parametrize("name", some_of(SCHEDULES, USUAL | {"optax_join"}))
def test_schedule_in_jit_vmap_and_sgd(name: str) -> None:
    schedule = SCHEDULES[name]
    expected = rates_of(schedule)
    assert np.isfinite(expected).all()
    assert (expected >= 0).all()
    jitted = jax.jit(schedule)
    sgd: Any = optax.sgd(schedule)
    assert_rates_equal([jitted(k) for k in range(_RATES)], expected)
    assert_rates_equal(jax.jit(jax.vmap(schedule))(jnp.arange(_RATES)), expected)

    def update(state: Any, _: None) -> tuple[Any, jax.Array]:
        step, state = sgd.update(jnp.float32(1), state)
        return state, -step

    assert_rates_equal(jax.lax.scan(update, sgd.init(jnp.float32(0)), length=_RATES)[1], expected)


# --- what the loop owes to all of them ---


@pytest.mark.parametrize("capacity", [1, 7])
def test_capacity_of_a_chunk_changes_no_bit(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """This compiles another program, so it is not among the runs of each optimizer."""
    expected = fit(optax.adam, 0.1, max_steps=50, tol=0).result
    monkeypatch.setattr(while_loops, "CAPACITY", capacity)
    monkeypatch.setattr(host_loop, "_FIRST_CHUNK", 1)
    monkeypatch.setattr(host_loop, "_CHUNK_SECONDS", 1e9)
    found = fit(optax.adam, 0.1, max_steps=50, tol=0).result
    assert same_bits(found.history, expected.history)
    assert same_bits(found.params, expected.params)


def test_each_row_gets_one_update_per_epoch() -> None:
    """This includes the first batch. The gradient of the sum of a batch's entries is 1 at each of its rows."""
    loss = lambda x, batch: jnp.sum(x[batch])
    for epochs in (1, 3):
        result = gdopt.minimize(
            loss, jnp.zeros(_ROWS), data=jnp.arange(_ROWS), batch_size=_BATCH, epochs=epochs, learning_rate=1.0
        )
        assert same_bits(result.params, np.full(_ROWS, -epochs, np.float32))


def test_extra_arguments_belong_to_the_step() -> None:
    """``value_fn``, ``obj_fn`` and ``grad_fn`` see the batch and the key of the value and the gradient."""

    def update(updates: Any, state: Any, params: Any, *, value, grad, grad_fn, value_fn, obj_fn) -> Any:
        same = (value == value_fn(params)) & (value == obj_fn(params)) & (updates == grad)
        return jnp.where(same & (grad == grad_fn(params, 0)), -0.1 * grad, jnp.nan), state

    probe = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), cast(Any, update))

    def loss(x: jax.Array, batch: jax.Array, key: jax.Array) -> jax.Array:
        return (x - batch[0] - jax.random.normal(key)) ** 2

    random = np.random.default_rng(0).normal(size=8).astype(np.float32)
    result = gdopt.minimize(loss, 0.0, data=random, batch_size=1, epochs=2, with_key=True, optimizer=probe)
    assert result.status == gdopt.Status.MAX_STEPS, result


def test_lists_are_consistent() -> None:
    assert {*TRACES, *FIRST_MOVE, *TAKES, *EXACT, *ON_BATCHES, *TELLS_RATE, *FULL_BATCH, *ALIKE} <= {*OPTIMIZERS}
    assert {*ALIKE.values()} <= {*OPTIMIZERS} - {*ALIKE}


# --- and the problems that other tests take from problems.py ---


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_problem_is_as_stated(problem: Problem) -> None:
    assert all(leaf.dtype in (np.float32, np.complex64) for leaf in jax.tree.leaves(problem.start))
    assert problem.loss(problem.start).dtype == jnp.float32
    assert (problem.gap(problem.start), problem.gap(problem.minimum)) == pytest.approx((1, 0), abs=1e-12)

    with jax.enable_x64(True):
        # Over real numbers: a complex entry is two.
        real = lambda leaf: jnp.stack([leaf.real, leaf.imag]) if jnp.iscomplexobj(leaf) else leaf
        back = lambda leaf, like: leaf[0] + 1j * leaf[1] if jnp.iscomplexobj(like) else leaf
        start = problem.at(float).start
        minimum = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), problem.minimum, start)
        at_start, unravel = ravel_pytree(jax.tree.map(real, start))
        at_minimum, _ = ravel_pytree(jax.tree.map(real, minimum))
        loss = lambda x: problem.loss(jax.tree.map(back, unravel(x), start))
        derivatives = jax.jit(lambda x: (jax.grad(loss)(x), jax.hessian(loss)(x)))
        slope, *curvatures = derivatives(at_minimum)[0], derivatives(at_minimum)[1], derivatives(at_start)[1]

    np.testing.assert_allclose(slope, 0, atol=1e-12)
    lowest, highest = np.transpose([np.linalg.eigvalsh(hessian)[[0, -1]] for hessian in curvatures])
    assert lowest[0] >= -1e-12
    assert lowest[1] >= -1e-12 or not problem.convex
    assert problem.smoothness is None or max(highest) <= problem.smoothness * (1 + 1e-9)
