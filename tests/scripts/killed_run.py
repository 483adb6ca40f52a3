"""The script that test_resuming.py kills: ``python killed_run.py KIND PATH STEPS PAUSE`` prints a hash of all results.

Chunks have at most STEPS steps. After each chunk, a pause of PAUSE seconds for each of its steps leaves time to kill
it.
"""

from __future__ import annotations

import hashlib
import sys
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdopt
from gdopt import schedules
from gdopt._loop import while_loops
from gdopt._run import host_loop

kind, path, chunk, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
while_loops.CAPACITY = chunk  # other sizes of chunks come to the same bits
host_loop._CHUNK_SECONDS = 1e9
ROWS = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)


def loss(w: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.mean((jnp.tanh(rows @ w[:4]) - jnp.sin(rows[:, 0]) - w[4]) ** 2)


def noisy(w: jax.Array, rows: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    return loss(w, rows) * (1 + 0.1 * jax.random.normal(key)), jnp.sum(w)


def batches() -> Any:
    yield from np.split(ROWS, [16, 32, 48])


def grain_batches() -> Any:
    import grain

    sampler = grain.samplers.IndexSampler(len(ROWS), grain.sharding.NoSharding(), shuffle=True, num_epochs=1, seed=1)
    return grain.DataLoader(data_source=cast(Any, ROWS), sampler=sampler, operations=[grain.transforms.Batch(16)])


def valley(w: jax.Array) -> jax.Array:
    return jnp.sum(100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2)


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "batches": (
        noisy,
        {
            "data": ROWS,
            "batch_size": 7,
            "optimizer": optax.adam,
            "learning_rate": schedules.triangular2(1e-3, 0.05, step_size_up=50),
            "with_key": True,
            "has_aux": True,
            "max_steps": 1500,
        },
    ),
    "spectral": (valley, {"optimizer": gdopt.spectral(), "max_steps": 600, "tol": 0.0}),
    "quasi_newton": (valley, {"max_steps": 600, "tol": 0.0}),
    "stream": (loss, {"data": batches, "learning_rate": 0.05, "epochs": 150}),
    "grain": (loss, {"data": grain_batches, "learning_rate": 0.05, "epochs": 100}),
    "auto": (loss, {"data": ROWS, "batch_size": 7, "max_steps": 900}),
    "noise of the optimizer": (
        loss,
        {"data": ROWS, "batch_size": 7, "optimizer": optax.noisy_sgd(0.05, 0.1, 0.55, key=0), "max_steps": 1200},
    ),
}


def slows_down(report: gdopt.Report) -> bool:
    global before
    time.sleep(pause * min(report.step - before, chunk))  # less than all of it where it went on from a save
    before = report.step
    return False


before = 0  # steps that were slowed down for
if __name__ == "__main__":
    saves = None if path == "none" else gdopt.Checkpoint(path, every_seconds=0, keep=2)
    objective, options = CALLS[kind]
    result = gdopt.minimize(objective, jnp.zeros(5), callback=saves and slows_down, checkpoint=saves, **options)
    leaves = jax.tree.leaves((result.params, result.loss, result.grad_norm, result.aux, result.history))
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
    print(digest, result.status.name, result.steps)
