"""Checkpoints of version 0.1.0 load, and their runs resume. The files are by that version, see `RUNS`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdopt
from gdopt.schedules import triangular

FOLDER = Path(__file__).parent / "saves_0_1"
ROWS = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)


def loss(w: Any, rows: Any) -> Any:
    return jnp.mean((rows @ w - 1) ** 2)


def full(w: Any) -> Any:
    return jnp.sum((w - jnp.arange(3.0)) ** 4)


BATCHES: dict[str, Any] = {"data": ROWS, "batch_size": 7}
# Each of the files is a run of 20 steps with these arguments.
RUNS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "adam": (loss, {**BATCHES, "optimizer": optax.adam, "learning_rate": 0.01}),
    "auto": (loss, {**BATCHES, "optimizer": optax.adam}),
    "gd": (full, {"optimizer": gdopt.gd, "learning_rate": 0.01, "tol": 0}),
    "schedule": (
        full,
        {"optimizer": optax.sgd, "learning_rate": triangular(0.001, 0.01, step_size_up=4), "tol": 0},
    ),
    "spectral": (full, {"optimizer": gdopt.spectral(), "tol": 0}),
    "stream": (
        loss,
        {"data": lambda: iter(np.split(ROWS, 5)), "optimizer": optax.adam, "learning_rate": 0.01},
    ),
}


@pytest.mark.filterwarnings(
    "ignore:the loss is not that of the checkpoint .*, or its trace differs"
)  # another JAX than theirs
@pytest.mark.filterwarnings("ignore:the checkpoint .* was made on .* with .*gdopt 0.1.0")
@pytest.mark.filterwarnings("ignore:this call differs .*learning_rate=0.0403232.* at step 19")  # longer cycles
@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_run_of_version_0_1_resumes(name: str, tmp_path: Path) -> None:
    function, options = RUNS[name]
    shutil.copy(FOLDER / f"{name}.{20:012d}.gdopt", tmp_path)
    result = gdopt.minimize(function, jnp.zeros(3), max_steps=60, checkpoint=tmp_path / name, **options)
    whole = gdopt.minimize(function, jnp.zeros(3), max_steps=60, **options)
    assert "It resumed from step 20, saved in" in result.message
    assert result.steps == 60
    if name in ("adam", "gd", "schedule", "stream"):
        np.testing.assert_allclose(result.params, whole.params, rtol=1e-4)
    assert result.loss <= 1.5 * whole.loss + 1e-6  # A search begins anew there, and cycles are longer.


def test_a_missing_field_is_new_only_in_checkpoints_of_version_0_1(tmp_path: Path) -> None:
    """A file of this version that lacks one was changed by somebody: see test_schema.py."""
    function, options = RUNS["adam"]
    shutil.copy(FOLDER / f"adam.{20:012d}.gdopt", tmp_path)
    with pytest.raises(gdopt.InputError, match="of another run: its optimizer is <function adam"):
        gdopt.minimize(function, jnp.zeros(3), checkpoint=tmp_path / "adam", **{**options, "optimizer": optax.sgd})
