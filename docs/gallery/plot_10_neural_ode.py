"""
A neural differential equation
==============================

Learn the law of motion of a swing with friction from its path alone. A small network is
the right-hand side of the differential equation, and the loss integrates it.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.integrate import solve_ivp

import gdopt

# %%
# Four paths of angle and speed over 6 seconds, integrated by SciPy, with a noise of
# 0.02 (seed 0). A fifth path, from another start, is for the check.


def swing(_, z):
    return [z[1], -2.0 * np.sin(z[0]) - 0.3 * z[1]]


seconds = np.linspace(0, 6, 61)
firsts = np.array(
    [[2.0, 0.0], [-1.0, 1.0], [0.5, -2.0], [-2.5, 0.0], [1.5, 0.5]], np.float32
)
paths = np.stack(
    [solve_ivp(swing, (0, 6), z, t_eval=seconds, rtol=1e-6).y.T for z in firsts]
).astype(np.float32)
seen = paths[:4] + 0.02 * np.random.default_rng(0).normal(size=paths[:4].shape).astype(
    np.float32
)

# %%
# The network has 16 hidden numbers. Each tenth of a second is one step of the midpoint
# rule.


def slope(params, z):
    hidden = jnp.tanh(z @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def path(params, first, steps=60, h=0.1):
    def step(z, _):
        new = z + h * slope(params, z + h / 2 * slope(params, z))
        return new, new

    return jax.lax.scan(step, first, length=steps)[1]


def loss(params, seen):
    """The mean square of misses over the next second (ten steps) of each seen point."""
    windows = jnp.stack([seen[:, k : k + 50] for k in range(1, 11)])
    ahead = path(params, seen[:, :50], steps=10)
    return jnp.mean((ahead - windows) ** 2)


draws = np.random.default_rng(1)
start = {
    "w1": draws.normal(size=(2, 16)).astype(np.float32),
    "b1": np.zeros((1, 1, 16), np.float32),
    "w2": 0.1 * draws.normal(size=(16, 2)).astype(np.float32),
    "b2": np.zeros((1, 1, 2), np.float32),
}
result = gdopt.minimize(loss, start, args=(seen,), max_steps=500)
print(result.message)

# %%
# ``result.status`` is MAX_STEPS: the run used up its 500 steps before it converged,
# which is no success for a loss without noise. Networks are fitted well enough long
# before the last digits, so this run is judged by the path it never saw.

ahead = np.asarray(path(result.params, firsts[4][None, None]))[:, 0, 0]
error = np.sqrt(np.mean((ahead - paths[4, 1:]) ** 2))
print(f"error on the path that it never saw: {error:.3f}; spread {paths[4].std():.2f}")
assert result.loss < 0.01 * result.history.loss[0]
assert error < 0.15

# %%
# In the plane of angle and speed: the learned arrows, and the path that was not seen.

figure, axes = plt.subplots(layout="constrained")
grid = np.stack(
    np.meshgrid(np.linspace(-2.7, 2.7, 17), np.linspace(-3, 3, 13)), axis=-1
).astype(np.float32)
arrows = np.asarray(slope(result.params, grid))
axes.quiver(*grid.transpose(2, 0, 1), *arrows.transpose(2, 0, 1), color="silver")
axes.plot(*seen.transpose(2, 1, 0), ".", color="C0", markersize=2)
axes.plot(*paths[4].T, color="black", label="true path")
axes.plot(*ahead.T, "--", color="C1", label="predicted from its first point")
axes.set(xlabel="angle", ylabel="speed", title="A learned law of motion")
axes.legend(loc="upper right")
plt.show()
