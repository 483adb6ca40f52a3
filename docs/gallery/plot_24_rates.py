"""
The rate against time
=====================

A learning rate may change with the step. Here are gdopt's schedules, the rates that a
run really used, and what they do to its loss.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import gdopt

# %%
# A schedule is a function from the step to the rate. Those of optax are, too, and so is
# a lambda of your own.

schedules = {
    "constant": gdopt.schedules.constant(0.3),
    "triangular": gdopt.schedules.triangular(0.05, 0.5, step_size_up=25),
    "triangular2": gdopt.schedules.triangular2(0.05, 0.5, step_size_up=25),
    "exp_range": gdopt.schedules.exp_range(0.05, 0.5, step_size_up=25, gamma=0.99),
    "one_cycle": gdopt.schedules.one_cycle(0.5, total_steps=200),
    "optax's cosine decay": optax.cosine_decay_schedule(0.5, decay_steps=200),
    "your own: 1 / (2 + step / 20)": lambda step: 1 / (2 + step / 20),
}

figure, panels = plt.subplots(
    len(schedules), 1, sharex=True, figsize=(7, 9), layout="constrained"
)
for axes, (name, schedule) in zip(panels, schedules.items(), strict=True):
    gdopt.plot.schedule(schedule, 200, ax=axes)
    axes.set(title=name, ylabel="rate", ylim=(0, 0.55))
    axes.label_outer()
plt.show()

# %%
# The triangle has a formula in the paper that introduced it (Smith, arXiv 1506.01186).
# It checks gdopt's.

step = np.arange(200)
cycle = np.floor(1 + step / 50)
formula = 0.05 + 0.45 * np.maximum(0, 1 - np.abs(step / 25 - 2 * cycle + 1))
assert np.allclose([schedules["triangular"](k) for k in step], formula, atol=1e-5)

# %%
# Now a noisy loss: each step sees new random targets around 1, so it leads a part of
# the way to them, and the rate is that part. For a constant rate theory knows how far
# the weights stay from 1: by a mean square of rate / (2 - rate).


def loss(w, key):
    return jnp.sum((w - 1 - jax.random.normal(key, w.shape)) ** 2) / 2


results = {
    name: gdopt.minimize(
        loss,
        jnp.full(50, 5.0),
        with_key=True,
        optimizer=gdopt.gd,
        learning_rate=schedule,
        max_steps=200,
        record_params=True,
    )
    for name, schedule in schedules.items()
    if name in ("constant", "triangular", "one_cycle", "optax's cosine decay")
}
misses = {
    name: np.mean((result.history.params - 1) ** 2, axis=1)
    for name, result in results.items()
}
for name, result in results.items():
    print(f"{name:30} {result.status.name}, {misses[name][-1]:.3f} from the answer")
    assert np.allclose(
        result.history.learning_rate[:200],
        [schedules[name](k) for k in step],
        atol=1e-5,
    )
print(f"constant: {misses['constant'][50:].mean():.3f}, in theory {0.3 / 1.7:.3f}")
assert abs(misses["constant"][50:].mean() / (0.3 / 1.7) - 1) < 0.15
assert misses["one_cycle"][-1] < 0.5 * misses["constant"][-1]

# %%
# Each ``result.status`` is MAX_STEPS, a success for a noisy loss. What a schedule has
# gained shows at its end: low rates average the noise away.

# sphinx_gallery_thumbnail_number = -1
figure, axes = plt.subplots(layout="constrained")
for name, miss in misses.items():
    axes.semilogy(miss, label=name)
axes.axhline(
    0.3 / 1.7, color="black", linewidth=0.8, label="theory for the constant rate"
)
axes.set(
    xlabel="step",
    ylabel="mean square distance from the answer",
    title="What the rates do",
)
axes.legend()
plt.show()
