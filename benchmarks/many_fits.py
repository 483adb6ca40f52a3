"""What do a thousand small fits cost, one call after the other and all at once?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/many_fits.py                  # about 2 minutes; --quick: under 1, a hundred fits

The fits are logistic regressions of 40 rows by 4 columns with a small penalty, each on other data, from zeros. In a
loop each library is called once per fit, as a user would, with its own stopping defaults; gdopt also by a call that
``gdopt.prepare`` made before, which traces nothing. These run all at once:
``gdopt.minimize`` under ``jax.vmap`` (which leaves a converged fit alone), a hand-written ``while_loop`` around
``gdopt.spectral()``, optimistix under ``jax.vmap``, and one call of ``gdopt.minimize`` on the sum of all losses, which
it sees as one problem. The worst gap is the largest distance of a final loss from the best that any of them found for
that fit.

Then one fit is swept over as many starts, and over as many learning rates, by one ``jax.vmap``. The others wait for the
slowest, so their answers are compared, bit for bit, with those of a sweep in which a fast run replaces the slowest
half.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import scipy.optimize
from jax import lax

import gdopt
from tables import Row, arguments, draw_bars, installed, interleaved, print_heading, print_table, ratios, seconds

PACKAGES = ("jax", "jaxlib", "optax", "gdopt", "optimistix", "scipy", "numpy")
ROWS, COLUMNS = 40, 4
TOL = 1e-3  # of the norm of the gradient, in the hand-written loop
MOST = 500  # steps


def loss(params: jax.Array, data: tuple[jax.Array, jax.Array]) -> jax.Array:
    logits = data[0] @ params
    return jnp.mean(jnp.logaddexp(0.0, logits) - data[1] * logits) + 1e-2 * jnp.sum(params**2)


def problems(count: int) -> tuple[jax.Array, jax.Array]:
    """Features and labels of all fits."""
    random = np.random.default_rng(0)
    features = random.standard_normal((count, ROWS, COLUMNS), np.float32)
    logits = np.einsum("nrc,nc->nr", features, 2 * random.standard_normal((count, COLUMNS)))
    labels = random.random((count, ROWS)) < 1 / (1 + np.exp(-logits))
    return jnp.asarray(features), jnp.asarray(labels, jnp.float32)


def spectral_fit(data: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The loop that one writes around an optax optimizer, to its end on the device."""
    optimizer: Any = gdopt.spectral()
    both = jax.value_and_grad(loss)

    def step(carry: tuple) -> tuple:
        params, state, k, _ = carry
        value, grad = both(params, data)
        updates, state = optimizer.update(grad, state, params, value=value)
        return optax.apply_updates(params, updates), state, k + 1, jnp.linalg.norm(state.grad)

    start = jnp.zeros(COLUMNS)
    going = lambda carry: (carry[3] > TOL) & (carry[2] < MOST)
    return lax.while_loop(going, step, (start, optimizer.init(start), 0, jnp.inf))[1].params


def fits(features: jax.Array, labels: jax.Array) -> dict[str, Callable[[], Any]]:
    """All fits, by each of the ways; the yardstick first."""
    start, all_data = jnp.zeros(COLUMNS), (features, labels)
    each = [jax.block_until_ready((features[k], labels[k])) for k in range(len(features))]
    bfgs = optimistix.BFGS(rtol=1e-4, atol=1e-4)
    jitted = jax.jit(jax.value_and_grad(loss))

    def bfgs_fit(data: tuple[jax.Array, jax.Array]) -> jax.Array:
        return optimistix.minimise(loss, bfgs, start, data, max_steps=MOST, throw=False).value

    def scipy_fit(data: tuple[jax.Array, jax.Array]) -> Any:
        function = lambda x: tuple(map(np.asarray, jitted(x.astype(np.float32), data)))
        return scipy.optimize.minimize(function, np.zeros(COLUMNS), jac=True, method="L-BFGS-B").x

    def sum_of_all(params: jax.Array, data: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.sum(jax.vmap(loss)(params, data))

    def by_hand() -> list[Any]:
        step = jax.jit(lambda x, data: x - 0.5 * jax.grad(loss)(x, data))
        found = []
        for data in each:
            x = start
            for _ in range(100):
                x = step(x, data)
            found.append(x)
        return found

    solve = gdopt.prepare(loss, start, args=(each[0],))
    at_once_minimize = jax.jit(jax.vmap(lambda data: gdopt.minimize(loss, start, args=(data,)).params))
    at_once, at_once_bfgs = jax.jit(jax.vmap(spectral_fit)), jax.jit(jax.vmap(bfgs_fit))
    return {
        "a loop of `gdopt.minimize(loss, params, args=...)`": lambda: [
            gdopt.minimize(loss, start, args=(data,)).params for data in each
        ],
        "a loop of `gdopt.minimize(lambda ...)`, fresh ones": lambda: [
            gdopt.minimize(functools.partial(lambda data, params: loss(params, data), data), start).params
            for data in each
        ],
        "a loop of a call that `gdopt.prepare` made": lambda: [solve(args=(data,)).params for data in each],
        "one `gdopt.minimize` of the sum": lambda: (
            gdopt.minimize(sum_of_all, jnp.zeros((len(each), COLUMNS)), args=(all_data,), tol=1e-6).params
        ),
        "`jax.vmap` of `gdopt.minimize`": lambda: at_once_minimize(all_data),
        "`jax.vmap` of a loop around `gdopt.spectral()`": lambda: at_once(all_data),
        "a loop of optimistix `BFGS`": lambda: [bfgs_fit(data) for data in each],
        "`jax.vmap` of optimistix `BFGS`": lambda: at_once_bfgs(all_data),
        "a loop of scipy L-BFGS-B, jitted loss": lambda: [scipy_fit(data) for data in each],
        "Python loops, 100 jitted steps each": by_hand,
    }


def sweeps(count: int, rounds: int) -> list[Row]:
    """One fit from many starts and with many rates: a loop of calls, one vmap, and whether the fast ones last."""
    features, labels = problems(1)
    data = features[0], labels[0]

    def from_start(start: Any) -> gdopt.Result:
        return gdopt.minimize(loss, start, args=(data,))

    def with_rate(rate: Any) -> gdopt.Result:
        return gdopt.minimize(loss, jnp.zeros(COLUMNS), args=(data,), learning_rate=rate, max_steps=5000)

    random = np.random.default_rng(1)
    starts = jnp.asarray(10.0 ** random.uniform(-2, 2, (count, 1)) * random.standard_normal((count, COLUMNS)), float)
    rows = []
    for name, run, values in (
        ("starts", from_start, starts),
        ("rates, 1e-3 to 100", with_rate, jnp.logspace(-3, 2, count)),
    ):
        sweep = jax.jit(jax.vmap(run))
        each = list(values) if values.ndim > 1 else [float(value) for value in values]
        together = sweep(values)
        slow = together.steps > jnp.median(together.steps)
        place = jnp.argmin(together.steps)
        alone = sweep(jnp.where(slow.reshape(-1, *[1] * (values.ndim - 1)), values[place], values))
        changed = sum(
            int(np.any(np.asarray(a)[~slow] != np.asarray(b)[~slow]))
            for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True)
        )
        steps = np.asarray(together.steps)
        times = interleaved(
            {
                "loop": functools.partial(
                    seconds, lambda run=run, each=each: [run(value) for value in each][-1].params
                ),
                "vmap": functools.partial(seconds, lambda sweep=sweep, values=values: sweep(values).params),
            },
            rounds,
        )
        per_run = np.median(times, axis=0) / count * 1e3
        spread = f"{steps.min()} / {int(np.median(steps))} / {steps.max()}"
        share = f"{np.mean(np.asarray(together.success)):.1%}"
        rows.append(
            Row(name, [f"{per_run[0]:.3g}", f"{per_run[1]:.3g}", ratios(times)[1], spread, share, f"{changed}"])
        )
    return rows


def main() -> None:
    """Prints the tables."""
    options = arguments(__doc__, "a hundred fits", "also draw the table")
    print_heading("many_fits", options.flags, installed(PACKAGES), options.markdown)
    count, rounds = (100, 3) if options.quick else (1000, 5)
    features, labels = problems(count)
    ways = fits(features, labels)
    evaluate = jax.jit(jax.vmap(loss))
    losses = {}
    for name, run in ways.items():
        losses[name] = np.asarray(evaluate(jnp.asarray(np.stack(run()), jnp.float32), (features, labels)))
    best = np.min(list(losses.values()), axis=0)
    times = interleaved({name: functools.partial(seconds, run) for name, run in ways.items()}, rounds)
    milliseconds = dict(zip(ways, np.median(times, axis=0) / count * 1e3, strict=True))
    rows = [
        Row(name, [f"{milliseconds[name]:.3g}", ratio, f"{(losses[name] - best).max():.1e}"])
        for name, ratio in zip(ways, ratios(times), strict=True)
    ]
    header = [f"{count} fits", "ms per fit", "ratio", "worst gap"]
    print_table("All fits, warm: the ratio to the first row, median (quartiles)", header, rows, options.markdown)
    header = [f"{count} of", "loop, ms per run", "vmap, ms per run", "ratio", "steps, least / median / most"]
    header += ["with success", "numbers that changed"]
    title = "Sweeps by one `jax.vmap` of `gdopt.minimize`, against a loop of calls"
    print_table(title, header, sweeps(count, min(rounds, 3)), options.markdown)
    if options.picture:
        draw_bars(milliseconds, "ms per fit", options.picture, log=True)


if __name__ == "__main__":
    main()
