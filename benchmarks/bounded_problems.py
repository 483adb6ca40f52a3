"""The problems of bounds.py: minimisation within bounds, with an l1 penalty, and on the simplex.

Params are flat arrays. The data are made in float64 by generators with fixed seeds. `NAMES` has the names by group, and
`build` makes a problem by its name. The groups are:

- cutest: the bound-constrained problems of CUTEst by sif2jax, at sizes up to about a thousand params.
- fits: fits of physical models in their natural units, from 1e-13 to 1e13. At many minima a param is at its bound.
- nnls: non-negative least squares, with conditions up to those of a Hilbert matrix.
- lasso: five data sets, each with a path of four weights.
- simplex: weights of mixtures, portfolios, designs and materials, non-negative with a sum of one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from cutest import sif2jax_module
from raw_problems import load
from solvers import Loss

BOUNDS_JSON = Path(__file__).with_name("bounds.json")
CONVEX = ("nnls", "lasso", "simplex")  # groups without further local minima
INFINITE = 1e19  # CUTEst writes 1e20 for a bound that is none
SLACK = 1e-12  # relative to the params, by which rounding may leave the feasible set


class Problem(NamedTuple):
    """A loss with its start and what restricts its params: bounds, an l1 penalty, or the simplex."""

    loss: Loss  # without the penalty
    start: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    weight: float = 0.0  # of the l1 penalty
    on_simplex: bool = False
    table: tuple[np.ndarray, np.ndarray] | None = None  # of least squares: inputs and outputs

    @property
    def kind(self) -> str:
        return "simplex" if self.on_simplex else "l1" if self.weight else "bounds"

    def objective(self, x: jax.Array) -> jax.Array:
        """The loss with its penalty; infinite for params that are not feasible."""
        slack = SLACK * jnp.max(jnp.abs(x), initial=0)
        feasible = jnp.all((x >= self.lower - slack) & (x <= self.upper + slack))
        if self.on_simplex:
            feasible &= jnp.abs(jnp.sum(x) - 1) <= SLACK * x.size
        return jnp.where(feasible, self.loss(x) + self.weight * jnp.sum(jnp.abs(x)), jnp.inf)


def bounded(loss: Loss, start: Any, lower: Any, upper: Any, **options: Any) -> Problem:
    """A problem with bounds. The start is moved into them."""
    start = np.asarray(start, float)
    low, high = (np.array(np.broadcast_to(np.asarray(bound, float), start.shape)) for bound in (lower, upper))
    low[low < -INFINITE], high[high > INFINITE] = -np.inf, np.inf
    return Problem(loss, np.clip(start, low, high), low, high, **options)


def build(name: str) -> Problem:
    """The problem of this name, in float64."""
    group = name.partition(":")[0]
    return {"sif": build_cutest, "fit": build_fit, "nnls": build_nnls, "lasso": build_lasso, "simplex": build_simplex}[
        group
    ](name)


def random_of(name: str) -> np.random.Generator:
    """A generator seeded with the name."""
    return np.random.default_rng([*name.encode()])


# --- CUTEst.

TORSIONS = tuple(f"TORSION{which}" for which in "123456ABCDEF")
# Larger problems with a field for their size, and what it is set to here.
SIZES = {
    "BDEXP": "N=1000",
    "CHARDIS0": "n_charges=100",
    "CVXBQP1": "n=1000",
    "CYCLOOCTLS": "p=100",
    "DEGDIAG": "n_minus_1=1000",
    "DEGTRID": "_n=1001",
    "DEGTRID2": "_n=1001",
    "HADAMALS": "n=10",
    "NCVXBQP1": "n=1000",
    "NCVXBQP2": "n=1000",
    "NCVXBQP3": "n=1000",
    "OBSTCLAE": "px=30:py=30",
    "OBSTCLBL": "px=30:py=30",
    "QUDLIN": "n=1000:m=500",
    "RAYBENDL": "_nknots=64",
    **dict.fromkeys(TORSIONS, "q=15"),
}
TOO_LARGE = ("OBSTCLAL", "OBSTCLBM", "OBSTCLBU")  # with bounds for their 10,000 params only
QUADRATIC = ("BQP1VAR", "BQPGABIM", "BQPGASIM", "CVXBQP1", "NCVXBQP1", "NCVXBQP2", "NCVXBQP3", *TORSIONS)


def cutest_names() -> list[str]:
    """All bound-constrained problems that sif2jax lists, as 'sif:NAME' or 'sif:NAME:field=value'."""
    listed = sif2jax_module("_bounded_minimisation").bounded_minimisation_problems
    found = [*(type(problem).__name__ for problem in listed), *QUADRATIC]
    return [
        ":".join(("sif", name, *([SIZES[name]] if name in SIZES else [])))
        for name in dict.fromkeys(found)
        if name not in TOO_LARGE
    ]


def build_cutest(name: str) -> Problem:
    """The problem of sif2jax, with the start moved into the bounds."""
    _, class_name, *sizes = name.split(":")
    folder = f"_quadratic_problems.{class_name.lower()}" if class_name in QUADRATIC else "_bounded_minimisation"
    kind = getattr(sif2jax_module(folder), class_name)
    fields = {field: int(size) for field, size in (text.split("=") for text in sizes)}
    if "n" in fields and isinstance(vars(kind).get("n"), property):  # a constant, not a field
        kind = type(class_name, (kind,), {"n": fields.pop("n")})
    problem = kind(**fields)
    args = problem.args
    loss = hs25 if class_name == "HS25" else lambda x: problem.objective(x, args)
    return bounded(loss, problem.y0, *problem.bounds)


def hs25(x: jax.Array) -> jax.Array:
    """sif2jax writes out the 99 terms, which takes half a minute to compile."""
    share = 0.01 * np.arange(1, 100)
    u = 25 + (-50 * np.log(share)) ** (2 / 3)
    return jnp.sum((jnp.exp(-((u - x[1]) ** x[2]) / x[0]) - share) ** 2)


# --- Fits in natural units.


class Fit(NamedTuple):
    """A model with its inputs, the params that made the data, the noise, and the start and bounds of the fit."""

    model: Callable[[Any, Any], Any]  # of params and inputs
    x: np.ndarray
    truth: Sequence[float]
    noise: float  # relative to the largest value
    start: Sequence[float]
    lower: Sequence[float]
    upper: Sequence[float]


INF = np.inf


def build_fit(name: str) -> Problem:
    """The sum of squares, in the units of the data."""
    fit = FITS[name]
    exact = np.asarray(fit.model(jnp.asarray(fit.truth, float), fit.x))
    y = exact + fit.noise * np.abs(exact).max() * random_of(name).normal(size=exact.shape)
    return bounded(lambda p: jnp.sum((fit.model(p, fit.x) - y) ** 2), fit.start, fit.lower, fit.upper)


def planck(p: Any, wavelength: Any) -> Any:
    """Radiance in W / (m2 sr m) of emissivity p[0] at p[1] kelvin."""
    return p[0] * 1.191043e-16 / wavelength**5 / jnp.expm1(1.438777e-2 / (wavelength * p[1]))


def gauss(x: Any, centre: Any, width: Any) -> Any:
    return jnp.exp(-0.5 * ((x - centre) / width) ** 2)


def pseudo_voigt(p: Any, x: Any) -> Any:
    """A line of height p[0] at p[1] of half width p[2], with the Lorentzian part p[3]."""
    z = (x - p[1]) / p[2]
    return p[0] * (p[3] / (1 + z**2) + (1 - p[3]) * jnp.exp(-jnp.log(2) * z**2))


def distance_modulus(p: Any, redshift: Any) -> Any:
    """A flat universe with Hubble constant p[0], matter p[1] and dark energy of the equation of state p[2]."""
    nodes, weights = np.polynomial.legendre.leggauss(16)
    z = 0.5 * redshift[:, None] * (nodes + 1)
    expansion = jnp.sqrt(p[1] * (1 + z) ** 3 + (1 - p[1]) * (1 + z) ** (3 * (1 + p[2])))
    comoving = 0.5 * redshift * jnp.sum(weights / expansion, axis=1)
    return 5 * jnp.log10(299792.458 / p[0] * (1 + redshift) * comoving) + 25


def van_genuchten(p: Any, head: Any) -> Any:
    """Water content between p[0] and p[1] over the suction head in cm."""
    return p[0] + (p[1] - p[0]) * (1 + (p[2] * head) ** p[3]) ** (1 / p[3] - 1)


def heat_capacity(p: Any, kelvin: Any) -> Any:
    """Debye's law with the temperature p[0], and p[1] times the temperature from the electrons, in J / (mol K)."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    top = p[0] / kelvin
    x = 0.5 * top[:, None] * (nodes + 1)
    integrand = x**4 * jnp.exp(-x) / jnp.expm1(-x) ** 2
    return 9 * 8.314462 / top**3 * 0.5 * top * jnp.sum(weights * integrand, axis=1) + p[1] * kelvin


def oral_dose(p: Any, hours: Any) -> Any:
    """The concentration in mg / l after 500 mg, with absorption p[0] and elimination p[1] per hour, volume p[2]."""
    return 500 / p[2] * p[0] / (p[0] - p[1]) * (jnp.exp(-p[1] * hours) - jnp.exp(-p[0] * hours))


FITS = {
    "fit:arrhenius_offset": Fit(
        lambda p, kelvin: p[0] * jnp.exp(-p[1] / (8.314462 * kelvin)) + p[2],
        np.linspace(300, 500, 40),
        (2e10, 7e4, 0.0),
        0.01,
        (1e9, 6e4, 1.0),
        (1e5, 0.0, 0.0),
        (1e14, 3e5, INF),
    ),
    "fit:lifetimes": Fit(
        lambda p, t: p[0] * jnp.exp(-t / p[1]) + p[2] * jnp.exp(-t / p[3]) + p[4],
        np.linspace(0, 2e-8, 120),
        (8e3, 6e-10, 2e3, 4e-9, 0.0),
        0.01,
        (5e3, 1e-9, 5e3, 1e-8, 10.0),
        (0.0, 1e-11, 0.0, 1e-9, 0.0),
        (INF, 1e-9, INF, 1e-7, INF),
    ),
    "fit:lorentz_line": Fit(
        pseudo_voigt,
        np.linspace(5.86e-7, 5.92e-7, 100),
        (4e-4, 5.89e-7, 4e-10, 1.0),
        0.02,
        (2e-4, 5.885e-7, 8e-10, 0.5),
        (0.0, 5.86e-7, 5e-11, 0.0),
        (INF, 5.92e-7, 3e-9, 1.0),
    ),
    "fit:dose_response": Fit(
        lambda p, molar: p[0] + (p[1] - p[0]) / (1 + (p[2] / molar) ** p[3]),
        np.logspace(-9, -4, 30),
        (0.0, 100.0, 4e-7, 1.1),
        0.03,
        (10.0, 80.0, 1e-6, 2.0),
        (0.0, 0.0, 1e-10, 0.3),
        (100.0, 100.0, 1e-3, 4.0),
    ),
    "fit:solar_cell": Fit(
        lambda p, volts: p[0] - p[1] * jnp.expm1(volts / (p[2] * 0.02585)) - volts / p[3],
        np.linspace(0, 0.62, 60),
        (3.2, 3e-9, 1.2, 50.0),
        0.003,
        (3.0, 1e-8, 1.3, 100.0),
        (0.0, 1e-13, 1.0, 1.0),
        (10.0, 1e-5, 2.0, 1e5),
    ),
    "fit:black_body": Fit(
        planck,
        np.linspace(4e-7, 2.5e-6, 80),
        (1.0, 2900.0),
        0.01,
        (0.5, 2000.0),
        (0.0, 500.0),
        (1.0, 6000.0),
    ),
    "fit:supernovae": Fit(
        distance_modulus,
        np.linspace(0.02, 1.4, 120),
        (70.0, 0.3, -1.0),
        0.003,
        (60.0, 0.5, -0.5),
        (50.0, 0.0, -1.0),
        (100.0, 1.0, 0.0),
    ),
    "fit:soil_water": Fit(
        van_genuchten,
        np.logspace(0, 4.2, 40),
        (0.0, 0.43, 0.02, 1.5),
        0.02,
        (0.05, 0.5, 0.005, 2.0),
        (0.0, 0.2, 1e-4, 1.05),
        (0.3, 0.6, 1.0, 10.0),
    ),
    "fit:spectral_lines": Fit(
        lambda p, kev: (
            sum(p[i] * gauss(kev, centre, 0.08) for i, centre in enumerate((5.90, 6.40, 6.49, 7.06, 7.48, 8.05)))
            + p[6] * jnp.exp(-kev / p[7])
        ),
        np.linspace(5, 9, 160),
        (0.0, 5e4, 0.0, 9e3, 0.0, 2e3, 3e4, 3.0),
        0.005,
        (1e4, 1e4, 1e4, 1e4, 1e4, 1e4, 1e4, 5.0),
        (0.0,) * 7 + (0.5,),
        (INF,) * 7 + (50.0,),
    ),
    "fit:undamped_spring": Fit(
        lambda p, t: p[0] * jnp.exp(-p[1] * t) * jnp.cos(p[2] * t + p[3]),
        np.linspace(0, 2e-3, 120),
        (3e-9, 0.0, 2.1e4, 0.4),
        0.02,
        (1e-9, 100.0, 2.0e4, 0.0),
        (0.0, 0.0, 1e4, -np.pi),
        (1e-6, 1e5, 1e5, np.pi),
    ),
    "fit:heat_capacity": Fit(
        heat_capacity,
        np.linspace(5, 300, 60),
        (428.0, 0.0),
        0.005,
        (200.0, 1e-2),
        (50.0, 0.0),
        (2000.0, 0.1),
    ),
    "fit:adsorption": Fit(
        lambda p, pascal: p[0] * p[1] * pascal / (1 + p[1] * pascal) + p[2] * p[3] * pascal / (1 + p[3] * pascal),
        np.logspace(2, 6, 40),
        (2.5, 4e-5, 1.0, 8e-7),
        0.005,
        (1.0, 1e-5, 1.0, 1e-6),
        (0.0, 1e-6, 0.0, 1e-8),
        (20.0, 1e-2, 20.0, 1e-6),
    ),
    "fit:oral_dose": Fit(
        oral_dose,
        np.array([0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 10, 12, 16, 24]),
        (1.4, 0.12, 32.0),
        0.02,
        (0.9, 0.3, 60.0),
        (0.5, 0.01, 5.0),
        (10.0, 0.4, 500.0),
    ),
}


# --- Non-negative least squares.


def least_squares(a: np.ndarray, b: np.ndarray) -> Loss:
    return lambda x: 0.5 * jnp.sum((a @ x - b) ** 2)


def build_nnls(name: str) -> Problem:
    """Half the sum of squares, from ones times a rough scale of the answer."""
    a, b = NNLS[name](random_of(name))
    size = np.sum(b * (a @ np.ones(a.shape[1]))) / np.sum((a @ np.ones(a.shape[1])) ** 2)
    return bounded(least_squares(a, b), np.full(a.shape[1], abs(size)), 0.0, INF, table=(a, b))


def gaussian_table(random: np.random.Generator, rows: int, columns: int, power: float) -> Any:
    """A table with singular values from 1 to 10**-power, and outputs of a sparse non-negative answer."""
    u, _, v = np.linalg.svd(random.normal(size=(rows, columns)), full_matrices=False)
    a = (u * np.logspace(0, -power, min(rows, columns))) @ v
    x = np.maximum(random.normal(size=columns), 0)
    b = a @ x
    return a, b + 0.05 * np.abs(b).mean() * random.normal(size=rows)


def digit_parts(random: np.random.Generator) -> Any:
    """One written digit as a mixture of 200 others."""
    pixels = load(datasets.load_digits)[0]
    chosen = random.choice(len(pixels), 201, replace=False)
    return pixels[chosen[1:]].T, pixels[chosen[0]]


def spectrum(random: np.random.Generator) -> Any:
    """Counts in 300 channels, of 80 lines that overlap."""
    channel = np.arange(300)[:, None]
    a = np.exp(-0.5 * ((channel - np.linspace(10, 290, 80)) / 6) ** 2)
    amounts = 1e4 * random.exponential(size=80) * (random.uniform(size=80) < 0.3)
    return a, random.poisson(a @ amounts + 20.0).astype(float)


def blurred(random: np.random.Generator) -> Any:
    """A signal of spikes, blurred over some 3 of 150 places."""
    place = np.arange(150)
    a = np.exp(-0.5 * ((place[:, None] - place) / 2.5) ** 2)
    x = 100.0 * (random.uniform(size=150) < 0.1)
    return a, a @ x + random.normal(size=150)


def diabetes_units(_: np.random.Generator) -> Any:
    """The progress from the measurements in their own units, with an offset."""
    x, y = load(datasets.load_diabetes, scaled=False)
    return np.c_[x, np.ones(len(x))], y


def hilbert(random: np.random.Generator) -> Any:
    a = 1 / (np.arange(15)[:, None] + np.arange(15) + 1)
    return a, a @ np.maximum(random.normal(size=15), 0) + 1e-3 * random.normal(size=15)


NNLS = {
    "nnls:tall": lambda random: gaussian_table(random, 200, 50, 1),
    "nnls:wide": lambda random: gaussian_table(random, 50, 120, 1),
    "nnls:condition_1e3": lambda random: gaussian_table(random, 120, 60, 3),
    "nnls:condition_1e5": lambda random: gaussian_table(random, 120, 60, 5),
    "nnls:large": lambda random: gaussian_table(random, 1500, 400, 2),
    "nnls:digit_parts": digit_parts,
    "nnls:spectrum": spectrum,
    "nnls:blurred": blurred,
    "nnls:diabetes_units": diabetes_units,
    "nnls:hilbert": hilbert,
}


# --- The lasso, in scikit-learn's form: half the mean square plus the weight times the sum of sizes.

PATH = (0.5, 0.1, 0.02, 0.003)  # of the weight above which all params are zero


def build_lasso(name: str) -> Problem:
    """A weight of the path of a data set, from zeros."""
    _, table, part = name.split(":")
    a, b = lasso_table(table)
    weight = float(part) * np.abs(a.T @ b).max() / len(b)
    loss = lambda x: 0.5 * jnp.mean((a @ x - b) ** 2)
    return bounded(loss, np.zeros(a.shape[1]), -INF, INF, weight=weight, table=(a, b))


@functools.cache
def lasso_table(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outputs without their means."""
    random = random_of(name)
    if name == "sparse":  # more params than rows
        x = random.normal(size=(100, 400))
        y = x[:, :10] @ random.normal(size=10) + 0.3 * random.normal(size=100)
    elif name == "correlated":  # neighbours by 0.95
        noise = random.normal(size=(200, 100))
        x = np.zeros_like(noise)
        x[:, 0] = noise[:, 0]
        for i in range(1, 100):
            x[:, i] = 0.95 * x[:, i - 1] + np.sqrt(1 - 0.95**2) * noise[:, i]
        y = x[:, ::10] @ random.normal(size=10) + random.normal(size=200)
    elif name == "cancer":
        x, y = load(datasets.load_breast_cancer)
        x, y = x / x.std(0), y.astype(float)
    else:
        x, y = load(datasets.load_diabetes, scaled=name == "diabetes")
    return x - x.mean(0), y - y.mean()


LASSO = [
    f"lasso:{table}:{part}"
    for table in ("diabetes", "diabetes_units", "cancer", "sparse", "correlated")
    for part in PATH
]


# --- On the simplex.


def build_simplex(name: str) -> Problem:
    """From equal weights."""
    loss, size = SIMPLEX[name](random_of(name))
    return bounded(loss, np.full(size, 1 / size), 0.0, INF, on_simplex=True)


def mixture(random: np.random.Generator, rows: int, parts: int) -> Any:
    """The weights of normal densities at fixed places: the mean negative log-likelihood."""
    centres = np.linspace(-6, 6, parts)
    y = np.where(random.uniform(size=rows) < 0.6, random.normal(-2, 0.7, rows), random.normal(3, 1.2, rows))
    densities = np.exp(-0.5 * ((y[:, None] - centres) / 0.5) ** 2) / (0.5 * np.sqrt(2 * np.pi))
    return (lambda w: -jnp.mean(jnp.log(densities @ w + 1e-12))), parts


def portfolio(random: np.random.Generator, assets: int, aversion: float) -> Any:
    """Daily returns of some 1e-4: the variance against the mean."""
    factors = 0.01 * random.normal(size=(500, 5)) @ random.normal(size=(5, assets))
    returns = 4e-4 + factors + 0.01 * random.uniform(0.5, 2, assets) * random.normal(size=(500, assets))
    mean, covariance = returns.mean(0), np.cov(returns.T)
    return (lambda w: 0.5 * aversion * w @ covariance @ w - mean @ w), assets


def unmixing(random: np.random.Generator, parts: int) -> Any:
    """The fractions of materials in a pixel of 200 bands, with a reflectance in percent."""
    bands = np.linspace(0, 1, 200)[:, None]
    curves = 50 + 30 * np.sin(bands * random.uniform(2, 12, parts) + random.uniform(0, 6, parts))
    fractions = random.dirichlet(np.full(parts, 0.2))
    pixel = curves @ fractions + random.normal(size=200)
    return least_squares(curves, pixel), parts


def design(random: np.random.Generator, points: int, columns: int) -> Any:
    """The D-optimal weights of measurements."""
    x = random.normal(size=(points, columns))
    return (lambda w: -jnp.linalg.slogdet((x.T * w) @ x)[1]), points


def stacking(random: np.random.Generator, models: int) -> Any:
    """The weights of predictive densities: the mean negative log score."""
    densities = np.exp(random.normal(-1, 0.8, (300, models)) + np.linspace(0.3, 0, models))
    return (lambda w: -jnp.mean(jnp.log(densities @ w))), models


def archetype(random: np.random.Generator) -> Any:
    """A written digit as a mixture of 100 others."""
    pixels = load(datasets.load_digits)[0]
    chosen = random.choice(len(pixels), 101, replace=False)
    return least_squares(pixels[chosen[1:]].T, pixels[chosen[0]]), 100


SIMPLEX: dict[str, Callable[[np.random.Generator], tuple[Loss, int]]] = {
    "simplex:mixture_20": lambda random: mixture(random, 400, 20),
    "simplex:mixture_60": lambda random: mixture(random, 1000, 60),
    "simplex:portfolio_30": lambda random: portfolio(random, 30, 5.0),
    "simplex:portfolio_300": lambda random: portfolio(random, 300, 20.0),
    "simplex:unmixing_8": lambda random: unmixing(random, 8),
    "simplex:unmixing_40": lambda random: unmixing(random, 40),
    "simplex:design_30": lambda random: design(random, 30, 4),
    "simplex:design_200": lambda random: design(random, 200, 8),
    "simplex:stacking_12": lambda random: stacking(random, 12),
    "simplex:archetype_100": archetype,
}


# --- The list with the best known values.


class Case(NamedTuple):
    """A problem in bounds.json: the objective at the start, and the best known."""

    name: str
    group: str
    n: int
    start: float
    best: float

    def target(self, tau: float) -> float:
        return self.best + tau * (self.start - self.best)


def load_cases() -> list[Case]:
    """The problems of bounds.json."""
    problems = json.loads(BOUNDS_JSON.read_text())["problems"]
    return [Case(name, entry["group"], entry["n"], entry["f0"], entry["fbest"]) for name, entry in problems.items()]


def names() -> dict[str, list[str]]:
    """The names of all problems by group, also of those that bounds.json leaves out."""
    own = {"fits": list(FITS), "nnls": list(NNLS), "lasso": LASSO, "simplex": list(SIMPLEX)}
    return {"cutest": cutest_names(), **own}
