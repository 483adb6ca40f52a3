"""Callbacks: when they come, what they are given, and how they end a run."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations

import gdopt
from gdopt import Status
from gdopt._run import host_loop

X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
Y = (X @ np.arange(1.0, 4.0)).astype(np.float32) + np.random.default_rng(1).normal(size=40).astype(np.float32)
PER_EPOCH = 5
STEPS = 23


def loss(w: Any, batch: Any) -> Any:
    X, y = batch
    return jnp.mean((X @ w - y) ** 2)


def whole(w: Any) -> Any:
    return loss(w, (X, Y))


def drawn(w: Any, batch: Any, key: Any) -> Any:
    return loss(w, batch) + jnp.sum(w) * jax.random.normal(key)


def stream() -> Iterator[Any]:
    return iter([(X[at : at + 8], Y[at : at + 8]) for at in range(0, 40, 8)])


NOISY = {"data": (X, Y), "batch_size": 8, "learning_rate": 0.05}
RUNS: dict[str, dict[str, Any]] = {
    "mini-batches": NOISY,
    "a rate of the optimizer": {**NOISY, "learning_rate": "auto", "optimizer": optax.adam(0.1)},
    "last": {**NOISY, "keep_best": False},
    "average": {**NOISY, "learning_rate": "auto", "optimizer": optax.contrib.schedule_free_adamw(0.1)},
    "average, last": {
        **NOISY,
        "learning_rate": "auto",
        "optimizer": optax.contrib.schedule_free_sgd(0.1),
        "keep_best": False,
    },
    "too high a rate": {**NOISY, "learning_rate": 0.6},  # most points are above the start
    "stream": {"data": stream, "learning_rate": 0.05},
    "key": {"loss": drawn, "data": (X, Y), "with_key": True, "learning_rate": 0.05},
    "full batch": {"loss": whole, "learning_rate": 0.05, "tol": 0},
    "full batch, last": {"loss": whole, "learning_rate": 0.05, "tol": 0, "keep_best": False},
    "full batch, average": {"loss": whole, "optimizer": optax.contrib.schedule_free_sgd(0.1), "tol": 0},
    "trials": {"loss": lambda w: (1 - w[0]) ** 2 + 100 * (w[1] + 2 - w[0] ** 2) ** 2 + w[2] ** 4, "tol": 0},
    "swinging": {"loss": lambda w: jnp.sum(jnp.abs(w - 0.1)), "learning_rate": 0.3, "tol": 0},
}


TELL_NO_RATE = {"a rate of the optimizer", "average", "average, last", "full batch, average", "trials"}


def minimize(loss: Any = loss, **options: Any) -> gdopt.Result:
    return gdopt.minimize(loss, jnp.ones(3), **{"max_steps": STEPS, **options})


def bits(result: gdopt.Result) -> list[bytes]:
    kept = result.params, result.loss, result.grad_norm, result.steps, int(result.status), result.history
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(kept)]


def single_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each chunk have one step, as if a step took long."""
    monkeypatch.setattr(host_loop, "_CHUNK_SECONDS", 0.0)


def reports_of(**options: Any) -> tuple[list[gdopt.Report], gdopt.Result]:
    reports: list[gdopt.Report] = []
    return reports, minimize(callback=reports.append, **options)


# ------------------------------------------------------------------------------------------------------------ the steps


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
@pytest.mark.parametrize("name", RUNS)
def test_each_report_is_what_a_run_of_its_steps_returns(name: str, slow: bool, monkeypatch: Any) -> None:
    if slow:
        single_steps(monkeypatch)
    reports, result = reports_of(**RUNS[name], callback_every=7)
    assert bits(result) == bits(minimize(**RUNS[name]))
    ends = [7, 14, 21, result.steps]
    assert len(reports) == len(ends)
    for report, end in zip(reports, ends, strict=True):
        alone = minimize(**{**RUNS[name], "max_steps": end})
        assert report.params.tobytes() == alone.params.tobytes()
        assert (report.loss, report.grad_norm) == (alone.loss, alone.grad_norm)
        first = minimize(**{**RUNS[name], "max_steps": report.step})
        assert report.params.tobytes() == first.params.tobytes()
        assert report.step <= end
        assert math.isnan(report.learning_rate) == (name in TELL_NO_RATE)
    if name not in ("trials", "swinging"):
        assert [report.step for report in reports] == ends


@pytest.mark.parametrize("name", ["mini-batches", "too high a rate", "stream", "key", "average"])
def test_by_the_clock_no_step_of_a_noisy_run_comes_twice(name: str, monkeypatch: Any) -> None:
    """The last point below the first loss may be an old one, of before the last report."""
    single_steps(monkeypatch)
    reports, result = reports_of(**RUNS[name])
    steps = [report.step for report in reports]
    assert (np.diff(steps) > 0).all(), steps
    assert bits(result) == bits(minimize(**RUNS[name]))


@pytest.mark.parametrize("name", RUNS)
def test_by_the_clock_each_report_belongs_to_its_step(name: str, monkeypatch: Any) -> None:
    single_steps(monkeypatch)
    reports, result = reports_of(**RUNS[name])
    assert bits(result) == bits(minimize(**RUNS[name]))
    assert len(reports) >= 10
    for report in reports[::6]:
        if report.step:
            alone = minimize(**{**RUNS[name], "max_steps": report.step})
            assert report.params.tobytes() == alone.params.tobytes()
            assert name == "stream" or report.loss == alone.loss  # which evaluates its last point on the last batch
    assert reports[-1].params.tobytes() == result.params.tobytes()
    assert reports[-1].loss == result.loss


@pytest.mark.parametrize("name", ["mini-batches", "stream", "average", "last"])
def test_at_the_end_of_each_epoch(name: str) -> None:
    reports, result = reports_of(**RUNS[name], callback_every="epoch")
    assert [report.step for report in reports] == [5, 10, 15, 20, STEPS]
    assert [report.epoch for report in reports] == [1, 2, 3, 4, 4]
    assert [report.epoch_ended for report in reports] == [True] * 4 + [False]
    assert reports[-1].loss == result.loss
    reports, _ = reports_of(**RUNS[name], callback_every="epoch", epochs=3, max_steps=None)
    assert [report.step for report in reports] == [5, 10, 15]  # The last one comes once.


def test_an_epoch_of_a_full_batch_is_a_step() -> None:
    reports, _ = reports_of(data=(X, Y), learning_rate=0.05, max_steps=4, tol=0, callback_every="epoch")
    assert [(report.step, report.epoch, report.epoch_ended) for report in reports] == [
        (k, k, True) for k in range(1, 5)
    ]


def test_every_step() -> None:
    reports, _ = reports_of(**NOISY, callback_every=1)
    assert [report.step for report in reports] == list(range(1, STEPS + 1))
    assert [report.step for report in reports if report.epoch_ended] == [5, 10, 15, 20]


def test_the_steps_do_not_depend_on_where_a_run_resumes(tmp_path: Path) -> None:
    run = functools.partial(minimize, **NOISY, checkpoint=tmp_path / "run", callback_every=4)
    seen: list[int] = []
    run(callback=lambda report: seen.append(report.step) or report.step == 12)
    run(callback=lambda report: seen.append(report.step))
    assert seen == [4, 8, 12, 16, 20, STEPS]


def test_a_run_that_converged_is_reported_at_its_end() -> None:
    reports, result = reports_of(loss=whole, learning_rate=0.1, max_steps=500, callback_every=10**6)
    assert (len(reports), result.status) == (1, Status.CONVERGED)
    assert reports[0].params.tobytes() == result.params.tobytes()
    assert reports[0].learning_rate == np.float32(0.1)


def test_a_stream_that_ends_too_early_is_reported_at_its_end() -> None:
    reports, result = reports_of(data=stream(), learning_rate=0.05, callback_every=3)
    assert (result.status, [report.step for report in reports]) == (Status.DATA_EXHAUSTED, [3, 5])


# ------------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("name", RUNS)
def test_a_stop_returns_what_was_reported(name: str) -> None:
    reports: list[gdopt.Report] = []
    stops = lambda report: reports.append(report) or len(reports) == 2
    result = minimize(**RUNS[name], callback=stops, callback_every=6)
    assert (result.status, result.steps, len(reports)) == (Status.STOPPED, 12, 2)
    assert result.params.tobytes() == reports[1].params.tobytes()
    assert (result.loss, result.grad_norm) == (reports[1].loss, reports[1].grad_norm)
    assert result.success


def test_a_stop_above_the_start_is_no_success() -> None:
    run = functools.partial(minimize, whole, callback=lambda report: True, callback_every=3)
    assert run(learning_rate=0.01).success
    assert run(learning_rate=2.0).success  # the best point, which is the start
    assert not run(learning_rate=2.0, keep_best=False).success
    stopped = minimize(**{**NOISY, "learning_rate": 2.0}, callback=lambda report: True, callback_every=PER_EPOCH)
    assert (stopped.status, stopped.success) == (Status.STOPPED, False)


def test_an_error_of_the_callback_is_no_success() -> None:
    def fails(report: gdopt.Report) -> None:
        raise OSError

    with pytest.raises(OSError, match="gdopt") as caught:
        minimize(**NOISY, callback=fails, callback_every=5)
    result: Any = caught.value
    assert (result.result.status, result.result.success, result.result.steps) == (Status.STOPPED, False, 5)


AUX: dict[str, Any] = {"loss": lambda w, batch: (loss(w, batch), {"largest": jnp.max(w)}), "has_aux": True}
LACKING: dict[str, tuple[dict[str, Any], str]] = {
    "no validation": (AUX, r"are empty without validation=, because only .* records the aux of each step"),
    "no epoch": (
        AUX | {"validation": (X, Y), "callback_every": 1},
        r'empty before the end of the first epoch.*="epoch"',
    ),
    "no aux": ({"validation": (X, Y), "callback_every": "epoch"}, r"are empty, because .* has_aux=True"),
    "another name": (AUX | {"validation": (X, Y), "callback_every": "epoch"}, r"hold 'largest'\."),
}


@pytest.mark.parametrize(("options", "note"), LACKING.values(), ids=LACKING)
@pytest.mark.parametrize("field", ["metrics", "validation_metrics"])
def test_a_callback_that_looks_up_a_metric_that_is_not_there_is_told_why(
    options: dict[str, Any], note: str, field: str
) -> None:
    with pytest.raises(KeyError) as caught:
        minimize(**NOISY, **options, callback=lambda report: getattr(report, field)["accuracy"] > 2)
    assert re.search(rf"gdopt: report\.metrics .*{note}", "\n".join(caught.value.__notes__))


def test_another_error_of_the_callback_gets_no_note_on_metrics() -> None:
    with pytest.raises(KeyError) as caught:
        minimize(**NOISY, **AUX, validation=(X, Y), callback_every="epoch", callback=lambda r: {}["largest"])
    assert "report.metrics" not in "\n".join(caught.value.__notes__)


# ------------------------------------------------------------------------------------------------------------- the rest


def test_a_report_prints_a_few_lines() -> None:
    (report, *_), _ = reports_of(**NOISY, callback_every=5, validation=(X, Y))
    lines = str(report).splitlines()
    assert lines[0] == "gdopt.Report"
    assert lines[2].split(maxsplit=1) == ["epoch", "1, which has just ended"]
    names = [line.split()[0] for line in lines[1:]]
    assert names == ["step", "epoch", "loss", "grad_norm", "learning_rate", "validation_loss", "params"]


def test_a_report_of_an_optimizer_without_rates_prints_none() -> None:
    reports: list[gdopt.Report] = []
    gdopt.minimize(lambda x: jnp.sum((x - 1) ** 4), jnp.zeros(3), callback=reports.append, max_steps=5)
    assert "learning_rate" not in str(reports[0])


def test_reports_have_the_validation_of_the_last_epoch() -> None:
    def with_aux(w: Any, batch: Any) -> Any:
        return loss(w, batch), {"largest": jnp.max(w)}

    reports, result = reports_of(loss=with_aux, has_aux=True, **NOISY, callback_every=3, validation=(X, Y))
    assert [report.step for report in reports] == [*range(3, STEPS, 3), STEPS]
    for report in reports:
        if report.step < PER_EPOCH:
            assert math.isnan(report.validation_loss)
            assert report.metrics == report.validation_metrics == {}
            continue
        epoch = min(report.step // PER_EPOCH, 4) - 1
        assert report.validation_loss == result.history.validation_loss[epoch]
        assert report.metrics["largest"] == pytest.approx(result.history.metrics["largest"][epoch], rel=1e-6)
        assert report.validation_metrics["largest"] == result.history.validation_metrics["largest"][epoch]


def test_nothing_is_compiled_for_the_next_run() -> None:
    run = lambda rate: minimize(**{**NOISY, "learning_rate": rate}, callback=lambda report: None, callback_every=5)
    run(0.05)
    with count_compilations() as counter:
        run(0.04)
    assert counter.names == []


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "zero": ({"callback_every": 0}, 'callback_every=0 is not a whole number from 1 to 10\\*\\*9, or "epoch"'),
    "half": ({"callback_every": 1.5}, r"callback_every=1\.5 is not a whole number"),
    "text": ({"callback_every": "step"}, "callback_every='step' is not a whole number"),
    "alone": ({"callback_every": 3, "callback": None}, "callback_every=3 was given without a callback"),
    "no data": (
        {"loss": whole, "data": None, "batch_size": None, "callback_every": "epoch"},
        'callback_every="epoch" was given without data',
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with count_compilations() as counter, pytest.raises(gdopt.InputError, match=message):
        minimize(**{**NOISY, "callback": print, **options})
    assert counter.names == []


def test_it_is_refused_inside_transformations() -> None:
    fit: Callable = lambda shift: minimize(lambda w: whole(w + shift), callback=print, callback_every=3).loss
    with pytest.raises(gdopt.InputError, match=r"callback=.* was given to minimize inside jit"):
        jax.jit(fit)(1.0)
