"""Ctrl-C, in real processes and in this one: the run ends at once, with the result so far."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdopt
from gdopt import _signals

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


Start: TypeAlias = Callable[..., subprocess.Popen]


@pytest.fixture
def start() -> Iterator[Start]:
    """Give a function that starts a program, and end what it started with the test, however that ends."""
    with contextlib.ExitStack() as ends:
        yield lambda program, *arguments: _start(ends, program, *arguments)


def _start(ends: contextlib.ExitStack, program: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ends.enter_context(process)
    ends.callback(process.kill)
    assert process.stdout
    assert process.stdout.readline() == "started\n"
    return process


def test_ctrl_c_ends_the_run_with_a_result(start: Start):
    process = start(RUN.format(call=CALL))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "INTERRUPTED" in out
    assert "interrupted after" in out


LR_FIND = """
import threading
import jax.numpy as jnp, gdopt
threading.Timer({wait}, lambda: print("started", flush=True)).start()
gdopt.lr_find(lambda x: jnp.sum(jnp.cosh(x @ x.T / 1000)), jnp.ones((1000, 1000)), num_steps=10**5, end_lr=1e-4)
"""


@pytest.mark.slow  # below, in this process, the same takes a tenth of the time
def test_the_callers_own_handler_is_left_alone(start: Start):
    own = 'signal.signal(signal.SIGINT, lambda *_: print("mine", flush=True)); usual = signal.getsignal(signal.SIGINT)'
    call = own + CALL.replace("10**9", "3000")
    process = start(RUN.format(call=call))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "mine" in out
    assert "INTERRUPTED" not in out


def test_a_second_ctrl_c_raises(start: Start):
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
def test_a_run_in_another_thread_touches_no_signals(start: Start):
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
def test_ctrl_c_ends_a_range_test(start: Start):
    process = start(LR_FIND.format(wait=3))
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
def test_the_result_is_there_within_half_a_second(start: Start, kind: str, tmp_path: Path):
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


SCRIPTS = Path(__file__).parent / "scripts"


@pytest.mark.parametrize("kind", ["sleeps", pytest.param("slows down", marks=pytest.mark.slow), "was fast before"])
def test_a_run_of_slow_steps_ends_after_the_current_one(kind: str):
    """And after one more evaluation. The best of three, because the machine may be busy."""
    waits = []
    for delay in (0.1, 0.5, 1.5):
        command = [sys.executable, str(SCRIPTS / "slow_losses.py"), kind]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == "started\n"
            time.sleep(delay)
            pressed_at = time.monotonic()
            process.send_signal(signal.SIGINT)
            try:
                out, err = process.communicate(timeout=30)
            finally:
                process.kill()
        assert process.returncode == 0, err
        status, ended_at, step = out.splitlines()[-1].split()
        assert status == "INTERRUPTED"
        waits.append(float(ended_at) - pressed_at - 2 * float(step))
        if waits[-1] < 0.5:
            break
    assert min(waits) < 0.5, waits


@pytest.mark.parametrize("handler", ["usual", "own"])
@pytest.mark.parametrize("seconds", [4, pytest.param(300, marks=pytest.mark.slow)])
def test_signals_at_any_moment_leave_nothing_behind(seconds: int, handler: str, tmp_path: Path):
    """Neither a lock, nor a handler, nor a file, and the next call comes to the same numbers."""
    seed = os.environ.get("GDOPT_SOAK_SEED") or str(random.randrange(2**32))
    command = [sys.executable, str(SCRIPTS / "interrupted_calls.py"), str(seconds), str(tmp_path), seed, handler]
    run = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120)
    assert run.returncode == 0, f"GDOPT_SOAK_SEED={seed}\n{run.stderr}"
    counts = json.loads(run.stdout)
    print(counts)
    assert counts["KeyboardInterrupt"]
    assert handler == "own" or counts["INTERRUPTED"]
    for left in ("a call that begins interrupted", "locks", "handlers", "ends differ", "left behind"):
        assert counts[left] == 0, f"GDOPT_SOAK_SEED={seed}\n{counts}"


LOOP = """
import sys, time
import jax.numpy as jnp
import gdopt

start, told = jnp.ones(3), []
loss = lambda x: jnp.sum(jnp.cosh(x))

def started(report):
    if not told:
        told.append(print("started", flush=True))
        time.sleep(0.2)  # until the signal is there

statuses = []
try:
    while True:
        statuses.append(gdopt.minimize(loss, start, callback=started).status.name)
        if statuses[-1] == "INTERRUPTED":
            print("interrupted", flush=True)
except KeyboardInterrupt:
    print(statuses.count("INTERRUPTED"), len(statuses))
"""


@pytest.mark.parametrize("wait", [0.3, 0.6])
def test_two_presses_leave_a_loop_of_short_calls(start: Start, wait: float):
    """The first one ends a single call, and the second one falls in a later call."""
    process = start(LOOP)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "interrupted\n"
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    interrupted, calls = map(int, out.split())
    assert interrupted == 1
    assert calls > 1


ASYNC = """
import asyncio
import jax.numpy as jnp
import gdopt

loss = lambda x: jnp.sum(jnp.cosh(x @ x.T / 100))
told = []

def started(report):
    if not told:
        told.append(print("started", flush=True))

async def main():
    result = gdopt.minimize(loss, jnp.ones((100, 100)), learning_rate=1e-9, max_steps=10**9, tol=0, callback=started)
    print(result.status.name, flush=True)
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        print("cancelled", flush=True)
        raise

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("KeyboardInterrupt", flush=True)
"""


def test_under_asyncio_the_run_ends_with_a_result_and_then_its_task(start: Start):
    process = start(ASYNC)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert out.split() == ["INTERRUPTED", "cancelled", "KeyboardInterrupt"], err


CELL = """
import jax.numpy as jnp, gdopt
loss = lambda x: jnp.sum(jnp.cosh(x @ x.T / 100))
told = []
def started(report):
    if not told:
        told.append(print("started", flush=True))
result = gdopt.minimize(loss, jnp.ones((100, 100)), learning_rate=1e-9, max_steps=10**9, tol=0, callback=started)
print(result.status.name, result.steps > 0, flush=True)
"""


def test_interrupting_a_notebook_returns_a_result_and_its_kernel_lives_on():
    pytest.importorskip("ipykernel")
    jupyter = pytest.importorskip("jupyter_client")
    manager, client = jupyter.manager.start_new_kernel(kernel_name="python3")
    printed = []

    def show(message: dict[str, Any]) -> None:
        text = str(message["content"].get("text") or message["content"].get("traceback") or "")
        printed.append(text)
        if "started" in text:
            manager.interrupt_kernel()

    try:
        reply = client.execute_interactive(CELL, output_hook=show, timeout=60)
        assert reply["content"]["status"] == "ok", printed
        assert "INTERRUPTED True" in "".join(printed)
        client.execute_interactive("print(result.status, 6 * 7)", output_hook=show, timeout=60)
        assert "INTERRUPTED 42" in "".join(printed)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# ------------------------------------------------------------------------------- signals of this process to itself

USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
ROWS = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)


def handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in USUAL}


@pytest.fixture(autouse=True)
def _usual_handlers() -> Iterator[None]:
    """Install the handlers of a program that a shell started in the foreground, however the tests were started."""
    before = {number: signal.signal(number, usual) for number, usual in USUAL.items()}
    long_after_the_last_signal()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def long_after_the_last_signal() -> None:
    """Let the next Ctrl-C be a first one, without waiting for two seconds."""
    _signals._handled.last = _signals._handled.noted = -math.inf


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
def test_the_first_signal_ends_the_run_with_a_save(number: int, tmp_path: Path):
    during = []

    def once(report: gdopt.Report) -> None:
        if not during:
            press(number)
            during.append(handlers())

    result = minimize(callback=once, checkpoint=tmp_path / "run")
    assert result.status is gdopt.Status.INTERRUPTED
    assert 0 < result.steps < 60
    assert [file.name for file in tmp_path.iterdir()] == [f"run.{result.steps:012d}.gdopt"]  # and no lock
    (seen,) = during
    assert seen[signal.SIGTERM] is signal.SIG_DFL  # so that a second one ends the process, whatever it waits for
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


@pytest.mark.parametrize("place", ["collection", "weak reference", "__del__"])
def test_a_second_ctrl_c_is_not_lost_where_python_ignores_exceptions(place: str):
    """JAX has a callback of the garbage collector, in which most signals that come during a collection are handled."""
    steps, in_collection = [], []

    class Dropped:
        def __del__(self) -> None:
            if place == "__del__":
                press()
                press()

    def twice(phase: str, info: Any) -> None:
        if in_collection:
            in_collection.clear()
            press()
            press()

    def callback(report: gdopt.Report) -> None:
        steps.append(report.step)
        if len(steps) == 3 and place == "collection":
            in_collection.append(True)
            gc.collect()
        elif len(steps) == 3:
            weakref.finalize(Dropped(), lambda: place == "weak reference" and (press(), press()))

    gc.callbacks.append(twice)
    try:
        with pytest.raises(KeyboardInterrupt):
            minimize(callback=callback, max_steps=10_000)
    finally:
        gc.callbacks.remove(twice)
    assert len(steps) == 3
    assert handlers() == USUAL
    assert minimize().status is gdopt.Status.MAX_STEPS  # The signal is not seen once more.


def test_a_call_after_two_late_signals_begins_afresh(monkeypatch: pytest.MonkeyPatch):
    """The first one comes too late for the call, and the second one when the usual handler is back, which raises."""
    restore, told = _signals._restore, []

    def restored() -> None:
        restore()
        press()

    def callback(report: gdopt.Report) -> None:
        if not told:
            told.append(_signals.at_end(press))

    monkeypatch.setattr(_signals, "_restore", restored)
    with pytest.raises(KeyboardInterrupt):
        minimize(callback=callback)
    monkeypatch.undo()
    assert told
    assert handlers() == USUAL
    assert minimize().status is gdopt.Status.MAX_STEPS


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


class Calls:
    """A loss that sends a signal at its trace or evaluation with a number, counted from 1."""

    _at, _number = (0, 0), signal.SIGINT

    def __new__(cls, *, traced: int = 0, computed: int = 0, number: int = signal.SIGINT):
        # A checkpoint looks at an object and not at its class. So a run with other numbers is the same run.
        return object.__new__(type(cls.__name__, (cls,), {"_at": (traced, computed), "_number": number}))

    def __init__(self, *, traced: int = 0, computed: int = 0, number: int = signal.SIGINT):
        del traced, computed, number  # see `__new__`
        self.traced = self.computed = 0

    def __call__(self, w: jax.Array, rows: jax.Array) -> jax.Array:
        self.traced += 1
        if self.traced == self._at[0]:
            press(self._number)
        zero = jax.pure_callback(self._count, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(w[0]))
        return mean_square(w, rows) + zero

    def _count(self, _: Any) -> np.float32:
        self.computed += 1
        if self.computed == self._at[1]:
            press(self._number)
        return np.float32(0)


@pytest.mark.parametrize("number", USUAL)
def test_a_signal_in_a_trace_ends_the_run_at_its_start(number: int, tmp_path: Path):
    result = minimize(loss=Calls(traced=1, number=number), checkpoint=tmp_path / "run")
    assert (result.status, result.steps) == (gdopt.Status.INTERRUPTED, 0)
    assert np.isfinite(result.loss)
    assert [file.name for file in tmp_path.iterdir()] == ["run.000000000000.gdopt"]
    assert handlers() == USUAL


STREAM = {"data": lambda: itertools.repeat(ROWS[:7]), "batch_size": None}


@pytest.mark.parametrize("number", USUAL)
@pytest.mark.parametrize("options", [{}, {"optimizer": optax.adagrad}, STREAM], ids=["gd", "adagrad", "stream"])
def test_a_signal_in_the_range_test_returns_the_start(number: int, options: dict[str, Any], tmp_path: Path):
    loss = Calls(computed=20, number=number)
    options = {"optimizer": gdopt.gd, **options}
    result = minimize(loss=loss, learning_rate="auto", max_steps=2000, checkpoint=tmp_path / "run", **options)
    assert (result.status, result.steps, result.range_test) == (gdopt.Status.INTERRUPTED, 0, None)
    assert loss.computed < 300
    assert "range test" in result.message
    np.testing.assert_array_equal(result.params, np.zeros(3))
    assert result.loss == 1
    assert len(result.history.loss) == 1
    assert not list(tmp_path.iterdir())
    assert handlers() == USUAL


def test_a_signal_in_the_range_test_leaves_the_record_of_the_start():
    loss = Calls(computed=20, number=signal.SIGINT)
    options = {"optimizer": gdopt.gd, "learning_rate": "auto", "max_steps": 2000, "record_params": True}
    result = minimize(loss=loss, **options)
    assert result.status is gdopt.Status.INTERRUPTED
    np.testing.assert_array_equal(result.history.params, np.zeros((1, 3), np.float32))


def test_an_interrupted_range_test_raises_with_throw():
    with pytest.raises(gdopt.NotConvergedError, match="INTERRUPTED"):
        minimize(loss=Calls(computed=20), optimizer=gdopt.gd, learning_rate="auto", max_steps=2000, throw=True)


def test_sigterm_in_lr_find_ends_the_process(start: Start):
    process = start(LR_FIND.format(wait=1))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, errors
    assert "Traceback" not in errors


def test_a_signal_in_the_verification_ends_the_run_without_a_claim(tmp_path: Path):
    def call(loss: Any, **options: Any) -> gdopt.Result:
        return gdopt.minimize(loss, jnp.ones(3), args=(ROWS,), **options)

    plain = Calls()
    whole = call(plain)
    assert whole.success
    assert plain.computed > whole.steps + 3
    cut = call(Calls(computed=whole.steps + 3), checkpoint=tmp_path / "run")
    assert (cut.status, cut.steps, cut.verified) == (gdopt.Status.INTERRUPTED, whole.steps, False)
    assert np.isnan(cut.left)
    resumed = call(Calls(), checkpoint=tmp_path / "run")
    assert bits(resumed) == bits(whole)
    assert (resumed.status, resumed.left) == (whole.status, whole.left)


def test_a_signal_in_a_vmap_without_a_jit_is_not_lost():
    pressed = []

    def once(_: Any) -> None:
        if not pressed:
            pressed.append(press())

    def loss(w: Any, c: Any) -> Any:
        jax.debug.callback(once, w)
        return jnp.sum((w - c) ** 2)

    run = lambda c: gdopt.minimize(loss, jnp.zeros(3), args=(c,), learning_rate=0.1, max_steps=20)
    with pytest.raises(KeyboardInterrupt):
        jax.vmap(run)(jnp.arange(3.0))
    assert handlers() == USUAL


def test_a_signal_ends_all_runs_within_one_another():
    inner = []

    def nested(report: gdopt.Report) -> None:
        if not inner:
            inner.append(minimize(loss=Calls(computed=10), max_steps=10_000))
            inner.append(minimize())  # One that begins after the signal ends as well.

    outer = minimize(callback=nested)
    assert {run.status for run in (*inner, outer)} == {gdopt.Status.INTERRUPTED}
    assert 0 < inner[0].steps < 10_000
    assert inner[1].steps == 0
    assert outer.steps < 60
    assert handlers() == USUAL


def test_a_range_test_in_a_callback_ends_with_the_run():
    def nested(report: gdopt.Report) -> None:
        press()
        gdopt.lr_find(mean_square, jnp.zeros(3), data=ROWS, batch_size=7)

    assert minimize(callback=nested).status is gdopt.Status.INTERRUPTED


def test_a_signal_while_a_run_in_jit_is_traced_raises():
    with pytest.raises(KeyboardInterrupt):
        jax.jit(lambda start: gdopt.minimize(Calls(traced=1), start, args=(ROWS,)).params)(jnp.ones(3))
    assert handlers() == USUAL


@pytest.mark.filterwarnings("ignore:this call differs from the run saved in .*max_steps=")
def test_a_signal_while_a_stream_is_replayed_keeps_the_checkpoint(tmp_path: Path):
    pulled = []

    def batches(at: int = -1) -> Iterator[np.ndarray]:
        for number in range(10**6):
            if number == at:
                press()
            pulled.append(number)
            yield ROWS[number % 40 : number % 40 + 7]

    options = {"batch_size": None, "max_steps": 200}
    whole = minimize(data=batches, **options)
    minimize(data=batches, checkpoint=tmp_path / "run", batch_size=None, max_steps=100)
    pulled.clear()
    cut = minimize(data=lambda: batches(10), checkpoint=tmp_path / "run", **options)
    assert (cut.status, cut.steps) == (gdopt.Status.INTERRUPTED, 100)
    assert len(pulled) < 20
    assert bits(minimize(data=batches, checkpoint=tmp_path / "run", **options)) == bits(whole)


def test_a_second_ctrl_c_in_a_later_call_raises_only_if_it_comes_soon():
    calls = [minimize(callback=lambda report: press()), minimize()]
    assert [call.status.name for call in calls] == ["INTERRUPTED", "MAX_STEPS"]
    with pytest.raises(KeyboardInterrupt):
        minimize(callback=lambda report: press())
    assert minimize(callback=lambda report: press()).status is gdopt.Status.INTERRUPTED
    long_after_the_last_signal()
    assert minimize(callback=lambda report: press()).status is gdopt.Status.INTERRUPTED


def press_as_the_result_is_made(monkeypatch: pytest.MonkeyPatch, number: int) -> gdopt.Result:
    explain = sys.modules["gdopt._minimize"].explain

    def late(ended: Any) -> str:
        press(number)
        return explain(ended)

    with monkeypatch.context() as patch:
        patch.setattr("gdopt._minimize.explain", late)
        return minimize()


@pytest.mark.parametrize("number", USUAL)
def test_a_signal_that_is_too_late_for_a_call_ends_the_next(number: int, monkeypatch: pytest.MonkeyPatch):
    assert press_as_the_result_is_made(monkeypatch, number).status is gdopt.Status.MAX_STEPS
    assert [minimize().status.name for _ in range(2)] == ["INTERRUPTED", "MAX_STEPS"]
    press_as_the_result_is_made(monkeypatch, signal.SIGTERM)
    long_after_the_last_signal()
    assert minimize().status is gdopt.Status.MAX_STEPS


def test_a_handler_that_other_code_puts_back_after_the_run_does_the_usual():
    during = []
    minimize(callback=lambda report: during.append(signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, during[0])
    with pytest.raises(KeyboardInterrupt):
        press()
    assert minimize(callback=lambda report: press()).status is gdopt.Status.INTERRUPTED
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


def test_ctrl_c_ends_a_prepared_run_with_its_result() -> None:
    slow = lambda x: jnp.sum(jax.lax.fori_loop(0, 2000, lambda k, y: y - 1e-9 * jnp.sin(k * y), jnp.cos(x)))
    solve = gdopt.prepare(slow, jnp.ones(3), learning_rate=1e-7, tol=0, max_steps=10**6)
    timer = threading.Timer(0.5, press)
    timer.start()
    try:
        result = solve()
    finally:
        timer.join()
    assert result.status is gdopt.Status.INTERRUPTED
    assert 0 < result.steps < 10**6
