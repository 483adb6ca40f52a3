"""The script that test_signals.py interrupts: ``python slow_losses.py KIND`` prints "started" after the first step.

At its end it prints the status, the time, and the mean seconds of a step.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gdopt

SQUARE = np.eye(60, dtype=np.float32)


def rest(x: jax.Array) -> jax.Array:
    """Return 0 after 0.3 seconds."""

    def wait(x: np.ndarray) -> np.ndarray:
        time.sleep(0.3)
        return np.zeros_like(x)

    return jax.pure_callback(wait, jax.ShapeDtypeStruct((), x.dtype), jax.lax.stop_gradient(x))


def loops(x: jax.Array, count: jax.Array) -> jax.Array:
    """Return 0 after work of about 10 microseconds for each count."""
    body = lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ carry[1]))
    begin = jnp.int32(0), jax.lax.stop_gradient(jnp.cos(x)) * SQUARE
    return 0 * jax.lax.while_loop(lambda carry: carry[0] < count, body, begin)[1][0, 0]


def sleeps(x: jax.Array, turns: int) -> jax.Array:
    return x + rest(x)


def slows_down(x: jax.Array, turns: int) -> jax.Array:
    """A loss that falls by 1 in each step, and takes 4 % longer in each, up to 0.1 seconds."""
    count = jnp.exp(0.04 * jnp.minimum(-jax.lax.stop_gradient(x), 230.0)).astype(jnp.int32)
    return x + loops(x, count)


def takes_turns(x: jax.Array, turns: int) -> jax.Array:
    return x + loops(x, jnp.asarray(turns, jnp.int32))


def tell(report: gdopt.Report) -> None:
    if report.step <= 1:
        print("started", flush=True)


LOSSES = {"sleeps": sleeps, "slows down": slows_down, "was fast before": takes_turns}


def main(kind: str) -> gdopt.Result:
    options: dict[str, Any] = {"learning_rate": 1.0, "tol": 0}
    if kind == "was fast before":
        gdopt.minimize(takes_turns, 0.0, args=(0,), max_steps=20_000, **options)
    return gdopt.minimize(LOSSES[kind], 0.0, args=(20_000,), max_steps=10**8, callback=tell, **options)


if __name__ == "__main__":
    result = main(sys.argv[1])
    print(result.status.name, time.monotonic(), result.run_seconds / (result.steps + 1), flush=True)
