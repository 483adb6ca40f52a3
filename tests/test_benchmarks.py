"""The benchmarks: CIFAR-10's file format, on files made here, the rules of other libraries, and their reports."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cifar10
import lr_finders
import run_all


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Files in the format of CIFAR-10's binary version: a label, 1024 red bytes, 1024 green, 1024 blue."""
    random = np.random.default_rng(0)
    for name in [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]:
        records = random.integers(0, 256, (12, 3073), np.uint8)
        records[:, 0] = np.arange(12) % 10
        records.tofile(tmp_path / name)
    return tmp_path


def test_cifar10_files_are_read(directory: Path) -> None:
    (images, labels), (held, _) = cifar10.load(directory)
    assert images.shape == (60, 32, 32, 3)
    assert held.shape == (12, 32, 32, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.tile(np.arange(12) % 10, 5))
    raw = (directory / "data_batch_2.bin").read_bytes()
    row, column, channel = 5, 17, 2
    assert images[13, row, column, channel] == raw[3073 + 1 + 1024 * channel + 32 * row + column]


def test_the_error_names_a_broken_file(directory: Path) -> None:
    (directory / "data_batch_3.bin").write_bytes(b"\x00" * 3074)
    with pytest.raises(ValueError, match=r"data_batch_3.bin has 3074 bytes, which are not records of 3073"):
        cifar10.load(directory)


@pytest.mark.slow
def test_the_setting_of_the_paper_runs(directory: Path) -> None:
    import cyclical

    table = cyclical.smith(str(directory), scale=1e-4)
    assert [row.cells[0] for row in table] == ["7", "2", "4", "2"]
    assert all(0 <= float(row.cells[1]) <= 1 for row in table)


def curve(rates: np.ndarray) -> lr_finders.Curve:
    """A loss that decreases at about 0.01 and blows up beyond 1."""
    x = np.log10(rates)
    return lr_finders.Curve(rates, 0.3 + 2 / (1 + 10 ** (2 * (x + 2))) + 10.0 ** (6 * x))


@pytest.mark.parametrize("name", ["fastai", "lightning", "ignite", "torch_lr_finder"])
def test_rules_of_other_libraries_handle_a_clear_curve(name: str) -> None:
    rule = getattr(lr_finders, name)
    rule = functools.partial(rule, "valley") if name == "fastai" else rule
    assert 1e-4 < rule(curve) < 1


def test_a_run_replaces_its_own_section_and_keeps_the_remarks() -> None:
    results = f"# Results\n\n## one\n\nold\n\n{run_all.END}\n\nRemark.\n\n## two\n\nold\n\n## three\n\nold\n"
    once = run_all.replaced(results, "one", "## one\n\nnew\n")
    assert once == results.replace("old", "new", 1)
    twice = run_all.replaced(once, "two", "## two\n\nnew\n")
    assert twice.count("new") == 2
    assert "Remark." in twice
    assert f"{run_all.END}\n\n## three\n\nold" in twice
    assert run_all.replaced(twice, "two", "## two\n\nnew\n") == twice
    assert run_all.replaced(twice, "four", "## four\n\nnew\n").endswith(f"## four\n\nnew\n\n{run_all.END}\n")


def test_every_section_of_the_results_has_a_script() -> None:
    results = run_all.RESULTS.read_text()
    sections = [line.removeprefix("## ") for line in results.splitlines() if line.startswith("## ")]
    assert sorted(sections) == sorted(run_all.PICTURES)
    assert results.count(run_all.END) == len(sections)
    assert all((run_all.HERE / f"{name}.py").exists() for name in run_all.PICTURES)


@pytest.fixture
def endings() -> Iterator[ModuleType]:
    """The script in float64, as its verdicts need. Importing it takes seconds."""
    with jax.enable_x64(True):
        yield importlib.import_module("endings")


def ended(endings: ModuleType, status: str, x: float, loss: float, **fields: Any) -> Any:
    """A run from 4 that ended at x."""
    losses = np.array([16.0, loss])
    return endings.Run("default", 0, "float64", status, losses=losses, loss=loss, params=np.array([x]), **fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "x", "fields", "wrong", "missed"),
    [
        ("CONVERGED", 1e-3, {"success": True}, False, False),  # 1e-6 is left, 1.6e-3 is claimed
        ("CONVERGED", 1.0, {"success": True}, True, False),
        ("CONVERGED", 1.0, {"success": True, "left": 0.5}, False, False),
        ("CONVERGED", 5.0, {"success": True}, True, False),  # above the start
        ("PRECISION_LIMIT", 1e-3, {"success": True}, True, False),  # which claims that nothing is left
        ("PRECISION_LIMIT", 1e-3, {}, False, True),
        ("PRECISION_LIMIT", 1.0, {}, False, False),
    ],
)
def test_a_claim_is_compared_with_what_is_left(
    endings: ModuleType, status: str, x: float, fields: dict[str, Any], wrong: bool, missed: bool
) -> None:
    problem = endings.Problem(lambda p: p[0] ** 2, [np.array([4.0])])
    run = ended(endings, status, x, x**2, **fields)
    verdict = endings.judge(endings.Task("small", "square"), run, problem, endings.Floor(problem))
    assert (verdict.wrong, verdict.missed) == (wrong, missed)
    assert verdict.left == pytest.approx(x**2, abs=1e-12)


@pytest.mark.slow
def test_a_maximum_is_wrong_and_another_basin_is_not(endings: ModuleType) -> None:
    floor = endings.Floor(endings.Problem(lambda p: (p[0] ** 2 - 1) ** 2 + 0.1 * p[0], [np.array([0.0])]))
    left, right = floor.below(np.array([-0.9]), 0.0), floor.below(np.array([0.9]), 0.0)
    assert left < 0 < right
    top = endings.Floor(endings.Problem(lambda p: jnp.cos(p[0]), [np.array([0.0])]))
    assert top.below(np.array([0.0]), 0.0) == pytest.approx(-1)


@pytest.mark.slow
def test_evaluations_are_counted_up_to_the_first_near_loss(endings: ModuleType) -> None:
    losses = np.array([16.0, 1.0, 1e-3, 1e-8, 1e-9, 1e-9])
    assert endings.made_over_needed(losses, 16.0, 0.0, 1e-4) == 2
    assert endings.made_over_needed(losses, 16.0, 0.0, 1e-6) == 1.5
    assert np.isnan(endings.made_over_needed(losses[:2], 16.0, 0.0, 1e-4))


@pytest.fixture
def bounds() -> Iterator[ModuleType]:
    """The script in float64. Importing it takes seconds."""
    with jax.enable_x64(True):
        yield importlib.import_module("bounds")


def walled(bounds: ModuleType) -> Any:
    """The sum of squares around (-1, 2) from (4, 4), with the first param at least 1: 4 is left at (1, 2), of 29."""
    from bounded_problems import bounded

    problem = bounded(lambda x: jnp.sum((x - jnp.array([-1.0, 2.0])) ** 2), [4.0, 4.0], [1.0, -np.inf], np.inf)
    return bounds.make_form(problem)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "params", "fields", "wrong", "missed"),
    [
        ("CONVERGED", [1.0, 2.01], {}, False, False),  # 1e-4 of 25 is left
        ("CONVERGED", [1.0, 2.1], {}, True, False),
        ("CONVERGED", [1.0, 2.01], {"left": 1e-6}, True, False),  # it claims less than a tenth of that
        ("CONVERGED", [0.9, 2.0], {}, True, False),  # outside
        ("STALLED", [1.0, 2.001], {"success": False}, False, True),
        ("STALLED", [1.0, 2.1], {"success": False}, False, False),
        ("MAX_STEPS", [1.0, 2.0], {"success": False}, False, False),
    ],
)
@pytest.mark.parametrize("group", ["nnls", "fits"])  # compared with the best known, and with a polish
def test_a_claim_within_bounds_is_compared_with_what_is_left(
    bounds: ModuleType, group: str, status: str, params: list[float], fields: dict[str, Any], wrong: bool, missed: bool
) -> None:
    case = bounds.Case("square", group, 2, 29.0, 4.0)
    end = bounds.End(status, **({"success": True, "params": np.array(params)} | fields))
    verdict = bounds.judge(case, walled(bounds), end)
    assert (verdict.wrong, verdict.missed) == (wrong, missed)
    if np.isfinite(verdict.objective):
        assert verdict.left == pytest.approx((params[1] - 2) ** 2, abs=1e-12)


@pytest.mark.slow
def test_a_point_outside_the_bounds_solves_nothing(bounds: ModuleType) -> None:
    form = walled(bounds)
    assert form.objective([1.0, 2.0]) == 4
    assert form.objective([0.9, 2.0]) == np.inf


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["nnls:hilbert", "lasso:diabetes:0.1", "simplex:unmixing_8", "fit:oral_dose", "sif:HS4"]
)
def test_solvers_come_to_the_best_known_value(bounds: ModuleType, name: str) -> None:
    case = next(case for case in bounds.load_cases() if case.name == name)
    form = bounds.make_form(bounds.build(name))
    assert form.objective(form.problem.start) == pytest.approx(case.start)
    solver, _ = bounds.SOLVERS[bounds.YARDSTICK]
    losses = solver(form, case.target(1e-5), 2000, 60).losses
    assert losses[0] == pytest.approx(case.start)
    assert case.best <= losses[-1] <= case.target(1e-5)


def test_best_known_values_are_below_the_start() -> None:
    problems = json.loads(run_all.HERE.joinpath("bounds.json").read_text())["problems"]
    assert {entry["group"] for entry in problems.values()} == {"cutest", "fits", "nnls", "lasso", "simplex"}
    assert all(entry["fbest"] < entry["f0"] for entry in problems.values())
