"""Ctrl-C, in real processes: the run ends at once, with what it has found."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

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


def start(program: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
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


def test_a_handler_of_the_callers_own_is_left_alone():
    own = 'signal.signal(signal.SIGINT, lambda *_: print("mine", flush=True)); usual = signal.getsignal(signal.SIGINT)'
    call = own + CALL.replace("10**9", "3000")
    process = start(RUN.format(call=call))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "mine" in out
    assert "INTERRUPTED" not in out


def test_a_second_ctrl_c_raises():
    """The first one is taken at the next chunk's end; here a callback holds that up."""
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


def test_runs_in_another_thread_without_touching_signals():
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


if __name__ == "__main__":
    pytest.main([__file__])


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
