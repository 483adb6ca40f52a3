"""Honest endings: each status means what it says, has its sentence, and no bad update is ever returned."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import gdopt
from gdopt import Status

CURVATURES = jnp.array([1.0, 10.0])


def quadratic(x):
    return 0.5 * jnp.sum(CURVATURES * (x - 1) ** 2)


def minimize(loss=quadratic, params=None, learning_rate: Any = 0.1, **more):
    return gdopt.minimize(loss, jnp.zeros(2) if params is None else params, learning_rate=learning_rate, **more)


# CONVERGED


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3, 1e-4])
def test_converged_means_that_at_most_tol_of_the_gain_is_left(tol):
    result = minimize(tol=tol)
    assert (result.status, result.success) == (Status.CONVERGED, True)
    gained, left = result.history.loss[0] - result.loss, result.loss - 0.0
    assert 0 < left <= tol * gained
    # and it is the first point that passes the test
    product = result.history.grad_norm * np.array([0.0] + [1.0] * result.steps)
    assert product[-1] < product[1:-1].min()
    assert re.match(rf"converged after {result.steps} steps: the loss fell from 5.5 to ", result.message)


def test_a_smaller_tol_needs_more_steps():
    steps = [minimize(tol=tol).steps for tol in (1e-1, 1e-2, 1e-3, 1e-4)]
    assert steps == sorted(steps)
    assert len(set(steps)) >= 3  # a claim that was withdrawn may hold for the next tol as well


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e6, 1e12])
def test_convergence_has_no_scale_in_the_loss(factor):
    """A loss of another unit, with the rate to match, takes the same steps."""
    scaled = minimize(lambda x, factor: factor * quadratic(x), learning_rate=0.1 / factor, args=(factor,))
    assert scaled.status == Status.CONVERGED
    assert abs(scaled.steps - minimize().steps) <= 1


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_convergence_has_no_scale_in_the_params(factor):
    scaled = minimize(lambda x, factor: quadratic(x / factor), learning_rate=0.1 * factor**2, args=(factor,))
    assert scaled.status == Status.CONVERGED
    assert abs(scaled.steps - minimize().steps) <= 1


def test_convergence_has_no_zero_of_the_loss():
    with jax.enable_x64(True):
        start = jnp.zeros(2)
        plain = minimize(params=start)
        assert minimize(lambda x: quadratic(x) - 1e4, params=start).steps == plain.steps


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(optax.warmup_constant_schedule(0.0, 0.1, 200)),
        optax.sgd(optax.warmup_exponential_decay_schedule(1e-9, 0.1, 300, 1000, 1.0)),
        optax.MultiSteps(optax.sgd(0.1), 100),
        optax.chain(optax.sgd(0.1 / 30), optax.apply_every(30)),
        optax.contrib.prodigy(),
        optax.contrib.dog(1.0),
    ],
    ids=["warm-up", "tiny rates", "MultiSteps", "apply_every", "prodigy", "dog"],
)
def test_small_steps_are_not_taken_for_the_end(optimizer):
    """Tests of the step size would call all of these converged within a few steps."""
    result = gdopt.minimize(quadratic, jnp.zeros(2), optimizer=optimizer)
    assert result.status == Status.CONVERGED
    assert result.loss < 1e-3 * 5.5


@pytest.mark.filterwarnings("ignore:the gradient is exactly zero everywhere")
def test_a_zero_gradient_is_converged_if_nothing_is_left_to_gain():
    for loss in (lambda x: jnp.sum((x - 1) ** 2), lambda x: 3.0 + 0 * jnp.sum(x)):
        result = minimize(loss, jnp.ones(2))
        assert (result.status, result.steps) == (Status.CONVERGED, 0)
        assert "gradient is exactly zero" in result.message


@given(st.floats(-20, 20), st.sampled_from([1e-18, 1.0, 1e18]))
@settings(max_examples=12)
def test_gradients_whose_squares_leave_float32_are_measured(exponent, scale):
    """The plain sum of squares would be 0 ("converged") or infinite."""
    size = np.float32(2.0**exponent * scale)
    loss = lambda x, size: size * x[0] + 0 * x[1]  # an argument: one program for all sizes
    result = gdopt.minimize(loss, jnp.ones(2), args=(size,), learning_rate=1e-3 / float(size), max_steps=3)
    np.testing.assert_allclose(result.history.grad_norm, size, rtol=1e-6)
    assert result.status == Status.MAX_STEPS


# TARGET_REACHED


def test_target_is_reached_at_the_first_loss_at_or_below_it():
    result = minimize(target=0.01)
    assert (result.status, result.success) == (Status.TARGET_REACHED, True)
    assert result.history.loss[-1] <= 0.01 < result.history.loss[-2]
    assert "is at or below 0.01" in result.message


def test_target_with_batches_is_the_mean_of_an_epoch():
    rows = np.array([0.0, 10.0], np.float32)
    loss = lambda x, row: jnp.sum(row) * (1 + 0 * x)
    run = lambda target: gdopt.minimize(loss, 0.0, data=rows, batch_size=1, learning_rate=0.1, target=target, epochs=3)
    assert run(4.9).status == Status.MAX_STEPS  # though every second batch has loss 0
    assert (run(5.0).status, run(5.0).steps) == (Status.TARGET_REACHED, 1)
    assert "the mean loss of an epoch, 5, is at or below 5" in run(5.0).message


# MAX_STEPS


def test_max_steps_is_a_failure_if_convergence_was_the_aim():
    result = minimize(max_steps=3)
    assert (result.status, result.steps, result.success) == (Status.MAX_STEPS, 3, False)
    assert result.message.startswith("stopped at max_steps=3 before it converged: the loss fell from 5.5 to ")
    assert "Raise max_steps" in result.message


def test_epochs_without_a_batch_size_say_that_they_are_steps():
    rows = np.linspace(1.0, 2.0, 8, dtype=np.float32)
    call = functools.partial(
        gdopt.minimize, lambda w, x: jnp.mean((w * x - 3) ** 2), 0.0, data=rows, learning_rate=0.01
    )
    assert call(epochs=3).message.endswith("Without a batch_size an epoch is one step on all rows.")
    assert "batch_size" not in call(epochs=3, batch_size=2).message


def test_max_steps_is_a_success_for_a_noisy_loss():
    loss = lambda x, row: jnp.mean((row - x) ** 2)
    run = lambda **more: gdopt.minimize(
        loss, 0.0, data=np.arange(8.0, dtype=np.float32), batch_size=2, learning_rate=0.01, **more
    )
    assert run(epochs=2).success
    assert "took the 8 steps asked for (2 epochs): the mean loss of an epoch went from" in run(epochs=2).message
    assert not run(epochs=2, target=0.0).success
    assert run(epochs=2, target=0.0).status == Status.MAX_STEPS


def test_steps_and_means_of_a_stream_are_called_what_they_are():
    """Nobody asked for the default, and an endless stream has no epochs."""
    stream = lambda: itertools.repeat(np.ones(2, np.float32))
    run = lambda **more: gdopt.minimize(lambda x, row: jnp.mean((row - x) ** 2), 0.0, data=stream, **more)
    asked = run(learning_rate=0.01, max_steps=40).message
    assert asked.startswith("took the 40 steps asked for: the mean loss of 4 steps went from")
    assert run(learning_rate=1e-4).message.startswith("took 10000 steps, the default of max_steps: the mean loss of ")


def test_the_message_says_that_the_loss_never_decreased():
    result = minimize(lambda x: jnp.sum(jnp.abs(x)), jnp.full(2, 0.3), learning_rate=1.0, max_steps=10)
    assert "the loss never fell below its start" in result.message
    assert "learning_rate" in result.message
    np.testing.assert_array_equal(result.params, np.full(2, 0.3, np.float32))


# PRECISION_LIMIT


def test_precision_limit_ends_runs_that_cannot_improve():
    result = minimize(lambda x: 1000 + quadratic(x), tol=0)  # rounding hides the rest of the gain
    assert (result.status, result.success) == (Status.PRECISION_LIMIT, True)
    assert result.steps < 5000
    assert "no longer changes, and about" in result.message


def test_steps_too_small_to_change_anything_are_no_success():
    result = minimize(learning_rate=1e-12)
    assert (result.status, result.success) == (Status.STALLED, False)
    assert result.steps < 2000
    assert "the steps do not fit. Try a larger learning_rate" in result.message


def test_restart_at_the_answer_ends_at_once_and_is_no_worse():
    loss = lambda x: 1 + quadratic(x) + 0.1 * jnp.sum(jnp.cosh(x))
    first = minimize(loss, tol=0, max_steps=5000)
    again = minimize(loss, first.params, tol=0, max_steps=5000)
    assert again.status in (Status.PRECISION_LIMIT, Status.CONVERGED)
    assert again.steps <= 100
    assert again.loss <= first.loss


def test_swinging_is_no_precision_limit():
    """Momentum overshoots for hundreds of steps without a new best, but still makes progress."""
    heavy = lambda rate: optax.sgd(rate, momentum=0.999)
    result = gdopt.minimize(lambda x: jnp.sum(x**2), jnp.ones(1), optimizer=heavy, learning_rate=1e-5, max_steps=10_000)
    assert result.status in (Status.CONVERGED, Status.MAX_STEPS)
    assert result.loss < 1e-3


# DIVERGED


@given(st.floats(2.2, 50.0), st.floats(0.01, 100.0), st.floats(-1e3, 1e3))
@settings(max_examples=12)
def test_divergence_is_reported_and_its_advice_helps(times, curvature, offset):
    loss = lambda x, curvature, offset: 0.5 * curvature * jnp.sum(x**2) + offset
    options = {"args": (curvature, offset), "max_steps": 3000, "tol": 1e-2}
    run = lambda rate: gdopt.minimize(loss, jnp.full(2, 3.0), learning_rate=rate, **options)
    result = run(times / curvature)
    assert (result.status, result.success) == (Status.DIVERGED, False)
    np.testing.assert_array_equal(result.params, np.full(2, 3, np.float32))  # the best point: here the start
    assert np.isfinite(result.history.loss[:-1]).all()
    assert result.message.startswith(f"diverged at step {result.steps}: the loss grew from ")
    advice = re.search(r"learning_rate below (\S+)\.$", result.message)
    assert advice
    assert float(advice[1]) <= 2 / curvature * (1 + 1e-6)  # the stability limit
    assert run(0.99 * float(advice[1])).status in (Status.CONVERGED, Status.PRECISION_LIMIT)


def test_divergence_returns_the_best_point():
    schedule = lambda step: jnp.where(step < 20, 0.1, 3.0)
    result = minimize(learning_rate=schedule, tol=0)
    assert result.status == Status.DIVERGED
    assert result.loss == result.history.loss.min() < 0.01
    assert "The point of step 20 is returned." in result.message


def test_a_noisy_run_that_diverges_returns_its_last_good_point():
    random = np.random.default_rng(0)
    X = random.normal(size=(64, 3)).astype(np.float32)
    loss = lambda w, x: jnp.mean((x @ w - 1) ** 2)
    schedule = lambda step: jnp.where(step < 100, 0.05, 5.0)
    result = gdopt.minimize(loss, np.zeros(3, np.float32), data=X, batch_size=8, learning_rate=schedule)
    assert result.status in (Status.DIVERGED, Status.NON_FINITE)
    assert float(loss(result.params, X)) < 2 * float(loss(np.zeros(3, np.float32), X))
    assert np.isfinite(result.params).all()


def test_overshoot_that_recovers_is_no_divergence():
    """Rosenbrock with Adam at 5.0 climbs a hundredfold first."""
    rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    result = minimize(rosenbrock, jnp.array([-1.2, 1.0]), optimizer=optax.adam, learning_rate=5.0, max_steps=5000)
    assert result.history.loss.max() > 100 * result.history.loss[0]
    assert result.status != Status.DIVERGED


# NON_FINITE


@pytest.mark.parametrize("with_batches", [False, True])
def test_a_nan_is_never_returned(with_batches):
    """The square root ends at 0; a step beyond it is NaN."""
    loss = lambda x, *_: jnp.sum(jnp.sqrt(x)) + jnp.sum(x)
    data = {"data": np.zeros(4, np.float32), "batch_size": 2} if with_batches else {}
    result = minimize(loss, jnp.full(2, 0.5), learning_rate=0.2, **data)
    assert (result.status, result.success) == (Status.NON_FINITE, False)
    assert np.isnan(result.history.loss[-1])
    assert np.isfinite(result.history.loss[:-1]).all()
    assert np.isfinite(result.params).all()
    assert result.loss == pytest.approx(float(loss(result.params)), rel=1e-6)
    assert f"the loss became nan at step {result.steps}" in result.message


def test_nan_is_not_taken_for_convergence():
    """``while gradient > tol`` ends on NaN, as if it had converged."""
    result = minimize(lambda x: jnp.sum(jnp.where(x > 0.5, jnp.nan, quadratic(x))))
    assert result.status == Status.NON_FINITE
    assert np.isfinite(result.loss)


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_an_infinite_loss_with_a_finite_gradient_is_reported_without_a_warning(value):
    """The difference of two infinities would be a warning of NumPy's, which is an error here."""
    result = minimize(lambda x, value: value + jnp.sum(x**2), jnp.ones(2), args=(value,))
    assert (result.status, result.steps, result.loss) == (Status.NON_FINITE, 0, value)
    assert f"the loss is {value} at the start" in result.message


def test_a_loss_that_is_not_finite_at_the_start_is_reported():
    result = minimize(lambda x: jnp.sum(jnp.log(x)))
    assert (result.status, result.steps) == (Status.NON_FINITE, 0)
    assert result.message.startswith("the loss is -inf at the start")
    np.testing.assert_array_equal(result.params, np.zeros(2))


def test_a_gradient_that_is_not_finite_is_reported():
    result = minimize(lambda x: jnp.sum(jnp.sqrt(x)))
    assert result.status == Status.NON_FINITE
    assert result.message.startswith("the gradient norm is inf at the start")


def test_an_update_that_is_not_finite_is_not_returned():
    blow_up = optax.stateless(lambda updates, params: jax.tree.map(lambda g: g * jnp.inf, updates))
    result = gdopt.minimize(quadratic, jnp.zeros(2), optimizer=optax.chain(optax.sgd(0.1), blow_up))
    assert result.status == Status.NON_FINITE
    np.testing.assert_array_equal(result.params, np.zeros(2))


def test_a_schedule_that_gives_nan_is_named():
    result = minimize(learning_rate=lambda step: jnp.where(step == 7, jnp.nan, 0.1))
    assert result.status == Status.NON_FINITE
    assert "the schedule gave the learning rate nan for step 7" in result.message


@pytest.mark.parametrize("rate", [5.0, 1.5])
def test_after_a_blow_up_the_curvature_suggests_a_rate(rate):
    """The gradient grows 1e22-fold in a step, so the formula for quadratics would suggest a rate of 1e-23."""
    loss = lambda x: jnp.sum(jnp.exp(x**2))
    message = minimize(loss, jnp.ones(2), learning_rate=rate).message
    assert message.endswith("Try a learning_rate below 0.12.")  # 2 / L with L = 6e at 1
    assert minimize(loss, jnp.ones(2), learning_rate=0.12).success


@pytest.mark.parametrize("options", [{"optimizer": optax.adam}, {}])
def test_zero_and_tiny_rates_get_their_own_advice(options):
    still = minimize(learning_rate=lambda step: 0.0, max_steps=4, **options)
    assert still.message.endswith("The learning rate was 0 at each step. With one above 0 the loss can fall.")
    tiny = minimize(params=jnp.full(2, 2.0), learning_rate=1e-30, max_steps=4, **options)
    assert tiny.message.endswith("It has not changed at all. Raise max_steps, or try a larger learning_rate.")


def test_the_message_says_what_an_ascending_optimizer_may_lack():
    result = gdopt.minimize(quadratic, jnp.zeros(2), optimizer=optax.scale_by_adam(), max_steps=50)
    assert "the last one has to be optax.scale_by_learning_rate(...)" in result.message


# losses without a minimum


def test_a_linear_loss_ends_with_its_steps():
    result = minimize(lambda x: -jnp.sum(x), max_steps=500)
    assert result.status in (Status.MAX_STEPS, Status.PRECISION_LIMIT)
    assert result.loss < -50


def test_an_unbounded_loss_ends_with_a_status():
    result = minimize(lambda x: -jnp.sum(jnp.exp(x)), learning_rate=1.0)
    assert result.status == Status.NON_FINITE
    assert np.isfinite(result.loss)


# raising instead


def test_throw_and_raise_for_status_carry_the_result():
    with pytest.raises(gdopt.NotConvergedError, match="DIVERGED: diverged at step") as caught:
        minimize(learning_rate=1.0, throw=True)
    assert caught.value.result.status == Status.DIVERGED
    failed = minimize(learning_rate=1.0)
    with pytest.raises(RuntimeError, match=r"Try a learning_rate below 0\.2"):
        failed.raise_for_status()
    good = minimize(throw=True)
    assert good.raise_for_status() is good


def test_the_message_of_mini_batches_has_the_means_of_whole_epochs() -> None:
    loss = lambda x, row: jnp.mean((row - x) ** 2)
    rows = np.arange(8.0, dtype=np.float32)
    run = lambda epochs: gdopt.minimize(loss, 0.0, data=rows, batch_size=2, learning_rate=0.01, epochs=epochs)
    result = run(2)
    first, last = result.history.loss[:4].mean(), result.history.loss[4:8].mean()
    assert f"the mean loss of an epoch went from {first:.6g} to {last:.6g}." in result.message
    result = run(1)
    assert f"the mean loss of an epoch was {result.history.loss[:4].mean():.6g}." in result.message


def test_a_run_of_mini_batches_that_ends_above_its_start_says_so() -> None:
    rows = np.random.default_rng(0).normal(size=(64, 3)).astype("f4")
    loss = lambda w, batch: jnp.mean((batch @ w - 1) ** 2)
    options = {"data": rows, "batch_size": 8, "epochs": 3}
    result = gdopt.minimize(loss, jnp.zeros(3), optimizer=optax.adam, learning_rate=100.0, **options)
    assert not result.success
    assert "That is above the loss of the start, 1. Try a learning_rate well below 1e+02" in result.message
