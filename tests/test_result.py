"""A ``Result`` as a pytree: mapped, compiled, batched and printed. Its message stays with its own numbers."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import count_compilations

import gdopt
from gdopt import Status

LOST = "lost in jit, vmap, grad or tree.map"


def bowl(x: Any, scale: Any = 1.0) -> jax.Array:
    return scale * jnp.sum((x - 1) ** 2)


def run(scale: Any = 1.0, **options: Any) -> gdopt.Result:
    options = {"learning_rate": 0.1, "max_steps": 9, "tol": 0, **options}
    return gdopt.minimize(bowl, jnp.zeros(3), args=(scale,), **options)


def stacked(*results: gdopt.Result) -> gdopt.Result:
    """Stack the results of several runs, whose histories may differ in length."""
    short = [dataclasses.replace(result, history=None) for result in results]
    return jax.tree.map(lambda *leaves: jnp.stack(list(map(jnp.asarray, leaves))), *short)


def deleted(result: gdopt.Result) -> gdopt.Result:
    copied = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), result)
    for leaf in jax.tree.leaves(copied):
        leaf.delete()
    return copied


# What may become of a result, and what its repr then says of the status.
PLACES: dict[str, tuple[Callable[[gdopt.Result], Any], str]] = {
    "as it is": (lambda result: result, "MAX_STEPS"),
    "tree.map": (lambda result: jax.tree.map(lambda leaf: leaf, result), "MAX_STEPS"),
    "device_get": (jax.device_get, "MAX_STEPS"),
    "device_put": (jax.device_put, "MAX_STEPS"),
    "jit": (jax.jit(lambda result: result), "MAX_STEPS"),
    "copy": (copy.deepcopy, "MAX_STEPS"),
    "pickle": (lambda result: pickle.loads(pickle.dumps(result)), "MAX_STEPS"),
    "stack": (lambda result: stacked(result, run(target=1.0)), "TARGET_REACHED (1), MAX_STEPS (1)"),
    "vmap": (lambda result: jax.vmap(lambda result: result)(stacked(result, result)), "MAX_STEPS (2)"),
    "vmap of runs": (lambda _: jax.vmap(run)(jnp.array([1.0, 2.0, 3.0])), "MAX_STEPS (3)"),
    "jit of a run": (lambda _: jax.jit(run)(1.0), "MAX_STEPS"),
    "eval_shape": (lambda _: jax.eval_shape(run, 1.0), "int32[]"),
    "sum of two": (lambda result: jax.tree.map(lambda a, b: a + b, result, result), "NON_FINITE"),  # 3 + 3
    "no status": (lambda result: jax.tree.map(lambda leaf: leaf * 100, result), "300"),
    "texts": (lambda result: jax.tree.map(str, result), "'MAX_STEPS'"),
    "objects": (lambda result: jax.tree.map(lambda _: object(), result), "<object"),
    "nothing": (lambda result: jax.tree.map(lambda _: None, result), "None"),
    "deleted": (deleted, "int32[]"),
}
RUNS = {"stack": " of 2 runs", "vmap": " of 2 runs", "vmap of runs": " of 3 runs"}
KEEPS_ITS_MESSAGE = {"as it is", "tree.map", "device_get", "device_put", "copy", "pickle", "deleted"}


@pytest.mark.parametrize("place", PLACES)
def test_it_can_always_be_printed(place: str) -> None:
    result = run()
    changed, status = PLACES[place][0](result), PLACES[place][1]
    lines = repr(changed).splitlines()
    assert lines[0] == "gdopt.Result" + RUNS.get(place, "")
    assert lines[1].startswith(f"  status    {status}")
    assert changed.message == result.message if place in KEEPS_ITS_MESSAGE else changed.message.startswith(LOST)


def test_two_results_have_one_structure() -> None:
    one, other = run(), run(2.0)
    assert one.message != other.message
    assert jax.tree.structure(one) == jax.tree.structure(other)
    apart = jax.tree.map(lambda a, b: a - b, one, other)
    np.testing.assert_array_equal(apart.params, one.params - other.params)
    assert jax.tree.map(lambda a, b: b, one, other).message.startswith(LOST)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(one)]
    assert names[:2] == [".params", ".loss"]


def test_another_result_compiles_nothing_and_keeps_no_message() -> None:
    gap = jax.jit(lambda result: (result, result.loss + jnp.sum(result.params)))
    results = run(), run(2.0)
    gap(results[0])
    with count_compilations() as counter:
        back, _ = gap(results[1])
    assert counter.names == []
    assert back.loss == results[1].loss
    assert back.message.startswith(LOST)


def test_a_result_that_a_jit_closes_over_keeps_its_message() -> None:
    result = run()
    assert jax.jit(lambda: result)().message == result.message


def test_the_numbers_of_a_failed_run_may_be_nan() -> None:
    result = gdopt.minimize(lambda x: x - jnp.log(x), 0.1, learning_rate=9.0, keep_best=False)
    assert np.isnan(result.loss)
    assert jax.device_get(result).message == result.message


def test_a_result_from_a_jit_can_be_raised_and_diagnosed() -> None:
    moved = jax.jit(lambda result: result)(run())
    with pytest.raises(gdopt.NotConvergedError, match=f"^MAX_STEPS: {LOST}"):
        moved.raise_for_status()
    with pytest.raises(gdopt.NotConvergedError, match=r"^1 of 2 runs ended without success: MAX_STEPS \(1\)\.$"):
        stacked(run(), run(target=1.0)).raise_for_status()
    with pytest.raises(gdopt.InputError, match="result ended with MAX_STEPS, not with NON_FINITE"):
        gdopt.diagnose(moved)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "device_get": jax.device_get,
    "tree.map": lambda value: jax.tree.map(
        lambda leaf: np.array(leaf) if isinstance(leaf, np.ndarray) else leaf, value
    ),
}


def nan_run() -> gdopt.Result:
    """Return a result with NaN in its params, its loss and its history."""
    return gdopt.minimize(lambda x: x - jnp.log(x), 0.1, learning_rate=9.0, keep_best=False)


VALUES: dict[str, Callable[[], Any]] = {
    "result": run,
    "result with NaN": nan_run,
    "results": lambda: jax.vmap(run)(jnp.array([1.0, 2.0])),
    "params of all kinds": lambda: gdopt.minimize(
        lambda p: bowl(p["x"]), {"x": jnp.ones(2), "f": len, "s": "s", "n": None, "key": jax.random.key(0)}
    ),
    "a module": lambda: gdopt.minimize(
        lambda module: jnp.mean((jax.vmap(module)(jnp.ones((3, 1))) - 2) ** 2),
        eqx.nn.MLP(1, 1, 4, 1, key=jax.random.key(0)),
        max_steps=3,
    ),
    "history": lambda: nan_run().history,
    "range test": lambda: gdopt.lr_find(bowl, jnp.zeros(3), refine=True),
    "refinement": lambda: gdopt.lr_find(bowl, jnp.zeros(3), refine=True).refinement,
    "report": lambda: gdopt.Report(1, 1, {"x": jnp.ones(3)}, float("nan"), 1.0, 0.1),
    "diagnosis": lambda: gdopt.diagnose(nan_run()),
}


@pytest.mark.parametrize("kind", VALUES)
def test_it_equals_its_copies_and_the_same_call_again(kind: str) -> None:
    value, again = VALUES[kind](), VALUES[kind]()
    skipped = {"diagnosis": "device_get", "a module": "pickle"}  # A module may hold functions that have no pickle.
    copies = {name: made(value) for name, made in COPIES.items() if name != skipped.get(kind)}
    for name, other in {**copies, "again": again}.items():
        assert (value == other) is True, name
        assert (value != other) is False, name
        assert value in [3, other], name


@pytest.mark.parametrize("kind", VALUES)
def test_it_equals_nothing_else(kind: str) -> None:
    value = VALUES[kind]()
    others = [make() for name, make in VALUES.items() if name != kind]
    if not isinstance(value, gdopt.Diagnosis):
        is_number = lambda leaf: getattr(leaf, "dtype", None) in ("f4", "f8") or isinstance(leaf, float)
        others.append(jax.tree.map(lambda leaf: leaf * 0 - 7 if is_number(leaf) else leaf, value))
        others.append(tuple(jax.tree.leaves(value)))
    for other in (None, 3, "text", (), *others):
        assert (value == other) is False
        assert (value != other) is True
        assert value not in [other]
    assert (value == np.ones(2)) is False


def test_equality_counts_numbers_and_neither_seconds_nor_messages() -> None:
    result = run()
    assert result == jax.jit(lambda result: result)(result)
    assert result == dataclasses.replace(result, compile_seconds=1e9, run_seconds=1e9, message="other")
    assert result != dataclasses.replace(result, params=result.params.at[1].add(1e-6))
    assert result != dataclasses.replace(result, params=result.params[:, None])
    assert result != dataclasses.replace(result, status=Status.STALLED)
    assert result != dataclasses.replace(result, history=None)
    assert deleted(result) != result
    held = gdopt.minimize(lambda p: bowl(p["x"]), {"x": jnp.ones(2), "f": jnp.tanh})
    assert held != dataclasses.replace(held, params={**held.params, "f": jnp.sin})


def test_results_cannot_be_compared_while_they_are_traced() -> None:
    result = run()
    with pytest.raises(gdopt.GdoptError, match="Results were compared inside jit"):
        jax.jit(lambda traced: traced == result)(result)


def test_values_that_may_be_changed_have_no_hash() -> None:
    for kind in ("result", "history", "range test", "report"):
        with pytest.raises(TypeError, match="unhashable"):
            hash(VALUES[kind]())
    found = gdopt.diagnose(nan_run())
    assert len({found, copy.deepcopy(found)}) == 1


def test_one_run_of_many() -> None:
    scales = [1.0, 4.0, 30.0]
    many: Any = jax.vmap(lambda scale: run(scale, max_steps=60, tol=1e-4))(jnp.array(scales))
    assert len(many) == 3
    for number, one in enumerate(many):
        alone = run(scales[number], max_steps=60, tol=1e-4)
        assert one.status is alone.status
        assert [type(one.loss), type(one.steps), type(one.success), type(one.left)] == [float, int, bool, float]
        assert (one.steps, one.success, one.history) == (alone.steps, alone.success, None)
        np.testing.assert_allclose(one.params, alone.params, rtol=1e-5)
        assert one.message.startswith(f"run {number} of 3. Its sentence was lost in jit, vmap, grad or tree.map")
        assert one == many[number - 3]
    assert [one.status.name for one in many] == ["CONVERGED", "CONVERGED", "DIVERGED"]
    with pytest.raises(gdopt.NotConvergedError, match=r"^DIVERGED: run 2 of 3\."):
        many[2].raise_for_status()
    assert len(many[1:]) == 2
    assert many[1:][-1] == many[np.int64(2)]
    assert many[:] == many
    with pytest.raises(IndexError, match=r"holds 3 runs, so there is no run 3\."):
        many[3]
    with pytest.raises(IndexError, match=r"there is no run -4\."):
        many[-4]
    assert jax.jit(lambda many: many[1].params)(many) == pytest.approx(np.asarray(many[1].params))


def test_one_run_of_many_with_their_histories() -> None:
    one, other = run(), run(2.0)
    many = jax.tree.map(lambda *leaves: np.stack(leaves), one, other)
    assert [many[0], many[1]] == [one, other]
    assert isinstance(many[0].history.loss, np.ndarray)


def test_runs_along_two_axes() -> None:
    many: Any = jax.vmap(jax.vmap(run))(jnp.ones((2, 3)))
    assert repr(many).startswith("gdopt.Result of 2 x 3 runs\n  status    MAX_STEPS (6)")
    assert repr(many[1]).startswith("gdopt.Result of 3 runs")
    assert many[1][2] == many[0][0]


def test_a_single_run_has_no_parts() -> None:
    result = run()
    for use in (len, list, lambda result: result[0], lambda result: result[:1]):
        with pytest.raises(TypeError, match="the result is of a single run"):
            use(result)
    assert result  # although it has no length
    many: Any = jax.vmap(run)(jnp.ones(2))
    assert many[:0]
    assert np.array([result, None], dtype=object)[0] is result


def test_one_run_of_many_under_a_transfer_guard() -> None:
    many: Any = jax.vmap(run)(jnp.ones(2))
    with jax.transfer_guard("disallow"):
        assert many[1] == copy.deepcopy(many[0])


def test_an_error_with_a_result_can_be_copied_and_pickled() -> None:
    with pytest.raises(gdopt.NotConvergedError) as caught:
        run().raise_for_status()
    for name in ("copy", "deepcopy", "pickle"):
        error = COPIES[name](caught.value)
        assert (type(error), str(error)) == (gdopt.NotConvergedError, str(caught.value))
        assert error.result == caught.value.result


def test_the_structure_of_a_result_can_be_pickled_and_keeps_no_result_alive() -> None:
    result = run()
    gone, structure = weakref.ref(result), jax.tree.structure(result)
    leaves = jax.tree.leaves(result)
    assert pickle.loads(pickle.dumps(structure)) == structure
    del result
    gc.collect()
    assert gone() is None
    assert structure.unflatten(leaves) == run()


def test_a_range_test_is_a_pytree_as_well() -> None:
    test = gdopt.lr_find(bowl, jnp.zeros(3))
    assert jax.device_get(test).message == test.message
    for changed in (jax.jit(lambda test: test)(test), jax.tree.map(lambda leaf: leaf * 2, test)):
        assert changed.message.startswith(LOST)
        assert repr(changed).startswith("gdopt.RangeTest")
    assert jax.tree.structure(gdopt.lr_find(bowl, jnp.ones(3) * 3)) == jax.tree.structure(test)


def test_a_status_prints_as_its_name_and_is_an_int() -> None:
    status = Status.DIVERGED
    assert (str(status), f"{status}", f"{status:s}") == ("DIVERGED", "DIVERGED", "DIVERGED")
    assert (f"{status:>10}", f"{status!r}") == ("  DIVERGED", "<Status.DIVERGED: 5>")
    assert (f"{status:d}", f"{status:03d}", f"{status:.1f}") == ("5", "005", "5.0")
    assert status == 5
    assert status > Status.CONVERGED
    assert pickle.loads(pickle.dumps(status)) is status
    np.testing.assert_array_equal(np.array([status, Status.CONVERGED]) == np.array([5, 1]), [True, True])
    assert jnp.asarray(status).dtype == jnp.int32


def test_arrays_do_not_compare_themselves_with_each_entry_of_a_history() -> None:
    result = gdopt.minimize(lambda x: jnp.sum(x**2), jnp.ones(3), learning_rate=0.1, max_steps=3)
    history = result.history
    assert (np.ones(3) == history) is False
    assert history in [np.ones(3), history]


@pytest.mark.parametrize("index", [(0, 1), 1.0, None, ...])
def test_an_index_of_another_kind_is_named(index: Any) -> None:
    runs = jax.vmap(lambda c: gdopt.minimize(lambda x: (x - c) ** 2, 0.0))(jnp.arange(3.0))
    with pytest.raises(TypeError, match=r"index=.* is not a whole number or a slice. Pass one"):
        runs[index]
