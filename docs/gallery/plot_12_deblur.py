"""
An inverse problem with bounds
==============================

A spectrometer blurs sharp lines into wide hills. Find the lines again. Heights cannot
be negative: with that bound the answer is sharp, and without it, it is nonsense.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import nnls

import gdopt

# %%
# Five lines, blurred by a normal curve with a width of three channels, and noise of
# 0.005 (seed 0).

channel = np.arange(100.0)
lines = np.zeros(100)
lines[[20, 30, 36, 60, 75]] = [1.0, 0.6, 0.9, 0.4, 1.2]
blur = np.exp(-(((channel[:, None] - channel) / 3) ** 2) / 2) / (3 * np.sqrt(2 * np.pi))
measured = blur @ lines + 0.005 * np.random.default_rng(0).normal(size=100)


def loss(heights, blur, measured):
    return jnp.sum((blur @ heights - measured) ** 2)


# %%
# The start is a flat spectrum. ``bounds=(0.0, None)`` holds for each of its 100
# entries.

start = np.full(100, 0.1)
with jax.enable_x64(True):
    result = gdopt.minimize(loss, start, args=(blur, measured), bounds=(0.0, None))
    free = gdopt.minimize(loss, start, args=(blur, measured), max_steps=2000)
heights = np.asarray(result.params)
print(result.message)
print(f"{result.at_bounds.sum()} of 100 heights are at their bound")
print("without bounds:", free.message)

# %%
# ``result.status`` is CONVERGED within the bounds: no step that they allow leads
# further down. Without bounds the loss creeps ever lower, so that run ends as
# MAX_STEPS, and its heights are of no use. SciPy's non-negative least squares finds the
# same heights.

known, distance = nnls(blur, measured)
print(f"misfit {result.loss:.8f}, SciPy {distance**2:.8f}")
print(f"heights differ by {abs(heights - known).max():.4f}")
assert result.success
assert heights.min() >= 0
assert abs(result.loss / distance**2 - 1) < 0.01

# %%
# The lines as they were, and as they were found: hills of neighbours stand for one
# line.

figure, panels = plt.subplots(
    3, 1, sharex=True, figsize=(6.4, 6.4), layout="constrained"
)
panels[0].plot(channel, measured, ".", color="gray", label="measured")
panels[0].plot(channel, blur @ heights, label="fit, blurred")
panels[0].set(ylabel="signal", title="A spectrum, blurred and found again")
panels[1].plot(channel, free.params, color="C3", label="found without bounds")
panels[2].vlines(
    channel, 0, heights, color="C0", linewidth=3, label="found within bounds"
)
panels[2].plot(channel[lines > 0], lines[lines > 0], "k_", markersize=12, label="truth")
panels[2].set(xlabel="channel")
for axes, name in zip(panels, ("signal", "height", "height"), strict=True):
    axes.set_ylabel(name)
    axes.legend(loc="upper right", fontsize="small")
plt.show()
