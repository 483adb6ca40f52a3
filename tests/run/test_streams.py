"""Streams of batches from real loaders, compared with a hand-written loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations
from sklearn.datasets import load_digits

import gdopt
from gdopt import Status
from gdopt._problem.stream import Stream

DIGITS: Any = load_digits()
IMAGES, LABELS = (DIGITS.data[:300] / 16).astype(np.float32), DIGITS.target[:300].astype(np.int32)
SIZE = 64
PER_EPOCH = 5  # the last with 44 rows
RATE = 0.5
START = np.zeros((64, 10), np.float32)


def loss(w, batch):
    """Softmax regression."""
    x, y = batch
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x @ w), y[:, None], axis=1))


def batches(size: int = SIZE) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for begin in range(0, len(IMAGES), size):
        yield IMAGES[begin : begin + size], LABELS[begin : begin + size]


def full_batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return (batch for batch in batches() if len(batch[0]) == SIZE)


class Again:
    """A list behind an ``__iter__``, like a loader, because lists themselves are pytrees. Counts its passes."""

    def __init__(self, *items):
        self.items, self.begun = items or tuple(batches()), 0

    def __iter__(self):
        self.begun += 1
        return iter(self.items)


class Sized(Again):
    def __len__(self):
        return len(self.items)


@functools.cache
def hand_step(loss: Callable) -> Callable:
    @jax.jit
    def step(w, batch, rate):
        value, grad = jax.value_and_grad(loss)(w, *batch)
        return jax.tree.map(lambda x, g: x - rate * g, w, grad), value

    return step


def by_hand(stream: Any, loss=loss, start: Any = START, epochs=1, max_steps=None):
    """Return the params after an update with each batch, and the losses, with that of the last batch once more."""
    w, losses, step = start, [], hand_step(loss)
    again: Any = stream if callable(stream) else lambda: stream
    passes = (batch for _ in range(epochs) for batch in again())
    for batch in passes:
        batch = jax.tree.map(np.asarray, batch)
        w, value = step(w, (batch,), RATE)
        losses.append(value)
        if len(losses) == max_steps:
            break
    losses.append(step(w, (batch,), RATE)[1])
    return w, np.asarray(losses)


def run(stream, loss=loss, start: Any = START, **options):
    return gdopt.minimize(loss, start, data=stream, **{"learning_rate": RATE, **options})


def check_equal(result: gdopt.Result, expected: tuple) -> None:
    """Compare bit for bit. The expected losses are one for each update, and one more."""
    w, losses = expected
    jax.tree.map(np.testing.assert_array_equal, result.params, w)
    np.testing.assert_array_equal(result.history.loss, losses)
    assert result.steps == len(losses) - 1


# What may be a stream. The tests that use torch or grain import it themselves, so that the others run without it.


def torch_loader(shuffle: bool = False) -> Any:
    torch, data = pytest.importorskip("torch"), pytest.importorskip("torch.utils.data")
    rows = data.TensorDataset(torch.from_numpy(IMAGES), torch.from_numpy(LABELS.astype(np.int64)))
    return data.DataLoader(rows, SIZE, shuffle=shuffle, num_workers=0, generator=torch.Generator().manual_seed(3))


def grain_loader(shuffle: bool = False) -> Any:
    grain = pytest.importorskip("grain")
    rows = list(zip(IMAGES, LABELS, strict=True))
    sampler = grain.samplers.IndexSampler(len(rows), grain.sharding.NoSharding(), shuffle, num_epochs=1, seed=3)
    return grain.DataLoader(data_source=rows, sampler=sampler, operations=[grain.transforms.Batch(SIZE)])


def grain_dataset() -> Any:
    grain = pytest.importorskip("grain")
    return grain.MapDataset.source(list(zip(IMAGES, LABELS, strict=True))).shuffle(seed=3).batch(SIZE)


STREAMS = {
    "a generator function": lambda: batches,
    "an iterable": Again,
    "a torch DataLoader": torch_loader,
    "a torch DataLoader, shuffled": lambda: torch_loader(shuffle=True),
    "a grain DataLoader": grain_loader,
    "a grain DataLoader, shuffled": lambda: grain_loader(shuffle=True),
    "a grain dataset": lambda: grain_dataset().to_iter_dataset(),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_equals_a_hand_written_loop_bit_for_bit(name):
    result = run(STREAMS[name](), epochs=3)
    check_equal(result, by_hand(STREAMS[name](), epochs=3))
    assert (result.status, result.success, result.steps_per_epoch) == (Status.MAX_STEPS, True, PER_EPOCH)


@pytest.mark.parametrize("max_steps", [1, PER_EPOCH - 1, PER_EPOCH, PER_EPOCH + 1])
def test_max_steps_may_end_anywhere_in_a_pass(max_steps):
    result = run(batches, max_steps=max_steps)
    check_equal(result, by_hand(batches, epochs=2, max_steps=max_steps))
    assert result.status is Status.MAX_STEPS
    fewer = run(batches, max_steps=max_steps, epochs=1)
    assert fewer.steps == min(max_steps, PER_EPOCH)
    assert fewer.success


def test_without_a_number_of_steps_a_stream_is_repeated(monkeypatch):
    monkeypatch.setattr("gdopt._problem.limits._MAX_STEPS", 17)
    stream = Again()
    assert run(stream).steps == 17
    assert stream.begun == 4


def test_a_pass_begins_once_and_keeps_its_first_batch():
    stream = Again()
    check_equal(run(stream, epochs=2), by_hand(batches, epochs=2))
    assert stream.begun == 2
    calls = []
    run(lambda: calls.append(1) or batches(), epochs=3)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "shape",
    [lambda x, y: {"x": x, "y": y}, lambda x, y: [x, {"y": (y,)}], lambda x, y: Pair(x, y), lambda x, y: (x, None, y)],
)
def test_batches_are_any_pytrees(shape):
    def tree_loss(w, batch):
        assert jax.tree.structure(batch) == jax.tree.structure(shape(0, 1))
        return loss(w, jax.tree.leaves(batch))

    shaped = lambda: (shape(x, y) for x, y in full_batches())
    check_equal(run(shaped, tree_loss, epochs=1), by_hand(shaped, tree_loss))


class Pair(NamedTuple):
    x: np.ndarray
    y: np.ndarray


def test_a_batch_may_be_one_array_or_a_number():
    squares = lambda w, x: jnp.mean((w - x) ** 2)
    for numbers in ([1.0, 2.0, 4.0], [np.float64(1), np.float64(2)], list(np.arange(6.0).reshape(3, 2))):
        result = run(Again(*numbers), squares, np.float32(0), epochs=2)
        check_equal(result, by_hand(numbers, squares, np.float32(0), epochs=2))


def test_wide_batches_get_jaxs_default_precision():
    wide = lambda: ((x.astype(float), y.astype(np.int64)) for x, y in batches())
    check_equal(run(wide, epochs=1), by_hand(batches))


@pytest.mark.slow
def test_wide_batches_stay_wide_in_float64():
    with jax.enable_x64(True):
        seen = []
        result = run(
            lambda: ((x.astype(float), y.astype(np.int64)) for x, y in batches()),
            lambda w, batch: seen.append([leaf.dtype for leaf in batch]) or loss(w, batch),
            START.astype(float),
            epochs=1,
        )
    assert set(map(tuple, seen)) == {(np.dtype(np.float64), np.dtype(np.int64))}
    assert result.params.dtype == np.float64
    np.testing.assert_allclose(result.loss, by_hand(batches)[1][-1], rtol=1e-5)


def test_jax_arrays_stay_where_they_are():
    given = jax.device_put(next(batches()))
    for ours, theirs in zip(Stream(Again(given)).example, given, strict=True):
        assert ours is theirs
    on_device = [jax.device_put(batch) for batch in batches()]
    check_equal(run(Again(*on_device), epochs=2), by_hand(batches, epochs=2))
    for batch, expected in zip(on_device, batches(), strict=True):  # none was donated
        jax.tree.map(np.testing.assert_array_equal, batch, expected)


def test_a_loader_may_reuse_its_memory():
    def aligned(like: np.ndarray) -> np.ndarray:  # XLA takes memory at multiples of 64 bytes as it is
        memory = np.empty(like.nbytes + 64, np.uint8)
        begin = -memory.ctypes.data % 64
        return memory[begin : begin + like.nbytes].view(like.dtype).reshape(like.shape)

    def in_place() -> Iterator:
        x, y = map(aligned, next(batches()))
        for new_x, new_y in full_batches():
            x[:], y[:] = new_x, new_y
            yield x, y
            x[:], y[:] = np.nan, -1

    check_equal(run(in_place, epochs=3), by_hand(full_batches, epochs=3))


def test_torch_tensors_share_no_memory_with_the_run():
    torch = pytest.importorskip("torch")
    x, y = torch.from_numpy(IMAGES[:SIZE].copy()), torch.from_numpy(LABELS[:SIZE].copy())

    def in_place() -> Iterator:
        for _ in range(4):
            yield x, y
            x.add_(1)

    fresh = lambda: ((IMAGES[:SIZE] + np.float32(k), LABELS[:SIZE]) for k in range(4))
    check_equal(run(in_place, epochs=1), by_hand(fresh))


# How far ahead


def test_exactly_one_batch_is_fetched_ahead():
    pulled, done, behind = [], [], []

    def logged() -> Iterator:
        for batch in batches(30):
            pulled.append(len(pulled))
            behind.append(len(pulled) - len(done))
            yield batch

    def logging_loss(w, batch):
        jax.debug.callback(lambda _: done.append(1), w[0, 0])
        return loss(w, batch)

    def callback(report):
        assert len(pulled) <= report.step + 3  # the last one used is that of the next step

    result = run(logged, logging_loss, max_steps=15, callback=callback)
    assert result.steps == len(pulled) == 15
    assert len(done) == 17  # The report at the end of the pass evaluates its point, too.
    # As a batch is fetched, the step two before it may be computed still, and the one between them waits.
    assert max(behind) <= 3


def test_an_iterator_is_left_at_the_batch_after_the_last_one_used():
    stream = batches(30)
    check_equal(run(stream, max_steps=4), by_hand(lambda: batches(30), max_steps=4))
    check_equal(run(stream, max_steps=3), by_hand(list(batches(30))[4:], max_steps=3))
    np.testing.assert_array_equal(next(stream)[0], IMAGES[210:240])


@pytest.mark.slow
def test_no_batch_is_fetched_after_the_target():
    pulled = []
    logged = lambda: (pulled.append(1) or batch for batch in batches(100))  # three to a pass
    result = run(logged, epochs=50, target=by_hand(lambda: batches(100), epochs=2)[1][3:6].mean() * 1.001)
    assert (result.status, result.steps) == (Status.TARGET_REACHED, 5)
    assert len(pulled) <= 5 + 3  # the one that reached it, the one in flight and the one that waits


# Compilations


def test_each_shape_is_compiled_once_whatever_the_epochs_and_calls():
    counts = []

    def new_loss(w, batch):
        return 1.5 * loss(w, batch)

    with count_compilations() as counter:
        run(batches, new_loss, epochs=4, callback=lambda report: counts.append((report.epoch, counter.count)))
    after_first = [count for epoch, count in counts if epoch]
    assert after_first[0] == after_first[-1] == counter.count
    assert counter.names.count("jit(run)") <= 3  # the start, and a step for each shape
    with count_compilations() as counter:
        run(Again(), new_loss, epochs=2, learning_rate=0.1)
        run(lambda: (jax.device_put(batch) for batch in batches()), lambda w, batch: 1.5 * loss(w, batch), epochs=1)
        run(batches(), new_loss, max_steps=3)
    assert counter.names == []


def test_torch_tensors_use_the_program_compiled_for_arrays():
    loader = torch_loader()
    run(batches, epochs=1)
    with count_compilations() as counter:
        run(loader, epochs=2, learning_rate=0.1)
    assert counter.names == []


def test_two_shapes_are_silent_and_a_third_gets_a_warning():
    ragged = lambda *sizes: Again(*((IMAGES[:size], LABELS[:size]) for size in sizes))
    run(ragged(64, 44, 64, 44), epochs=2)
    with pytest.warns(UserWarning, match=r"more than 2 shapes, now \[\(\(30, 64\).* Pad them, or leave") as seen:
        result = run(ragged(64, 44, 30, 64, 30), epochs=2)
    assert [warning.filename for warning in seen] == [__file__]
    assert result.steps == 10


# The end


ONCE = "An iterator can be read only once. For more passes, pass data as a function that returns a new"


def same_iterator_again() -> Callable:
    iterator = batches()
    return lambda: iterator


@pytest.mark.parametrize(
    ("stream", "options", "success"),
    [
        pytest.param(batches, {"epochs": 3}, False, id="epochs"),
        pytest.param(batches, {"max_steps": PER_EPOCH + 1}, False, id="max_steps"),
        pytest.param(batches, {"target": 0.0}, False, id="target"),
        pytest.param(batches, {}, True, id="nothing asked for"),
        pytest.param(same_iterator_again, {"epochs": 2}, False, id="the same iterator again"),
        pytest.param(lambda: iter(torch_loader()), {"epochs": 2}, False, id="a loader's iterator"),
    ],
)
def test_a_stream_that_ends_too_early_says_so(stream, options, success):
    result = run(stream(), **options)
    w, losses = by_hand(batches)
    check_equal(result, (w, losses))
    assert (result.status, result.success) == (Status.DATA_EXHAUSTED, success)
    mean = str(losses[:PER_EPOCH].mean())[:5]
    assert result.message.startswith(f"the data ended after {PER_EPOCH} steps: the mean loss of these was {mean}")
    assert (ONCE in result.message) is not success
    if not success:
        with pytest.raises(gdopt.NotConvergedError, match="the data ended after 5 steps"):
            result.raise_for_status()


def test_a_stream_that_ends_before_the_cycle_of_its_rates_says_so():
    result = gdopt.minimize(loss, START, data=batches())
    assert result.message.endswith(f"It was meant for 10000 steps. Pass max_steps={PER_EPOCH} for a whole one.")
    assert "meant for" not in gdopt.minimize(loss, START, data=batches(), max_steps=PER_EPOCH).message


def test_an_iterator_may_have_exactly_the_requested_batches():
    for options in ({"epochs": 1}, {"max_steps": PER_EPOCH}, {"max_steps": PER_EPOCH, "epochs": 1}):
        result = run(batches(), **options)
        assert (result.status, result.success, result.steps) == (Status.MAX_STEPS, True, PER_EPOCH)


def test_the_target_is_for_the_mean_of_an_epoch():
    means = by_hand(batches, epochs=4)[1][:-1].reshape(4, PER_EPOCH).mean(axis=1)
    target = (means[1] + means[2]) / 2
    result = run(batches, epochs=10, target=target)
    assert (result.status, result.success) == (Status.TARGET_REACHED, True)
    assert result.steps == 3 * PER_EPOCH - 1  # at the last batch of an epoch, before its update
    assert result.history.loss[-PER_EPOCH:].mean() == pytest.approx(means[2], rel=1e-6)
    assert f"{means[2]:.4g}"[:5] in result.message
    missed = run(batches, epochs=2, target=target)
    assert (missed.status, missed.success) == (Status.MAX_STEPS, False)
    # What comes after the last step is not looked at, but that it ends an epoch is known from the ones before.
    assert run(batches, max_steps=3 * PER_EPOCH, target=target).status is Status.TARGET_REACHED
    assert run(Sized(), max_steps=PER_EPOCH, target=means[0] * 1.001).status is Status.TARGET_REACHED


def test_callback_comes_at_the_end_of_each_pass_and_can_stop():
    reports = []
    run(batches, epochs=3, callback=reports.append)
    assert all(report.epoch == report.step // PER_EPOCH for report in reports)
    assert {PER_EPOCH, 2 * PER_EPOCH, 3 * PER_EPOCH} <= {report.step for report in reports}
    result = run(batches, epochs=9, callback=lambda report: report.epoch == 2)
    check_equal(result, by_hand(batches, epochs=2))
    assert (result.status, result.success) == (Status.STOPPED, True)
    assert result.message.startswith(f"stopped by the callback after {2 * PER_EPOCH} steps")


def test_a_run_that_diverges_falls_back():
    result = run(Again(*[np.float32(1)] * 100), lambda w, x: jnp.sum((w - x) ** 4), np.float32(9), epochs=1)
    assert result.status in (Status.DIVERGED, Status.NON_FINITE)
    assert np.isfinite(result.params)
    assert result.steps < 100


def test_an_average_is_evaluated_on_the_last_batch():
    optimizer = optax.contrib.schedule_free_sgd(RATE)
    stream = list(batches(100))
    result = gdopt.minimize(loss, START, data=Again(*stream), optimizer=optimizer, epochs=2)

    @jax.jit
    def update(w, state, batch):
        updates, state = optimizer.update(jax.grad(loss)(w, batch), state, w)
        return optax.apply_updates(w, updates), state

    step, w, state = hand_step(loss), START, optimizer.init(START)
    for batch in stream * 2:
        w, state = update(w, state, batch)
    average = optax.contrib.schedule_free_eval_params(state, w)
    assert result.steps == 6
    np.testing.assert_allclose(result.params, average, rtol=1e-4, atol=1e-6)
    assert result.loss == pytest.approx(float(step(result.params, (batch,), RATE)[1]), rel=1e-6)


# Options


def test_without_keep_best_the_last_point_is_returned():
    check_equal(run(batches, epochs=2, keep_best=False), by_hand(batches, epochs=2))


def test_each_step_has_its_own_key():
    def dropout(w, batch, key):
        return loss(w * jax.random.bernoulli(key, 0.9, w.shape), batch)

    one_batch = Again(next(batches()))
    options = {"with_key": True, "epochs": 6, "learning_rate": 1e-9}
    start = np.linspace(-1, 1, 640, dtype=np.float32).reshape(64, 10)
    first, again = (run(one_batch, dropout, start, **options) for _ in range(2))
    np.testing.assert_array_equal(first.history.loss, again.history.loss)
    assert len(set(first.history.loss.tolist())) == 7
    other = run(one_batch, dropout, start, key=jax.random.key(1), **options)
    assert not np.isin(other.history.loss, first.history.loss).any()


def test_aux_args_and_frozen_params():
    def scaled(params, batch, scale):
        rows = jnp.asarray(batch[0].shape[0])
        return scale * loss(params["w"], batch), {"rows": rows, "number": params["number"]}

    start = {"w": START, "number": np.int32(7)}
    options = {"has_aux": True, "trainable": {"w": True, "number": False}, "args": (np.float32(1),)}
    result = run(batches, scaled, start, epochs=2, **options)
    np.testing.assert_array_equal(result.params["w"], by_hand(batches, epochs=2)[0])
    assert (int(result.params["number"]), int(result.aux["number"])) == (7, 7)
    assert int(result.aux["rows"]) == len(IMAGES) % SIZE


def test_schedules_and_other_optimizers():
    schedule = gdopt.schedules.triangular2(0.01, 0.1, step_size_up=3)
    stream = Again(*batches(100))
    result = gdopt.minimize(loss, START, data=stream, optimizer=optax.adam, learning_rate=schedule, epochs=4)
    np.testing.assert_allclose(result.history.learning_rate[:-1], jax.vmap(schedule)(jnp.arange(12)), rtol=1e-6)
    assert result.history.loss[-1] < result.history.loss[0] / 2


# Range tests


@pytest.mark.parametrize("stream", [Again, Sized, torch_loader])
def test_range_tests_agree_whatever_the_stream(stream):
    expected, test = (gdopt.lr_find(loss, START, data=data, num_steps=60) for data in (batches, stream()))
    assert expected.suggestion is not None
    assert test.suggestion == expected.suggestion
    np.testing.assert_array_equal(test.loss, expected.loss)


@pytest.mark.parametrize("optimizer", [None, gdopt.gd])
def test_auto_finds_a_rate_and_trains_from_the_first_batch(optimizer):
    result = run(Sized(), optimizer=optimizer, learning_rate="auto", epochs=20)
    assert (result.range_test is None) == (optimizer is None)
    assert (result.success, result.steps) == (True, 20 * PER_EPOCH)
    assert result.history.loss[0] == by_hand(batches)[1][0]
    assert result.history.loss[-10:].mean() < 0.2 * result.history.loss[0]


@pytest.mark.slow
def test_repeats_and_refinement_see_the_same_stream():
    test = gdopt.lr_find(loss, START, data=batches, num_steps=60, repeats=2, refine=True)
    assert test.losses.shape[0] == 2
    assert test.refinement.best == test.suggestion
    assert np.isfinite(test.refinement.loss).any()


# Bad input


class Empty:
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("stream", "what"),
    [
        (lambda: iter([]), r"data=<list_iterator.* gave no batch\. An iterator can be read only once, and this one"),
        (lambda: lambda: iter(()), r"gave no batch\. Pass one that gives at least one"),
        (Empty, r"data=<.*Empty.* gave no batch\. Pass one"),
        (lambda: lambda: 3, "returned a int. Return an iterable of batches for an epoch"),
        (lambda: Again((IMAGES, "digits")), r"a batch of data\[1\] is a str, not an array of numbers. Pass pytrees"),
        (lambda: Again({"x": object()}), r"a batch of data\['x'\] is a object, not an array"),
        (lambda: Again((IMAGES, np.array(["a"] * 300))), r"a batch of data\[1\] is a ndarray, not an array of numbers"),
    ],
)
def test_invalid_streams_are_refused_before_anything_compiles(stream, what):
    with count_compilations() as counter, pytest.raises(gdopt.InputError, match=what):
        run(stream(), epochs=1)
    assert counter.count == 0


ROW = IMAGES[:SIZE], LABELS[:SIZE]
FIRST = r"\(float32\[64, 64\], int32\[64\]\)"
UNLIKE: dict[str, tuple[Any, str]] = {
    "a dict": ({"x": ROW[0], "y": ROW[1]}, rf" is \{{'x': float32.* but the first was {FIRST}\. .* same containers"),
    "a list": (list(ROW), r" is \[float32.* but the first was .* \(a list is no tuple\)"),
    "None": (None, rf" is None, but the first was {FIRST}\."),
    "None inside": ((ROW[0], None), r" is \(float32\[64, 64\], None\), but the first was"),
    "nothing": ((), r" is \(\), but the first was"),
    "a number": (3.0, r" is float64\[\], but the first was"),
    "a number inside": ((ROW[0], 1), r" is \(.*, int64\[\]\), but the first was .* arrays with as many axes"),
    "a single row": ((ROW[0][0], ROW[1][0]), r" is \(float32\[64\], int32\[\]\), but the first was .* as many axes"),
    "a column of labels": ((ROW[0], ROW[1][:, None]), r" is \(.*, int32\[64, 1\]\), but .* as many axes"),
    "floats as labels": ((ROW[0], ROW[1] + 0.5), r" is \(.*, float64\[64\]\), but .* numbers of one kind"),
    "ints as images": (((16 * ROW[0]).astype(int), ROW[1]), r" is \(int64\[64, 64\], .* numbers of one kind"),
    "bools as images": ((ROW[0] > 0, ROW[1]), r" is \(bool\[64, 64\], .* numbers of one kind"),
    "other columns": ((ROW[0][:, :3], ROW[1]), rf" is \(float32\[64, 3\], .* but the first was {FIRST}, and the loss"),
    "fewer labels": ((ROW[0], ROW[1][:5]), r" is \(.*, int32\[5\]\), but the first was .* but for the number of rows"),
    "no rows": ((ROW[0][:0], ROW[1][:0]), r" has zero rows\. Leave it out"),
    "a text": ((ROW[0], "digits"), r"\[1\] is a str, not an array of numbers"),
    "columns on a device": (jax.device_put((ROW[0][:, :3], ROW[1])), r" is \(float32\[64, 3\], .* and the loss"),
}


@pytest.mark.parametrize("where", ["data", "validation"])
@pytest.mark.parametrize(("batch", "what"), UNLIKE.values(), ids=UNLIKE)
def test_a_batch_that_is_unlike_the_first_is_named_with_both(batch, what, where):
    unlike = Again(ROW, ROW, batch, ROW)
    streams = {"stream": unlike} if where == "data" else {"stream": Again(ROW), "validation": unlike}
    with pytest.raises(gdopt.InputError, match=f"^batch 2 of {where}{what}"):
        run(**streams, epochs=1)


def test_a_range_test_names_a_batch_that_is_unlike_the_first():
    with pytest.raises(
        gdopt.InputError, match=r"^batch 1 of data is \(float32\[64, 3\], int32\[64\]\), but the first was"
    ):
        gdopt.lr_find(loss, START, data=Again(ROW, (ROW[0][:, :3], ROW[1])), num_steps=60)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16])
def test_batches_may_be_wider_or_narrower_numbers_of_a_kind(dtype):
    result = run(Again(ROW, (ROW[0].astype(dtype), ROW[1].astype(np.int8))), epochs=1)
    np.testing.assert_allclose(result.params, by_hand([ROW, ROW])[0], rtol=0.02, atol=1e-3)


def test_batches_may_be_longer_if_the_loss_takes_them():
    lengths = [np.ones((4, length), np.float32) for length in (7, 9)]
    result = run(Again(*lengths), lambda w, x: jnp.mean((w - x) ** 2), np.float32(0), epochs=1)
    assert (result.status, result.steps) == (Status.MAX_STEPS, 2)


def test_an_error_on_other_rows_stays_what_it_is_with_a_note():
    fixed = lambda w, batch: loss(w, (batch[0].reshape(SIZE, 64), batch[1]))
    with pytest.raises(TypeError, match="cannot reshape") as caught:
        run(batches, fixed, epochs=1)
    noted = (
        f"gdopt: batch {PER_EPOCH - 1} of data is (float32[44, 64], int32[44]), but the first was (float32[64, 64], "
    )
    assert any(note.startswith(noted) for note in caught.value.__notes__)


def test_an_aux_like_the_batch_is_an_error_if_batches_differ():
    with_logits = lambda w, batch: (loss(w, batch), batch[0] @ w)
    with pytest.raises(gdopt.InputError, match=r"an aux whose shapes depend on those of the batch, \[\(\(44, 64\)"):
        run(batches, with_logits, has_aux=True, epochs=1)
    full = run(full_batches, with_logits, has_aux=True, epochs=1)
    assert full.aux.shape == (SIZE, 10)


def test_arguments_that_do_not_go_with_a_stream_are_refused():
    with pytest.raises(gdopt.InputError, match=r"batch_size=32 was given with data that come in batches\. Leave"):
        run(batches, epochs=1, batch_size=32)
    with pytest.raises(gdopt.InputError, match=r"tol=0.1 was given for a noisy loss"):
        run(batches, epochs=1, tol=0.1)
    for find in (gdopt.lr_find, functools.partial(gdopt.minimize, max_steps=100, optimizer=gdopt.gd)):
        with pytest.raises(gdopt.InputError, match="data is an iterator, which can be read only once, but a range"):
            find(loss, START, data=batches())


def unsized_torch_loader() -> Any:
    """A loader that has a ``__len__``, which raises TypeError."""
    data = pytest.importorskip("torch.utils.data")

    class Unsized(data.IterableDataset):
        def __iter__(self):
            return batches()

    return data.DataLoader(Unsized(), batch_size=None)


@pytest.mark.parametrize("stream", [lambda: batches, Again, unsized_torch_loader], ids=["function", "list", "torch"])
def test_auto_needs_to_know_how_many_batches_there_are(stream):
    with pytest.raises(gdopt.InputError, match="epochs=3 was given with a stream that does not report how many"):
        run(stream(), epochs=3, learning_rate="auto")
    check_equal(run(stream(), epochs=2), by_hand(batches, epochs=2))


@pytest.mark.parametrize("at", [0, 1, 3, PER_EPOCH])
def test_exceptions_from_the_loader_propagate_unchanged(at):
    error = OSError("the disk is gone")

    def broken() -> Iterator:
        for k, batch in enumerate([*batches(), None]):
            if k == at:
                raise error
            yield batch

    with pytest.raises(OSError, match="the disk is gone") as caught:
        run(broken, epochs=2)
    assert caught.value is error
