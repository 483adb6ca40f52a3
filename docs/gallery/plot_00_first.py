"""
A line through points
=====================

The shortest fit: two params, a loss, one call.
"""

import jax.numpy as jnp

import gdopt


def loss(params, x, y):
    return jnp.mean((params["slope"] * x + params["offset"] - y) ** 2)


x = jnp.linspace(-1.0, 1.0, 50)
result = gdopt.minimize(loss, {"slope": 0.0, "offset": 0.0}, args=(x, 3 * x + 1))
print(result)

# %%
# The loss falls to its rounding within a few steps.
gdopt.plot.descent(result)
