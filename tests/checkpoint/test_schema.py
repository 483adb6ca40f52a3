"""Checkpoints from anybody's hand: right checksums, and any contents."""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gdopt
from gdopt._checkpoint.file import read, write

ROWS = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)


class Counting:
    """Batches whose iterator reports its position."""

    def __iter__(self) -> Any:
        return _Position()


class _Position:
    at = 0

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> np.ndarray:
        self.at += 1
        if self.at > 4:
            raise StopIteration
        return ROWS[5 * self.at - 5 : 5 * self.at]

    def get_state(self) -> dict:
        return {"at": self.at}

    def set_state(self, state: dict) -> None:
        self.at = state["at"]


def loss(w: Any, rows: Any) -> Any:
    return jnp.mean((rows @ w - 1) ** 2)


KINDS: dict[str, dict[str, Any]] = {
    "batches": {"data": ROWS, "batch_size": 5, "optimizer": optax.adam, "learning_rate": 0.01},
    "schedule": {"data": ROWS, "optimizer": optax.sgd, "learning_rate": optax.cosine_decay_schedule(0.1, 60)},
    "auto": {"data": ROWS, "batch_size": 5, "optimizer": optax.adagrad},
    "searched": {"data": ROWS},
    "stream": {"data": Counting(), "optimizer": optax.adam, "learning_rate": 0.01},
}


def run(kind: str, path: Path | None, stop: int = 1000) -> gdopt.Result:
    """Make a run of up to 60 steps, or stop at the first report after a step."""
    options: dict[str, Any] = {"tol": 0} if kind in ("schedule", "searched") else {}
    halt = lambda report: report.step >= stop
    return gdopt.minimize(loss, jnp.zeros(3), max_steps=400, checkpoint=path, callback=halt, **KINDS[kind], **options)


Contents = tuple[dict[str, np.ndarray], dict[str, Any]]


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, int]]:
    """Return a function that makes, once for each kind, a folder with two checkpoints, and the step of the newer."""
    made: dict[str, tuple[Path, int]] = {}

    def of(kind: str) -> tuple[Path, int]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            run(kind, folder / "run", 5)
            run(kind, folder / "run", 20)
            steps = sorted(int(file.name.split(".")[1]) for file in folder.glob("run.*.gdopt"))
            assert len(steps) == 2
            made[kind] = folder, steps[-1]
        return made[kind]

    return of


def forge(folder: Path, step: int, change: Callable[[dict, dict], Any]) -> None:
    """Write a checkpoint anew, with other contents and right checksums."""
    file = str(folder / f"run.{step:012d}.gdopt")
    arrays, meta = read(file)
    change(arrays, meta)
    write(file, arrays, meta)


def put(name: str, value: Any) -> Callable[[dict, dict], None]:
    """Return a change of one entry of the meta, whose path is joined by slashes; ``...`` removes it."""

    def change(arrays: dict, meta: dict) -> None:
        *way, last = name.split("/")
        for part in way:
            meta = meta[part]
        if value is ...:
            del meta[last]
        else:
            meta[last] = value

    return change


def array(name: str, value: Any) -> Callable[[dict, dict], None]:
    """Return a change of an array."""

    def change(arrays: dict, meta: dict) -> None:
        if value is ...:
            del arrays[name]
        else:
            arrays[name] = np.asarray(value, None if hasattr(value, "dtype") else arrays[name].dtype)

    return change


CHANGES: list[tuple[str, Callable, str]] = [
    *[("batches", put(name, ...), f"no field '{name}'") for name in ("given", "optimizer", "start", "loss", "limits")],
    *[
        ("batches", put(name, value), f"field '{name}' is ")
        for name in ("given", "optimizer", "start", "loss", "limits", "asked", "rates", "layout", "gradient")
        for value in (None, 3, [])
    ],
    ("batches", put("given/params", None), "field 'given'"),
    ("batches", put("given/params", ...), "field 'given'"),
    ("batches", put("optimizer/versions", ...), "no field 'optimizer.versions'"),
    ("batches", put("limits", ["0.1"]), "field 'limits'"),
    ("batches", put("limits", ["0.1", "one", "2"]), "field 'limits'"),
    ("batches", put("asked/max_steps", 0), "field 'asked.max_steps' is 0, not a whole number"),
    ("batches", put("asked/epochs", "2"), "field 'asked.epochs'"),
    ("batches", array("state.step", -5), "field 'state.step' is -5"),
    ("batches", array("state.step", 2**31 - 1), "field 'state.step'"),
    ("batches", array("state.step", 3), "not the step"),
    ("batches", array("state.step", np.float32(20)), "field 'state.step'"),
    ("batches", array("state.step", np.zeros(2, np.int32)), r"field 'state.step' is int32\[2\]"),
    ("batches", array("state.step", ...), "no field 'state.step'"),
    ("batches", array("state.code", 77), r"field 'state.code' is 77 \(int32\), not the code of a state"),
    ("batches", array("state.code", int(gdopt.Status.INTERRUPTED)), "field 'state.code'"),
    ("batches", array("state.kept.step", 1000), "field 'state.kept.step'"),
    ("batches", array("state.watch.stalled", -1), "field 'state.watch.stalled'"),
    ("batches", array("state.ending.flaw", 9), "field 'state.ending.flaw'"),
    ("batches", array("state.order", np.zeros(20, np.int32)), r"field 'state.order' is int32\[20\], not an order"),
    ("batches", array("history.loss", np.zeros(3, np.float32)), "field 'history.loss'"),
    ("batches", array("history.grad_norm", np.zeros((4, 4), np.float32)), "field 'history.grad_norm'"),
    ("batches", array("history.learning_rate", np.zeros(3, "S3").view(np.uint8)), "field 'history.learning_rate'"),
    ("batches", array("state.params", np.zeros(4, np.float32)), r"its state.params is float32\[4\], but here"),
    ("batches", array("state.params", np.zeros(3, np.float16)), r"its state.params is float16\[3\], but here"),
    ("batches", array("state.watch.idle", ...), "its state.watch.idle is nothing"),
    ("batches", array("state.more", np.zeros(1)), "its state.more is"),
    ("schedule", put("rates/steps", [0, 0]), "field 'rates.steps'"),
    ("schedule", put("rates/steps", "no"), "field 'rates.steps'"),
    ("schedule", put("rates/rates", [0.1]), "field 'rates.rates'"),
    ("schedule", put("rates/rates", ...), "no field 'rates.rates'"),
    ("schedule", put("rates/kind", 1), "field 'rates.kind'"),
    ("auto", put("range_test", 1), "field 'range_test'"),
    ("auto", put("range_test/losses", 1), "field 'range_test'"),
    ("auto", put("range_test/suggestion", 10**400), "field 'range_test.suggestion'"),
    ("schedule", put("rates/rates", [10**400]), "field 'rates.rates'"),
    ("batches", put("host", [1]), "field 'host'"),
    ("batches", array("state.code", int(gdopt.Status.TARGET_REACHED)), "not the code of a run without a target"),
    ("stream", put("stream/passes", 0), "field 'stream.steps'"),
    ("stream", array("stream", np.frombuffer('{"at": 1}'.encode("utf-16"), np.uint8)), "field 'stream'"),
    ("auto", put("range_test/status", 77), "field 'range_test.status'"),
    ("auto", put("range_test/status", True), "field 'range_test.status'"),
    ("auto", put("range_test/suggestion", math.nan), "field 'range_test.suggestion'"),
    ("auto", put("range_test/suggestion", -1.0), "field 'range_test.suggestion'"),
    ("auto", put("range_test/suggestion", "0.1"), "field 'range_test.suggestion'"),
    ("auto", put("range_test/suggestions", {"basin": []}), "field 'range_test.suggestions'"),
    ("auto", put("range_test/message", ...), "no field 'range_test.message'"),
    ("auto", array("range_test.loss", np.zeros(3)), "field 'range_test.loss'"),
    ("auto", array("range_test.losses", np.zeros(())), "field 'range_test.losses'"),
    ("auto", array("range_test.smoothed_loss", ...), "no field 'range_test.smoothed_loss'"),
    ("stream", put("stream", []), "field 'stream'"),
    ("stream", put("stream/number", 3), "field 'stream.number' is 3, not "),
    ("stream", put("stream/passes", -1), "field 'stream.passes'"),
    ("stream", put("stream/steps", 10**6), "field 'stream.steps'"),
    ("stream", put("stream/steps_per_epoch", 0), "field 'stream.steps_per_epoch'"),
    ("stream", put("stream/state", "pickle"), "field 'stream.state'"),
    ("stream", array("stream", np.frombuffer(b"{", np.uint8)), "field 'stream'"),
    ("stream", array("stream", ...), "no field 'stream'"),
    ("stream", put("batches", [1]), "field 'batches'"),
    ("stream", put("batches", {"one": "0"}), "field 'batches'"),
]


@pytest.mark.parametrize(("kind", "change", "why"), CHANGES)
def test_a_checkpoint_with_other_contents_is_skipped_and_named(
    kind: str, change: Callable, why: str, saves: Callable, tmp_path: Path
) -> None:
    """The one before is taken, and the run ends with the same bits. If all have the fault, it is an error."""
    folder, newest = saves(kind)
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "run"
    forge(path.parent, newest, change)
    with pytest.warns(UserWarning, match="resuming from the checkpoint .* skipped: .*" + why):
        result = run(kind, path)
    assert same(result, run(kind, None))
    for file in path.parent.glob("run.*.gdopt"):
        if file.name != f"run.{newest:012d}.gdopt":
            file.unlink()
    shutil.copy(folder / f"run.{newest:012d}.gdopt", path.parent)
    forge(path.parent, newest, change)
    with pytest.raises((gdopt.CheckpointError, gdopt.InputError), match=why) as error:
        run(kind, path)
    assert f"run.{newest:012d}.gdopt" in str(error.value)


def test_a_checkpoint_of_another_run_is_an_error_whatever_came_before(saves: Callable, tmp_path: Path) -> None:
    folder, newest = saves("batches")
    shutil.copytree(folder, tmp_path / "copy")
    forge(tmp_path / "copy", newest, put("given/args", "other"))
    with pytest.raises(gdopt.InputError, match=f"{newest:012d}.gdopt' is of another run: its args is other"):
        run("batches", tmp_path / "copy" / "run")


def same(a: gdopt.Result, b: gdopt.Result) -> bool:
    assert a.history is not None
    assert b.history is not None
    return np.array_equal(a.params, b.params) and a.history == b.history


# -------------------------------------------------------------------------------------------------------- any contents

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ARRAYS = st.builds(
    lambda shape, dtype, number: np.full(shape, number, np.float64).astype(dtype),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from(["float32", "int32", "float64", "int8", "uint8", "bool", "complex64"]),
    st.integers(-100, 100),
)


def places(tree: Any, way: tuple = ()) -> list[tuple]:
    """Return the paths of all entries of nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [(*way, key) for key, _ in items]
    return found + [place for key, inner in items for place in places(inner, (*way, key))]


def extreme(array: np.ndarray, which: int) -> np.ndarray:
    """Return an array of the same shape and dtype, full of a number that no run would save there."""
    if array.dtype.kind in "iu":
        limits = np.iinfo(array.dtype)
        return np.full_like(array, (limits.min, limits.max, 0, 1)[which])
    return np.full_like(array, (np.nan, np.inf, -np.inf, 1e30)[which])


# The numbers of an optimizer and of the params may be any, and nobody can tell that they were changed.
FREE = ("state.params", "state.optimizer", "state.kept", "state.watch", "state.ending", "history.")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_any_contents_raise_gdopts_errors_or_are_skipped(
    saves: Callable, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    folder, newest = saves(kind)
    copied = tmp_path_factory.mktemp("fuzz") / "copy"
    shutil.copytree(folder, copied)
    free = False

    def change(arrays: dict, meta: dict) -> None:
        nonlocal free
        for _ in range(data.draw(st.integers(1, 3))):
            if data.draw(st.booleans()):
                name = data.draw(st.sampled_from(sorted(arrays)))
                free = free or name.startswith(FREE)
                match data.draw(st.sampled_from(["none", "other", "extreme"])):
                    case "none":
                        arrays.pop(name)
                    case "other":
                        arrays[name] = data.draw(ARRAYS)
                    case _:
                        arrays[name] = extreme(arrays[name], data.draw(st.integers(0, 3)))
            elif found := places(meta):
                *way, last = data.draw(st.sampled_from(sorted(found, key=str)))
                inner: Any = meta
                for part in way:
                    inner = inner[part]
                if data.draw(st.booleans()):
                    inner[last] = copy.deepcopy(data.draw(JSON))
                else:
                    del inner[last]

    forge(copied, newest, change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(gdopt.CheckpointError, gdopt.InputError):
            result = run(kind, copied / "run")
            assert result.steps <= 400
            assert free or same(result, run(kind, None))
