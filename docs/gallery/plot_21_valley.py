"""
Converge, overshoot, diverge
============================

The picture of every course on gradient descent: one weight, its loss curve, and the
steps of three learning rates.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gdopt

# %%
# Five points near the line y = 2 x. The model has one weight, which has to find the 2.

x = np.array([0.5, 1.0, 1.5, 2.0, 2.5], np.float32)
y = np.array([1.1, 1.9, 3.0, 4.1, 4.9], np.float32)


def loss(w, x, y):
    return jnp.mean((w * x - y) ** 2)


# %%
# ``record_params=True`` keeps the weight of every step, in ``result.history.params``.
# This loss is a parabola, so theory says what is to come: steps overshoot above a rate
# of 1 / curvature, and diverge above twice that.

curvature = 2 * np.mean(x**2)
results = {
    f"rate {rate}": gdopt.minimize(
        loss, -1.0, args=(x, y), learning_rate=rate, record_params=True
    )
    for rate in (0.07, 0.33, 0.375)
}
print(f"steps overshoot above {1 / curvature:.3f}, diverge above {2 / curvature:.3f}")
for name, result in results.items():
    print(f"{name}: {result.message}")

# %%
# ``result.status`` tells them apart: CONVERGED for the first two, and DIVERGED for the
# third, whose message names a rate that works. The weights agree with the formula of
# least squares.

exact = np.sum(x * y) / np.sum(x * x)
low, middle, high = results.values()
assert low.status == middle.status == gdopt.Status.CONVERGED
assert high.status == gdopt.Status.DIVERGED
assert abs(low.params - exact) < 0.02
assert abs(middle.params - exact) < 0.02
jumps = np.sign(
    np.asarray(middle.history.params[:6]) - exact
)  # the overshooting run changes sides at each step
assert np.all(jumps[1:] == -jumps[:-1])

# %%
# One call of ``gdopt.plot.valley`` draws one run.

figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
for axes, (name, result) in zip(panels, results.items(), strict=True):
    gdopt.plot.valley(loss, result, args=(x, y), ax=axes)
    axes.set(title=f"{name}: {result.status.name}", xlabel="weight")
plt.show()

# %%
# Several runs go into one picture, too. It says how each ended, and how often it jumped
# across the minimum.

# sphinx_gallery_thumbnail_number = -1
figure, axes = plt.subplots(layout="constrained")
gdopt.plot.valley(loss, results, args=(x, y), ax=axes)
axes.set_xlabel("weight")
plt.show()
