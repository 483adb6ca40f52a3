"""The script that test_processes.py runs twice at the same time: ``python two_processes.py PORT PROCESS CASE``.

Prints its findings as one line of JSON; an error goes to stderr, as in any script.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdopt

port, process, case = sys.argv[1], int(sys.argv[2]), sys.argv[3]
address = f"127.0.0.1:{port}"
if process >= 0:  # -1: alone
    jax.distributed.initialize(address, 2, process, coordinator_bind_address=address, shutdown_timeout_seconds=10)
jax.config.update("jax_enable_x64", True)

ROWS = np.random.default_rng(0).normal(size=(64, 40))
START = {"w": np.full((40, 512), 0.01), "b": np.zeros((1, 512))}
MESH = jax.make_mesh((jax.device_count(),), ("data",))


def loss(params: Any, rows: jax.Array) -> jax.Array:
    return jnp.mean((jnp.tanh(rows @ params["w"] + params["b"]) - jnp.sin(rows[:, :1])) ** 2)


def noisy(params: Any, rows: jax.Array, key: jax.Array) -> jax.Array:
    return loss(params, rows) + 0.01 * jax.random.normal(key) * jnp.sum(params["b"])


def batches() -> Any:
    for begin in range(0, 64, 16):
        yield gdopt.shard(ROWS[begin : begin + 16], MESH, rows="data")


def summary(result: gdopt.Result) -> dict[str, Any]:
    from jax.experimental import multihost_utils

    spread = not result.params["w"].is_fully_addressable
    whole = multihost_utils.process_allgather(result.params, tiled=True) if spread else result.params
    return {
        "status": result.status.name,
        "steps": result.steps,
        "loss": result.history.loss.tolist(),
        "grad_norm": result.history.grad_norm.tolist(),
        "w": np.asarray(whole["w"])[::7, ::50].tolist(),
        "b": np.asarray(whole["b"])[0, ::50].tolist(),
        "shares": sorted(part.data.shape for part in result.params["w"].addressable_shards),
    }


params = gdopt.shard(START, MESH, largest="data")
rows = gdopt.shard(ROWS, MESH, rows="data")
minimize = gdopt.minimize
seen: list[int] = []


def stops(report: gdopt.Report) -> bool:
    """Stop in one process alone. The other has to hear of it."""
    seen.append(report.step)
    return process != 0 and report.step >= 4


def fails(report: gdopt.Report) -> bool:
    if process == 1 and report.step >= 4:
        print(time.time())
        raise RuntimeError("the disk of process 1 is full")
    return False


options: dict[str, Any] = {"batch_size": 16, "with_key": True, "optimizer": optax.adam, "learning_rate": 0.01}
stream: dict[str, Any] = {"learning_rate": 0.1}

if case == "same":
    answers: dict[str, Any] = {
        "full batch": summary(minimize(loss, params, args=(rows,), learning_rate=0.1, max_steps=8, progress=True)),
        "batches": summary(minimize(noisy, params, data=rows, epochs=2, **options)),
        "stream": summary(minimize(loss, params, data=batches, epochs=1, **stream)),
    }
    if process >= 0:
        mine = minimize(
            lambda x: (x - process) ** 2, 3.0, learning_rate=0.25
        )  # of each process its own: nobody waits for the other
        answers["mine"] = [float(mine.params), mine.status.name]
        stopped = minimize(noisy, params, data=rows, max_steps=1000, callback=stops, **options)
        answers["stopped"] = [stopped.status.name, stopped.steps, seen]
        short = lambda: (batch for number, batch in enumerate(batches()) if number < 3 or process == 0)
        uneven = minimize(loss, params, data=short, epochs=1, **stream)
        answers["uneven"] = [uneven.status.name, uneven.steps]
        logs = lambda params, rows: loss(params, rows) + jnp.mean(jnp.log(params["b"] + 0.01))
        found = gdopt.diagnose(minimize(logs, params, args=(rows,), learning_rate=0.1))
        answers["diagnosed"] = [found.step, found.primitive, "logs = lambda" in (found.place or "")]
        try:  # both are told, and may go on
            minimize(loss, params, data=rows, batch_size=32, learning_rate=0.1 + process, max_steps=10**6)
        except gdopt.InputError as error:
            answers["another rate"] = str(error)
    print(json.dumps(answers))
elif case == "validated":
    counted = lambda params, rows: (loss(params, rows), {"largest": jnp.max(params["w"])})
    rises = lambda params, rows: jax.tree.map(jnp.negative, counted(params, rows))
    judged: dict[str, Any] = {"validation": rows, "validation_loss": rises, "patience": 2, "epochs": 9}
    reports: list[int] = []
    folder = Path(tempfile.gettempdir()) / f"gdopt-{port}"
    folder.mkdir(exist_ok=True)
    saved: dict[str, Any] = {"checkpoint": folder / "run"}
    for more in ({}, saved, saved):
        early = minimize(
            counted,
            params,
            data=rows,
            batch_size=16,
            has_aux=True,
            learning_rate=0.1,
            callback=lambda report: reports.append(report.step),
            callback_every=3,
            **judged,
            **more,
        )
    entries = early.history.validation_loss.tolist(), early.history.metrics["largest"].tolist()
    if process == 0:
        shutil.rmtree(folder)
    print(json.dumps([early.status.name, early.steps, entries, reports, summary(early)]))
elif case == "fails":
    minimize(loss, params, data=rows, batch_size=32, learning_rate=0.1, max_steps=10**6, callback=fails)
elif case == "fails early":
    minimize(loss, params, data=rows, batch_size=32, learning_rate=0.1, max_steps=10**6 if process == 0 else -1)
elif case == "closed over":
    minimize(lambda x: jnp.sum((rows @ x) ** 2), np.ones(40))
