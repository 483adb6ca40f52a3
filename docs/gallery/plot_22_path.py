"""
The path on the contours
========================

Two weights, the contours of their loss, and the way that each optimizer takes. In a
narrow valley gradient descent goes from wall to wall, momentum rolls along, and a
quasi-Newton method learns the shape.
"""

import functools

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import gdopt

# %%
# A line is fitted to 50 points (seed 0). Their x lie between 1 and 3, so slope and
# offset depend on one another, and their valley is narrow and slanted.

draws = np.random.default_rng(0)
x = draws.uniform(1, 3, 50).astype(np.float32)
y = (2 * x - 1 + 0.1 * draws.normal(size=50)).astype(np.float32)


def loss(w, x, y):
    return jnp.mean((w[0] * x + w[1] - y) ** 2)


start = jnp.array([0.0, 2.5])
optimizers = {
    "gradient descent, 0.17": {"optimizer": gdopt.gd, "learning_rate": 0.17},
    "momentum, 0.05": {
        "optimizer": functools.partial(optax.sgd, momentum=0.8),
        "learning_rate": 0.05,
    },
    "no rate: quasi-Newton": {},
}
results = {
    name: gdopt.minimize(loss, start, args=(x, y), record_params=True, **options)
    for name, options in optimizers.items()
}
exact = np.polyfit(x, y, 1)
for name, result in results.items():
    miss = np.abs(result.params - exact).max()
    print(f"{name:22} {result.status.name} after {result.steps} steps, {miss:.1e} off")
    assert result.success
    assert np.allclose(result.params, exact, atol=0.05)

# %%
# All three statuses are CONVERGED, or PRECISION_LIMIT if nothing but rounding is left:
# the valley has one bottom, that of NumPy's ``polyfit``. They differ in the steps that
# they took. ``gdopt.plot.path`` draws one run.

figure, panels = plt.subplots(
    1, 3, figsize=(13, 4.2), sharex=True, sharey=True, layout="constrained"
)
for axes, (name, result) in zip(panels, results.items(), strict=True):
    gdopt.plot.path(loss, result, args=(x, y), ax=axes)
    axes.set(title=f"{name}: {result.steps} steps", xlabel="slope", ylabel="offset")
plt.show()

# %%
# For more weights, the picture is a plane through them. By default it is the plane that
# the path itself spans best. This network has 33 weights.


def network_loss(params, x, y):
    return jnp.mean(
        (jnp.tanh(x[:, None] * params["a"] + params["b"]) @ params["c"] - y) ** 2
    )


shapes = {"a": (1, 11), "b": (1, 11), "c": 11}
weights = {
    name: draws.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
}
wave = jnp.sin(3 * x)
result = gdopt.minimize(
    network_loss,
    weights,
    args=(x, wave),
    optimizer=optax.adam(0.02),
    max_steps=300,
    record_params=True,
)
print(result.message)
assert result.loss < 0.2 * result.history.loss[0]

# sphinx_gallery_thumbnail_number = -1
figure, axes = plt.subplots(layout="constrained")
gdopt.plot.path(network_loss, result, args=(x, wave), ax=axes)
plt.show()
