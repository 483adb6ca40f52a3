"""JAX's settings: every kind of call survives what a plain optax loop survives, with the same numbers."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import os
import pkgutil
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdopt
from gdopt import Status, schedules

CPU = jax.devices("cpu")[0]


class Setting(NamedTuple):
    """Values of ``jax.config``, and which numbers they may change."""

    values: dict[str, Any]
    arithmetic: bool = False  # last bits of what is computed
    random: bool = False  # what is drawn


STRICT = {
    "jax_numpy_dtype_promotion": "strict",
    "jax_transfer_guard": "disallow",
    "jax_check_tracer_leaks": True,
    "jax_debug_nans": True,
    "jax_debug_infs": True,
}
SETTINGS = {
    "strict promotion": Setting({"jax_numpy_dtype_promotion": "strict"}),
    "no rank promotion": Setting({"jax_numpy_rank_promotion": "raise"}),
    "tracer leaks": Setting({"jax_check_tracer_leaks": True}),
    "no transfers": Setting({"jax_transfer_guard": "disallow"}),
    "no transfers to devices": Setting({"jax_transfer_guard_host_to_device": "disallow"}),
    "no transfers to the host": Setting({"jax_transfer_guard_device_to_host": "disallow"}),
    "no transfers between devices": Setting({"jax_transfer_guard_device_to_device": "disallow"}),
    "nans": Setting({"jax_debug_nans": True}),
    "infs": Setting({"jax_debug_infs": True}),
    "all strict": Setting(STRICT),
    "no jit": Setting({"jax_disable_jit": True}, arithmetic=True),
    "bfloat16 matmul": Setting({"jax_default_matmul_precision": "bfloat16"}, arithmetic=True),
    "float32 matmul": Setting({"jax_default_matmul_precision": "float32"}, arithmetic=True),
    "highest matmul": Setting({"jax_default_matmul_precision": "highest"}, arithmetic=True),
    "rbg": Setting({"jax_default_prng_impl": "rbg"}, random=True),
    "unsafe rbg": Setting({"jax_default_prng_impl": "unsafe_rbg"}, random=True),
    "another threefry": Setting({"jax_threefry_partitionable": False}, random=True),
    "64 bits": Setting({"jax_enable_x64": True}, arithmetic=True, random=True),
    "explained cache misses": Setting({"jax_explain_cache_misses": True}),
    "logged compilations": Setting({"jax_log_compiles": True}),
    "internal checks": Setting({"jax_enable_checks": True}),
    "key reuse": Setting({"jax_debug_key_reuse": True}),
    "no raw keys": Setting({"jax_legacy_prng_key": "error"}),
    "static indices": Setting({"jax_check_static_indices": True}),
    "default device": Setting({"jax_default_device": CPU}),
    "unfiltered tracebacks": Setting({"jax_traceback_filtering": "off"}),
    "no optimizations": Setting({"jax_disable_most_optimizations": True}, arithmetic=True),
    "no explicit 64 bits": Setting({"jax_explicit_x64_dtypes": "error"}),
}


@contextlib.contextmanager
def under(values: dict[str, Any]) -> Generator[None]:
    """Set them in the whole process, and so in its threads, as a user does."""
    before = {name: jax.config.values[name] for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


# --------------------------------------------------------------------------------------------------------- the calls

# All of it is on the device beforehand, as it is with those who forbid transfers.
ROWS = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
THERE = jax.device_put(ROWS)
PARTS = jax.device_put(np.split(ROWS, 3))
NUMPY_START = {"w": np.array([3.0, -2.0, 1.0], np.float32), "b": np.float32(0.5)}
START = jax.device_put(NUMPY_START)
STARTS = jax.device_put({name: np.stack([leaf, 2 * leaf]) for name, leaf in NUMPY_START.items()})
TWO, TWOS = jax.device_put(np.float32(2.0)), jax.device_put(np.full(3, 2.0, np.float32))
MIXED = jax.device_put({"h": np.ones(3, jnp.bfloat16), "w": np.ones(3, np.float32), "z": np.ones(2, np.complex64)})
SCHEDULE = optax.cosine_decay_schedule(0.1, 30)
ADAM = {"optimizer": optax.adam, "learning_rate": SCHEDULE}
SILVER = schedules.silver(8.0)


def fit(params, rows, scale=1.0):
    return jnp.mean((rows @ params["w"] + params["b"] - scale * jnp.sin(3 * rows[:, 0])) ** 2)


def noisy_fit(params, rows, key):
    return fit(params, rows) + 0.1 * jax.random.normal(key, dtype=rows.dtype) * params["b"]


def with_aux(params, rows):
    return fit(params, rows), {"w": params["w"] * 2}


def mixed(params):
    away = params["h"].astype(jnp.float32) - 2 * params["w"]
    return jnp.sum(away**2) + 0.5 * jnp.sum(params["w"] ** 2) + jnp.sum(jnp.abs(params["z"] - 0.5j) ** 2)


def falls_out(x):
    """A slope down to where the loss is not defined."""
    return jnp.sum(x - jnp.log(x))


def overflows(x):
    return jnp.sum(100 * x)


def facts(result: gdopt.Result) -> dict[str, Any]:
    """Return everything that a result tells, except for the times."""
    numbers = result.loss, result.grad_norm, result.steps, result.status, result.success
    return {"params": result.params, "numbers": numbers, "aux": result.aux, "history": result.history}


def run(loss: Callable = fit, start: Any = START, **options: Any) -> dict[str, Any]:
    if loss in (fit, with_aux) and "data" not in options:
        options.setdefault("args", (THERE,))
    result = gdopt.minimize(loss, start, **{"max_steps": 12, **options})
    return {**facts(result), "message": result.message}


def inside(start: Any) -> Any:
    return gdopt.minimize(fit, start, args=(THERE,), max_steps=12)


def on_batches(start: Any) -> Any:
    return gdopt.minimize(fit, start, data=THERE, batch_size=8, learning_rate=0.1, max_steps=6)


def solution(scale: Any) -> Any:
    return gdopt.minimize(fit, START, args=(THERE, scale), tol=1e-6).params["b"]


def own_loop(factory: Callable, loss: Callable = fit, start: Any = START, batches: Any = ((THERE,),)) -> Any:
    """The usual loop around optax."""
    optimizer = optax.with_extra_args_support(factory(0.1))

    @jax.jit
    def step(params, state, batch):
        value, grad = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(jax.tree.map(jnp.conj, grad), state, params, value=value)
        return optax.apply_updates(params, updates), state

    params, state = start, jax.jit(optimizer.init)(start)
    for batch in itertools.islice(itertools.cycle(batches), 12):
        params, state = step(params, state, batch)
    return params


def resumed(path: Path, **options: Any) -> dict[str, Any]:
    run(checkpoint=path / "run", **{**options, "max_steps": 5})
    return run(checkpoint=path / "run", **options)


def failed(**options: Any) -> dict[str, Any]:
    result = gdopt.minimize(falls_out, TWOS, learning_rate=5.0, **options)
    assert result.status is Status.NON_FINITE
    found = gdopt.diagnose(result)
    assert found.primitive == "log"
    return {**facts(result), "messages": (result.message, found.message)}


def told(**options: Any) -> dict[str, Any]:
    reports: list[gdopt.Report] = []
    out = run(callback=reports.append, **options)
    return {**out, "last report": reports[-1]}


def found(**options: Any) -> Any:
    test = gdopt.lr_find(fit, START, num_steps=30, **options)
    return test.learning_rate, test.losses, test.suggestion or 0.0, test.message


CALLS: dict[str, Callable[..., Any]] = {
    "searched": run,
    "adam, batches": lambda: run(data=THERE, batch_size=8, **ADAM),
    "fixed rate": lambda: run(learning_rate=0.1),
    "adam, schedule": lambda: run(**ADAM),
    "ready lbfgs": lambda: run(optimizer=optax.lbfgs()),
    "keys": lambda: run(noisy_fit, data=THERE, batch_size=8, with_key=True, learning_rate=0.1),
    "aux": lambda: run(with_aux, has_aux=True, learning_rate=0.1),
    "stream": lambda: run(data=lambda: iter(np.split(ROWS, 3)), **ADAM),
    "stream on the device": lambda: run(data=lambda: iter(PARTS), **ADAM),
    "jit": lambda: facts(jax.jit(inside)(START)),
    "vmap": lambda: facts(jax.vmap(inside)(STARTS)),
    "vmap, batches": lambda: facts(jax.vmap(on_batches)(STARTS)),
    "jit of a vmap": lambda: facts(jax.jit(jax.vmap(inside))(STARTS)),
    "grad": lambda: jax.jit(jax.grad(solution))(TWO),
    "grad outside of jit": lambda: jax.grad(solution)(TWO),
    "lr_find": lambda: found(args=(THERE,)),
    "lr_find, batches": lambda: found(data=THERE, batch_size=8, optimizer=optax.adam),
    "lr_find, refined": lambda: found(data=THERE, batch_size=8, repeats=2, refine=True),
    "lr_find, stream": lambda: found(data=lambda: itertools.cycle(PARTS)),
    "gd_step": lambda: gdopt.gd_step(fit, START, 0.1, THERE),
    "auto for batches": lambda: run(data=THERE, batch_size=8, max_steps=60),
    "checkpoint": lambda path: resumed(path, data=THERE, batch_size=8, **ADAM, max_steps=12),
    "checkpoint, searched": lambda path: resumed(path, max_steps=12),
    "checkpoint, stream": lambda path: resumed(path, data=lambda: iter(PARTS), **ADAM, max_steps=12),
    "diagnose": failed,
    "diagnose without the best": lambda: failed(keep_best=False),
    "diagnose inside a callback's run": lambda: failed(keep_best=False, callback=lambda report: None),
    "callback": lambda: told(data=THERE, batch_size=8, learning_rate=0.1),
    "mixed dtypes": lambda: run(mixed, MIXED),
    "mixed dtypes, adam": lambda: run(mixed, MIXED, **ADAM),
    "mixed dtypes, spectral in an own loop": lambda: own_loop(lambda rate: gdopt.spectral(), mixed, MIXED, ((),)),
    "mixed dtypes, gd_step": lambda: gdopt.gd_step(mixed, MIXED, 0.1),
    "averaged": lambda: run(data=THERE, batch_size=8, optimizer=optax.contrib.schedule_free_sgd(0.1)),
    "infinite params": lambda: run(overflows, TWOS, learning_rate=1e38, keep_best=False),
    "callback, infinite params": lambda: told(loss=overflows, start=TWOS, learning_rate=1e38, keep_best=False),
    "gdopt's schedules": lambda: run(learning_rate=SILVER, optimizer=optax.sgd),
    "target": lambda: run(data=THERE, batch_size=8, learning_rate=0.1, target=0.9),
    "held": lambda: run(learning_rate=0.1, trainable={"w": True, "b": False}),
    "NumPy's": lambda: run(start=NUMPY_START, args=(ROWS,), learning_rate=0.1),
    "NumPy's batches": lambda: run(start=NUMPY_START, data=ROWS, batch_size=8, learning_rate=0.1),
    "spectral in an own loop": lambda: own_loop(lambda rate: gdopt.spectral()),
    "gd in an own loop": lambda: own_loop(gdopt.gd),
    "cycles in an own loop": lambda: own_loop(lambda rate: gdopt.gd(schedules.triangular2(0.05, 0.2, 4))),
    "one cycle in an own loop": lambda: own_loop(lambda rate: gdopt.gd(schedules.one_cycle(0.2, 9))),
    "plot of a schedule": lambda: gdopt.plot.schedule(SILVER, 8).axes[0].get_lines()[0].get_ydata(),
}
DRAWS = {name for name in CALLS if any(part in name for part in ("batches", "keys", "lr_find, refined"))}
DRAWS |= {"checkpoint", "callback", "averaged", "target"}  # of batches, too
TRIALS = {name for name in CALLS if "spectral in an own loop" in name}  # the last point may be one
# What no plain loop survives: JAX's own `grad` and slicing move numbers when they run outside of jit.
NOT_PLAIN = {(name, "grad outside of jit") for name in SETTINGS if "no transfers" in name or name == "all strict"}

OFTEN = ("searched", "adam, batches")
FAST = ("strict promotion", "tracer leaks", "no transfers", "nans", "infs", "all strict", "no jit", "rbg", "64 bits")
FAST += ("no transfers to devices", "no transfers to the host", "no transfers between devices", "bfloat16 matmul")
FAST += ("another threefry", "explained cache misses", "logged compilations", "default device", "unfiltered tracebacks")
FAST += ("no rank promotion", "no raw keys")
# The third call of each: a covering set.
OTHERS = [name for name in CALLS if name not in (*OFTEN, "lr_find, refined", "auto for batches", "lr_find, stream")]
COVERED = {(setting, call) for setting in FAST for call in OFTEN}
COVERED |= {(setting, OTHERS[place % len(OTHERS)]) for place, setting in enumerate(FAST)}
COVERED |= {("no transfers", "vmap, batches")}
COVERED |= {("all strict", call) for call in ("diagnose", "checkpoint", "stream", "lr_find", "callback", "gd_step")}


def call(name: str, path: Path) -> Any:
    """Return the results of a call, as NumPy arrays and texts."""
    function = CALLS[name]
    if not name.startswith("checkpoint"):
        return function()
    own = path / name
    own.mkdir()
    return function(own)


@functools.cache
def expected(name: str, path: Path) -> Any:
    """The same without a setting."""
    return call(name, path)


def leaves(tree: Any) -> list[Any]:
    return [leaf if isinstance(leaf, str) else np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def answer(outcome: Any) -> list[Any]:
    """Return what hardly depends on last bits: the params, without the steps on the way to them."""
    if isinstance(outcome, tuple):
        return leaves(outcome[0])
    return leaves(outcome.get("params", outcome) if isinstance(outcome, dict) else outcome)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("expected")


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        pytest.param(
            setting, name, marks=[] if (setting, name) in COVERED else pytest.mark.slow, id=f"{setting}-{name}"
        )
        for setting in SETTINGS
        for name in CALLS
        if (setting, name) not in NOT_PLAIN
    ],
)
@pytest.mark.filterwarnings("ignore:this call differs from the run saved in .*max_steps=")
def test_a_call_survives_a_setting(setting: str, name: str, directory: Path, tmp_path: Path) -> None:
    values, arithmetic, random = SETTINGS[setting]
    if missing := [value for value in values if value not in jax.config.values]:
        pytest.skip(f"this JAX has no {missing[0]}")
    usual = expected(name, directory)
    if (setting, name) not in COVERED:
        gdopt.clear_cache()  # so that it is compiled under the setting
    with under(values):
        before = jax.config.values.copy()
        outcome = call(name, tmp_path)
        assert jax.config.values == before
    if (random and name in DRAWS) or (arithmetic and name in TRIALS):
        return
    if arithmetic:
        for mine, theirs in zip(answer(outcome), answer(usual), strict=True):
            np.testing.assert_allclose(mine.astype(complex), theirs.astype(complex), rtol=0.05, atol=0.02)
        return
    for mine, theirs in zip(leaves(outcome), leaves(usual), strict=True):
        if isinstance(mine, str):
            assert mine == theirs
        else:
            assert (mine.dtype, mine.shape, mine.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_plain_loop_survives_it(setting: str) -> None:
    """Adam does not survive strict promotion; plain descent does."""
    with under({name: value for name, value in SETTINGS[setting].values.items() if name in jax.config.values}):
        assert jax.tree.structure(own_loop(optax.sgd)) == jax.tree.structure(START)


def test_the_first_call_of_a_process_survives_them_all() -> None:
    """The settings also apply to what gdopt does once in a process."""
    values = {"jax_numpy_rank_promotion": "raise", **STRICT}
    environment = {**os.environ, **{name.upper(): str(value) for name, value in values.items()}}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", FIRST_CALL], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["CONVERGED", "MAX_STEPS", "strict"]


FIRST_CALL = """
import jax, numpy as np, optax, gdopt
x, rows = jax.device_put((np.zeros(3, np.float32), np.ones((8, 3), np.float32)))
print(gdopt.minimize(lambda x: ((x - 1) ** 2).sum(), x).status)
loss = lambda x, rows: ((rows @ x - 1) ** 2).mean()
options = {"optimizer": optax.adam, "learning_rate": 0.1, "max_steps": 3}
print(gdopt.minimize(loss, x, data=rows, batch_size=4, **options).status)
print(jax.config.jax_numpy_dtype_promotion)
"""


# ------------------------------------------------------------------------- the user's code has the user's settings


def test_a_loss_is_traced_under_strict_promotion() -> None:
    loss = lambda x: jnp.sum(x * jnp.ones(3, jnp.bfloat16))
    gdopt.minimize(loss, TWOS, learning_rate=0.1, max_steps=1)
    with under(STRICT), pytest.raises(ValueError, match="promotion"):
        gdopt.minimize(loss, TWOS, learning_rate=0.1, max_steps=1)


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        (lambda: jnp.log(jax.device_put(np.float32(-1.0))), FloatingPointError),
        (lambda: 1 / jax.device_put(np.zeros(2, np.float32)), jax.errors.JaxRuntimeError),
        (lambda: jnp.add(np.ones(2, np.float32), TWO), jax.errors.JaxRuntimeError),
        (lambda: jnp.add(TWO, jax.device_put(np.ones((), jnp.bfloat16))), ValueError),
    ],
    ids=["nan", "number to the device", "array to the device", "promotion"],
)
@pytest.mark.parametrize("options", [{}, {"data": lambda: iter(PARTS), "args": ()}], ids=["full batch", "stream"])
def test_a_callback_runs_under_the_settings_of_its_user(mistake: Callable, error: Any, options: dict[str, Any]) -> None:
    with under(STRICT), pytest.raises(error):
        run(learning_rate=0.1, callback=lambda report: mistake(), **options)


def test_a_stream_is_read_under_the_settings_of_its_user() -> None:
    def batches() -> Iterator[Any]:
        yield PARTS[0]
        yield jnp.add(ROWS, TWO)

    with under(STRICT), pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        run(data=batches, learning_rate=0.1)


def test_gd_step_obeys_the_checks_of_its_user() -> None:
    with under({"jax_debug_nans": True}), pytest.raises(FloatingPointError):
        gdopt.gd_step(lambda x: jnp.sum(jnp.log(-x)), TWOS, 0.1)


# ----------------------------------------------------------------------------------------------------- ways to the host


class Watched:
    """NumPy as gdopt's modules see it. On a CPU no guard watches implicit transfers from the device to the host."""

    def __init__(self, check: Callable[[str], None]):
        self._check = check

    def __getattr__(self, name: str) -> Any:
        value = getattr(np, name)
        if isinstance(value, type) or not callable(value) or name in ("shape", "ndim", "size", "result_type"):
            return value

        def watched(*args: Any, **options: Any) -> Any:
            if any(type(leaf) is type(THERE) for leaf in jax.tree.leaves((args, options))):
                self._check(f"np.{name}")
            return value(*args, **options)

        if isinstance(value, np.ufunc):
            cast(Any, watched).accumulate = value.accumulate
        return watched


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in (*OFTEN, "callback") else pytest.mark.slow)
        for name in CALLS
        if "plot" not in name
    ],
)
def test_the_host_reads_only_explicitly(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`jax.device_get` reads it, or gdopt's own work, which allows itself all transfers."""
    asked, get, kind = threading.local(), jax.device_get, type(THERE)

    def check(way: str) -> None:
        allowed = cast(Any, jax.config).jax_transfer_guard_device_to_host == "allow" or getattr(asked, "now", False)
        assert allowed, f"{way} of an array on the device"

    def device_get(tree: Any) -> Any:
        asked.now = True
        try:
            return get(tree)
        finally:
            asked.now = False

    def watched(way: str) -> Callable:
        original = getattr(kind, way)

        def method(self: Any, *args: Any) -> Any:
            check(way)
            return original(self, *args)

        return method

    monkeypatch.setattr(jax, "device_get", device_get)
    for way in ("__float__", "__int__", "__bool__", "__index__", "__complex__", "__format__", "item", "tolist"):
        monkeypatch.setattr(kind, way, watched(way))
    for module in pkgutil.iter_modules(gdopt.__path__, "gdopt."):
        monkeypatch.setattr(importlib.import_module(module.name), "np", Watched(check), raising=False)
    with under({"jax_transfer_guard_device_to_host": "disallow"}):
        call(name, tmp_path)
