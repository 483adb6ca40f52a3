"""Call after call of fresh functions and fresh data leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("scripts") / "many_calls.py"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="what a process holds is read from /proc")
@pytest.mark.parametrize("calls", [140, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_calls_leave_nothing_behind(calls: int) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(SCRIPT), str(calls)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout)
    before, after = told["before"], told["after"]
    assert after.pop("resident bytes") <= 1.05 * before.pop("resident bytes"), told
    assert after.pop("arrays") <= before.pop("arrays"), told
    assert after == before, told  # threads and open files
