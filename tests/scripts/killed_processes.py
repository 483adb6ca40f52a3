"""The script that test_processes.py kills: ``python killed_processes.py PORT PROCESS CASE PATH``, two at the same time.

Prints, as one line of JSON, hashes of the results of the run with checkpoints and of one without.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

import gdopt
from gdopt._run import host_loop

port, process, case, path = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
address = f"127.0.0.1:{port}"
jax.distributed.initialize(address, 2, process, coordinator_bind_address=address, shutdown_timeout_seconds=10)

host_loop._CHUNK_SECONDS = 1e-4  # so that there are many, and time to be killed in
ROWS = np.random.default_rng(0).normal(size=(64, 40)).astype(np.float32)
# Large ones are split; of "0/w" and "0" a file system would make a file and a directory of one name.
START = {
    "0/w": np.full((40, 512), 0.01, np.float32),
    "0": np.full((512, 40), 0.01, np.float32),
    "b": np.zeros((1, 512)),
}
STEPS = 500 if case == "killed" else 60
MESH = jax.make_mesh((jax.device_count(),), ("data",))


def loss(params: Any, rows: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
    hidden = jnp.tanh(rows @ params["0/w"] + params["b"])
    errors = (hidden @ params["0"] - jnp.sin(rows)) ** 2
    return jnp.mean(errors) + 0.01 * jax.random.normal(key) * jnp.sum(params["b"]), (jnp.sum(errors), errors[:0])


params = gdopt.shard(START, MESH, largest=None if case == "copied" else "data")
rows = gdopt.shard(ROWS, MESH, rows="data")
calls = 0


def between(report: gdopt.Report) -> bool:
    """Slow the run down so that it can be killed. In one case the disk of process 1 refuses the first saves."""
    global calls
    time.sleep(0.02)
    calls += 1
    if case == "refused" and process == 1 and calls in (1, 12):
        limit = 1000 if calls == 1 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))  # bytes in a file
    return False


def came_to(saves: gdopt.Checkpoint | None) -> tuple[str, int]:
    options = {"batch_size": 16, "with_key": True, "has_aux": True, "optimizer": optax.adam, "learning_rate": 0.01}
    callback = between if saves else None
    result = gdopt.minimize(loss, params, data=rows, max_steps=STEPS, checkpoint=saves, callback=callback, **options)
    whole = result.params if case == "copied" else multihost_utils.process_allgather(result.params, tiled=True)
    leaves = jax.tree.leaves((whole, result.loss, result.aux, result.history))
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest(), result.steps


if case == "elsewhere":
    path = path.replace("run", f"{process}/run")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found: dict[str, Any] = {"saved": came_to(gdopt.Checkpoint(path, every_seconds=0.1, keep=2))}
found["warnings"] = [str(warning.message) for warning in caught if "checkpoint" in str(warning.message)]
found["whole"] = came_to(None)
print(json.dumps(found))
