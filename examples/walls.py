"""Paths along walls: bounds, a disc and a penalty with kinks, each on the same bowl."""

import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import gdopt

start = jnp.array([-0.9, -1.5])


def loss(x):
    """A bowl that is steep from left to right, with its minimum at (2, 1)."""
    return (x[0] - 2) ** 2 + 0.15 * (x[1] - 1) ** 2


def path(**options):
    """The points of a run, step by step, and its result."""
    points = [start]
    keep = lambda report: points.append(report.params)
    result = gdopt.minimize(loss, start, callback=keep, callback_every=1, **options)
    return jnp.array([*points, result.params]).T, result


walls = {
    "bounds": {"bounds": (None, jnp.array([1.0, 2.0]))},
    "project": {"project": lambda x: optax.projections.projection_l2_ball(x, 1.8)},
    "prox": {"prox": gdopt.prox.l1(0.4)},
}
figure = Figure(figsize=(12, 4.4), layout="constrained")
panels = figure.subplots(1, 3, sharex=True, sharey=True)
x, y = jnp.meshgrid(jnp.linspace(-2.0, 2.5, 200), jnp.linspace(-2.1, 2.1, 200))
angles = jnp.linspace(0, 2 * jnp.pi, 200)

for panel, (name, wall) in zip(panels, walls.items(), strict=True):
    height = loss((x, y)) + (0.4 * (jnp.abs(x) + jnp.abs(y)) if name == "prox" else 0)
    panel.contour(x, y, jnp.sqrt(height), levels=14, colors="silver", linewidths=0.8)
    given, result = path(learning_rate=0.3, **wall)
    panel.plot(*given, "o-", color="C0", markersize=3, label="learning_rate=0.3")
    found, result = path(**wall)
    panel.plot(*found, "s--", color="C1", markersize=4, label="without a rate")
    panel.plot(*start, "o", color="C3", label="start")
    panel.set_title(f"{name}=\n{result.message.split(':')[0]}")
    panel.set_aspect("equal")
    print(f"{name}: {result.message}")

panels[0].axvline(1.0, color="black")
panels[1].plot(1.8 * jnp.cos(angles), 1.8 * jnp.sin(angles), color="black")
panels[2].axhline(0.0, color="black", linewidth=0.8)
panels[2].axvline(0.0, color="black", linewidth=0.8)
panels[0].legend(loc="upper left")
figure.savefig("walls.png", dpi=150)
print("walls.png shows every step of two runs for each.")
