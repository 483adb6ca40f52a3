"""Arrays of one process in an orbax directory: damage that orbax accepts silently is noticed.

test_processes.py tests what several processes do together.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import gdopt
from gdopt import Checkpoint, CheckpointError, GdoptError, InputError
from gdopt._checkpoint import sharded
from gdopt._checkpoint.file import SPREAD, read, write
from gdopt._checkpoint.folder import newest
from gdopt._checkpoint.saver import Saver

ARRAYS: dict[str, Any] = {
    "state.params['a/b']": jnp.arange(12.0).reshape(3, 4),
    "state.params['a']": jnp.arange(8, dtype=jnp.bfloat16),
    "state.key": jnp.arange(4, dtype=jnp.uint32).reshape(2, 2),
    "state.z": jnp.arange(3.0) * 1j,
    "state.flags": jnp.array([True, False]),
    "state.small": jnp.arange(6, dtype=jnp.float8_e4m3fn),
}
PLACES = {name: array.sharding for name, array in ARRAYS.items()}


def save(saver: Saver, base: Path, step: int, token: str = "0123abcd") -> None:
    directory = sharded.directory_name(str(base), step, token)

    def spread() -> dict[str, Any]:
        sharded.write(directory, sharded.copies(ARRAYS))
        return sharded.complete(directory, ARRAYS)

    assert saver.save(step, {"here": np.arange(3)}, {"step": step}, spread)
    saver.wait()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "run"


def names(base: Path) -> list[str]:
    return sorted(path.name.removeprefix("run.") for path in base.parent.iterdir())


def files(base: Path, step: int) -> list[Path]:
    return [path for path in base.parent.glob(f"run.{step:012d}.*.orbax/**/*") if path.is_file()]


def test_every_array_round_trips_bit_for_bit(base: Path) -> None:
    place = Checkpoint(base, every_seconds=0)
    with Saver(place) as saver:
        save(saver, base, 5)
    assert names(base) == ["000000000005.0123abcd.orbax", "000000000005.gdopt"]
    found = newest(place)
    assert found is not None
    assert found.arrays["here"].tolist() == [0, 1, 2]
    listing = found.meta[SPREAD]
    assert sharded.kinds(listing) == {name: (array.shape, array.dtype) for name, array in ARRAYS.items()}
    back = sharded.load(found.file, listing, PLACES)
    assert back.keys() == ARRAYS.keys()
    assert sharded.load(found.file, listing, {"state.z": PLACES["state.z"]}).keys() == {"state.z"}
    for name, array in ARRAYS.items():
        assert (back[name].dtype, back[name].sharding) == (array.dtype, array.sharding)
        assert np.asarray(back[name]).tobytes() == np.asarray(array).tobytes()


def test_every_byte_is_under_a_checksum(base: Path) -> None:
    """One bit of each file is flipped, or its end cut off, or the file removed. The save before it is taken."""
    place = Checkpoint(base, every_seconds=0)
    with Saver(place) as saver:
        save(saver, base, 5)
        save(saver, base, 6)
    assert len(files(base, 6)) > 5
    for file in files(base, 6):
        good = file.read_bytes()
        middle = len(good) // 2
        flipped = good[:middle] + bytes([good[middle] ^ 4]) + good[middle + 1 :]
        for bad, why in ((flipped, "is damaged"), (good[:-1], f"should have {len(good)}"), (None, "No such file")):
            file.unlink() if bad is None else file.write_bytes(bad)
            with pytest.warns(
                UserWarning, match=f"'{re.escape(file.name)}' in |{re.escape(file.name)}.*{why}"
            ) as caught:
                found = newest(place)
            assert why in str(caught[0].message)
            assert found is not None
            assert found.meta["step"] == 5
        file.write_bytes(good)
    found = newest(place)
    assert found is not None
    assert found.meta["step"] == 6


def test_directories_without_a_save_are_ignored_and_removed(base: Path) -> None:
    """A run leaves them if it is killed while it writes or removes, or replaces a save of the same step."""
    place = Checkpoint(base, every_seconds=0, keep=1)
    with Saver(place) as saver:
        save(saver, base, 5)
        save(saver, base, 6)
        assert names(base) == ["000000000006.0123abcd.orbax", "000000000006.gdopt", "gdopt.lock"]  # of two, one is kept
    for name in ("000000000006.00000000", "000000000007.0123abcd", "000000000004.0123abcd"):
        (base.parent / f"run.{name}.orbax" / "d").mkdir(parents=True)
        (base.parent / f"run.{name}.orbax" / "gdopt-checkpoint").touch()
    foreign = base.parent / "run.000000000009.0123abcd.orbax"
    foreign.mkdir()
    (foreign / "notes").write_text("kept")
    others = [base.parent / "run.x.0123abcd.orbax", base.parent / "run2.000000000007.0123abcd.orbax"]
    for other in others:
        other.mkdir()
    found = newest(place)
    assert found is not None
    assert found.meta["step"] == 6
    with Saver(place) as saver:
        saved = ["000000000006.0123abcd.orbax", "000000000006.gdopt"]
        assert names(base) == [
            *saved,
            "000000000009.0123abcd.orbax",
            "gdopt.lock",
            "run2.000000000007.0123abcd.orbax",
            "x.0123abcd.orbax",
        ]
        save(saver, base, 6, "ffff0000")  # the same step again
    assert names(base)[:2] == ["000000000006.ffff0000.orbax", "000000000006.gdopt"]
    assert (foreign / "notes").read_text() == "kept"
    (base.parent / "run.000000000006.gdopt").unlink()
    assert newest(place) is None


def test_a_save_that_fails_leaves_nothing_and_the_next_one_is_made(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full for orbax, or for the file after it."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = Checkpoint(base, every_seconds=0)
    with Saver(place) as saver:
        for at, (module, name) in enumerate(((sharded, "complete"), (os, "replace"))):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, full)
                save(saver, base, 2 * at)
            assert f"{2 * at:012d}.gdopt" not in names(base)
            with pytest.warns(UserWarning, match=rf"step {2 * at} was not saved: .*No space left"):
                save(saver, base, 2 * at + 1)
        assert names(base) == [f"{step:012d}.{ending}" for step in (1, 3) for ending in ("0123abcd.orbax", "gdopt")] + [
            "gdopt.lock"
        ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"directory": "../run.000000000005.0123abcd.orbax"}, "is not its directory"),
        ({"directory": "run.000000000006.0123abcd.orbax"}, "is not its directory"),
        ({"directory": 3}, "is not its directory"),
        ({"files": {"../run.gdopt.lock": [0, 0]}}, "'../run.gdopt.lock', which is not in"),
        ({"files": {"/etc/passwd": [0, 0]}}, "'/etc/passwd', which is not in"),
        ({"files": {"pipe": [0, 0]}}, "'pipe' is not a regular file"),
        ({"files": {"x": 0}}, "not that of a checkpoint"),
        ({"files": None}, "not that of a checkpoint"),
        ({"arrays": {"x": [[2], "no such dtype"]}}, "not that of a checkpoint"),
        ({"arrays": {"x": 3}}, "not that of a checkpoint"),
    ],
    ids=range(10),
)
def test_forged_listings_are_refused(base: Path, change: dict[str, Any], why: str) -> None:
    directory = sharded.directory_name(str(base), 5, "0123abcd")
    os.mkdir(directory)
    os.mkfifo(os.path.join(directory, "pipe"))
    listing = {"directory": os.path.basename(directory), "files": {}, "arrays": {}} | change
    write(f"{base}.000000000005.gdopt", {}, {SPREAD: listing})
    with pytest.raises(CheckpointError, match=re.escape(why)):
        newest(Checkpoint(base))


def test_without_orbax_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    sharded.check_installed({"w": jnp.ones(3)})  # is not needed
    monkeypatch.setattr(sharded, "is_spread", lambda leaf: True)
    with pytest.raises(GdoptError, match=re.escape('pip install "gdopt[checkpoint]"')):
        sharded.check_installed({"w": jnp.ones(3)})


def apart(file: Path, dtype: Any = None) -> None:
    """Put the params of a save into a directory beside it, as several processes would."""
    arrays, meta = read(str(file))
    spread = {name: jnp.asarray(arrays.pop(name), dtype) for name in sorted(arrays) if "params" in name}
    assert spread
    directory = str(file).replace(".gdopt", ".0123abcd.orbax")
    sharded.write(directory, spread)
    write(str(file), arrays, {**meta, SPREAD: sharded.complete(directory, spread)})


@pytest.mark.filterwarnings("ignore:this call differs from the run saved in .*max_steps=")
def test_one_process_resumes_what_several_saved(base: Path) -> None:
    """If the dtype is another one, to which orbax would convert it, the run counts as another one."""
    fit = lambda steps, place: gdopt.minimize(
        lambda w, x: jnp.mean((x @ w["w"] - 1) ** 2),
        {"w": jnp.zeros(3)},
        data=np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32),
        batch_size=8,
        learning_rate=0.1,
        max_steps=steps,
        checkpoint=place,
    )
    fit(10, base)
    file = base.parent / "run.000000000010.gdopt"
    apart(file)
    more, whole = fit(25, base), fit(25, None)
    assert np.asarray(more.params["w"]).tobytes() == np.asarray(whole.params["w"]).tobytes()
    assert more.history.loss.tobytes() == whole.history.loss.tobytes()

    other = base.with_name("other")
    fit(10, other)
    apart(base.parent / "other.000000000010.gdopt", jnp.float16)
    with pytest.raises(InputError, match=r"params\['w'\] is float16\[3\], but here it is float32\[3\]"):
        fit(25, other)
