"""
Cyclical rates against one cycle
================================

Which learning rate trains a small network best in 20 epochs: a constant one, one that
cycles, one cycle, or none at all? Each draws its descent here, and reads the same
held-out digits.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

import gdopt

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
x, x_test, y, y_test = train_test_split(
    images, labels, test_size=0.25, stratify=labels, random_state=0
)


def network(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss(params, batch):
    x, label = batch
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(network(params, x), label)
    )


draws = np.random.default_rng(0)
start = {
    "w1": draws.normal(0, 0.18, (64, 64)).astype(np.float32),
    "b1": np.zeros((1, 64), np.float32),
    "w2": draws.normal(0, 0.18, (64, 10)).astype(np.float32),
    "b2": np.zeros((1, 10), np.float32),
}

# %%
# All four use plain gradient descent (the last one chooses its optimizer itself), the
# same batches and as many steps. A schedule is a function of the step. Another one of
# the same kind compiles nothing.

epoch = len(x) // 64
schedules = {
    "constant": gdopt.schedules.constant(0.1),
    "triangular2": gdopt.schedules.triangular2(0.05, 0.6, step_size_up=2 * epoch),
    "one cycle": gdopt.schedules.one_cycle(0.6, total_steps=20 * epoch),
}
options = {"data": (x, y), "batch_size": 64, "epochs": 20}
results = {
    name: gdopt.minimize(loss, start, optimizer=gdopt.gd, learning_rate=rate, **options)
    for name, rate in schedules.items()
}
results["none: gdopt's choice"] = gdopt.minimize(loss, start, **options)

# %%
# Each ``result.status`` is MAX_STEPS, a success for mini-batches: the epochs are done,
# and the loss fell. To compare runs, look at what they are for, the held-out digits.

linear = LogisticRegression(max_iter=200).fit(x, y).score(x_test, y_test)
accuracies = {}
for name, result in results.items():
    accuracies[name] = np.mean(
        np.asarray(network(result.params, x_test)).argmax(axis=1) == y_test
    )
    last = result.history.loss[-epoch:].mean()
    print(f"{name:22} {result.status.name}, last loss {last:.4f}")
    print(f"{'':22} held out {accuracies[name]:.1%}")
    assert result.success
    assert accuracies[name] > 0.92
print(f"{'a linear model':22} held out {linear:.1%}")
assert max(accuracies.values()) > linear - 0.01

# %%
# The mean loss of each epoch, above the rates. High rates lead far in few steps. The
# loss settles while the rate comes down.

figure, (top, bottom) = plt.subplots(
    2, 1, sharex=True, height_ratios=[2, 1], figsize=(7, 6), layout="constrained"
)
for name, result in results.items():
    means = result.history.loss[:-1].reshape(-1, epoch).mean(axis=1)
    top.semilogy(np.arange(20) + 0.5, means, label=f"{name}: {accuracies[name]:.1%}")
    bottom.plot(
        np.arange(result.steps) / epoch, result.history.learning_rate[: result.steps]
    )
top.set(
    ylabel="mean loss of an epoch",
    title="Four ways to choose the rate, and the held-out accuracy",
)
top.legend()
bottom.set(xlabel="epoch", ylabel="learning rate")
plt.show()
