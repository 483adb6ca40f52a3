"""Tests for test_sharding.py to run in a process with eight devices; the shardings are read off programs."""

from __future__ import annotations

import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gdopt
from gdopt._loop import loop
from gdopt._loop.state import Carry, Compiled
from gdopt._optimizers.method import make_method
from gdopt._problem.objective import make_objective
from gdopt._problem.problem import make_problem
from gdopt._stopping import Limits

assert jax.device_count() == 8
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
ROWS = np.random.default_rng(0).normal(size=(64, 160)).astype(np.float32)
START = {"w": np.full((160, 128), 0.01, np.float32), "b": np.zeros((1, 128), np.float32)}  # w is large, b is not


def loss(params, rows):
    return jnp.mean((jnp.tanh(rows @ params["w"] + params["b"]) - jnp.sin(rows[:, :1])) ** 2)


CALLS: dict[str, dict[str, Any]] = {
    "spectral": {},
    "gd": {"learning_rate": 0.1},
    "adam": {"optimizer": optax.adam, "learning_rate": 0.01},
    "batches": {"optimizer": optax.adam, "learning_rate": 0.01, "batch_size": 16},
    "ready": {"optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01))},
}


def sharded(mesh: Mesh = MESH, start: Any = START, rows: Any = ROWS) -> tuple[Any, Any]:
    return gdopt.shard(start, mesh, largest="data"), gdopt.shard(rows, mesh, rows="data")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("devices", [8, 1])
@pytest.mark.parametrize("how", ["args", "closed over", "data", "batches", "nothing on the mesh"])
def test_losses_may_use_shard_map(how: str, devices: int, kind: Any) -> None:
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",), axis_types=(kind,))
    rows = jax.device_put(ROWS[:, :3], NamedSharding(mesh, P("data")))
    start = jax.device_put(jnp.zeros(3), NamedSharding(mesh, P()))
    mean = lambda x, rows: jax.lax.pmean(jnp.mean((x[None] - rows) ** 2), "data")
    mapped = jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    whole = jax.shard_map(lambda x: jnp.mean((x[None] - ROWS[:, :3]) ** 2), mesh=mesh, in_specs=P(), out_specs=P())
    call = {
        "args": lambda **options: gdopt.minimize(mapped, start, args=(rows,), **options),
        "closed over": lambda **options: gdopt.minimize(lambda x: mapped(x, rows), start, **options),
        "data": lambda **options: gdopt.minimize(mapped, start, data=rows, **options),
        "batches": lambda **options: gdopt.minimize(mapped, start, data=rows, batch_size=64, **options),
        "nothing on the mesh": lambda **options: gdopt.minimize(whole, jnp.zeros(3), **options),
    }[how]
    expected = np.zeros(3)
    for _ in range(3):
        expected = expected - 0.3 * 2 / 3 * (expected - ROWS[:, :3].mean(0))
    np.testing.assert_allclose(call(learning_rate=0.3, max_steps=3).params, expected, rtol=1e-4)
    if how == "args":
        np.testing.assert_allclose(call().params, ROWS[:, :3].mean(0), atol=1e-3)


def shares(leaf: jax.Array) -> list[tuple[int, ...]]:
    return [part.data.shape for part in leaf.addressable_shards]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gd", AxisType.Auto),
        ("batches", AxisType.Explicit),
        *(pytest.param(name, kind, marks=pytest.mark.slow) for name in CALLS for kind in AxisType),
    ],
)
def test_a_run_on_eight_devices_stays_there_and_equals_a_run_on_one(name, kind) -> None:
    mesh, options = jax.make_mesh((8,), ("data",), axis_types=(kind,)), CALLS[name]
    with jax.enable_x64(True):
        seen = []
        keep = lambda report: seen.append(report.params) and None
        start, wide = jax.tree.map(lambda leaf: leaf.astype(float), (START, ROWS))
        params, rows = sharded(mesh, start, wide)
        many = gdopt.minimize(loss, params, data=rows, max_steps=30, callback=keep, **options)
        one = gdopt.minimize(loss, start, data=wide, max_steps=30, **options)
        for answer in (many.params, seen[-1]):
            assert shares(answer["w"]) == [(20, 128)] * 8
            assert shares(answer["b"]) == [(1, 128)] * 8
        assert (many.status, many.steps) == (one.status, one.steps)
        np.testing.assert_allclose(many.history.loss, one.history.loss, rtol=1e-10)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), many.params, one.params)


def compiled_chunk(params: Any, rows: Any, **options: Any) -> tuple[Carry, str]:
    """Return the state after three steps, and the text of the program that made them."""
    batch_size, rate = options.pop("batch_size", None), options.pop("learning_rate", "auto")
    problem = make_problem(
        make_objective(loss, params), args=(), data=rows, batch_size=batch_size, with_key=False, key=None
    )
    method = make_method(options.pop("optimizer", gdopt.gd), rate)
    key = problem.key if problem.noisy else None
    compiled, inputs = loop.compile(problem, method, Limits(100, 0.0, None, -np.inf), key)
    assert isinstance(compiled, Compiled)
    chunk = jax.jit(compiled.chunk).lower(compiled.start(inputs), np.int32(0), np.int32(3), inputs).compile()
    carry, _ = chunk(compiled.start(inputs), np.int32(0), np.int32(3), inputs)
    return carry, chunk.as_text() or ""


FAST = ("spectral", "batches")


@pytest.mark.parametrize(
    "options", [pytest.param(CALLS[name], id=name, marks=() if name in FAST else pytest.mark.slow) for name in CALLS]
)
def test_the_state_is_split_and_no_data_are_gathered(options) -> None:
    params, rows = sharded()
    carry, text = compiled_chunk(params, rows, **options)
    large = [leaf for leaf in jax.tree.leaves(carry) if leaf.shape == START["w"].shape]
    moments = {"adam": 2, "batches": 2, "ready": 2, "spectral": 2}.get(next(k for k in CALLS if CALLS[k] is options), 0)
    assert len(large) == 2 + moments  # the params and the best
    assert all(shares(leaf) == [(20, 128)] * 8 for leaf in large)
    # Only the params are brought together, for the product with them; and of a batch the row numbers.
    gathered = re.findall(r"= \(?(\w+)\[([\d,]*)\]\S* all-gather", text)
    allowed = {("f32", "160,128"), ("s32", "16,1"), ("s32", "16")}
    assert set(gathered) <= allowed, gathered
    assert "all-to-all" not in text


def test_the_data_stay_where_they_are_without_split_params() -> None:
    """The common case: rows over the devices, a copy of the params on each. One all-reduce of the gradient."""
    _, text = compiled_chunk(gdopt.shard(START, MESH), gdopt.shard(ROWS, MESH, rows="data"), learning_rate=0.1)
    assert "all-reduce" in text
    assert not re.search("all-gather|all-to-all|collective-permute", text)


def test_arrays_in_a_closure_stay_split() -> None:
    _, rows = sharded()
    problem = make_problem(
        make_objective(lambda p: loss(p, rows), START), args=(), data=None, batch_size=None, with_key=False, key=None
    )
    method = make_method(gdopt.gd, 0.1)
    _, inputs = loop.compile(problem, method, Limits(9, 0.0, None, -np.inf), None)
    assert shares(inputs.constants[0]) == [(8, 160)] * 8
    result = gdopt.minimize(lambda p: loss(p, rows), START, learning_rate=0.1, max_steps=3)
    assert shares(result.params["w"]) == [(160, 128)] * 8


def test_params_from_the_host_are_copied_to_each_device() -> None:
    result = gdopt.minimize(loss, START, data=sharded()[1], learning_rate=0.1, max_steps=3)
    assert shares(result.params["w"]) == [(160, 128)] * 8


def test_a_second_run_compiles_nothing_and_another_layout_is_another_program() -> None:
    from helpers import count_compilations

    def run(params):
        return gdopt.minimize(lambda p, r: loss(p, r), params, data=rows, learning_rate=0.1, max_steps=3).params["w"]

    params, rows = sharded()
    copies = gdopt.shard(START, MESH)
    first = run(params)
    with count_compilations() as counter:
        assert shares(run(params)) == shares(first)
    assert counter.names == []
    assert shares(run(copies)) == [(160, 128)] * 8
    assert shares(run(params)) == shares(first)


@pytest.mark.slow
def test_two_axes() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    params = gdopt.shard(START, mesh, largest="model")
    rows = gdopt.shard(ROWS, mesh, rows="data")
    result = gdopt.minimize(loss, params, data=rows, batch_size=16, learning_rate=0.1, max_steps=5)
    assert shares(params["w"]) == shares(result.params["w"]) == [(80, 128)] * 8
    alone = gdopt.minimize(loss, START, data=ROWS, batch_size=16, learning_rate=0.1, max_steps=5)
    np.testing.assert_allclose(result.history.loss, alone.history.loss, rtol=1e-4)


def test_streams() -> None:
    batches = lambda: (gdopt.shard(ROWS[k : k + 16], MESH, rows="data") for k in range(0, 64, 16))
    streamed = gdopt.minimize(loss, sharded()[0], data=batches, learning_rate=0.1, epochs=2)
    assert (streamed.steps, shares(streamed.params["w"])) == (8, [(20, 128)] * 8)


@pytest.mark.slow
def test_range_tests() -> None:
    params, rows = sharded()
    auto = gdopt.minimize(loss, params, data=rows, batch_size=16, optimizer=optax.adam, max_steps=60)
    assert shares(auto.params["w"]) == [(20, 128)] * 8
    assert auto.range_test.suggestion is not None


@pytest.mark.slow
def test_inside_jit_and_averages() -> None:
    params, rows = sharded()
    inside = jax.jit(lambda p, r: gdopt.minimize(loss, p, args=(r,), learning_rate=0.1, max_steps=5))(params, rows)
    outside = gdopt.minimize(loss, params, args=(rows,), learning_rate=0.1, max_steps=5)
    np.testing.assert_allclose(inside.params["w"], outside.params["w"], rtol=1e-5)
    averaged = optax.contrib.schedule_free_sgd(0.1)
    result = gdopt.minimize(loss, params, data=rows, batch_size=16, optimizer=averaged, max_steps=5)
    assert shares(result.params["w"]) == [(20, 128)] * 8


def test_shard_places_arrays_as_documented() -> None:
    X = {"x": ROWS, "y": jnp.arange(64), "name": "digits"}
    placed = gdopt.shard(X, MESH, rows="data")
    assert (shares(placed["x"]), shares(placed["y"]), placed["name"]) == ([(8, 160)] * 8, [(8,)] * 8, "digits")
    odd = gdopt.shard({"odd": np.zeros((131, 257)), "tall": np.zeros((300, 160))}, MESH, largest="data")
    assert (shares(odd["odd"])[0], shares(odd["tall"])[0]) == ((131, 257), (300, 20))  # 300 does not divide
    assert gdopt.shard(jax.random.key(0), MESH).sharding.is_fully_replicated


def closes_over(rows):
    return lambda params: loss(params, rows)


OTHER = Mesh(np.array(jax.devices()[:4]), ("data",))
BAD = {
    "rows": (
        lambda: gdopt.shard(ROWS[:60], MESH, rows="data"),
        r"data has 60 rows, which is not divisible by the 8 .*\. Pass 56 or 64 rows, or another multiple of 8",
    ),
    "few rows": (lambda: gdopt.shard({"x": ROWS[:3]}, MESH, rows="data"), r"data\['x'\] has 3 rows.* Pass 8 rows, or"),
    "no rows": (lambda: gdopt.shard(np.zeros(()), MESH, rows="data"), "is a scalar and has no rows"),
    "axis": (lambda: gdopt.shard(ROWS, MESH, rows="batch"), "rows='batch' is no axis of the mesh. It has 'data'"),
    "both": (lambda: gdopt.shard(ROWS, MESH, rows="data", largest="data"), "Pass rows for data, largest for params"),
    "no mesh": (lambda: gdopt.shard(ROWS, cast(Any, jax.devices())), r"is not a mesh\. Pass"),
    "batch_size": (
        lambda: gdopt.minimize(loss, START, data=sharded()[1], batch_size=12, learning_rate=0.1),
        r"batch_size=12 is not divisible by the 8 devices that data is split over\. Pass 8 or 16",
    ),
    "two meshes": (
        lambda: gdopt.minimize(loss, gdopt.shard(START, OTHER), data=sharded()[1], learning_rate=0.1),
        r"params\['b'\] is on a mesh of \(data=4\) with devices \[0, 1, 2, 3\], and data is on a mesh of \(data=8\)",
    ),
    "closed over": (
        lambda: gdopt.minimize(closes_over(gdopt.shard(ROWS, OTHER)), gdopt.shard(START, MESH), learning_rate=0.1),
        "and what the loss closes over is on a mesh of",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, message) -> None:
    with pytest.raises(gdopt.InputError, match=message):
        call()


@pytest.mark.parametrize("name", ["spectral", pytest.param("batches", marks=pytest.mark.slow)])
def test_jax_guards_and_checks_change_nothing(name) -> None:
    params, rows = sharded()
    args = jax.device_put((np.float32(2.0), np.ones(3, np.float32)))  # of one device, to be copied to all
    scaled = lambda params, rows, scale, more: loss(params, rows) * scale + jnp.sum(more)
    run = lambda: gdopt.minimize(scaled, params, data=rows, args=args, max_steps=5, **CALLS[name])
    usual = run()
    with jax.transfer_guard("disallow"), jax.debug_nans(True), jax.debug_infs(True):
        guarded = run()
    assert guarded.message == usual.message
    jax.tree.map(np.testing.assert_array_equal, guarded.params, usual.params)


def test_a_run_that_ends_at_the_precision_limit_stays_split() -> None:
    params, rows = sharded()
    limit = gdopt.minimize(lambda p, r: jnp.sum((p["w"] - 1) ** 2) + 1 + 0 * jnp.sum(r), params, data=rows, tol=0.0)
    assert limit.success
    assert shares(limit.params["w"]) == [(20, 128)] * 8


def test_a_mesh_of_one_device_is_not_spread() -> None:
    one = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), P("data"))
    result = gdopt.minimize(loss, START, data=jax.device_put(ROWS, one), learning_rate=0.1, max_steps=3)
    assert result.params["w"].devices() == {jax.devices()[0]}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("scale", ["curvature", 2.0, np.full(8, 2.0, np.float32)])
def test_a_scaled_run_is_the_same_on_one_device(scale: Any, kind: AxisType) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    rows = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    options: dict[str, Any] = {"scale": scale, "learning_rate": 0.05, "max_steps": 20}

    def fit(w: Any, rows: Any) -> Any:
        return jnp.mean((rows @ w - 1) ** 2)

    whole = gdopt.minimize(fit, jnp.ones(8), data=rows, **options)
    spread = gdopt.minimize(fit, jnp.ones(8), data=gdopt.shard(rows, mesh, rows="data"), **options)
    np.testing.assert_allclose(spread.params, whole.params, rtol=1e-5)
    square = lambda w: jnp.sum((w - 3.0) ** 2)
    params = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("data")))
    ours, theirs = (gdopt.minimize(square, start, **options) for start in (params, jnp.ones(8)))
    np.testing.assert_allclose(ours.params, theirs.params, rtol=1e-6)


def test_the_states_of_a_model_and_of_an_optimizer_keep_their_places(tmp_path):
    """Both are split as they were given, also after a resume, and a next run takes them from there."""

    def averaged(params, rows, state):
        new = {"w": 0.9 * state["w"] + 0.1 * params["w"], "n": state["n"] + 1, "mean": rows.mean(axis=0)}
        return loss(params, rows), new

    start, data = gdopt.shard(START, MESH, largest="data"), gdopt.shard(ROWS, MESH, rows="data")
    given = {"w": jnp.zeros((160, 128)), "n": 0, "mean": jnp.zeros(160)}
    state = gdopt.shard(given, MESH, largest="data")
    options: dict[str, Any] = {"batch_size": 16, "optimizer": optax.adam, "learning_rate": 0.01, "max_steps": 6}
    result = gdopt.minimize(averaged, start, data=data, state=state, **options)
    alone = gdopt.minimize(averaged, START, data=ROWS, state=given, **options)
    np.testing.assert_allclose(result.state["w"], alone.state["w"], rtol=1e-4, atol=1e-6)
    assert result.state["n"] == 6
    path = tmp_path / "run"
    gdopt.minimize(averaged, start, data=data, state=state, checkpoint=path, **options | {"max_steps": 4})
    with pytest.warns(UserWarning, match="max_steps"):
        resumed = gdopt.minimize(averaged, start, data=data, state=state, checkpoint=path, **options)
    np.testing.assert_array_equal(resumed.state["w"], result.state["w"])
    states = {"state": result.state, "optimizer_state": result.optimizer_state}
    more = gdopt.minimize(averaged, result.params, data=data, **states, **options)
    assert more.optimizer_state[0].count == 12
    for run in (result, resumed, more):
        assert run.state["w"].sharding.is_equivalent_to(state["w"].sharding, 2)
        assert run.optimizer_state[0].mu["w"].sharding.is_equivalent_to(start["w"].sharding, 2)
