"""
Read digits with Flax linen
===========================

A network in Flax's linen, whose params are a plain dict. Held-out digits stop the
training at the right time, and pick the params that come back.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

import gdopt

# %%
# Only 400 digits are for training, so that a network soon learns them by heart. 300
# choose the epoch, and the others are for the test.

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
x, rest_x, y, rest_y = train_test_split(
    images, labels, train_size=400, stratify=labels, random_state=0
)
valid, test = (rest_x[:300], rest_y[:300]), (rest_x[300:], rest_y[300:])


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


def loss(params, batch):
    """The loss, and an aux: its scalars are averaged for each epoch."""
    x, label = batch
    logits = Network().apply({"params": params}, x)
    accuracy = jnp.mean(logits.argmax(axis=1) == label)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label)), {
        "accuracy": accuracy
    }


# %%
# ``patience=10``: stop after ten epochs without a new low of the validation loss.

start = Network().init(jax.random.key(0), x)["params"]
result = gdopt.minimize(
    loss,
    start,
    has_aux=True,
    data=(x, y),
    batch_size=40,
    epochs=200,
    optimizer=optax.adam,
    learning_rate=0.01,
    validation=valid,
    patience=10,
)
print(result.message)

# %%
# ``result.status`` is EARLY_STOPPED, which is a success. scikit-learn's network of the
# same size is trained by Adam, too.

guess = np.asarray(Network().apply({"params": result.params}, test[0])).argmax(axis=1)
accuracy = np.mean(guess == test[1])
model = MLPClassifier(
    (128,), learning_rate_init=0.01, early_stopping=True, max_iter=200, random_state=0
)
known = model.fit(x, y).score(*test)
print(f"test: {accuracy:.1%} are right; with scikit-learn {known:.1%}")
assert result.status == gdopt.Status.EARLY_STOPPED
assert accuracy > 0.9
assert accuracy > known - 0.03

# %%
# Training goes on to fall, and validation does not. The dot is what comes back.

history = result.history
epoch = 1 + np.arange(len(history.validation_loss))
best = history.validation_loss.argmin()
means = (
    history.loss[: len(epoch) * result.steps_per_epoch]
    .reshape(len(epoch), -1)
    .mean(axis=1)
)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.semilogy(epoch, means, label="training")
left.semilogy(epoch, history.validation_loss, label="validation")
left.plot(epoch[best], history.validation_loss[best], "ko", label="returned")
left.set(
    xlabel="epoch",
    ylabel="mean loss",
    title=f"{result.status.name} after {result.steps} steps",
)
left.legend()
right.plot(epoch, history.metrics["accuracy"][: len(epoch)], label="training")
right.plot(epoch, history.validation_metrics["accuracy"], label="validation")
right.axhline(accuracy, color="black", linewidth=0.8, label="test, returned params")
right.set(
    xlabel="epoch", ylabel="share of right answers", ylim=(0.8, 1.01), title="Accuracy"
)
right.legend(loc="lower right")
plt.show()
