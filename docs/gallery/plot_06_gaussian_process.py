"""
Hyper-parameters of a Gaussian process
======================================

How fast does the flow of the Nile change, and how much of it is noise? A Gaussian
process answers by its length scale, its variance and its noise. They minimise the
negative log marginal likelihood.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

import gdopt

# %%
# The yearly flow at Aswan from 1871 to 1970 in 10^8 m³, after Cobb, "The problem of the
# Nile", *Biometrika*, 1978.

flow = """1120 1160 963 1210 1160 1160 813 1230 1370 1140 995 935 1110 994 1020 960
1180 799 958 1140 1100 1210 1150 1250 1260 1220 1030 1100 774 840 874 694 940 833 701
916 692 1020 1050 969 831 726 456 824 702 1120 1100 832 764 821 768 845 864 862 698
845 744 796 1040 759 781 865 845 944 984 897 822 1010 771 676 649 846 812 742 801 1040
860 874 848 890 744 749 838 1050 918 986 797 923 975 815 1020 906 901 1170 912 746 919
718 714 740"""
flow = np.array(flow.split(), float)
year = 1871.0 + np.arange(len(flow))
mean, spread = flow.mean(), flow.std()

# %%
# All three params are positive, so their logarithms are optimised. Each starts at 1, in
# years and in units of the spread. The Cholesky factor needs float64.


def covariance(params, a, b):
    distance = (a[:, None] - b[None, :]) / jnp.exp(params["length"])
    return jnp.exp(params["variance"]) * jnp.exp(-(distance**2) / 2)


def loss(params, t, y):
    factor = jnp.linalg.cholesky(
        covariance(params, t, t) + jnp.exp(params["noise"]) * jnp.eye(len(t))
    )
    white = jax.scipy.linalg.solve_triangular(factor, y, lower=True)
    return (
        white @ white / 2
        + jnp.log(jnp.diag(factor)).sum()
        + len(t) / 2 * jnp.log(2 * jnp.pi)
    )


start = {"length": 0.0, "variance": 0.0, "noise": 0.0}
with jax.enable_x64(True):
    result = gdopt.minimize(loss, start, args=(year, (flow - mean) / spread), tol=1e-6)
print(result)

# %%
# scikit-learn optimises the same function by L-BFGS-B. A marginal likelihood may have
# several minima, and the ``result.status`` CONVERGED promises a minimum near the path,
# not the lowest one. Try other starts if that matters.

kernel = ConstantKernel(1.0) * RBF(1.0) + WhiteKernel(1.0)
model = GaussianProcessRegressor(kernel).fit(year[:, None], (flow - mean) / spread)
found = np.array([result.params[name] for name in ("variance", "length", "noise")])
print(
    "log variance, length, noise:",
    found.round(3),
    "scikit-learn:",
    model.kernel_.theta.round(3),
)
known = model.log_marginal_likelihood_value_
print(f"log likelihood {-result.loss:.4f}, scikit-learn {known:.4f}")
assert result.success
assert -result.loss > known - 0.01

# %%
# The mean of the process and two standard deviations around it.

with jax.enable_x64(True):
    cross = np.asarray(covariance(result.params, year, year))
    inverse = np.linalg.inv(
        cross + np.exp(float(result.params["noise"])) * np.eye(len(year))
    )
smooth = mean + spread * cross @ inverse @ (flow - mean) / spread
error = 2 * spread * np.sqrt(np.diag(cross - cross @ inverse @ cross))
figure, axes = plt.subplots(layout="constrained")
axes.plot(year, flow, ".", color="gray", label="measured")
axes.plot(
    year,
    smooth,
    label=f"length scale {np.exp(float(result.params['length'])):.0f} years",
)
axes.fill_between(year, smooth - error, smooth + error, alpha=0.2)
axes.set(xlabel="year", ylabel="flow (10⁸ m³)", title="The Nile at Aswan")
axes.legend()
plt.show()
