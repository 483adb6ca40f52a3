"""
A thermistor, against certified values
======================================

The resistance of a thermistor falls with the temperature. NIST counts this fit among
its hard reference problems: the three params have sizes of 0.006, 6000 and 300, and are
strongly coupled. NIST publishes the answer to eleven digits.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gdopt

# %%
# Data and certified values: NIST Statistical Reference Datasets, problem MGH10, after
# Meyer, "Theoretical and Computational Aspects of Nonlinear Regression", 1970.

temperature = np.arange(50.0, 126.0, 5.0)
resistance = np.array(
    [
        34780,
        28610,
        23650,
        19630,
        16370,
        13720,
        11540,
        9744,
        8261,
        7030,
        6005,
        5147,
        4427,
        3820,
        3307,
        2872,
    ],
    float,
)
certified = np.array([5.6096364710e-03, 6.1813463463e03, 3.4522363462e02])


def curve(b, x):
    return b[0] * jnp.exp(b[1] / (x + b[2]))


def loss(b, x, y):
    return jnp.sum((curve(b, x) - y) ** 2)


# %%
# The start is the second one that NIST proposes. Float64 gives the digits, and
# ``tol=0`` asks for all of them.

start = np.array([0.02, 4000.0, 250.0])
with jax.enable_x64(True):
    result = gdopt.minimize(loss, start, args=(temperature, resistance), tol=0)
found = np.asarray(result.params)
print(result)

# %%
# ``result.status`` says why the run ended there: PRECISION_LIMIT, because with
# ``tol=0`` it went on until less was left to gain than the rounding of the loss. That
# is a success, as CONVERGED is.

digits = -np.log10(np.abs(found / certified - 1))
for name, value, known, digit in zip("abc", found, certified, digits, strict=True):
    print(f"{name} = {value:.10g}, certified {known:.10g}, {digit:.1f} digits agree")
print(f"residual sum of squares {result.loss:.8f}, certified 87.945855171")
assert result.success
assert digits.min() > 4

# %%
# The points lie on the curve. The spikes in the descent are trials that led up: the
# optimizer undid them.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
with jax.enable_x64(True):
    left.semilogy(
        temperature, curve(start, temperature), "--", color="silver", label="start"
    )
    left.semilogy(temperature, curve(found, temperature), label="fit")
left.semilogy(temperature, resistance, "o", label="measured")
left.set(xlabel="temperature (°C)", ylabel="resistance (ohm)", title="Thermistor")
left.legend()
right.semilogy(result.history.loss)
right.set(
    xlabel="step",
    ylabel="residual sum of squares",
    title=f"{result.status.name} after {result.steps} steps",
)
plt.show()
