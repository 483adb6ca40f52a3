"""
Read digits with equinox
========================

A convolutional network in equinox reads handwritten digits. The module itself is passed
as params, and the result holds a trained one. No learning rate is chosen.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

import gdopt

# %%
# 1797 pictures of 8 times 8 pixels. A quarter is held out.

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
x, x_test, y, y_test = train_test_split(
    images, labels, test_size=0.25, stratify=labels, random_state=0
)


class Network(eqx.Module):
    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    last: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(1, 8, kernel_size=3, padding=1, key=keys[0])
        self.second = eqx.nn.Conv2d(
            8, 16, kernel_size=3, stride=2, padding=1, key=keys[1]
        )
        self.last = eqx.nn.Linear(256, 10, key=keys[2])

    def __call__(self, image):
        hidden = jax.nn.relu(self.second(jax.nn.relu(self.first(image))))
        return self.last(hidden.ravel())


def loss(network, batch):
    image, label = batch
    logits = jax.vmap(network)(image)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label))


# %%
# Without an optimizer and a rate, gdopt plans one cycle of AdamW over the epochs.

start = Network(jax.random.key(0))
result = gdopt.minimize(loss, start, data=(x, y), batch_size=64, epochs=12)
print(result.message)

# %%
# ``result.status`` is MAX_STEPS: the epochs that were asked for are done, which is a
# success for mini-batches. It is no word on the held-out digits. A linear model of
# scikit-learn is the mark to beat.

guess = np.asarray(jax.vmap(result.params)(x_test)).argmax(axis=1)
accuracy = np.mean(guess == y_test)
linear = (
    LogisticRegression(max_iter=200)
    .fit(x.reshape(len(x), -1), y)
    .score(x_test.reshape(len(x_test), -1), y_test)
)
print(f"held out: {accuracy:.1%} are right; a linear model reads {linear:.1%}")
assert result.success
assert accuracy > 0.95

# %%
# Digits that it took for others.

wrong = np.flatnonzero(guess != y_test)[:8]
figure, panels = plt.subplots(
    1, len(wrong), figsize=(1.4 * len(wrong), 2), layout="constrained", squeeze=False
)
for axes, k in zip(panels[0], wrong, strict=True):
    axes.imshow(x_test[k, 0], cmap="gray_r")
    axes.set(xticks=[], yticks=[], xlabel=f"is {y_test[k]}", title=f"read {guess[k]}")
figure.suptitle(f"{accuracy:.1%} of the held-out digits are right, and these are not")
plt.show()
