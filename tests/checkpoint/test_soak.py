"""Ten minutes of random kills: every run ends with the bits of an undisturbed run.

Set GDOPT_SOAK_SEED to repeat a failure. The moments, signals, sizes and damages are then the same, as far as the
machine takes the same time for everything.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gdopt._checkpoint import file as saves
from gdopt._errors import CheckpointError

SECONDS = 600
SCRIPT = Path(__file__).parents[1] / "scripts" / "killed_run.py"
KINDS = ["batches", "spectral", "quasi_newton", "stream", "auto", "noise of the optimizer"]
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


@dataclasses.dataclass
class Ended:
    """The output of a process before it ended."""

    code: int
    out: str
    errors: str

    @property
    def is_complete(self) -> bool:
        return self.code == 0 and "INTERRUPTED" not in self.out


class Process:
    def __init__(self, kind: str, path: Path | str, steps: int, pause: float):
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), kind, str(path), str(steps), repr(pause)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> Ended:
        try:
            out, errors = self._process.communicate(timeout=120)
        finally:
            self._process.kill()
        return Ended(self._process.returncode, out.strip(), errors)


def readable(file: Path) -> bool:
    try:
        saves.read(str(file))
    except CheckpointError:
        return False
    return True


def saves_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("run.*.gdopt"))


def identities(directory: Path) -> set[tuple[str, int]]:
    """A repeated save has the name of the one before, but another inode."""
    found = set()
    for file in saves_in(directory):
        try:
            found.add((file.name, file.stat().st_ino))
        except FileNotFoundError:  # it was removed since it was listed
            continue
    return found


def damage(file: Path, chance: random.Random) -> str:
    data = bytearray(file.read_bytes())
    how = chance.choice(["a bit", "the end", "all"])
    if how == "a bit":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    else:
        del data[chance.randrange(len(data)) if how == "the end" else 0 :]
    file.write_bytes(data)
    return how


class Soak:
    """Disturbed runs, one after the other, and what happened in them."""

    def __init__(self, seed: int, directory: Path):
        self.chance = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self._directory = directory
        self._expected = {kind: Process(kind, "none", 4096, 0).end() for kind in KINDS}
        assert all(ended.is_complete for ended in self._expected.values()), self._expected

    def run(self, kind: str, until: float) -> None:
        """One run from its beginning to its end, with kills and damages; after ``until`` it is left in peace."""
        directory = self._directory / f"{sum(self.counts.values())}"
        directory.mkdir()
        story = [kind]
        while True:
            good = [file for file in saves_in(directory) if readable(file)]
            if len(good) > 1 and self.chance.random() < 0.3:
                story.append(f"damaged {damage(good[-1], self.chance)} of {good[-1].name}")
                self.counts["damages"] += 1
            damaged = [file.name for file in saves_in(directory)[-1:] if not readable(file)]
            ended = self._one(kind, directory, story, careful=bool(damaged), peace=time.monotonic() > until)
            for name in damaged:  # the newest save cannot be read: that is told, and an older one is taken
                told = "newer ones were skipped" in ended.errors and name in ended.errors
                assert told, f"no word of {name}: {story}\n{ended}"
                self.counts["damages that were told"] += 1
            if ended.is_complete:
                break
        assert ended.out == self._expected[kind].out, f"{story}\n{ended}"
        self.counts[f"equal: {kind}"] += 1
        # nothing is left behind but the saves that are kept
        assert sorted(directory.iterdir()) == saves_in(directory), story
        assert 1 <= len(saves_in(directory)) <= 2, story
        assert all(map(readable, saves_in(directory))), story

    def _one(self, kind: str, directory: Path, story: list[str], *, careful: bool, peace: bool) -> Ended:
        """One process, which is killed at some moment or not; where one is careful, not before it has made a save."""
        chance = self.chance
        steps = chance.choice([1, 8, 64, 512, 4096])
        before = identities(directory)
        process = Process(kind, directory / "run", steps, 0.002)
        story.append(f"chunks of {steps}")
        if peace or chance.random() < 0.2:
            return process.end()
        if careful or chance.random() < 0.7:
            while process.is_alive and identities(directory) <= before:
                time.sleep(0.005)
            wait = chance.uniform(0, 0.3)
        else:  # at any moment: also as it imports, compiles, reads its save, or ends
            wait = chance.uniform(0, 6)
        end = time.monotonic() + wait
        while process.is_alive and time.monotonic() < end:
            time.sleep(0.005)
        number, twice = chance.choice(SIGNALS), chance.random() < 0.2
        if not process.is_alive:
            return process.end()
        process.send(number)
        if twice:
            time.sleep(chance.uniform(0, 0.05))
            process.send(number)
        story.append(f"{number.name}{' twice' if twice else ''} after {wait:.3f} s")
        self.counts[number.name] += 1
        ended = process.end()
        self.counts["ended with a result all the same"] += ended.code == 0
        by_signal = ended.code == -number or (ended.code != 0 and "KeyboardInterrupt" in ended.errors)
        assert ended.code == 0 or by_signal, f"{story}\n{ended}"
        return ended


@pytest.mark.slow
def test_whatever_happens_a_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    until = time.monotonic() + SECONDS
    seed = int(os.environ.get("GDOPT_SOAK_SEED") or random.randrange(2**32))
    try:
        soak = Soak(seed, tmp_path)
        rounds = 0
        while rounds < len(KINDS) or time.monotonic() < until:
            soak.run(KINDS[rounds % len(KINDS)], until)
            rounds += 1
        print(dict(sorted(soak.counts.items())))
        assert all(soak.counts[number.name] for number in SIGNALS)
        assert soak.counts["damages that were told"]
    except BaseException:
        print(f"GDOPT_SOAK_SEED={seed}")  # pytest shows it with the failure
        raise
