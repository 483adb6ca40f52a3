"""Runs that resume on the devices of this process, and take some more steps: moved_run.py FOLDER STEPS."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdopt

ROWS = np.random.default_rng(0).normal(size=(64, 160)).astype(np.float32)
START = {"w": np.full((160, 128), 0.01, np.float32), "b": np.zeros((1, 128), np.float32), "c": np.float32(0.5)}
ADAM: dict[str, Any] = {"optimizer": optax.adam, "learning_rate": 0.01}
RUNS: dict[str, dict[str, Any]] = {
    "from the host": {"learning_rate": 0.1},
    "replicated": {**ADAM, "batch_size": 16},
    "split": {"optimizer": gdopt.quasi_newton()},
    "closed over": {"learning_rate": 0.1},
}


def loss(params: Any, rows: jax.Array) -> jax.Array:
    hidden = jnp.tanh(rows @ params["w"] + params["b"])
    return jnp.mean((hidden - params["c"] * jnp.sin(jnp.mean(rows, axis=1, keepdims=True))) ** 2)


def main(folder: str, steps: int) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    alone = jax.device_count() == 1  # Then there is no mesh at all.
    rows = jnp.asarray(ROWS) if alone else gdopt.shard(ROWS, mesh, rows="data")
    for name, options in RUNS.items():
        largest = "data" if name == "split" else None
        start = START if alone or name == "from the host" else gdopt.shard(START, mesh, largest=largest)
        given: dict[str, Any] = {"data": rows}
        function = loss
        if name == "closed over":
            given, function = {}, lambda params, rows=rows: loss(params, rows)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            path = os.path.join(folder, name)
            result = gdopt.minimize(function, start, **given, max_steps=steps, checkpoint=path, **options)
        assert all("was made on cpu" in str(warning.message) for warning in caught), caught
        whole = gdopt.minimize(loss, START, data=ROWS, max_steps=steps, **options)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), result.params, whole.params)
        np.testing.assert_allclose(result.history.loss, whole.history.loss, rtol=1e-3, atol=1e-5)
        assert len(result.params["w"].devices()) == jax.device_count()
        print(name, len(result.history.loss), len(caught), "resumed" in result.message)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
