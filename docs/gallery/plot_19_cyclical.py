"""
Cyclical rates against one cycle
================================

A constant learning rate, one that cycles, or one cycle: which trains a small network
best in 20 epochs? Each is tried at the rate that the finder suggests, and at a rate
that is too high.
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
# All runs are plain gradient descent with the same batches. A schedule is a function of
# the step. The highest rate is the finder's suggestion, and then three times as much.

suggestion = gdopt.lr_find(loss, start, data=(x, y), batch_size=64).suggestion
assert suggestion is not None
epoch = len(x) // 64


def schedules(highest):
    return {
        "constant": gdopt.schedules.constant(highest),
        "triangular2": gdopt.schedules.triangular2(highest / 10, highest, 2 * epoch),
        "one cycle": gdopt.schedules.one_cycle(highest, total_steps=20 * epoch),
    }


def train(learning_rate):
    options = {"data": (x, y), "batch_size": 64, "epochs": 20, "optimizer": gdopt.gd}
    return gdopt.minimize(loss, start, learning_rate=learning_rate, **options)


results = {
    highest: {name: train(rate) for name, rate in schedules(highest).items()}
    for highest in (suggestion, 3 * suggestion)
}

# %%
# Each ``result.status`` is MAX_STEPS: the epochs are done. That is a success if the
# loss is not above its start, so a network that only guesses still passes. Look at what
# the runs are for, the held-out digits. A linear model of scikit-learn is the mark.


def accuracy(params):
    return np.mean(np.asarray(network(params, x_test)).argmax(axis=1) == y_test)


for highest, runs in results.items():
    for name, run in runs.items():
        read = accuracy(run.params)
        print(
            f"up to {highest:.2g}, {name:12} {run.status.name} {run.success} {read:.1%}"
        )
linear = LogisticRegression(max_iter=200).fit(x, y).score(x_test, y_test)
print(f"a linear model {linear:.1%}")
for run in results[suggestion].values():
    assert run.success
    assert accuracy(run.params) > linear - 0.03

# %%
# At the suggestion all three do well here, and a constant rate is no worse than a
# cycle. Their difference shows when the rate is too high: who stays there may lose the
# network, and who only visits may come back.

figure, panels = plt.subplots(
    2, 2, sharex=True, sharey="row", figsize=(9, 6), layout="constrained"
)
for (top, bottom), (highest, runs) in zip(panels.T, results.items(), strict=True):
    for name, run in runs.items():
        means = run.history.loss[:-1].reshape(-1, epoch).mean(axis=1)
        label = f"{name}: {accuracy(run.params):.1%}"
        top.semilogy(np.arange(20) + 0.5, means, label=label)
        bottom.plot(np.arange(20 * epoch) / epoch, run.history.learning_rate[:-1])
    top.set(ylabel="mean loss of an epoch", title=f"highest rate {highest:.2g}")
    top.legend(title="held-out digits that are right")
    bottom.set(xlabel="epoch", ylabel="learning rate")
plt.show()
