"""``gdopt.spectral``: finds the rate, in a hand-written loop and as the default rate of `gd`."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations, some_of
from hypothesis import given
from problems import PROBLEMS, quadratic

import gdopt
from gdopt import Status

TOL = 1e-4  # the default of minimize


def rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


START = jnp.array([-1.2, 1.0])


def evaluate(loss: Any, params: Any) -> tuple[jax.Array, Any]:
    """The loss and its gradient as optax wants it: conjugated."""
    value, grad = jax.value_and_grad(loss)(params)
    return value, jax.tree.map(jnp.conj, grad)


def descend(loss: Any, params: Any, steps: int) -> tuple[Any, Any, jax.Array]:
    """A hand-written loop: the last trial point, the optimizer's state, the loss at each evaluation."""
    optimizer = gdopt.spectral()

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        value, grad = evaluate(loss, params)
        updates, state = optimizer.update(grad, state, params, value=value)
        return (optax.apply_updates(params, updates), state), value

    (params, state), values = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return params, state, values


# --- it finds minima ---


# Each compiles for a second: one of each kind is run, the others and float64 with `make test-slow`.
DTYPES = [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)]
USUAL = {"rosenbrock", "complex"}  # some others go further down in `test_tol_zero_reaches_the_precision_of_the_dtype`


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", some_of(PROBLEMS, USUAL))
def test_known_minima(name: str, dtype: Any) -> None:
    problem = PROBLEMS[name]
    with jax.enable_x64(dtype == np.float64):
        result = gdopt.minimize(problem.loss, problem.at(dtype).start)
    assert result.status == Status.CONVERGED, result
    assert problem.gap(result.params) <= 10 * TOL


@pytest.mark.parametrize(("condition", "most"), [(1e2, 150), (1e3, 400), (1e4, 1000), (1e5, 3000), (1e6, 6000)])
def test_ill_conditioned_quadratics(condition: float, most: int) -> None:
    """A rate of 2 / (L + mu) would need about condition / 2 * log(1e6) steps for this: 7 million at 1e6."""
    problem = quadratic("", np.geomspace(1 / condition, 1, 20))
    with jax.enable_x64(True):
        result = gdopt.minimize(problem.loss, problem.at(float).start, target=1e-6, tol=0, max_steps=most)
    assert result.status == Status.TARGET_REACHED, result


def test_a_quadratic_in_two_dimensions_ends_soon() -> None:
    """Huang et al.'s rate is made for it."""
    loss = lambda x, condition: x[0] ** 2 + condition * x[1] ** 2
    for condition in (10.0, 1e3, 1e5):
        result = gdopt.minimize(loss, jnp.array([1.0, 1.0]), args=(condition,), target=1e-6, tol=0, max_steps=40)
        assert result.status == Status.TARGET_REACHED, (condition, result)


# --- it has no scale of its own ---


def in_units(x: jax.Array, of_loss: Any, of_params: Any) -> jax.Array:
    return of_loss * rosenbrock(x / of_params)


@pytest.mark.parametrize("dtype", DTYPES)
def test_units_change_nothing(dtype: Any) -> None:
    """With powers of two every rounding and every bit of the run stay the same, with powers of ten nearly so."""
    with jax.enable_x64(dtype == np.float64):
        start, unit = jnp.asarray(START, dtype), jnp.ones((), dtype)
        expected = gdopt.minimize(in_units, start, args=(unit, unit))
        for a, b in itertools.product((2.0**-40, 1.0, 2.0**40), (2.0**-20, 1.0, 2.0**20)):
            result = gdopt.minimize(in_units, start * b, args=(unit * a, unit * b))
            assert (result.status, result.steps) == (Status.CONVERGED, expected.steps)
            np.testing.assert_array_equal(result.history.loss, expected.history.loss * a)
            np.testing.assert_array_equal(result.params, expected.params * b)
        for a, b in itertools.product((1e-12, 1.0, 1e12), (1e-6, 1.0, 1e6)):
            result = gdopt.minimize(in_units, start * b, args=(unit * a, unit * b))
            assert result.status == Status.CONVERGED
            assert abs(result.steps - expected.steps) <= expected.steps // 2
            np.testing.assert_allclose(result.params / b, 1, atol=0.02)


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20, 1e30])
def test_gradients_whose_squares_leave_float32(factor: float) -> None:
    loss = lambda x, factor: factor * jnp.sum(jnp.array([1.0, 10.0]) * (x - 1) ** 2)
    result = gdopt.minimize(loss, jnp.zeros(2), args=(factor,))  # an argument: one program for all factors
    assert result.status == Status.CONVERGED, result
    np.testing.assert_allclose(result.params, 1, atol=0.02)


# --- it comes back ---


def test_trials_outside_of_the_domain_are_undone() -> None:
    """-log is NaN left of 0, where the first steps lead."""
    loss = lambda x: jnp.sum(x - jnp.log(x) + 100 * jnp.log(x) ** 2)
    result = gdopt.minimize(loss, jnp.array([3e-4, 50.0]))
    assert result.status == Status.CONVERGED, result
    assert np.isnan(result.history.loss).any(), "a problem that shows nothing"
    np.testing.assert_allclose(result.params, 1, rtol=0.01)


def test_overshoot_is_undone_without_loss_of_digits() -> None:
    """No single float32 addition leads from 1e20 back to 1.234567, so the state holds the point itself."""
    optimizer: Any = gdopt.spectral()
    x = jnp.array([1.234567, -0.5])
    loss = lambda x: jnp.sum((x - 1) ** 2)
    value, grad = evaluate(loss, x)
    _, state = optimizer.update(grad, optimizer.init(x), x, value=value)
    trial = x - 1e20 * grad
    for _ in range(8):
        value, grad = evaluate(loss, trial)
        updates, state = optimizer.update(grad, state, trial, value=value)
        np.testing.assert_array_equal(state.params, x)
        trial = optax.apply_updates(trial, updates)
        if loss(trial) < loss(x):
            break
    else:
        pytest.fail(f"it is still at {trial}")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_params_stay_in_the_range_of_their_dtype(dtype: Any) -> None:
    """If the gradient never changes, the rate grows tenfold. A trial at infinity could not be undone."""
    with jax.enable_x64(dtype == np.float64):
        run = jax.jit(lambda x, slope: descend(lambda x: jnp.sum(slope * x.astype(float)), x, 700))
        for slope in (1.0, 1e-3, 1e3):
            params, state, _ = run(jnp.ones(3, dtype), slope)
            assert np.isfinite(params).all()
            assert np.isfinite(state.params).all()
            farthest = float(jnp.finfo(dtype).max) * min(slope, 1 / slope)  # that rate and loss are in range as well
            assert (state.params < -farthest / 1000).all()


# --- it ends ---


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tol", [TOL, 0.0])
def test_restart_at_the_minimum(dtype: Any, tol: float) -> None:
    with jax.enable_x64(dtype == np.float64):
        start = jnp.asarray(START, dtype)
        best = gdopt.minimize(rosenbrock, start, tol=0)
        again = gdopt.minimize(rosenbrock, best.params, tol=tol)
    assert again.status in (Status.CONVERGED, Status.PRECISION_LIMIT), again
    assert again.loss <= best.loss
    assert again.steps <= 300


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", some_of(["logistic", "rosenbrock", "wood", "pseudo_huber"], ["logistic", "wood", "pseudo_huber"])
)
def test_tol_zero_reaches_the_precision_of_the_dtype(name: str, dtype: Any) -> None:
    """A loss that is not zero at its minimum then ends at the limit of its precision, with success."""
    problem = PROBLEMS[name]
    with jax.enable_x64(dtype == np.float64):
        result = gdopt.minimize(lambda x: problem.loss(x) + 1, problem.at(dtype).start, tol=0)
    assert result.status in (Status.PRECISION_LIMIT, Status.CONVERGED), result
    assert result.success, result
    assert result.loss - problem.value - 1 <= 20 * float(jnp.finfo(dtype).eps)


UNBOUNDED = {
    "linear": lambda x: x[0] - 2 * x[1],
    "concave": lambda x: -jnp.sum(x**2),
    "cubic": lambda x: -jnp.sum(x**3),
    "exponential": lambda x: -jnp.sum(jnp.exp(x)),
    "logarithm": lambda x: -jnp.sum(jnp.log(x)),
    "root": lambda x: -jnp.sum(jnp.sqrt(x)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", some_of(UNBOUNDED, ["linear", "exponential", "logarithm"]))  # one of each speed
def test_losses_without_a_minimum(name: str, dtype: Any) -> None:
    """They end with finite params and never as a success; slow falls go as far as the range of rates."""
    with jax.enable_x64(dtype == np.float64):
        result = gdopt.minimize(UNBOUNDED[name], jnp.array([0.5, 1.0], dtype))
    assert result.status in (Status.NON_FINITE, Status.PRECISION_LIMIT, Status.MAX_STEPS), result
    assert not result.success
    assert result.loss < -50
    assert np.isfinite(result.params).all()
    assert np.isfinite(result.loss)


def test_a_fall_to_minus_infinity_is_named() -> None:
    result = gdopt.minimize(lambda x: -jnp.sum(x**2), jnp.ones(2))
    assert "it has no lower bound" in result.message


@pytest.mark.filterwarnings("ignore:the gradient is exactly zero everywhere")
def test_flat_losses() -> None:
    for loss in (lambda x: 0 * x + 3.0, lambda x: jnp.float32(3)):
        result = gdopt.minimize(loss, 1.0)
        assert (result.status, result.steps) == (Status.CONVERGED, 0)


@pytest.mark.parametrize("start", [1.0, 0.3, -7.7])
def test_absolute_value(start: float) -> None:
    """No gradient tells how near the kink is, but the search keeps halving its way to it, and ends."""
    result = gdopt.minimize(jnp.abs, start)
    assert result.status in (Status.CONVERGED, Status.PRECISION_LIMIT), result
    assert result.loss < 1e-6 * abs(start)
    assert result.steps < 5000


def test_a_plateau_above_the_best_point_is_no_minimum() -> None:
    """The gradient has vanished altogether there."""
    well = lambda x: 1 - jnp.exp(-(x**2)) + 1e-4 * jnp.sin(x) ** 2 * jnp.exp(-(x**2))
    for start in (1e-3, 0.5, 1.5, 2.5, 3.5):
        result = gdopt.minimize(well, start)
        assert result.success, result
        assert abs(result.params) < 0.05


def test_a_step_onto_a_plateau_is_undone() -> None:
    """This holds although its loss is below the average that a new point is compared with."""
    optimizer: Any = gdopt.spectral()
    x = jnp.array([1.0])
    state = optimizer.init(x)
    numbers = {"accepted": jnp.int32(9), "weight": jnp.float32(9), "reference": jnp.float32(5), "value": jnp.float32(2)}
    state = state._replace(trials=state.trials._replace(**numbers))
    for grad, accepted in ((1.0, True), (0.0, False)):
        _, new = optimizer.update(jnp.array([grad]), state, x, value=3.0)
        assert (new.rejected == 0) == accepted


def test_a_point_that_no_step_leaves() -> None:
    """The loss is finite only at the start. The message says so, and does not claim a minimum."""
    loss = lambda x: jnp.where(x == 1, x, jnp.nan)
    result = gdopt.minimize(loss, 1.0)
    assert (result.status, result.success) == (Status.STALLED, False)
    assert result.params == 1
    assert "is not finite after the next step" in result.message


def test_start_that_is_not_finite() -> None:
    result = gdopt.minimize(lambda x: jnp.log(x), -1.0)
    assert (result.status, result.steps) == (Status.NON_FINITE, 0)


def test_a_loss_of_minus_infinity_ends_the_run() -> None:
    result = gdopt.minimize(lambda x: jnp.where(x > 0, x, -jnp.inf), 1.0)
    assert result.status == Status.NON_FINITE
    assert result.params > 0


@st.composite
def polynomials(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """A sum of quartics in two dimensions, bounded below or not, and a start."""
    numbers = st.floats(-8, 8, width=32)
    return draw(st.lists(numbers, min_size=9, max_size=9)), draw(st.lists(numbers, min_size=2, max_size=2))


def quartic(x: jax.Array, c: jax.Array) -> jax.Array:
    a, b = x[0], x[1]
    return jnp.dot(c, jnp.stack([a, b, a * a, a * b, b * b, a * a * b, a**3, a**4, b**4]))


@given(polynomials(), st.sampled_from([0.0, 1e-8, TOL, 1e-1]))
def test_never_worse_than_given(case: tuple[list[float], list[float]], tol: float) -> None:
    """For any loss, the best point seen is returned, finite, with its own loss."""
    coefficients, start = (jnp.array(numbers, jnp.float32) for numbers in case)
    result = gdopt.minimize(quartic, start, args=(coefficients,), tol=tol, max_steps=300)
    assert np.isfinite(result.params).all()
    assert result.loss <= result.history.loss[0]
    assert result.loss == np.min(result.history.loss[np.isfinite(result.history.loss)])
    np.testing.assert_allclose(quartic(result.params, coefficients), result.loss, rtol=1e-4, atol=1e-3)


# --- it is an optax transformation like others ---


def test_minimize_repeats_a_hand_written_loop() -> None:
    result = gdopt.minimize(rosenbrock, START, optimizer=gdopt.gd)
    _, state, values = descend(rosenbrock, START, result.steps + 1)
    np.testing.assert_allclose(result.history.loss[:30], values[:30], rtol=1e-3)
    np.testing.assert_allclose(state.params, result.params, atol=0.01)


TREES = {
    "float32": jnp.array([3.0, -2.0]),
    "nested": {"a": jnp.array([3.0, -2.0]), "b": [jnp.float32(1.5), (jnp.ones((2, 3)),)], "none": None},
    "complex": jnp.array([1 + 2j, -3j]),
    "real and complex": (jnp.array([1.0, 2.0]), jnp.array([1 + 2j])),
    "Python numbers": {"a": 3.0, "b": [1.5, 2.5]},
    "empty leaf": {"a": jnp.array([3.0]), "b": jnp.zeros((0, 2))},
    "half and single": {"half": jnp.array([3.0, -2.0], jnp.float16), "single": jnp.array([1.0])},
    "bfloat16": jnp.array([3.0, -2.0], jnp.bfloat16),
}
TREES["all of these"] = {name: TREES[name] for name in ("nested", "real and complex", "empty leaf", "half and single")}


def bowl(params: Any) -> Any:
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return sum(
        k * jnp.sum(jnp.abs(leaf.astype(jnp.result_type(leaf, jnp.float32)) - 1) ** 2)
        for k, leaf in enumerate(leaves, 1)
    )


@pytest.mark.parametrize("name", some_of(TREES, ["all of these"]))
def test_any_tree_in_its_own_dtypes(name: str) -> None:
    params = TREES[name]
    last, state, values = descend(bowl, params, steps=60)
    specs = lambda tree: jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)
    assert specs(last) == specs(state.params) == specs(state.grad) == specs(params)
    assert state.value <= 1e-3 * values[0]
    result = gdopt.minimize(bowl, params)
    assert specs(result.params) == specs(params)
    assert result.loss <= 1e-3 * values[0]


def test_float64_beside_float32() -> None:
    with jax.enable_x64(True):
        params = {"single": jnp.array([3.0], jnp.float32), "double": jnp.array([3.0, 4.0])}
        result = gdopt.minimize(bowl, params)
        assert result.success
        assert [leaf.dtype for leaf in jax.tree.leaves(result.params)] == [np.float64, np.float32]


def test_vmap_is_each_run_alone() -> None:
    starts = jnp.array([[-1.2, 1.0], [2.0, 2.0], [0.0, 0.0], [1.0, 1.0]])
    _, states, values = jax.vmap(lambda x: descend(rosenbrock, x, 150))(starts)
    assert (states.value < 1e-5).all()
    run = jax.jit(lambda x: descend(rosenbrock, x, 150))
    for start, lane in zip(starts, values, strict=True):
        _, _, alone = run(start)
        np.testing.assert_allclose(lane[:15], alone[:15], rtol=1e-3)


@pytest.mark.slow
def test_in_a_chain() -> None:
    """Other transformations change its steps but not its search, which reads each step off the params."""
    for optimizer in (
        optax.chain(optax.clip_by_global_norm(1e3), gdopt.spectral(), optax.scale(0.7)),
        optax.masked(gdopt.spectral(), {"x": True, "y": False}),
    ):
        result = gdopt.minimize(lambda p: rosenbrock(p["x"]) + p["y"] ** 2, {"x": START, "y": 0.0}, optimizer=optimizer)
        assert result.success, result
        assert "was chosen at each step" in result.message


def test_one_trace_and_no_further_compilation() -> None:
    traces = []

    def loss(x: jax.Array) -> jax.Array:
        traces.append(1)
        return rosenbrock(x)

    gdopt.minimize(loss, START)
    assert len(traces) == 1
    elsewhere = START + 0.5
    with count_compilations() as counter:
        gdopt.minimize(lambda x: rosenbrock(x), elsewhere, tol=1e-2, max_steps=99)
    assert counter.names == []


def test_history_and_message_tell_the_rates() -> None:
    result = gdopt.minimize(rosenbrock, START, optimizer=gdopt.gd)
    *rates, last = result.history.learning_rate
    assert np.isnan(last)
    rates = [rate for rate in rates if not np.isnan(rate)]  # no rate led to where a claim was withdrawn
    assert (np.array(rates) > 0).all()
    low, high = (f"{rate:.2g}" for rate in (min(rates), max(rates)))
    assert result.message.endswith(f"The learning rate was chosen at each step, between {low} and {high}.")
    x = START
    for rate, value in zip(rates[:3], result.history.loss[:3], strict=True):  # no trial is rejected so early
        expected, grad = evaluate(rosenbrock, x)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        x = x - rate * grad


# --- bad input ---


def test_all_of_the_data_in_each_step_is_a_full_batch() -> None:
    data = np.arange(6, dtype=np.float32)
    result = gdopt.minimize(lambda w, batch: jnp.mean((batch - w) ** 2), 0.0, data=data)
    assert result.status == Status.CONVERGED
    np.testing.assert_allclose(result.params, 2.5, rtol=0.02)


def test_update_needs_params_and_value() -> None:
    optimizer = gdopt.spectral()
    state = optimizer.init(START)
    with pytest.raises(gdopt.InputError, match=r"spectral was updated without params"):
        optimizer.update(START, state, value=1.0)
    with pytest.raises(TypeError, match="value"):
        optimizer.update(START, state, START)


@pytest.mark.parametrize("optimizer", [gdopt.spectral(), gdopt.quasi_newton()], ids=["spectral", "quasi_newton"])
@pytest.mark.parametrize("size", [5, 5000])
def test_a_trial_with_one_nan_in_its_gradient_is_taken_back(size: int, optimizer: Any) -> None:
    """However many params there are: XLA's maximum of many numbers leaves NaN out."""
    x = jnp.ones(size)
    state = optimizer.init(x)
    updates, state = optimizer.update(2 * x, state, x, value=jnp.float32(size))
    moved = jnp.asarray(optax.apply_updates(x, updates))
    broken = (2 * moved).at[3].set(jnp.nan)
    updates, state = optimizer.update(broken, state, moved, value=jnp.sum(moved**2))
    assert int(state.rejected) == 1
    np.testing.assert_array_equal(state.params, x)
    assert jnp.isfinite(jnp.asarray(optax.apply_updates(moved, updates))).all()
