"""The script that test_signals.py runs: ``python interrupted_calls.py SECONDS DIRECTORY SEED HANDLER`` prints counts.

For so many seconds it makes warm calls with checkpoints one after the other, while a thread sends it signals at random
moments, often two at once. On a busy machine it goes on until each kind of end was there, for at most another minute.
After each call it looks for everything that a signal could have left behind. HANDLER is "usual", or "own" for a handler
of the program that raises each time.
"""

from __future__ import annotations

import collections
import fcntl
import itertools
import json
import math
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import gdopt
from gdopt import _signals

ROWS = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
counts: collections.Counter[str] = collections.Counter()


def call(path: Path, number: int) -> gdopt.Result:
    """Make a call of one of three kinds."""
    saves = gdopt.Checkpoint(path, every_seconds=0)
    mean_square = lambda w, rows: jnp.mean((rows @ w - 1) ** 2)
    if number % 3 == 0:
        return gdopt.minimize(mean_square, jnp.zeros(3), args=(ROWS,), tol=0, checkpoint=saves)
    options: dict[str, Any] = {} if number % 3 == 1 else {"callback": lambda report: None}
    return gdopt.minimize(
        mean_square,
        jnp.zeros(3),
        data=ROWS,
        batch_size=7,
        learning_rate=0.01,
        max_steps=300,
        checkpoint=saves,
        **options,
    )


def is_locked(path: Path) -> bool:
    """Tell whether anybody holds the lock of a path."""
    try:
        descriptor = os.open(f"{path}.gdopt.lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def press(chance: random.Random) -> None:
    """Send signals while calls run: half of them twice in a row. A fifth of the pauses are long enough for a call."""
    while not over.is_set():
        time.sleep(chance.uniform(0.001, 0.02) * (10 if chance.random() < 0.2 else 1))
        twice = chance.random() < 0.5
        if inside.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            counts["signals"] += 1
            if twice:
                time.sleep(chance.uniform(0, 0.004))
                if inside.is_set():
                    os.kill(os.getpid(), signal.SIGINT)
                    counts["signals"] += 1


def one(directory: Path, number: int) -> None:
    """Make a call, and look at what it leaves behind."""
    path = directory / f"run{number}"
    held = None  # the exception stays, as that of a notebook's last cell does
    usual = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    if number % 2:
        _signals._handled.last = _signals._handled.noted = -math.inf  # as if the last signal had come long before
    try:
        try:
            inside.set()
            result = call(path, number)
        finally:
            inside.clear()
        status = result.status.name
    except KeyboardInterrupt as error:
        status, held = "KeyboardInterrupt", error
    counts[status] += 1
    counts["a call that begins interrupted"] += status == "KeyboardInterrupt" and _signals._handled.unheard is not None
    counts["locks"] += is_locked(path)
    counts["handlers"] += (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) != usual
    _signals._handled.noted = -math.inf
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # This one has to run to its end.
    counts["ends differ"] += call(path, number).loss != expected[number % 3]
    signal.signal(signal.SIGINT, usual[0])
    counts["left behind"] += sum(not file.name.endswith(".gdopt") for file in directory.iterdir())
    for file in directory.iterdir():
        file.unlink()
    del held


class Own(KeyboardInterrupt):
    """The exception of the program's own handler."""


def raise_own(*_: object) -> None:
    raise Own


def main() -> None:
    if sys.argv[4] == "own":
        signal.signal(signal.SIGINT, raise_own)
    usual = signal.getsignal(signal.SIGINT)
    seconds, directory, chance = float(sys.argv[1]), Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    for number in range(3):
        expected.append(call(directory / f"whole{number}", number).loss)
    for file in directory.iterdir():
        file.unlink()
    until = time.monotonic() + seconds
    awaited = {"KeyboardInterrupt"} if sys.argv[4] == "own" else {"KeyboardInterrupt", "INTERRUPTED"}
    thread = threading.Thread(target=press, args=(chance,))
    thread.start()
    number = itertools.count()
    while time.monotonic() < until or (not awaited <= counts.keys() and time.monotonic() < until + 60):
        try:
            one(directory, next(number))
        except KeyboardInterrupt:  # It came between two calls.
            counts["between"] += 1
            signal.signal(signal.SIGINT, usual)
            for file in directory.iterdir():
                file.unlink()
    over.set()
    thread.join()
    print(json.dumps(counts))


inside, over = threading.Event(), threading.Event()
expected: list[float] = []
if __name__ == "__main__":
    main()
