"""Trainings to judge the defaults for mini-batches by: small networks of several kinds, and some in natural units."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn.model_selection import train_test_split

Data = tuple[np.ndarray, np.ndarray]
Net = Callable[[Any, jax.Array], jax.Array]


class Task(NamedTuple):
    """A training: its rows, its batches, its start by a seed, its loss, and its score in points on held-out rows."""

    train: Data
    test: Data
    batch_size: int
    start: Callable[[int], Any]
    loss: Callable[[Any, Any], jax.Array]
    score: Callable[[Any, Any], jax.Array]


def split(x: Any, y: Any, share: float = 0.25) -> tuple[Data, Data]:
    """Hold some rows out."""
    dtype = np.int32 if np.asarray(y).dtype.kind == "i" else np.float32
    rows: Any = train_test_split(np.asarray(x, np.float32), np.asarray(y, dtype), test_size=share, random_state=0)
    return (rows[0], rows[2]), (rows[1], rows[3])


def standard(x: np.ndarray) -> np.ndarray:
    """Divide columns by their standard deviations."""
    return (x - x.mean(0)) / (x.std(0) + 1e-8)


# ---------------------------------------------------------------------------------------------------------- networks


def dense(key: jax.Array, inputs: int, outputs: int, gain: float = 2.0) -> dict[str, jax.Array]:
    """Return a layer with normal weights."""
    return {"w": jax.random.normal(key, (inputs, outputs)) * (gain / inputs) ** 0.5, "b": jnp.zeros(outputs)}


def affine(layer: Any, x: jax.Array) -> jax.Array:
    return x @ layer["w"] + layer["b"]


def layers(*sizes: int) -> Callable[[int], list[dict[str, jax.Array]]]:
    """Return the start of a multilayer perceptron."""

    def start(seed: int) -> list[dict[str, jax.Array]]:
        keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
        return [dense(key, i, o) for key, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)]

    return start


def perceptron(params: Sequence[Any], x: jax.Array, activation: Any = jax.nn.relu) -> jax.Array:
    for layer in params[:-1]:
        x = activation(affine(layer, x))
    return affine(params[-1], x)


def classifies(net: Net) -> tuple[Any, Any]:
    """Return the cross entropy of a network, and its accuracy."""
    error = optax.softmax_cross_entropy_with_integer_labels
    accuracy = lambda p, rows: 100 * jnp.mean(jnp.argmax(net(p, rows[0]), -1) == rows[1])
    return lambda p, batch: jnp.mean(error(net(p, batch[0]), batch[1])), accuracy


def regresses(net: Net) -> tuple[Any, Any]:
    """Return the squared error of a network, and R2."""
    loss = lambda p, batch: jnp.mean((net(p, batch[0])[:, 0] - batch[1]) ** 2)
    return loss, lambda p, rows: 100 * (1 - loss(p, rows) / jnp.var(rows[1]))


def normed(scale: Any, x: jax.Array) -> jax.Array:
    """Return a layer norm."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5) * scale["g"] + scale["b"]


def norm(size: int) -> dict[str, jax.Array]:
    return {"g": jnp.ones(size), "b": jnp.zeros(size)}


# ------------------------------------------------------------------------------------------------------------- tasks


def digits() -> tuple[Data, Data]:
    x, y = datasets.load_digits(return_X_y=True)
    return split(np.asarray(x) / 16, y)


def digits_mlp() -> Task:
    return Task(*digits(), 64, layers(64, 64, 64, 64, 64, 10), *classifies(perceptron))


def digits_softmax() -> Task:
    start = lambda seed: {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
    return Task(*digits(), 32, start, *classifies(affine))


def digits_cnn() -> Task:
    def start(seed: int) -> Any:
        first, second, last = jax.random.split(jax.random.key(seed), 3)
        weights = lambda key, shape: jax.random.normal(key, shape) * (2 / np.prod(shape[:3])) ** 0.5
        convolutions = [(weights(first, (3, 3, 1, 8)), jnp.zeros(8)), (weights(second, (3, 3, 8, 16)), jnp.zeros(16))]
        return {"convolutions": convolutions, "last": dense(last, 64, 10)}

    def net(params: Any, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 8, 8, 1)
        for weights, bias in params["convolutions"]:
            order = ("NHWC", "HWIO", "NHWC")
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, weights, (2, 2), "SAME", dimension_numbers=order) + bias)
        return affine(params["last"], x.reshape(len(x), -1))

    return Task(*digits(), 64, start, *classifies(net))


def digits_autoencoder() -> Task:
    (x, _), (held, _) = digits()
    net = lambda p, x: jax.nn.sigmoid(perceptron(p, x))
    loss = lambda p, batch: jnp.mean(jnp.sum((net(p, batch[0]) - batch[1]) ** 2, -1))
    score = lambda p, rows: 100 * (1 - loss(p, rows) / jnp.sum(jnp.var(rows[0], axis=0)))
    return Task((x, x), (held, held), 64, layers(64, 32, 8, 32, 64), loss, score)


def classes(rows: int, columns: int, **options: Any) -> tuple[Data, Data]:
    x, y = datasets.make_classification(rows, columns, **options)
    return split(standard(np.asarray(x)), y)


def clusters() -> Task:
    options = {"n_informative": 20, "n_redundant": 10, "n_classes": 7, "n_clusters_per_class": 3, "flip_y": 0.02}
    return Task(*classes(20000, 54, **options, random_state=3), 256, layers(54, 64, 64, 7), *classifies(perceptron))


def imbalanced() -> Task:
    options = {"n_informative": 10, "n_clusters_per_class": 3, "weights": [0.96], "class_sep": 0.8, "flip_y": 0.01}
    loss, _ = classifies(perceptron)

    def balanced(params: Any, rows: Any) -> jax.Array:
        named, labels = jnp.argmax(perceptron(params, rows[0]), -1), rows[1]
        right = [jnp.sum((named == k) & (labels == k)) / jnp.sum(labels == k) for k in (0, 1)]
        return 50 * (right[0] + right[1])

    return Task(*classes(10000, 30, **options, random_state=5), 128, layers(30, 32, 32, 2), loss, balanced)


def residual() -> Task:
    rows = classes(6000, 40, n_informative=15, n_classes=5, n_clusters_per_class=2, class_sep=1.2, random_state=11)

    def start(seed: int) -> Any:
        keys = jax.random.split(jax.random.key(seed), 8)
        blocks = [
            {"ln": norm(48), "up": dense(keys[2 * k], 48, 96), "down": dense(keys[2 * k + 1], 96, 48, 0.2)}
            for k in range(3)
        ]
        return {"first": dense(keys[6], 40, 48), "blocks": blocks, "last": dense(keys[7], 48, 5, 1.0)}

    def net(params: Any, x: jax.Array) -> jax.Array:
        x = affine(params["first"], x)
        for block in params["blocks"]:
            x = x + affine(block["down"], jax.nn.gelu(affine(block["up"], normed(block["ln"], x))))
        return affine(params["last"], x)

    return Task(*rows, 64, start, *classifies(net))


def moons() -> Task:
    return Task(
        *split(*datasets.make_moons(1000, noise=0.2, random_state=1)), 32, layers(2, 32, 32, 2), *classifies(perceptron)
    )


def wine() -> Task:
    """Classify wines by inputs in their own units, from 0.1 to 1700."""
    rows: Any = datasets.load_wine(return_X_y=True)
    return Task(*split(*rows), 16, layers(13, 32, 3), *classifies(perceptron))


def cancer() -> Task:
    """Classify tumours by inputs in their own units, from 0.001 to 4000."""
    start = lambda seed: {"w": jnp.zeros((30, 2)), "b": jnp.zeros(2)}
    rows: Any = datasets.load_breast_cancer(return_X_y=True)
    return Task(*split(*rows), 32, start, *classifies(affine))


def diabetes() -> Task:
    """Predict a disease's progress in its own units, up to 346."""
    x, y = datasets.load_diabetes(return_X_y=True)
    return Task(*split(standard(np.asarray(x)), y), 32, layers(10, 32, 1), *regresses(perceptron))


def friedman() -> Task:
    rows = split(*datasets.make_friedman1(2400, noise=0.5, random_state=2))
    return Task(*rows, 64, layers(10, 64, 64, 1), *regresses(perceptron))


def sine() -> Task:
    draws = np.random.default_rng(2)
    x = draws.uniform(-3, 3, (1200, 1))
    rows = split(x, np.sin(3 * x[:, 0]) + 0.1 * draws.normal(size=1200))
    return Task(*rows, 32, layers(1, 64, 64, 1), *regresses(lambda p, x: perceptron(p, x, jnp.tanh)))


def factorisation() -> Task:
    """Predict ratings of 200 users for 150 items by eight factors."""
    draws = np.random.default_rng(0)
    u, v, i, j = draws.normal(size=(200, 4)), draws.normal(size=(150, 4)), *draws.integers(0, 150, (2, 12000))
    y = 3.5 + 0.25 * (u[i] * v[j]).sum(1) + 0.3 * draws.normal(size=12000)

    def start(seed: int) -> Any:
        keys = jax.random.split(jax.random.key(seed))
        factors = [0.1 * jax.random.normal(key, (size, 8)) for key, size in zip(keys, (200, 150), strict=True)]
        return {"users": factors[0], "items": factors[1], "mean": jnp.zeros(())}

    def net(params: Any, x: jax.Array) -> jax.Array:
        user, item = x.astype(jnp.int32).T
        return (jnp.sum(params["users"][user] * params["items"][item], 1) + params["mean"])[:, None]

    return Task(*split(np.stack([i, j], 1), y), 128, start, *regresses(net))


def poisson() -> Task:
    draws = np.random.default_rng(3)
    x = draws.normal(size=(3000, 12))
    rows = split(x, draws.poisson(np.exp(x @ draws.normal(size=12) * 0.4 + 1)).astype(float))
    rate = lambda p, x: x @ p["w"] + p["b"]
    loss = lambda p, batch: jnp.mean(jnp.exp(jnp.minimum(rate(p, batch[0]), 12.0)) - batch[1] * rate(p, batch[0]))

    def score(params: Any, rows: Any) -> jax.Array:
        """The share of the deviance that is explained."""
        fixed = {"w": jnp.zeros(12), "b": jnp.log(jnp.mean(rows[1]))}
        best = jnp.mean(rows[1] - rows[1] * jnp.log(jnp.maximum(rows[1], 1e-9)))
        return 100 * (1 - (loss(params, rows) - best) / (loss(fixed, rows) - best))

    return Task(*rows, 64, lambda seed: {"w": jnp.zeros(12), "b": jnp.zeros(())}, loss, score)


def line() -> Task:
    """A linear regression whose inputs are thousandths."""
    draws = np.random.default_rng(4)
    x = draws.normal(size=(1000, 10))
    rows = split(1e-3 * x, x @ draws.normal(size=10) + 5 + 0.1 * draws.normal(size=1000))
    net = lambda p, x: affine(p, x)[:, None]
    return Task(*rows, 32, lambda seed: {"w": jnp.zeros(10), "b": jnp.zeros(())}, *regresses(net))


def characters(length: int = 16, width: int = 32, heads: int = 4) -> Task:
    """A transformer of one block that predicts the next character of Python's own help."""
    text = "".join(pydoc_data.topics.topics.values())[:60000].lower()
    known = {letter: min(number, 63) for number, letter in enumerate(sorted(set(text)))}
    codes, draws = np.array([known[letter] for letter in text], np.int32), np.random.default_rng(0)

    def windows(part: np.ndarray, count: int) -> Data:
        begins = draws.integers(0, len(part) - length - 1, count)
        rows = part[begins[:, None] + np.arange(length + 1)]
        return rows[:, :-1], rows[:, 1:]

    def start(seed: int) -> Any:
        keys = jax.random.split(jax.random.key(seed), 7)
        normal = lambda key, shape, size: size * jax.random.normal(key, shape)
        return {
            "letters": normal(keys[0], (64, width), 0.02),
            "places": normal(keys[1], (length, width), 0.02),
            "norms": [norm(width) for _ in range(3)],
            "attention": normal(keys[2], (width, 3 * width), width**-0.5),
            "out": normal(keys[3], (width, width), 0.5 * width**-0.5),
            "up": dense(keys[4], width, 2 * width),
            "down": dense(keys[5], 2 * width, width, 0.5),
            "last": dense(keys[6], width, 64, 1.0),
        }

    def net(params: Any, letters: jax.Array) -> jax.Array:
        x = params["letters"][letters] + params["places"]
        parts = jnp.split(normed(params["norms"][0], x) @ params["attention"], 3, -1)
        query, key, value = (a.reshape(*a.shape[:2], heads, -1).transpose(0, 2, 1, 3) for a in parts)
        weights = query @ key.transpose(0, 1, 3, 2) / (width // heads) ** 0.5
        weights = jnp.where(jnp.tril(jnp.ones((length, length), bool)), weights, -1e9)
        x = x + (jax.nn.softmax(weights) @ value).transpose(0, 2, 1, 3).reshape(x.shape) @ params["out"]
        x = x + affine(params["down"], jax.nn.gelu(affine(params["up"], normed(params["norms"][1], x))))
        return affine(params["last"], normed(params["norms"][2], x))

    return Task(windows(codes[:48000], 640), windows(codes[48000:], 400), 32, start, *classifies(net))


TASKS: dict[str, Callable[[], Task]] = {
    "digits, deep network": digits_mlp,
    "digits, softmax": digits_softmax,
    "digits, convolutions": digits_cnn,
    "digits, autoencoder": digits_autoencoder,
    "clusters, network": clusters,
    "imbalanced classes": imbalanced,
    "residual network": residual,
    "moons": moons,
    "wine, raw inputs": wine,
    "cancer, raw inputs, logistic": cancer,
    "diabetes, raw targets": diabetes,
    "friedman1": friedman,
    "sine, tanh": sine,
    "factorisation": factorisation,
    "poisson regression": poisson,
    "line, inputs of 1e-3": line,
    "characters, transformer": characters,
}
