"""Real data, and independent answers: scikit-learn's logistic regression, least squares in closed form."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

import gdopt
from gdopt import Status


def softmax_loss(params, x, y, strength):
    """scikit-learn's objective, divided by the number of rows: mean cross-entropy + |W|^2 / (2 C n)."""
    logits = x @ params["w"] + params["b"][None, :]
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return cross_entropy + 0.5 * strength * jnp.sum(params["w"] ** 2)


@pytest.mark.parametrize(
    ("load", "method"),
    [
        pytest.param(load_breast_cancer, "gd", marks=pytest.mark.slow),
        pytest.param(load_breast_cancer, "nesterov", marks=pytest.mark.slow),
        pytest.param(load_breast_cancer, "lbfgs", marks=pytest.mark.slow),
        (load_breast_cancer, "spectral"),
        pytest.param(load_digits, "gd", marks=pytest.mark.slow),
        pytest.param(load_digits, "nesterov", marks=pytest.mark.slow),
        pytest.param(load_digits, "lbfgs", marks=pytest.mark.slow),
        pytest.param(load_digits, "spectral", marks=pytest.mark.slow),
    ],
)
def test_logistic_regression_agrees_with_scikit_learn(load, method):
    X, y = load(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    classes, C = int(y.max()) + 1, 0.1
    strength = 1 / (C * len(X))
    reference = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(X, y)
    coefficients, intercepts = reference.coef_, reference.intercept_
    if classes == 2:  # one vector of logits there, two here: half each, and half the penalty
        coefficients, intercepts = (
            np.stack([-coefficients[0], coefficients[0]]) / 2,
            np.stack([-intercepts, intercepts]) / 2,
        )
        strength *= 2

    with jax.enable_x64(True):
        start = {"w": np.zeros((X.shape[1], classes)), "b": np.zeros(classes)}
        smoothness = np.linalg.norm(np.c_[X, np.ones(len(X))], 2) ** 2 / (2 * len(X)) + strength
        optimizer, rate = {
            "gd": (gdopt.gd, 1 / smoothness),
            "nesterov": (lambda rate: optax.sgd(rate, momentum=0.95, nesterov=True), 1 / smoothness),
            "lbfgs": (optax.lbfgs(), "auto"),
            "spectral": (gdopt.gd, "auto"),
        }[method]
        result = gdopt.minimize(
            softmax_loss,
            start,
            args=(X, y, strength),
            optimizer=optimizer,
            learning_rate=rate,
            max_steps=20_000,
            tol=1e-6,
        )
        best = float(softmax_loss({"w": coefficients.T, "b": intercepts.ravel()}, X, y, strength))
    assert result.status == Status.CONVERGED
    assert result.loss - best <= 1e-6 * (result.history.loss[0] - best)
    assert result.loss >= best - 1e-9  # nobody beats the minimum
    np.testing.assert_array_equal(
        (X @ np.asarray(result.params["w"]) + np.asarray(result.params["b"])).argmax(1), reference.predict(X)
    )
    np.testing.assert_allclose(result.params["w"], coefficients.T, atol=0.02)


def test_ridge_regression_agrees_with_the_normal_equations():
    diabetes: Any = load_diabetes(return_X_y=True)
    X, y = diabetes
    X, y = StandardScaler().fit_transform(X), (y - y.mean()) / y.std()
    reference = Ridge(alpha=1.0, fit_intercept=False).fit(X, y)
    with jax.enable_x64(True):
        loss = lambda w: 0.5 * jnp.sum((X @ w - y) ** 2) + 0.5 * jnp.sum(w**2)
        smoothness = np.linalg.norm(X, 2) ** 2 + 1
        result = gdopt.minimize(loss, np.zeros(X.shape[1]), learning_rate=1 / smoothness, tol=1e-7)
    assert result.success
    np.testing.assert_allclose(result.params, reference.coef_, atol=1e-4)


def test_mini_batches_with_a_cyclical_rate_reach_the_full_batch_answer():
    X, y = load_breast_cancer(return_X_y=True)
    X = StandardScaler().fit_transform(X).astype(np.float32)
    strength = 10 / len(X)
    loss = lambda params, batch: softmax_loss(params, batch[0], batch[1], strength)
    start = {"w": np.zeros((X.shape[1], 2), np.float32), "b": np.zeros(2, np.float32)}
    full = gdopt.minimize(lambda params: loss(params, (X, y)), start, learning_rate=0.1, tol=1e-5)
    schedule = gdopt.schedules.triangular2(0.01, 0.1, step_size_up=5 * (len(X) // 32))
    result = gdopt.minimize(loss, start, data=(X, y), batch_size=32, epochs=50, learning_rate=schedule)
    assert full.success
    assert result.success
    assert float(loss(result.params, (X, y))) < 1.02 * full.loss
