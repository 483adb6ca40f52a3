"""Ctrl-C, in real processes and in this one: the run ends at once, with the result so far."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdopt

RUN = """
import signal, sys, threading, time
import jax.numpy as jnp
import gdopt

usual = signal.getsignal(signal.SIGINT)
started = lambda report: print("started", flush=True)
loss = lambda x: jnp.sum(jnp.cosh(x @ x.T / 100))
{call}
print(result.status.name, result.steps, result.message, flush=True)
assert len(result.history.loss) == result.steps + 1
assert abs(float(loss(result.params)) - result.loss) <= 1e-4 * result.loss
assert signal.getsignal(signal.SIGINT) is usual
"""
CALL = """
result = gdopt.minimize(loss, jnp.ones((100, 100)), learning_rate=1e-9, max_steps=10**9, tol=0, callback=started)
"""


def start(program: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "started\n"
    return process


def test_ctrl_c_ends_the_run_with_a_result():
    process = start(RUN.format(call=CALL))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "INTERRUPTED" in out
    assert "interrupted after" in out


@pytest.mark.slow  # below, in this process, the same takes a tenth of the time
def test_the_callers_own_handler_is_left_alone():
    own = 'signal.signal(signal.SIGINT, lambda *_: print("mine", flush=True)); usual = signal.getsignal(signal.SIGINT)'
    call = own + CALL.replace("10**9", "3000")
    process = start(RUN.format(call=call))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "mine" in out
    assert "INTERRUPTED" not in out


def test_a_second_ctrl_c_raises():
    """The first one takes effect at the end of the next chunk, which a callback delays here."""
    slow = "def started(report):\n    print('started', flush=True)\n    time.sleep(30)\n"
    process = start(RUN.format(call=slow + CALL))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    for _ in range(20):  # two signals that come at once may be one
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGINT)
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in err


@pytest.mark.slow  # below, in this process, the same takes a tenth of the time
def test_a_run_in_another_thread_touches_no_signals():
    call = CALL.replace("10**9", "50").replace("result = gdopt.minimize", "box.append(gdopt.minimize")
    threaded = f"""
box = []
def work():
    {call.strip()})
thread = threading.Thread(target=work); thread.start(); thread.join()
result = box[0]
"""
    process = start(RUN.format(call=threaded))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "MAX_STEPS 50" in out


@pytest.mark.slow  # below, in this process, the same takes a tenth of the time
def test_ctrl_c_ends_a_range_test():
    process = start(
        """
import threading
import jax.numpy as jnp, gdopt
threading.Timer(3, lambda: print("started", flush=True)).start()
gdopt.lr_find(lambda x: jnp.sum(jnp.cosh(x @ x.T / 1000)), jnp.ones((1000, 1000)), num_steps=10**5, end_lr=1e-4)
"""
    )
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt")


TIMED = """
import itertools, sys, time
import jax, jax.numpy as jnp, numpy as np
import gdopt

rows = np.random.default_rng(0).normal(size=(100, 20)).astype(np.float32)
fit = lambda x, rows: jnp.mean((rows @ x - 1) ** 2)
steps_of_some_20_ms = lambda x, rows: fit(x, rows) + 0 * jax.lax.fori_loop(
    0, 100, lambda _, y: jnp.tanh(y @ y), jnp.ones((100, 100)) * x[0]
)[0, 0]
reports = []

def callback(report):
    reports.append(report)
    if len(reports) == 10:
        print("started", flush=True)

KINDS = {
    "full": (fit, dict(data=rows, tol=0)),
    "batches": (fit, dict(data=rows, batch_size=7)),
    "stream": (fit, dict(data=lambda: itertools.repeat(rows[:10]))),
    "slow": (steps_of_some_20_ms, dict(data=rows, tol=0)),
    "saves": (fit, dict(data=rows, batch_size=7, checkpoint=gdopt.Checkpoint(sys.argv[2], every_seconds=0))),
}
loss, options = KINDS[sys.argv[1]]
result = gdopt.minimize(loss, jnp.zeros(20), learning_rate=1e-9, max_steps=10**9, callback=callback, **options)
print(result.status.name, time.monotonic(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "batches", "stream", "slow", "saves"])
def test_the_result_is_there_within_half_a_second(kind: str, tmp_path: Path):
    """The best of three, because the machine may be busy."""
    waits = []
    for attempt in range(3):
        process = start(TIMED, kind, str(tmp_path / f"run{attempt}"))
        time.sleep(0.2)
        pressed_at = time.monotonic()  # of a clock that all processes share
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        status, ended_at = out.split()
        assert status == "INTERRUPTED"
        waits.append(float(ended_at) - pressed_at)
        if waits[-1] < 0.5:
            break
    assert min(waits) < 0.5, waits


# ------------------------------------------------------------------------------- signals of this process to itself

USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
ROWS = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)


def handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in USUAL}


@pytest.fixture(autouse=True)
def _usual_handlers() -> Iterator[None]:
    """Install the handlers of a program that a shell started in the foreground, however the tests were started."""
    before = {number: signal.signal(number, usual) for number, usual in USUAL.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


pressed: list[bool] = []  # by those handlers that are somebody else's


def press(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def mean_square(w: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.mean((rows @ w - 1) ** 2)


def minimize(**options: Any) -> gdopt.Result:
    call = {"data": ROWS, "batch_size": 7, "learning_rate": 0.01, "max_steps": 60}
    return gdopt.minimize(options.pop("loss", mean_square), jnp.zeros(3), **{**call, **options})


def bits(result: gdopt.Result) -> list[bytes]:
    kept = result.params, result.loss, result.grad_norm, result.history
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(kept)]


def test_handlers_are_installed_only_during_the_run():
    during = []
    minimize(callback=lambda report: during.append(handlers()))
    assert during
    assert not any(seen[number] is USUAL[number] for seen in during for number in USUAL)
    assert handlers() == USUAL


@pytest.mark.parametrize("number", USUAL)
def test_the_first_signal_ends_the_run_with_a_save_and_restores_the_handlers(number: int, tmp_path: Path):
    during = []

    def once(report: gdopt.Report) -> None:
        if not during:
            press(number)
            during.append(handlers())

    result = minimize(callback=once, checkpoint=tmp_path / "run")
    assert result.status is gdopt.Status.INTERRUPTED
    assert 0 < result.steps < 60
    assert [file.name for file in tmp_path.iterdir()] == [f"run.{result.steps:012d}.gdopt"]  # and no lock
    assert during == [USUAL]  # so that a second one does what it always does
    assert handlers() == USUAL


def test_a_second_ctrl_c_raises_at_once_and_the_saves_are_good(tmp_path: Path):
    often = gdopt.Checkpoint(tmp_path / "run", every_seconds=0)
    steps = []

    def twice(report: gdopt.Report) -> None:
        steps.append(report.step)
        if len(steps) == 3:
            press()
            press()
            steps.append("it went on")

    with pytest.raises(KeyboardInterrupt):
        minimize(callback=twice, checkpoint=often)
    assert len(steps) == 3
    assert handlers() == USUAL
    assert list(tmp_path.glob("run.*.gdopt"))
    assert bits(minimize(checkpoint=often)) == bits(minimize())


def test_ctrl_c_raises_in_a_range_test_and_restores_the_handlers():
    fetched = []

    def batches() -> Iterator[np.ndarray]:
        for number in range(10**6):
            if number == 40:
                press()
            fetched.append(number)
            yield ROWS[:7]

    with pytest.raises(KeyboardInterrupt):
        gdopt.lr_find(mean_square, jnp.zeros(3), data=batches, num_steps=10_000)
    assert len(fetched) < 10_000
    assert handlers() == USUAL


def fails_when_traced(w: jax.Array, rows: jax.Array) -> jax.Array:
    raise ArithmeticError("traced")


def fails_as_it_runs(w: jax.Array, rows: jax.Array) -> jax.Array:
    def fail() -> np.float32:
        raise ArithmeticError("computed")

    return mean_square(w, rows) + jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32))


def fails_after_a_while() -> Iterator[np.ndarray]:
    yield from np.split(ROWS, 5)
    raise ArithmeticError("fetched")


def fails(report: gdopt.Report) -> None:
    raise ArithmeticError("reported")


def leaves(report: gdopt.Report) -> None:
    raise SystemExit("left")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": fails_when_traced}, ArithmeticError, "traced"),
        ({"loss": fails_as_it_runs}, Exception, "computed"),  # which one is JAX's own business
        ({"data": fails_after_a_while, "batch_size": None}, ArithmeticError, "fetched"),
        ({"callback": fails}, ArithmeticError, "reported"),
        ({"callback": leaves}, SystemExit, "left"),
    ],
    ids=["loss, traced", "loss", "stream", "callback", "exit"],
)
def test_an_error_restores_the_handlers(options: dict[str, Any], error: type, message: str):
    with pytest.raises(error, match=message):
        minimize(**options)
    assert handlers() == USUAL


@pytest.mark.parametrize("own", [lambda *_: pressed.append(True), signal.SIG_IGN], ids=["own", "ignored"])
def test_a_signal_that_somebody_else_handles_is_left_alone(own: Any):
    pressed.clear()
    signal.signal(signal.SIGINT, own)
    during = []

    def once(report: gdopt.Report) -> None:
        if not during:
            press()
        during.append(handlers())

    result = minimize(callback=once)
    assert (result.status, result.steps) == (gdopt.Status.MAX_STEPS, 60)
    assert all(seen[signal.SIGINT] is own and seen[signal.SIGTERM] is not signal.SIG_DFL for seen in during)
    assert len(pressed) == (own is not signal.SIG_IGN)
    assert handlers() == {signal.SIGINT: own, signal.SIGTERM: signal.SIG_DFL}


def test_a_handler_installed_during_the_run_stays():
    own = lambda *_: None

    def install(report: gdopt.Report) -> None:
        signal.signal(signal.SIGTERM, own)

    minimize(callback=install)
    assert handlers() == {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: own}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_processes_forked_from_a_run_end_by_a_signal():
    """A pool ends the workers of a loader by SIGTERM. If they ignored it, the pool would wait for them for ever."""
    codes = []

    def fork(report: gdopt.Report) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # JAX's, of forks and threads
            child = os.fork()
        if not child:
            here = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
            os._exit(0 if here == [signal.SIG_DFL, signal.default_int_handler] else 1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return True

    gdopt.minimize(lambda x: jnp.sum(jnp.cos(x)), jnp.ones(3), learning_rate=1e-6, callback=fork)
    assert codes == [0]


def test_a_run_within_a_run_leaves_the_handlers_to_the_outer_one():
    during, inner = [], []

    def nested(report: gdopt.Report) -> None:
        if not inner:
            during.append(handlers())
            inner.append(minimize(callback=lambda report: during.append(handlers())))
            during.append(handlers())

    minimize(callback=nested)
    assert len(during) > 2
    assert all(seen == during[0] != USUAL for seen in during)
    assert handlers() == USUAL


def test_another_thread_installs_no_handlers_and_all_else_is_the_same(tmp_path: Path):
    def run(path: Path, *, presses: bool = False) -> tuple:
        steps, seen = [], []

        def callback(report: gdopt.Report) -> bool:
            if presses and not steps:
                press()
            steps.append(report.step)
            seen.append(handlers())
            return report.step >= 40

        path.mkdir()
        # epochs of 7 steps: reports come at the ends of these, and where the clock says so
        stopped = minimize(callback=callback, checkpoint=gdopt.Checkpoint(path / "run", every_seconds=0, keep=1))
        saved = [file.name for file in path.iterdir()]
        whole = minimize(checkpoint=path / "run")
        return stopped.status, steps[-1], saved, bits(whole), seen

    *here, _ = run(tmp_path / "here")
    pressed.clear()
    own = lambda *_: pressed.append(True)
    signal.signal(signal.SIGINT, own)
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path / "there", presses=True)))
    thread.start()
    thread.join()
    ((*there, seen),) = results
    assert there == here
    assert here[0] is gdopt.Status.STOPPED
    assert pressed == [True]  # the main thread's, which this run is not in
    assert all(each == {signal.SIGINT: own, signal.SIGTERM: signal.SIG_DFL} for each in seen)
