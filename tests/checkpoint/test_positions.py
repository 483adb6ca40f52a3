"""A stream with positions resumes there: earlier batches are not read again, and the result is bit-for-bit the same."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdopt
from gdopt import Status
from gdopt._checkpoint import file as checkpoint_file

# Most of these runs resume with other limits than before, which is a warning of its own test.
pytestmark = pytest.mark.filterwarnings(
    "ignore:this call differs from the run saved in .*(max_steps|epochs|tol|target)="
)

ROWS = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
SIZE, PER_EPOCH, EPOCHS = 8, 5, 4


def loss(w, rows):
    return jnp.mean((rows @ w - 1) ** 2)


def minimize(data, path=None, **options):
    options = {"learning_rate": 0.05, "epochs": EPOCHS, **options}
    return gdopt.minimize(loss, jnp.zeros(3), data=data, checkpoint=path, **options)


def check_same(resumed, whole) -> None:
    kept = lambda result: (result.params, result.loss, result.grad_norm, tuple(result.history))
    jax.tree.map(np.testing.assert_array_equal, kept(resumed), kept(whole))
    assert (resumed.status, resumed.success, resumed.steps) == (whole.status, whole.success, whole.steps)
    assert resumed.steps_per_epoch == whole.steps_per_epoch
    told = resumed.message.split(" It resumed from")
    assert (told[0], len(told)) == (whole.message, 2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------------------- streams


class Source:
    """Rows that record which of them were read."""

    def __init__(self):
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, row) -> np.ndarray:
        self.asked.append(int(row))
        return ROWS[row]

    def __repr__(self) -> str:
        return "the rows"  # by which grain tells sources apart


def grain_loader(source: Any = None, shuffle: bool = False, seed: int = 0) -> Any:
    grain = pytest.importorskip("grain")
    rows = Source() if source is None else source
    return grain.DataLoader(
        data_source=rows,
        sampler=grain.samplers.IndexSampler(len(rows), grain.sharding.NoSharding(), shuffle, num_epochs=1, seed=seed),
        operations=[grain.transforms.Batch(SIZE)],
        read_options=grain.ReadOptions(num_threads=0, prefetch_buffer_size=1),  # so that none is read ahead
    )


def grain_dataset() -> Callable:
    grain = pytest.importorskip("grain")
    seeds = itertools.count()  # another order in each epoch, which is told by how often the function was called
    return lambda: grain.MapDataset.source(Source()).shuffle(seed=next(seeds)).batch(SIZE).to_iter_dataset()


class ByHand:
    """An iterable whose iterators have positions: dicts that they change later, or what ``shown`` makes of these."""

    def __init__(self, shown: Callable = lambda state: state, batches: int = PER_EPOCH):
        self.shown, self.batches = shown, batches
        self.pulled: list[int] = []
        self.shows = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        return _ByHand(self)


class _ByHand:
    def __init__(self, loader: ByHand):
        self.loader, self.state = loader, {"next": 0}

    def __iter__(self):
        return self

    def __next__(self) -> np.ndarray:
        k = self.state["next"]
        if k == self.loader.batches:
            raise StopIteration
        self.loader.pulled.append(k)
        self.state["next"] += 1
        return ROWS[k * SIZE : (k + 1) * SIZE]

    def get_state(self) -> Any:
        self.loader.shows += 1
        return self.loader.shown(self.state)

    def set_state(self, state: Any) -> None:
        self.state = {"next": int(state["next"] if isinstance(state, dict) else state)}


def in_bytes(state: dict) -> bytes:
    return str(state["next"]).encode()


STREAMS = {
    "a grain loader": grain_loader,
    "a grain loader, shuffled": lambda: grain_loader(shuffle=True),
    "a function that returns grain loaders": lambda: lambda: grain_loader(),
    "a function that returns grain datasets": grain_dataset,
    "dicts": ByHand,
    "bytes": lambda: ByHand(in_bytes),
}


# --------------------------------------------------------------------------------------------------- from there on


@pytest.mark.parametrize("steps", [2, PER_EPOCH, 2 * PER_EPOCH + 3, 3 * PER_EPOCH])
@pytest.mark.parametrize("name", STREAMS)
def test_it_resumes_bit_for_bit(name: str, steps: int, path) -> None:
    minimize(STREAMS[name](), path, max_steps=steps)
    resumed = minimize(STREAMS[name](), path)
    check_same(resumed, minimize(STREAMS[name]()))
    assert resumed.message.endswith(f" It resumed from step {steps}, saved in 'run.{steps:012d}.gdopt'.")


def test_earlier_batches_are_not_read_again(path) -> None:
    minimize(grain_loader(), path, max_steps=2 * PER_EPOCH + 4)
    source = Source()
    minimize(grain_loader(source), path)
    looked_at, used_last = list(range(SIZE)), list(range(3 * SIZE, 4 * SIZE))
    assert source.asked == [*looked_at, *used_last, *range(4 * SIZE, 5 * SIZE), *range(5 * SIZE)]


def test_a_run_resumes_at_the_end_of_a_pass(path) -> None:
    minimize(ByHand(), path, max_steps=PER_EPOCH)
    again = ByHand()
    minimize(again, path, epochs=2)
    assert again.pulled == [0, PER_EPOCH - 1, *range(PER_EPOCH)]


def test_saves_between_two_steps_have_the_position_of_that_step(path, monkeypatch) -> None:
    """The stream is ahead of each save, not only of the last one."""
    monkeypatch.setattr("gdopt._run.host_loop._FIRST_CHUNK", 1)
    monkeypatch.setattr("gdopt._run.host_loop._CHUNK_SECONDS", 1e-9)

    def wait(report: gdopt.Report) -> None:
        for thread in threading.enumerate():
            if thread.name == "gdopt checkpoint":
                thread.join()

    whole = minimize(ByHand(), gdopt.Checkpoint(path, every_seconds=0, keep=99), callback=wait, callback_every=1)
    files = sorted(path.parent.glob("run.*.gdopt"))
    assert len(files) == EPOCHS * PER_EPOCH
    for file in files:
        meta = checkpoint_file.read(str(file))[1]["stream"]
        step = int(file.name.split(".")[1])
        assert step == 1 or (meta["number"], meta["passes"]) == (step - 1, (step - 1) // PER_EPOCH)
    for file in files[3:]:
        file.unlink()
    check_same(minimize(ByHand(), path), whole)
    assert whole.steps == EPOCHS * PER_EPOCH


def test_callbacks_come_at_the_same_ends_of_passes(path) -> None:
    before, after = [], []
    minimize(ByHand(), path, callback=lambda report: before.append(report) or report.epoch == 2)
    minimize(ByHand(), path, callback=lambda report: after.append((report.step, report.epoch)))
    assert before[-1].step == 2 * PER_EPOCH
    ends = [(PER_EPOCH * epoch, epoch) for epoch in range(1, EPOCHS + 1)]
    assert set(after) & set(ends) == set(ends[2:])
    assert all(epoch >= step // PER_EPOCH for step, epoch in after)  # The latest good point may be an earlier one.


def test_a_loaders_iterator_ends_where_it_would_have(path) -> None:
    minimize(iter(grain_loader()), path, max_steps=3)
    resumed = minimize(iter(grain_loader()), path, epochs=2)
    check_same(resumed, minimize(iter(grain_loader()), epochs=2))
    assert resumed.status is Status.DATA_EXHAUSTED


@pytest.mark.parametrize("optimizer", [gdopt.gd, optax.contrib.schedule_free_sgd(0.05)], ids=["gd", "averaged"])
@pytest.mark.parametrize("stream", [ByHand, lambda: lambda: iter(list(ByHand()))], ids=["positions", "none"])
def test_a_run_that_ended_gives_the_same_result_again(stream, optimizer, path) -> None:
    options: dict[str, Any] = {"optimizer": optimizer} | ({} if optimizer is gdopt.gd else {"learning_rate": "auto"})
    target = minimize(stream(), **options).history.loss[5:10].mean() * 1.0001
    first = minimize(stream(), path, target=target, **options)
    assert (first.status, first.steps) == (Status.TARGET_REACHED, 2 * PER_EPOCH - 1)
    check_same(minimize(stream(), path, target=target, **options), first)
    check_same(minimize(stream(), path, **options), minimize(stream(), **options))


@pytest.mark.parametrize("stream", [ByHand, lambda: lambda: iter(list(ByHand()))], ids=["positions", "none"])
def test_a_limit_below_the_steps_made_adds_none(stream, path) -> None:
    whole = minimize(stream(), path, max_steps=13)
    for fewer in ({"max_steps": 7}, {"epochs": 1}, {"epochs": 2, "max_steps": 3}):
        result = minimize(stream(), path, **fewer)
        assert (result.steps, result.params.tobytes()) == (13, whole.params.tobytes())


# ------------------------------------------------------------------------------------------------- where it cannot


@pytest.mark.parametrize(
    "shown",
    [lambda state: {"next": np.array(state["next"])}, lambda state: {0: state["next"]}, lambda state: (state["next"],)],
    ids=["an array", "keys that are numbers", "a tuple"],
)
def test_a_state_that_json_cannot_hold_is_not_used(shown, path) -> None:
    minimize(ByHand(shown), path, max_steps=PER_EPOCH + 2)
    again = ByHand(shown)
    resumed = minimize(again, path)
    check_same(resumed, minimize(ByHand()))
    assert again.pulled == [*range(PER_EPOCH)] * EPOCHS
    assert again.shows == 1
    assert resumed.message.endswith(
        " It resumed from step 7, saved in 'run.000000000007.gdopt', and the 7 batches before it were replayed."
    )


def test_a_get_state_that_raises_ends_no_run(path) -> None:
    def broken(state: dict) -> dict:
        raise NotImplementedError

    minimize(ByHand(broken), path, max_steps=1)
    resumed = minimize(ByHand(broken), path)
    check_same(resumed, minimize(ByHand()))
    assert resumed.message.endswith("and the batch before it was replayed.")


def test_old_saves_and_streams_without_positions_are_replayed(path) -> None:
    minimize(ByHand(), path, max_steps=7)
    without = lambda: iter(list(ByHand()))
    check_same(minimize(without, path, epochs=2), minimize(ByHand(), epochs=2))
    for file in path.parent.glob("run.*.gdopt"):
        arrays, meta = checkpoint_file.read(str(file))
        arrays.pop("stream", None)
        meta.pop("stream")
        checkpoint_file.write(str(file), arrays, meta)
    again = ByHand()
    check_same(minimize(again, path), minimize(ByHand()))
    assert again.pulled == [*range(PER_EPOCH)] * EPOCHS


def test_positions_are_requested_only_with_a_checkpoint(path) -> None:
    stream = ByHand()
    minimize(stream)
    assert stream.shows == 0
    minimize(stream, path)
    assert stream.shows >= EPOCHS * PER_EPOCH - 1


def test_another_loader_is_an_error_that_says_what_to_do(path) -> None:
    minimize(grain_loader(), path, max_steps=7)
    what = "cannot resume at the position of the checkpoint, after 6 batches: .* raised ValueError: .*sampler"
    with pytest.raises(gdopt.InputError, match=rf"(?s)data=<.*{what}.* Pass the loader that the checkpoint was made"):
        minimize(grain_loader(shuffle=True, seed=1), path)


def test_a_stream_that_has_become_shorter_is_an_error(path) -> None:
    minimize(lambda: iter(list(ByHand())), path, max_steps=4)
    with pytest.raises(
        gdopt.InputError, match="data ended after 3 batches, but the checkpoint is of a run that used 4"
    ):
        minimize(iter(list(ByHand(batches=3))), path)
