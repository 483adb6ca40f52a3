"""Learning rates by step: each function makes a schedule ``step -> rate``, step 0 first, that optax takes as well.

A step is a whole number or an array of them (elementwise), traced or not. The rate is float32, or float64 with x64 on.
Positions in a cycle are computed in integers, because float32 loses count of the steps at 2**24. Long before that the
differences of large numbers in the papers' formulas lose their digits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdopt._checks import number, one_of, rate, whole_number
from gdopt._errors import InputError
from gdopt._settings import own_promotion
from gdopt._types import Scalar, Schedule

__all__ = [
    "constant",
    "cyclical",
    "exp_range",
    "one_cycle",
    "range_test",
    "silver",
    "triangular",
    "triangular2",
]


def __dir__() -> list[str]:
    return __all__


_RHO = 1 + math.sqrt(2)  # the silver ratio


def constant(value: Scalar) -> Schedule:
    """Return a schedule with the same rate at each step.

    Args:
        value: the rate, at least 0. A rate of 0 stands still, which is useful in ``optax.join_schedules``.

    Raises:
        InputError: for a value that is negative, NaN, infinite or not a number.

    Example:
        >>> from gdopt import schedules
        >>> lr = schedules.constant(0.1)
        >>> [round(float(lr(k)), 6) for k in (0, 1, 1000)]
        [0.1, 0.1, 0.1]
    """
    constant_rate = rate("value", value, zero=True)
    return lambda step: jnp.full(_count(step).shape, constant_rate, float)


def range_test(start_lr: Scalar, end_lr: Scalar, num_steps: int, mode: str = "exponential") -> Schedule:
    """Return a ladder of rates from start_lr to end_lr, to see at which rates the loss falls and begins to rise.

    Args:
        start_lr: the rate of step 0, hit exactly; above 0.
        end_lr: the rate of step ``num_steps - 1``, hit exactly, and of all later steps; above 0.
        num_steps: the number of rates, at least 2. They are kept in memory, so that each one is correctly rounded.
        mode: "exponential" (equal ratios) or "linear" (equal differences, as in the paper). The default is exponential,
            over several decades, because the best rate is seldom known to within a decade.

    Raises:
        InputError: for rates that are not positive and finite, a num_steps below 2, an unknown mode.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, arXiv 1506.01186, section 3.3.

    Example:
        >>> from gdopt import schedules
        >>> lr = schedules.range_test(1e-4, 1.0, num_steps=5)
        >>> [round(float(lr(k)), 6) for k in range(7)]
        [0.0001, 0.001, 0.01, 0.1, 1.0, 1.0, 1.0]
    """
    rates = ladder(start_lr, end_lr, num_steps, mode)
    return lambda step: jnp.asarray(rates, float)[jnp.minimum(_count(step), len(rates) - 1)]


def ladder(start_lr: Scalar, end_lr: Scalar, num_steps: int, mode: str) -> np.ndarray:
    """Return the rates of `range_test` in float64, both ends exact."""
    start, end = rate("start_lr", start_lr), rate("end_lr", end_lr)
    last = whole_number("num_steps", num_steps, least=2) - 1
    linear = one_of("mode", mode, ("exponential", "linear")) == "linear"
    x = np.arange(last + 1) / last
    rates = start + (end - start) * x if linear else start * (end / start) ** x
    rates[0], rates[last] = start, end
    return rates


def cyclical(
    base_lr: Scalar,
    max_lr: Scalar,
    step_size_up: int,
    step_size_down: int | None = None,
    mode: str = "triangular",
    gamma: Scalar = 1.0,
    scale_fn: Callable[[jax.Array], Any] | None = None,
    scale_mode: str = "cycle",
) -> Schedule:
    """Return cycles that rise from base_lr to max_lr and fall back in straight lines, as torch's ``CyclicLR``.

    Args:
        base_lr: the rate at the ends of each cycle, at least 0. Smith takes a third or a quarter of max_lr.
        max_lr: the rate at the peak of the first cycle, above 0 and at least base_lr.
        step_size_up: the steps from base_lr to the peak. Smith takes 2 to 10 times the steps of an epoch, for three
            cycles or more, and ends at the end of one.
        step_size_down: the steps from the peak back to base_lr; by default as many as up.
        mode: the height of the cycles: "triangular" keeps it (the default, and easiest to read), "triangular2" halves
            it after each cycle, "exp_range" multiplies it by gamma at each step.
        gamma: the factor of "exp_range", in (0, 1]; the other modes do not read it.
        scale_fn: your own function instead of mode, made of JAX operations: ``height * scale_fn(c)``.
        scale_mode: the argument of scale_fn, a float: "cycle" is the number of the cycle, 1 first; "iterations" is the
            step, 0 first, counted from the start of training (exact up to 2**24 = 16.7 million in float32).

    Raises:
        InputError: for rates that are negative or not finite, a max_lr below base_lr, step sizes that are not positive
            whole numbers, a gamma outside (0, 1], an unknown mode or scale_mode, a scale_fn that is not a function.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, arXiv 1506.01186, section 3.1.

    Example:
        >>> from gdopt import schedules
        >>> lr = schedules.cyclical(0.1, 0.5, step_size_up=2, scale_fn=lambda c: 1 / 5 ** (c - 1))
        >>> [round(float(lr(k)), 6) for k in range(8)]
        [0.1, 0.3, 0.5, 0.3, 0.1, 0.14, 0.18, 0.14]
    """
    base, top = rate("base_lr", base_lr, zero=True), rate("max_lr", max_lr)
    if top < base:
        raise InputError(f"max_lr={max_lr!r} is below base_lr={base_lr!r}. Swap them, or raise max_lr.")
    up = whole_number("step_size_up", step_size_up)
    down = up if step_size_down is None else whole_number("step_size_down", step_size_down)
    factor = number("gamma", gamma, lambda x: 0 < x <= 1, "a number above 0 and at most 1, such as 0.9999")
    by_cycle = one_of("scale_mode", scale_mode, ("cycle", "iterations")) == "cycle"
    scales = {
        "triangular": lambda k, c: 1.0,
        "triangular2": lambda k, c: _power(0.5, c - 1),
        "exp_range": lambda k, c: _power(factor, k),
    }
    if scale_fn is None:
        scale = scales[one_of("mode", mode, tuple(scales))]
    elif callable(scale_fn):
        # Floats, because with integers torch's own `1 / 2 ** (c - 1)` overflows in cycle 33.
        scale = lambda k, c: scale_fn((c if by_cycle else k).astype(float))
    else:
        raise InputError(
            f"scale_fn={scale_fn!r} is not a function. Pass one (for example lambda c: 1 / 2 ** (c - 1)), or None."
        )

    def schedule(step: Any) -> jax.Array:
        k = _count(step)
        c, height = _cycle(k, up, down)
        return _between(base, top, height * scale(k, c))

    return schedule


def triangular(base_lr: Scalar, max_lr: Scalar, step_size_up: int, step_size_down: int | None = None) -> Schedule:
    """Return cycles of constant height between base_lr and max_lr: :func:`cyclical` with ``mode="triangular"``.

    Arguments, errors and source are those of :func:`cyclical`.

    Example:
        >>> from gdopt import schedules
        >>> lr = schedules.triangular(0.1, 0.5, step_size_up=2, step_size_down=4)
        >>> [round(float(lr(k)), 6) for k in range(8)]
        [0.1, 0.3, 0.5, 0.4, 0.3, 0.2, 0.1, 0.3]
    """
    return cyclical(base_lr, max_lr, step_size_up, step_size_down)


def triangular2(base_lr: Scalar, max_lr: Scalar, step_size_up: int, step_size_down: int | None = None) -> Schedule:
    """Return cycles above base_lr that halve after each cycle: :func:`cyclical` with ``mode="triangular2"``.

    Arguments, errors and source are those of :func:`cyclical`.

    Example:
        >>> from gdopt import schedules
        >>> lr = schedules.triangular2(0.1, 0.5, step_size_up=1)
        >>> [round(float(lr(k)), 6) for k in range(7)]
        [0.1, 0.5, 0.1, 0.3, 0.1, 0.2, 0.1]
    """
    return cyclical(base_lr, max_lr, step_size_up, step_size_down, mode="triangular2")


def exp_range(
    base_lr: Scalar, max_lr: Scalar, step_size_up: int, step_size_down: int | None = None, *, gamma: Scalar
) -> Schedule:
    """Return cycles above base_lr that shrink by gamma at each step: :func:`cyclical` with ``mode="exp_range"``.

    Arguments, errors and source are those of :func:`cyclical`. A gamma of ``0.5 ** (1 / n)`` halves the height in n
    steps.

    Example:
        >>> from gdopt import schedules
        >>> lr = schedules.exp_range(0.0, 1.0, step_size_up=2, gamma=0.5)
        >>> [round(float(lr(k)), 6) for k in range(5)]
        [0.0, 0.25, 0.25, 0.0625, 0.0]
    """
    return cyclical(base_lr, max_lr, step_size_up, step_size_down, mode="exp_range", gamma=gamma)


def one_cycle(
    max_lr: Scalar,
    total_steps: int,
    pct_start: Scalar = 0.3,
    div_factor: Scalar = 25.0,
    final_div_factor: Scalar = 1e4,
    anneal_strategy: str = "cos",
) -> Schedule:
    """Return one rise to max_lr and one long fall to almost nothing, step by step as torch's ``OneCycleLR``.

    ``optax.cosine_onecycle_schedule`` has other rates: its peak and its end come one step later.

    Args:
        max_lr: the rate at the peak, above 0.
        total_steps: the length of the cycle in steps; all later steps keep its end value.
        pct_start: the part of the steps that rises, in [0, 1]. The peak lies at ``pct_start * total_steps - 1``, which
            need not be a step.
        div_factor: max_lr over the rate of step 0; above 0.
        final_div_factor: the rate of step 0 over the rate of step ``total_steps - 1``; above 0.
        anneal_strategy: "cos" (half a cosine wave each way) or "linear". The defaults are torch's, which are fastai's.

    Raises:
        InputError: for a rate or factors that are not positive and finite, a total_steps that is not a positive whole
            number, a pct_start outside [0, 1], an unknown anneal_strategy.

    Source: Smith and Topin, "Super-Convergence", 2017, arXiv 1708.07120, in the two phases of fastai.

    Example:
        >>> from gdopt import schedules
        >>> lr = schedules.one_cycle(1.0, total_steps=10)
        >>> [round(float(lr(k)), 6) for k in (0, 1, 2, 5, 9, 10)]
        [0.04, 0.52, 1.0, 0.611261, 4e-06, 4e-06]
    """
    top = rate("max_lr", max_lr)
    steps = whole_number("total_steps", total_steps)
    share = number("pct_start", pct_start, lambda x: 0 <= x <= 1, "a number from 0 to 1, such as 0.3")
    start = top / rate("div_factor", div_factor)
    end = start / rate("final_div_factor", final_div_factor)
    linear = one_of("anneal_strategy", anneal_strategy, ("cos", "linear")) == "linear"
    peak, last = share * steps - 1, steps - 1
    rise, fall = peak or 1, (last - peak) or 1  # A part without steps must not divide by zero.

    def schedule(step: Any) -> jax.Array:
        k = jnp.minimum(_count(step), last)
        rising = (k <= math.floor(peak)) & (peak > 0)
        with own_promotion():  # A peak between two steps is compared with whole numbers.
            x = jnp.where(rising, _fraction(k, rise), _fraction(last - k, fall))
        # This equals (1 - cos(pi x)) / 2, which in float32 would lose all digits of a small end rate.
        return _between(jnp.where(rising, start, end), top, x if linear else jnp.sin(jnp.pi / 2 * x) ** 2)

    return schedule


def silver(smoothness: Scalar) -> Schedule:
    """Return silver steps: gradient descent that is proven faster than any constant rate, for smooth convex losses.

    Every second rate is ``sqrt(2) / L``, every fourth ``2 / L``, and rarer ones are longer and longer. The rate of step
    k is ``(1 + rho**(nu(k + 1) - 1)) / L`` with rho = 1 + sqrt(2); nu(n) counts how often 2 divides n. After
    n = 2**m - 1 steps, ``f(x) - f* <= L |x0 - x*|**2 / (1 + sqrt(4 rho**(2 m) - 3))``. This shrinks as n**-1.27, the
    bound of a constant rate as 1 / n. In between, right after a long step, the loss may rise: stop after 2**m - 1 steps
    (1, 3, 7, 15, ...), or keep the best point. The proof is for plain gradient descent on the full loss.

    Args:
        smoothness: L, an upper bound of the largest eigenvalue of the Hessian wherever the steps lead; above 0. It is
            known for some losses: the largest eigenvalue of ``X.T @ X / n`` for half the mean squared error, a quarter
            of that for the mean logistic loss. For others estimate it, as below. An L-smooth loss is smooth with every
            larger L too, so an estimate that is too high is safe, and slower in proportion. One that is too low voids
            the proof and may diverge. Power iteration underestimates L, and sees the Hessian of only one point: leave a
            margin.

    Raises:
        InputError: for a smoothness that is not positive and finite.

    Source: Altschuler and Parrilo, "Acceleration by Stepsize Hedging II: Silver Stepsize Schedule for Smooth Convex
    Optimization", 2023, arXiv 2309.16530, theorem 1.1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gdopt import schedules
        >>> lr = schedules.silver(1.0)
        >>> [round(float(lr(k)), 6) for k in range(8)]
        [1.414214, 2.0, 1.414214, 3.414214, 1.414214, 2.0, 1.414214, 6.828427]

        With an estimated smoothness: a short power iteration on Hessian-vector products.

        >>> loss = lambda x: jnp.sum(jnp.array([5.0, 1.0, 0.1]) * x**2) / 2
        >>> x = jnp.array([1.0, 1.0, 1.0])
        >>> hessian_times = lambda v: jax.jvp(jax.grad(loss), (x,), (v,))[1]
        >>> v = jax.random.normal(jax.random.key(0), x.shape)
        >>> for _ in range(20):
        ...     v = hessian_times(v / jnp.linalg.norm(v))
        >>> smoothness = jnp.linalg.norm(v)
        >>> round(float(smoothness), 3)
        5.0
        >>> lr = schedules.silver(1.1 * smoothness)
        >>> for k in range(31):
        ...     x = x - lr(k) * jax.grad(loss)(x)
        >>> bool(loss(x) < 0.01)
        True
    """
    L = rate("smoothness", smoothness)

    def schedule(step: Any) -> jax.Array:
        n = _count(step) + 1
        nu = lax.population_count((n & -n) - 1)  # the zeros at the end of n in binary
        rates = (1 + _RHO ** (np.arange(8.0 * n.dtype.itemsize) - 1)) / L
        return jnp.asarray(rates, float)[nu]

    return schedule


# With jit, a schedule of these is traced in a few operations. A loop traces it at each call.


@jax.jit
def _cycle(k: jax.Array, up: int, down: int) -> tuple[jax.Array, jax.Array]:
    """Return the number of the cycle, 1 first, and the height within it, from 0 to 1 and back."""
    c, r = 1 + k // (up + down), k % (up + down)
    # This is Smith's |k/S - 2c + 1| for two step sizes, without differences of large numbers.
    return c, jnp.where(r <= up, _fraction(r, up), _fraction(up + down - r, down))


def _between(low: Any, high: Any, weight: jax.Array) -> jax.Array:
    """Return low + (high - low) weight, from the nearer end: exact at both, and never outside them by rounding."""
    return _blend(low, high, high - low, weight)


@jax.jit
def _blend(low: Any, high: Any, span: Any, weight: jax.Array) -> jax.Array:
    return jnp.where(weight < 0.5, low + span * weight, high - span * (1 - weight))


@jax.jit
def _fraction(part: jax.Array, whole: float) -> jax.Array:
    """Return part / whole, exactly 1 if they are equal: XLA multiplies by 1 / whole, which may round to less."""
    return jnp.where(part == whole, 1.0, part.astype(float) / whole)


def _power(base: float, k: jax.Array) -> jax.Array:
    """Return base**k for 0 < base <= 1: float32(base)**k is off by 3e-4 at k = 1e4.

    With the digits d of k to base 256 it is the product of base**(256**i d), factors from tables made in float64.
    """
    tables = base ** np.outer(256.0 ** np.arange(k.dtype.itemsize), np.arange(256))
    return _product_by_digits(jnp.asarray(tables, float), k)


@jax.jit
def _product_by_digits(tables: jax.Array, k: jax.Array) -> jax.Array:
    factors = (table[(k >> 8 * i) & 255] for i, table in enumerate(tables))
    return functools.reduce(jnp.multiply, factors)


def _count(step: Any) -> jax.Array:
    """Return the step as JAX's integer; 0 for negative steps, whose rates ``optax.join_schedules`` drops."""
    step = jnp.asarray(step)
    if not jnp.issubdtype(step.dtype, jnp.integer):
        raise InputError(f"step={step!r} is not a whole number. Count steps with integers, 0 first.")
    return jnp.maximum(step.astype(int), 0)
