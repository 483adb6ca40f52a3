"""
Hyper-parameters by derivatives of solutions
============================================

How strong should the two penalties of a regression be? Differentiate the loss of
held-out rows by the penalties, through the fit, and descend. A grid search needs many
more fits, and with each further penalty many times as many.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from sklearn.preprocessing import PolynomialFeatures, scale

import gdopt

# %%
# 442 patients with ten measurements each, and with the squares and products of these.
# The ten have one penalty, the 55 others have another. A third of the rows is held out.

X, y = load_diabetes(return_X_y=True)
X = scale(PolynomialFeatures(2, include_bias=False).fit_transform(X)).astype(np.float32)
y = scale(y).astype(np.float32)
group = np.repeat([0, 1], [10, 55])
order = np.random.default_rng(0).permutation(len(y))
train, held_out = ((X[rows], y[rows]) for rows in (order[:294], order[294:]))


def error(w, X, y):
    return jnp.mean((X @ w - y) ** 2)


def ridge(w, log_penalties, X, y):
    return error(w, X, y) + jnp.sum(jnp.exp(log_penalties)[group] * w**2)


# %%
# ``minimize`` works under ``jax.value_and_grad``. The derivative comes from the
# implicit function theorem: it costs one linear solve, however many steps the fit made.
# It is as exact as the minimum, so ``tol`` is small.


@jax.jit
def outer(log_penalties):
    def held_out_error(log_penalties):
        fit = gdopt.minimize(
            ridge, jnp.zeros(65), args=(log_penalties, *train), tol=1e-6
        )
        return error(fit.params, *held_out), fit.status

    return jax.value_and_grad(held_out_error, has_aux=True)(log_penalties)


# %%
# SciPy makes the outer descent here: the derivative is a plain array, and any optimizer
# takes it. ``gdopt.minimize`` does it, too, but compiles for long, because it verifies
# the outer minimum by second derivatives through the inner one.

path = []


def value_and_gradient(log_penalties):
    (value, status), gradient = outer(jnp.asarray(log_penalties, jnp.float32))
    path.append((*np.exp(log_penalties), value, status))
    return float(value), np.asarray(gradient, float)


limits = np.log([(10**-3.5, 10.0)] * 2)
minimize(
    value_and_gradient,
    np.log([0.05, 0.05]),
    jac=True,
    method="L-BFGS-B",
    bounds=limits,
    options={"ftol": 1e-5},
)
path = np.array(path)
best = path[path[:, 2].argmin()]

# %%
# Inside ``jit`` a ``status`` is a number; ``gdopt.Status`` names it. If a fit fails,
# its derivative is NaN, so the failure cannot go unseen.

print("the best fit:", gdopt.Status(int(best[3])).name)
penalties = np.logspace(-3.5, 1, 19)
grid = np.empty((19, 19))
for (i, j), _ in np.ndenumerate(grid):
    stretch = np.sqrt(penalties[[i, j]])[
        group
    ]  # ridge with a penalty of 1 for stretched columns
    model = Ridge(len(train[1]), fit_intercept=False).fit(train[0] / stretch, train[1])
    grid[i, j] = np.mean((model.predict(held_out[0] / stretch) - held_out[1]) ** 2)
print(f"found {best[2]:.4f} at {best[:2]} by {len(path)} fits")
print(f"grid of scikit-learn: {grid.min():.4f} by {grid.size} fits")
assert best[3] in (gdopt.Status.CONVERGED, gdopt.Status.PRECISION_LIMIT)
assert best[2] < grid.min() + 2e-3

# %%
# The descent on the map of the grid.

figure, axes = plt.subplots(layout="constrained")
contours = axes.contourf(
    penalties,
    penalties,
    grid.T,
    levels=np.linspace(0.49, 0.61, 13),
    cmap="Greys",
    extend="max",
)
figure.colorbar(contours, label="error of held-out rows")
axes.loglog(path[:, 0], path[:, 1], "o-", color="C0", markersize=4, label="descent")
axes.plot(*best[:2], "*", color="C1", markersize=14, label="found")
axes.set(
    xlabel="penalty of measurements",
    ylabel="penalty of products",
    title="Two penalties by their derivatives",
)
axes.set(xlim=penalties[[0, -1]], ylim=(penalties[0], 14))
axes.legend()
plt.show()
