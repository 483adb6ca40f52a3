"""Two real processes over gloo on loopback: the same result as one, one bar, and both end if one fails."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "two_processes.py"
KILLED = Path(__file__).parents[1] / "scripts" / "killed_processes.py"
SECONDS = 120  # by then something hangs


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(script: Path, processes: tuple[int, ...], *arguments: str) -> list[subprocess.Popen]:
    command = [sys.executable, str(script), str(free_port())]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*command, str(process), *arguments], env=environment, **pipes) for process in processes]


def run(case: str, processes: tuple[int, ...] = (0, 1)) -> list[tuple[int, str, str, float]]:
    """Run both, and return the code, the output and the end of each."""
    return ended(start(SCRIPT, processes, case))


def ended(started: list[subprocess.Popen]) -> list[tuple[int, str, str, float]]:
    began = time.monotonic()
    try:
        return [
            (process.returncode, *written, time.monotonic() - began)
            for process in started
            for written in [process.communicate(timeout=SECONDS)]
        ]
    finally:
        for process in started:
            process.kill()


def test_two_processes_give_the_result_of_one() -> None:
    """This is one test, because it takes half a minute to start and compile; two_processes.py has the runs."""
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
    assert [found["diagnosed"] for found in both] == [[1, "log", True]] * 2
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


def test_two_processes_validate_alike_and_resume() -> None:
    ran = run("validated")
    for code, _, errors, _ in ran:
        assert code == 0, errors[-3000:]
    both = [json.loads(out.splitlines()[-1]) for _, out, _, _ in ran]
    assert both[0] == both[1]
    status, steps, (losses, largest), reports, found = both[0]
    assert (status, steps, reports) == ("EARLY_STOPPED", 12, [3, 6, 9, 12] * 2 + [12])
    assert losses == sorted(losses)
    assert (len(losses), len(largest), len(found["loss"])) == (3, 3, 13)


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


@pytest.mark.parametrize(
    ("kills", "case"),
    [
        (1, "refused"),
        pytest.param(8, "killed", marks=pytest.mark.slow),
        pytest.param(1, "copied", marks=pytest.mark.slow),  # to each process, so that none has to write for another
    ],
)
def test_killed_at_any_moment_they_resume_bit_for_bit(kills: int, case: str, tmp_path: Path) -> None:
    """If the disk of one process refuses a save, both continue, and the next save is made."""
    chance = random.Random(kills)
    saves = lambda: set(tmp_path.glob("run.*.gdopt"))
    for _ in range(kills):
        before, started = saves(), start(KILLED, (0, 1), case, str(tmp_path / "run"))
        while saves() <= before and all(process.poll() is None for process in started):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        for process in chance.sample(started, 2):
            process.send_signal(signal.SIGKILL)
        for process in started:
            _, errors = process.communicate()
            assert process.returncode == -signal.SIGKILL, f"over before it was killed: {errors[-3000:]}"
    left = tmp_path / "run.000000000999.0123abcd.orbax"  # what another one may have left
    (left / "d").mkdir(parents=True)
    (left / "gdopt-checkpoint").touch()

    answers = ended(start(KILLED, (0, 1), case, str(tmp_path / "run")))
    for code, _, errors, _ in answers:
        assert code == 0, errors[-3000:]
    found = [json.loads(out.splitlines()[-1]) for _, out, _, _ in answers]
    assert found[0]["saved"] == found[0]["whole"] == found[1]["saved"] == found[1]["whole"]
    assert found[1]["warnings"] == []
    refused = [message for message in found[0]["warnings"] if "process 1: " in message and "File too large" in message]
    assert found[0]["warnings"] == refused
    assert bool(refused) == (case == "refused")
    names = sorted(path.name for path in tmp_path.iterdir())
    steps = [int(name.split(".")[1]) for name in names if name.endswith(".gdopt")]
    assert len(steps) == 2  # as many as are kept
    assert all(f"of step {step} was" not in message for step in steps for message in refused)
    assert len(names) == (2 if case == "copied" else 4)  # with a directory for each, and nothing else


@pytest.mark.slow
def test_a_path_that_differs_between_processes(tmp_path: Path) -> None:
    for process in (0, 1):
        (tmp_path / str(process)).mkdir()
    answers = ended(start(KILLED, (0, 1), "elsewhere", str(tmp_path / "run")))
    for (code, _, errors, _), message in zip(
        answers,
        ["process 1 ended the run: InputError: checkpoint path=", "in process 1 than in process 0"],
        strict=True,
    ):
        assert code != 0
        assert message in errors
