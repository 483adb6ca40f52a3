"""A Flax nnx module as params, with batch normalisation and dropout, reads digits. `pip install flax` first."""

import sys

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gdopt

# 1797 pictures of 8 x 8 pixels; a quarter is held out.
X, y = load_digits(return_X_y=True)
X = (X / 16).astype(np.float32)
X, X_test, y, y_test = train_test_split(X, y, test_size=0.25, stratify=y, random_state=0)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.BatchNorm(128, momentum=0.0, rngs=rngs)  # 0: its statistics are those of the last pass
        self.dropout = nnx.Dropout(0.2)
        self.last = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x, rngs=None):
        hidden = nnx.relu(self.norm(self.first(x)))
        return self.last(self.dropout(hidden, rngs=rngs))


def loss(model, batch, key):
    x, labels = batch
    # Each training pass writes to the batch statistics. Writes of a loss do not outlast its step, so gdopt raises an
    # error for them. A copy may be written to.
    logits = nnx.clone(model)(x, rngs=nnx.Rngs(key))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# Pass the module itself. Each Param is optimised, as by nnx.Optimizer(model, optax.adam(0.003), wrt=nnx.Param), and all
# other variables are left alone. with_key gives the loss a fresh random key at each step, for the dropout.
result = gdopt.minimize(
    loss,
    Network(nnx.Rngs(0)),
    data=(X, y),
    batch_size=64,
    epochs=20,
    optimizer=optax.adam,
    learning_rate=0.003,
    with_key=True,
)
print(result.message)

# The result holds a module. One more pass sets its statistics to those of all pictures.
model = result.params
model(X, rngs=nnx.Rngs(0))
model.eval()  # without dropout, and with these statistics

accuracy = jnp.mean(model(X_test).argmax(axis=1) == y_test)
print(f"It reads {accuracy:.1%} of the {len(y_test)} held-out digits correctly.")

if accuracy < 0.95:
    sys.exit("Error: 95 % should be within reach; something is wrong.")
