"""Schedules: torch's ladders point by point, exact fractions, theorems, and use with optax."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gdopt import schedules
from gdopt._errors import InputError

# Every schedule once; the tests that take `lr` run for each.
MADE = {
    "constant": schedules.constant(0.1),
    "range_test": schedules.range_test(1e-6, 10.0, 200),
    "cyclical": schedules.cyclical(0.01, 0.3, 20, 31, scale_fn=lambda k: 1 / (1 + k / 100), scale_mode="iterations"),
    "triangular": schedules.triangular(0.01, 0.3, 7),
    "triangular2": schedules.triangular2(0.0, 0.3, 50, 20),
    "exp_range": schedules.exp_range(0.01, 0.3, 10, gamma=0.999),
    "one_cycle": schedules.one_cycle(0.3, 250),
    "silver": schedules.silver(3.0),
}
each_schedule = pytest.mark.parametrize("lr", MADE.values(), ids=MADE.keys())

with np.load(Path(__file__).with_name("ladders") / "ladders.npz") as _file:
    LADDERS = dict(_file)
_META = json.loads(str(LADDERS.pop("cases")))
CASES = {case["name"]: case for case in _META["cases"]}
FAR = np.array(_META["far"])
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def made(case: dict[str, Any]) -> Callable[[Any], jax.Array]:
    """Make gdopt's schedule with the arguments of a torch ladder."""
    arguments = dict(case["arguments"])
    if "scale_fn" in arguments:
        arguments["scale_fn"] = eval(f"lambda x: {arguments['scale_fn']}")
    make = {"CyclicLR": schedules.cyclical, "OneCycleLR": schedules.one_cycle}[case["kind"]]
    return make(**arguments)


def exact_cyclical(
    k: int, base_lr: float, max_lr: float, step_size_up: int, step_size_down: int | None = None, **mode: Any
) -> float:
    """The rate of step k of a cyclical schedule in fractions, which round nothing (but gamma**k, in float64)."""
    up, down = step_size_up, step_size_down or step_size_up
    cycle, r = divmod(k, up + down)
    height = Fraction(r, up) if r <= up else Fraction(up + down - r, down)
    match mode.get("mode", "triangular"):
        case "triangular":
            scale = Fraction(1)
        case "triangular2":
            scale = Fraction(1, 2 ** min(cycle, 2000))
        case _:
            scale = Fraction(mode["gamma"] ** k)
    return float(Fraction(base_lr) + (Fraction(max_lr) - Fraction(base_lr)) * height * scale)


# --- the same rates as torch ---


@each_case
@pytest.mark.parametrize("x64", [True, False], ids=["float64", "float32"])
def test_torch_ladder(case: dict[str, Any], x64: bool) -> None:
    ladder = LADDERS[case["name"]]
    with jax.enable_x64(x64):
        rates = np.asarray(jax.jit(made(case))(np.arange(len(ladder))))
    assert rates.dtype == (np.float64 if x64 else np.float32)
    # torch's own rounding near the ends of a cycle, and subnormal numbers, are measured against the peak.
    rtol, atol = (1e-12, 1e-15) if x64 else (5e-7, 1e-38)
    np.testing.assert_allclose(rates, ladder, rtol=rtol, atol=atol * case["arguments"]["max_lr"])


@pytest.mark.parametrize("name", [name for name in CASES if f"{name}@" in LADDERS])
def test_torch_at_step_1e8_in_float32(name: str) -> None:
    rates = made(CASES[name])(FAR)
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, LADDERS[f"{name}@"], rtol=5e-7)


@pytest.mark.parametrize("mode", [{}, {"mode": "triangular2"}, {"mode": "exp_range", "gamma": 0.99999999}], ids=str)
@pytest.mark.parametrize("sizes", [(100, 100), (3, 7), (48_611, 104_729), (10**9, 3)], ids=str)
@pytest.mark.parametrize("x64", [True, False], ids=["float64", "float32"])
def test_exact_fractions_up_to_the_last_step(sizes: tuple[int, int], mode: dict[str, Any], x64: bool) -> None:
    near = np.arange(0, 20_000, 301)
    steps = np.concatenate([near, near + 10**8, [10**9 - 1, 10**9, 10**9 + 1, 2**31 - 2, 2**31 - 1]])
    with jax.enable_x64(x64):
        rates = schedules.cyclical(0.001, 0.6, *sizes, **mode)(steps)
    expected = [exact_cyclical(int(k), 0.001, 0.6, *sizes, **mode) for k in steps]
    np.testing.assert_allclose(rates, expected, rtol=2e-15 if x64 else 5e-7)


def test_triangular2_vanishes_without_a_base() -> None:
    lr = schedules.triangular2(0.0, 1.0, 1)
    cycles = np.array([1, 2, 10, 100, 1000, 10**6, 10**9])
    np.testing.assert_array_equal(lr(2 * cycles - 1), (0.5 ** (cycles - 1)).astype(np.float32))
    same = schedules.cyclical(0.0, 1.0, 1, scale_fn=lambda c: 1 / 2 ** (c - 1))  # in integers it overflows in cycle 33
    np.testing.assert_allclose(same(2 * cycles - 1), lr(2 * cycles - 1), rtol=1e-6)


def test_named_cycles() -> None:
    k = np.arange(50)
    pairs: list[tuple[Any, dict[str, Any]]] = [
        (schedules.triangular(0.1, 0.5, 3, 4), {}),
        (schedules.triangular2(0.1, 0.5, 3, 4), {"mode": "triangular2"}),
        (schedules.exp_range(0.1, 0.5, 3, 4, gamma=0.9), {"mode": "exp_range", "gamma": 0.9}),
        (schedules.triangular2(0.1, 0.5, 3, 4), {"scale_fn": lambda c: 1 / 2 ** (c - 1)}),
        (schedules.triangular(0.1, 0.5, 3, 4), {"scale_fn": lambda c: 1, "mode": "none of these"}),
    ]
    for named, arguments in pairs:
        np.testing.assert_array_equal(named(k), schedules.cyclical(0.1, 0.5, 3, 4, **arguments)(k))
    np.testing.assert_array_equal(schedules.triangular(0.1, 0.5, 3)(k), schedules.triangular(0.1, 0.5, 3, 3)(k))


def test_one_cycle_stays_at_its_end() -> None:
    for strategy in ("cos", "linear"):
        lr = schedules.one_cycle(0.3, 100, anneal_strategy=strategy)
        np.testing.assert_array_equal(lr(np.array([99, 100, 10**8])), np.full(3, 0.3 / 25 / 1e4, np.float32))
        assert lr(0) == np.float32(0.3 / 25)
        assert lr(29) == np.float32(0.3)


def test_one_cycle_where_torch_divides_by_zero() -> None:
    with jax.debug_nans(True), jax.debug_infs(True):
        assert schedules.one_cycle(1.0, 10, pct_start=0.1)(0) == 1.0
        assert schedules.one_cycle(1.0, 1, pct_start=1.0)(0) == np.float32(1 / 25 / 1e4)


# --- properties ---

rates = st.floats(1e-6, 1e3)
sizes = st.integers(1, 10**9)


@given(st.tuples(rates | st.just(0.0), rates).map(sorted), sizes, sizes, st.integers(0, 2**31 - 2))
@example([0.1, 0.1], 3, 3, 0)
@example([0.1, math.nextafter(0.1, 1)], 3, 3, 0)
@example([0.0, 1.0], 254_970, 1, 0)  # float32(1 / 254970) * 254970 < 1
@example([0.0, 1.0], 1, 254_970, 254_971)
@example([0.0, 1.0], 10**9, 10**9, 2**31 - 2)
def test_cycles(ends: list[float], up: int, down: int, k: int) -> None:
    period = up + down
    start = k // period * period
    peak = start + up if start + up < 2**31 else up
    base, top = ends
    lr = schedules.triangular(base, top, up, down)
    found = np.asarray(lr(np.array([k, k + 1, k % period, start, peak])))
    low, high = np.float32(base), np.float32(top)
    assert ((low <= found) & (found <= high)).all()
    assert found[0] == found[2]  # periodic
    assert found[3] == low
    assert found[4] == high
    jump = abs(float(found[1]) - float(found[0]))
    assert jump <= (top - base) / min(up, down) + 4e-7 * top  # at most one step of the ladder


@pytest.mark.parametrize("x64", [True, False], ids=["float64", "float32"])
def test_peaks_and_ends_are_exact_when_compiled(x64: bool) -> None:
    ends = 0.125, 0.875, 0.125

    def triangular_and_one_cycle(up: int) -> tuple[jax.Array, jax.Array]:
        steps = jnp.array([0, up, 2 * up])  # the cycle of the other one ends a step later
        return (
            schedules.triangular(0.125, 0.875, up)(steps),
            schedules.one_cycle(0.875, 2 * up + 2, 0.5, 7.0, 1.0, "linear")(steps.at[2].add(1)),
        )

    with jax.enable_x64(x64):
        # Among these are some where up * (1 / up) < 1.
        for found in jax.jit(lambda: [triangular_and_one_cycle(up) for up in (3, 41, 47, 49, 82, 103, 254_970)])():
            np.testing.assert_array_equal(found, np.array([ends, ends]).astype(found[0].dtype))


@given(st.tuples(rates, rates).map(sorted), sizes, sizes, st.floats(0.5, 1.0), st.integers(0, 2**31 - 1))
def test_shrinking_cycles_stay_between_base_and_max(
    ends: list[float], up: int, down: int, gamma: float, k: int
) -> None:
    base, top = ends
    for lr in (schedules.triangular2(base, top, up, down), schedules.exp_range(base, top, up, down, gamma=gamma)):
        assert np.float32(base) <= lr(k) <= np.float32(top)


@given(rates, sizes, st.floats(0, 1), st.sampled_from(["cos", "linear"]), st.integers(0, 2**31 - 1))
def test_one_cycle_stays_between_its_end_and_its_peak(
    peak: float, steps: int, pct: float, strategy: str, k: int
) -> None:
    lr = schedules.one_cycle(peak, steps, pct, anneal_strategy=strategy)
    assert np.float32(peak / 25 / 1e4) <= lr(k) <= np.float32(peak)


@pytest.mark.parametrize("x64", [True, False], ids=["float64", "float32"])
@given(rates, rates, st.sampled_from([2, 3, 100, 1001]), st.sampled_from(["exponential", "linear"]))
def test_range_test_hits_both_ends_exactly(x64: bool, start: float, end: float, steps: int, mode: str) -> None:
    with jax.enable_x64(x64):
        kind = np.float64 if x64 else np.float32
        found = np.asarray(schedules.range_test(start, end, steps, mode)(np.array([0, 1, steps - 1, steps, 10**8])))
        assert found[0] == kind(start)
        assert (found[2:] == kind(end)).all()
        assert min(start, end) * (1 - 1e-6) <= found[1] <= max(start, end) * (1 + 1e-6)


@pytest.mark.parametrize(("mode", "ladder"), [("exponential", np.geomspace), ("linear", np.linspace)])
def test_range_test_ladder(mode: str, ladder: Callable[..., np.ndarray]) -> None:
    k = np.arange(10_000)
    expected = ladder(1e-8, 100.0, len(k))
    np.testing.assert_allclose(schedules.range_test(1e-8, 100.0, len(k), mode)(k), expected, rtol=1e-7)
    with jax.enable_x64(True):
        np.testing.assert_allclose(schedules.range_test(1e-8, 100.0, len(k), mode)(k), expected, rtol=1e-13)


# --- silver steps ---

RHO = 1 + math.sqrt(2)


def silver_bound(m: int) -> float:
    """Theorem 1.1 of arXiv 2309.16530, for n = 2**m - 1 steps, over L |x0 - x*|**2."""
    return 1 / (1 + math.sqrt(4 * RHO ** (2 * m) - 3))


class Convex(NamedTuple):
    """A smooth convex loss whose minimum is known."""

    value: Callable[[Any], Any]
    grad: Callable[[Any], Any]
    smoothness: float
    minimizer: Any
    start: Any


def descend(problem: Convex, rates: np.ndarray) -> float:
    """The loss above its minimum after one step with each rate, over L |x0 - x*|**2."""
    x = problem.start
    for rate in rates:
        x = x - rate * problem.grad(x)
    scale = problem.smoothness * np.sum((problem.start - problem.minimizer) ** 2)
    return float((problem.value(x) - problem.value(problem.minimizer)) / scale)


def huber(threshold: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """|z|**2 / 2 up to the threshold, a straight line from there; and its derivative."""

    def value(z):
        return np.where(np.abs(z) <= threshold, z**2 / 2, threshold * np.abs(z) - threshold**2 / 2)

    return value, lambda z: np.clip(z, -threshold, threshold)


def quadratic(rng: np.random.Generator) -> Convex:
    directions = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    hessian = directions * np.append(10.0 ** rng.uniform(-4, 1, 5), 0.0) @ directions.T  # one direction is flat
    x = rng.normal(size=6)
    return Convex(
        lambda v: (v - x) @ hessian @ (v - x) / 2,
        lambda v: hessian @ (v - x),
        float(np.linalg.norm(hessian, 2)),
        x,
        rng.normal(size=6),
    )


def robust_regression(rng: np.random.Generator) -> Convex:
    X, x = rng.normal(size=(20, 4)) * 10.0 ** rng.uniform(-1, 1, 4), rng.normal(size=4)
    value, slope = huber(10.0 ** rng.uniform(-3, 1))
    return Convex(
        lambda v: value(X @ (v - x)).sum(),
        lambda v: X.T @ slope(X @ (v - x)),
        float(np.linalg.norm(X, 2)) ** 2,
        x,
        10 * rng.normal(size=4),
    )


def logistic_regression(rng: np.random.Generator) -> Convex:
    # Each row with both labels, one of them weighted: not separable, so that there is a minimum; Newton finds it.
    X, weights = rng.normal(size=(30, 4)), rng.uniform(0.05, 0.95, 30)

    def grad(v):
        return X.T @ (1 / (1 + np.exp(-X @ v)) - weights) / 30

    x = np.zeros(4)
    for _ in range(30):
        p = 1 / (1 + np.exp(-X @ x))
        x = x - np.linalg.solve(X.T * (p * (1 - p)) @ X / 30, grad(x))
    assert np.linalg.norm(grad(x)) < 1e-13
    return Convex(
        lambda v: np.mean(np.logaddexp(0, X @ v) - weights * (X @ v)),
        grad,
        float(np.linalg.norm(X, 2)) ** 2 / 30 / 4,
        x,
        x + 3 * rng.normal(size=4),
    )


def worst_huber(total: float) -> Convex:
    """The Huber loss that is slowest for rates with this sum: they bring it just to the end of the straight line.

    Drori and Teboulle, "Performance of first-order methods for smooth convex minimization", 2014, section 3: after a
    straight way with slope t from 1, what is left is t (1 - t total) - t**2 / 2, the largest for t = 1 / (2 total + 1).
    """
    value, slope = huber(1 / (2 * total + 1))
    return Convex(value, slope, 1.0, np.array(0.0), np.array(1.0))


@functools.cache
def _silver_rates() -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(schedules.silver(0.25)(np.arange(2**12 - 1)))


def silver_rates(m: int, smoothness: float) -> np.ndarray:
    """The rates of the first 2**m - 1 steps."""
    return _silver_rates()[: 2**m - 1] * (0.25 / smoothness)


def test_silver_steps_are_those_of_the_recursion() -> None:
    steps: list[float] = []
    for m in range(12):  # arXiv 2309.16530, section 2: h of 2**(m + 1) - 1 steps is [h, 1 + rho**(m - 1), h]
        steps = [*steps, 1 + RHO ** (m - 1), *steps]
    np.testing.assert_allclose(silver_rates(12, 0.3), np.array(steps) / 0.3, rtol=1e-15)
    np.testing.assert_allclose(schedules.silver(0.3)(np.arange(4095)), np.array(steps) / 0.3, rtol=2e-7)
    assert silver_rates(12, 1.0).sum() == pytest.approx(RHO**12 - 1)
    for k in (10**8 - 1, 2**30 - 1, 2**31 - 2, 2**31 - 1):
        nu = ((k + 1) & -(k + 1)).bit_length() - 1
        assert schedules.silver(0.3)(k) == pytest.approx((1 + RHO ** (nu - 1)) / 0.3, rel=2e-7)


@pytest.mark.parametrize("m", range(11))
def test_silver_on_its_worst_huber_loss(m: int) -> None:
    left = descend(worst_huber(RHO**m - 1), silver_rates(m, 1.0))
    # The exact worst case: for m = 3 the semidefinite programs of PEPit 0.5 give 0.0184215.
    assert left == pytest.approx(1 / (4 * RHO**m - 2), rel=1e-12)
    assert left <= silver_bound(m)


@pytest.mark.parametrize("make", [quadratic, robust_regression, logistic_regression])
@given(st.integers(0, 2**32 - 1), st.integers(0, 8))
def test_silver_keeps_its_promise(make: Callable[[np.random.Generator], Convex], seed: int, m: int) -> None:
    problem = make(np.random.default_rng(seed))
    assert descend(problem, silver_rates(m, problem.smoothness)) <= silver_bound(m)
    assert descend(problem, silver_rates(m, 3 * problem.smoothness)) <= 3 * silver_bound(m)  # an over-estimate is safe


@pytest.mark.parametrize("m", range(4, 11))
def test_silver_beats_the_constant_rate(m: int) -> None:
    n = 2**m - 1
    problem = worst_huber(n)
    left = descend(problem, np.ones(n))
    assert left == pytest.approx(1 / (4 * n + 2), rel=1e-12)  # the exact worst case of the rate 1 / L
    assert silver_bound(m) < left
    assert descend(problem, silver_rates(m, 1.0)) < left


# --- plugging in ---


def test_each_schedule_is_tested() -> None:
    assert set(MADE) == set(schedules.__all__)


@each_schedule
@pytest.mark.parametrize("x64", [True, False], ids=["float64", "float32"])
def test_all_kinds_of_steps(lr: Callable[[Any], jax.Array], x64: bool) -> None:
    steps = np.arange(0, 256, 30)
    with jax.enable_x64(x64):
        one_by_one = [lr(int(k)) for k in steps]
        whole = [
            lr(steps),
            # Nothing is computed in the step's own narrow type.
            jax.jit(lr)(steps.astype(np.uint8).reshape(3, 3)),
            jax.jit(jax.vmap(lr))(steps),
        ]
        for rate in (one_by_one[0], lr(np.int64(3)), lr(jnp.int32(3)), *whole):
            assert isinstance(rate, jax.Array)
            assert rate.dtype == (jnp.float64 if x64 else jnp.float32)
            assert not rate.weak_type
        assert [rate.shape for rate in whole] == [(9,), (3, 3), (9,)]
        assert jax.eval_shape(lr, steps[:0]).shape == (0,)
    for rate in whole:  # compiled as a whole, a product and a sum may be rounded once
        np.testing.assert_allclose(np.ravel(rate), np.array(one_by_one), rtol=1e-15 if x64 else 4e-7)


@each_schedule
def test_one_trace_for_all_steps(lr: Callable[[Any], jax.Array]) -> None:
    traces = []

    @jax.jit
    def rate(k):
        traces.append(k)
        return lr(k)

    for k in (0, 1, 2, 50, 10**8):
        rate(jnp.int32(k)).block_until_ready()
    assert len(traces) == 1


@each_schedule
def test_a_schedule_made_before_x64_follows_it(lr: Callable[[Any], jax.Array]) -> None:
    with jax.enable_x64(True):
        precise = np.asarray(jax.jit(lr)(np.arange(100)))
    np.testing.assert_allclose(jax.jit(lr)(np.arange(100)), precise, rtol=5e-7)


@each_schedule
def test_no_nan_or_infinity_in_between(lr: Callable[[Any], jax.Array]) -> None:
    with jax.debug_nans(True), jax.debug_infs(True):
        jax.jit(lr)(np.array([-(2**31), -1, 0, 2**31 - 1]))
        assert lr(-5) == lr(0)


@each_schedule
def test_optax_takes_these_rates(lr: Callable[[Any], jax.Array]) -> None:
    expected = np.asarray(lr(np.arange(30)))
    gradient = jnp.float32(1.0)
    plain: Any = optax.sgd(lr)
    injected: Any = optax.inject_hyperparams(optax.sgd)(learning_rate=lr)

    @jax.jit
    def thirty():
        def step(states, _):
            first, plain_state = plain.update(gradient, states[0])
            second, injected_state = injected.update(gradient, states[1])
            rate = injected_state.hyperparams["learning_rate"]
            return (plain_state, injected_state), (-first, -second, rate)

        return jax.lax.scan(step, (plain.init(gradient), injected.init(gradient)), length=30)[1]

    for rates in thirty():
        np.testing.assert_allclose(rates, expected, rtol=4e-7)


@each_schedule
def test_optax_joins_these_schedules(lr: Callable[[Any], jax.Array]) -> None:
    joined = optax.join_schedules([optax.constant_schedule(7.0), lr], [3])
    expected = [7.0, 7.0, 7.0, *np.asarray(lr(np.arange(30)))]
    np.testing.assert_allclose(jax.jit(jax.vmap(joined))(np.arange(33)), expected, rtol=4e-7)


def test_optax_schedules_join_in_front() -> None:
    warm_up = optax.linear_schedule(0.0, 0.1, 5)
    joined = jax.jit(optax.join_schedules([warm_up, schedules.triangular2(0.1, 0.5, 2)], [5]))
    found = [float(joined(k)) for k in range(12)]
    np.testing.assert_allclose(found, [0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.3, 0.5, 0.3, 0.1, 0.2, 0.3], rtol=1e-6)


@pytest.mark.parametrize(
    "kind", [np.float64, np.float32, jnp.float32, jnp.bfloat16, jnp.asarray], ids=lambda kind: kind.__name__
)
def test_numbers_may_be_numpy_or_jax_scalars(kind: Any) -> None:
    triangular: Any = schedules.triangular
    lr = triangular(kind(0.25), kind(0.5), np.int32(2), jnp.int32(4))
    np.testing.assert_array_equal(lr(np.arange(7)), [0.25, 0.375, 0.5, 0.4375, 0.375, 0.3125, 0.25])
    assert schedules.silver(kind(0.5))(1) == 4.0
    assert schedules.constant(kind(0.5))(10**8) == 0.5
    assert schedules.constant(1)(0).dtype == jnp.float32
    np.testing.assert_array_equal(triangular(1, 2, 2.0)(np.arange(3)), [1.0, 1.5, 2.0])


# --- bad input ---

NO_RATE = [-0.1, math.nan, math.inf, "0.1", None, True, 1j, [0.1], np.array([0.1]), [[1], [1, 2]], lambda: 0.1]
NO_COUNT = [0, -1, 2.5, math.nan, math.inf, True, "3", 10**9 + 1, [3], 10**400]


@pytest.mark.parametrize(
    ("name", "make", "also"),
    [
        ("value", schedules.constant, []),
        ("start_lr", lambda value: schedules.range_test(value, 1.0, 10), [0.0]),
        ("end_lr", lambda value: schedules.range_test(0.1, value, 10), [0.0]),
        ("base_lr", lambda value: schedules.triangular(value, 1.0, 10), []),
        ("max_lr", lambda value: schedules.triangular2(0.0, value, 10), [0.0]),
        ("gamma", lambda value: schedules.exp_range(0.1, 0.2, 10, gamma=value), [0.0, 1.01]),
        ("max_lr", lambda value: schedules.one_cycle(value, 10), [0.0]),
        ("pct_start", lambda value: schedules.one_cycle(0.1, 10, value), [1.01]),
        ("div_factor", lambda value: schedules.one_cycle(0.1, 10, div_factor=value), [0.0]),
        ("final_div_factor", lambda value: schedules.one_cycle(0.1, 10, final_div_factor=value), [0.0]),
        ("smoothness", schedules.silver, [0.0]),
        ("num_steps", lambda value: schedules.range_test(0.1, 1.0, value), [*NO_COUNT, 1, None]),
        ("step_size_up", lambda value: schedules.triangular(0.1, 0.2, value), [*NO_COUNT, None]),
        ("total_steps", lambda value: schedules.one_cycle(0.1, value), [*NO_COUNT, None]),
    ],
)
def test_unusable_numbers(name: str, make: Callable[[Any], Any], also: list[Any]) -> None:
    for value in [*NO_RATE, *also]:
        with pytest.raises(InputError) as error:
            make(value)
        assert str(error.value).startswith(f"{name}={value!r} is not a ")


def test_unusable_step_size_down() -> None:  # None stands for the step size up
    for value in NO_COUNT:
        with pytest.raises(InputError) as error:
            schedules.triangular(0.1, 0.2, 10, value)
        assert str(error.value) == f"step_size_down={value!r} is not a whole number from 1 to 10**9."


@pytest.mark.parametrize(
    ("make", "fragments"),
    [
        (lambda: schedules.range_test(0.1, 1.0, 1), ["num_steps=1", "from 2"]),
        (lambda: schedules.range_test(0.1, 1.0, 10, "log"), ["mode='log'", "'exponential'", "'linear'"]),
        (lambda: schedules.triangular(0.2, 0.1, 10), ["max_lr=0.1", "base_lr=0.2", "Swap"]),
        (
            lambda: schedules.cyclical(0.1, 0.2, 10, mode="triangle"),
            ["mode='triangle'", "'triangular'", "'triangular2'", "'exp_range'"],
        ),
        (
            lambda: schedules.cyclical(0.1, 0.2, 10, scale_fn=abs, scale_mode="epochs"),
            ["scale_mode='epochs'", "'cycle'", "'iterations'"],
        ),
        (lambda: schedules.cyclical(0.1, 0.2, 10, scale_mode="epochs"), ["scale_mode='epochs'"]),
        (lambda: schedules.cyclical(0.1, 0.2, 10, scale_fn=cast(Any, 0.5)), ["scale_fn=0.5", "lambda"]),
        (lambda: schedules.one_cycle(0.1, 10, anneal_strategy="exp"), ["anneal_strategy='exp'", "'cos'", "'linear'"]),
        (lambda: schedules.triangular(0.1, 0.2, 10)(1.0), ["step=", "whole number", "integers"]),
        (lambda: schedules.silver(1.0)(True), ["step=", "whole number"]),
        (lambda: jax.jit(lambda rate: schedules.constant(rate)(0))(0.1), ["value is traced", "outside of jit"]),
        (lambda: jax.jit(lambda n: schedules.one_cycle(0.1, n)(0))(10), ["total_steps is traced", "outside of jit"]),
    ],
)
def test_errors_name_the_argument_and_the_fix(make: Callable[[], Any], fragments: list[str]) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert [fragment for fragment in fragments if fragment not in str(error.value)] == []
