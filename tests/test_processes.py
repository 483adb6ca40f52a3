"""Two real processes over gloo on loopback: the same result as one, one bar, and both end where one fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def answers() -> tuple[list[dict[str, Any]], list[str]]:
    """What one process alone and each of the two found; and what these wrote to stderr."""
    alone, ran = run("same", processes=(-1,)), run("same")
    for code, _, errors, _ in alone + ran:
        assert code == 0, errors[-3000:]
    return [json.loads(out.splitlines()[-1]) for _, out, _, _ in alone + ran], [errors for _, _, errors, _ in ran]


@pytest.mark.parametrize("which", ["spectral", "batches", "stream"])
def test_two_processes_come_to_what_one_comes_to(answers, which: str) -> None:
    alone, *both = (found[which] for found in answers[0])
    for found in both:
        assert (found["status"], found["steps"]) == (alone["status"], alone["steps"])
        for name in ("loss", "grad_norm", "w", "b"):
            np.testing.assert_allclose(found[name], alone[name], rtol=1e-10, atol=1e-13, err_msg=name)
        assert found["shares"] == [[40, 256]]  # and each has half of the params
    assert both[0] == both[1]


def test_what_each_process_has_for_itself_is_left_alone(answers) -> None:
    for number, found in enumerate(answers[0][1:]):
        assert found["mine"] == [pytest.approx(number, abs=1e-3), "CONVERGED"]


def test_a_stop_in_one_stops_both_at_the_same_step(answers) -> None:
    first, second = (found["stopped"] for found in answers[0][1:])
    assert first == second
    assert first[0] == "STOPPED"


def test_the_shorter_stream_ends_both(answers) -> None:
    assert [found["uneven"] for found in answers[0][1:]] == [["MAX_STEPS", 3]] * 2


def test_there_is_one_bar(answers) -> None:
    assert ["step/s" in errors for errors in answers[1]] == [True, False]


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        (
            "fails",
            ["process 1 ended the run: RuntimeError: the disk of process 1 is full", "RuntimeError: the disk of"],
        ),
        (
            "fails early",
            ["process 1 ended the run: InputError: learning_rate=-1 is not", "InputError: learning_rate=-1"],
        ),
        (
            "another rate",
            [
                "another learning_rate: learning_rate is 0.1 in process 0, and 1.1 in process 1",
                "another learning_rate: learning_rate is 1.1 in process 1, and 0.1 in process 0",
            ],
        ),
        ("closed over", ["pass arrays that the loss closes over in args="] * 2),
    ],
)
def test_an_error_in_one_ends_both_with_its_message(case: str, messages: list[str]) -> None:
    for (code, _, errors, seconds), message in zip(run(case), messages, strict=True):
        assert code != 0
        assert message in errors
        assert seconds < SECONDS / 2  # jax itself would wait for 300 s
