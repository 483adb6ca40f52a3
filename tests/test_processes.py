"""Two real processes over gloo on loopback: the same result as one, one bar, and both end where one fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")
SECONDS = 120  # by then something hangs


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(case: str, processes: tuple[int, ...] = (0, 1)) -> list[tuple[int, str, str, float]]:
    """Of each process its code, what it wrote, and when it ended."""
    port, began = free_port(), time.monotonic()
    command = [sys.executable, str(SCRIPT), str(port)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [*command, str(process), case], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for process in processes
    ]
    try:
        return [
            (process.returncode, *written, time.monotonic() - began)
            for process in started
            for written in [process.communicate(timeout=SECONDS)]
        ]
    finally:
        for process in started:
            process.kill()


def test_two_processes_come_to_what_one_comes_to() -> None:
    """One test, as it takes half a minute to start and compile: see two_processes.py for the runs."""
    alone, ran = run("same", processes=(-1,)), run("same")
    for code, _, errors, _ in alone + ran:
        assert code == 0, errors[-3000:]
    one, *both = (json.loads(out.splitlines()[-1]) for _, out, _, _ in alone + ran)
    for which in ("full batch", "batches", "stream"):
        for found in (both[0][which], both[1][which]):
            assert (found["status"], found["steps"]) == (one[which]["status"], one[which]["steps"])
            for name in ("loss", "grad_norm", "w", "b"):
                np.testing.assert_allclose(found[name], one[which][name], rtol=1e-10, atol=1e-13, err_msg=which)
            assert found["shares"] == [[40, 256]]  # each has half of the params

    # What is a process's own, is; and what one decides, the other does, too.
    for number, found in enumerate(both):
        assert found["mine"] == [pytest.approx(number, abs=1e-3), "CONVERGED"]
    assert both[0]["stopped"] == both[1]["stopped"]
    assert both[0]["stopped"][0] == "STOPPED"
    assert [found["uneven"] for found in both] == [["MAX_STEPS", 3]] * 2  # the shorter stream ends both
    assert ["step/s" in errors for _, _, errors, _ in ran] == [True, False]  # one bar
    for found, message in zip(
        both,
        [
            "another learning_rate: learning_rate is 0.1 in process 0, and 1.1 in process 1",
            "another learning_rate: learning_rate is 1.1 in process 1, and 0.1 in process 0",
        ],
        strict=True,
    ):
        assert message in found["another rate"]


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        (
            "fails",
            ["process 1 ended the run: RuntimeError: the disk of process 1 is full", "RuntimeError: the disk of"],
        ),
        (
            "fails early",
            ["process 1 ended the run: InputError: max_steps=-1 is not", "InputError: max_steps=-1"],
        ),
        pytest.param("closed over", ["pass arrays that the loss closes over in args="] * 2, marks=pytest.mark.slow),
    ],
)
def test_an_error_in_one_ends_both_with_its_message(case: str, messages: list[str]) -> None:
    for (code, _, errors, seconds), message in zip(run(case), messages, strict=True):
        assert code != 0
        assert message in errors
        assert seconds < SECONDS / 2  # jax itself would wait for 300 s
