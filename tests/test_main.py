"""``python -m gdopt`` says what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import jax

import gdopt

BUG = Path(__file__).resolve().parents[1] / ".github" / "ISSUE_TEMPLATE" / "bug.yml"


def printed(*before: str) -> dict[str, str]:
    """What the command prints, by name; code that comes ``before`` is run in its process."""
    code = ["-c", "\n".join([*before, "import runpy; runpy.run_module('gdopt', run_name='__main__')"])]
    command = [sys.executable, *(code if before else ["-m", "gdopt"])]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    lines = [line.split("  ", 1) for line in run.stdout.splitlines()]
    return {name.strip(): value.strip() for name, value in lines}


def test_it_prints_versions_devices_extras_and_the_self_check() -> None:
    found = printed()
    assert found["gdopt"] == gdopt.__version__
    assert found["Python"] == platform.python_version()
    assert found["platform"] == platform.platform()
    for package in ("jax", "jaxlib", "numpy", "optax"):
        assert found[package] == importlib.metadata.version(package)
    kinds = {device.device_kind for device in jax.devices()}
    assert all(kind in found["devices"] for kind in kinds)
    for extra, package in {"plot": "matplotlib", "progress": "tqdm", "checkpoint": "orbax-checkpoint"}.items():
        assert found[f"extra {extra}"] == f"{package} {importlib.metadata.version(package)}"
    assert found["shared programs"] == "yes, the self-check holds"


def test_it_names_extras_that_are_missing_and_a_self_check_that_fails() -> None:
    found = printed(
        "import importlib.metadata as metadata",
        "known = metadata.version",
        "def version(name):",
        "    if name == 'tqdm': raise metadata.PackageNotFoundError(name)",
        "    return known(name)",
        "import gdopt._compile.self_check as self_check",
        "metadata.version = version",
        "self_check._look_alike = lambda make: True",
    )
    assert found["extra progress"] == 'missing: pip install "gdopt[progress]"'
    assert found["shared programs"].startswith("no, the self-check fails. gdopt cannot tell compiled programs apart")


def test_it_says_so_if_jax_finds_no_device() -> None:
    found = printed("import os", "os.environ['JAX_PLATFORMS'] = 'nosuch'")
    assert found["devices"].startswith("none: RuntimeError: ")
    assert found["jax"] == importlib.metadata.version("jax")


def test_the_form_for_bugs_asks_for_it() -> None:
    assert "python -m gdopt" in BUG.read_text(encoding="utf-8")
