"""
Read digits with Flax nnx
=========================

A network with batch normalisation and dropout, in Flax's nnx. The running statistics
travel as ``state``, and a fresh random key comes at each step.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split

import gdopt

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
x, x_test, y, y_test = train_test_split(
    images, labels, test_size=0.25, stratify=labels, random_state=0
)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.3)
        self.last = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x, rngs=None):
        hidden = nnx.relu(self.norm(self.first(x)))
        return self.last(self.dropout(hidden, rngs=rngs))


# %%
# ``nnx.split`` parts what is optimised from the rest. The loss puts both together, and
# returns the new statistics beside its value.

graph, params, statistics = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)


def loss(params, batch, state, key):
    x, label = batch
    network = nnx.merge(graph, params, state)
    logits = network(x, rngs=nnx.Rngs(key))
    value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label))
    return value, nnx.state(network, nnx.Not(nnx.Param))


result = gdopt.minimize(
    loss, params, data=(x, y), batch_size=64, epochs=15, state=statistics, with_key=True
)
print(result.message)

# %%
# ``result.status`` is MAX_STEPS, a success for mini-batches: all epochs are done, and
# their mean loss fell. The trained network is made of ``result.params`` and the
# ``result.state`` that belongs to them.

network = nnx.view(
    nnx.merge(graph, result.params, result.state),
    deterministic=True,
    use_running_average=True,
)
guess = np.asarray(network(x_test)).argmax(axis=1)
accuracy = np.mean(guess == y_test)
print(f"held out: {accuracy:.1%} are right")
assert result.success
assert accuracy > 0.95

# %%
# The statistics are those of the data: compare the running mean of one hidden layer
# with its mean over all pictures.

hidden = np.asarray(network.first(x)).mean(axis=0)
running = np.asarray(network.norm.mean[...])
apart = np.abs(running - hidden).max()
print(f"running means differ from those of all pictures by at most {apart:.2f}")
assert apart < 0.5

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
epochs = result.history.loss[:-1].reshape(-1, result.steps_per_epoch).mean(axis=1)
left.semilogy(np.arange(1, 16), epochs, "o-")
left.set(
    xlabel="epoch",
    ylabel="mean loss with dropout",
    title=f"{result.status.name} after {result.steps} steps",
)
right.imshow(np.log1p(confusion_matrix(y_test, guess)), cmap="Blues")
for (i, j), count in np.ndenumerate(confusion_matrix(y_test, guess)):
    if count:
        right.text(
            j,
            i,
            count,
            ha="center",
            va="center",
            color="white" if count > 10 else "black",
        )
right.set(
    xlabel="read as",
    ylabel="digit",
    xticks=range(10),
    yticks=range(10),
    title=f"{accuracy:.1%} are right",
)
plt.show()
