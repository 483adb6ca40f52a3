"""Finds learning rates: a range test for the digits network, its suggestion, and a training without a rate."""

import sys

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gdopt

X, y = load_digits(return_X_y=True)
X, X_test, y, y_test = train_test_split(X / 16, y, test_size=0.25, stratify=y, random_state=0)

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
    return optax.softmax_cross_entropy_with_integer_labels(predict(params, x), labels).mean()


# A short training with a rising rate until the loss blows up, three times side by side, each shuffled differently.
test = gdopt.lr_find(loss, params, data=(X, y), batch_size=64, repeats=3)
print(test)
gdopt.plot.lr_find(test).savefig("finder.png", dpi=150)
print("finder.png shows the test.")

# The test works for any optimizer that takes a learning rate.
found = gdopt.lr_find(loss, params, data=(X, y), batch_size=64, optimizer=optax.adam)
print(f"The suggestion for Adam is {found.suggestion:.2g}.")

# Without a rate, minimize runs a range test first, and then a schedule based on its suggestion.
result = gdopt.minimize(loss, params, data=(X, y), batch_size=64, epochs=30)
print(result.message)
accuracy = jnp.mean(predict(result.params, X_test).argmax(axis=1) == y_test)
print(f"It reads {accuracy:.1%} of the {len(y_test)} held-out digits correctly.")

if accuracy < 0.95:
    sys.exit("Error: 95 % should be within reach; something is wrong.")
