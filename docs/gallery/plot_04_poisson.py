"""
Poisson regression
==================

Count the disasters in British coal mines: how did their rate change over a century? A
Poisson model with a cubic trend of the log rate answers, and scikit-learn checks it.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.linear_model import PoissonRegressor

import gdopt

# %%
# Disasters with ten or more deaths, for each year from 1851 to 1962, after Jarrett, "A
# note on the intervals between coal-mining disasters", *Biometrika*, 1979.

counts = """4 5 4 1 0 4 3 4 0 6 3 3 4 0 2 6 3 3 5 4 5 3 1 4 4 1 5 5 3 4 2 5 2 2 3 4 2
1 3 2 2 1 1 1 1 3 0 0 1 0 1 1 0 0 3 1 0 3 2 2 0 1 1 1 0 1 0 1 0 0 0 2 1 0 0 0 1 1 0 2
3 3 1 1 2 1 1 1 1 2 3 3 0 0 0 1 4 0 0 0 1 0 0 0 0 0 1 0 0 1 0 1"""
counts = np.array(counts.split(), np.float32)
year = 1851 + np.arange(len(counts))

# %%
# The columns are powers of the time in centuries. They are not orthogonal, so plain
# gradient descent would crawl.

century = (year - 1906) / 100
X = np.stack([century, century**2, century**3], axis=1).astype(np.float32)


def log_rate(params, X):
    return X @ params["slopes"] + params["offset"]


def loss(params, X, counts):
    """The mean negative log likelihood, without the factorials of the counts."""
    return jnp.mean(jnp.exp(log_rate(params, X)) - counts * log_rate(params, X))


start = {"slopes": jnp.zeros(3), "offset": 0.0}
result = gdopt.minimize(loss, start, args=(X, counts), tol=1e-6)
plain = gdopt.minimize(
    loss, start, args=(X, counts), optimizer=gdopt.gd, learning_rate=0.5, max_steps=1000
)
print(result)
print("A rate of one's own:", plain.message)

# %%
# ``result.status`` tells the two runs apart: CONVERGED is a success, MAX_STEPS for a
# loss without noise is none. The message adds how much is left and what to do.

model = PoissonRegressor(alpha=0.0, tol=1e-8, max_iter=1000).fit(X, counts)
found, known = np.exp(log_rate(result.params, X)), model.predict(X)
print(f"rates differ by at most {np.abs(found - known).max():.4f} a year")
assert result.success
assert np.allclose(found, known, atol=0.02)

# %%
# The rate falls around 1890. Shaded is its error, from the inverse of the curvature of
# the likelihood.

design = np.column_stack([X, np.ones(len(X))])
inverse = np.linalg.inv(design.T @ (design * found[:, None]))
error = np.sqrt(np.einsum("ij,jk,ik->i", design, inverse, design))
figure, axes = plt.subplots(layout="constrained")
axes.bar(year, counts, width=1.0, color="silver", label="counted")
axes.plot(year, found, label="rate")
axes.fill_between(
    year, found * np.exp(-2 * error), found * np.exp(2 * error), alpha=0.3
)
axes.set(xlabel="year", ylabel="disasters a year", title="Coal mines in Britain")
axes.legend()
plt.show()
