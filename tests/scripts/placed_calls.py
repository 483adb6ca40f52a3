"""Each way to place arrays, with each way to call, in a process with eight devices: one answer, or an InputError."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import gdopt

assert jax.device_count() == 8
DEVICES = jax.devices()
ROWS = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
START = np.full(4, 0.1, np.float32)


def mesh(kind: AxisType = AxisType.Auto, devices: Any = DEVICES) -> Mesh:
    return Mesh(np.asarray(devices), ("data",), axis_types=(kind,))


AUTO, EXPLICIT, FOUR = mesh(), mesh(AxisType.Explicit), mesh(devices=DEVICES[:4])
BACKWARDS, ONE = mesh(devices=DEVICES[::-1]), mesh(devices=DEVICES[5:6])
MIXED = Mesh(np.reshape(DEVICES, (4, 2)), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Explicit))


def at(array: Any, number: int) -> jax.Array:
    return jax.device_put(array, DEVICES[number])


def copied(array: Any, mesh: Mesh) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, P()))


def split(array: Any, mesh: Mesh, *more: str, memory: str | None = None) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, P("data", *more), memory_kind=memory))


def pinned(array: Any) -> jax.Array:
    return jax.device_put(array, SingleDeviceSharding(DEVICES[0], memory_kind="pinned_host"))


PLACES: dict[str, Callable[[], tuple[Any, Any]]] = {  # the start and the rows
    "host": lambda: (START, ROWS),
    "uncommitted": lambda: (jnp.asarray(START), jnp.asarray(ROWS)),
    "rows on 5": lambda: (START, at(ROWS, 5)),
    "start on 5": lambda: (at(START, 5), jnp.asarray(ROWS)),
    "both on 5": lambda: (at(START, 5), at(ROWS, 5)),
    "on 0 and 1": lambda: (at(START, 0), at(ROWS, 1)),
    "split": lambda: (START, split(ROWS, AUTO)),
    "split, copied": lambda: (copied(START, AUTO), split(ROWS, AUTO)),
    "split, on 0": lambda: (at(START, 0), split(ROWS, AUTO)),
    "split over four": lambda: (split(START, FOUR), split(ROWS, FOUR)),
    "four and eight": lambda: (copied(START, FOUR), split(ROWS, AUTO)),
    "backwards": lambda: (copied(START, AUTO), split(ROWS, BACKWARDS)),
    "a mesh of one": lambda: (START, split(ROWS, ONE)),
    "0 and a mesh of one": lambda: (at(START, 0), split(ROWS, ONE)),
    "explicit": lambda: (START, split(ROWS, EXPLICIT)),
    "explicit, copied": lambda: (copied(START, EXPLICIT), split(ROWS, EXPLICIT)),
    "mixed": lambda: (START, split(ROWS, MIXED, "model")),
    "pinned": lambda: (START, pinned(ROWS)),
    "pinned start": lambda: (pinned(START), ROWS),
}
ON: dict[str, set[int]] = {"rows on 5": {5}, "start on 5": {5}, "both on 5": {5}, "a mesh of one": {5}}
ON |= {name: {*range(8)} for name in ("split", "split, copied", "split, on 0", "explicit", "explicit, copied", "mixed")}
ON |= {"split over four": {*range(4)}, "host": {0}, "uncommitted": {0}}
AROUND: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "mesh": lambda: jax.set_mesh(AUTO),
    "explicit mesh": lambda: jax.set_mesh(EXPLICIT),
    "default device": lambda: jax.default_device(DEVICES[3]),
}


def loss(w: Any, rows: Any) -> jax.Array:
    return jnp.mean((jnp.tanh(rows @ w) - jnp.sin(rows.sum(1))) ** 2)


def fit(start: Any, **options: Any) -> Any:
    function = options.pop("function", loss)
    return gdopt.minimize(function, start, **{"learning_rate": 0.1, "max_steps": 3, **options}).params


def stream(rows: Any) -> Callable:
    return lambda: iter([rows] * 3)


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "data": lambda start, rows: fit(start, data=rows),
    "args": lambda start, rows: fit(start, args=(rows,)),
    "batches": lambda start, rows: fit(start, data=rows, batch_size=16),
    "closed over": lambda start, rows: fit(start, function=lambda w: loss(w, rows)),
    "stream": lambda start, rows: fit(start, data=stream(rows)),
    "gd_step": lambda start, rows: gdopt.gd_step(loss, start, 0.1, rows)[0],
    "gd_step, closed over": lambda start, rows: gdopt.gd_step(lambda w: loss(w, rows), start, 0.1)[0],
    "lr_find": lambda start, rows: gdopt.lr_find(loss, start, data=rows, batch_size=16, num_steps=20).loss[:9],
}


def is_refused(place: str, call: str, around: str) -> bool | None:
    """Tell whether the call raises InputError; None if it may or may not."""
    if place in ("four and eight", "backwards", "pinned") or place.startswith("pinned"):
        return None if place.startswith("pinned") else True
    if "mesh" in around and place in ("split over four", "mixed"):  # Another mesh than the one that is set.
        return True
    if "mesh" not in around and place in ("on 0 and 1", "0 and a mesh of one"):
        return True
    # JAX itself cannot trace the gradient of this loss there, and gdopt cannot move what a loss closes over.
    return None if "closed over" in call and place in ("explicit", "explicit, copied", "mixed") else False


QUICK = {
    "nothing": ("data", "batches", "closed over", "gd_step"),
    "explicit mesh": ("data", "closed over", "gd_step", "stream"),
    "mesh": ("data",),
    "default device": ("data",),
}
CELLS = [
    pytest.param(place, call, around, marks=[] if call in QUICK[around] else pytest.mark.slow)
    for around in AROUND
    for place in PLACES
    for call in CALLS
]


@pytest.mark.parametrize(("place", "call", "around"), CELLS)
def test_the_answer_is_that_of_one_device_or_an_input_error(place: str, call: str, around: str) -> None:
    expected = CALLS[call](START, ROWS)
    start, rows = PLACES[place]()
    refused = is_refused(place, call, around)
    with AROUND[around]():
        try:
            answer = CALLS[call](start, rows)
        except gdopt.InputError:
            assert refused is not False
            return
        if isinstance(answer, jax.Array):
            jax.block_until_ready(answer + 1)  # The caller can use it there.
    assert not refused
    np.testing.assert_allclose(answer, expected, rtol=1e-3, atol=1e-5)
    if place in ON and isinstance(answer, jax.Array):
        moved = {*range(8)} if "mesh" in around else {3} if around == "default device" else ON[place]
        stays = around == "default device" and place not in ("host", "uncommitted")  # Committed arrays win.
        assert {device.id for device in answer.devices()} == (ON[place] if stays else moved)


def falling(rates: jax.Array) -> Callable:
    return lambda step: rates[0] / (1 + step)


CONFLICTS = {
    "params": (
        lambda: fit({"a": START, "w": at(START, 0)}, args=(at(ROWS, 1),)),
        r"params\['w'\] is on .*:0, and args",
    ),
    "data": (
        lambda: fit(at(START, 2), data=(ROWS, at(ROWS, 4))),
        r"params is on .*:2, and data\[1\] is on .*:4\. Place",
    ),
    "key": (
        lambda: fit(at(START, 2), function=lambda w, key: w.sum(), with_key=True, key=at(jax.random.key(0), 1)),
        "params is on .*:2, and key is on .*:1",
    ),
    "closed over": (
        lambda: CALLS["closed over"](at(START, 0), at(ROWS, 1)),
        "and what the loss closes over is on .*:1",
    ),
    "gd_step": (lambda: CALLS["gd_step"](at(START, 0), at(ROWS, 1)), r"params is on .*:0, and args\[0\] is on .*:1"),
    "schedule": (
        lambda: fit(at(START, 0), args=(ROWS,), learning_rate=falling(at(np.full(3, 0.1, np.float32), 1))),
        "params is on .*:0, and what the schedule closes over is on .*:1",
    ),
    "later batch": (
        lambda: fit(START, data=lambda: iter([ROWS, at(ROWS, 0), at(ROWS, 1)])),
        "an earlier batch of data is on .*:0, and a batch of data is on .*:1",
    ),
    "pinned": (
        lambda: CALLS["data"](START, pinned(ROWS)),
        r"in the memory of the host\. Move them to the device first",
    ),
    "vmap": (
        lambda: jax.vmap(lambda w: fit(w, args=(at(ROWS, 1),)))(at(START[None], 0)),
        r"They are on different devices\. Place",
    ),
}


@pytest.mark.parametrize(("call", "message"), CONFLICTS.values(), ids=CONFLICTS)
def test_a_conflict_names_both_arrays(call: Callable, message: str) -> None:
    with pytest.raises(gdopt.InputError, match=message):
        call()


def test_another_mesh_than_the_one_that_is_set_is_named() -> None:
    with jax.set_mesh(AUTO), pytest.raises(gdopt.InputError, match=r"jax.set_mesh has set a mesh of .* and data is on"):
        fit(START, data=split(ROWS, FOUR))


def test_callbacks_streams_and_results_are_on_the_mesh_that_is_set() -> None:
    seen = []

    def callback(report: Any) -> None:
        seen.append(report.params + jnp.zeros(4))  # Arrays on Auto axes would raise here.

    def batches() -> Any:
        for _ in range(3):
            yield jnp.asarray(ROWS) * jnp.ones(4)[None]

    with jax.set_mesh(EXPLICIT):
        answer = fit(START, data=batches, callback=callback)
        failed = gdopt.minimize(lambda w: jnp.sum(jnp.log(w)), START, learning_rate=1.0)
        assert gdopt.diagnose(failed).primitive == "log"
        assert answer.sharding.mesh == seen[-1].sharding.mesh == EXPLICIT
    np.testing.assert_allclose(answer, fit(START, data=stream(ROWS)), rtol=1e-5)


def test_errors_of_callbacks_and_streams_stay_as_they_are() -> None:
    def fail(*_: Any) -> Any:
        return at(START, 0) + at(START, 1)

    for options in ({"data": ROWS, "callback": fail}, {"data": lambda: iter(map(fail, [ROWS] * 3))}):
        with pytest.raises(ValueError, match="incompatible devices") as caught:
            fit(START, **options)
        assert not isinstance(caught.value, gdopt.InputError)


def mapped(function: Callable, out: Any, **options: Any) -> Any:
    return jax.shard_map(function, mesh=AUTO, in_specs=(P(), P("data")), out_specs=out, **options)(START, ROWS)


def common(w: Any, rows: Any) -> jax.Array:
    return jax.lax.pmean(loss(w, rows), "data")


def test_one_run_inside_shard_map() -> None:
    answer = mapped(lambda start, rows: fit(start, function=common, data=rows), P())
    np.testing.assert_allclose(answer, fit(START, data=ROWS), rtol=1e-4)
    rows = lambda rows: jnp.tile(rows[:1], (8, 1))  # so that any batch has the same
    batches = mapped(lambda start, given: fit(start, function=common, data=rows(given), batch_size=4), P())
    np.testing.assert_allclose(batches, fit(START, data=ROWS[::8]), rtol=1e-4)


def test_a_run_on_each_device_inside_shard_map() -> None:
    each = mapped(lambda start, rows: fit(start, data=rows)[None], P("data"), check_vma=False)
    alone = [fit(START, data=ROWS[8 * k : 8 * k + 8]) for k in range(8)]
    np.testing.assert_allclose(each, alone, rtol=1e-4, atol=1e-6)


def test_devices_that_would_end_at_different_steps_are_refused() -> None:
    with pytest.raises(gdopt.InputError, match=r"differ between the devices of 'data'\..*pmean"):
        mapped(lambda start, rows: fit(start, data=rows)[None], P("data"))
    with pytest.raises(gdopt.InputError, match=r"summed up over 'data', .* check_vma=True"):
        mapped(lambda start, rows: fit(start, function=common, data=rows), P(), check_vma=False)


def test_programs_of_one_default_device_are_not_those_of_another() -> None:
    for number in (3, 4, 3):
        with jax.default_device(DEVICES[number]):
            assert fit({"w": START, "c": 1.0}, function=lambda p: loss(p["w"], ROWS) * p["c"])["c"].devices() == {
                DEVICES[number]
            }


@pytest.mark.filterwarnings("ignore:this call differs from the run saved in .*max_steps=")
def test_a_run_with_mixed_places_resumes(tmp_path: Any) -> None:
    for name, place in (("on 5", "rows on 5"), ("explicit", "explicit, copied")):
        start, rows = PLACES[place]()
        for steps in (2, 3):
            with jax.set_mesh(EXPLICIT) if name == "explicit" else contextlib.nullcontext():
                answer = fit(start, data=rows, max_steps=steps, checkpoint=tmp_path / name)
        np.testing.assert_allclose(answer, fit(START, data=ROWS), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:this call differs from the run saved in .*max_steps=")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_loss_with_shard_map_resumes(kind: AxisType, tmp_path: Any) -> None:
    rows = split(ROWS, mesh(kind))
    whole = jax.shard_map(common, mesh=mesh(kind), in_specs=(P(), P("data")), out_specs=P())
    for steps in (2, 3):
        answer = fit(copied(START, mesh(kind)), function=whole, data=rows, max_steps=steps, checkpoint=tmp_path / "run")
    np.testing.assert_allclose(answer, fit(START, data=ROWS), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:this call differs from the run saved in .*max_steps=")
@pytest.mark.parametrize("optimizer", [None, optax.adam], ids=["default", "adam"])
def test_a_run_resumes_within_a_mesh_and_outside_of_it(optimizer: Any, tmp_path: Any) -> None:
    rate = {} if optimizer is None else {"optimizer": optimizer, "learning_rate": 0.1}
    run = lambda **options: gdopt.minimize(
        lambda w: jnp.sum(jnp.where(w > 9, 0.0, w - 1) ** 4), jnp.zeros(2), tol=0, **rate, **options
    )
    places = (contextlib.nullcontext(), jax.set_mesh(AUTO), contextlib.nullcontext(), jax.set_mesh(EXPLICIT))
    for number, place in enumerate(places, 1):
        with place, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = run(max_steps=4 * number, checkpoint=tmp_path / "run")
        assert all("this call differs" in str(one.message) or "was made on" in str(one.message) for one in caught)
        assert result.steps == 4 * number
    np.testing.assert_allclose(np.asarray(result.params), run(max_steps=16).params, rtol=1e-5)


@pytest.mark.parametrize("scale", [2.0, "curvature", np.full(3, 2.0, np.float32)], ids=["number", "curvature", "array"])
def test_a_scale_within_an_explicit_mesh(scale: Any) -> None:
    with jax.set_mesh(EXPLICIT):
        result = gdopt.minimize(lambda w: jnp.sum((w - 1) ** 2), jnp.full(3, 3.0, jnp.float32), scale=scale)
    np.testing.assert_allclose(np.asarray(result.params), 1, rtol=1e-4)


def test_a_zero_gradient_is_told_wherever_the_rows_are() -> None:
    with jax.set_mesh(AUTO), pytest.warns(UserWarning, match="the gradient is exactly zero everywhere"):
        fit(START, function=lambda w, rows: jnp.sum(rows) + 0 * jnp.sum(w), data=split(ROWS, EXPLICIT))


def test_a_run_inside_jit_may_close_over_rows_on_a_mesh() -> None:
    rows = split(ROWS, AUTO)
    answer = jax.jit(lambda scale: fit(START, function=lambda w, rows: scale * loss(w, rows), args=(rows,)))(1.0)
    np.testing.assert_allclose(answer, fit(START, data=ROWS), rtol=1e-5)
