"""The saver of checkpoints, its lock and its folder, whatever happens to writers and disks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved import ARRAYS, META, NAME, same

import gdopt
from gdopt import Checkpoint, CheckpointError, InputError
from gdopt._checkpoint import lock
from gdopt._checkpoint.file import read, write
from gdopt._checkpoint.folder import newest
from gdopt._checkpoint.saver import Saver

# ------------------------------------------------------------------------------------------------------- the newest one


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)


def test_the_newest_good_file_is_taken_and_skipped_ones_are_named(tmp_path: Path):
    place = Checkpoint(tmp_path / "run")
    assert newest(place) is None
    for step in (9, 80, 700):
        write(str(tmp_path / NAME.format(step)), ARRAYS, {"step": step})
    found = newest(place)
    assert found is not None
    assert (found.file, found.meta) == (str(tmp_path / NAME.format(700)), {"step": 700})
    assert same(found.arrays, ARRAYS)

    damage(tmp_path / NAME.format(700))
    whole = (tmp_path / NAME.format(80)).read_bytes()
    os.truncate(tmp_path / NAME.format(80), 100)
    with pytest.warns(UserWarning, match="skipped") as caught:
        found = newest(place)
    assert found is not None
    assert found.meta == {"step": 9}
    (warning,) = caught
    assert warning.filename == __file__
    first, second = str(tmp_path / NAME.format(700)), str(tmp_path / NAME.format(80))
    assert str(warning.message) == (
        f"resuming from the checkpoint {found.file!r}, because newer ones were skipped: {first!r} cannot be read: it "
        f"is damaged in the array 'z'. {second!r} cannot be read: it has 100 bytes and should have {len(whole)}."
    )

    damage(tmp_path / NAME.format(9))
    with pytest.raises(CheckpointError, match=r"none of the checkpoints at path=.*Move them away"):
        newest(place)


def test_files_with_other_names_are_ignored(tmp_path: Path):
    """None of them is removed, and a path may contain the wildcards of a pattern."""
    place = Checkpoint(str(tmp_path / "run[1]*.x"), every_seconds=0, keep=1)
    save = "run[1]*.x.000000000001.gdopt"
    others = ["run1y.x.000000000002.gdopt", "run[1]*.x.2.gdopt", "run[1]*.x.000000000002", "run[1]*.x", f"{save}.tmp"]
    others += [f"{save}.bak", f"{save}.notours1.tmp", "run[1]*.x.\u0661" + "0" * 11 + ".gdopt", f"a{save}"]
    for name in others:
        (tmp_path / name).touch()
    assert newest(place) is None
    with Saver(place) as saver:
        saver.close((1, ARRAYS, META))
    assert {path.name for path in tmp_path.iterdir()} == {save, *others}
    found = newest(place)
    assert found is not None
    assert found.file == str(tmp_path / save)


# ------------------------------------------------------------------------------------------------------- the arguments


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"path": 3}, "path=3 is not a path: pass a str or a pathlib.Path"),
        ({"path": b"run"}, "path=b'run' is not a path"),
        ({"path": "a\0b"}, "is not a path"),
        ({"path": ""}, "path='' names a directory. Pass a file name (for example 'run')"),
        ({"path": "."}, "Pass a file name (for example './run')"),
        ({"path": "missing/run"}, "is in 'missing', which does not exist. Make that directory first"),
        ({"path": "file/run"}, "is in 'file', which is not a directory"),
        ({"path": "directory"}, "names a directory. Pass a file name (for example 'directory/run')"),
        ({"path": "run.000000000012.gdopt"}, "is a single checkpoint, not the path of all. Pass 'run'"),
        ({"path": "run", "every_seconds": -1}, "every_seconds=-1 is not a finite number, 0 or above"),
        ({"path": "run", "every_seconds": "often"}, "every_seconds='often' is not"),
        ({"path": "run", "keep": 0}, "keep=0 is not a whole number from 1"),
        ({"path": "run", "keep": 1.5}, "keep=1.5 is not"),
    ],
    ids=range(13),
)
def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], why: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=re.escape(why)):
        Checkpoint(**arguments)


def test_arguments_become_python_types(tmp_path: Path):
    of_numpy: Any = np.float32(2), np.int64(4)
    place = Checkpoint(tmp_path / "run", *of_numpy)
    assert place == Checkpoint(str(tmp_path / "run"), 2.0, 4)
    assert [type(value) for value in (place.path, place.every_seconds, place.keep)] == [str, float, int]
    assert gdopt.Checkpoint("run").every_seconds == 60


def test_a_directory_that_was_removed(tmp_path: Path):
    (tmp_path / "directory").mkdir()
    place = Checkpoint(tmp_path / "directory" / "run")
    (tmp_path / "directory").rmdir()
    with pytest.raises(InputError, match="does not exist"):
        Saver(place).__enter__()


def test_a_path_that_the_disk_refuses(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"has a name that is too long for its files. Pass a name of at most \d+ bytes"
    ):
        Saver(Checkpoint(tmp_path / ("x" * 255))).__enter__()


PLACES = """
import os, sys
import gdopt

for path in (sys.argv[1], os.path.join(os.path.dirname(sys.argv[1]), "\\u00e4")):
    try:
        result = gdopt.minimize(lambda x: x**2, 1.0, learning_rate=0.01, max_steps=3, checkpoint=path)
        print(result.status.name)
    except gdopt.InputError as error:
        print(error)
"""


def test_a_path_that_is_not_ascii_where_file_names_are(tmp_path: Path):
    """A path from the system can be used as it is, but a text has no encoding there."""
    directory = tmp_path / "\u00e9"
    directory.mkdir()
    setting = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", PLACES, str(directory / "run")],
        env={**os.environ, **setting},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert first == "MAX_STEPS"
    assert [file.name for file in directory.iterdir()] == ["run.000000000003.gdopt"]
    assert "has characters that file names cannot have here, where they are encoded in ascii" in second


# ----------------------------------------------------------------------------------------------------------- the saver


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "run"


def steps(base: Path) -> list[int]:
    """Return the steps of the saves, and check that there are no other files."""
    names = sorted(path.name for path in base.parent.iterdir())
    assert all(re.fullmatch(r"run\.\d{12}\.gdopt|run\.gdopt\.lock", name) for name in names), names
    return [int(name.split(".")[1]) for name in names if name != "run.gdopt.lock"]


def settle(saver: Saver) -> None:
    """Wait until nothing is being written."""
    while saver._busy():
        time.sleep(0.001)


def test_saves_and_keeps_the_newest(base: Path):
    descriptors = lambda: sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else []
    threads, opened = threading.enumerate(), descriptors()
    with Saver(Checkpoint(base, every_seconds=0, keep=2)) as saver:
        for step in range(1, 6):
            assert saver.due()
            assert saver.save(step, ARRAYS, {"step": step})
            settle(saver)
            assert steps(base) == list(range(max(1, step - 1), step + 1))
        assert saver.save(6, ARRAYS, META)
        saver.close((7, ARRAYS, META))
        assert steps(base) == [6, 7]
        saver.close()
        assert not saver.save(8, ARRAYS, META)
    assert {path.name for path in base.parent.iterdir()} == {NAME.format(6), NAME.format(7)}
    assert threading.enumerate() == threads
    assert descriptors() == opened


def test_saves_are_due_by_the_clock(base: Path, monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Saver(Checkpoint(base, every_seconds=60)) as saver:
        assert not saver.due()
        now[0] += 60
        assert saver.due()
        assert saver.save(1, ARRAYS, META)
        saver.wait()
        assert not saver.due()
        now[0] += 59
        assert not saver.due()
        now[0] += 1
        assert saver.due()


@contextlib.contextmanager
def held(monkeypatch: pytest.MonkeyPatch, saver: Saver) -> Generator[None]:
    """Block the disk until the block ends."""
    passes = threading.Event()
    usual = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: passes.wait(20) and usual(descriptor))
    yield
    passes.set()
    settle(saver)


def test_the_caller_does_not_wait_for_the_disk_and_one_save_is_pending(base: Path, monkeypatch: pytest.MonkeyPatch):
    with Saver(Checkpoint(base, every_seconds=0)) as saver:
        with held(monkeypatch, saver):
            assert saver.save(1, ARRAYS, META)
            assert not saver.due()
            assert not saver.save(2, ARRAYS, META)
            assert not list(base.parent.glob("*.gdopt"))
        assert saver.due()
        assert steps(base) == [1]


def test_the_caller_may_change_the_arrays_at_once(base: Path, monkeypatch: pytest.MonkeyPatch):
    twice = jax.jit(lambda x: 2 * x, donate_argnums=0)
    device, host, meta = twice(jnp.arange(3.0)), np.arange(3), {"list": [1]}
    usual, go = np.asarray, threading.Event()

    def late(*args: Any, **options: Any) -> np.ndarray:
        if threading.current_thread() is not threading.main_thread():
            assert go.wait(20)
        return usual(*args, **options)

    with Saver(Checkpoint(base, every_seconds=0)) as saver:
        monkeypatch.setattr(np, "asarray", late)
        assert saver.save(1, {"device": device, "host": host, "half": jnp.ones(2, jnp.bfloat16)}, meta)
        device = twice(device)
        host += 10
        meta["list"].append(2)
        go.set()
        settle(saver)
        monkeypatch.undo()
    arrays, meta = read(f"{base}.{1:012d}.gdopt")
    assert arrays["device"].tolist() == [0, 2, 4]
    assert arrays["host"].tolist() == [0, 1, 2]
    assert arrays["half"].dtype == jnp.bfloat16
    assert meta == {"list": [1]}


def test_later_copies_reuse_the_memory_of_earlier_ones(base: Path):
    twice = jax.jit(lambda x: 2 * x, donate_argnums=0)
    device, kept = twice(jnp.arange(3.0)), []
    with Saver(Checkpoint(base, every_seconds=0, keep=9)) as saver:
        for step in (1, 2, 3):
            history = np.arange(step)  # grows
            assert saver.save(step, {"device": device, "history": history, "empty": np.zeros((0, 2))}, {})
            place = device.unsafe_buffer_pointer()
            device = twice(device)
            assert device.unsafe_buffer_pointer() == place  # no view is left behind that would forbid the donation
            settle(saver)
            kept.append(saver._host["device"])
        assert kept[0] is kept[1] is kept[2]
    for step in (1, 2, 3):
        arrays, _ = read(f"{base}.{step:012d}.gdopt")
        assert arrays["device"].tolist() == [0, 2**step, 2 * 2**step]
        assert arrays["history"].tolist() == list(range(step))


def test_a_full_disk_is_a_warning_for_each_save(base: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Saver(Checkpoint(base, every_seconds=0, keep=1)) as saver:
        assert saver.save(1, ARRAYS, META)
        settle(saver)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            for step, call in ((2, saver.due), (3, lambda: saver.save(4, ARRAYS, META))):
                assert saver.save(step, ARRAYS, META)
                settle(saver)
                assert steps(base) == [1]
                with pytest.warns(UserWarning, match=f"step {step} was not saved: OSError: .*No space left") as caught:
                    call()
                assert [warning.filename for warning in caught] == [__file__]
            settle(saver)
            with pytest.warns(UserWarning, match=r"step 4 was not saved.*Older ones are kept"):
                saver.due()
        assert saver.due()
        assert saver.save(5, ARRAYS, META)
        settle(saver)
        assert steps(base) == [5]


def test_a_failed_last_save_releases_the_lock(base: Path, monkeypatch: pytest.MonkeyPatch):
    """This also holds if warnings are errors."""
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    saver = Saver(Checkpoint(base)).__enter__()
    with pytest.raises(UserWarning, match="step 3 was not saved: ZeroDivisionError"):
        saver.close((3, ARRAYS, META))
    assert not list(base.parent.iterdir())


def test_a_save_that_cannot_begin_or_be_written_is_a_warning(base: Path, monkeypatch: pytest.MonkeyPatch):
    gone = jnp.ones(3)
    gone.delete()
    with Saver(Checkpoint(base, every_seconds=0)) as saver:
        assert not saver.save(1, {"gone": gone}, META)
        with pytest.warns(UserWarning, match="step 1 was not saved: RuntimeError: .*deleted"):
            assert saver.save(2, {"odd": np.array(["text"])}, META)
        settle(saver)
        with pytest.warns(UserWarning, match="step 2 was not saved: CheckpointError: .*'odd'"):
            assert saver.save(3, {}, {"odd": {1j}})
        settle(saver)
        with pytest.warns(UserWarning, match="step 3 was not saved: TypeError"):
            saver.due()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", lambda self: np.empty(2**62, np.int8))
            assert not saver.save(4, ARRAYS, META)
        with pytest.warns(UserWarning, match="step 4 was not saved: .*MemoryError"):
            assert saver.due()
    assert steps(base) == []


def test_a_damaged_later_save_displaces_no_good_one(base: Path):
    for step in (10, 20, 30):
        write(f"{base}.{step:012d}.gdopt", ARRAYS, {"step": step})
    damage(Path(f"{base}.{30:012d}.gdopt"))
    place = Checkpoint(base, every_seconds=0, keep=1)
    with Saver(place) as saver:
        saver.close((25, ARRAYS, {"step": 25}))
    assert steps(base) == [25, 30]
    with pytest.warns(UserWarning, match="skipped"):
        found = newest(place)
    assert found is not None
    assert found.meta == {"step": 25}
    with Saver(place) as saver:
        saver.close((31, ARRAYS, META))
    assert steps(base) == [31]


def test_files_of_others_with_a_name_of_gdopts_stay(base: Path):
    """None is removed as old or as left behind, or replaced, or overwritten through a link."""
    foreign = [
        Path(f"{base}.{1:012d}.gdopt"),
        Path(f"{base}.{3:012d}.gdopt"),
        Path(f"{base}.{2:012d}.gdopt.0123abcd.tmp"),
    ]
    for path in foreign:
        path.write_text("kept")
    target = base.with_name("target")
    write(str(target), ARRAYS, META)
    link = Path(f"{base}.{2:012d}.gdopt")
    link.symlink_to(target)
    before = target.read_bytes()
    with Saver(Checkpoint(base, every_seconds=0, keep=1)) as saver:
        for step in (2, 3):
            saver.save(step, ARRAYS, META)
            saver.wait()
            with pytest.warns(UserWarning, match=rf"step {step} was not saved: .*is in its place.*Move it away"):
                saver.due()
        saver.close((4, ARRAYS, META))
    assert Path(f"{base}.{4:012d}.gdopt").exists()
    assert all(path.read_text() == "kept" for path in foreign)
    assert link.is_symlink()
    assert target.read_bytes() == before


def test_a_change_of_directory_changes_nothing(base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(base.parent)
    with Saver(Checkpoint("run")) as saver:
        os.chdir("/")
        saver.close((1, ARRAYS, META))
    assert steps(base) == [1]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_directories_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    usual, calls = os.fsync, []

    def second(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(code, "no")
        usual(descriptor)

    monkeypatch.setattr(os, "fsync", second)
    with pytest.raises(OSError, match="no") if code == errno.EIO else contextlib.nullcontext():
        write(str(tmp_path / "file"), ARRAYS, META)
    assert len(calls) == 2
    assert same(read(str(tmp_path / "file"))[0], ARRAYS)


# ------------------------------------------------------------------------------------------------------------ the lock


def test_only_one_run_may_use_a_path(base: Path):
    place = Checkpoint(base)
    with Saver(place), Saver(Checkpoint(f"{base}2")):
        with pytest.raises(InputError, match=rf"in use by a live run \(process {os.getpid()} on .*Wait for its end"):
            Saver(place).__enter__()
        with pytest.raises(InputError, match="in use"):
            Saver(Checkpoint(base.parent / "." / "run")).__enter__()
    with Saver(place):
        pass
    assert not list(base.parent.iterdir())


def test_a_lock_that_is_removed_while_another_run_opens_it(base: Path, monkeypatch: pytest.MonkeyPatch):
    """Between opening and locking, the first run ends and removes its file, and a third one makes a new one."""
    pytest.importorskip("fcntl")
    place, usual = Checkpoint(base), lock._flock
    first, third = Saver(place).__enter__(), Saver(place)

    def late(descriptor: int) -> None:
        monkeypatch.setattr(lock, "_flock", usual)
        first.close()
        third.__enter__()
        usual(descriptor)

    monkeypatch.setattr(lock, "_flock", late)
    with pytest.raises(InputError, match="in use"):
        Saver(place).__enter__()
    third.close()
    assert not list(base.parent.iterdir())


@pytest.mark.parametrize("kind", ["no fcntl", "no locks"])
def test_saving_works_without_file_locks(base: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    def refuses(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    if kind == "no fcntl":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuses)
    with Saver(Checkpoint(base)) as saver:
        saver.close((1, ARRAYS, META))
    assert steps(base) == [1]


def test_a_lock_of_another_tool_stays(base: Path):
    """A package manager's ``uv.lock`` beside the path ``uv`` is not gdopt's lock."""
    other = base.with_name(f"{base.name}.lock")
    other.write_text("version = 1")
    with Saver(Checkpoint(base)) as saver:
        saver.close((1, ARRAYS, META))
    assert other.read_text() == "version = 1"


@pytest.mark.parametrize("kind", ["file", "link", "second name", "dangling link", "directory", "pipe"])
def test_whatever_stands_in_the_place_of_the_lock_stays(base: Path, kind: str):
    place, other = base.with_name(f"{base.name}.gdopt.lock"), base.with_name("other")
    match kind:
        case "file":
            place.write_text("kept")
        case "link":
            other.write_text("kept")
            place.symlink_to(other)
        case "second name":
            other.touch()
            place.hardlink_to(other)
        case "dangling link":
            place.symlink_to(other)
        case "directory":
            place.mkdir()
        case _:
            os.mkfifo(place)
    before = [(path.name, path.lstat().st_mode) for path in sorted(base.parent.iterdir())]
    with pytest.raises(InputError, match=r"lock' (cannot be written|is not a lock of gdopt)"):
        Saver(Checkpoint(base)).__enter__()
    assert [(path.name, path.lstat().st_mode) for path in sorted(base.parent.iterdir())] == before
    assert all(path.read_text() in ("", "kept") for path in base.parent.iterdir() if path.is_file())


def test_a_file_that_took_the_place_of_the_lock_stays(base: Path):
    place = base.with_name(f"{base.name}.gdopt.lock")
    with Saver(Checkpoint(base)):
        place.unlink()
        place.write_text("kept")
    assert place.read_text() == "kept"


@pytest.mark.parametrize("text", ["", "gdopt lock of process 1 on a machine that was switched off"])
def test_a_lock_that_was_left_behind_is_taken(base: Path, text: str):
    base.with_name(f"{base.name}.gdopt.lock").write_text(text)
    with Saver(Checkpoint(base)):
        pass
    assert not list(base.parent.iterdir())


# ----------------------------------------------------------------------------------------------------- real processes

NURSERY = """
import json, os, signal, sys, time, warnings
import numpy as np
from gdopt import Checkpoint, InputError
from gdopt._checkpoint import file, lock, saver
from gdopt._checkpoint.saver import Saver
from gdopt._checkpoint.folder import newest

for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            print(os.getpid(), flush=True)
            exec(json.loads(line))
        except Exception as error:
            print(type(error).__name__, error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


class Nursery:
    """Processes that need no imports: forks, one at a time, of a process that did them."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-c", NURSERY]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, program: str) -> int:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(program) + "\n")
        self.process.stdin.flush()
        return int(self.line())

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().rstrip()

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        while self.line() != "ended":
            pass

    def run(self, program: str) -> list[str]:
        """Return what the program prints."""
        self.start(program)
        return list(iter(self.line, "ended"))


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    nursery = Nursery()
    yield nursery
    nursery.process.communicate(timeout=20)


SAVES = """
place = Checkpoint({path!r}, every_seconds=0, keep=2)
with Saver(place) as saver:
    found = newest(place)
    step = found.meta["step"] if found else 0
    while True:
        if saver.due():
            step += 1
            saver.save(step, {{"a": np.full(10**5, step), "b": np.full((3, 10**4), float(step))}}, {{"step": step}})
            print("saved", flush=True)
        time.sleep(1e-4)
"""


def test_killed_during_saves(base: Path, nursery: Nursery):
    place, last, draw = Checkpoint(base), 0, random.Random(0)
    for _ in range(12):
        pid = nursery.start(SAVES.format(path=str(base)))
        for _ in range(draw.randrange(2, 5)):  # the second begins when the first is on the disk
            assert nursery.line() == "saved"
        time.sleep(draw.random() * 5e-3)
        nursery.kill(pid)
        with warnings.catch_warnings(action="error"):
            found = newest(place)
        assert found is not None
        step = found.meta["step"]
        assert step > last
        assert [(array == step).all() for array in found.arrays.values()] == [True, True]
        last = step
    with Saver(place):
        pass
    assert len(steps(base)) in (2, 3)  # it may have come to the new one and not to the removal


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace", "os.unlink"])
def test_killed_at_a_system_call(base: Path, nursery: Nursery, moment: str):
    write(f"{base}.{1:012d}.gdopt", ARRAYS, {"step": 1})
    pid = nursery.start(
        f"""
def stop(*_):
    print("there", flush=True)
    time.sleep(60)
saver = Saver(Checkpoint({str(base)!r}, keep=1)).__enter__()
{moment} = stop
saver.save(2, {{"x": np.ones(3)}}, {{"step": 2}})
time.sleep(60)
"""
    )
    assert nursery.line() == "there"
    nursery.kill(pid)
    left = list(base.parent.glob("*.tmp"))
    assert len(left) == (moment != "os.unlink")
    found = newest(Checkpoint(base))
    assert found is not None
    assert found.meta == {"step": 2 if moment == "os.unlink" else 1}
    with Saver(Checkpoint(base)):
        assert not list(base.parent.glob("*.tmp"))


def test_the_lock_ends_with_its_process(base: Path, nursery: Nursery):
    """This holds however the process ends, and whoever is forked from it."""
    pid = nursery.start(
        f"""
with Saver(Checkpoint({str(base)!r})) as saver:
    child = os.fork()
    if not child:
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""
    )
    child = int(nursery.line())
    try:
        with pytest.raises(InputError, match=rf"in use by a live run \(process {pid} on "):
            Saver(Checkpoint(base)).__enter__()
        nursery.kill(pid)
        assert Path(f"{base}.gdopt.lock").exists()
        with Saver(Checkpoint(base)):
            pass
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
    assert not list(base.parent.iterdir())


def test_a_file_that_cannot_grow(base: Path, nursery: Nursery):
    """The disk refuses in the middle of a file."""
    pytest.importorskip("resource")
    printed = nursery.run(
        f"""
import resource
place = Checkpoint({str(base)!r}, every_seconds=0)
with Saver(place) as saver, warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for step, size in ((1, 10), (2, 10**6), (3, 10)):
        if step == 2:
            usual = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, usual[1]))
        assert saver.save(step, {{"x": np.zeros(size)}}, {{"step": step}})
        while not saver.due():
            pass
        print(newest(place).meta["step"], sorted(name.split(".", 1)[1] for name in os.listdir({str(base.parent)!r})))
    print(*(warning.message for warning in caught), flush=True)
"""
    )
    saves = [NAME.format(step).split(".", 1)[1] for step in (1, 2, 3)]
    assert printed[:3] == [
        f"1 {[saves[0], 'gdopt.lock']}",
        f"1 {[saves[0], 'gdopt.lock']}",
        f"3 {[*saves[::2], 'gdopt.lock']}",
    ]
    assert re.fullmatch(r"the checkpoint of step 2 was not saved: OSError: .*File too large\. Older.*", printed[3])


def test_a_directory_without_write_permission(nursery: Nursery):
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o555)
        path = os.path.join(directory, "run")
        (printed,) = nursery.run(f"os.getuid() or os.setuid(65534)\nCheckpoint({path!r})")
    assert printed.startswith(f"InputError checkpoint path={path!r} is in {directory!r}, where this process may not")


def test_a_lock_of_another_user_is_an_error(base: Path, monkeypatch: pytest.MonkeyPatch):
    usual: Callable[..., int] = os.open

    def denied(path: str, *args: Any, **options: Any) -> int:
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return usual(path, *args, **options)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(InputError, match=r"run.gdopt.lock' cannot be written, Permission denied\. Pass another"):
        Saver(Checkpoint(base)).__enter__()


if __name__ == "__main__":
    pytest.main([__file__])
