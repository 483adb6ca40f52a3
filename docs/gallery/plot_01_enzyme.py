"""
Enzyme kinetics
===============

Fit the Michaelis-Menten curve to the speed of a reaction. The constants keep their
units: one is a speed of about 200 counts, the other a concentration of about 1e-7. The
default optimizer finds a step for each.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import curve_fit

import gdopt

# %%
# The data are the "Puromycin" runs with treated cells of Bates and Watts, *Nonlinear
# Regression Analysis and Its Applications*, 1988, table A1.3. Speeds are in counts per
# minute squared. The concentrations, in the book in parts per million, are written as
# plain fractions here, so they are tiny numbers.

fraction = 1e-6 * np.repeat([0.02, 0.06, 0.11, 0.22, 0.56, 1.10], 2).astype(np.float32)
speed = np.array([76, 47, 97, 107, 123, 139, 159, 152, 191, 201, 207, 200], np.float32)


def curve(params, x):
    return params["highest"] * x / (params["half"] + x)


def loss(params, x, y):
    return jnp.mean((curve(params, x) - y) ** 2)


# %%
# The start is a guess by eye: the highest speed seen, and the middle of the
# concentrations. No ``scale`` is passed, although the two params differ by nine orders
# of magnitude.

start = {"highest": 200.0, "half": 5e-7}
result = gdopt.minimize(loss, start, args=(fraction, speed))
print(result)

# %%
# ``result.status`` is CONVERGED: little is left to gain, and gdopt has checked that by
# the curvature at the end. ``result.left`` is that rest in units of the loss. SciPy
# finds the same constants, once it is told their sizes.

options = {"p0": (200.0, 5e-7), "x_scale": (100.0, 1e-7), "method": "trf"}
known, _ = curve_fit(lambda x, a, b: a * x / (b + x), fraction, speed, **options)
found = np.array([result.params["highest"], result.params["half"]])
print("gdopt", found)
print("SciPy", known)
assert result.success
assert np.allclose(found, known, rtol=1e-2)

# %%
# The curve at the start, and the one that was found.

x = np.linspace(0, 1.2e-6, 200, dtype=np.float32)
figure, axes = plt.subplots(layout="constrained")
axes.plot(fraction, speed, "o", label="measured")
axes.plot(x, curve(start, x), "--", color="silver", label="start")
axes.plot(
    x,
    curve(result.params, x),
    label=f"fit, {result.status.name} after {result.steps} steps",
)
axes.axvline(
    result.params["half"],
    color="C2",
    linewidth=0.8,
    label="concentration of half the speed",
)
axes.set(
    xlabel="concentration (fraction)",
    ylabel="speed (counts / min²)",
    title="Michaelis-Menten",
)
axes.legend()
plt.show()
