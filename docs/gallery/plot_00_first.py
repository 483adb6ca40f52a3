"""
A line through points
=====================

The shortest fit: two params, a loss, one call.
"""

import jax.numpy as jnp
import numpy as np

import gdopt

# %%
# Fifty points around the line 3 x + 1, with a noise of 0.2 (seed 0). Both params start
# at zero.

x = np.linspace(-1.0, 1.0, 50, dtype=np.float32)
y = (3 * x + 1 + 0.2 * np.random.default_rng(0).normal(size=50)).astype(np.float32)


def loss(params, x, y):
    return jnp.mean((params["slope"] * x + params["offset"] - y) ** 2)


result = gdopt.minimize(loss, {"slope": 0.0, "offset": 0.0}, args=(x, y))
print(result)

# %%
# ``result.status`` is CONVERGED: little is left to gain, and gdopt has verified that.
# NumPy has a formula for lines, and finds the same one.

slope, offset = np.polyfit(x, y, 1)
print(f"NumPy: slope {slope:.4f}, offset {offset:.4f}")
assert result.success
assert np.allclose(
    [result.params["slope"], result.params["offset"]], [slope, offset], atol=1e-2
)

# %%
# The loss falls within a few steps to what the noise leaves of it.

figure = gdopt.plot.descent(result)
figure
