"""A ball in a valley: one weight, one loss curve, and three learning rates."""

import jax.numpy as jnp
from matplotlib.figure import Figure

import gdopt

# Five points near the line y = 2 x. The model has one weight, which has to find the 2.
x = jnp.array([0.5, 1.0, 1.5, 2.0, 2.5])
y = jnp.array([1.1, 1.9, 3.0, 4.1, 4.9])
start = -1.0


def loss(w, x, y):
    return jnp.mean((w * x - y) ** 2)


def walk(w, rate, steps=8):
    """The points (w, loss) of so many vanilla steps w - rate * gradient."""
    points = []
    for _ in range(steps + 1):
        new_w, value = gdopt.gd_step(loss, w, rate, x, y)  # the loss is that of w, before the step
        points.append((w, value))
        w = new_w
    return jnp.array(points).T


figure = Figure(figsize=(12, 4), layout="constrained")
panels = figure.subplots(1, 3, sharex=True, sharey=True)
valley = jnp.linspace(-3, 7, 200)

for panel, rate in zip(panels, [0.07, 0.33, 0.375], strict=True):
    result = gdopt.minimize(loss, start, args=(x, y), learning_rate=rate)
    print(f"rate {rate}: {result.message}")

    w, value = walk(start, rate)
    panel.plot(valley, [loss(v, x, y) for v in valley], color="silver")
    panel.quiver(w[:-1], value[:-1], jnp.diff(w), jnp.diff(value), angles="xy", scale_units="xy", scale=1, color="C0")
    panel.plot(w, value, "o", color="C0", markersize=4)
    panel.plot(w[0], value[0], "o", color="C3", markersize=6, label="start")
    panel.set_title(f"learning rate {rate}\n{result.message.split(':')[0]}")
    panel.set_xlabel("weight")

panels[0].set_ylabel("loss")
panels[0].legend(loc="upper center")
figure.savefig("valley.png", dpi=150)
print("valley.png shows the first eight steps of each.")
