"""The script that test_leaks.py runs: ``python many_calls.py CALLS`` prints as JSON what is held before and after the
calls.

It has its own process, because other tests compile, which takes memory for good.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdopt

NOISE = np.random.default_rng(0)
KINDS = ("plain", "a rate", "jitted", "batches", "stream", "checkpoint", "callback")


def fresh(*shape: int) -> np.ndarray:
    return NOISE.normal(size=shape).astype(np.float32)


def call(kind: str, path: str) -> None:
    """Make a call in which everything but the code is new: functions, closures, data, files."""
    rows, target, shift = fresh(64, 8), fresh(64), jnp.asarray(fresh(8))
    whole = lambda w: jnp.mean((rows @ w - target) ** 2) + jnp.sum((w - shift) ** 2)
    some = lambda w, batch: jnp.mean((batch @ w - 1) ** 2) + jnp.sum((w - shift) ** 2)
    steps: dict[str, Any] = {"max_steps": 40, "learning_rate": 0.01}
    match kind:
        case "plain":
            gdopt.minimize(whole, jnp.zeros(8), max_steps=40)
        case "a rate":
            gdopt.minimize(whole, jnp.zeros(8), optimizer=lambda rate: optax.sgd(rate, momentum=0.9), **steps)
        case "jitted":
            gdopt.minimize(jax.jit(whole), jnp.zeros(8), **steps)
        case "batches":
            gdopt.minimize(
                some, jnp.zeros(8), data=rows, batch_size=16, key=jax.random.key(int(target[0] * 9)), **steps
            )
        case "stream":
            gdopt.minimize(some, jnp.zeros(8), data=lambda: iter(np.split(rows, 4)), epochs=2, learning_rate=0.01)
        case "checkpoint":
            saves = gdopt.Checkpoint(path, every_seconds=0, keep=1)
            gdopt.minimize(some, jnp.zeros(8), data=rows, batch_size=16, checkpoint=saves, **steps)
        case "callback":
            seen = []
            gdopt.minimize(whole, jnp.zeros(8), callback=lambda report: seen.append((report, whole)), **steps)
        case _:
            raise ValueError(kind)


def held() -> dict[str, int]:
    gc.collect()
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "resident bytes": resident,
        "arrays": len(jax.live_arrays()),
        "threads of Python": threading.active_count(),
        "threads": len(os.listdir("/proc/self/task")),
        "open files": len(os.listdir("/proc/self/fd")),
    }


if __name__ == "__main__":
    calls = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as directory:

        def make(count: int, first: int) -> None:
            for number in range(first, first + count):
                call(KINDS[number % len(KINDS)], os.path.join(directory, f"run{number}"))

        make(70, 0)  # what is compiled and kept once, by gdopt and by JAX, and the arenas of malloc
        before, began = held(), time.perf_counter()
        make(calls, 70)
        seconds = time.perf_counter() - began
        print(json.dumps({"before": before, "after": held(), "seconds": seconds}))
