"""Validation at the end of each epoch: its losses, the best point, patience, metrics, and resuming."""

from __future__ import annotations

import collections
import functools
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations

import gdopt
from gdopt import Status, _trees
from gdopt._problem.validation import metrics_in
from gdopt._run import host_loop, sources, validation

RNG = np.random.default_rng(0)
TRUTH = np.arange(1.0, 5.0)


def rows(count: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    X = RNG.normal(size=(count, 4))
    return X.astype(np.float32), (X @ TRUTH + noise * RNG.normal(size=count)).astype(np.float32)


TRAINING, HELD_OUT = rows(40, 3.0), rows(60, 0.1)
PER_EPOCH, EPOCHS = 5, 8
START = jnp.zeros(4)


def loss(w: Any, batch: Any) -> Any:
    X, y = batch
    return jnp.mean((X @ w - y) ** 2)


def with_aux(w: Any, batch: Any) -> Any:
    X, y = batch
    residual = X @ w - y
    value = jnp.mean(residual**2)
    return value, {"mse": value, "high": {"share": jnp.mean(residual > 0)}, "rows": residual[:2], "count": len(X)}


def minimize(**options: Any) -> gdopt.Result:
    given = {"data": TRAINING, "batch_size": 8, "epochs": EPOCHS, "learning_rate": 0.1, "validation": HELD_OUT}
    return gdopt.minimize(options.pop("loss", loss), START, **{**given, **options})


def points(**options: Any) -> list[Any]:
    """Return the params at the end of each epoch, each by a run of its own."""
    given = {"validation": None, "validation_loss": None, "patience": None, **options}
    return [minimize(**{**given, "epochs": epoch}).params for epoch in range(1, given.get("epochs", EPOCHS) + 1)]


def bits(result: gdopt.Result) -> list[bytes]:
    assert result.history is not None
    kept = result.params, result.loss, result.grad_norm, result.aux, result.steps, int(result.status)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((kept, tuple(result.history)))]


def split(batches: Any, sizes: list[int]) -> list[Any]:
    return list(zip(*(np.split(array, sizes) for array in batches), strict=True))


# --------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("count", [1, 7, 1024, 1025, 3000])
def test_the_losses_are_those_of_the_points_after_each_epoch(count: int) -> None:
    held_out = rows(count, 1.0)
    result = minimize(validation=held_out)
    expected = [float(loss(params, held_out)) for params in points()]
    np.testing.assert_allclose(result.history.validation_loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(result.history.validation_steps, PER_EPOCH * np.arange(1, EPOCHS + 1))
    assert result.history.validation_loss.dtype == np.float32
    best = int(np.argmin(expected))
    assert result.params.tobytes() == points()[best].tobytes()


def test_the_best_point_by_validation_comes_back_with_its_training_loss() -> None:
    result = minimize(loss=with_aux, has_aux=True)
    best = int(np.argmin(result.history.validation_loss))
    step = result.history.validation_steps[best]
    assert step < result.steps  # the noise of the training rows is learned afterwards
    assert result.loss == result.history.loss[step]
    assert result.grad_norm == result.history.grad_norm[step]
    assert result.aux["mse"] == result.loss
    assert f"The point of step {step} is returned: it has the lowest validation loss, " in result.message
    assert (result.status, result.success) == (Status.MAX_STEPS, True)


def test_without_keep_best_the_last_point_comes_back() -> None:
    last, plain = minimize(keep_best=False), minimize(validation=None)
    assert last.params.tobytes() == plain.params.tobytes()
    np.testing.assert_array_equal(last.history.validation_loss, minimize().history.validation_loss)
    assert "is returned" not in last.message
    assert "has the lowest validation loss" in last.message


def test_the_run_is_that_without_a_validation() -> None:
    with_it, without = minimize(), minimize(validation=None)
    for name in ("loss", "grad_norm", "learning_rate"):
        np.testing.assert_array_equal(getattr(with_it.history, name), getattr(without.history, name))
    assert without.history.validation_loss.size == without.history.validation_steps.size == 0
    assert without.history.metrics == without.history.validation_metrics == {}


def test_an_epoch_that_is_not_complete_is_validated_at_the_end() -> None:
    result = minimize(epochs=None, max_steps=12)
    assert result.history.validation_steps.tolist() == [5, 10, 12]
    assert result.history.validation_loss[-1] == pytest.approx(
        float(loss(minimize(max_steps=12, validation=None).params, HELD_OUT))
    )
    assert minimize(epochs=None, max_steps=3).history.validation_steps.tolist() == [3]


class Loader:
    """An iterable of batches that is no pytree."""

    def __init__(self, batches: list[Any]):
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


STREAMS: dict[str, Any] = {
    "an iterable": lambda: Loader(split(HELD_OUT, [10, 25])),
    "function": lambda: lambda: iter(split(HELD_OUT, [10, 25])),
    "one batch": lambda: lambda: [HELD_OUT],
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_a_stream_is_weighted_by_its_rows(stream: Any) -> None:
    expected = minimize(loss=with_aux, has_aux=True).history
    history = minimize(loss=with_aux, has_aux=True, validation=stream()).history
    np.testing.assert_allclose(history.validation_loss, expected.validation_loss, rtol=1e-5)
    for name, values in expected.validation_metrics.items():
        if name != "count":
            np.testing.assert_allclose(history.validation_metrics[name], values, rtol=1e-5)


def test_training_by_a_stream() -> None:
    whole = split(TRAINING, [8, 16, 24, 32])
    result = minimize(data=lambda: iter(whole), batch_size=None)
    by_hand = [
        float(loss(minimize(data=lambda: iter(whole), batch_size=None, epochs=k, validation=None).params, HELD_OUT))
        for k in range(1, EPOCHS + 1)
    ]
    np.testing.assert_allclose(result.history.validation_loss, by_hand, rtol=1e-6)
    rises = lambda w, batch: -loss(w, batch)
    result = minimize(data=lambda: iter(whole), batch_size=None, validation_loss=rises)
    assert (result.loss, result.grad_norm) == (result.history.loss[PER_EPOCH], result.history.grad_norm[PER_EPOCH])


def test_a_stream_of_one_batch_makes_an_epoch_of_each_full_batch_step() -> None:
    result = minimize(data=lambda: iter([TRAINING]), batch_size=None)
    assert result.history.validation_steps.tolist() == list(range(1, EPOCHS + 1))


# ------------------------------------------------------------------------------------------------------------ metrics


def test_the_scalars_of_the_aux_are_metrics() -> None:
    history = minimize(loss=with_aux, has_aux=True).history
    assert history.metrics.keys() == history.validation_metrics.keys() == {"mse", "high/share", "count"}
    epochs = history.loss[:-1].reshape(EPOCHS, PER_EPOCH)
    np.testing.assert_allclose(history.metrics["mse"], epochs.mean(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(history.validation_metrics["mse"], history.validation_loss)
    np.testing.assert_array_equal(history.metrics["count"], 8)
    np.testing.assert_array_equal(history.validation_metrics["count"], 60)
    shares = [float(with_aux(params, HELD_OUT)[1]["high"]["share"]) for params in points()]
    np.testing.assert_allclose(history.validation_metrics["high/share"], shares, rtol=1e-6)


def test_names_of_metrics() -> None:
    key = jax.random.key(0)
    assert metrics_in(3.0) == {"aux": 3.0}
    assert metrics_in((1, {"a": True}, np.ones(2), 1j, key)) == {"0": 1, "1/a": True}
    assert metrics_in({"a/b": 1, "a": {"b": 2}}) == {"['a']['b']": 2, "['a/b']": 1}


# ----------------------------------------------------------------------------------------------------------- patience


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_patience_ends_the_run_with_success(patience: int) -> None:
    losses = minimize(epochs=40).history.validation_loss
    end = next(
        k for k in range(patience, 40) if losses[: k - patience + 1].min() <= losses[k - patience + 1 : k + 1].min()
    )
    result = minimize(epochs=40, patience=patience)
    assert (result.status, result.success) == (Status.EARLY_STOPPED, True)
    assert result.steps == PER_EPOCH * (end + 1)
    np.testing.assert_array_equal(result.history.validation_loss, losses[: end + 1])
    assert len(result.history.loss) == result.steps + 1
    assert result.message.startswith(f"stopped early after {result.steps} steps: the loss went from ")
    assert f"no new low for {'an epoch' if patience == 1 else f'{patience} epochs'}." in result.message
    best = int(np.argmin(losses[: end + 1]))
    assert result.params.tobytes() == points(epochs=best + 1)[best].tobytes()
    assert result.raise_for_status() is result


@pytest.mark.parametrize(("optimizer", "planned"), [(None, "one cycle"), (gdopt.gd, "three cycles")])
def test_patience_that_cuts_planned_rates_says_so(optimizer: Any, planned: str) -> None:
    given = {"learning_rate": "auto", "optimizer": optimizer, "epochs": 40, "validation_loss": lambda w, batch: jnp.nan}
    cut = minimize(**given, patience=2)
    assert cut.status is Status.EARLY_STOPPED
    (steps,) = re.findall(
        rf"{planned}.* meant for (\d+) steps, and the low rates at the end were not reached", cut.message
    )
    whole = minimize(**given)
    assert int(steps) == whole.steps
    assert "meant for" not in whole.message
    assert "meant for" not in minimize(epochs=40, patience=2, validation_loss=given["validation_loss"]).message


def test_patience_counts_losses_that_are_not_finite() -> None:
    result = minimize(patience=2, validation_loss=lambda w, batch: jnp.nan * loss(w, batch))
    assert (result.status, result.steps) == (Status.EARLY_STOPPED, 2 * PER_EPOCH)
    assert "The validation loss was never finite." in result.message
    assert result.params.tobytes() == points()[1].tobytes()


def test_a_run_that_fails_returns_the_best_point_by_validation() -> None:
    rates = optax.piecewise_constant_schedule(0.1, {20: 1e30})
    result = minimize(learning_rate=rates, epochs=20)
    assert result.status in (Status.NON_FINITE, Status.DIVERGED)
    best = int(np.argmin(result.history.validation_loss[:4]))
    assert result.params.tobytes() == points()[best].tobytes()
    assert not result.success


@pytest.mark.parametrize("stream", [False, True])
def test_validation_data_that_hold_nan_are_named(stream: bool) -> None:
    X, y = HELD_OUT[0], HELD_OUT[1].copy()
    y[3] = math.nan
    result = minimize(validation=(lambda: [(X, y)]) if stream else (X, y))
    assert result.message.endswith("never finite. validation[1] holds NaN. Leave out what is NaN, or fill it.")
    assert "holds NaN" not in minimize(validation_loss=lambda w, batch: jnp.nan * loss(w, batch)).message


# ----------------------------------------------------------------------------------------------- what the loss is given


def test_another_loss_validates() -> None:
    result = minimize(validation_loss=lambda w, batch: 2 * loss(w, batch))
    np.testing.assert_allclose(result.history.validation_loss, 2 * minimize().history.validation_loss, rtol=1e-6)


def test_no_gradient_is_computed() -> None:
    @jax.custom_vjp
    def forward_only(x: Any) -> Any:
        return x

    def refuse(*_: Any) -> Any:
        raise AssertionError("differentiated")

    forward_only.defvjp(refuse, refuse)
    assert minimize(validation_loss=lambda w, batch: forward_only(loss(w, batch))).steps == EPOCHS * PER_EPOCH


def test_a_loss_with_a_key_gets_the_same_one_each_time() -> None:
    def noisy(w: Any, batch: Any, key: Any) -> Any:
        return loss(w, batch) + jax.random.normal(key)

    run = functools.partial(minimize, loss=noisy, with_key=True, learning_rate=1e-30, epochs=3)
    losses = run().history.validation_loss
    assert len(set(losses.tolist())) == 1
    assert losses[0] != run(key=jax.random.key(1)).history.validation_loss[0]
    full = run(batch_size=None, max_steps=3, epochs=None)  # an epoch is a step
    assert full.history.validation_steps.tolist() == [1, 2, 3]


def test_an_average_is_validated_and_returned() -> None:
    options = {"optimizer": optax.contrib.schedule_free_sgd(0.1), "learning_rate": "auto"}
    result = minimize(**options)
    expected = [float(loss(params, HELD_OUT)) for params in points(**options)]
    np.testing.assert_allclose(result.history.validation_loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(result.params, points(**options)[int(np.argmin(expected))])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_other_dtypes_and_scales(dtype: Any) -> None:
    data, held_out = (tuple(array.astype(dtype) for array in pair) for pair in (TRAINING, HELD_OUT))
    result = gdopt.minimize(
        loss, START.astype(dtype), data=data, batch_size=8, epochs=3, learning_rate=0.05, validation=held_out
    )
    assert result.params.dtype == dtype
    assert (np.diff(result.history.validation_loss) < 0).all()


@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_large_and_small_losses(size: float) -> None:
    scaled = lambda w, batch: size**2 * loss(w, batch)
    result = minimize(loss=scaled, learning_rate=0.1 / size**2, validation=rows(3000, 1.0), patience=50)
    plain = minimize(validation=rows(3000, 1.0))
    assert np.isfinite(result.history.validation_loss).all()
    assert plain.steps == result.steps


def test_scaled_params_keep_their_units() -> None:
    result = minimize(scale=4.0, learning_rate=0.1 / 16)
    np.testing.assert_allclose(result.history.validation_loss, minimize().history.validation_loss, rtol=1e-4)


def test_in_64_bits() -> None:
    with jax.enable_x64(True):
        history = minimize(loss=with_aux, has_aux=True, validation=rows(2500, 1.0)).history
        # The data are of float32, and the params are of float64 by default.
        assert history.validation_loss.dtype == history.metrics["mse"].dtype == history.loss.dtype


def test_strict_settings() -> None:
    expected = bits(minimize(loss=with_aux, has_aux=True, validation=(big := rows(2500, 1.0)), patience=3))
    with jax.numpy_dtype_promotion("strict"), jax.transfer_guard("disallow"), jax.debug_nans(True):
        assert bits(minimize(loss=with_aux, has_aux=True, validation=big, patience=3)) == expected


# --------------------------------------------------------------------------------------------------------- compilation


def test_fresh_losses_and_data_of_the_same_shape_compile_nothing() -> None:
    def run(factor: float) -> gdopt.Result:
        held_out = tuple(factor * array for array in rows(2500, 1.0))
        return minimize(
            loss=lambda w, batch: with_aux(w, batch),
            validation_loss=lambda w, batch: with_aux(w, batch),
            has_aux=True,
            validation=held_out,
            patience=50,
        )

    run(1.0)
    with count_compilations() as counter:
        run(1.1)
    assert counter.names == []


def test_an_epoch_places_nothing_and_reads_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: collections.Counter[str] = collections.Counter()

    def counted(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    def counts_of(epochs: int) -> collections.Counter[str]:
        counts.clear()
        minimize(epochs=epochs, keep_best=False)
        return counts.copy()

    monkeypatch.setattr(host_loop._Sizes, "next", lambda sizes: PER_EPOCH)  # whatever the clock says
    for owner, name in ((_trees.Packed, "_unpacked"), (validation, "on_one_mesh"), (validation._Program, "__call__")):
        counted(owner, name)
    counts_of(1)  # This one may trace the programs.
    more, fewer = counts_of(9), counts_of(4)
    assert more - fewer == {"_unpacked": 5, "__call__": 5}


def test_the_numbers_of_a_run_are_moved_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    advance = sources.InMemory.advance

    def recorded(self: Any, carry: Any, inputs: Any, *steps: int) -> Any:
        seen.append(inputs)
        return advance(self, carry, inputs, *steps)

    monkeypatch.setattr(sources.InMemory, "advance", recorded)
    minimize()
    *chunks, _ = seen  # the last one has another limit, which lets it only evaluate
    assert len(chunks) >= EPOCHS
    assert len({id(inputs) for inputs in chunks}) == 1
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(chunks[0]))


def test_a_run_without_validation_has_the_program_that_it_had() -> None:
    traces = []
    for given in ({"has_aux": True, "loss": with_aux}, {}):
        minimize(**given, validation=None)
        with count_compilations() as counter:
            minimize(**given, validation=None, learning_rate=0.2)
        traces += counter.names
        with count_compilations() as counter:  # only a metric needs another loop
            minimize(**given)
        traces.append(sum("run" in name for name in counter.names))
    assert traces[-1] <= 1  # the validation, and not the loop


# --------------------------------------------------------------------------------------------------------- checkpoints


OPTIONS: dict[str, dict[str, Any]] = {
    "arrays": {},
    "metrics": {"loss": with_aux, "has_aux": True},
    "stream": {"data": lambda: iter(split(TRAINING, [8, 16, 24, 32])), "batch_size": None},
    "average": {"optimizer": optax.contrib.schedule_free_sgd(0.1), "learning_rate": "auto"},
    "last": {"keep_best": False},
    "validation by a stream": {"validation": lambda: iter(split(HELD_OUT, [10, 25]))},
}


@pytest.mark.parametrize("patience", [None, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_resumes_to_the_last_bit(name: str, patience: int | None, tmp_path: Path) -> None:
    run = functools.partial(minimize, **OPTIONS[name], patience=patience, epochs=14)
    whole = run()
    for step in (3, 5, 17, 25):
        path = tmp_path / f"{step}"
        stopped = run(checkpoint=path, callback=lambda report, step=step: report.step == step, callback_every=1)
        assert stopped.steps == step
        assert bits(run(checkpoint=path)) == bits(whole)
        assert bits(run(checkpoint=path)) == bits(whole)  # the saved run is complete


def test_a_run_that_stopped_early_goes_on_with_more_patience(tmp_path: Path) -> None:
    run = functools.partial(minimize, epochs=14, loss=with_aux, has_aux=True)
    first = run(patience=1, checkpoint=tmp_path / "run")
    assert first.status is Status.EARLY_STOPPED
    with pytest.warns(UserWarning, match=r"patience=None \(it was 1\)"):
        again = run(checkpoint=tmp_path / "run")
    assert bits(again) == bits(run())


def test_an_incomplete_epoch_is_forgotten_by_a_longer_run(tmp_path: Path) -> None:
    minimize(epochs=None, max_steps=12, checkpoint=tmp_path / "run")
    with pytest.warns(UserWarning, match=r"max_steps=40 \(it was 12\)"):
        longer = minimize(checkpoint=tmp_path / "run")
    assert bits(longer) == bits(minimize())


def test_another_validation_loss_is_a_warning(tmp_path: Path) -> None:
    run = lambda factor: minimize(checkpoint=tmp_path / "run", validation_loss=lambda w, batch: factor * loss(w, batch))
    first = run(2)
    assert bits(run(2)) == bits(first)
    with pytest.warns(UserWarning, match="validation_loss is not that of the checkpoint"):
        run(3)


def test_other_validation_data_are_another_run(tmp_path: Path) -> None:
    minimize(checkpoint=tmp_path / "run")
    for other in (None, rows(60, 0.1), lambda: iter([HELD_OUT])):
        with pytest.raises(gdopt.InputError, match="is of another run: its validation is "):
            minimize(checkpoint=tmp_path / "run", validation=other)


# ----------------------------------------------------------------------------------------------------------- bad input


def read(*batches: Any) -> Callable:
    iterator = iter(batches)
    return lambda: iterator


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "structure": (
        {"validation": HELD_OUT[0]},
        r"validation=float32\[60, 4\] has another structure than a batch of data, \(float32\[8, 4\], float32\[8\]\)",
    ),
    "axes": ({"validation": (HELD_OUT[0], HELD_OUT[1][:, None])}, r"validation=\(.*float32\[60, 1\]\) has another"),
    "a stream's structure": ({"validation": lambda: [HELD_OUT[0]]}, "validation=.* has another structure than a batch"),
    "rows": (
        {"validation": (HELD_OUT[0], HELD_OUT[1][:5])},
        r"validation needs the same number of rows .*validation\[1",
    ),
    "no rows": ({"validation": (HELD_OUT[0][:0], HELD_OUT[1][:0])}, "validation has zero rows"),
    "a list": ({"validation": ([1.0], [2.0])}, r"validation\[0\]\[0\] is a float, not an array|a batch of validation"),
    "an iterator": ({"validation": iter([HELD_OUT])}, "validation=<.*> is an iterator, which can be read only once"),
    "patience alone": ({"validation": None, "patience": 3}, "patience=3 was given without validation"),
    "loss alone": ({"validation": None, "validation_loss": loss}, "validation_loss=<.*> was given without validation"),
    "patience": ({"patience": 0}, r"patience=0 is not a whole number from 1"),
    "loss": ({"validation_loss": 3}, "validation_loss=3 is not a function"),
    "full batch": (
        {"batch_size": None},
        r"validation was given for a full-batch loss.* batch_size below the number of",
    ),
    "no data": ({"data": None, "batch_size": None, "epochs": None}, "validation was given without data"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with count_compilations() as counter, pytest.raises(gdopt.InputError, match=message):
        minimize(**options)
    assert counter.names == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_loss_that_does_not_take_the_validation_data_raises_before_the_first_step(stream: bool) -> None:
    seen: list[gdopt.Report] = []
    narrow: Any = HELD_OUT[0][:, :3], HELD_OUT[1]
    wanted = r"validation=\(float32\[60, 3\], float32\[60\]\) has other axes than a batch of data"
    with pytest.raises(gdopt.InputError, match=wanted):
        minimize(validation=(lambda: [narrow]) if stream else narrow, callback=seen.append, callback_every=1)
    with pytest.raises(gdopt.InputError, match=r"(?s)the loss returned shape \(60,\).*raised by the validation loss"):
        minimize(validation_loss=lambda w, batch: batch[1], callback=seen.append, callback_every=1)
    assert seen == []


def test_an_iterator_in_a_function_is_refused_when_it_is_read_again() -> None:
    with pytest.raises(gdopt.InputError, match=r"validation=.* gave no batch when it was read again"):
        minimize(validation=read(HELD_OUT, HELD_OUT))


@pytest.mark.parametrize("how", [jax.jit, jax.vmap, jax.grad])
def test_it_is_refused_inside_transformations(how: Any) -> None:
    fit = lambda shift: minimize(data=(TRAINING[0], TRAINING[1] + shift)).loss
    with pytest.raises(
        gdopt.InputError, match=r"validation=\(float32\[60, 4\], float32\[60\]\) was given to minimize inside"
    ):
        how(fit)(jnp.ones(2) if how is jax.vmap else 1.0)


def test_errors_of_the_validation_loss_name_it() -> None:
    with pytest.raises(gdopt.InputError, match=r"the loss returned shape \(60,\)"):
        minimize(validation_loss=lambda w, batch: batch[0] @ w)


ONLY_AT_VALIDATION: dict[str, tuple[dict[str, Any], Any, str]] = {
    "axes": (
        {"validation": (HELD_OUT[0][:, :3], HELD_OUT[1])},
        gdopt.InputError,
        r"validation=\(float32\[60, 3\], float32\[60\]\) has other axes than a batch of data, \(float32\[8, 4\], ",
    ),
    "a stream's axes": (
        {"validation": lambda: [(HELD_OUT[0][:, :3], HELD_OUT[1])]},
        gdopt.InputError,
        "has other axes",
    ),
    "result": ({"validation_loss": lambda w, batch: batch[0] @ w}, gdopt.InputError, r"returned shape \(60,\)"),
    "error": ({"validation_loss": lambda w: w.sum()}, TypeError, "takes 1 positional argument"),
}


@pytest.mark.parametrize(("options", "error", "message"), ONLY_AT_VALIDATION.values(), ids=ONLY_AT_VALIDATION)
def test_errors_of_the_validation_come_before_anything_compiles(options: Any, error: Any, message: str) -> None:
    gdopt.clear_cache()
    with count_compilations() as counter, pytest.raises(error, match=message):
        minimize(**options)
    assert counter.names == []


def test_rows_may_be_longer_than_those_of_a_batch_if_the_loss_takes_them() -> None:
    mean: Callable = lambda w, batch: jnp.mean((batch - w[0]) ** 2)
    result = minimize(loss=mean, data=TRAINING[0], validation=np.ones((6, 9), np.float32))
    assert result.history is not None
    assert len(result.history.validation_loss) == EPOCHS


# ----------------------------------------------------------------------------------------------------------- pictures


def test_a_picture_shows_both_losses_and_several_runs() -> None:
    result = minimize()
    axes = gdopt.plot.descent(result).axes[0]
    (line,) = (line for line in axes.lines if line.get_label() == "validation")
    np.testing.assert_array_equal(line.get_xdata(), result.history.validation_steps)
    np.testing.assert_array_equal(line.get_ydata(), result.history.validation_loss)
    other = minimize(learning_rate=0.01, validation=None)
    for runs, names in (([result, other], ["run 0", "run 1"]), ({"fast": result, "slow": other}, ["fast", "slow"])):
        figure = gdopt.plot.descent(runs)
        texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert texts == [names[0], f"{names[0]}, validation", names[1]]
        assert [len(axes.lines) for axes in figure.axes] == [5, 4, 2]
    with pytest.raises(gdopt.InputError, match="holds no runs"):
        gdopt.plot.descent([])
    with pytest.raises(gdopt.InputError, match="'run 0' of result is a float"):
        gdopt.plot.descent([1.0])  # pyright: ignore[reportArgumentType]
    inside = jax.jit(lambda x: gdopt.minimize(lambda w: (w - x) ** 2, 0.0))(1.0)
    with pytest.raises(gdopt.InputError, match="'run 1' of result is of a run inside jit"):
        gdopt.plot.descent([result, inside])


def test_a_history_without_validation_is_that_of_before() -> None:
    history = gdopt.History(np.ones(2), np.ones(2), np.ones(2))
    assert history == gdopt.minimize(lambda x: x**2, 1.0, max_steps=1).history._replace(
        loss=np.ones(2), grad_norm=np.ones(2), learning_rate=np.ones(2)
    )
    assert math.isnan(gdopt.Report(1, 1, 0.0, 1.0, 1.0, 0.1).validation_loss)
    assert list(itertools.chain(history.metrics, history.validation_metrics)) == []
