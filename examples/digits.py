"""Reads handwritten digits: a small network, trained on shuffled mini-batches with a cyclical learning rate."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gdopt

# 1797 pictures of 8 x 8 pixels; a quarter is held out.
X, y = load_digits(return_X_y=True)
X, X_test, y, y_test = train_test_split(X / 16, y, test_size=0.25, stratify=y, random_state=0)

# The parameters can be any pytree, and the network and its loss any functions of it.
key1, key2 = jax.random.split(jax.random.key(0))
params = {
    "w1": jax.random.normal(key1, (64, 128)) * jnp.sqrt(2 / 64),
    "b1": jnp.zeros(128),
    "w2": jax.random.normal(key2, (128, 10)) * jnp.sqrt(2 / 128),
    "b2": jnp.zeros(10),
}


def predict(params, x):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss(params, batch):
    x, labels = batch
    log_probabilities = jax.nn.log_softmax(predict(params, x))
    return -jnp.mean(log_probabilities[jnp.arange(len(labels)), labels])


# Smith's recipe (arXiv 1506.01186): rise for a few epochs from a quarter of the highest rate to that rate, fall back,
# make the next cycle half as high, and end with the third.
batch_size = 64
steps_per_epoch = len(X) // batch_size
rate = gdopt.schedules.triangular2(0.25, 1.0, step_size_up=4 * steps_per_epoch)

result = gdopt.minimize(
    loss,
    params,
    data=(X, y),
    batch_size=batch_size,
    epochs=24,
    learning_rate=rate,
    progress=True,
    record_params=True,
)
print(result.message)

accuracy = jnp.mean(predict(result.params, X_test).argmax(axis=1) == y_test)
print(f"It reads {accuracy:.1%} of the {len(y_test)} held-out digits correctly.")

picture, animation = Path("digits.png").resolve(), Path("digits.gif").resolve()
gdopt.plot.descent(result).savefig(picture, dpi=150)
print(f"{picture} shows its descent.")
# The contours are those of the loss of a few hundred digits, in the plane in which the params moved most.
gdopt.plot.animate(loss, result, animation, args=((X[:300], y[:300]),))
print(f"{animation} shows the way of its params.")

if accuracy < 0.95:
    sys.exit("Error: 95 % should be within reach; something is wrong.")
