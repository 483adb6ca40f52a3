"""The problems of endings.py in their groups, and the options of `gdopt.minimize` that each is run with."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cutest
import gdopt
import natural_units
import raw_problems

Loss = Callable[..., Any]
Options = Mapping[str, Any]

DEFAULT: dict[str, Options] = {"default": {}}
BOTH: dict[str, Options] = {**DEFAULT, "gd": {"optimizer": gdopt.gd}}


class Problem(NamedTuple):
    """A loss and its starts."""

    loss: Loss
    starts: Sequence[Any]
    settings: Mapping[str, Options] = BOTH
    minimum: float | None = None  # known if a polish cannot find it: of a kink, at a bound, -inf without lower bound
    on_batches: Loss | None = None  # passed to minimize in place of the loss, with the data in the settings


class Group(NamedTuple):
    """Problems by name, each built in the process that runs it."""

    names: Callable[[], Sequence[str]]
    build: Callable[[str], Problem]
    every: int  # a quick run has each so-manieth problem


@functools.cache
def raw() -> dict[str, raw_problems.Entry]:
    return raw_problems.make()


@functools.cache
def natural() -> dict[str, Any]:
    return natural_units.make()


@functools.cache
def best_of_cutest() -> dict[str, cutest.Case]:
    return {case.name: case for case in cutest.load_cases(1)}


def build_cutest(name: str) -> Problem:
    loss, start = cutest.build(name)
    return Problem(loss, [np.asarray(start)])


def build_raw(name: str) -> Problem:
    loss, start = raw()[name]
    return Problem(loss, [start])


def build_natural(name: str) -> Problem:
    loss, starts = natural()[name]
    return Problem(loss, starts, minimum=-math.inf if name in natural_units.UNBOUNDED else None)


# --- Small inputs of ten kinds.


@functools.cache
def small() -> dict[str, Problem]:
    """All small inputs."""
    return {**likelihoods(), **badly_scaled(), **decayed(), **saddles(), **kinks(), **targets(), **unbounded()}


def likelihoods() -> dict[str, Problem]:
    """Fits by maximum likelihood, the scale of the noise or the rates of the counts among the params."""
    d = np.random.default_rng(0).normal(170, 10, 200)
    x = np.array([1.17, 2.97, 3.26, 4.69, 5.83, 6.0, 6.41])
    y = np.array([78.93, 58.2, 67.47, 37.47, 45.65, 32.92, 29.97])
    random = np.random.default_rng(0)
    n = 500
    columns = [np.ones(n), random.uniform(20, 80, n), random.uniform(0, 0.5, n), random.integers(0, 2, n)]
    inputs = np.stack(columns, 1)
    counts = random.poisson(np.exp(inputs @ [4, 0.03, -1.5, 0.2])).astype(float)

    def gaussian(p: jax.Array) -> jax.Array:
        return jnp.sum(p[1] + 0.5 * ((d - p[0]) / jnp.exp(p[1])) ** 2)

    def line(p: jax.Array) -> jax.Array:
        return jnp.sum(p[2] + 0.5 * ((y - p[0] - p[1] * x) / jnp.exp(p[2])) ** 2)

    def poisson(p: jax.Array) -> jax.Array:
        return jnp.sum(jnp.exp(inputs @ p) - counts * (inputs @ p))

    level = np.log(counts.mean())
    return {
        "Gaussian likelihood": Problem(gaussian, [np.zeros(2), np.array([100.0, 3.0]), np.array([170.0, 2.0])]),
        "line with unknown sigma": Problem(
            line, [np.zeros(3), np.array([50.0, 0.0, 2.0]), np.array([90.0, -9.0, 1.0])]
        ),
        "Poisson regression": Problem(
            poisson, [np.array([level, 0, 0, 0]), np.zeros(4), np.array([level - 1, 0.02, 0.0, 0.0])]
        ),
    }


def badly_scaled() -> dict[str, Problem]:
    """Params whose natural units lie apart."""
    x = np.linspace(0, 1e-4, 100)
    y = 1 + 5 * x / 1e-4
    return {
        "units of 1e4 and 1e-3": Problem(
            lambda p: (p[0] / 1e4 - 1) ** 2 + (p[1] * 1e3 - 1) ** 2,
            [np.zeros(2), np.array([2e4, 0.0]), np.array([0.0, 1.0])],
        ),
        "line over x up to 1e-4": Problem(
            lambda p: jnp.mean((p[0] + p[1] * x - y) ** 2), [np.zeros(2), np.array([0.0, 1e5]), np.array([10.0, -1.0])]
        ),
    }


def decayed() -> dict[str, Problem]:
    """Rates that end before the descent does, and a dip that a large rate jumps over."""
    cosine = {"gd, cosine(1e-3, 10)": {"learning_rate": optax.cosine_decay_schedule(1e-3, 10)}}
    adam = {"adam, 1.0": {"optimizer": optax.adam, "learning_rate": 1.0}}
    dip = lambda x: x**2 / 50 - jnp.exp(-((x - 2) ** 2) / 0.02)
    return {
        "half square": Problem(lambda x: 0.5 * x**2, [np.array(x) for x in (1.0, 10.0, -300.0)], cosine),
        "bowl with a dip": Problem(dip, [np.array(x) for x in (5.0, 4.0, -7.0)], {**BOTH, **adam}),
    }


def saddles() -> dict[str, Problem]:
    """Starts whose gradient is zero, or nearly so, though there is more to gain."""
    random = np.random.default_rng(0)
    matrix = random.normal(size=(6, 2)) @ random.normal(size=(2, 5))
    x = random.normal(size=(40, 3))
    y = np.sin(x).sum(1)

    def factors(p: jax.Array) -> jax.Array:
        return jnp.mean((p[:12].reshape(6, 2) @ p[12:].reshape(2, 5) - matrix) ** 2)

    def tanh(p: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ p[:12].reshape(3, 4) + p[12:16]) @ p[16:20] + p[20] - y) ** 2)

    half = np.concatenate([random.normal(size=12), np.zeros(10)])
    return {
        "product": Problem(lambda p: (p[0] * p[1] - 1) ** 2, [np.zeros(2), np.array([1e-9, 0.0]), np.array([1.0, -1])]),
        "factorisation": Problem(factors, [np.zeros(22), half, 1e-6 * random.normal(size=22)]),
        "tanh network": Problem(tanh, [np.zeros(21), 1e-6 * random.normal(size=21), random.normal(size=21)]),
        "cosine": Problem(jnp.cos, [np.array(x) for x in (0.0, 1e-3, 1.0)]),
    }


def kinks() -> dict[str, Problem]:
    """Minima at which the gradient does not vanish."""
    random = np.random.default_rng(0)
    a, values = random.normal(size=(50, 8)), random.normal(size=31)
    b = a @ np.array([3.0, -2.0, 1.0, 0, 0, 0, 0, 0]) + 0.1 * random.normal(size=50)
    inside = {"sgd kept nonnegative": {"optimizer": optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative())}}
    median = float(np.mean(np.abs(values - np.median(values))))
    return {
        "abs(x - 1)": Problem(lambda x: jnp.abs(x - 1), [np.array(x) for x in (5.0, -3.0, 1e3)], minimum=0.0),
        "lasso": Problem(
            lambda p: jnp.mean((a @ p - b) ** 2) + 0.5 * jnp.sum(jnp.abs(p)),
            [np.zeros(8), np.ones(8), random.normal(size=8)],
            minimum=least_lasso(a, b, 0.5),
        ),
        "median": Problem(
            lambda x: jnp.mean(jnp.abs(values - x)), [np.array(x) for x in (0.0, 5.0, -1.0)], minimum=median
        ),
        "square at its bound": Problem(
            lambda x: jnp.sum((x + 1) ** 2), [np.ones(3), np.full(3, 0.1), np.arange(3.0)], inside, minimum=3.0
        ),
    }


def least_lasso(a: np.ndarray, b: np.ndarray, penalty: float) -> float:
    """The least value of the lasso's loss, by 10,000 proximal steps."""
    p = np.zeros(a.shape[1])
    rate = len(b) / (2 * np.linalg.norm(a, 2) ** 2)
    for _ in range(10_000):
        p = p - rate * 2 / len(b) * a.T @ (a @ p - b)
        p = np.sign(p) * np.maximum(np.abs(p) - rate * penalty, 0)
    return float(np.mean((a @ p - b) ** 2) + penalty * np.abs(p).sum())


def targets() -> dict[str, Problem]:
    """A target that is met first at a point whose gradient is NaN, and mini-batches whose rate is far too high."""
    random = np.random.default_rng(0)
    x = random.normal(size=(100, 4))
    y = x @ np.ones(4)
    high = {"gd, 10": {"learning_rate": 10.0}, "adam, 100": {"optimizer": optax.adam, "learning_rate": 100.0}}
    batches = {name: {**options, "data": (x, y), "batch_size": 10, "epochs": 20} for name, options in high.items()}

    def on_batches(p: jax.Array, batch: Any) -> jax.Array:
        return jnp.mean((batch[0] @ p - batch[1]) ** 2)

    return {
        "NaN at the target": Problem(
            lambda x: x**2 + 0 * jnp.sqrt(jnp.maximum(x - 1, 0)),  # no gradient up to 1
            [np.array(x) for x in (5.0, 1.5, 100.0)],
            {name: {**options, "target": 0.5} for name, options in BOTH.items()},
            minimum=0.0,
        ),
        "mini-batches that explode": Problem(
            lambda p: on_batches(p, (x, y)), [np.zeros(4), np.full(4, 10.0)], batches, on_batches=on_batches
        ),
    }


def unbounded() -> dict[str, Problem]:
    """Losses without lower bound."""
    losses: dict[str, tuple[Loss, Sequence[Any]]] = {
        "-x[0]": (lambda x: -x[0], [np.zeros(2), np.ones(2)]),
        "-log(log x)": (lambda x: -jnp.log(jnp.log(x)), [np.array(x) for x in (math.e, 1.1, 100.0)]),
        "-log1p(abs x)": (lambda x: -jnp.log1p(jnp.abs(x)), [np.array(x) for x in (1.0, -0.1, 1e3)]),
    }
    return {name: Problem(loss, starts, minimum=-math.inf) for name, (loss, starts) in losses.items()}


# --- Other optimizers, and rates that decay.

OPTIMIZERS: dict[str, Callable[[], Options]] = {
    "adam(1e-2)": lambda: {"optimizer": optax.adam(1e-2)},
    "adam(1.0)": lambda: {"optimizer": optax.adam(1.0)},
    "lbfgs()": lambda: {"optimizer": optax.lbfgs()},
    "gd, 1e-4": lambda: {"learning_rate": 1e-4},
    "gd, 1e-2": lambda: {"learning_rate": 1e-2},
    "gd, 1": lambda: {"learning_rate": 1.0},
    "rmsprop(1e-2)": lambda: {"optimizer": optax.rmsprop(1e-2)},
    "nadam(1e-2)": lambda: {"optimizer": optax.nadam(1e-2)},
}
SUBSET = (
    "raw:std:wine_softmax",
    "raw:std:wine_mlp8",
    "raw:raw:iris_softmax",
    "raw:raw:bc_logreg_1e-2",
    "raw:quad:diag1e2",
    "raw:quad:rot1e4",
    "raw:fit:hill",
    "raw:fit:gausspeak",
    "small:Gaussian likelihood",
    "small:line with unknown sigma",
    "small:Poisson regression",
    "small:bowl with a dip",
)
SCHEDULED = (
    *SUBSET,
    "raw:std:synth_logreg",
    "raw:raw:diab_ridge_1",
    "raw:fit:powerlaw",
    "small:half square",
    "small:units of 1e4 and 1e-3",
    "small:line over x up to 1e-4",
    "small:product",
    "small:factorisation",
)
DRAWS = 35  # schedules for each of these losses: 700 runs
SHAPES = ("cosine", "exponential", "polynomial", "one-cycle", "linear")
METHODS: dict[str, Any] = {
    "gd": gdopt.gd,
    "adam": optax.adam,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
}


def borrow(name: str, settings: Mapping[str, Options]) -> Problem:
    """A problem of another group from its first start, with other settings."""
    group, _, inner = name.partition(":")
    problem = GROUPS[group].build(inner)
    return problem._replace(starts=problem.starts[:1], settings=settings)


def build_optimizers(name: str) -> Problem:
    return borrow(name, {label: options() for label, options in OPTIMIZERS.items()})


def build_scheduled(name: str) -> Problem:
    random = np.random.default_rng(SCHEDULED.index(name))
    return borrow(name, dict(draw_schedule(random) for _ in range(DRAWS)))


def draw_schedule(random: np.random.Generator) -> tuple[str, Options]:
    """A rate that decays over 10 to 1000 steps from a peak of 1e-4 to 1, with its name and optimizer."""
    shape, method = random.choice(SHAPES), random.choice(list(METHODS))
    steps, peak = int(10 ** random.uniform(1, 3)), float(10 ** random.uniform(-4, 0))
    name = f"{method}, {shape}({peak:.2g}, {steps})"
    return name, {"optimizer": METHODS[method], "learning_rate": make_schedule(shape, peak, steps)}


def make_schedule(shape: str, peak: float, steps: int) -> Callable[[Any], Any]:
    match shape:
        case "cosine":
            return optax.cosine_decay_schedule(peak, steps)
        case "exponential":
            return optax.exponential_decay(peak, max(steps // 10, 1), 0.5)
        case "polynomial":
            return optax.polynomial_schedule(peak, 0.0, 2, steps)
        case "one-cycle":
            return optax.cosine_onecycle_schedule(steps, peak)
        case _:
            return optax.linear_schedule(peak, 0.0, steps)


GROUPS: dict[str, Group] = {
    "cutest": Group(lambda: list(best_of_cutest()), build_cutest, 12),
    "raw": Group(lambda: list(raw()), build_raw, 6),
    "natural": Group(lambda: list(natural()), build_natural, 12),
    "optimizers": Group(lambda: SUBSET, build_optimizers, 6),
    "schedules": Group(lambda: SCHEDULED, build_scheduled, 10),
    "small": Group(lambda: list(small()), lambda name: small()[name], 3),
}
