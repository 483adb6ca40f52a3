"""Params and data on many devices; two scripts have the tests that need a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import gdopt


@pytest.mark.parametrize("script", ["eight_devices.py", "placed_calls.py"])
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(which: str, script: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "-m",
        which,
        script,
    ]
    folder = Path(__file__).parents[1] / "scripts"
    ran = subprocess.run(command, cwd=folder, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-9000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


def test_runs_resume_on_other_numbers_of_devices(tmp_path: Path) -> None:
    """Params from the host, copied or split, in mini-batches or not: 8 devices, then 4, one without a mesh, and 8."""
    script = Path(__file__).parents[1] / "scripts" / "moved_run.py"
    for place, devices in enumerate((8, 4, 1, 8)):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        steps = 3 * (place + 1)
        command = [sys.executable, str(script), str(tmp_path), str(steps)]
        ran = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-4000:]
        moved = int(place > 0)  # It warns once, and resumes.
        for line in ran.stdout.splitlines():
            assert line.endswith(f"{steps + 1} {moved} {moved == 1}"), ran.stdout


def test_a_mesh_of_one_device_changes_nothing() -> None:
    mesh = jax.make_mesh((1,), ("data",))
    X = gdopt.shard(jnp.arange(12.0).reshape(6, 2), mesh, rows="data")
    start = gdopt.shard(jnp.zeros(2), mesh, largest="data")
    loss = lambda w, X: jnp.mean((X @ w - 1) ** 2)
    run = lambda start: gdopt.minimize(loss, start, args=(X,), learning_rate=0.01, max_steps=3).params
    assert jnp.array_equal(run(start), run(jnp.zeros(2)))
