"""A run that was killed, interrupted or at its end resumes from its newest checkpoint, bit for bit."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdopt
from gdopt import Status
from gdopt._checkpoint import resume
from gdopt._checkpoint.identity import layout_of
from gdopt._run import host_loop

# Most of these runs resume with other limits than before, which is a warning of its own test.
pytestmark = pytest.mark.filterwarnings(
    "ignore:this call differs from the run saved in .*(max_steps|epochs|tol|target)="
)
SCRIPT = Path(__file__).parents[1] / "scripts" / "killed_run.py"
ROWS = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
BATCHES: dict[str, Any] = {"data": ROWS, "batch_size": 7, "optimizer": optax.adam, "learning_rate": 0.01}


def loss(w, rows):
    return jnp.mean((rows @ w - 1) ** 2)


def quartic(w):
    return jnp.sum((w - jnp.arange(6.0)) ** 4)


def minimize(checkpoint=None, max_steps=60, **options):
    return gdopt.minimize(loss, jnp.zeros(3), max_steps=max_steps, checkpoint=checkpoint, **{**BATCHES, **options})


def bits(result):
    kept = result.params, result.loss, result.grad_norm, result.aux, tuple(result.history)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(kept)]


def went_on(step: int, path: Any, behind: str = ".") -> str:
    """Return the end of the message of a resumed run."""
    return f" It resumed from step {step}, saved in '{path.name}.{step:012d}.gdopt'{behind}"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------------ killed, really


def start(kind: str, path: Any, steps: int, pause: float) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), kind, str(path), str(steps), str(pause)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> str:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    return out.strip()


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("batches", 3),
        ("quasi_newton", 2),  # others are resumed below, in this process; test_soak.py kills all for ten minutes
        *(
            pytest.param(kind, 7, marks=pytest.mark.slow)
            for kind in ("batches", "spectral", "stream", "grain", "auto", "noise of the optimizer")
        ),
    ],
)
def test_killed_at_any_moment_it_resumes_bit_for_bit(kind: str, kills: int, path) -> None:
    if kind == "grain":
        pytest.importorskip("grain")
    chance = random.Random(kills)
    expected = start(kind, "none", 4096, 0)
    killed = 0
    while True:
        before = set(path.parent.glob("run.*.gdopt"))
        process = start(kind, path, chance.choice([5, 30]), 0.005 if killed < kills else 0)
        while process.poll() is None and killed < kills and set(path.parent.glob("run.*.gdopt")) <= before:
            time.sleep(0.01)
        if killed == kills or process.poll() is not None:
            break
        time.sleep(chance.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
    assert finished(process) == finished(expected)
    assert killed == kills, "it was over before it was killed: make it longer"


@pytest.mark.slow  # test_signals.py sends it to a run in its own process
def test_sigterm_ends_with_a_save_and_a_result(path) -> None:
    process = start("batches", path, 30, 0.005)
    while not list(path.parent.glob("run.*.gdopt")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert "INTERRUPTED" in finished(process)
    assert time.monotonic() - began < 30  # at once, but for the end of the interpreter on a busy machine
    assert not path.with_name("run.gdopt.lock").exists()


# ------------------------------------------------------------------------------------------ one call after another


def test_a_call_with_more_steps_resumes(path) -> None:
    first = minimize(path, max_steps=25)
    assert first.steps == 25
    whole = minimize(path, max_steps=60)
    never_stopped = minimize(max_steps=60)
    assert bits(whole) == bits(never_stopped)
    assert whole.message == never_stopped.message + went_on(25, path)
    assert "resumed" not in first.message
    assert sorted(file.name for file in path.parent.iterdir()) == [f"run.{step:012d}.gdopt" for step in (25, 60)]


@pytest.mark.parametrize("whole", [{"max_steps": 70}, {"epochs": 10}])
def test_a_call_with_fewer_steps_spoils_nothing(whole, path) -> None:
    (name, most) = next(iter(whole.items()))
    run = lambda count, path=path: minimize(path, **{"max_steps": None, name: count})
    run(most - most // 3)
    fewer = run(most // 3)
    assert "more than asked for" in fewer.message
    assert bits(run(most)) == bits(run(most, None))


def test_a_signal_before_the_first_step_spoils_nothing(path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        usual = host_loop.begin

        def at_once(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            return usual(*args)

        patch.setattr(host_loop, "begin", at_once)
        assert minimize(path).steps == 0
    assert bits(minimize(path)) == bits(minimize())


def test_another_target_counts_no_batch_twice(path) -> None:
    """The loss of the epoch in which the first run ended is a mean of its batches."""
    shifted = lambda w, rows: loss(w, rows) - 2
    run = lambda target, path=None: gdopt.minimize(
        shifted, jnp.zeros(3), max_steps=400, target=target, checkpoint=path, **{**BATCHES, "learning_rate": 0.05}
    )
    first = run(-1.0, path)
    assert first.status is Status.TARGET_REACHED
    assert run(-1.1).steps > first.steps
    assert bits(run(-1.1, path)) == bits(run(-1.1))


def test_resuming_a_failed_run_says_that_it_ended(path) -> None:
    run = lambda rate: gdopt.minimize(quartic, jnp.zeros(6), learning_rate=rate, checkpoint=path)
    assert "That was the end" not in run(1e9).message
    end = "That was the end of the run saved in 'run.000000000001.gdopt'. Pass another path to make another one."
    assert run(1e9).message.endswith(end)
    with pytest.warns(UserWarning, match=r"learning_rate=0.0001 \(it was 1000000000\.0\). It had ended"):
        assert run(1e-4).message.endswith(end)


def test_ctrl_c_in_the_last_save_loses_nothing(path, monkeypatch) -> None:
    saving, fsync = threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        saving.set()
        time.sleep(0.5)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)

    def press() -> None:
        saving.wait()
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    result = gdopt.minimize(quartic, jnp.zeros(6), checkpoint=path)
    thread.join()
    assert result.status is Status.CONVERGED
    assert list(path.parent.glob("run.*.gdopt"))


def test_sets_of_strings_have_no_order(tmp_path) -> None:
    """The order of a set differs between processes, and so does the text of a trace that holds one."""
    code = (
        "import functools, jax, jax.numpy as jnp, optax\n"
        "from gdopt._checkpoint import identity\n"
        "from gdopt._optimizers import method\n"
        "from gdopt._problem import objective, problem\n"
        "keep = jax.checkpoint_policies.save_only_these_names(*'abcdefgh')\n"
        "loss = jax.checkpoint(lambda x: jnp.sum(jnp.sin(x)), policy=keep)\n"
        "one = problem.make_problem(objective.make_objective(loss, jnp.ones(2)), args=(), data=None, batch_size=None, "
        "with_key=False, key=None)\n"
        "adam = lambda rate, names: optax.adam(rate)\n"
        "found, _ = identity.program_identity(one, "
        "method.make_method(functools.partial(adam, names={'a', 'b', 'c'}), 0.1))\n"
        "print(found['loss'], found['gradient'], found['optimizer']['updates'])"
    )
    run = lambda seed: (
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert run("1") == run("2")


def test_the_same_call_adds_no_step_to_a_run_that_ended(path, monkeypatch) -> None:
    first = minimize(path)
    evaluated = []
    monkeypatch.setattr(host_loop, "_rows", lambda *a, _f=host_loop._rows: evaluated.append(a[1]) or _f(*a))
    assert bits(minimize(path)) == bits(first)
    assert sum(evaluated) == 1  # the last point, which another limit would have gone on from
    converged = gdopt.minimize(quartic, jnp.zeros(6), checkpoint=path.with_name("other"))
    evaluated.clear()
    again = gdopt.minimize(quartic, jnp.zeros(6), checkpoint=path.with_name("other"))
    message = converged.message + went_on(converged.steps, path.with_name("other"))
    assert (again.status, again.message) == (converged.status, message)
    assert (bits(again), evaluated) == (bits(converged), [])


def test_a_smaller_tol_resumes_from_the_end(path) -> None:
    gdopt.minimize(quartic, jnp.zeros(6), checkpoint=path)
    more = gdopt.minimize(quartic, jnp.zeros(6), checkpoint=path, tol=1e-7)
    whole = gdopt.minimize(quartic, jnp.zeros(6), tol=1e-7)
    assert (more.status, more.steps, more.params.tobytes()) == (whole.status, whole.steps, whole.params.tobytes())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"optimizer": optax.contrib.schedule_free_sgd(0.1), "learning_rate": "auto"}, marks=pytest.mark.slow
        ),
        {"optimizer": gdopt.gd, "learning_rate": "auto", "max_steps": 100},
        {"data": lambda: iter(np.split(ROWS, [20, 40])), "batch_size": None},
        pytest.param({"keep_best": False}, marks=pytest.mark.slow),
    ],
    ids=["averaged", "auto", "stream", "no best"],
)
def test_a_run_that_a_callback_stopped_resumes(options: dict[str, Any], path) -> None:
    whole = minimize(**options)
    stopped = minimize(path, callback=lambda report: report.step >= 20, **options)
    assert (stopped.status, stopped.steps < whole.steps) == (Status.STOPPED, True)
    resumed = minimize(path, **options)
    assert bits(resumed) == bits(whole)
    skipped = f", and the {stopped.steps} batches before it were replayed."
    behind = skipped if callable(options.get("data")) else "."
    assert resumed.message == whole.message + went_on(stopped.steps, path, behind)


def test_a_run_in_a_thread_is_the_same(path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(minimize(path)))
    thread.start()
    thread.join()
    assert bits(results[0]) == bits(minimize())


def test_saves_do_not_change_a_run_and_do_not_pile_up(path) -> None:
    often = gdopt.Checkpoint(path, every_seconds=0, keep=2)
    assert bits(minimize(often, callback=lambda report: None)) == bits(minimize())
    assert len(list(path.parent.iterdir())) == 2


def test_a_full_disk_is_a_warning(path, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="was not saved: OSError: .*No space left"):
        result = minimize(path)
    assert bits(result) == bits(minimize())
    assert not list(path.parent.glob("*.gdopt*"))


# ------------------------------------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 5}, "its batch_size is 7, but here it is 5"),
        ({"optimizer": optax.sgd}, "its optimizer is <function adam> with .*, but here it is <function sgd> with "),
        ({"data": ROWS[:40]}, r"its data is float32\[50, 3\] with .*, but here it is float32\[40, 3\] with "),
        (
            {"data": 2 * ROWS},
            r"its data is float32\[50, 3\] with the checksum .*, but here it is float32\[50, 3\] with ",
        ),
        ({"key": jax.random.key(1)}, "its key is "),
        ({"keep_best": False}, "its keep_best is True, but here it is False"),
    ],
)
def test_the_save_of_another_run_is_an_error_that_lists_both(change, message: str, path) -> None:
    minimize(path, max_steps=3)
    with pytest.raises(gdopt.InputError, match=f"of another run: {message}"):
        minimize(path, max_steps=3, **change)


def test_other_params_and_x64_are_errors(path) -> None:
    minimize(path, max_steps=3)
    with pytest.raises(gdopt.InputError, match=r"its params is float32\[3\], but here it is \['w'\] float32\[3\]"):
        gdopt.minimize(lambda p, r: loss(p["w"], r), {"w": jnp.zeros(3)}, checkpoint=path, **BATCHES)
    with jax.enable_x64(True), pytest.raises(gdopt.InputError, match="of another run"):
        minimize(path)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (optax.adam(0.01), optax.adam(0.01, b1=0.5)),
        (optax.adam(0.01), optax.sgd(0.01)),
        (optax.sgd(0.01), optax.sign_sgd(0.01)),
        (optax.chain(optax.clip(1.0), optax.adam(0.01)), optax.chain(optax.clip(0.1), optax.adam(0.01))),
        (lambda rate: optax.adam(rate, b1=0.9), lambda rate: optax.adam(rate, b1=0.8)),
    ],
)
def test_other_numbers_in_an_optimizer_are_an_error(first, then, path) -> None:
    """Their reprs are the same, so only what they compute tells them apart."""
    rate: dict[str, Any] = {} if hasattr(first, "init") else {"learning_rate": 0.01}
    run = lambda optimizer, steps: gdopt.minimize(
        loss, jnp.zeros(3), data=ROWS, batch_size=7, optimizer=optimizer, max_steps=steps, checkpoint=path, **rate
    )
    run(first, 10)
    with pytest.raises(gdopt.InputError, match=r"of another run: its optimizer is .* with updates of the checksum "):
        run(then, 20)
    assert run(first, 20).steps == 20


def test_a_rate_instead_of_the_default_is_an_error(path) -> None:
    gdopt.minimize(quartic, jnp.zeros(6), max_steps=3, checkpoint=path)
    with pytest.raises(gdopt.InputError, match="of another run: its optimizer is "):
        gdopt.minimize(quartic, jnp.zeros(6), max_steps=5, learning_rate=1e-3, checkpoint=path)


def test_a_missing_aux_is_an_error(path) -> None:
    """The save has more than there is room for."""
    both = lambda w, rows: (loss(w, rows), {"a": w[0], "b": w})
    one = lambda w, rows: (loss(w, rows), {"a": w[0]})
    run = lambda loss, steps: gdopt.minimize(
        loss, jnp.zeros(3), max_steps=steps, has_aux=True, checkpoint=path, **BATCHES
    )
    run(both, 3)
    with (
        pytest.warns(UserWarning, match="the loss is not that of"),
        pytest.raises(gdopt.InputError, match=r"its state\.kept\.aux\['b'\] is float32\[3\], but here it is nothing"),
    ):
        run(one, 5)


def test_other_args_and_held_params_are_errors(path) -> None:
    """Otherwise a converged run would return its old answer to any new question."""
    near = lambda x, a: (x["free"] - x["held"] - a) ** 2
    run = lambda held, a: gdopt.minimize(
        near,
        {"free": 0.0, "held": jnp.float32(held)},
        args=(jnp.float32(a),),
        trainable={"free": True, "held": False},
        checkpoint=path,
    )
    assert run(1, 2).status is Status.CONVERGED
    with pytest.raises(gdopt.InputError, match=r"its args is \[0\] float32\[\] with the checksum "):
        run(1, 3)
    with pytest.raises(gdopt.InputError, match=r"its held params is \[1\] float32\[\] with the checksum "):
        run(2, 2)
    assert run(1, 2).steps == run(1, 2).steps


def test_another_start_is_a_warning(path) -> None:
    minimize(path, max_steps=3)
    with pytest.warns(UserWarning, match=r"params differ from the start of the run saved in .*, whose params are used"):
        result = gdopt.minimize(loss, jnp.ones(3), max_steps=60, checkpoint=path, **BATCHES)
    assert bits(result) == bits(minimize())


def test_the_closure_is_a_part_of_the_loss(path) -> None:
    """The old answer is evaluated again: the report is on the present loss."""

    def run(number: float, steps: int = 10_000) -> gdopt.Result:
        goal = jnp.full(3, number)
        return gdopt.minimize(lambda x: jnp.sum((x - goal) ** 2), jnp.zeros(3), max_steps=steps, checkpoint=path)

    run(1.0)
    with pytest.warns(UserWarning, match="the loss is not that of the checkpoint"):
        result = run(5.0)
    assert result.loss == pytest.approx(float(jnp.sum((result.params - 5.0) ** 2)))


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": optax.adam, "learning_rate": 0.1, "max_steps": 20}], ids=["searched", "given"]
)
def test_a_changed_loss_is_not_measured_by_the_old_one(options, path) -> None:
    """Its values are larger than any before, which is no divergence and no step to undo."""
    gdopt.minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(2), checkpoint=path, **options)
    other = lambda x: 1e6 * jnp.sum((x - 2.0) ** 2) + 1e8
    with pytest.warns(UserWarning, match="the loss is not that of the checkpoint"):
        result = gdopt.minimize(other, jnp.zeros(2), checkpoint=path, **{**options, "max_steps": 500})
    assert result.success
    np.testing.assert_allclose(result.params, 2.0, atol=0.05)


def test_a_changed_loss_is_a_warning(path) -> None:
    minimize(path, max_steps=3)
    with pytest.warns(UserWarning, match="the loss is not that of the checkpoint"):
        gdopt.minimize(lambda w, r: 2 * loss(w, r), jnp.zeros(3), max_steps=5, checkpoint=path, **BATCHES)


def test_other_devices_or_cores_are_a_warning(path, monkeypatch) -> None:
    minimize(path, max_steps=20)
    here = layout_of(cast(Any, jnp.zeros(3)))
    assert re.fullmatch(r"cpu, 1 device, \d+ cores?", here)
    minimize(path, max_steps=30)  # the same ones: no warning
    monkeypatch.setattr(resume, "layout_of", lambda carry: "NVIDIA H100, 2 devices")
    with pytest.warns(UserWarning, match=f"was made on {here}, but this is NVIDIA H100, 2 devices. The run resumes"):
        result = minimize(path)
    assert result.steps == 60
    minimize(path, max_steps=70)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=f"was made on NVIDIA H100, 2 devices, but this is {here}.* last bits"):
        minimize(path, max_steps=80)


def test_other_versions_and_other_random_numbers_are_a_warning(path, monkeypatch) -> None:
    minimize(path, max_steps=20)
    with monkeypatch.context() as patch:
        patch.setattr("gdopt._checkpoint.identity.metadata.version", lambda name: "9.9")
        with pytest.warns(UserWarning, match="was made on cpu.* with jax .*, but this is cpu.* with jax 9.9,"):
            minimize(path, max_steps=30)
        minimize(path, max_steps=40)
    partitionable = cast(Any, jax.config).jax_threefry_partitionable
    try:
        jax.config.update("jax_threefry_partitionable", not partitionable)
        with pytest.warns(UserWarning, match="jax_threefry_partitionable=False"):
            minimize(path, max_steps=50)
    finally:
        jax.config.update("jax_threefry_partitionable", partitionable)


@jax.tree_util.register_pytree_with_keys_class
class Twins:
    """A node that gives both of its children the same path."""

    def __init__(self, one, two):
        self.one, self.two = one, two

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey("w")
        return ((key, self.one), (key, self.two)), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_leaves_with_the_same_path_are_kept_apart(path) -> None:
    def run(checkpoint, steps):
        near = lambda p: jnp.sum((p.one - 1) ** 2) + jnp.sum((p.two - 2) ** 2)
        start = Twins(jnp.zeros(3), jnp.zeros(3))
        return gdopt.minimize(near, start, learning_rate=0.1, tol=0, max_steps=steps, checkpoint=checkpoint)

    run(path, 5)
    assert bits(run(path, 10)) == bits(run(None, 10))


def test_a_terminal_changes_no_checksum(tmp_path) -> None:
    """JAX writes traces in colours if its output is a terminal."""
    pty = pytest.importorskip("pty")
    code = (
        "import sys, jax, jax.numpy as jnp\n"
        "from gdopt._compile import digests\n"
        "open(sys.argv[1], 'w').write(digests.digest(lambda x: jnp.sum(jax.jit(jnp.sin)(x)), jnp.ones(3)))"
    )
    ours, theirs = pty.openpty()
    for name, out in (("terminal", theirs), ("file", subprocess.DEVNULL)):
        environment = {**os.environ, "TERM": "xterm-256color"}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], stdout=out, env=environment, check=True)
    os.close(ours)
    os.close(theirs)
    assert (tmp_path / "terminal").read_text() == (tmp_path / "file").read_text()


def test_a_damaged_save_is_skipped_and_named(path) -> None:
    minimize(path, max_steps=20)
    minimize(path, max_steps=40)
    newest = path.with_name(f"run.{40:012d}.gdopt")
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=f"run.{20:012d}.gdopt', because newer ones were skipped: .*{40:012d}"):
        result = minimize(path)
    assert bits(result) == bits(minimize())


def test_bad_paths_are_refused_before_training(tmp_path) -> None:
    with pytest.raises(gdopt.InputError, match=r"which does not exist\. Make that directory"):
        minimize(tmp_path / "nowhere" / "run")
    with pytest.raises(gdopt.InputError, match=r"has a name that is too long .* of at most \d+ bytes"):
        minimize(tmp_path / ("x" * 230))
    with pytest.raises(gdopt.InputError, match="is not a path"):
        minimize(3)
    with pytest.raises(gdopt.InputError, match=r"checkpoint=.* was given to minimize inside jit"):
        jax.jit(lambda shift: minimize(tmp_path / "run", data=ROWS + shift).params)(0.0)
    stopped = {}

    def second(report: gdopt.Report) -> bool:
        with pytest.raises(gdopt.InputError, match="is in use by a live run"):
            minimize(tmp_path / "run")
        stopped["yes"] = True
        return True

    minimize(tmp_path / "run", callback=second)
    assert stopped


@pytest.mark.parametrize("other", [0.2, gdopt.schedules.triangular(0.1, 0.2, step_size_up=5)])
def test_another_learning_rate_is_a_warning(other: Any, tmp_path: Path) -> None:
    run = lambda rate, steps: gdopt.minimize(
        lambda x: jnp.sum(x**2), jnp.ones(2), learning_rate=rate, max_steps=steps, tol=0, checkpoint=tmp_path / "run"
    )
    run(0.1, 3)
    with pytest.warns(UserWarning, match=r"learning_rate=0\..* \(it was 0\.1\)"):
        result = run(other, 6)
    assert result.history.learning_rate[2] == np.float32(0.1)
    assert result.history.learning_rate[3] != np.float32(0.1)
