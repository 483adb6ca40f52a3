"""Any sequence of calls, kills, changes, damages and devices against a plain loop that knows nothing of checkpoints."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import modelled
import numpy as np
import pytest
from helpers import walk, walk_on
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from modelled import Call, plain_losses, run

import gdopt
from gdopt._checkpoint.file import read, write

SECONDS = 600
FOREIGN = ("run.lock", "run.gdopt", "run.000000000007.gdopt.bak", "run2.000000000008.gdopt", "uv.lock")
MESSAGES = {
    "limit": "max_steps=",
    "rate": "learning_rate=",
    "loss": "the loss is not that of",
    "damage": "newer ones were skipped",
    "place": "was made on",
}


class Runs(RuleBasedStateMachine):
    """One path, and the calls there. The model knows for each file by which calls its steps were made."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        for name in FOREIGN:
            (self.folder / name).write_text(name)
        self.call = Call()
        self.calls: dict[str, tuple[Call, ...]] = {}  # by the bytes' name: which call made each step
        self.last: dict[str, tuple[Call, int]] = {}  # the call that wrote a file, and its number of devices
        self.bad: set[str] = set()

    def teardown(self) -> None:
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------- the calls

    @rule(stop=st.integers(1, 45))
    def go_on(self, stop: int) -> None:
        """Make the call in this process, up to the first report after some step."""
        before = self.files()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = run(self.folder / "run", self.call, callback=lambda report: report.step >= stop)
        assert result.history is not None
        self.check([str(warning.message) for warning in caught], result.history.loss, before, 1)
        made = self.resumed_from(before)
        assert ("It resumed from step" in result.message) == (bool(made) or bool(before))
        assert result.steps >= made

    @rule(devices=st.sampled_from([1, 2, 4]))
    def in_another_process(self, devices: int) -> None:
        """Make the call to its end on so many devices."""
        before = self.files()
        process = self.start(devices, 0)
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
        losses = np.array([float(number) for number in out.splitlines()[-1].split()[1:]])
        self.check(errors.splitlines(), losses, before, devices)

    @rule(reports=st.integers(0, 3), wait=st.floats(0, 0.1))
    def kill(self, reports: int, wait: float) -> None:
        """Kill a process after so many reports."""
        before = self.files()
        process = self.start(1, 0.02)
        assert process.stdout is not None
        for _ in range(reports + 1):
            process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        self.note(before, 1)

    def start(self, devices: int, pause: float) -> subprocess.Popen:
        call = [self.call.rate, self.call.goal, self.call.max_steps, devices, pause]
        flags = f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
        return subprocess.Popen(
            [sys.executable, "-W", "always", modelled.__file__, str(self.folder / "run"), *map(repr, call)],
            env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    # ----------------------------------------------------------------------------------------------------- the changes

    @rule(rate=st.sampled_from([0.05, 0.02, 0.2]))
    def another_rate(self, rate: float) -> None:
        self.call = self.call._replace(rate=rate)

    @rule(goal=st.sampled_from([1.0, 2.0]))
    def another_loss(self, goal: float) -> None:
        self.call = self.call._replace(goal=goal)

    @rule(max_steps=st.sampled_from([10, 25, 40, 60]))
    def another_limit(self, max_steps: int) -> None:
        self.call = self.call._replace(max_steps=max_steps)

    @rule(kind=st.sampled_from(["byte", "end", "status", "step"]), seed=st.integers(0, 999))
    def damage(self, kind: str, seed: int) -> None:
        """Damage the newest file, or write it anew with contents that cannot be."""
        if len(self.files()) <= len(self.bad) + 1:  # One stays.
            return
        file = self.folder / max(set(self.files()) - self.bad)
        data = bytearray(file.read_bytes())
        match kind:
            case "byte":
                data[random.Random(seed).randrange(len(data))] ^= 1 << seed % 8
                file.write_bytes(data)
            case "end":
                file.write_bytes(data[: seed * len(data) // 1000])
            case _:
                arrays, meta = read(str(file))
                arrays["state.code" if kind == "status" else "state.step"] = np.array(77, np.int32)
                write(str(file), arrays, meta)
        self.bad.add(file.name)

    @rule()
    def other_data(self) -> None:
        """Another question at this path is an error, and changes nothing."""
        before = {file: (self.folder / file).read_bytes() for file in self.files()}
        if set(before) <= self.bad:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(gdopt.InputError, match="is of another run: its data is"):
                run(self.folder / "run", self.call, modelled.ROWS * 2)
        assert {file: (self.folder / file).read_bytes() for file in self.files()} == before

    # ------------------------------------------------------------------------------------------------------- the model

    def files(self) -> dict[str, bytes]:
        """Return the checkpoints on the disk."""
        names = [file.name for file in self.folder.glob("run.*.gdopt") if len(file.name.split(".")) == 3]
        return {name: (self.folder / name).read_bytes() for name in sorted(names)}

    def good(self, before: dict[str, bytes]) -> str | None:
        """Return the file from which a call resumes."""
        return max(set(before) - self.bad, default=None)

    def resumed_from(self, before: dict[str, bytes]) -> int:
        good = self.good(before)
        return int(good.split(".")[1]) if good else 0

    def expected(self, before: dict[str, bytes], devices: int) -> set[str]:
        """Return the kinds of warnings that a call has to give."""
        good, told = self.good(before), set()
        if good is None:
            return told
        if any(name > good for name in before if name in self.bad):
            told.add("damage")
        then, place = self.last[good]
        made = self.resumed_from(before)
        told |= {"place"} if place != devices else set()
        told |= {"limit"} if then.max_steps != self.call.max_steps else set()
        told |= {"rate"} if then.rate != self.call.rate else set()
        told |= {"loss"} if then.goal != self.call.goal else set()
        assert made <= 60
        return told

    def check(self, messages: list[str], losses: Any, before: dict[str, bytes], devices: int) -> None:
        """Compare what a call said and gave with the model."""
        told = {kind for kind, text in MESSAGES.items() if any(text in message for message in messages)}
        assert told == self.expected(before, devices), (messages, self.call, self.last)
        good, made = self.good(before), self.resumed_from(before)
        calls = (*self.calls.get(good or "", ()),)[:made] + (self.call,) * (len(losses) - made)
        np.testing.assert_allclose(losses, plain_losses(calls)[: len(losses)], rtol=2e-3)
        self.note(before, devices)
        if devices == 1 and all(call == self.call for call in calls):
            whole = run(None, self.call)
            assert whole.history is not None
            same = np.array_equal(losses, whole.history.loss[: len(losses)])
            assert same or any(place > 1 for _, place in self.last.values())

    def note(self, before: dict[str, bytes], devices: int) -> None:
        """Take in the files that a call wrote."""
        good, made = self.good(before), self.resumed_from(before)
        earlier = self.calls.get(good or "", ())[:made]
        now = self.files()
        self.bad &= {name for name in now if before.get(name) == now[name]}
        for name, data in now.items():
            if before.get(name) != data:
                step = int(name.split(".")[1])
                self.calls[name] = earlier + (self.call,) * (step + 1 - made)
                self.last[name] = self.call, devices

    @invariant()
    def nothing_else_changes(self) -> None:
        if not hasattr(self, "folder"):
            return
        for name in FOREIGN:
            assert (self.folder / name).read_text() == name
        others = {file.name for file in self.folder.iterdir()} - set(self.files()) - set(FOREIGN)
        assert all(name == "run.gdopt.lock" or name.endswith(".tmp") for name in others), others


def test_two_hundred_steps() -> None:
    walk(Runs, 25, 8)


@pytest.mark.slow
def test_ten_minutes() -> None:
    walk_on(Runs, SECONDS)
