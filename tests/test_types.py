"""Calls as users with a type checker write them: pytest runs them, and `make types` checks them strictly."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=error
# pyright: reportMissingTypeStubs=false, reportOptionalMemberAccess=error, reportUnknownMemberType=false

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import gdopt


class Params(TypedDict):
    slope: jax.Array
    offset: jax.Array


Batch = tuple[jax.Array, jax.Array]

X = jnp.linspace(-1, 1, 40)
Y = 3 * X + 1
START: Params = {"slope": jnp.zeros(()), "offset": jnp.zeros(())}


def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((params["slope"] * x + params["offset"] - y) ** 2)


def on_batch(params: Params, batch: Batch) -> jax.Array:
    return loss(params, *batch)


def test_a_result() -> None:
    result = gdopt.minimize(loss, START, args=(X, Y)).raise_for_status()
    params: Params = result.params
    assert abs(float(params["slope"]) - 3) < 0.1
    assert result.history is not None
    losses: np.ndarray = result.history.loss
    assert len(losses) == result.steps + 1
    assert result.status is gdopt.Status.CONVERGED
    assert f"{result.loss:.3g} {result.status.name}: {result.message}"
    assert result.range_test is None


def test_a_range_test_and_its_suggestion() -> None:
    test = gdopt.lr_find(on_batch, START, data=(X, Y), batch_size=8, optimizer=optax.adam)
    assert test.suggestion is not None
    run = functools.partial(gdopt.minimize, on_batch, START, data=(X, Y), batch_size=8, epochs=2, optimizer=optax.adam)
    assert run(learning_rate=test.suggestion).steps == 10
    assert run(learning_rate=gdopt.schedules.triangular2(test.suggestion / 2, 2 * test.suggestion, 3)).steps == 10


def test_rates_of_all_kinds() -> None:
    def falling(step: jax.Array) -> jax.Array:
        return 0.1 / (1 + step)

    for rate in (0.1, 1, np.float32(0.1), jnp.asarray(0.1), optax.cosine_decay_schedule(0.1, 9), falling):
        assert gdopt.minimize(loss, START, args=(X, Y), learning_rate=rate, max_steps=3, tol=0).steps == 3
    params, value = gdopt.gd_step(loss, START, 0.1, X, Y)
    assert float(value) > float(loss(params, X, Y))


def test_a_stream_a_callback_and_a_checkpoint(tmp_path: Path) -> None:
    def batches() -> Iterator[Batch]:
        for begin in range(0, 40, 8):
            yield X[begin : begin + 8], Y[begin : begin + 8]

    def enough(report: gdopt.Report) -> bool:
        return report.epoch >= 2 and report.loss < 1e9

    saves = gdopt.Checkpoint(tmp_path / "run", every_seconds=30, keep=2)
    rate = gdopt.schedules.constant(0.1)
    for checkpoint in (None, str(tmp_path / "text"), tmp_path / "path", saves):
        result = gdopt.minimize(
            on_batch, START, data=batches, learning_rate=rate, epochs=3, callback=enough, checkpoint=checkpoint
        )
        assert result.status is gdopt.Status.STOPPED


def test_figures(tmp_path: Path) -> None:
    result = gdopt.minimize(loss, START, args=(X, Y))
    figure: Figure = gdopt.plot.descent(result)
    figure.savefig(tmp_path / "descent.png")
    axes = Figure().subplots()
    assert gdopt.plot.lr_find(gdopt.lr_find(loss, START, args=(X, Y)), ax=axes) is axes.figure
    assert gdopt.plot.schedule(gdopt.schedules.triangular(0.1, 0.2, 5), 20).axes


def test_an_optimizer_in_a_loop_of_its_own() -> None:
    optimizer = gdopt.spectral()
    state = optimizer.init(jnp.ones(2))
    _, state = optimizer.update(jnp.ones(2), state, jnp.ones(2), value=1.0)
    assert gdopt.minimize(loss, START, args=(X, Y), optimizer=gdopt.quasi_newton()).success


def refused(result: gdopt.Result, test: gdopt.RangeTest) -> None:
    """Only checked, not run: each line has an error, or its ignore would be one."""
    result.history.loss.min()  # pyright: ignore[reportOptionalMemberAccess]
    result.loss = 0.0  # pyright: ignore[reportAttributeAccessIssue]
    gdopt.minimize(loss, START, learning_rate=test.suggestion)  # pyright: ignore[reportArgumentType]
    gdopt.minimize(loss, START, learning_rate="fast")  # pyright: ignore[reportArgumentType]
    gdopt.minimize(loss, START, args=X)  # pyright: ignore[reportArgumentType]
    gdopt.minimize(loss, START, steps=9)  # pyright: ignore[reportCallIssue]
    gdopt.minimize(loss, START, optimizer="adam")  # pyright: ignore[reportArgumentType]
    gdopt.minimize(loss)  # pyright: ignore[reportCallIssue]
    gdopt.plot.descent(test)  # pyright: ignore[reportArgumentType]
    gdopt.plot.lr_find(result)  # pyright: ignore[reportArgumentType]
    gdopt.schedules.constant("0.1")  # pyright: ignore[reportArgumentType]
