"""Small trainings on scikit-learn's data sets, for benchmarks of mini-batches and learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn.model_selection import train_test_split

import gdopt

Data = tuple[Any, Any]


class Training(NamedTuple):
    """A training: rows, a network, a loss, an optimizer."""

    rows: Callable[[], tuple[Data, Data]]  # for training, held out
    batch_size: int
    sizes: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]
    error: Callable[[jax.Array, jax.Array], jax.Array]  # (outputs, targets) -> of each row
    optimizer: Any = gdopt.gd

    @property
    def classes(self) -> bool:
        """Whether the targets are classes."""
        return self.error in (cross_entropy, logistic)

    def start(self, seed: int) -> list[dict[str, jax.Array]]:
        """Layers with normally distributed weights, of the variance that keeps that of the signal."""
        gain = 2.0 if self.activation is jax.nn.relu else 1.0
        keys = jax.random.split(jax.random.key(seed), len(self.sizes) - 1)
        return [
            {"w": jax.random.normal(key, (i, o)) * (gain / i) ** 0.5, "b": jnp.zeros(o)}
            for key, i, o in zip(keys, self.sizes[:-1], self.sizes[1:], strict=True)
        ]

    def run(self, solve: Callable[..., Any], seed: int, **options: Any) -> Any:
        """``gdopt.minimize`` or ``gdopt.lr_find`` on it, from the seed's start."""
        rows, _ = self.rows()
        own = {"data": rows, "batch_size": self.batch_size, "optimizer": self.optimizer}
        return solve(self.loss, self.start(seed), **own, **options)

    def outputs(self, params: Sequence[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
        """The outputs of the network for each row."""
        *hidden, last = params
        for layer in hidden:
            x = self.activation(x @ layer["w"] + layer["b"])
        return x @ last["w"] + last["b"]

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """The mean error of a batch."""
        x, y = batch
        return jnp.mean(self.error(self.outputs(params, x), y))


def accuracy(training: Training, params: Any, rows: Data) -> float:
    """The share of rows that are classified correctly; without classes, minus the loss."""
    outputs, labels = training.outputs(params, rows[0]), rows[1]
    if not training.classes:
        return -float(training.loss(params, rows))
    named = jnp.argmax(outputs, axis=1) if training.error is cross_entropy else outputs[:, 0] > 0
    return float(jnp.mean(named == labels))


def cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of classes, from logits."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def logistic(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of two classes, from one logit."""
    return optax.sigmoid_binary_cross_entropy(outputs[:, 0], labels)


def squared(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The squared distance."""
    return jnp.sum((outputs - targets) ** 2, axis=1)


def digits() -> tuple[Data, Data]:
    """1797 images of 8 x 8 from 0 to 1, ten classes."""
    return _split(*datasets.load_digits(return_X_y=True), scale=lambda x: x / 16)


def images() -> tuple[Data, Data]:
    """The same images as inputs and as targets."""
    (x, _), (held, _) = digits()
    return (x, x), (held, held)


def diabetes() -> tuple[Data, Data]:
    """442 patients, a disease's progress after a year; both standardised."""
    x, y = datasets.load_diabetes(return_X_y=True)
    return _split(x, _standard(np.asarray(y))[:, None], scale=_standard)


def breast_cancer() -> tuple[Data, Data]:
    """569 tumours, standardised; two classes."""
    x, y = datasets.load_breast_cancer(return_X_y=True)
    return _split(x, np.asarray(y, float), scale=_standard)


def _standard(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=0)) / x.std(axis=0)


def _split(x: Any, y: Any, scale: Callable[[np.ndarray], np.ndarray]) -> tuple[Data, Data]:
    x, y = scale(x).astype(np.float32), y.astype(np.int32 if y.dtype.kind == "i" else np.float32)
    x, held_x, y, held_y = train_test_split(x, y, test_size=0.2, random_state=0)
    return (x, y), (held_x, held_y)


TRAININGS = {
    "digits, linear": Training(digits, 64, (64, 10), jnp.tanh, cross_entropy),
    "digits, MLP": Training(digits, 64, (64, 128, 10), jax.nn.relu, cross_entropy),
    "digits, deep tanh": Training(digits, 64, (64, *[32] * 6, 10), jnp.tanh, cross_entropy),
    "digits, autoencoder": Training(images, 64, (64, 16, 64), jnp.tanh, squared),
    "digits, MLP, Adam": Training(digits, 64, (64, 128, 10), jax.nn.relu, cross_entropy, optax.adam),
    "diabetes, MLP": Training(diabetes, 32, (10, 32, 1), jnp.tanh, squared),
    "breast cancer, logistic": Training(breast_cancer, 32, (30, 1), jnp.tanh, logistic),
}
