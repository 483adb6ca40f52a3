"""
Params of a differential equation
=================================

How do lynx and hares depend on each other? Integrate the equations of Lotka and
Volterra inside the loss, and fit their four rates and the two populations of the first
year to the furs that were traded.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.integrate import solve_ivp
from scipy.optimize import least_squares

import gdopt

# %%
# Furs of the Hudson's Bay Company from 1900 to 1920, in thousands, after Howard,
# "Modeling basics", 2009, as in Stan's case study of the model.

hares = """30 47.2 70.2 77.4 36.3 20.6 18.1 21.4 22 25.4 27.1 40.3 57 76.6 52.3 19.5
11.2 7.6 14.6 16.2 24.7"""
lynx = """4 6.1 9.8 35.2 59.4 41.7 19 13 8.3 9.1 7.4 8 12.3 19.5 45.7 51.1 29.7 15.8
9.7 10.1 8.6"""
furs = np.array([hares.split(), lynx.split()], np.float32).T
year = np.arange(1900, 1921)

# %%
# Ten steps of Runge and Kutta for each year, in a ``scan``. All six params are
# positive, so their logarithms are optimised. The misfit is that of the logarithms,
# too: furs vary by factors.


def slope(z, rates):
    hare, lynx = z
    born, eaten, died, fed = rates
    return jnp.array([(born - eaten * lynx) * hare, (fed * hare - died) * lynx])


def populations(params, per_year=10):
    h, rates = 1 / per_year, jnp.exp(params["log_rates"])

    def step(z, _):
        a = slope(z, rates)
        b = slope(z + h / 2 * a, rates)
        c = slope(z + h / 2 * b, rates)
        d = slope(z + h * c, rates)
        return z + h / 6 * (a + 2 * b + 2 * c + d), z

    return jax.lax.scan(step, jnp.exp(params["log_first"]), length=20 * per_year + 1)[1]


def loss(params, furs):
    return jnp.mean((jnp.log(populations(params)[::10]) - jnp.log(furs)) ** 2)


# %%
# The start takes the first year's furs, a birth and a death rate of one half, and small
# rates for meeting.

start = {
    "log_rates": jnp.log(jnp.array([0.5, 0.02, 0.5, 0.02])),
    "log_first": jnp.log(furs[0]),
}
result = gdopt.minimize(loss, start, args=(furs,))
print(result)

# %%
# ``result.status`` is CONVERGED. If the equations blow up for some rates, the loss
# there is infinite or NaN; the optimizer undoes such a step and tries a shorter one.
# SciPy's integrator and least squares agree.


def misfit(logs):
    solution = (
        solve_ivp(
            lambda _, z: np.asarray(
                [(r[0] - r[1] * z[1]) * z[0], (r[3] * z[0] - r[2]) * z[1]]
            ),
            (0, 20),
            np.exp(logs[4:]),
            t_eval=np.arange(21),
            rtol=1e-6,
        )
        if (r := np.exp(logs[:4])) is not None
        else None
    )
    return (np.log(solution.y.T) - np.log(furs)).ravel()


known = least_squares(
    misfit, np.concatenate([start["log_rates"], start["log_first"]])
).x
print("rates", np.exp(result.params["log_rates"]), "SciPy", np.exp(known[:4]))
assert result.success
assert np.allclose(np.exp(result.params["log_rates"]), np.exp(known[:4]), rtol=0.02)

# %%
# The furs, and the two populations.

figure, axes = plt.subplots(layout="constrained")
fine = np.linspace(1900, 1920, 201)
for k, (name, color) in enumerate([("hares", "C0"), ("lynx", "C3")]):
    axes.plot(year, furs[:, k], "o", color=color, label=name)
    axes.plot(fine, populations(start)[:, k], ":", color=color, linewidth=0.8)
    axes.plot(fine, populations(result.params)[:, k], color=color)
axes.set(
    xticks=year[::5],
    xlabel="year",
    ylabel="furs (thousands)",
    title="Lynx and hares (dotted: the start)",
)
axes.legend()
plt.show()
