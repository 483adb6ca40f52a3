"""Losses in their natural units: raw and standardised data of scikit-learn, curve fits, ill-conditioned quadratics.

The params of the curve fits go from 1e-6 to 1e5, the conditions of the quadratics to 1e10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

Loss = Callable[[jax.Array], jax.Array]
Entry = tuple[Loss, np.ndarray]


def make() -> dict[str, Entry]:
    """Return the loss and the start of each problem by its name."""
    return {**raw_data(), **standardised_data(), **curve_fits(), **quadratics()}


def load(loader: Callable[..., Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and the outputs of one of scikit-learn's data sets."""
    return loader(return_X_y=True, **options)


def with_ones(x: np.ndarray) -> np.ndarray:
    """The inputs with a column for the offset."""
    return np.c_[x, np.ones(len(x))]


def one_hot(y: np.ndarray) -> np.ndarray:
    """One column for each class."""
    return np.eye(int(y.max()) + 1)[y]


def logistic(x: np.ndarray, signs: np.ndarray, penalty: float) -> Entry:
    """Logistic regression on labels of -1 and 1."""
    a = with_ones(x)
    loss = lambda w: jnp.mean(jnp.logaddexp(0.0, -signs * (a @ w))) + 0.5 * penalty * jnp.sum(w[:-1] ** 2)
    return loss, np.zeros(a.shape[1])


def cross_entropy(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    """The mean over the rows."""
    return jnp.mean(jax.nn.logsumexp(logits, 1) - jnp.sum(logits * labels, 1))


def softmax(x: np.ndarray, y: np.ndarray, penalty: float) -> Entry:
    """Logistic regression on several classes."""
    a, labels = with_ones(x), one_hot(y)
    shape = a.shape[1], labels.shape[1]
    loss = lambda w: cross_entropy(a @ w.reshape(shape), labels) + 0.5 * penalty * jnp.sum(w**2)
    return loss, np.zeros(shape[0] * shape[1])


def ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> Entry:
    """Least squares with a penalty on all but the offset."""
    a = with_ones(x)
    return (lambda w: jnp.mean((a @ w - y) ** 2) + penalty * jnp.sum(w[:-1] ** 2)), np.zeros(a.shape[1])


def poisson(x: np.ndarray, y: np.ndarray, penalty: float) -> Entry:
    """Poisson regression, without the constant terms of its likelihood."""
    a = with_ones(x)
    loss = lambda w: jnp.mean(jnp.exp(a @ w) - y * (a @ w)) + 0.5 * penalty * jnp.sum(w[:-1] ** 2)
    return loss, np.zeros(a.shape[1])


def network(x: np.ndarray, y: np.ndarray, hidden: int = 8) -> Entry:
    """A network of one hidden layer, with its params in one vector."""
    labels = one_hot(y)
    inputs, classes = x.shape[1], labels.shape[1]
    random = np.random.RandomState(0)
    first = random.randn(inputs, hidden) / np.sqrt(inputs)
    second = random.randn(hidden, classes) / np.sqrt(hidden)
    start = np.concatenate([first.ravel(), np.zeros(hidden), second.ravel(), np.zeros(classes)])
    ends = np.cumsum([first.size, hidden, second.size])

    def loss(w: jax.Array) -> jax.Array:
        a, b, c, d = jnp.split(w, ends)
        logits = jnp.tanh(x @ a.reshape(first.shape) + b) @ c.reshape(second.shape) + d
        return cross_entropy(logits, labels) + 0.5e-3 * jnp.sum(w**2)

    return loss, start


def standardised(x: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and deviation 1."""
    return (x - x.mean(0)) / x.std(0)


def synthetic() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.random.RandomState]:
    """500 rows of 20 inputs, the weights, labels of -1 and 1, and the generator that made them."""
    random = np.random.RandomState(0)
    x, w = random.randn(500, 20), random.randn(20)
    return x, w, np.where(x @ w + random.randn(500) > 0, 1.0, -1.0), random


def raw_data() -> dict[str, Entry]:
    """Regressions on columns in their own units."""
    cancer, is_benign = load(datasets.load_breast_cancer)
    wine, cultivar = load(datasets.load_wine)
    iris, species = load(datasets.load_iris)
    diabetes, progress = load(datasets.load_diabetes, scaled=False)
    x, w, signs, random = synthetic()
    six, four = np.logspace(-3, 3, 20), np.logspace(-2, 2, 20)
    return {
        "raw:bc_logreg_1e-6": logistic(cancer, 2.0 * is_benign - 1, 1e-6),
        "raw:bc_logreg_1e-2": logistic(cancer, 2.0 * is_benign - 1, 1e-2),
        "raw:wine_softmax_1e-3": softmax(wine, cultivar, 1e-3),
        "raw:wine_softmax_1e-5": softmax(wine, cultivar, 1e-5),
        "raw:wine_logreg": logistic(wine, np.where(cultivar == 0, 1.0, -1.0), 1e-3),
        "raw:iris_softmax": softmax(iris, species, 1e-3),
        "raw:diab_ridge_1": ridge(diabetes, progress, 1.0),
        "raw:diab_logreg": logistic(diabetes, np.where(progress > np.median(progress), 1.0, -1.0), 1e-3),
        "raw:diab_poisson": poisson(diabetes, progress / progress.mean(), 1e-4),
        "raw:diab_poisson_counts": poisson(diabetes, progress, 0.0),
        "raw:synth_logreg_6dec": logistic(x * six, signs, 0.0),
        "raw:synth_logreg_4dec": logistic(x * four, signs, 1e-8),
        "raw:synth_lstsq_6dec": ridge(x * six, x @ w + 0.1 * random.randn(500), 0.0),
        "raw:synth_offset_lstsq": ridge(x + 100 * random.rand(20), x @ w + 3, 0.0),  # data that are not centred
        "raw:wine_mlp8": network(wine, cultivar),
        "raw:iris_mlp8": network(iris, species),
    }


def standardised_data() -> dict[str, Entry]:
    """Regressions on columns of one scale."""
    cancer, is_benign = load(datasets.load_breast_cancer)
    wine, cultivar = load(datasets.load_wine)
    x, _, signs, _ = synthetic()
    return {
        "std:wine_softmax": softmax(standardised(wine), cultivar, 1e-3),
        "std:bc_logreg_1e-4": logistic(standardised(cancer), 2.0 * is_benign - 1, 1e-4),
        "std:synth_logreg": logistic(x, signs, 1e-3),
        "std:wine_mlp8": network(standardised(wine), cultivar),
    }


def curve_fits() -> dict[str, Entry]:
    """Least squares of curves with one percent of noise."""
    t = np.linspace(0.1, 10, 60)
    exp = jnp.exp
    return {
        "fit:expdecay": fit(lambda x, p: p[0] * exp(-p[1] * x) + p[2], t * 1e3, [3e4, 5e-4, 200.0], [1e4, 1e-3, 0.0]),
        "fit:michaelis": fit(lambda x, p: p[0] * x / (p[1] + x), t * 1e-6, [8e4, 2e-6], [2e4, 5e-6]),
        "fit:gausspeak": fit(
            lambda x, p: p[0] * exp(-0.5 * ((x - p[1]) / p[2]) ** 2) + p[3],
            np.linspace(900, 1100, 80),
            [3e-6, 1010.0, 12.0, 1e-7],
            [1e-6, 1000.0, 20.0, 0.0],
        ),
        "fit:logistic_growth": fit(
            lambda x, p: p[0] / (1 + exp(-p[1] * (x - p[2]))),
            np.linspace(0, 2000, 60),
            [9e4, 5e-3, 800.0],
            [5e4, 2e-3, 500.0],
        ),
        "fit:powerlaw": fit(lambda x, p: p[0] * x ** p[1], np.linspace(1, 100, 50), [2e-5, 1.7], [1e-4, 1.0]),
        "fit:arrhenius": fit(lambda x, p: p[0] * exp(-p[1] / x), np.linspace(300, 600, 40), [1e5, 3e3], [2e4, 2e3]),
        "fit:damped": fit(
            lambda x, p: p[0] * exp(-p[1] * x) * jnp.sin(p[2] * x + p[3]),
            np.linspace(0, 1e-2, 100),
            [500.0, 150.0, 1500.0, 0.3],
            [300.0, 100.0, 1400.0, 0.0],
        ),
        "fit:quadpoly_big_x": fit(
            lambda x, p: p[0] + p[1] * x + p[2] * x * x, np.linspace(0, 1e3, 50), [5e3, 20.0, -1e-2], [0.0, 0.0, 0.0]
        ),
        "fit:misra1a_like": fit(
            lambda x, p: p[0] * (1 - exp(-p[1] * x)),
            np.linspace(77, 760, 14),
            [239.0, 5.5e-4],
            [500.0, 1e-4],
            noise=1e-3,
        ),
        "fit:hill": fit(
            lambda x, p: p[0] + (p[1] - p[0]) / (1 + (p[2] / x) ** p[3]),
            np.logspace(-9, -4, 40),
            [10.0, 1e3, 3e-7, 1.2],
            [0.0, 8e2, 1e-6, 1.0],
        ),
        "fit:biexp": fit(
            lambda x, p: p[0] * exp(-p[1] * x) + p[2] * exp(-p[3] * x),
            np.linspace(0, 5e3, 80),
            [4e3, 5e-3, 1e3, 5e-4],
            [2e3, 1e-2, 2e3, 1e-3],
            noise=1e-3,
        ),
        "fit:langmuir": fit(
            lambda x, p: p[0] * p[1] * x / (1 + p[1] * x), np.linspace(1e3, 1e6, 40), [5.0, 3e-6], [2.0, 1e-5]
        ),
    }


def fit(
    model: Callable[[np.ndarray, jax.Array], jax.Array],
    x: np.ndarray,
    true: Sequence[float],
    start: Sequence[float],
    noise: float = 0.01,
) -> Entry:
    """The sum of squares between a model and its own values with noise."""
    with jax.enable_x64(True):  # the same data in either dtype
        y = np.asarray(model(x, jnp.asarray(true)))
    y = y + noise * np.abs(y).mean() * np.random.RandomState(0).randn(len(x))
    return (lambda p: jnp.sum((model(x, p) - y) ** 2)), np.array(start)


def quadratics() -> dict[str, Entry]:
    """Quadratics of condition 1e2 to 1e10 with their minimum at ones, along the axes and rotated."""
    entries: dict[str, Entry] = {}
    for power in range(2, 11, 2):
        scales = np.logspace(0, power, 100)
        rotation = np.linalg.qr(np.random.RandomState(power).randn(50, 50))[0]
        hessian = (rotation * np.logspace(0, power, 50)) @ rotation.T
        entries[f"quad:diag1e{power}"] = (lambda x, d=scales: 0.5 * jnp.sum(d * (x - 1) ** 2)), np.zeros(100)
        entries[f"quad:rot1e{power}"] = (lambda x, h=hessian: 0.5 * (x - 1) @ h @ (x - 1)), np.zeros(50)
    return entries
