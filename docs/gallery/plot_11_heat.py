"""
Fit a partial differential equation
===================================

A rod is warm in the middle, and cools. How well does each part of it conduct heat? The
loss solves the heat equation, and the conductivity of 20 parts is fitted to
temperatures at eight places.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.integrate import solve_ivp

import gdopt

# %%
# The rod has 40 cells. Heat flows between neighbours, and both ends are insulated.
# SciPy makes the measurements (with a noise of 0.003, seed 0), so the solver in the
# loss is checked as well. The conductivity steps from 1 to 0.3 and back.

cells, seconds = 40, 0.25
middle = (np.arange(cells) + 0.5) / cells
edge = np.arange(1, cells) / cells
truth = np.where((edge > 0.3) & (edge < 0.55), 0.3, 1.0)
first = np.exp(-(((middle - 0.4) / 0.15) ** 2)).astype(np.float32)


def flow(u, conductivity, xp=jnp):
    """The change of temperatures in a unit of time. For SciPy xp is NumPy."""
    across = conductivity * (u[1:] - u[:-1]) * cells
    return (xp.append(across, 0.0) - xp.append(0.0, across)) * cells


clock = np.linspace(0, seconds, 51)
exact = solve_ivp(
    lambda _, u: flow(u, truth, np),
    (0, seconds),
    first,
    t_eval=clock,
    method="BDF",
    rtol=1e-6,
).y.T
places = np.arange(2, cells, 5)
measured = (
    exact[:, places] + 0.003 * np.random.default_rng(0).normal(size=(51, 8))
).astype(np.float32)


# %%
# The steps of Crank and Nicolson are stable for any conductivity: each solves a
# tridiagonal system. Neighbouring parts are to be alike, so a small penalty holds their
# differences down. Bounds keep the conductivity positive.


def temperatures(conductivity):
    h = seconds / 50
    each = jnp.repeat(conductivity, 2)[: cells - 1]
    flux = each * cells**2 * h / 2
    low, high = jnp.append(0.0, -flux), jnp.append(-flux, 0.0)

    def step(u, _):
        new = jax.lax.linalg.tridiagonal_solve(
            low, 1 - low - high, high, (u + h / 2 * flow(u, each))[:, None]
        )[:, 0]
        return new, new

    return jnp.concatenate([first[None], jax.lax.scan(step, first, length=50)[1]])


def loss(conductivity, measured):
    misfit = jnp.mean((temperatures(conductivity)[:, places] - measured) ** 2)
    return misfit + 1e-5 * jnp.sum(jnp.diff(conductivity) ** 2)


start = np.full(20, 0.7, np.float32)
result = gdopt.minimize(loss, start, args=(measured,), bounds=(0.05, 5.0))
print(result)

# %%
# ``result.status`` says that this is a minimum of the loss. It does not say that the
# data determine every part. Their noise decides that, and the penalty fills in: so
# compare with the truth where you can.

found = np.repeat(np.asarray(result.params), 2)[: cells - 1]
error = np.sqrt(np.mean((temperatures(result.params) - exact) ** 2))
print(f"temperatures differ from the exact ones by {error:.4f}")
print(f"conductivities differ from the true ones by {np.mean(abs(found - truth)):.3f}")
assert result.success
assert error < 0.005
assert np.mean(abs(found - truth)) < 0.15

# %%
# The temperatures over time at the eight places, and the conductivity along the rod.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.plot(clock, measured, ".", color="silver", markersize=3)
left.plot(clock, temperatures(result.params)[:, places], linewidth=1)
left.set(xlabel="time", ylabel="temperature", title="Eight thermometers")
right.step(edge, truth, where="mid", color="black", label="truth")
right.step(edge, found, where="mid", label="found")
right.plot(edge, np.full(cells - 1, 0.7), ":", color="gray", label="start")
right.set(
    xlabel="place along the rod",
    ylabel="conductivity",
    ylim=(0, 1.5),
    title="Where heat passes badly",
)
right.legend()
plt.show()
