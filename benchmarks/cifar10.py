"""CIFAR-10 from its binary files, and the small network that Smith trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

Rows = tuple[np.ndarray, np.ndarray]

SIDE, CHANNELS = 32, 3
_RECORD = 1 + CHANNELS * SIDE * SIDE  # a label, then the red, the green and the blue plane, row by row
_FILTERS = ((5, CHANNELS, 32), (5, 32, 32), (5, 32, 64))
_DEVIATIONS = (1e-4, 1e-2, 1e-2, 0.1, 0.1)  # of the weights at the start, as in Caffe's "quick" network


def load(directory: str | Path) -> tuple[Rows, Rows]:
    """The rows for training and for testing: images (n, 32, 32, 3) of bytes, labels (n,) of int32.

    The directory is that of the "binary version": data_batch_1.bin to data_batch_5.bin, and test_batch.bin.
    """
    directory = Path(directory)
    training = [read(directory / f"data_batch_{number}.bin") for number in range(1, 6)]
    images, labels = (np.concatenate(parts) for parts in zip(*training, strict=True))
    return (images, labels), read(directory / "test_batch.bin")


def read(path: Path) -> Rows:
    """The rows of one file."""
    content = np.fromfile(path, np.uint8)
    if not content.size or content.size % _RECORD:
        raise ValueError(f"{path} has {content.size} bytes, which are not records of {_RECORD}: fetch it again.")
    records = content.reshape(-1, _RECORD)
    images = records[:, 1:].reshape(-1, CHANNELS, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int32)


def start(seed: int) -> list[dict[str, jax.Array]]:
    """Params of three convolutions and two dense layers."""
    shapes = [(side, side, i, o) for side, i, o in _FILTERS] + [(4 * 4 * 64, 64), (64, 10)]
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [
        {"w": deviation * jax.random.normal(key, shape), "b": jnp.zeros(shape[-1])}
        for key, shape, deviation in zip(keys, shapes, _DEVIATIONS, strict=True)
    ]


def outputs(params: Any, images: jax.Array) -> jax.Array:
    """Logits of ten classes, from bytes."""
    x = images.astype(jnp.float32) - 120.0  # about their mean, and in Caffe's scale
    first, *others = params[:3]
    x = jax.nn.relu(_pooled(_convolved(x, first), lax.max, -jnp.inf))
    for layer in others:
        x = _pooled(jax.nn.relu(_convolved(x, layer)), lax.add, 0.0) / 9
    x = x.reshape(len(x), -1)
    for layer in params[3:]:
        x = x @ layer["w"] + layer["b"][None]
    return x


def _convolved(x: jax.Array, layer: Any) -> jax.Array:
    x = lax.conv_general_dilated(x, layer["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return x + layer["b"][None, None, None]


def _pooled(x: jax.Array, combine: Any, start: float) -> jax.Array:
    return lax.reduce_window(x, start, combine, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")


def loss(params: Any, batch: Any) -> jax.Array:
    """The mean cross-entropy."""
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(outputs(params, images), labels).mean()


def accuracy(params: Any, rows: Rows, at_once: int = 1000) -> float:
    """The share of rows that are classified correctly."""
    images, labels = rows
    pieces = range(0, len(labels), at_once)
    return sum(int(_right(params, images[k : k + at_once], labels[k : k + at_once])) for k in pieces) / len(labels)


@jax.jit
def _right(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sum(jnp.argmax(outputs(params, images), axis=1) == labels)


def optimizer(learning_rate: Any) -> optax.GradientTransformation:
    """The optimizer of the paper: momentum 0.9, weight decay 0.004."""
    return optax.chain(optax.add_decayed_weights(0.004), optax.sgd(learning_rate, momentum=0.9))
