"""An equinox module as params: a network learns to read handwritten digits. `pip install equinox` first."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gdopt

# 1797 pictures of 8 x 8 pixels; a quarter is held out.
X, y = load_digits(return_X_y=True)
X = (X / 16).astype(np.float32)
X, X_test, y, y_test = train_test_split(X, y, test_size=0.25, stratify=y, random_state=0)


class Network(eqx.Module):
    mean: jax.Array
    layers: eqx.nn.MLP

    def __call__(self, x):
        return self.layers(x - self.mean)


layers = eqx.nn.MLP(64, 10, width_size=128, depth=1, activation=jax.nn.relu, key=jax.random.key(0))
model = Network(jnp.asarray(np.mean(X, axis=0)), layers)


def loss(model, batch):
    x, labels = batch
    logits = jax.vmap(model)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# Pass the module itself. Its float arrays are optimised; functions (relu) and numbers (the rate of a dropout) are
# carried along. The mean is an array, too, but it is not to be learned, so a mask of bools leaves it out.
trainable = eqx.tree_at(lambda model: model.mean, jax.tree.map(lambda _: True, model), replace=False)

# Without a learning rate, a range test finds one first.
result = gdopt.minimize(loss, model, data=(X, y), batch_size=64, epochs=20, trainable=trainable)
print(result.message)

# The result holds a new module. The original is unchanged.
before, after = (jnp.mean(jax.vmap(net)(X_test).argmax(axis=1) == y_test) for net in (model, result.params))
print(f"It reads {after:.1%} of the {len(y_test)} held-out digits correctly; at the start it was {before:.1%}.")

if after < 0.95:
    sys.exit("Error: 95 % should be within reach; something is wrong.")
