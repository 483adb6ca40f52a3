"""
A mixture by maximum likelihood
===============================

The petals of irises come in two lengths. Two normal distributions, fitted by the
likelihood alone and without EM, find them.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_iris
from sklearn.mixture import GaussianMixture

import gdopt

# %%
# Lengths in cm of 150 flowers. The two groups are not labelled.

lengths = load_iris().data[:, 2].astype(np.float32)

# %%
# The params are free numbers: logits of the shares, means, and logarithms of the
# standard deviations. ``logsumexp`` adds the two densities without underflow.


def log_densities(params, x):
    z = (x[:, None] - params["means"][None]) * jnp.exp(-params["log_spreads"])[None]
    each = -(z**2) / 2 - params["log_spreads"][None] - 0.5 * jnp.log(2 * jnp.pi)
    return each + jax.nn.log_softmax(params["logits"])[None]


def loss(params, x):
    return -jnp.mean(jax.nn.logsumexp(log_densities(params, x), axis=1))


# %%
# The start is as naive as can be: two equal parts. That is a saddle, because the
# gradient is the same for both, so a descent that follows it alone ends with one wide
# bump. gdopt checks each end by the curvature. It finds a direction that leads further
# down, and goes on from there.

start = {
    "logits": jnp.zeros(2),
    "means": jnp.full(2, np.mean(lengths)),
    "log_spreads": jnp.zeros(2),
}
plain = gdopt.minimize(
    loss, start, args=(lengths,), optimizer=gdopt.gd, learning_rate=0.3, max_steps=500
)
print("A rate of one's own:", plain.message)
result = gdopt.minimize(loss, start, args=(lengths,), tol=1e-6)
print(result)

# %%
# ``result.status`` is CONVERGED, with the two parts apart. The run at a rate of its own
# stays on the saddle, and its status is no success. EM, with a good start of
# scikit-learn's, finds the same.

model = GaussianMixture(2, random_state=0, tol=1e-8, max_iter=1000).fit(
    lengths[:, None]
)
means = np.sort(result.params["means"])
known = model.score(lengths[:, None])
print(f"log likelihood {-result.loss:.5f}, EM of scikit-learn {known:.5f}")
print("means", means, "EM", np.sort(model.means_[:, 0]))
assert result.success
assert abs(-result.loss - known) < 1e-3
assert np.allclose(means, np.sort(model.means_[:, 0]), atol=0.02)

# %%
# The fitted density over the histogram, and its two parts.

x = np.linspace(0.5, 7.5, 300, dtype=np.float32)
parts = np.exp(log_densities(result.params, x))
figure, axes = plt.subplots(layout="constrained")
axes.hist(lengths, bins=40, density=True, color="silver", label="150 flowers")
axes.plot(x, parts.sum(axis=1), color="black", label="mixture")
axes.plot(x, parts[:, 0], "--", x, parts[:, 1], "--")
axes.set(xlabel="length of the petal (cm)", ylabel="density", title="Two kinds of iris")
axes.legend()
plt.show()
