"""
What the learning-rate finder sees
==================================

A range test raises the rate until the loss blows up, and suggests one from the curve.
Is that a good one? Train with 13 rates around it, and lay the outcome over the curve.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale

import gdopt

# %%
# A logistic regression by mini-batches.

X, y = load_breast_cancer(return_X_y=True)
data = scale(X).astype(np.float32), y.astype(np.float32)


def loss(w, batch):
    x, label = batch
    logits = x @ w
    return jnp.mean(jax.nn.softplus(logits) - label * logits)


start = np.zeros(30, np.float32)
test = gdopt.lr_find(loss, start, data=data, batch_size=32)
print(test)

# %%
# The status of a range test is DIVERGED, as it is meant to be: the loss blew up at the
# highest rate, so the curve shows both edges. If ``suggestion`` is None, the message
# says why.
#
# Now the trainings. Another rate compiles nothing, so thirteen cost little more than
# one.

rates = test.suggestion * np.logspace(-3, 1, 13)
runs = [
    gdopt.minimize(
        loss,
        start,
        data=data,
        batch_size=32,
        epochs=5,
        optimizer=gdopt.gd,
        learning_rate=rate,
    )
    for rate in rates
]
for rate, run in zip(rates, runs, strict=True):
    print(f"{rate:8.4f} {run.status.name}")

# %%
# The loss over all rows after five epochs checks the suggestion. Far below it five
# epochs are too few, and above it the noise of the batches keeps the loss up.

final = np.array([loss(run.params, data) for run in runs])
suggested = final[np.argmin(np.abs(rates / test.suggestion - 1))]
print(f"at the suggestion: {suggested:.4f}; best of 13: {np.nanmin(final):.4f}")
assert test.suggestion is not None
assert suggested < 2 * np.nanmin(final)

# %%
# ``gdopt.plot.lr_find`` draws the test: the loss at each rate, and where the rules
# point.

figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
gdopt.plot.lr_find(test, ax=axes)
axes.plot(rates, final, "ks", markersize=5, label="after 5 epochs at this rate")
axes.legend()
plt.show()
