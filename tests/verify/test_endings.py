"""The ending that a run reports: in natural units, from bad starts, at saddles, at kinks and when a rate decays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import least_squares, linprog

import gdopt
from gdopt import InputError, Status

READINGS = np.random.default_rng(0).normal(170, 10, (6, 200))[0]
SEVEN = np.array([1.17, 2.97, 3.26, 4.69, 5.83, 6.0, 6.41])
VALUES = np.array([78.93, 58.2, 67.47, 37.47, 45.65, 32.92, 29.97])


def gaussian(p: Any) -> jax.Array:
    """The likelihood of heights in cm, whose start is 17 standard deviations off."""
    return jnp.sum(p["ls"] + 0.5 * ((jnp.asarray(READINGS) - p["mu"]) / jnp.exp(p["ls"])) ** 2)


def two_scales(p: Any) -> jax.Array:
    return (p["a"] / 1e4 - 1) ** 2 + (p["b"] * 1e3 - 1) ** 2


def short_line(p: Any) -> jax.Array:
    x = jnp.linspace(0, 1e-4, 100)
    return jnp.mean((p["a"] + p["b"] * x - 1 - 5 * x / 1e-4) ** 2)


def unknown_sigma(t: Any) -> jax.Array:
    x, y = jnp.asarray(SEVEN), jnp.asarray(VALUES)
    return jnp.sum(t["ls"] + 0.5 * ((y - t["a"] - t["b"] * x) / jnp.exp(t["ls"])) ** 2)


NATURAL = {
    "Gaussian": (gaussian, {"mu": 0.0, "ls": 0.0}, {"mu": READINGS.mean(), "ls": np.log(READINGS.std())}),
    "two scales": (two_scales, {"a": 0.0, "b": 0.0}, {"a": 1e4, "b": 1e-3}),
    "short line": (short_line, {"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 5e4}),
    "unknown sigma": (unknown_sigma, {"a": 0.0, "b": 0.0, "ls": 0.0}, {"a": 89.1236, "b": -9.0094, "ls": 1.7953}),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", NATURAL)
def test_natural_units_from_bad_starts(name: str, dtype: Any) -> None:
    """In 0.1.0 each of these converged far away: mu was 0.03, and the slope of seven points positive."""
    loss, start, right = NATURAL[name]
    with jax.enable_x64(dtype == np.float64):
        result = gdopt.minimize(loss, start)
        gained = float(loss(start)) - result.loss
    assert result.success, result
    assert result.verified, result
    assert 0 <= result.left <= 1e-4 * gained
    for key, value in right.items():
        np.testing.assert_allclose(result.params[key], value, rtol=1e-3)


def test_poisson_regression_in_float32() -> None:
    """The loss is 5e5, of which float32 sees 0.03: the answer has to be within a standard error of the right one."""
    rng = np.random.default_rng(0)
    n = 500
    rows = np.stack([np.ones(n), rng.uniform(20, 80, n), rng.uniform(0, 0.5, n), rng.integers(0, 2, n)], 1)
    counts = rng.poisson(np.exp(rows @ [4, 0.03, -1.5, 0.2]))
    X, y = rows.astype("f4"), counts.astype("f4")
    loss = lambda p: jnp.sum(jnp.exp(X @ p) - y * (X @ p))
    result = gdopt.minimize(loss, jnp.array([np.log(counts.mean()), 0, 0, 0], "f4"))
    right = np.array([4.001, 0.0300, -1.491, 0.191])
    errors = np.sqrt(np.diag(np.linalg.inv(rows.T @ (np.exp(rows @ right)[:, None] * rows))))
    assert result.success, result
    assert (np.abs(result.params - right) < errors + 0.0005).all(), (result, errors)


@pytest.mark.parametrize("dies", [optax.cosine_decay_schedule(1e-3, 10), optax.exponential_decay(1e-2, 5, 0.3)])
def test_a_rate_that_decayed_is_no_success(dies: Any) -> None:
    result = gdopt.minimize(lambda x: 0.5 * jnp.sum(x**2), jnp.ones(1), learning_rate=dies)
    assert result.status == Status.STALLED
    assert not result.success
    assert result.message.startswith(f"stalled after {result.steps} steps: the learning rate decayed to ")
    np.testing.assert_allclose(result.left, result.loss, rtol=0.01)  # it says how much is left


def test_the_returned_point_is_the_judged_one() -> None:
    """Adam at this rate finds a dip, moves on, and comes to rest elsewhere."""
    loss = lambda x: x**2 / 50 - jnp.exp(-((x - 2.0) ** 2) / 0.02)
    result = gdopt.minimize(loss, 5.0, optimizer=optax.adam, learning_rate=1.0, max_steps=2000)
    assert not result.success or result.grad_norm < 0.01, result


def test_dead_units_are_no_minimum() -> None:
    x = jnp.arange(1.0, 5.0)
    loss = lambda w: jnp.mean((jax.nn.relu(w[0] * x + w[1]) - 2 * x) ** 2)
    result = gdopt.minimize(loss, jnp.array([1.0, 0.1]), learning_rate=0.3, max_steps=3000)
    assert not result.success


# --- saddles and maxima ---


def test_saddles_are_left() -> None:
    result = gdopt.minimize(lambda p: (p[0] * p[1] - 1) ** 2, jnp.zeros(2))
    assert result.success, result
    assert result.loss < 1e-6, result


def test_no_entry_is_left_at_a_saddle() -> None:
    """The many entries are independent of each other."""
    weights = np.linspace(0.5, 2, 5000, dtype="f4")
    result = gdopt.minimize(lambda x: jnp.sum(weights * (x**2 - 1) ** 2), jnp.zeros(5000))
    assert result.success, result
    np.testing.assert_allclose(abs(result.params), 1, atol=1e-2)


def test_networks_at_zero_are_left() -> None:
    x = np.linspace(-2, 2, 40)[:, None]
    start = {"w": np.zeros((1, 4)), "v": np.zeros((4, 1))}
    loss = lambda p: jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"] - x) ** 2)
    result = gdopt.minimize(loss, jax.tree.map(lambda leaf: leaf.astype("f4"), start))
    assert result.loss < 0.05 * float(loss(start)), result


def test_dead_units_are_revived() -> None:
    """From zeros one hidden unit learns, and the others stay at 1e-40: a saddle whose diagonal curvature is zero."""
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 3)).astype("f4")
    y = np.sin(x).sum(1)
    loss = lambda p: jnp.mean((jnp.tanh(x @ p[:12].reshape(3, 4) + p[None, 12:16]) @ p[16:20] + p[20] - y) ** 2)
    for start in (np.zeros(21, "f4"), 1e-6 * random.normal(size=21).astype("f4")):
        result = gdopt.minimize(loss, start, max_steps=3000)
        assert result.loss < 0.01, result  # one unit alone comes to 0.1


# --- curved valleys ---


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_curved_valley_is_no_minimum(dtype: Any) -> None:
    """Thermal expansion as a quotient of cubics, the model of NIST's Hahn1.

    The curvature says that 0.03 is left of a loss of 16.6 where a long way down to 5.9 begins.
    """
    t = np.linspace(14.0, 850.0, 100)
    model = lambda b: (b[0] + b[1] * t + b[2] * t**2 + b[3] * t**3) / (1 + b[4] * t + b[5] * t**2 + b[6] * t**3)
    noise = 0.08 * np.random.default_rng(0).normal(size=100)
    y = model(np.array([1.08, -0.123, 4.09e-3, -1.43e-6, -5.76e-3, 2.4e-4, -1.23e-7])) + noise
    start = np.array([1.0, -0.1, 5e-3, -1e-6, -5e-3, 1e-4, -1e-7], dtype)
    with jax.enable_x64(dtype == np.float64):
        result = gdopt.minimize(lambda b: jnp.sum((model(b) - y) ** 2), start)
    polished = least_squares(lambda b: model(b) - y, np.asarray(result.params, float), x_scale="jac", method="lm")
    assert result.success, result
    assert result.loss - 2 * polished.cost <= 10 * max(result.left, 1e-6 * result.loss), result


def test_an_exact_maximum_is_left() -> None:
    result = gdopt.minimize(jnp.cos, 0.0)
    assert result.success, result
    assert abs(result.loss + 1) < 1e-5, result


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.sgd(0.1), optax.lbfgs()])
def test_other_optimizers_name_the_saddle(optimizer: Any) -> None:
    result = gdopt.minimize(lambda p: (p[0] * p[1] - 1) ** 2, jnp.zeros(2), optimizer=optimizer)
    assert result.status == Status.STALLED
    assert not result.success
    assert "saddle" in result.message


# --- what looks like a minimum ---


@pytest.mark.parametrize(
    ("loss", "start"),
    [
        (lambda x: x**3, 1.0),
        (lambda x: x**5, 1.0),
        (lambda x: x[0] ** 3 + (x[1] - 3) ** 2, np.array([1.0, 0.0])),
        (lambda x: x[0] ** 3 - 3 * x[0] * x[1] ** 2 + x[0] ** 4 + x[1] ** 4, np.array([1.0, 0.0])),  # a monkey saddle
        (lambda x: x[0] ** 2 - x[1] ** 4 + x[1] ** 6, np.array([1.0, 0.0])),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_flat_saddles_and_inflections_are_left(loss: Any, start: Any, dtype: Any) -> None:
    """Their curvature is zero, and the loss falls on one side, or on both farther away."""
    with jax.enable_x64(dtype == np.float64):
        result = gdopt.minimize(loss, np.asarray(start, dtype))
        assert result.loss < -0.1, result
        assert not result.success or np.linalg.norm(jax.grad(loss)(result.params)) < 1e-2, result


def with_gradient_at(shift: float, sign: float) -> Any:
    """Return squares around 2 with the gradient of another loss."""

    @jax.custom_vjp
    def squares(x: jax.Array) -> jax.Array:
        return jnp.sum((x - 2) ** 2)

    squares.defvjp(lambda x: (squares(x), x), lambda x, ct: (sign * ct * 2 * (x - shift),))
    return squares


def test_a_gradient_that_does_not_match_is_no_success() -> None:
    result = gdopt.minimize(with_gradient_at(1.0, 1.0), jnp.zeros(3))
    assert not result.success, result
    result = gdopt.minimize(with_gradient_at(2.0, -1.0), jnp.zeros(3))
    assert not result.success, result
    assert "is lower, so it may not match the loss" in result.message


def test_a_loss_lost_in_rounding_is_no_success() -> None:
    """A likelihood of Student's t, whose gammaln terms cancel as the degrees of freedom grow."""
    readings = 5 * np.random.default_rng(1).standard_t(3, 200) + 1000

    def loss(p: jax.Array) -> jax.Array:
        freedom, z = jnp.exp(p[2]), (readings - p[0]) / jnp.exp(p[1])
        const = jax.scipy.special.gammaln(freedom / 2) - jax.scipy.special.gammaln((freedom + 1) / 2)
        return jnp.sum(const + 0.5 * jnp.log(freedom * jnp.pi) + p[1] + (freedom + 1) / 2 * jnp.log1p(z * z / freedom))

    with jax.enable_x64(True):
        for start in ([0.0, 5.0, 1.0], [3000.0, 8.0, -2.0]):
            result = gdopt.minimize(loss, np.array(start))
            assert not result.success or abs(result.loss - 669.9824) < 1e-3, result
            if not result.success:
                assert "most of what it gained is rounding" in result.message


def test_an_inaccurate_loss_says_how_accurate_it_is() -> None:
    """Distances of 2.66e7 metres to satellites: float32 knows their squared errors to about 10."""
    random, here = np.random.default_rng(0), np.array([3.9e6, 3.2e5, 5.0e6])
    directions = random.normal(size=(8, 3)) + 2 * here / np.linalg.norm(here)
    satellites = 2.66e7 * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    pseudo = np.linalg.norm(satellites - here, axis=1) + random.normal(0, 5, 8)
    loss = lambda p: jnp.sum((jnp.sqrt(jnp.sum((satellites - p[None]) ** 2, axis=1)) - pseudo) ** 2)
    result = gdopt.minimize(loss, np.array([4e6, 0.0, 5e6], "f4"))
    with jax.enable_x64(True):
        exact = gdopt.minimize(loss, np.asarray(result.params, float))
    assert result.success, result
    assert exact.success, exact
    assert result.loss - exact.loss < 10 * result.left, (result, exact)
    assert "less is left to gain than its rounding there" in result.message


def test_a_start_at_the_minimum_is_a_success() -> None:
    """This holds even if the little that is left to gain is less than rounding."""
    x, y = np.linspace(0, 1e3, 50, dtype="f4"), np.linspace(3, 2e3, 50, dtype="f4")
    loss = lambda p: jnp.mean((p[0] + p[1] * x - y) ** 2)
    result = gdopt.minimize(loss, jnp.zeros(2))
    for _ in range(3):
        assert result.success, result
        result = gdopt.minimize(loss, result.params)


@pytest.mark.parametrize(
    "loss", [lambda x: jnp.sum(x**2), lambda x: 3 * x[0] ** 4 - 2 * (x[0] * x[1]) ** 2 + 3 * x[1] ** 4]
)
def test_a_loss_that_underflows_to_zero_ends_the_run(loss: Any) -> None:
    """``tol=0`` asks for ever more, and what a zero loss leaves to gain is beyond the range."""
    result = gdopt.minimize(loss, jnp.array([1.0, 0.1]), tol=0)
    assert result.success, result
    assert result.loss == 0, result
    assert result.steps < 1000


def test_nan_second_derivatives_are_replaced_by_differences() -> None:
    """The loss has a term of value zero whose second derivative is NaN."""

    def loss(x: jax.Array) -> jax.Array:
        def squares(x: jax.Array) -> jax.Array:
            return jnp.sum((x - 1.5) ** 2 * jnp.array([1.0, 30.0]))

        @jax.custom_jvp
        def nothing(x: jax.Array) -> jax.Array:
            return 0 * jnp.sum(x)

        @nothing.defjvp
        def _(x: tuple, tangents: tuple) -> tuple:
            return nothing(*x), jnp.sum(jnp.sqrt(0 * x[0]) * tangents[0])

        return squares(x) + nothing(x)

    assert np.isnan(jax.hessian(loss)(jnp.ones(2))).any()
    for run in (gdopt.minimize, jax.jit(gdopt.minimize, static_argnums=0)):
        result = run(loss, jnp.zeros(2))
        assert result.success, result
        assert result.verified, result
        np.testing.assert_allclose(result.params, 1.5, atol=1e-3)


@pytest.mark.parametrize("start", [[0.0, -1.0, 1.0, 3.0, 3.0], [0.0, 1e4, -1e4, 2.0, 2.0]])
def test_a_search_never_continues_from_a_nan_point(start: list) -> None:
    """A mixture of two normals, one of which is lost."""
    random = np.random.default_rng(1)
    readings = np.concatenate([random.normal(-200, 10, 100), random.normal(300, 40, 150)])

    def loss(p: jax.Array) -> jax.Array:
        z = (readings[:, None] - p[None, 1:3]) / jnp.exp(p[None, 3:])
        parts = jax.nn.log_sigmoid(jnp.stack([p[0], -p[0]]))[None] - p[None, 3:] - 0.5 * z**2
        return -jnp.mean(jax.nn.logsumexp(parts, axis=1))

    with jax.enable_x64(True):
        result = gdopt.minimize(loss, np.array(start))
    assert result.status != Status.NON_FINITE, result
    assert result.loss < 6.009, result  # of a single normal


# --- kinks and bounds ---


@pytest.mark.parametrize("optimizer", [None, gdopt.gd])
def test_kinks(optimizer: Any) -> None:
    result = gdopt.minimize(lambda x: jnp.abs(x - 1.0), 5.0, optimizer=optimizer)
    assert result.success, result
    assert result.verified, result
    np.testing.assert_allclose(result.params, 1, atol=1e-5)


@pytest.mark.parametrize("optimizer", [None, gdopt.gd])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_not_every_kink_of_a_largest_error_is_a_minimum(optimizer: Any, dtype: Any) -> None:
    """A line through kelvins over pascals: few directions lead down from a kink, and no single gradient is one."""
    x = np.linspace(9e4, 1.1e5, 40)
    y = 280 + 1e-4 * x + np.random.default_rng(0).uniform(-0.5, 0.5, 40)
    best = linprog(
        [0, 0, 1],
        np.block(
            [[np.ones((40, 1)), x[:, None], -np.ones((40, 1))], [-np.ones((40, 1)), -x[:, None], -np.ones((40, 1))]]
        ),
        np.concatenate([y, -y]),
        bounds=[(None, None)] * 3,
    ).fun
    with jax.enable_x64(dtype == np.float64):
        for start in ([290.0, 0.0], [0.0, 0.0]):
            loss = lambda p: jnp.max(jnp.abs(p[0] + p[1] * x - y))
            result = gdopt.minimize(loss, np.array(start, dtype), optimizer=optimizer)
            assert not result.success or result.loss < best + 0.01, result


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_not_every_kink_of_least_absolute_errors_is_a_minimum(dtype: Any) -> None:
    """With ten params, few of very many directions lead down from most points of a search."""
    random = np.random.default_rng(0)
    a = random.normal(size=(40, 10)).astype(dtype)
    y = (a @ random.normal(size=10) * 0.3 + random.normal(size=40)).astype(dtype)
    ones, none = np.full(40, 1 / 40), [(None, None)] * 10 + [(0, None)] * 80
    system = np.hstack([a, np.eye(40), -np.eye(40)])
    best = linprog(np.concatenate([np.zeros(10), ones, ones]), A_eq=system, b_eq=y, bounds=none).fun
    with jax.enable_x64(dtype == np.float64):
        result = gdopt.minimize(lambda x: jnp.mean(jnp.abs(a @ x - y)), np.zeros(10, dtype))
    assert result.loss < best + 1e-3, result
    assert not result.success or result.loss - best <= 10 * result.left, result


@pytest.mark.parametrize("start", [np.zeros(8), np.ones(8)])
def test_a_lasso_says_how_accurate_its_minimum_is(start: np.ndarray) -> None:
    random = np.random.default_rng(0)
    a = random.normal(size=(50, 8))
    b = a @ np.array([3.0, -2.0, 1.0, 0, 0, 0, 0, 0]) + 0.1 * random.normal(size=50)
    loss = lambda xp, p: xp.mean((a @ p - b) ** 2) + 0.5 * xp.sum(abs(p))
    best, rate = np.zeros(8), 25 / np.linalg.norm(a, 2) ** 2
    for _ in range(5000):  # proximal steps
        best = best - rate / 25 * a.T @ (a @ best - b)
        best = np.sign(best) * np.maximum(abs(best) - rate * 0.5, 0)
    for optimizer in (None, gdopt.gd):  # the first comes so far only slowly
        result = gdopt.minimize(functools.partial(loss, jnp), start.astype("f4"), optimizer=optimizer)
        assert result.success or optimizer is None, result
        assert not result.success or loss(np, np.asarray(result.params, float)) - loss(np, best) <= 10 * result.left, (
            result
        )


def test_bounds_of_a_projecting_optimizer() -> None:
    optimizer = optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative())
    result = gdopt.minimize(lambda x: jnp.sum((x + 1) ** 2), jnp.ones(2), optimizer=optimizer)
    assert result.success, result
    np.testing.assert_array_equal(result.params, 0)


def test_both_parts_of_complex_params_are_verified_with_any_optimizer() -> None:
    loss = lambda z: 100 * (z.real - 1) ** 2 + 0.1 * (z.imag - 1) ** 2 + 1
    run = functools.partial(gdopt.minimize, loss, jnp.asarray(0j), max_steps=30_000)
    known = run(optimizer=optax.sgd, learning_rate=0.004)
    composed = run(optimizer=optax.chain(optax.sgd(0.004), optax.identity()))
    assert (composed.status, composed.steps) == (known.status, known.steps)
    assert composed.success
    assert composed.left == pytest.approx(known.left)
    assert composed.left >= 0.5 * (composed.loss - 1)


# --- no minimum ---


@pytest.mark.parametrize("optimizer", [None, gdopt.gd])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("loss", "start"),
    [(lambda x: -x, 1.0), (lambda x: -jnp.log(jnp.log(x)), 3.0), (lambda x: -jnp.log1p(jnp.abs(x)), 1.0)],
)
def test_losses_without_a_lower_bound(loss: Any, start: float, dtype: Any, optimizer: Any) -> None:
    with jax.enable_x64(dtype == np.float64):
        result = gdopt.minimize(loss, start, optimizer=optimizer)
    assert not result.success
    assert "no lower bound" in result.message


def test_params_that_shrink_from_afar_do_not_grow() -> None:
    loss = lambda x: 1e-30 * jnp.sum(jnp.array([1.0, 30, 900]) * (x / 1e20 - jnp.array([1.0, -2, 0.5])) ** 2)
    result = gdopt.minimize(loss, jnp.array([-1.2e20, 1e20, 3e19]), max_steps=500)
    assert not result.success
    assert "grew" not in result.message


SATURATED = {
    "Arrhenius": (lambda p, t: p[0] * jnp.exp(-p[1] / (8.314 * t)), (300.0, 400.0), (8.3e8, 5.2e4), (1e9, 5e4)),
    "Hill": (
        lambda p, c: p[0] + (p[1] - p[0]) / (1 + (p[2] / c) ** p[3]),
        (1.0, 1e4),
        (210.0, 9400.0, 130.0, 1.4),
        (0.0, 100.0, 1.0, 1.0),
    ),
    "box": (lambda p, x: p[0] * (1 - jnp.exp(-p[1] * x)), (1.0, 10.0), (213.0, 0.55), (1.0, 1.0)),
}


@pytest.mark.parametrize("optimizer", [None, gdopt.gd])
@pytest.mark.parametrize("name", SATURATED)
def test_params_that_went_too_far_are_no_minimum(name: str, optimizer: Any) -> None:
    """A step leads to where the curve is constant: the gradient and curvature of most params are zero there."""
    model, (low, high), right, start = SATURATED[name]
    with jax.enable_x64(True):
        x = jnp.asarray(np.geomspace(low, high, 20))
        y = model(jnp.asarray(right), x)
        result = gdopt.minimize(lambda p: jnp.sum((model(p, x) - y) ** 2), jnp.asarray(start), optimizer=optimizer)
        constant = float(jnp.sum((y - y.mean()) ** 2))
    assert not result.success or result.loss < 1e-3 * constant, result
    if result.status == Status.STALLED:
        assert "unlike at the start, the loss does not depend on some of the params" in result.message


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": gdopt.spectral()}, {"optimizer": gdopt.gd, "learning_rate": 0.2}]
)
@pytest.mark.parametrize("start", [(1.0, 3e-4), (1.0, 1e-3), (1e3, 3e-4), (1e5, 1e-3), (1e6, 1e-5), (1e6, 1e-3)])
def test_a_decay_that_became_a_constant_is_no_minimum(start: tuple[float, float], options: dict[str, Any]) -> None:
    """The time constant goes to 1e4 from 1e-3, so that its start is below the rounding of its way."""
    t = np.linspace(0, 8e-3, 200)
    y = 2.3e6 * np.exp(-t / 1.7e-3) + 1.1e5 + np.random.default_rng(2).normal(0, 2e4, t.size)
    loss = lambda p, t, y: jnp.mean((p["A"] * jnp.exp(-t / p["tau"]) + p["c"] - y) ** 2)
    result = gdopt.minimize(loss, {"A": start[0], "tau": start[1], "c": 0.0}, args=(t, y), **options)
    assert not result.success or result.loss < 0.3 * np.var(y), result


def rate_of_reaction(p: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((p[0] * jnp.exp(-p[1] / t) - y) ** 2)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["call", "jit"])
@pytest.mark.parametrize("start", [(1.1e5, 1.6e5), (3e3, 7.6e4), (6.3e7, 3.6e4), (8.2e3, 1.5e6)])
def test_a_start_where_the_loss_is_constant_is_left(start: tuple, transform: Callable) -> None:
    """All of the model is zero there, and so are gradient and curvature. A smaller second param is not."""
    t = jnp.linspace(270, 400, 40)
    y = 4e5 * jnp.exp(-3100 / t)
    run = transform(lambda start: gdopt.minimize(rate_of_reaction, start, args=(t, y)))
    result = run(jnp.array(start))
    assert result.success
    np.testing.assert_allclose(result.params, [4e5, 3100], rtol=1e-3)


def test_a_fixed_rate_stays_where_the_loss_is_constant_without_success() -> None:
    t = jnp.linspace(270, 400, 40)
    y = 4e5 * jnp.exp(-3100 / t)
    result = gdopt.minimize(rate_of_reaction, jnp.array([1.1e5, 1.6e5]), args=(t, y), learning_rate=0.1)
    assert result.status is Status.STALLED
    assert "at no minimum" in result.message


def test_params_without_any_effect_are_no_obstacle() -> None:
    result = gdopt.minimize(lambda p: (p["used"] - 1) ** 2 + 1, {"used": 0.0, "unused": 5.0})
    assert result.success
    np.testing.assert_allclose([result.params["used"], result.params["unused"]], [1, 5])


@pytest.mark.parametrize("optimizer", [None, gdopt.gd])
def test_a_likelihood_without_bound_is_no_success(optimizer: Any) -> None:
    """For equal readings the spread goes to zero, until the curvature is beyond the range."""
    loss = lambda p: p["s"] + 0.5 * jnp.mean(((293.0 - p["mu"]) / jnp.exp(p["s"])) ** 2)
    for start in ({"mu": 293.0, "s": 0.0}, {"mu": 280.0, "s": 3.0}):
        assert not gdopt.minimize(loss, start, optimizer=optimizer).success


def test_a_loss_without_second_derivatives_is_verified() -> None:
    """By differences of its gradient."""

    @jax.custom_vjp
    def quartic(x: jax.Array) -> jax.Array:
        return jnp.sum((x - 1) ** 2 + jnp.array([1.0, 1e4]) * (x - 1) ** 4)

    def forward(x: jax.Array) -> tuple:
        return quartic(x), x

    def backward(x: jax.Array, ct: jax.Array) -> tuple:
        grad = 2 * (x - 1) + 4 * jnp.array([1.0, 1e4]) * (x - 1) ** 3
        return (ct * jax.pure_callback(lambda g: g, jax.ShapeDtypeStruct(x.shape, x.dtype), grad),)

    quartic.defvjp(forward, backward)
    for run in (gdopt.minimize, jax.jit(gdopt.minimize, static_argnums=0)):
        result = run(quartic, jnp.array([5.0, -3.0]))
        assert result.success, result
        assert result.verified, result
        assert result.loss < 1e-3, result


def test_target_at_a_trial_without_a_gradient() -> None:
    """Only a point that can be returned reaches a target."""
    loss = lambda x: jnp.where(x > 1, (x - 1) ** 2, jnp.sqrt(jnp.maximum(x - 1, 0.0)) * 0)
    result = gdopt.minimize(loss, 3.0, learning_rate=1.5, target=0.5)
    assert result.status != Status.TARGET_REACHED or result.loss <= 0.5


# --- growth ---


def rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


@pytest.mark.parametrize("optimizer", [optax.lars(1.0), optax.contrib.acprop(1e-3)])
def test_temporary_growth_is_no_divergence(optimizer: Any) -> None:
    """The loss peaks at 8e6 and 8e7, and recovers."""
    result = gdopt.minimize(rosenbrock, jnp.zeros(2), optimizer=optimizer, max_steps=2000)
    assert result.status != Status.DIVERGED, result


def test_a_loss_that_shrinks_by_a_factor_in_each_step_has_not_converged() -> None:
    def zakharov(x: jax.Array) -> jax.Array:
        s = jnp.sum(0.5 * jnp.arange(1, x.size + 1) * x)
        return jnp.sum(x**2) + s**2 + s**4

    result = gdopt.minimize(zakharov, jnp.full(10, 100.0))
    assert result.loss < 1e-9 * float(zakharov(jnp.full(10, 100.0))), result


def test_mini_batches_that_end_above_the_start_are_no_success() -> None:
    data = np.random.default_rng(0).normal(size=(64, 3)).astype("f4")
    loss = lambda w, batch: jnp.mean((batch @ w - 1) ** 2)
    for rate, success in ((0.05, True), (100.0, False)):
        options = {"data": data, "batch_size": 8, "epochs": 3, "optimizer": optax.adam, "learning_rate": rate}
        result = gdopt.minimize(loss, jnp.zeros(3), **options)
        assert result.success == success, result


# --- the same inside of jit, vmap and grad ---


def test_endings_inside_of_a_transformation_are_the_same() -> None:
    starts = jnp.array([[0.0, 0.0], [3.0, 0.5], [1.0, 1.0]])
    fit = lambda start: gdopt.minimize(lambda p: (p[0] * p[1] - 1) ** 2 + 1e-3 * jnp.sum(p**2), start)
    inside: Any = jax.vmap(fit)(starts)
    for row, start in enumerate(starts):
        outside = fit(start)
        assert (outside.status, outside.success) == (int(inside.status[row]), bool(inside.success[row]))
        np.testing.assert_allclose(outside.loss, inside.loss[row], rtol=1e-4)
        assert bool(inside.verified[row]) == outside.verified


def test_derivatives_need_success() -> None:
    fit = lambda scale, steps: gdopt.minimize(lambda x: jnp.sum((x - scale) ** 2), jnp.zeros(2), max_steps=steps).params
    assert np.isnan(jax.jacobian(lambda scale: fit(scale, 1))(3.0)).all()
    np.testing.assert_allclose(jax.jacobian(lambda scale: fit(scale, 1000))(3.0), 1, rtol=1e-4)


# --- the absolute test ---


def test_grad_tol_is_the_largest_entry_of_the_gradient() -> None:
    loss = lambda x: jnp.sum(jnp.array([1.0, 100.0]) * x**2)
    options: dict[str, Any] = {"learning_rate": 0.004, "tol": 0.0}
    result = gdopt.minimize(loss, jnp.ones(2), grad_tol=0.1, **options)
    largest = np.abs(jax.grad(loss)(result.params)).max()
    assert result.status == Status.CONVERGED
    assert largest <= 0.1
    before = gdopt.minimize(loss, jnp.ones(2), max_steps=result.steps - 1, **options)
    assert np.abs(jax.grad(loss)(before.params)).max() > 0.1


@pytest.mark.parametrize("grad_tol", [-1e-5, float("nan"), "small"])
def test_bad_grad_tol(grad_tol: Any) -> None:
    with pytest.raises(InputError, match="grad_tol="):
        gdopt.minimize(lambda x: x**2, 1.0, grad_tol=grad_tol)


def test_grad_tol_is_not_for_noisy_losses() -> None:
    with pytest.raises(InputError, match=r"grad_tol=0\.1 was given for a noisy loss"):
        gdopt.minimize(lambda x, key: x**2, 1.0, with_key=True, grad_tol=0.1, learning_rate=0.1)


# --- advice ---


def wide_line(p: Any) -> jax.Array:
    """A regression whose second half of columns is 1e4 times as large; float32 does not see both curvatures at once."""
    rows = np.random.default_rng(0).normal(size=(200, 50))
    return jnp.mean((rows[:, :25] @ (p["u"] - 1) + 1e4 * rows[:, 25:] @ (p["v"] - 1)) ** 2)


def test_many_params_of_two_scales() -> None:
    """In plain Lanczos directions nothing seemed to be left at 21 of a loss of 25."""
    start = {"u": np.zeros(25, "f4"), "v": np.zeros(25, "f4")}
    result = gdopt.minimize(wide_line, start, optimizer=gdopt.gd)
    assert result.success, result
    assert result.loss < 1e-3, result


@pytest.mark.parametrize(
    ("loss", "start", "rate", "names"),
    [
        (two_scales, {"a": 0.0, "b": 0.0}, 4e-7, "params['a'] and params['b']"),
        (
            lambda x: jnp.sum(jnp.asarray([1.0, 1e4, 1e6]) * (x - 1) ** 2),
            np.zeros(3, "f4"),
            1e-7,
            "params[0] and params[2]",
        ),
        (wide_line, {"u": np.zeros(25, "f4"), "v": np.zeros(25, "f4")}, 1e-10, "params['u'] and params['v']"),
    ],
)
def test_params_whose_scales_differ_are_named(loss: Any, start: Any, rate: float, names: str) -> None:
    result = gdopt.minimize(loss, start, learning_rate=rate, max_steps=2000)
    assert not result.success
    cure = "Pass scale='curvature' and another learning_rate, or leave the optimizer and the learning_rate out."
    assert result.message.endswith(f"{names} differ in scale by 100 times or more. {cure}"), result.message
    assert gdopt.minimize(loss, start, scale="curvature", learning_rate=0.5, max_steps=2000).success
    assert gdopt.minimize(loss, start).success


def test_similar_scales_get_no_advice() -> None:
    result = gdopt.minimize(rosenbrock, jnp.zeros(2), learning_rate=1e-3, max_steps=1000)
    assert "differ in scale" not in result.message
    assert "smaller" not in result.message


@pytest.mark.parametrize(
    ("loss", "rate", "optimizer"),
    [
        (lambda x: jnp.sum(x**2), 1.0, gdopt.gd),  # from side to side, at the same height
        (lambda x: jnp.sum(jnp.abs(x - 0.33)), 0.1, gdopt.gd),
        (lambda x: jnp.sum(jnp.abs(x - 0.33)), 0.1, optax.sign_sgd),
    ],
)
def test_a_rate_that_overshoots_should_be_smaller(loss: Any, rate: float, optimizer: Any) -> None:
    result = gdopt.minimize(loss, jnp.ones(3), learning_rate=rate, optimizer=optimizer)
    assert not result.success
    assert "a smaller learning_rate, because each step leads to the other side" in result.message


XT = np.linspace(-2, 2, 40)[:, None]


def tanh_network(p: Any) -> jax.Array:
    return jnp.mean((jnp.tanh(XT @ p["w"] + p["b"]) @ p["v"] + p["c"] - jnp.sin(2 * XT)) ** 2)


@pytest.mark.parametrize(("x64", "entry"), [(True, 0.0), (True, 1e-40), (False, 1e-25)])
def test_a_saddle_whose_params_are_zero_up_to_rounding_is_left(x64: bool, entry: float) -> None:
    """The way along the negative curvature is then a million times longer than any entry."""
    with jax.enable_x64(x64):
        shapes = {"w": (1, 6), "b": (1, 6), "v": (6, 1), "c": (1, 1)}
        start = {name: jnp.full(shape, entry) for name, shape in shapes.items()}
        result = gdopt.minimize(tanh_network, start, optimizer=gdopt.gd, max_steps=1000)
    assert result.loss < 0.4  # 0.442 at the saddle


LASSO_X = np.linalg.qr(np.random.default_rng(10).normal(size=(30, 5)))[0]
LASSO_Y = LASSO_X @ np.array([3, -2, 0.05, 0, 1.0])
MEASURED = np.array([1012.0, 998, 1033, 1005, 987, 1500, 1001])


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    ("loss", "start", "minimum", "options"),
    [
        (
            lambda w: 0.5 * jnp.sum((LASSO_X @ w - LASSO_Y) ** 2) + 0.3 * jnp.sum(jnp.abs(w)),
            np.zeros(5),
            1.66625,
            {},
        ),
        (lambda p: jnp.sum(jnp.abs(p - MEASURED)), 0.0, 559.0, {"optimizer": gdopt.gd}),
        (lambda p: jnp.sum(jnp.abs(p - MEASURED)), 2e3, 559.0, {"optimizer": gdopt.gd}),
    ],
)
def test_a_search_that_idles_at_a_minimum_claims_it(
    loss: Any, start: Any, minimum: float, options: Any, x64: bool
) -> None:
    """Its steps still lead away from the minimum and back."""
    with jax.enable_x64(x64):
        result = gdopt.minimize(loss, jnp.asarray(start, float), **options)
    assert result.success
    assert result.loss == pytest.approx(minimum, rel=1e-5)


def test_a_nan_gradient_nearby_is_named() -> None:
    result = gdopt.minimize(lambda x: (x - 1) ** 2 + 0 * jnp.sqrt(jnp.maximum(x - 1.5, 0.0)), 3.0)
    assert "the loss or its gradient is not finite after the next step" in result.message


def test_a_rate_that_diverges_at_once_gets_a_suggestion() -> None:
    """The gradient grows too much in a step to suggest a rate, but the curvature suggests one."""
    x = np.stack([np.linspace(50, 200, 100), np.ones(100)], 1)
    loss = lambda p: jnp.mean((x @ p - 1e5) ** 2)
    result = gdopt.minimize(loss, jnp.zeros(2), learning_rate=10.0)
    assert result.status is Status.DIVERGED
    highest = np.linalg.eigvalsh(2 * x.T @ x / 100).max()
    told = float(result.message.partition("learning_rate below ")[2].partition(". ")[0])
    assert 0.8 * 2 / highest <= told <= 2 / highest
    assert gdopt.minimize(loss, jnp.zeros(2), learning_rate=told).status is not Status.DIVERGED


def test_the_advice_on_scales_needs_no_other_advice() -> None:
    x = np.linspace(0, 50, 60)
    powers = np.stack([x**k for k in range(4)], 1)
    y = 5 - 2 * x + 0.3 * x**2 - 4e-3 * x**3
    result = gdopt.minimize(lambda p: jnp.mean((powers @ p - y) ** 2), jnp.zeros(4), learning_rate=1e-10)
    assert "differ in scale" in result.message
    assert "start" not in result.message
