"""How good is the rate that a learning-rate finder suggests, how far does it spread, and what does it cost?

python benchmarks/lr_finders.py [--quick] [--markdown]
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gdopt
from gdopt._rate_finder.rules import RULES
from networks import TRAININGS, Training
from tables import Row, arguments, print_heading, print_table, processes

EPOCHS = 10
SEEDS = 10
GRID = np.geomspace(1e-3, 1e2, 15)
LADDER = (1e-6, 1e2)  # for rules without a range of their own, and to show what a range does to them
PACKAGES = ("gdopt", "jax", "optax", "scikit-learn")


class Curve(NamedTuple):
    """The measurements of a finder: its rates and, from each rule's own training, the raw losses."""

    rates: np.ndarray
    losses: np.ndarray


# --- the peers, at their own defaults: ladder, smoothing, stop, rule ---


def fastai(rule: str, curve: Callable[[np.ndarray], Curve]) -> float | None:
    """fastai 2.8, ``Learner.lr_find``; its default rule is "valley"."""
    start, end, count = 1e-7, 10.0, 100
    rates, losses = curve(start * (end / start) ** (np.arange(count) / count))
    rates, smoothed = stopped(rates, averaged(losses, 0.98), times=4)
    window = slice(count // 10, -5)
    rates, smoothed = rates[window], smoothed[window]
    return RULES[rule](rates, smoothed) if len(rates) > 1 else None


def lightning(curve: Callable[[np.ndarray], Curve]) -> float | None:
    """Lightning 2.6, ``Tuner.lr_find``: a bias correction that is one step late, slopes over the rate itself."""
    start, end, count = 1e-8, 1.0, 100
    place = np.arange(count) + (np.arange(count) > 0)
    rates, losses = curve(start * (end / start) ** (place / count))
    rates, smoothed = stopped(rates, averaged(losses, 0.98, late=1), times=4)
    rates, smoothed = rates[10:-1], smoothed[10:-1]
    return float(rates[np.argmin(np.gradient(smoothed, rates))]) if len(rates) > 1 else None


def ignite(curve: Callable[[np.ndarray], Curve]) -> float | None:
    """ignite 0.5, ``FastaiLRFinder``, from the rate of ``torch.optim.SGD``; 100 steps where an epoch is shorter."""
    start, end, count = 1e-3, 10.0, 100
    rates, losses = curve(start * (end / start) ** ((np.arange(count) + 1) / count))
    rates, smoothed = stopped(rates, recursive(losses), times=5)
    falling = smoothed[: np.argmin(smoothed) + 1]
    return float(rates[1 + np.argmin(falling[2:] - falling[:-2])]) if len(falling) >= 3 else None


def torch_lr_finder(curve: Callable[[np.ndarray], Curve]) -> float | None:
    """torch-lr-finder 0.2, from 1e-7 as in its README; the suggestion of its plot."""
    start, end, count = 1e-7, 10.0, 100
    rates, losses = curve(np.geomspace(start, end, count))
    rates, smoothed = stopped(rates, recursive(losses), times=5)
    rates, smoothed = rates[10:-5], smoothed[10:-5]
    return float(rates[np.argmin(np.gradient(smoothed))]) if len(rates) > 1 else None


def averaged(losses: np.ndarray, beta: float, late: int = 0) -> np.ndarray:
    """An exponential moving average, divided by the sum of its weights; ``late`` counts weights that are not there."""
    average, smoothed = 0.0, []
    for k, loss in enumerate(losses):
        average = beta * average + (1 - beta) * loss
        smoothed.append(average / (1 - beta ** (k + 1 + late)))
    return np.array(smoothed)


def recursive(losses: np.ndarray) -> np.ndarray:
    """A twentieth of each loss, the rest from before; the first counts in full."""
    smoothed = list(losses[:1])
    for loss in losses[1:]:
        smoothed.append(0.05 * loss + 0.95 * smoothed[-1])
    return np.array(smoothed)


def stopped(rates: np.ndarray, smoothed: np.ndarray, times: float) -> Curve:
    """Up to where the loss is so many times its best, or no longer finite."""
    best = np.fmin.accumulate(smoothed)
    over = ~(smoothed <= times * best)
    count = int(over.argmax()) + 1 if over.any() else len(rates)
    finite = np.isfinite(smoothed[:count])
    return Curve(rates[:count][finite], smoothed[:count][finite])


# --- what is measured ---


def measure(name: str, seed: int) -> dict[str, tuple[float, float, bool]]:
    """By finder, and by grid rate: the rate, the training loss in the end, and whether it diverged."""
    find = functools.partial(TRAININGS[name].run, gdopt.lr_find, seed, key=jax.random.key(1000 + seed))
    curve = functools.partial(range_curve, name, seed)
    found = find()
    rates: dict[str, float | None] = {f"grid {rate:.3g}": rate for rate in GRID}
    rates |= {
        "**gdopt**": found.suggestion,
        "**gdopt**, `repeats=5`": find(repeats=5).suggestion,
        "**gdopt**, `refine=True`": find(refine=True).suggestion,
        "gdopt, 200 rates over 8 decades": find(start_lr=LADDER[0], end_lr=LADDER[1], num_steps=200).suggestion,
    }
    rates |= {f"gdopt, rule `{rule}`": found.suggestions[rule] for rule in ("steep", "valley", "slide", "minimum")}
    rates |= {f"fastai, `{rule}`": fastai(rule, curve) for rule in ("valley", "slide", "steep", "minimum")}
    rates |= {
        "Lightning": lightning(curve),
        "ignite": ignite(curve),
        "torch-lr-finder": torch_lr_finder(curve),
    }
    return {finder: (rate or np.nan, *train(TRAININGS[name], rate, seed)) for finder, rate in rates.items()}


def train(training: Training, rate: float | None, seed: int) -> tuple[float, bool]:
    """The loss over all rows after the training, and whether it diverged; without a rate, that of the start."""
    rows, _ = training.rows()
    began = float(training.loss(training.start(seed), rows))
    if rate is None:
        return began, False
    result = training.run(gdopt.minimize, seed, learning_rate=rate, epochs=EPOCHS, key=jax.random.key(seed))
    loss = float(training.loss(result.params, rows))
    diverged = not result.success or not loss < 0.9 * began
    return (max(loss, began) if diverged else loss), diverged


def range_curve(name: str, seed: int, rates: np.ndarray) -> Curve:
    """The peers' training: batch after batch at these rates, shuffled anew in each epoch."""
    training = TRAININGS[name]
    rows, _ = training.rows()
    random, per_epoch = np.random.default_rng(seed), len(rows[0]) // training.batch_size
    epochs = [random.permutation(len(rows[0])) for _ in range(-(-len(rates) // per_epoch))]
    batches = np.concatenate([order[: per_epoch * training.batch_size].reshape(per_epoch, -1) for order in epochs])
    losses = _climb(name, rows, training.start(seed), batches[: len(rates)], jnp.asarray(rates, jnp.float32))
    return Curve(rates, np.asarray(losses, float))


@functools.partial(jax.jit, static_argnums=0)
def _climb(name: str, rows: Any, params: Any, batches: jax.Array, rates: jax.Array) -> jax.Array:
    training = TRAININGS[name]

    def step(carry: Any, now: Any) -> tuple[Any, jax.Array]:
        (params, state), (batch, rate) = carry, now
        loss, grad = jax.value_and_grad(training.loss)(params, jax.tree.map(lambda array: array[batch], rows))
        updates, state = training.optimizer(rate).update(grad, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), loss

    return jax.lax.scan(step, (params, training.optimizer(1.0).init(params)), (batches, rates))[1]


# --- the tables ---


def quality_table(names: list[str], seeds: int) -> tuple[list[str], list[Row], list[str], list[Row]]:
    """Headers and rows: all finders over all trainings; and gdopt's suggestion by training."""
    jobs = [(name, seed) for name in names for seed in range(seeds)]
    with processes(os.cpu_count() or 1, x64=False) as pool:
        runs = dict(zip(jobs, pool.map(measure, *zip(*jobs, strict=True), chunksize=seeds), strict=True))

    finders = [finder for finder in runs[jobs[0]] if not finder.startswith("grid")]
    ratios: dict[str, list[float]] = {finder: [] for finder in finders}
    spread: dict[str, list[float]] = {finder: [] for finder in finders}
    by_training = []
    for name in names:
        seen = [runs[name, seed] for seed in range(seeds)]
        grid = [key for key in seen[0] if key.startswith("grid")]
        best = min(grid, key=lambda key: np.mean([np.log(run[key][1]) for run in seen]))
        for finder in finders:
            ratios[finder] += [run[finder][1] / run[best][1] for run in seen]
            rates = np.array([run[finder][0] for run in seen])
            spread[finder] += [*np.exp(np.abs(np.log(rates / np.nanmedian(rates))))]
        ours = [run["**gdopt**"] for run in seen]
        own = np.array([run["**gdopt**"][1] / run[best][1] for run in seen])
        rates = np.array([rate for rate, _, _ in ours])
        cells = [best.removeprefix("grid "), f"{np.median(rates):.2g} ({rates.min():.2g}-{rates.max():.2g})"]
        by_training.append(Row(name, [*cells, f"{geometric(own):.2f}", f"{own.max():.2f}"]))

    rows = []
    for finder in finders:
        ratio, wide = np.array(ratios[finder]), np.array(spread[finder])
        cells = [f"{geometric(ratio):.2f}", f"{ratio.max():.2f}"]
        cells += [f"{sum(run[finder][2] for run in runs.values())}/{len(jobs)}", f"{np.isnan(wide).sum()}"]
        known = wide[~np.isnan(wide)]
        cells += [f"x{np.quantile(known, 0.9):.2f}" if known.size else "-"]
        rows.append(Row(finder, cells))
    header = ["finder", "mean ratio", "worst", "diverged", "no suggestion", "90 % of the seeds within"]
    return header, rows, ["training", "best of the grid", "gdopt's suggestion", "mean ratio", "worst"], by_training


def geometric(values: np.ndarray) -> float:
    """The geometric mean."""
    return float(np.exp(np.log(values).mean()))


def time_table(rounds: int) -> tuple[list[str], list[Row]]:
    """Header and rows: a warm test of 200 rates on the digits MLP, in turn."""
    training = TRAININGS["digits, MLP"]
    rows, _ = training.rows()
    data, params = jax.tree.map(jnp.asarray, rows), training.start(0)

    def ours(**more: Any) -> Callable[[], Any]:
        return lambda: gdopt.lr_find(
            training.loss, params, data=data, batch_size=training.batch_size, num_steps=200, **more
        )

    clocks = {"gdopt": ours(), "gdopt, `repeats=5`": ours(repeats=5), "gdopt, `refine=True`": ours(refine=True)}
    try:
        clocks["torch-lr-finder"] = torch_clock(rows)
    except ImportError:
        clocks["torch-lr-finder"] = lambda: None
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds + 2):
        for name, run in clocks.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    warm = {name: np.array(seconds[2:]) for name, seconds in times.items()}
    table = [
        Row(name, [f"{np.median(seconds) * 1e3:.0f}", f"{np.median(warm['torch-lr-finder'] / seconds):.1f}"])
        for name, seconds in warm.items()
        if np.median(seconds) > 1e-4
    ]
    return ["range test", "ms", "times faster than torch-lr-finder"], table


def torch_clock(rows: Any) -> Callable[[], Any]:
    """The same test in torch: a DataLoader over tensors, shuffled, as in torch-lr-finder's README."""
    import torch
    from torch_lr_finder import LRFinder  # pyright: ignore[reportMissingImports]

    x, y = torch.tensor(np.asarray(rows[0])), torch.tensor(np.asarray(rows[1]), dtype=torch.long)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64, shuffle=True)
    layers = torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    model = torch.nn.Sequential(*layers)

    def run() -> None:
        finder = LRFinder(model, torch.optim.SGD(model.parameters(), lr=1e-5), torch.nn.CrossEntropyLoss())
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            finder.range_test(loader, end_lr=10, num_iter=200, diverge_th=float("inf"))
        finder.reset()

    return run


def main() -> None:
    """Prints the tables."""
    options = arguments(__doc__, "three seeds of three trainings, in under two minutes")
    print_heading("lr_finders", options.flags, PACKAGES, options.markdown)
    names = [*TRAININGS][1::2] if options.quick else [*TRAININGS]
    seeds = 3 if options.quick else SEEDS
    header, rows, by_header, by_rows = quality_table(names, seeds)
    title = (
        f"Final training loss over that of the best of {len(GRID)} rates: {len(names)} trainings, {seeds} seeds each"
    )
    print_table(title, header, rows, options.markdown)
    print_table("The default suggestion by training", by_header, by_rows, options.markdown)
    print_table("Time of a warm test of 200 rates", *time_table(3 if options.quick else 15), options.markdown)


if __name__ == "__main__":
    main()
