"""
Variational inference
=====================

How sure is a regression of its line? A normal distribution over the weights is fitted
to the posterior by the evidence lower bound. The loss draws random numbers, so it is
another function at each step: ``with_key=True``, and no data.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gdopt

# %%
# Twenty points around a line (seed 0), with a known noise of 0.5. The weights have a
# standard normal prior. So the posterior is known exactly: a normal distribution, by
# the textbook formula. This checks the answer.

draws = np.random.default_rng(0)
x = draws.uniform(0.0, 3.0, 20).astype(np.float32)
y = (-0.5 + 0.8 * x + 0.5 * draws.normal(size=20)).astype(np.float32)
design = np.stack([np.ones(20), x], axis=1).astype(np.float32)
exact_covariance = np.linalg.inv(design.T @ design / 0.25 + np.eye(2))
exact_mean = exact_covariance @ design.T @ y / 0.25


# %%
# The distribution has a mean and a triangular factor with a positive diagonal. Each
# step draws 64 weights from it.


def factor(params):
    return (
        jnp.diag(jnp.exp(params["log_diagonal"]))
        + jnp.array([[0.0, 0.0], [1.0, 0.0]]) * params["below"]
    )


def loss(params, key):
    noise = jax.random.normal(key, (64, 2))
    weights = params["mean"] + noise @ factor(params).T
    log_likelihood = -jnp.sum((weights @ design.T - y) ** 2, axis=1) / (2 * 0.25)
    log_prior = -jnp.sum(weights**2, axis=1) / 2
    return -jnp.mean(log_likelihood + log_prior) - jnp.sum(params["log_diagonal"])


start = {"mean": jnp.zeros(2), "log_diagonal": jnp.zeros(2), "below": 0.0}
result = gdopt.minimize(
    loss, start, with_key=True, key=jax.random.key(1), max_steps=3000
)
print(result.message)

# %%
# ``result.status`` is MAX_STEPS. For a noisy loss that is a success: noise hides the
# minimum, so the run makes the steps that were asked for. gdopt planned its learning
# rates over these 3000 steps.

found = np.asarray(factor(result.params) @ factor(result.params).T)
print("mean      ", np.asarray(result.params["mean"]), "exact", exact_mean)
print(
    "covariance", found.round(4).tolist(), "exact", exact_covariance.round(4).tolist()
)
assert result.success
assert np.abs(result.params["mean"] - exact_mean).max() < 0.05
assert np.allclose(found, exact_covariance, atol=0.15 * exact_covariance.max())

# %%
# Ellipses of one and two standard deviations of both, and the noisy loss.

angle = np.linspace(0, 2 * np.pi, 100)
circle = np.stack([np.cos(angle), np.sin(angle)])
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
right.plot(result.history.loss, color="C0", linewidth=0.5)
right.set(
    xlabel="step",
    ylabel="minus evidence lower bound",
    yscale="log",
    title=f"{result.steps} noisy steps",
)
for name, mean, covariance, style in (
    ("exact posterior", exact_mean, exact_covariance, "k-"),
    ("fitted", np.asarray(result.params["mean"]), found, "C1--"),
):
    for radius in (1, 2):
        offset, slope = mean[:, None] + radius * np.linalg.cholesky(covariance) @ circle
        left.plot(offset, slope, style, label=name if radius == 1 else None)
left.set(xlabel="offset", ylabel="slope", title="One and two standard deviations")
left.legend()
plt.show()
