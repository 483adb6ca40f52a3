"""Fits and losses in natural units: parameters and data from 1e-9 to 1e9, without standardisation.

`make` returns each problem as a loss with two starts: a reasonable guess, and a bad or naive one. The losses are plain
JAX. Each takes one pytree and returns a scalar. The losses and gradients are finite at both starts, in float32 and in
float64. The data are the same in both precisions: NumPy draws them in float64, from a generator seeded with the
problem's name.

`KINKS` names the losses that are not differentiable everywhere, often not at the minimum. `UNBOUNDED` names the losses
that have no lower bound along the obvious path. `polish` finds the minimum near a point, to compare a result with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special
from jax.flatten_util import ravel_pytree
from jax.scipy.special import betaln, gammaln, log_ndtr, logsumexp, ndtr
from sklearn import datasets

Loss = Callable[[Any], Any]
Fit = tuple[Loss, list[Any]]
Random = np.random.Generator

KINKS = {
    "median_salaries",
    "quantile_rainfall",
    "chebyshev_line",
    "lasso_diabetes",
    "hinge_iris",
    "geometric_median_cities",
    "relu_network_diabetes",
}
UNBOUNDED = {
    "linear_costs",
    "gaussian_constant_readings",
    "indefinite_energy",
    "cubic_yield",
    "line_with_negated_loss",
}
HESSIAN_PARAMETERS = 60  # most parameters for which `polish` forms the Hessian

_builders: dict[str, Callable[[Random], Fit]] = {}
_arr = np.array
_softplus = partial(jnp.logaddexp, 0.0)


def fit(build: Callable[[Random], Fit]) -> Callable[[Random], Fit]:
    """Register a builder of a problem under its function's name."""
    _builders[build.__name__] = build
    return build


def curve(
    name: str,
    model: Callable[[Any, Any, Any], Any],
    x: Any,
    truth: Any,
    noise: Any,
    starts: list[Any],
    mean: bool = False,
) -> None:
    """Register a least-squares fit of `model(xp, params, x)`.

    `xp` is numpy to draw the data, and jax.numpy in the loss. The data are the model at `truth`, plus normal noise with
    the standard deviation `noise`. If `noise` is negative, its size is relative to the model's values. The loss is the
    sum of squares, or their mean.
    """

    def build(rng: Random) -> Fit:
        exact = np.asarray(model(np, truth, x), float)
        y = exact + (noise if noise >= 0 else -noise * np.abs(exact)) * rng.normal(size=exact.shape)
        reduce = jnp.mean if mean else jnp.sum
        return lambda p: reduce((model(jnp, p, x) - y) ** 2), starts

    _builders[name] = build


def make() -> dict[str, tuple[Loss, list[Any]]]:
    """Return every problem in a fixed order: its name, its loss, and its good and bad start."""
    return {name: build(np.random.default_rng([*name.encode()])) for name, build in _builders.items()}


def polish(loss: Loss, params: Any, rounds: int = 20) -> tuple[float, np.ndarray]:
    """Return the lowest loss that SciPy's minimisers find from `params`, and its parameters as one flat array.

    A round runs trust-exact (up to `HESSIAN_PARAMETERS` parameters), BFGS and L-BFGS-B, each from the best point so
    far. Each runs in variables scaled by the Hessian's diagonal at that point, with the loss divided by its size there.
    The rounds end when one of them lowers the loss by rounding errors only, or after `rounds`. The minimisers may leave
    the basin of `params`. At an exact saddle they stay there, because the gradient is zero. For a loss without a
    minimum, the result is the lowest finite value seen. For the losses in `KINKS`, the result may be far above the
    minimum, because each method assumes a smooth loss.

    This needs float64: call it with ``jax_enable_x64`` set.
    """
    if jnp.result_type(float) != np.float64:
        raise RuntimeError("polish needs float64. Set jax.config.update('jax_enable_x64', True) first.")
    start, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params))

    def flat_loss(x: Any) -> Any:
        return loss(unravel(x))

    value_and_grad = jax.jit(jax.value_and_grad(flat_loss))
    hessian = jax.jit(jax.hessian(flat_loss))
    size = start.size
    best = [float(value_and_grad(start)[0]), np.asarray(start)]

    def scaled(origin: np.ndarray, offset: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return the loss with its gradient, and its Hessian, in scaled variables around `origin`."""
        diagonal = np.diag(np.asarray(hessian(origin)))
        usable = np.isfinite(diagonal) & (np.abs(diagonal) > 0)
        # The decrease that the diagonal predicts is the size of a loss that starts at zero.
        slope = np.asarray(value_and_grad(origin)[1])[usable]
        size_of_loss = max(abs(offset), float(np.sum(slope**2 / np.abs(diagonal[usable])))) or 1.0
        diagonal = diagonal / size_of_loss
        units = np.where(usable, 1 / np.sqrt(np.where(usable, np.abs(diagonal), 1)), np.maximum(np.abs(origin), 1))
        # A direction that curves down, or hardly at all, takes steps of the parameter's own size at most.
        units = np.where(diagonal > 0, units, np.minimum(units, np.maximum(np.abs(origin), 1)))

        def function(z: np.ndarray) -> tuple[float, np.ndarray]:
            x = origin + units * z
            value, gradient = value_and_grad(x)
            value, gradient = float(value), np.asarray(gradient)
            if not (np.isfinite(value) and np.isfinite(gradient).all()):
                return np.inf, np.zeros(size)
            if value < best[0]:
                best[:] = value, x
            return (value - offset) / size_of_loss, gradient * units / size_of_loss

        def second(z: np.ndarray) -> np.ndarray:
            matrix = np.asarray(hessian(origin + units * z)) * np.outer(units, units) / size_of_loss
            # SciPy rejects a point whose loss is infinite, but stops with an error if its Hessian is not finite.
            return matrix if np.isfinite(matrix).all() else np.zeros((size, size))

        return function, second

    methods: list[tuple[str, dict[str, Any]]] = [
        ("BFGS", {"gtol": 1e-15, "maxiter": 20 * size + 500}),
        ("L-BFGS-B", {"gtol": 1e-15, "ftol": 0.0, "maxcor": 30, "maxiter": 2000, "maxfun": 4000}),
    ]
    if size <= HESSIAN_PARAMETERS:
        methods.insert(0, ("trust-exact", {"gtol": 1e-15, "maxiter": 300, "max_trust_radius": 1e6}))
    for _ in range(rounds):
        before = best[0]
        for method, options in methods:
            function, second = scaled(best[1], best[0])
            extra = {"hess": second} if method == "trust-exact" else {}
            try:
                with np.errstate(all="ignore"):
                    scipy.optimize.minimize(function, np.zeros(size), jac=True, method=method, options=options, **extra)
            except (ValueError, np.linalg.LinAlgError):
                continue  # A Hessian or a step overflowed. The best point so far is kept.
        if not before - best[0] > 4 * np.finfo(float).eps * abs(before):
            break
    return best[0], best[1]


# Maximum likelihood, with scales as logarithms.


def _normal(residual: Any, log_sigma: Any) -> Any:
    """Return the negative log-density of a normal residual, up to a constant."""
    return log_sigma + 0.5 * (residual * jnp.exp(-log_sigma)) ** 2


@fit
def gaussian_heights(rng: Random) -> Fit:
    """Heights in centimetres."""
    y = rng.normal(171.3, 9.2, 200)
    starts = [{"mu": 160.0, "log_sigma": 2.0}, {"mu": 0.0, "log_sigma": 0.0}]
    return lambda p: jnp.sum(_normal(y - p["mu"], p["log_sigma"])), starts


@fit
def gaussian_wavelengths(rng: Random) -> Fit:
    """Wavelengths in metres."""
    y = rng.normal(5.32e-7, 2e-8, 80)
    starts = [{"mu": 5e-7, "log_sigma": -16.0}, {"mu": 0.0, "log_sigma": 0.0}]
    return lambda p: jnp.mean(_normal(y - p["mu"], p["log_sigma"])), starts


@fit
def gaussian_salaries(rng: Random) -> Fit:
    """Yearly salaries in dollars, as a flat array."""
    y = rng.normal(5.2e4, 1.8e4, 500)
    return lambda p: jnp.mean(_normal(y - p[0], p[1])), [_arr([4e4, 9.0]), _arr([0.0, 0.0])]


@fit
def regression_house_prices(rng: Random) -> Fit:
    """Prices in dollars over areas in square metres, with unknown noise."""
    area = rng.uniform(40, 260, 150)
    y = 4.5e4 + 2300 * area + rng.normal(0, 3.5e4, 150)

    def loss(p: Any) -> Any:
        return jnp.sum(_normal(y - p["intercept"] - p["slope"] * area, p["log_sigma"]))

    good = {"intercept": 0.0, "slope": 1500.0, "log_sigma": 11.0}
    return loss, [good, {"intercept": 0.0, "slope": 0.0, "log_sigma": 0.0}]


@fit
def regression_unequal_noise(rng: Random) -> Fit:
    """Voltages over temperatures in kelvin, with a log-linear noise."""
    kelvin = rng.uniform(270, 370, 120)
    y = 0.4 - 1.1e-3 * kelvin + rng.normal(size=120) * np.exp(-9 + 0.01 * kelvin)

    def loss(p: Any) -> Any:
        return jnp.mean(_normal(y - p["mean"][0] - p["mean"][1] * kelvin, p["noise"][0] + p["noise"][1] * kelvin))

    starts = [{"mean": _arr([0.0, 0.0]), "noise": _arr([-3.0, 0.0])}, {"mean": np.zeros(2), "noise": np.zeros(2)}]
    return loss, starts


@fit
def lognormal_incomes(rng: Random) -> Fit:
    """Incomes in dollars."""
    y = np.exp(rng.normal(10.4, 0.75, 400))

    def loss(p: Any) -> Any:
        return jnp.sum(_normal(jnp.log(y) - p["mu"], p["log_sigma"]) + jnp.log(y))

    return loss, [{"mu": 9.0, "log_sigma": 0.0}, {"mu": 0.0, "log_sigma": 0.0}]


def _gamma_nll(y: np.ndarray, log_shape: Any, log_scale: Any) -> Any:
    shape = jnp.exp(log_shape)
    return gammaln(shape) + shape * log_scale - (shape - 1) * np.log(y) + y * jnp.exp(-log_scale)


@fit
def gamma_waits(rng: Random) -> Fit:
    """Waits in seconds, of a few milliseconds."""
    y = rng.gamma(2.6, 3e-3, 250)
    return lambda p: jnp.sum(_gamma_nll(y, p[0], p[1])), [_arr([0.0, -5.0]), _arr([0.0, 0.0])]


@fit
def weibull_lifetimes(rng: Random) -> Fit:
    """Lifetimes in hours, some censored at 15,000."""
    t = 1.2e4 * rng.weibull(1.7, 180)
    seen, t = (t < 1.5e4).astype(float), np.minimum(t, 1.5e4)

    def loss(p: Any) -> Any:
        z = jnp.exp(p["log_shape"]) * (np.log(t) - p["log_scale"])
        return jnp.sum(jnp.exp(z) - seen * (p["log_shape"] - np.log(t) + z))

    return loss, [{"log_shape": 0.0, "log_scale": 9.0}, {"log_shape": 0.0, "log_scale": 0.0}]


@fit
def exponential_censored(rng: Random) -> Fit:
    """Failures per hour, about 1e-5, with a log-rate as the only parameter."""
    t = rng.exponential(9e4, 300)
    seen, t = (t < 5e4).astype(float), np.minimum(t, 5e4)
    return lambda p: jnp.sum(jnp.exp(p) * t - seen * p), [-10.0, 0.0]


@fit
def beta_click_rates(rng: Random) -> Fit:
    """Fractions of clicks, of a few percent."""
    y = rng.beta(2.2, 60.0, 150)

    def loss(p: Any) -> Any:
        a, b = jnp.exp(p[0]), jnp.exp(p[1])
        return jnp.sum(betaln(a, b) - (a - 1) * np.log(y) - (b - 1) * np.log1p(-y))

    return loss, [_arr([0.0, 3.0]), _arr([0.0, 0.0])]


@fit
def negative_binomial_visits(rng: Random) -> Fit:
    """Daily visits, about 800, overdispersed."""
    y = rng.negative_binomial(4, 4 / (4 + 800.0), 200).astype(float)

    def loss(p: Any) -> Any:
        r, log_mean = jnp.exp(p["log_size"]), p["log_mean"]
        log_total = jnp.logaddexp(p["log_size"], log_mean)
        likelihood = gammaln(y + r) - gammaln(r) + r * (p["log_size"] - log_total) + y * (log_mean - log_total)
        return -jnp.sum(likelihood - gammaln(y + 1))

    return loss, [{"log_mean": 6.0, "log_size": 0.0}, {"log_mean": 0.0, "log_size": 0.0}]


@fit
def student_t_returns(rng: Random) -> Fit:
    """Daily returns, about 1e-2."""
    y = 6e-4 + 9e-3 * rng.standard_t(4, 750)

    def loss(p: Any) -> Any:
        nu = jnp.exp(p["log_nu"])
        z = (y - p["mu"]) * jnp.exp(-p["log_sigma"])
        constant = gammaln((nu + 1) / 2) - gammaln(nu / 2) - 0.5 * jnp.log(nu) - p["log_sigma"]
        return -jnp.sum(constant - (nu + 1) / 2 * jnp.log1p(z**2 / nu))

    good = {"mu": 0.0, "log_sigma": -4.0, "log_nu": 2.0}
    return loss, [good, {"mu": 0.0, "log_sigma": 0.0, "log_nu": 0.0}]


@fit
def autoregression_temperatures(rng: Random) -> Fit:
    """Daily temperatures in kelvin, as an AR(1)."""
    y = np.full(365, 288.0)
    for day in range(1, 365):
        y[day] = 288 + 0.8 * (y[day - 1] - 288) + rng.normal(0, 1.8)

    def loss(p: Any) -> Any:
        return jnp.sum(_normal(y[1:] - p["c"] - p["phi"] * y[:-1], p["log_sigma"]))

    return loss, [{"c": 145.0, "phi": 0.5, "log_sigma": 1.0}, {"c": 0.0, "phi": 0.0, "log_sigma": 0.0}]


@fit
def garch_returns(rng: Random) -> Fit:
    """Daily returns as a GARCH(1, 1), with a variance of about 1e-4."""
    y, variance = np.zeros(500), 1e-4
    for day in range(500):
        y[day] = np.sqrt(variance) * rng.normal()
        variance = 4e-6 + 0.09 * y[day] ** 2 + 0.86 * variance

    def loss(p: Any) -> Any:
        def step(variance: Any, r: Any) -> Any:
            after = (
                jnp.exp(p["log_omega"]) + jnp.exp(p["log_alpha"]) * r**2 + variance * jax.nn.sigmoid(p["logit_beta"])
            )
            return after, jnp.log(variance) + r**2 / variance

        return 0.5 * jnp.sum(jax.lax.scan(step, jnp.exp(p["log_first"]), jnp.asarray(y))[1])

    good = {"log_omega": -12.0, "log_alpha": -2.0, "logit_beta": 1.0, "log_first": -9.0}
    return loss, [good, {name: 0.0 for name in good}]


@fit
def ornstein_uhlenbeck_rates(rng: Random) -> Fit:
    """Daily interest rates, as fractions, with time in years."""
    dt, y = 1 / 252, np.full(1000, 0.03)
    for day in range(1, 1000):
        y[day] = 0.04 + (y[day - 1] - 0.04) * np.exp(-3 * dt) + 0.012 * np.sqrt(dt) * rng.normal()

    def loss(p: Any) -> Any:
        theta = jnp.exp(p[0])
        spread = p[2] + 0.5 * jnp.log(-jnp.expm1(-2 * theta * dt) / (2 * theta))
        return jnp.mean(_normal(y[1:] - p[1] - (y[:-1] - p[1]) * jnp.exp(-theta * dt), spread))

    return loss, [_arr([0.0, 0.03, -4.0]), _arr([0.0, 0.0, 0.0])]


@fit
def mixture_eruptions(rng: Random) -> Fit:
    """Minutes between eruptions, as two normal components."""
    y = np.concatenate([rng.normal(54, 6, 90), rng.normal(80, 6, 170)])

    def loss(p: Any) -> Any:
        a = -_softplus(-p["logit"]) - _normal(y - p["short"]["mu"], p["short"]["log_sigma"])
        b = -_softplus(p["logit"]) - _normal(y - p["long"]["mu"], p["long"]["log_sigma"])
        return -jnp.sum(jnp.logaddexp(a, b))

    good = {"logit": 0.0, "short": {"mu": 50.0, "log_sigma": 2.0}, "long": {"mu": 90.0, "log_sigma": 2.0}}
    bad = {"logit": 0.0, "short": {"mu": 0.0, "log_sigma": 2.0}, "long": {"mu": 100.0, "log_sigma": 2.0}}
    return loss, [good, bad]


@fit
def mixture_fluorescence(rng: Random) -> Fit:
    """Photons per cell, about 1e4, as two normal components of unequal width."""
    y = np.concatenate([rng.normal(3.1e3, 600, 200), rng.normal(1.4e4, 3e3, 100)])

    def loss(p: Any) -> Any:
        weights = jax.nn.log_softmax(p["weights"])
        return -jnp.mean(logsumexp(weights - _normal(y[:, None] - p["mu"], p["log_sigma"]), axis=1))

    good = {"weights": np.zeros(2), "mu": _arr([2e3, 1e4]), "log_sigma": _arr([7.0, 7.0])}
    bad = {"weights": np.zeros(2), "mu": _arr([0.0, 1.0]), "log_sigma": _arr([8.0, 8.5])}
    return loss, [good, bad]


@fit
def logistic_distribution_revenues(rng: Random) -> Fit:
    """Revenues in dollars, about 1e6."""
    y = rng.logistic(1.3e6, 8e4, 120)

    def loss(p: Any) -> Any:
        z = (y - p["location"]) * jnp.exp(-p["log_scale"])
        return jnp.sum(p["log_scale"] + z + 2 * _softplus(-z))

    return loss, [{"location": 1e6, "log_scale": 12.0}, {"location": 0.0, "log_scale": 0.0}]


@fit
def multivariate_normal_iris(rng: Random) -> Fit:
    """Mean and Cholesky factor of the iris measurements in centimetres."""
    x = np.asarray(datasets.load_iris(return_X_y=True)[0])
    rows, columns = np.tril_indices(4, -1)

    def loss(p: Any) -> Any:
        # The factor of the precision, which needs no solve.
        factor = jnp.diag(jnp.exp(p["log_diagonal"])).at[rows, columns].set(p["lower"])
        return jnp.mean(0.5 * jnp.sum(((x - p["mean"]) @ factor) ** 2, axis=1)) - jnp.sum(p["log_diagonal"])

    bad = {"mean": np.zeros(4), "log_diagonal": np.zeros(4), "lower": np.zeros(6)}
    return loss, [{**bad, "mean": _arr([6.0, 3.0, 4.0, 1.0])}, bad]


@fit
def gaussian_process_carbon(rng: Random) -> Fit:
    """Hyperparameters of a Gaussian process of carbon dioxide in ppm over years."""
    year = np.arange(1960, 2020, 1.0)
    y = 355 + 25 * np.sin((year - 1990) / 20) + rng.normal(0, 0.9, 60)
    squares = (year[:, None] - year) ** 2

    def loss(p: Any) -> Any:
        kernel = jnp.exp(2 * p["log_amplitude"] - 0.5 * squares * jnp.exp(-2 * p["log_length"]))
        factor = jnp.linalg.cholesky(kernel + jnp.exp(2 * p["log_noise"]) * jnp.eye(60))
        white = jax.scipy.linalg.solve_triangular(factor, y - p["mean"], lower=True)
        return 0.5 * jnp.sum(white**2) + jnp.sum(jnp.log(jnp.diag(factor)))

    good = {"mean": 350.0, "log_amplitude": 3.0, "log_length": 2.0, "log_noise": 0.0}
    return loss, [good, {name: 0.0 for name in good}]


@fit
def local_level_river(rng: Random) -> Fit:
    """Log-variances of a random walk with noise, by a Kalman filter, in cubic kilometres squared."""
    y = 1000 + np.cumsum(rng.normal(0, 38, 100)) + rng.normal(0, 120, 100)

    def loss(p: Any) -> Any:
        def step(state: Any, observed: Any) -> Any:
            level, variance = state
            total = variance + jnp.exp(p["log_observation"])
            error, gain = observed - level, variance / total
            after = level + gain * error, variance * (1 - gain) + jnp.exp(p["log_level"])
            return after, jnp.log(total) + error**2 / total

        first = (jnp.asarray(y[0]), jnp.exp(p["log_observation"]))
        return 0.5 * jnp.sum(jax.lax.scan(step, first, jnp.asarray(y[1:]))[1])

    return loss, [{"log_observation": 9.0, "log_level": 7.0}, {"log_observation": 0.0, "log_level": 0.0}]


# Generalised linear models on raw covariates.


def _customers(rng: Random, size: int) -> np.ndarray:
    """Return columns of ones, ages in years and incomes in dollars."""
    return np.stack([np.ones(size), rng.uniform(20, 80, size), rng.lognormal(10.6, 0.4, size)], 1)


@fit
def poisson_claims_sum(rng: Random) -> Fit:
    """Claims by age and income."""
    x = _customers(rng, 400)
    y = rng.poisson(np.exp(x @ _arr([-1.0, 0.02, 1e-5])))
    return lambda w: jnp.sum(jnp.exp(x @ w) - y * (x @ w)), [_arr([0.5, 0.0, 0.0]), np.zeros(3)]


@fit
def poisson_years_mean(rng: Random) -> Fit:
    """Yearly accidents over calendar years."""
    year = np.arange(1950, 2021, 1.0)
    y = rng.poisson(np.exp(5 - 0.018 * (year - 1950)))

    def loss(p: Any) -> Any:
        eta = p["intercept"] + p["slope"] * year
        return jnp.mean(jnp.exp(eta) - y * eta)

    return loss, [{"intercept": 4.0, "slope": 0.0}, {"intercept": 0.0, "slope": 0.0}]


@fit
def poisson_exposure(rng: Random) -> Fit:
    """Deaths by age over person-years of about 1e5, with rates of about 1e-4."""
    exposure, age = rng.uniform(2e4, 3e5, 40), rng.uniform(30, 80, 40)
    y = rng.poisson(exposure * np.exp(-12 + 0.085 * age))

    def loss(w: Any) -> Any:
        eta = w[0] + w[1] * age + np.log(exposure)
        return jnp.sum(jnp.exp(eta) - y * eta)

    return loss, [_arr([-8.0, 0.0]), np.zeros(2)]


@fit
def logistic_credit_sum(rng: Random) -> Fit:
    """Defaults by age, income and debt in dollars."""
    x = np.column_stack([_customers(rng, 500), rng.exponential(8e3, 500)])
    y = rng.random(500) < scipy.special.expit(x @ _arr([0.5, -0.01, -4e-5, 1.2e-4]))
    return lambda w: jnp.sum(_softplus(x @ w) - y * (x @ w)), [_arr([-1.0, 0.0, 0.0, 1e-5]), np.zeros(4)]


@fit
def logistic_cancer_mean(rng: Random) -> Fit:
    """Tumours by 30 raw measurements from 1e-3 to 4e3, with a small penalty."""
    x, y = datasets.load_breast_cancer(return_X_y=True)

    def loss(p: Any) -> Any:
        eta = x @ p["w"] + p["b"]
        return jnp.mean(_softplus(eta) - y * eta) + 1e-4 * jnp.sum(p["w"] ** 2)

    return loss, [{"w": np.zeros(30), "b": 0.5}, {"w": np.full(30, 0.01), "b": 0.0}]


@fit
def logistic_separable(rng: Random) -> Fit:
    """Two separable groups by temperatures in kelvin. The infimum is zero, at infinity."""
    kelvin = np.concatenate([rng.uniform(280, 295, 30), rng.uniform(300, 320, 30)])
    y = np.arange(60) >= 30

    def loss(p: Any) -> Any:
        eta = p["a"] + p["b"] * kelvin
        return jnp.mean(_softplus(eta) - y * eta)

    return loss, [{"a": -30.0, "b": 0.1}, {"a": 0.0, "b": 0.0}]


@fit
def gamma_claims(rng: Random) -> Fit:
    """Claims in dollars by a vehicle's age and power, with a log link and an unknown shape."""
    x = np.stack([np.ones(200), rng.uniform(0, 20, 200), rng.uniform(40, 300, 200)], 1)
    y = rng.gamma(2.0, np.exp(x @ _arr([7.5, -0.03, 4e-3])) / 2)

    def loss(p: Any) -> Any:
        shape, eta = jnp.exp(p["log_shape"]), x @ p["w"]
        return jnp.mean(gammaln(shape) - shape * (p["log_shape"] - eta + np.log(y)) + shape * y * jnp.exp(-eta))

    return loss, [{"w": _arr([8.0, 0.0, 0.0]), "log_shape": 0.0}, {"w": np.zeros(3), "log_shape": 0.0}]


@fit
def binomial_doses(rng: Random) -> Fit:
    """Responses of 40 animals each to doses of about 1e-6 mol."""
    dose = np.linspace(2e-7, 4e-6, 12)
    y = rng.binomial(40, scipy.special.expit(-2.5 + 1.4e6 * dose))

    def loss(p: Any) -> Any:
        eta = p["intercept"] + p["slope"] * dose
        return jnp.sum(40 * _softplus(eta) - y * eta)

    return loss, [{"intercept": -2.0, "slope": 5e5}, {"intercept": 0.0, "slope": 0.0}]


@fit
def probit_loads(rng: Random) -> Fit:
    """Failures of parts under loads in newtons."""
    load = rng.uniform(500, 3000, 200)
    sign = np.where(rng.random(200) < scipy.special.ndtr(-4 + 2.3e-3 * load), 1.0, -1.0)
    return lambda w: -jnp.sum(log_ndtr(sign * (w[0] + w[1] * load))), [_arr([-2.0, 1e-3]), np.zeros(2)]


@fit
def ordinal_ratings(rng: Random) -> Fit:
    """Ratings in four classes by income in dollars."""
    x = _customers(rng, 300)[:, 1:]
    y = np.digitize(x @ _arr([0.02, 5e-5]) + rng.logistic(size=300), [1.5, 3.0, 4.5])

    def loss(p: Any) -> Any:
        eta = x @ p["w"]
        cuts = p["first"] + jnp.concatenate([jnp.zeros(1), jnp.cumsum(jnp.exp(p["log_gaps"]))])
        upper = jnp.where(y == 3, 1.0, jax.nn.sigmoid(cuts[np.minimum(y, 2)] - eta))
        lower = jnp.where(y == 0, 0.0, jax.nn.sigmoid(cuts[np.maximum(y - 1, 0)] - eta))
        return -jnp.mean(jnp.log(upper - lower))

    good = {"w": _arr([0.0, 1e-5]), "first": 0.0, "log_gaps": np.zeros(2)}
    return loss, [good, {"w": np.zeros(2), "first": 1.0, "log_gaps": np.ones(2)}]


@fit
def cox_survival(rng: Random) -> Fit:
    """Partial likelihood of survival by age in years and a concentration of about 1e-6."""
    x = np.stack([rng.uniform(30, 85, 200), rng.lognormal(-14, 0.5, 200)], 1)
    t = rng.exponential(3e3 * np.exp(-x @ _arr([0.03, 5e5])))
    order = np.argsort(-t)
    x, seen = x[order], (rng.random(200) < 0.7)[order]
    return lambda w: jnp.sum(seen * (jax.lax.cumlogsumexp(x @ w) - x @ w)), [_arr([0.01, 1e5]), np.zeros(2)]


@fit
def softmax_wine(rng: Random) -> Fit:
    """Cultivars by 13 raw measurements from 0.1 to 1700, summed."""
    x, y = datasets.load_wine(return_X_y=True)

    def loss(p: Any) -> Any:
        scores = jax.nn.log_softmax(x @ p["w"] + p["b"])
        return -jnp.sum(scores[np.arange(len(y)), y]) + 0.1 * jnp.sum(p["w"] ** 2)

    return loss, [{"w": np.zeros((13, 3)), "b": np.zeros(3)}, {"w": rng.normal(0, 0.1, (13, 3)), "b": np.zeros(3)}]


# Linear, polynomial and ridge regressions with raw predictors.


@fit
def line_over_years(rng: Random) -> Fit:
    """Temperature anomalies in kelvin over the years 1950 to 2020."""
    year = np.arange(1950, 2021, 1.0)
    y = 0.014 * (year - 1970) + rng.normal(0, 0.1, 71)
    return lambda p: jnp.mean((p[0] + p[1] * year - y) ** 2), [_arr([-20.0, 0.01]), np.zeros(2)]


@fit
def parabola_over_years(rng: Random) -> Fit:
    """Car sales in thousands over the years 1980 to 2020, with a raw square."""
    year = np.arange(1980, 2021, 1.0)
    y = 900 + 12 * (year - 1980) + 0.6 * (year - 1980) ** 2 + rng.normal(0, 40, 41)

    def loss(p: Any) -> Any:
        return jnp.mean((p["a"] + p["b"] * year + p["c"] * year**2 - y) ** 2)

    return loss, [{"a": 1000.0, "b": 0.0, "c": 0.0}, {"a": 1.0, "b": 1.0, "c": 1.0}]


@fit
def house_prices(rng: Random) -> Fit:
    """Prices in dollars by area, rooms, year of construction and metres to the station."""
    size = 200
    x = np.stack([rng.uniform(40, 250, size), rng.integers(1, 8, size), rng.uniform(1900, 2020, size)], 1)
    x = np.column_stack([x, rng.exponential(2500, size)])
    y = -1.2e6 + x @ _arr([2100, 9e3, 650, -12]) + rng.normal(0, 3e4, size)
    starts = [{"w": _arr([1000.0, 0, 0, 0]), "b": 1e5}, {"w": np.zeros(4), "b": 0.0}]
    return lambda p: jnp.mean((x @ p["w"] + p["b"] - y) ** 2), starts


@fit
def ridge_diabetes(rng: Random) -> Fit:
    """Progression of diabetes by ten raw measurements, with a ridge."""
    x, y = datasets.load_diabetes(return_X_y=True, scaled=False)

    def loss(p: Any) -> Any:
        return jnp.sum((x @ p["w"] + p["b"] - y) ** 2) + 10 * jnp.sum(p["w"] ** 2)

    return loss, [{"w": np.zeros(10), "b": 150.0}, {"w": np.ones(10), "b": 0.0}]


@fit
def employment_collinear(rng: Random) -> Fit:
    """Employment in thousands by six collinear predictors of an economy from 1 to 5e5."""
    year = np.arange(1947, 1987, 1.0)
    trend = year - 1947
    columns = [80 + 2 * trend, 2.3e5 + 2e4 * trend, 3000 + 80 * trend, 2600 + 30 * trend, 1.08e5 + 1400 * trend]
    spreads = [1.5, 1e4, 900, 600, 300]
    x = np.stack([*(c + s * rng.normal(size=40) for c, s in zip(columns, spreads, strict=True)), year], 1)
    y = 6e4 + 500 * trend - 0.9 * (x[:, 2] - 3000) + rng.normal(0, 300, 40)
    starts = [{"w": np.zeros(6), "b": 6e4}, {"w": np.zeros(6), "b": 0.0}]
    return lambda p: jnp.mean((x @ p["w"] + p["b"] - y) ** 2), starts


@fit
def weighted_calibration(rng: Random) -> Fit:
    """Chi-squared of a line through converter counts, with errors of about 1e-3 volts."""
    counts, errors = np.linspace(0, 4095, 60), rng.uniform(5e-4, 3e-3, 60)
    y = 0.012 + 8.05e-4 * counts + errors * rng.normal(size=60)
    starts = [{"offset": 0.0, "gain": 1e-3}, {"offset": 1.0, "gain": 1.0}]
    return lambda p: jnp.sum(((p["offset"] + p["gain"] * counts - y) / errors) ** 2), starts


curve(
    "beer_lambert",
    lambda xp, p, c: p["offset"] + p["epsilon"] * c,
    np.linspace(0, 3e-5, 20),
    {"offset": 0.02, "epsilon": 5.3e4},
    0.01,
    [{"offset": 0.0, "epsilon": 1e4}, {"offset": 0.0, "epsilon": 0.0}],
    mean=True,
)
curve(
    "dispersion_metres",
    lambda xp, p, x: p[0] + p[1] * x,
    np.linspace(4e-7, 7.5e-7, 30),
    _arr([1.56, -6e4]),
    3e-4,
    [_arr([1.5, 0.0]), _arr([0.0, 0.0])],
)
curve(
    "dispersion_cauchy",
    lambda xp, p, x: p["a"] + p["b"] / x**2 + p["c"] / x**4,
    np.linspace(380.0, 780.0, 40),
    {"a": 1.5046, "b": 4200.0, "c": 1e8},
    1e-4,
    [{"a": 1.5, "b": 5000.0, "c": 0.0}, {"a": 1.0, "b": 1.0, "c": 1.0}],
    mean=True,
)
curve(
    "heat_capacity",
    lambda xp, p, t: p[0] + p[1] * t + p[2] * t**2 + p[3] / t**2,
    np.linspace(298.0, 1500.0, 50),
    _arr([25.5, 1.5e-2, -4e-6, -2.2e5]),
    0.1,
    [_arr([30.0, 0, 0, 0]), np.ones(4)],
)
curve(
    "quintic_percentages",
    lambda xp, p, x: xp.polyval(p, x),
    np.linspace(0.0, 100.0, 80),
    _arr([2e-8, -5e-6, 4e-4, -0.01, 0.2, 5.0]),
    0.3,
    [_arr([0.0, 0, 0, 0, 0.1, 1]), np.zeros(6)],
    mean=True,
)
curve(
    "thermistor",
    lambda xp, p, r: p[0] + p[1] * xp.log(r) + p[2] * xp.log(r) ** 3,
    np.geomspace(500.0, 1e5, 25),
    _arr([1.13e-3, 2.34e-4, 8.8e-8]),
    1e-6,
    [_arr([1e-3, 2e-4, 1e-7]), np.zeros(3)],
)

# Nonlinear regressions after the StRD models of NIST, with its starts and synthetic data.

curve(
    "misra1a",
    lambda xp, b, x: b[0] * (1 - xp.exp(-b[1] * x)),
    np.linspace(77.0, 760.0, 14),
    _arr([238.9, 5.5e-4]),
    0.1,
    [_arr([250.0, 5e-4]), _arr([500.0, 1e-4])],
)
curve(
    "lanczos",
    lambda xp, b, x: sum(b[2 * i] * xp.exp(-b[2 * i + 1] * x) for i in range(3)),
    np.linspace(0.0, 1.15, 24),
    _arr([0.0951, 1.0, 0.8607, 3.0, 1.5576, 5.0]),
    1e-5,
    [_arr([0.5, 0.7, 3.6, 4.2, 4.0, 6.3]), _arr([1.2, 0.3, 5.6, 5.5, 6.5, 7.6])],
)
curve(
    "gauss_peaks",
    lambda xp, b, x: (
        b[0] * xp.exp(-b[1] * x)
        + b[2] * xp.exp(-(((x - b[3]) / b[4]) ** 2))
        + b[5] * xp.exp(-(((x - b[6]) / b[7]) ** 2))
    ),
    np.arange(1.0, 251.0),
    _arr([98.8, 0.0109, 100.7, 63.6, 23.1, 71.9, 179, 18.4]),
    2.5,
    [_arr([94, 0.0105, 99, 63, 25, 71, 180, 20]), _arr([97, 0.009, 100, 65, 20, 70, 178, 16.5])],
)
curve(
    "hahn",
    lambda xp, b, x: (b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3) / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3),
    np.linspace(14.0, 850.0, 100),
    _arr([1.08, -0.123, 4.09e-3, -1.43e-6, -5.76e-3, 2.4e-4, -1.23e-7]),
    0.08,
    [_arr([1.0, -0.1, 5e-3, -1e-6, -5e-3, 1e-4, -1e-7]), _arr([10, -1, 0.05, -1e-5, -0.05, 1e-3, -1e-6])],
)
curve(
    "mgh09",
    lambda xp, b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    np.geomspace(0.0625, 4.0, 20),
    _arr([0.193, 0.191, 0.123, 0.136]),
    3e-3,
    [_arr([0.25, 0.39, 0.415, 0.39]), _arr([25, 39, 41.5, 39])],
)
curve(
    "mgh10",
    lambda xp, b, x: b[0] * xp.exp(b[1] / (x + b[2])),
    np.linspace(50.0, 125.0, 16),
    _arr([5.61e-3, 6181.0, 345.2]),
    2.0,
    [_arr([0.02, 4000.0, 250.0]), _arr([2.0, 4e5, 2.5e4])],
)
curve(
    "thurber",
    lambda xp, b, x: (b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3) / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3),
    np.linspace(-3.0, 2.2, 40),
    _arr([1288, 1491, 583, 75.4, 0.966, 0.398, 0.0497]),
    12.0,
    [_arr([1300, 1500, 500, 75, 1, 0.4, 0.05]), _arr([1000, 1000, 400, 40, 0.7, 0.3, 0.03])],
)
curve(
    "rat43",
    lambda xp, b, x: b[0] / (1 + xp.exp(b[1] - b[2] * x)) ** (1 / b[3]),
    np.arange(1.0, 16.0),
    _arr([699.6, 5.28, 0.76, 1.28]),
    20.0,
    [_arr([700, 5, 0.75, 1.3]), _arr([100.0, 10.0, 1.0, 1.0])],
)
curve(
    "bennett",
    lambda xp, b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    np.linspace(7.4, 62.0, 80),
    _arr([-2523.0, 46.7, 0.932]),
    5e-3,
    [_arr([-1500.0, 45.0, 0.85]), _arr([-2000.0, 50.0, 0.8])],
)
curve(
    "enso",
    lambda xp, b, x: (
        b[0]
        + b[1] * xp.cos(np.pi * x / 6)
        + b[2] * xp.sin(np.pi * x / 6)
        + b[4] * xp.cos(2 * np.pi * x / b[3])
        + b[5] * xp.sin(2 * np.pi * x / b[3])
        + b[7] * xp.cos(2 * np.pi * x / b[6])
        + b[8] * xp.sin(2 * np.pi * x / b[6])
    ),
    np.arange(1.0, 169.0),
    _arr([10.5, 3.08, 0.53, 44.3, -1.62, 0.53, 26.9, 0.21, 1.5]),
    1.5,
    [_arr([10, 3, 0.5, 44, -1.5, 0.5, 26, -0.1, 1.5]), _arr([11, 3, 0.5, 40, -0.7, -1.3, 25, -0.3, 1.4])],
)

# Laws of physics, chemistry and biology.

curve(
    "muon_lifetime",
    lambda xp, p, t: p["n"] * xp.exp(-t / p["tau"]) + p["background"],
    np.linspace(1e-7, 2e-5, 60),
    {"n": 5200.0, "tau": 2.2e-6, "background": 40.0},
    -0.03,
    [{"n": 4000.0, "tau": 1e-6, "background": 0.0}, {"n": 1000.0, "tau": 1e-5, "background": 0.0}],
)
curve(
    "michaelis_menten",
    lambda xp, p, s: p["vmax"] * s / (p["km"] + s),
    np.geomspace(2e-6, 1e-3, 16),
    {"vmax": 2.5e-8, "km": 5e-5},
    5e-10,
    [{"vmax": 2e-8, "km": 1e-4}, {"vmax": 1.0, "km": 1.0}],
)
curve(
    "hill_response",
    lambda xp, p, c: p["bottom"] + (p["top"] - p["bottom"]) / (1 + (p["ec50"] / c) ** p["n"]),
    np.geomspace(1.0, 1e4, 24),
    {"bottom": 210.0, "top": 9.4e3, "ec50": 130.0, "n": 1.4},
    250.0,
    [{"bottom": 0.0, "top": 1e4, "ec50": 50.0, "n": 1.0}, {"bottom": 0.0, "top": 100.0, "ec50": 1.0, "n": 1.0}],
)
curve(
    "arrhenius",
    lambda xp, p, t: p["a"] * xp.exp(-p["energy"] / (8.314 * t)),
    np.linspace(300.0, 400.0, 20),
    {"a": 8.3e8, "energy": 5.2e4},
    -0.04,
    [{"a": 1e9, "energy": 5e4}, {"a": 1e6, "energy": 1e4}],
)
curve(
    "antoine",
    lambda xp, p, t: p[0] - p[1] / (p[2] + t),
    np.linspace(5.0, 100.0, 25),
    _arr([8.07, 1730.6, 233.4]),
    5e-3,
    [_arr([10.0, 2000.0, 200.0]), _arr([1.0, 1.0, 1.0])],
)
curve(
    "langmuir_pascals",
    lambda xp, p, x: p["q"] * p["k"] * x / (1 + p["k"] * x),
    np.geomspace(1e3, 1e6, 20),
    {"q": 4.6, "k": 2.1e-5},
    0.05,
    [{"q": 3.0, "k": 1e-5}, {"q": 1.0, "k": 1.0}],
    mean=True,
)
curve(
    "gompertz_tumour",
    lambda xp, p, t: p["size"] * xp.exp(-p["b"] * xp.exp(-p["rate"] * t)),
    np.linspace(0.0, 120.0, 25),
    {"size": 2.4e9, "b": 9.0, "rate": 0.045},
    3e7,
    [{"size": 1e9, "b": 5.0, "rate": 0.05}, {"size": 1e8, "b": 1.0, "rate": 0.01}],
)
curve(
    "logistic_population",
    lambda xp, p, t: p["k"] / (1 + xp.exp(-p["r"] * (t - p["middle"]))),
    np.arange(1790.0, 2011.0, 10.0),
    {"k": 4.4e8, "r": 0.0216, "middle": 1976.0},
    2e6,
    [{"k": 3e8, "r": 0.03, "middle": 1950.0}, {"k": 1e8, "r": 0.01, "middle": 1900.0}],
)
curve(
    "metabolic_power",
    lambda xp, p, m: p["a"] * m ** p["b"],
    np.geomspace(0.02, 4e3, 30),
    {"a": 3.4, "b": 0.75},
    -0.1,
    [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.0}],
)
curve(
    "damped_sine",
    lambda xp, p, t: p["a"] * xp.exp(-t / p["tau"]) * xp.sin(2 * np.pi * p["hertz"] * t + p["phase"]),
    np.linspace(0.0, 0.02, 200),
    {"a": 3.1, "tau": 8e-3, "hertz": 440.0, "phase": 0.6},
    0.1,
    [{"a": 2.0, "tau": 5e-3, "hertz": 430.0, "phase": 0.0}, {"a": 1.0, "tau": 1e-2, "hertz": 400.0, "phase": 0.0}],
)
curve(
    "tide",
    lambda xp, p, t: (
        p["mean"] + p["cos"] * xp.cos(2 * np.pi * t / p["hours"]) + p["sin"] * xp.sin(2 * np.pi * t / p["hours"])
    ),
    np.linspace(0.0, 96.0, 150),
    {"mean": 3.2, "cos": 1.1, "sin": -0.8, "hours": 12.42},
    0.15,
    [{"mean": 3.0, "cos": 1.0, "sin": 0.0, "hours": 12.0}, {"mean": 0.0, "cos": 1.0, "sin": 1.0, "hours": 13.5}],
    mean=True,
)
curve(
    "biexponential_counts",
    lambda xp, p, t: p["fast"][0] * xp.exp(-p["fast"][1] * t) + p["slow"][0] * xp.exp(-p["slow"][1] * t),
    np.linspace(0.0, 600.0, 60),
    {"fast": _arr([9e3, 0.06]), "slow": _arr([1.5e3, 3e-3])},
    60.0,
    [{"fast": _arr([5e3, 0.1]), "slow": _arr([1e3, 1e-3])}, {"fast": _arr([100.0, 1.0]), "slow": _arr([100.0, 1e-2])}],
)
curve(
    "stretched_exponential",
    lambda xp, p, t: p["a"] * xp.exp(-((t / xp.exp(p["log_tau"])) ** p["beta"])),
    np.geomspace(1e-8, 1e-4, 50),
    {"a": 0.21, "log_tau": -13.5, "beta": 0.6},
    2e-3,
    [{"a": 0.1, "log_tau": -14.0, "beta": 1.0}, {"a": 1.0, "log_tau": -10.0, "beta": 1.0}],
)
curve(
    "oral_dose",
    lambda xp, p, t: 500 * p["ka"] / (p["v"] * (p["ka"] - p["ke"])) * (xp.exp(-p["ke"] * t) - xp.exp(-p["ka"] * t)),
    _arr([0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24]),
    {"ka": 1.3, "ke": 0.12, "v": 38.0},
    0.2,
    [{"ka": 1.0, "ke": 0.2, "v": 50.0}, {"ka": 0.5, "ke": 0.3, "v": 5.0}],
)
curve(
    "two_compartments",
    lambda xp, p, t: (
        xp.exp(p["central"][0] - xp.exp(p["central"][1]) * t)
        + xp.exp(p["peripheral"][0] - xp.exp(p["peripheral"][1]) * t)
    ),
    _arr([0.1, 0.25, 0.5, 1, 2, 4, 6, 8, 12, 18, 24]),
    {"central": _arr([4.4, 0.4]), "peripheral": _arr([2.7, -2.3])},
    0.8,
    [
        {"central": _arr([4.0, 0.0]), "peripheral": _arr([2.0, -2.0])},
        {"central": _arr([0.0, 0.0]), "peripheral": _arr([0.0, -1.0])},
    ],
)
curve(
    "planck",
    lambda xp, p, x: p["dilution"] * 1.191e-25 / x**5 / xp.expm1(1.4388e-2 / (x * p["kelvin"])),
    np.linspace(3e-7, 2.5e-6, 60),
    {"dilution": 0.92, "kelvin": 5772.0},
    300.0,
    [{"dilution": 1.0, "kelvin": 5000.0}, {"dilution": 1.0, "kelvin": 3000.0}],
)
curve(
    "diode",
    lambda xp, p, v: p["saturation"] * xp.expm1(v / (p["ideality"] * 0.02585)),
    np.linspace(0.05, 0.7, 40),
    {"saturation": 4e-9, "ideality": 1.75},
    2e-4,
    [{"saturation": 1e-9, "ideality": 1.6}, {"saturation": 1e-9, "ideality": 1.2}],
)
curve(
    "cobb_douglas",
    lambda xp, p, x: p["a"] * x[0] ** p["capital"] * x[1] ** p["labour"],
    np.random.default_rng(3).lognormal([[13.5], [6.8]], 0.8, (2, 80)),
    {"a": 21.0, "capital": 0.34, "labour": 0.68},
    -0.08,
    [{"a": 1.0, "capital": 0.5, "labour": 0.5}, {"a": 1.0, "capital": 1.0, "labour": 1.0}],
    mean=True,
)
curve(
    "bateman",
    lambda xp, p, t: p["n"] * p["k1"] / (p["k2"] - p["k1"]) * (xp.exp(-p["k1"] * t) - xp.exp(-p["k2"] * t)),
    np.linspace(600.0, 6e4, 40),
    {"n": 1.6e6, "k1": 2.1e-4, "k2": 4.5e-5},
    2e4,
    [{"n": 1e6, "k1": 1e-4, "k2": 2e-5}, {"n": 1e6, "k1": 1e-3, "k2": 1e-5}],
)
curve(
    "van_der_waals",
    lambda xp, p, x: 8.314 * x[1] / (x[0] - p["b"]) - p["a"] / x[0] ** 2,
    np.stack(np.meshgrid(np.geomspace(3e-4, 1e-2, 12), [280.0, 320, 360])).reshape(2, -1),
    {"a": 0.364, "b": 4.27e-5},
    2e4,
    [{"a": 0.1, "b": 1e-5}, {"a": 0.0, "b": 0.0}],
)
curve(
    "lorentzian_hydrogen",
    lambda xp, p, f: p["base"] + p["a"] * p["width"] ** 2 / ((f - p["centre"]) ** 2 + p["width"] ** 2),
    np.linspace(1419.0, 1422.0, 120),
    {"base": 12.0, "a": 85.0, "centre": 1420.406, "width": 0.14},
    3.0,
    [
        {"base": 0.0, "a": 50.0, "centre": 1420.3, "width": 0.2},
        {"base": 0.0, "a": 10.0, "centre": 1420.0, "width": 1.0},
    ],
    mean=True,
)
curve(
    "diffraction_peaks",
    lambda xp, p, x: (
        p["base"] + xp.sum(p["height"] * xp.exp(-0.5 * ((x[:, None] - p["angle"]) / p["width"]) ** 2), axis=1)
    ),
    np.linspace(20.0, 60.0, 200),
    {
        "base": 300.0,
        "height": _arr([8e3, 2.5e3, 4e3]),
        "angle": _arr([28.4, 47.3, 56.1]),
        "width": _arr([0.5, 0.6, 0.7]),
    },
    80.0,
    [
        {"base": 0.0, "height": _arr([5e3, 5e3, 5e3]), "angle": _arr([28.0, 47.0, 56.0]), "width": np.ones(3)},
        {"base": 0.0, "height": _arr([1e3, 1e3, 1e3]), "angle": _arr([30.0, 45.0, 55.0]), "width": np.full(3, 3.0)},
    ],
)
curve(
    "newton_cooling",
    lambda xp, p, t: p["room"] + p["excess"] * xp.exp(-p["rate"] * t),
    np.linspace(0.0, 5400.0, 60),
    {"room": 294.5, "excess": 66.0, "rate": 6e-4},
    0.3,
    [{"room": 290.0, "excess": 80.0, "rate": 1e-3}, {"room": 0.0, "excess": 300.0, "rate": 1e-4}],
)
curve(
    "sutherland_viscosity",
    lambda xp, p, t: p[0] * t**1.5 / (t + p[1]),
    np.linspace(200.0, 1000.0, 30),
    _arr([1.458e-6, 110.4]),
    5e-8,
    [_arr([1e-6, 50.0]), _arr([1.0, 1.0])],
)
curve(
    "nelson_siegel",
    lambda xp, p, m: p[0] + (p[1] + p[2]) * (1 - xp.exp(-m / p[3])) / (m / p[3]) - p[2] * xp.exp(-m / p[3]),
    _arr([0.25, 0.5, 1, 2, 3, 5, 7, 10, 20, 30]),
    _arr([0.045, -0.02, 0.012, 2.1]),
    4e-4,
    [_arr([0.03, 0.0, 0.0, 1.0]), _arr([1.0, 1.0, 1.0, 1.0])],
)


def _radial_velocity(xp: Any, p: Any, days: Any) -> Any:
    """Return a star's velocity in metres per second, with Kepler's equation solved by ten Newton steps."""
    eccentricity = 1 / (1 + xp.exp(-p["logit_e"]))
    mean = 2 * np.pi * (days - p["epoch"]) / p["period"]
    anomaly = mean + eccentricity * xp.sin(mean)
    for _ in range(10):
        change = (anomaly - eccentricity * xp.sin(anomaly) - mean) / (1 - eccentricity * xp.cos(anomaly))
        anomaly = anomaly - change
    ratio = xp.sqrt(1 + eccentricity), xp.sqrt(1 - eccentricity)
    true = 2 * xp.arctan2(ratio[0] * xp.sin(anomaly / 2), ratio[1] * xp.cos(anomaly / 2))
    return p["drift"] + p["k"] * (xp.cos(true + p["omega"]) + eccentricity * xp.cos(p["omega"]))


curve(
    "kepler_velocity",
    _radial_velocity,
    np.sort(np.random.default_rng(8).uniform(0, 45, 60)),
    {"k": 55.9, "period": 4.2308, "epoch": 1.3, "logit_e": -1.5, "omega": 0.8, "drift": -33.2},
    4.0,
    [
        {"k": 50.0, "period": 4.2, "epoch": 1.0, "logit_e": -2.0, "omega": 0.5, "drift": -30.0},
        {"k": 10.0, "period": 4.0, "epoch": 0.0, "logit_e": 0.0, "omega": 0.0, "drift": 0.0},
    ],
)


@fit
def epidemic(rng: Random) -> Fit:
    """Daily cases in a city of a million people, by daily steps."""

    def cases(beta: Any, gamma: Any, first: Any, scan: Any) -> Any:
        def step(state: Any, _: Any) -> Any:
            healthy, ill = state
            new = beta * healthy * ill / 1e6
            return (healthy - new, ill + new - gamma * ill), new

        return scan(step, (1e6 - first, first))

    def loop(step: Any, state: Any) -> np.ndarray:
        seen = []
        for _ in range(90):
            state, new = step(state, None)
            seen.append(new)
        return _arr(seen)

    y = cases(0.42, 0.2, 60.0, loop)
    y = rng.poisson(y).astype(float)

    def loss(p: Any) -> Any:
        scan = lambda step, state: jax.lax.scan(step, state, length=90)[1]
        return jnp.mean((cases(jnp.exp(p["beta"]), jnp.exp(p["gamma"]), jnp.exp(p["first"]), scan) - y) ** 2)

    good = {"beta": -0.7, "gamma": -1.2, "first": 3.0}
    return loss, [good, {"beta": -1.0, "gamma": -2.0, "first": 0.0}]


@fit
def hares_and_lynxes(rng: Random) -> Fit:
    """Pelts of two species over 20 years, by a Lotka-Volterra equation with raw rates."""

    def step(rates: Any, x: Any, y: Any) -> Any:
        # A semi-implicit step of a twentieth of a year.
        x = x * (1 + 0.05 * (rates[0] - rates[1] * y))
        return x, y * (1 + 0.05 * (rates[2] * x - rates[3]))

    truth, state, seen = [0.55, 2.8e-5, 2.4e-5, 0.8], (3e4, 6e3), []
    for _ in range(20):
        for _ in range(20):
            state = step(truth, *state)
        seen.append(state)
    data = _arr(seen) * np.exp(rng.normal(0, 0.08, (20, 2)))

    def loss(p: Any) -> Any:
        def year(state: Any, _: Any) -> Any:
            state = jax.lax.scan(lambda s, _: (step(p["rates"], *s), None), state, length=20)[0]
            return state, jnp.stack(state)

        path = jax.lax.scan(year, (p["first"][0], p["first"][1]), length=20)[1]
        return jnp.mean((path - data) ** 2)

    good = {"rates": _arr([0.5, 2.5e-5, 2.5e-5, 0.75]), "first": _arr([3e4, 5e3])}
    return loss, [good, {"rates": _arr([0.6, 4e-5, 4e-5, 0.6]), "first": _arr([1e4, 1e4])}]


# Robust losses.


def _line_with_outliers(rng: Random, x: np.ndarray, a: float, b: float, spread: float) -> np.ndarray:
    """Return a line with normal noise and a tenth of gross outliers."""
    return a + b * x + spread * rng.normal(size=len(x)) * np.where(rng.random(len(x)) < 0.1, 15, 1)


@fit
def huber_prices(rng: Random) -> Fit:
    """A Huber loss in dollars, with its corner at 10,000."""
    area = rng.uniform(40, 250, 150)
    y = _line_with_outliers(rng, area, 3e4, 2500, 8e3)

    def loss(p: Any) -> Any:
        r = jnp.abs(p["a"] + p["b"] * area - y)
        return jnp.mean(jnp.where(r < 1e4, 0.5 * r**2, 1e4 * r - 0.5e8))

    return loss, [{"a": 0.0, "b": 2000.0}, {"a": 0.0, "b": 0.0}]


@fit
def cauchy_temperatures(rng: Random) -> Fit:
    """A Cauchy loss of a sensor's kelvins over another's."""
    x = rng.uniform(250, 350, 80)
    y = _line_with_outliers(rng, x, -4.0, 1.02, 0.5)
    loss = lambda p: jnp.sum(jnp.log1p(((p[0] + p[1] * x - y) / 0.5) ** 2))
    return loss, [_arr([0.0, 1.0]), _arr([0.0, 0.0])]


@fit
def log_cosh_counts(rng: Random) -> Fit:
    """A log-cosh loss of converter counts over pascals."""
    x = rng.uniform(9e4, 1.1e5, 100)
    y = _line_with_outliers(rng, x, -6e3, 0.08, 6.0)

    def loss(p: Any) -> Any:
        r = p["a"] + p["b"] * x - y
        return jnp.mean(jnp.logaddexp(r, -r))

    return loss, [{"a": 0.0, "b": 0.02}, {"a": 0.0, "b": 0.0}]


# Small networks on raw data.


def _layers(rng: Random, sizes: tuple[int, ...], gain: float) -> list[dict[str, np.ndarray]]:
    """Return weights with a Glorot scale times `gain`, and zero biases."""
    pairs = itertools.pairwise(sizes)
    return [{"w": gain * rng.normal(size=(m, n)) * np.sqrt(2 / (m + n)), "b": np.zeros(n)} for m, n in pairs]


def _network(layers: list[Any], x: Any, activation: Any = jnp.tanh) -> Any:
    for layer in layers[:-1]:
        x = activation(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def _decay(layers: Any, rate: float) -> Any:
    return rate * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(layers))


@fit
def network_iris(rng: Random) -> Fit:
    """A tanh network of eight units on raw iris."""
    x, y = datasets.load_iris(return_X_y=True)

    def loss(p: Any) -> Any:
        return -jnp.mean(jax.nn.log_softmax(_network(p, x))[np.arange(150), y]) + _decay(p, 1e-3)

    return loss, [_layers(rng, (4, 8, 3), 1.0), _layers(rng, (4, 8, 3), 4.0)]


@fit
def network_wine(rng: Random) -> Fit:
    """A tanh network of four units on raw wine, which saturates at the start."""
    x, y = datasets.load_wine(return_X_y=True)

    def loss(p: Any) -> Any:
        return -jnp.sum(jax.nn.log_softmax(_network(p, x))[np.arange(len(y)), y]) + _decay(p, 1e-2)

    return loss, [_layers(rng, (13, 4, 3), 0.01), _layers(rng, (13, 4, 3), 1.0)]


@fit
def network_diabetes(rng: Random) -> Fit:
    """A softplus network of four units on raw diabetes, with a target of about 150."""
    x, y = datasets.load_diabetes(return_X_y=True, scaled=False)

    def loss(p: Any) -> Any:
        return jnp.mean((_network(p, x, jax.nn.softplus)[:, 0] - y) ** 2) + _decay(p, 1e-2)

    return loss, [_layers(rng, (10, 4, 1), 0.1), _layers(rng, (10, 4, 1), 1.0)]


# Factorisations and geometry.


@fit
def ratings_factors(rng: Random) -> Fit:
    """Ratings from 1 to 5 as two factors, with a ridge. The second start, zero, is a saddle."""
    seen = rng.random((20, 15)) < 0.5
    y = np.clip(np.round(3 + rng.normal(size=(20, 2)) @ rng.normal(size=(2, 15))), 1, 5)

    def loss(p: Any) -> Any:
        return jnp.sum(seen * (p["users"] @ p["films"].T - y) ** 2) + 0.1 * _decay(p, 1.0)

    good = {"users": rng.normal(0, 0.3, (20, 2)), "films": rng.normal(0, 0.3, (15, 2))}
    return loss, [good, {"users": np.zeros((20, 2)), "films": np.zeros((15, 2))}]


@fit
def sales_rank_one(rng: Random) -> Fit:
    """Sales of about 1e4 as the product of a shop's and a month's factor."""
    y = np.outer(rng.uniform(5e3, 4e4, 6), rng.uniform(0.6, 1.5, 12)) + rng.normal(0, 500, (6, 12))
    loss = lambda p: jnp.mean((jnp.outer(p["shop"], p["month"]) - y) ** 2) + (jnp.mean(p["month"]) - 1) ** 2
    return loss, [{"shop": y.mean(1).round(-3), "month": np.ones(12)}, {"shop": np.ones(6), "month": np.ones(12)}]


@fit
def factors_saddle_small(rng: Random) -> Fit:
    """A 4 by 5 matrix of reflectances as one factor. The second start, zero, is a saddle."""
    y = np.outer(rng.uniform(0.1, 0.9, 4), rng.uniform(0.1, 0.9, 5)) + rng.normal(0, 0.01, (4, 5))
    loss = lambda p: (
        jnp.sum((jnp.outer(p[:4], p[4:]) - y) ** 2) + 1e-3 * (jnp.sum(p[:4] ** 2) - jnp.sum(p[4:] ** 2)) ** 2
    )
    return loss, [np.full(9, 0.5), np.zeros(9)]


@fit
def autoencoder_iris(rng: Random) -> Fit:
    """A linear autoencoder of raw iris with two directions, as in principal components."""
    x = np.asarray(datasets.load_iris(return_X_y=True)[0])

    def loss(p: Any) -> Any:
        centred = x - p["mean"]
        return jnp.mean(jnp.sum((centred - centred @ p["w"] @ p["w"].T) ** 2, axis=1))

    w = rng.normal(size=(4, 2))
    return loss, [
        {"w": 0.3 * w, "mean": x.mean(0).round(1)},
        {"w": np.full((4, 2), 0.1) * [1, -1], "mean": np.zeros(4)},
    ]


@fit
def leading_direction_wine(rng: Random) -> Fit:
    """A Rayleigh quotient of the raw wine covariance, about 1e5, with a minus sign."""
    x, _ = datasets.load_wine(return_X_y=True)
    covariance = np.cov(x.T)
    return lambda w: -(w @ covariance @ w) / (w @ w), [np.ones(13), rng.normal(size=13)]


@fit
def rotation_in_plane(rng: Random) -> Fit:
    """A rotation, a scale and a shift between two maps in metres."""
    a = rng.uniform(0, 5e3, (30, 2))
    turn = lambda xp, angle: xp.stack(
        [xp.stack([xp.cos(angle), -xp.sin(angle)]), xp.stack([xp.sin(angle), xp.cos(angle)])]
    )
    b = 1.02 * a @ turn(np, 0.7) + [3.2e4, -1.1e4] + rng.normal(0, 2, (30, 2))

    def loss(p: Any) -> Any:
        return jnp.mean(jnp.sum((p["scale"] * a @ turn(jnp, p["angle"]) + p["shift"] - b) ** 2, axis=1))

    good = {"angle": 0.5, "scale": 1.0, "shift": _arr([3e4, -1e4])}
    return loss, [good, {"angle": 0.0, "scale": 1.0, "shift": np.zeros(2)}]


def _rotation(xp: Any, q: Any) -> Any:
    """Return the rotation matrix of a quaternion of any length."""
    w, x, y, z = q / xp.sqrt(xp.sum(q**2))
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return xp.stack([xp.stack(row) for row in rows])


@fit
def rotation_molecule(rng: Random) -> Fit:
    """A rotation, as a quaternion, and a shift of a molecule in nanometres."""
    a = rng.normal(0, 0.4, (12, 3))
    b = a @ _rotation(np, _arr([0.8, 0.3, -0.4, 0.2])).T + [1.5, -0.2, 3.0] + rng.normal(0, 0.005, (12, 3))

    def loss(p: Any) -> Any:
        return jnp.sum((a @ _rotation(jnp, p["quaternion"]).T + p["shift"] - b) ** 2)

    good = {"quaternion": _arr([1.0, 0.0, 0.0, 0.0]), "shift": _arr([1.0, 0.0, 3.0])}
    return loss, [good, {"quaternion": _arr([1.0, 1.0, 1.0, 1.0]), "shift": np.zeros(3)}]


@fit
def trilateration_metres(rng: Random) -> Fit:
    """A position in metres from ranges to five masts kilometres away."""
    masts = rng.uniform(1e3, 2e4, (5, 2))
    ranges = np.hypot(*(masts - [7200.0, 1.31e4]).T) + rng.normal(0, 15, 5)
    loss = lambda p: jnp.sum((jnp.sqrt(jnp.sum((masts - p) ** 2, axis=1)) - ranges) ** 2)
    return loss, [masts.mean(0).round(-2), np.zeros(2)]


@fit
def trilateration_squares(rng: Random) -> Fit:
    """A position in metres from squared ranges, with a loss of about 1e15."""
    masts = rng.uniform(1e3, 2e4, (6, 2))
    squares = np.sum((masts - [7200.0, 1.31e4]) ** 2, axis=1) * (1 + rng.normal(0, 0.002, 6))
    loss = lambda p: jnp.mean((jnp.sum((masts - p) ** 2, axis=1) - squares) ** 2)
    return loss, [masts.mean(0).round(-2), np.zeros(2)]


@fit
def satellite_position(rng: Random) -> Fit:
    """A receiver's position and clock offset in metres, from eight satellites at 2.66e7 metres."""
    here = _arr([3.9e6, 3.2e5, 5.0e6])
    directions = rng.normal(size=(8, 3)) + 2 * here / np.linalg.norm(here)
    satellites = 2.66e7 * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    pseudo = np.linalg.norm(satellites - here, axis=1) + 8.5e4 + rng.normal(0, 5, 8)

    def loss(p: Any) -> Any:
        distances = jnp.sqrt(jnp.sum((satellites - p["position"]) ** 2, axis=1))
        return jnp.sum((distances + p["clock"] - pseudo) ** 2)

    good = {"position": _arr([4e6, 0.0, 5e6]), "clock": 0.0}
    return loss, [good, {"position": np.zeros(3), "clock": 0.0}]


@fit
def sensor_network(rng: Random) -> Fit:
    """Positions of six sensors in metres, from noisy distances to each other and to four anchors."""
    places = rng.uniform(0, 100, (6, 2))
    anchors = _arr([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])
    i, j = np.triu_indices(6, 1)
    between = np.linalg.norm(places[i] - places[j], axis=1) + rng.normal(0, 1, 15)
    fixed = np.linalg.norm(places[:, None] - anchors, axis=2) + rng.normal(0, 1, (6, 4))

    def loss(p: Any) -> Any:
        a = jnp.sqrt(jnp.sum((p[i] - p[j]) ** 2, axis=1)) - between
        b = jnp.sqrt(jnp.sum((p[:, None] - anchors) ** 2, axis=2)) - fixed
        return jnp.sum(a**2) + jnp.sum(b**2)

    return loss, [places + rng.normal(0, 20, (6, 2)), rng.normal(50, 1, (6, 2))]


@fit
def circle_nanometres(rng: Random) -> Fit:
    """The centre and radius of a pore, in nanometres."""
    angle = rng.uniform(0, 4, 50)
    xy = _arr([840.0, 1310.0]) + 62 * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(0, 1.5, (50, 2))

    def loss(p: Any) -> Any:
        return jnp.mean((jnp.sqrt(jnp.sum((xy - p["centre"]) ** 2, axis=1)) - p["radius"]) ** 2)

    good = {"centre": xy.mean(0).round(), "radius": 50.0}
    return loss, [good, {"centre": np.zeros(2), "radius": 1.0}]


@fit
def circle_metres_small(rng: Random) -> Fit:
    """The centre and radius of a vesicle of 2e-7, in metres."""
    angle = rng.uniform(0, 2 * np.pi, 40)
    xy = _arr([3.1e-6, 1.7e-6]) + 2e-7 * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(0, 5e-9, (40, 2))
    loss = lambda p: jnp.sum((jnp.sqrt(jnp.sum((xy - p[:2]) ** 2, axis=1)) - p[2]) ** 2)
    return loss, [_arr([3e-6, 1.8e-6, 1e-7]), _arr([0.0, 0.0, 1e-6])]


@fit
def camera_pinhole(rng: Random) -> Fit:
    """A camera's focal length, centre and distortion in pixels, and its position in metres."""
    points = rng.uniform([-2, -1.5, 4], [2, 1.5, 9], (60, 3))

    def project(xp: Any, p: Any) -> Any:
        moved = points + p["pose"]["shift"]
        flat = moved[:, :2] / moved[:, 2:]
        bent = flat * (1 + p["lens"]["k"] * xp.sum(flat**2, axis=1, keepdims=True))
        return p["lens"]["focal"] * bent + p["lens"]["centre"]

    truth = {
        "lens": {"focal": 1180.0, "centre": _arr([642.0, 475.0]), "k": -0.21},
        "pose": {"shift": _arr([0.1, -0.05, 0.4])},
    }
    pixels = project(np, truth) + rng.normal(0, 0.5, (60, 2))
    good = {"lens": {"focal": 1000.0, "centre": _arr([640.0, 480.0]), "k": 0.0}, "pose": {"shift": np.zeros(3)}}
    bad = {"lens": {"focal": 100.0, "centre": np.zeros(2), "k": 0.0}, "pose": {"shift": np.ones(3)}}
    return lambda p: jnp.mean(jnp.sum((project(jnp, p) - pixels) ** 2, axis=1)), [good, bad]


@fit
def argon_cluster(rng: Random) -> Fit:
    """The energy of five argon atoms in electronvolts, with positions in nanometres."""
    i, j = np.triu_indices(5, 1)

    def loss(p: Any) -> Any:
        ratio = (0.34**2 / jnp.sum((p[i] - p[j]) ** 2, axis=1)) ** 3
        return 4 * 0.0104 * jnp.sum(ratio**2 - ratio)

    near = 0.38 * _arr([[0, 0, 0], [1, 0, 0], [0.5, 0.9, 0], [0.5, 0.3, 0.8], [0.5, 0.3, -0.8]])
    return loss, [near, 0.5 * _arr([[0, 0, 0], [1, 0, 0.1], [2.1, 0, 0], [0, 1, 0], [1, 1.1, 0.2]])]


@fit
def trapped_beads(rng: Random) -> Fit:
    """The energy of four beads in an optical trap in joules, about 1e-20, with positions in metres, about 1e-8."""
    charges = rng.uniform(0.5, 1.5, 4)

    def loss(x: Any) -> Any:
        springs = 0.5 * 2e-5 * (x[1:] - x[:-1] - 3e-8) ** 2
        return jnp.sum(0.5 * 1e-6 * (x - 2e-7) ** 2 * charges) + jnp.sum(springs)

    return loss, [_arr([1e-7, 2e-7, 3e-7, 4e-7]), np.zeros(4)]


@fit
def hanging_chain(rng: Random) -> Fit:
    """The energy of ten hanging masses on springs in joules, between two hooks."""
    ends = _arr([[0.0, 0.0], [3.0, 0.5]])

    def loss(p: Any) -> Any:
        nodes = jnp.concatenate([ends[:1], p, ends[1:]])
        lengths = jnp.sqrt(jnp.sum((nodes[1:] - nodes[:-1]) ** 2, axis=1))
        return 0.5 * 4e4 * jnp.sum((lengths - 0.35) ** 2) + 9.81 * 1.5 * jnp.sum(p[:, 1])

    line = np.linspace(0, 1, 12)[1:-1, None] * ends[1]
    return loss, [line - [0.0, 0.5], line * [0.1, 1.0] + [0.0, 0.3]]


# Money.


def _returns(rng: Random, assets: int) -> np.ndarray:
    """Return 500 daily returns with a common factor, about 1e-2."""
    market = rng.normal(3e-4, 9e-3, (500, 1))
    return rng.uniform(0, 4e-4, assets) + market * rng.uniform(0.5, 1.5, assets) + rng.normal(0, 8e-3, (500, assets))


@fit
def mean_variance_weights(rng: Random) -> Fit:
    """Unconstrained weights of eight assets, with a risk aversion of five and a covariance of about 1e-4."""
    r = _returns(rng, 8)
    mean, covariance = r.mean(0), np.cov(r.T)
    return lambda w: 2.5 * w @ covariance @ w - mean @ w, [np.full(8, 0.125), np.zeros(8)]


@fit
def exponential_utility(rng: Random) -> Fit:
    """Positions in dollars of four assets, with an exponential utility."""
    r = _returns(rng, 4)
    return lambda x: logsumexp(-1e-5 * (r @ x)) / 1e-5, [np.full(4, 1e5), np.zeros(4)]


@fit
def log_utility_savings(rng: Random) -> Fit:
    """Consumption in dollars over 10 years from a wealth of a million, with a log utility and a bequest."""

    def loss(p: Any) -> Any:
        spent = jnp.exp(p["log_spending"])
        left = 1e6 - jnp.sum(spent * 1.03 ** -np.arange(10.0))
        return -jnp.sum(0.96 ** np.arange(10.0) * p["log_spending"]) - 3 * jnp.log(left)

    return loss, [{"log_spending": np.full(10, 11.0)}, {"log_spending": np.zeros(10)}]


@fit
def implied_volatility(rng: Random) -> Fit:
    """A volatility and a yearly rate from call prices in dollars."""
    strike = np.linspace(3200, 4800, 17)

    def price(xp: Any, cdf: Any, sigma: Any, rate: Any) -> Any:
        d = (np.log(4000 / strike) + (rate + 0.5 * sigma**2) * 0.5) / (sigma * np.sqrt(0.5))
        return 4000 * cdf(d) - strike * xp.exp(-0.5 * rate) * cdf(d - sigma * np.sqrt(0.5))

    y = price(np, scipy.special.ndtr, 0.21, 0.035) + rng.normal(0, 2, 17)
    loss = lambda p: jnp.mean((price(jnp, ndtr, p["sigma"], p["rate"]) - y) ** 2)
    return loss, [{"sigma": 0.3, "rate": 0.01}, {"sigma": 1.0, "rate": 0.0}]


@fit
def profit_by_price(rng: Random) -> Fit:
    """A loss of minus a profit of about 1e7 dollars, over a price in dollars."""
    return lambda p: -(p - 20) * 1e6 * jnp.exp(-p / 50), [50.0, 1.0]


# Formulas, with offsets and scales.


def _rosenbrock(x: Any) -> Any:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


@fit
def rosenbrock_units(rng: Random) -> Fit:
    """Rosenbrock's valley with one variable of about 1e3 and one of about 1e-4."""
    starts = [{"long": -1200.0, "short": 1e-4}, {"long": 1.0, "short": 1.0e-3}]
    return lambda p: _rosenbrock(jnp.stack([p["long"] * 1e-3, p["short"] * 1e4])), starts


@fit
def rosenbrock_ten_offset(rng: Random) -> Fit:
    """Rosenbrock's valley in ten dimensions, with a minimum of a million."""
    return lambda x: 1e6 + _rosenbrock(x), [np.full(10, 0.5), np.zeros(10)]


@fit
def rosenbrock_tiny(rng: Random) -> Fit:
    """Rosenbrock's valley times 1e-12."""
    return lambda x: 1e-12 * _rosenbrock(x), [_arr([-1.2, 1.0]), np.zeros(2)]


@fit
def rosenbrock_huge(rng: Random) -> Fit:
    """Rosenbrock's valley times 1e12."""
    return lambda x: 1e12 * _rosenbrock(x), [_arr([-1.2, 1.0]), np.zeros(2)]


@fit
def zakharov(rng: Random) -> Fit:
    """Zakharov's function in ten dimensions."""
    weights = 0.5 * np.arange(1, 11)
    return lambda x: jnp.sum(x**2) + (weights @ x) ** 2 + (weights @ x) ** 4, [np.ones(10), np.full(10, -5.0)]


@fit
def quartic_far(rng: Random) -> Fit:
    """A quartic with its minimum at 1,000 metres and a value there of -40."""
    return lambda p: (0.01 * (p["x"] - 1000)) ** 4 + (p["y"] - 2) ** 2 - 40, [
        {"x": 800.0, "y": 0.0},
        {"x": 0.0, "y": 0.0},
    ]


@fit
def quadratic_offset(rng: Random) -> Fit:
    """A quadratic with a minimum of 1.2e6."""
    a = rng.normal(size=(6, 6))
    centre = _arr([1.0, 10.0, 100.0, 1e3, -5.0, 0.1])
    return lambda x: 1.2e6 + jnp.sum((a @ (x - centre)) ** 2), [np.ones(6), np.full(6, -1e3)]


@fit
def quadratic_negative(rng: Random) -> Fit:
    """A quadratic energy with a minimum of about -2e6."""
    stiffness, load = np.geomspace(1.0, 1e5, 8), np.geomspace(2e3, 2e5, 8)
    return lambda x: 0.5 * jnp.sum(stiffness * x**2) - load @ x, [np.full(8, 10.0), np.zeros(8)]


@fit
def quadratic_spread(rng: Random) -> Fit:
    """A quadratic with curvatures from 1e-6 to 1e6 and a minimum of zero."""
    scales, centre = np.geomspace(1e-6, 1e6, 7), np.geomspace(1e3, 1e-3, 7)
    return lambda x: 0.5 * jnp.sum(scales * (x - centre) ** 2), [np.zeros(7), np.ones(7)]


@fit
def himmelblau_offset(rng: Random) -> Fit:
    """Himmelblau's function of metres, plus 500."""

    def loss(p: Any) -> Any:
        x, y = p["x"] / 1e3, p["y"] / 1e3
        return 500 + (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2

    return loss, [{"x": 2500.0, "y": 1500.0}, {"x": 0.0, "y": 0.0}]


@fit
def powell_singular(rng: Random) -> Fit:
    """Powell's function, with a singular Hessian at its minimum."""

    def loss(x: Any) -> Any:
        pairs = (x[0] + 10 * x[1]) ** 2 + 5 * (x[2] - x[3]) ** 2
        return pairs + (x[1] - 2 * x[2]) ** 4 + 10 * (x[0] - x[3]) ** 4

    return loss, [_arr([3.0, -1.0, 0.0, 1.0]), np.full(4, 10.0)]


@fit
def line_huge(rng: Random) -> Fit:
    """National incomes in dollars, about 1e9, over quarters, with a loss of about 1e17."""
    quarter = np.arange(0.0, 80)
    y = 1.1e9 + 1.6e7 * quarter + rng.normal(0, 5e7, 80)
    return lambda p: jnp.mean((p[0] + p[1] * quarter - y) ** 2), [_arr([1e9, 0.0]), np.zeros(2)]


# Losses with kinks, named in `KINKS`.


@fit
def median_salaries(rng: Random) -> Fit:
    """The median of salaries in dollars."""
    y = rng.lognormal(10.5, 0.5, 101)
    return lambda p: jnp.mean(jnp.abs(y - p)), [4e4, 0.0]


@fit
def quantile_rainfall(rng: Random) -> Fit:
    """The 90% quantile of rain in millimetres over the altitude in metres."""
    altitude = rng.uniform(0, 3e3, 150)
    y = 600 + 0.3 * altitude + rng.gamma(2, 120, 150)

    def loss(p: Any) -> Any:
        r = y - p["a"] - p["b"] * altitude
        return jnp.mean(jnp.maximum(0.9 * r, -0.1 * r))

    return loss, [{"a": 1000.0, "b": 0.0}, {"a": 0.0, "b": 0.0}]


@fit
def chebyshev_line(rng: Random) -> Fit:
    """A line through kelvins over pascals with the smallest largest error."""
    x = np.linspace(9e4, 1.1e5, 40)
    y = 280 + 1e-4 * x + rng.uniform(-0.5, 0.5, 40)
    loss = lambda p: jnp.max(jnp.abs(p["a"] + p["b"] * x - y))
    return loss, [{"a": 290.0, "b": 0.0}, {"a": 0.0, "b": 0.0}]


@fit
def lasso_diabetes(rng: Random) -> Fit:
    """A lasso on raw diabetes."""
    x, y = datasets.load_diabetes(return_X_y=True, scaled=False)

    def loss(p: Any) -> Any:
        return 0.5 * jnp.mean((x @ p["w"] + p["b"] - y) ** 2) + 10 * jnp.sum(jnp.abs(p["w"]))

    return loss, [{"w": np.zeros(10), "b": 150.0}, {"w": np.ones(10), "b": 0.0}]


@fit
def hinge_iris(rng: Random) -> Fit:
    """A support vector machine between two overlapping species in raw centimetres."""
    x, y = datasets.load_iris(return_X_y=True)
    x, sign = x[50:], np.where(y[50:] == 1, 1.0, -1.0)

    def loss(p: Any) -> Any:
        return jnp.mean(jnp.maximum(0, 1 - sign * (x @ p["w"] + p["b"]))) + 1e-3 * jnp.sum(p["w"] ** 2)

    return loss, [{"w": np.zeros(4), "b": 0.0}, {"w": np.full(4, 10.0), "b": 0.0}]


@fit
def geometric_median_cities(rng: Random) -> Fit:
    """The point with the least sum of distances to cities, in metres."""
    cities = rng.uniform(1e4, 8e5, (25, 2))
    return lambda p: jnp.sum(jnp.sqrt(jnp.sum((cities - p) ** 2, axis=1))), [cities.mean(0).round(-3), np.zeros(2)]


@fit
def relu_network_diabetes(rng: Random) -> Fit:
    """A network of five rectified units on raw diabetes."""
    x, y = datasets.load_diabetes(return_X_y=True, scaled=False)

    def loss(p: Any) -> Any:
        return jnp.mean((_network(p, x, jax.nn.relu)[:, 0] - y) ** 2) + _decay(p, 1e-2)

    return loss, [_layers(rng, (10, 5, 1), 0.3), _layers(rng, (10, 5, 1), 2.0)]


# Losses without a minimum, named in `UNBOUNDED`.


@fit
def linear_costs(rng: Random) -> Fit:
    """Costs in dollars that are linear in the quantities."""
    costs = rng.uniform(10, 500, 5)
    return lambda x: costs @ x, [np.full(5, 100.0), np.zeros(5)]


@fit
def gaussian_constant_readings(rng: Random) -> Fit:
    """A normal likelihood of identical readings in kelvin, where the spread goes to zero."""
    y = np.full(20, 293.0)
    starts = [{"mu": 293.0, "log_sigma": 0.0}, {"mu": 280.0, "log_sigma": 3.0}]
    return lambda p: jnp.mean(_normal(y - p["mu"], p["log_sigma"])), starts


@fit
def indefinite_energy(rng: Random) -> Fit:
    """A quadratic energy in joules with one negative stiffness."""
    stiffness = _arr([2e3, 500.0, -40.0])
    return lambda x: 0.5 * jnp.sum(stiffness * x**2) + jnp.sum(x), [_arr([0.1, 0.1, 0.1]), np.zeros(3)]


@fit
def cubic_yield(rng: Random) -> Fit:
    """Minus a cubic trend of yields in kilograms per hectare, over years since 1950."""
    return lambda p: -(2e3 + 40 * p["year"] + 1e-3 * p["year"] ** 3), [{"year": 50.0}, {"year": 0.0}]


@fit
def line_with_negated_loss(rng: Random) -> Fit:
    """A mean of squares with the wrong sign."""
    x = np.linspace(0, 100, 30)
    y = 4 + 0.3 * x + rng.normal(0, 2, 30)
    return lambda p: -jnp.mean((p["a"] + p["b"] * x - y) ** 2), [{"a": 1.0, "b": 0.1}, {"a": 0.0, "b": 0.0}]
