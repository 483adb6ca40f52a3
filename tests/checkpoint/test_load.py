"""`load`: the params of a checkpoint."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdopt
from gdopt._checkpoint import folder

ROWS = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
OLD = Path(__file__).parent / "saves_0_1"


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch @ params["w"] + params["b"] - 1) ** 2)


def start() -> dict[str, Any]:
    return {"w": jnp.zeros(3), "b": jnp.zeros(()), "name": "line"}


def full(params: Any) -> jax.Array:
    return jnp.sum((params["w"] - jnp.arange(3.0)) ** 2) + params["b"] ** 2


BATCHES: dict[str, Any] = {"data": ROWS, "batch_size": 8, "epochs": 3}


@pytest.mark.parametrize(
    "options",
    [
        BATCHES,
        {**BATCHES, "validation": ROWS[:20], "optimizer": optax.sgd(0.3, momentum=0.9)},
        {**BATCHES, "keep_best": False},
        {**BATCHES, "trainable": {"w": True, "b": False, "name": False}},
        {"loss": full},
        {"loss": full, "scale": {"w": 8.0, "b": 0.5, "name": 1.0}},
    ],
    ids=["batches", "validated", "no best", "frozen", "full batch", "scaled"],
)
def test_it_returns_what_the_call_returned(options: dict[str, Any], tmp_path: Path) -> None:
    result = gdopt.minimize(options.pop("loss", loss), start(), checkpoint=tmp_path / "run", **options)
    before = sorted(tmp_path.iterdir())
    loaded = gdopt.load(tmp_path / "run", like=start())
    assert loaded["name"] == "line"
    for name in ("w", "b"):
        np.testing.assert_array_equal(loaded[name], result.params[name])
        assert isinstance(loaded[name], jax.Array)
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_may_be_read_while_it_goes_on(tmp_path: Path) -> None:
    path, seen = gdopt.Checkpoint(tmp_path / "run", every_seconds=0), []

    def look(report: gdopt.Report) -> None:
        if report.step > 8:
            seen.append(gdopt.load(path, like=start()))

    result = gdopt.minimize(loss, start(), checkpoint=path, callback=look, callback_every=4, **BATCHES)
    assert result.success
    assert seen
    assert all(np.isfinite(params["w"]).all() for params in seen)


@pytest.mark.parametrize("kind", ["adam", "gd", "spectral", "stream", "schedule", "auto"])
def test_saves_of_0_1_load(kind: str) -> None:
    (file,) = OLD.glob(f"{kind}.*.gdopt")
    path = file.with_name(kind)
    with pytest.raises(gdopt.InputError, match=r"like has no leaf params.*, but the checkpoint"):
        gdopt.load(path, like={"no such name": jnp.zeros(1)})


def test_a_wrong_like_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run"
    gdopt.minimize(loss, start(), checkpoint=path, **BATCHES)
    for like, says in (
        ({"w": jnp.zeros(3)}, r"like has no leaf params\['b'\], but the checkpoint"),
        ({**start(), "w": jnp.zeros(4)}, r"like\['w'\] is float32\[4\], but in the checkpoint .* it is float32\[3\]"),
        ({**start(), "b": jnp.zeros((), jnp.bfloat16)}, r"like\['b'\] is bfloat16\[\], but in .* it is float32\[\]"),
        ({**start(), "c": 1.0}, r"like\['c'\] is not in the checkpoint"),
    ):
        with pytest.raises(gdopt.InputError, match=says):
            gdopt.load(path, like=like)


def test_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(gdopt.CheckpointError, match="has no checkpoint"):
        gdopt.load(tmp_path / "run", like=start())
    with pytest.raises(gdopt.InputError, match="which does not exist"):
        gdopt.load(tmp_path / "there" / "run", like=start())


def test_an_average_is_refused(tmp_path: Path) -> None:
    averaging = optax.contrib.schedule_free_sgd(0.1)
    gdopt.minimize(loss, start(), checkpoint=tmp_path / "run", optimizer=averaging, **BATCHES)
    with pytest.raises(gdopt.InputError, match="returns an average of the params"):
        gdopt.load(tmp_path / "run", like=start())


def test_a_save_that_is_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with ``keep=1`` may remove the listed file, and put a newer one in its place, before it is read."""
    path = tmp_path / "run"
    gdopt.minimize(full, start(), max_steps=2, checkpoint=gdopt.Checkpoint(path, keep=1))
    (file,) = tmp_path.glob("run.*.gdopt")
    old = file.rename(tmp_path / "old")
    gdopt.minimize(full, start(), max_steps=3, checkpoint=gdopt.Checkpoint(path, keep=1))
    (newer,) = tmp_path.glob("run.*.gdopt")
    new = newer.rename(tmp_path / "new")
    old.rename(file)
    read, reads = folder.read, []

    def replaced(name: str) -> Any:
        reads.append(name)
        if len(reads) == 1:
            file.unlink()
            new.rename(newer)
        return read(name)

    monkeypatch.setattr(folder, "read", replaced)
    assert gdopt.load(path, like=start())["name"] == "line"
    assert reads == [str(file), str(newer)]
    newer.unlink()
    with pytest.raises(gdopt.CheckpointError, match="no checkpoint"):
        gdopt.load(path, like=start())
