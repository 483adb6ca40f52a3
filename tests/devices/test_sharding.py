"""Params and data on many devices; eight_devices.py has the tests that need a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import gdopt


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(which: str) -> None:
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
        "eight_devices.py",
    ]
    folder = Path(__file__).parents[1] / "scripts"
    ran = subprocess.run(command, cwd=folder, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-9000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


def test_a_mesh_of_one_device_changes_nothing() -> None:
    mesh = jax.make_mesh((1,), ("data",))
    X = gdopt.shard(jnp.arange(12.0).reshape(6, 2), mesh, rows="data")
    start = gdopt.shard(jnp.zeros(2), mesh, largest="data")
    loss = lambda w, X: jnp.mean((X @ w - 1) ** 2)
    run = lambda start: gdopt.minimize(loss, start, args=(X,), learning_rate=0.01, max_steps=3).params
    assert jnp.array_equal(run(start), run(jnp.zeros(2)))
