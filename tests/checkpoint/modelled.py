"""A run that is made, killed, changed and damaged at random, and a plain loop that says what it has to give.

As a script, ``python modelled.py PATH RATE GOAL STEPS DEVICES PAUSE`` makes the run in a process of its own, which
pauses after each report so that it can be killed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdopt

ROWS = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
BATCH_SIZE = 8
PER_EPOCH = len(ROWS) // BATCH_SIZE


class Call(NamedTuple):
    """What calls of the run differ in."""

    rate: float = 0.05
    goal: float = 1.0  # a number that the loss closes over
    max_steps: int = 40


def loss_for(goal: float) -> Callable:
    table = jnp.full((), goal)
    return lambda w, rows: jnp.mean((rows @ w - table) ** 2)


def run(path: Any, call: Call, data: Any = ROWS, **options: Any) -> gdopt.Result:
    return gdopt.minimize(
        loss_for(call.goal),
        jnp.zeros(3),
        data=data,
        batch_size=BATCH_SIZE,
        optimizer=optax.adam,
        learning_rate=call.rate,
        max_steps=call.max_steps,
        checkpoint=None if path is None else gdopt.Checkpoint(path, every_seconds=0, keep=4),
        **options,
    )


@cache
def _gradient(goal: float) -> Callable:
    return jax.jit(jax.value_and_grad(loss_for(goal)))


@cache
def plain_losses(calls: tuple[Call, ...]) -> tuple[float, ...]:
    """Return the losses of a loop as anybody would write it, in which step k is made by the call ``calls[k]``."""
    w, optimizer = jnp.zeros(3), optax.scale_by_adam()
    state, losses, order = optimizer.init(w), [], np.arange(len(ROWS))
    key = jax.random.fold_in(jax.random.key(0), 0)  # of the shuffling
    for step, call in enumerate(calls):
        if step % PER_EPOCH == 0:
            order = jax.random.permutation(jax.random.fold_in(key, step // PER_EPOCH), len(ROWS))
        at = step % PER_EPOCH * BATCH_SIZE
        value, grad = _gradient(call.goal)(w, ROWS[np.asarray(order)[at : at + BATCH_SIZE]])
        losses.append(float(value))
        updates, state = optimizer.update(grad, state)
        w = w - call.rate * jnp.asarray(updates)
    return tuple(losses)


def main(arguments: Sequence[str]) -> None:
    path, rate, goal, steps, devices, pause = arguments
    data: Any = ROWS
    if int(devices) > 1:
        mesh = jax.make_mesh((int(devices),), ("data",), devices=jax.devices()[: int(devices)])
        data = gdopt.shard(ROWS, mesh, rows="data")

    def report(report: gdopt.Report) -> None:
        print(report.step, flush=True)
        time.sleep(float(pause))

    print("start", flush=True)
    result = run(path, Call(float(rate), float(goal), int(steps)), data, callback=report)
    assert result.history is not None
    print("end", *map(repr, result.history.loss.tolist()), flush=True)


if __name__ == "__main__":
    partial(main, sys.argv[1:])()
