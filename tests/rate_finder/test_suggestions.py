"""Suggestions from known curves of range tests; the named rules are fastai's, point by point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gdopt._rate_finder import rules

FASTAI = np.load(Path(__file__).with_name("fastai_rules") / "rules.npz")
CURVES = sorted({name.split("/")[0] for name in FASTAI.files})
RATES = np.geomspace(1e-5, 10, 300)


def curve(edge: float = 1.0, level: float = 0.3, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """A loss that falls from 2.3 at about a hundredth of the edge, and blows up beyond the edge."""
    x = np.log10(RATES / edge)
    loss = level + (2.3 - level) / (1 + 10 ** (2 * (x + 2))) + 10 ** np.minimum(6 * x, 6)
    return loss + noise * np.random.default_rng(seed).normal(size=len(x))


def suggest(losses: np.ndarray, rates: np.ndarray = RATES) -> rules.Verdict:
    end = rules.end(losses, rules.head_of(len(rates)))
    losses = losses[:end]
    return rules.suggest(rates[:end], losses, blew_up=end < len(rates), head=rules.head_of(len(rates)))


@pytest.mark.parametrize("rule", rules.RULES)
@pytest.mark.parametrize("name", CURVES)
def test_the_named_rules_are_fastais(name: str, rule: str) -> None:
    found = rules.RULES[rule](FASTAI[f"{name}/rates"], FASTAI[f"{name}/losses"])
    np.testing.assert_allclose(found, FASTAI[f"{name}/{rule}"], rtol=1e-12)


def test_by_rule_reads_fastais_window() -> None:
    smoothed = rules.smooth(curve(noise=0.05))
    found = rules.by_rule(RATES, smoothed, 300)
    window = slice(30, -5)
    assert found == {name: rule(RATES[window], smoothed[window]) for name, rule in rules.RULES.items()}
    assert found["steep"] == RATES[30 + np.gradient(smoothed[window]).argmin()]  # not where the loss is lowest
    assert set(rules.by_rule(RATES[:40], smoothed[:40], 300).values()) == {None}  # too few points are left


def test_smooth_is_the_weighted_mean_of_earlier_losses() -> None:
    losses = np.random.default_rng(0).normal(size=(2, 20))
    for k in range(20):
        weights = rules.BETA ** np.arange(k, -1, -1)
        expected = (losses[:, : k + 1] * weights).sum(axis=1) / weights.sum()
        np.testing.assert_allclose(rules.smooth(losses)[:, k], expected, rtol=1e-12)
    assert rules.smooth(losses)[0, 0] == losses[0, 0]


def test_a_curve_ends_before_a_loss_that_is_not_finite_and_at_its_blow_up() -> None:
    assert rules.end(np.array([1.0, np.nan, 1.0])) == 1
    assert rules.end(np.array([np.inf])) == 0
    assert rules.end(np.ones(50)) == 50
    assert rules.end(np.append(np.ones(50), np.full(5, 1e3))) == 54  # four in a row
    assert rules.end(np.append(np.ones(50), [1e9, 1, 1, 1e9, 1])) == 55  # a heavy tail
    assert rules.end(np.append(np.linspace(10, 1, 50), [9.0] * 50)) == 100  # back below its start is no blow-up
    assert rules.end(np.append(np.linspace(-1, -10, 50), [100.0] * 50)) < 60  # nor need losses be positive
    assert rules.end(np.append(np.linspace(1, 0, 90), np.full(50, 0.2))) == 140  # near zero, four times is nothing


@pytest.mark.parametrize("edge", [1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_suggestion_lies_within_a_decade_below_the_edge(edge: float, noise: float) -> None:
    suggestion, reason, missing, _ = suggest(curve(edge, noise=noise))
    assert suggestion is not None
    assert edge / 10 < suggestion < edge
    assert reason == missing == ""


def test_it_hardly_depends_on_the_noise() -> None:
    found = [suggest(curve(noise=0.1, seed=seed)).suggestion or 0 for seed in range(20)]
    assert max(found) < 1.6 * min(found)


@given(st.floats(-3, 3), st.floats(-50, 50), st.integers(0, 5))
def test_it_has_no_scale_and_no_origin(scale: float, offset: float, seed: int) -> None:
    losses = curve(noise=0.05, seed=seed)[:270]  # before the blow-up, whose threshold knows where zero is
    verdict = rules.suggest(RATES[:270], losses, blew_up=True)
    moved = losses * 10**scale + offset
    again = rules.suggest(RATES[:270], moved, blew_up=True)
    if 10**scale > 1e-5 * abs(offset):  # else the fall is lost in rounding
        assert again.suggestion == pytest.approx(verdict.suggestion, rel=0.1)  # rounding may move an edge by a rung


@pytest.mark.parametrize(
    ("losses", "rates", "says", "missing"),
    [
        (curve(100.0), RATES, r"falls, or stays low, up to the rate 10. Raise end_lr", "higher"),
        (np.full(300, 2.0), RATES, r"flat from 1e-05 to 10. Raise end_lr", "higher"),
        (2 + np.random.default_rng(0).normal(size=300), RATES, r"noise hides the fall: raise batch_size", "higher"),
        (np.geomspace(1, 1e9, 300), RATES, r"rises from the rate 1e-05 on. Lower start_lr", "lower"),
        (
            np.exp(-np.arange(300) / 3) + 1e3 * (RATES > 1),
            RATES,
            r"falls already at the rate 1e-05. Lower start_lr",
            "lower",
        ),
        (np.append(np.ones(250), np.full(50, 99.0)), RATES, r"not fall by more than its noise .* sign of the loss", ""),
        (curve()[::40], RATES[::40], r"8 points, which is too few. Raise num_steps to 10", ""),
    ],
)
def test_a_missing_suggestion_comes_with_advice(losses: np.ndarray, rates: np.ndarray, says: str, missing: str) -> None:
    verdict = suggest(losses, rates)
    assert verdict.suggestion is None
    assert verdict.missing == missing
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(verdict.reason)


def test_a_floor_without_a_blow_up_gives_a_suggestion_too() -> None:
    rates = np.geomspace(1e-5, 1e7, 600)
    losses = 1 / (1 + (rates / 1e-2) ** 2)
    verdict = suggest(losses, rates)
    assert verdict.missing == "higher"  # a longer ladder might still show the end of it
    assert 1e-2 < (verdict.suggestion or 0) < 1e-1


def growing(rates: np.ndarray, curvature: float, floor: float = 0.0, seed: int = 0) -> np.ndarray:
    """The losses of gradient descent on a quadratic function, whose edge of stability is 2 / curvature."""
    noise = np.random.default_rng(seed).normal(size=len(rates))
    factors = np.append(1.0, 1 - rates[:-1] * curvature * np.exp(0.1 * noise[:-1]))
    with np.errstate(over="ignore"):
        return np.cumprod(np.maximum(np.abs(factors), 0.05)) ** 2 + floor * (1 + 0.1 * noise)


@pytest.mark.parametrize("count", [12, 20, 40, 80, 300])
@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_a_ladder_of_any_length_stays_below_the_edge_of_stability(count: int, floor: float) -> None:
    """Without noise the loss falls so low that a sparse ladder is far beyond the edge before it is back."""
    rates = np.geomspace(1e-5, 10, count)
    found = []
    for seed in range(10):
        losses = growing(rates, 20.0, floor, seed)
        end = rules.end(losses, rules.head_of(count))
        verdict = rules.suggest(rates[:end], losses[:end], blew_up=end < count, head=rules.head_of(count))
        found.append(verdict.suggestion or np.nan)
    assert np.nanmax(found) < 0.1
    assert np.isfinite(found).all()
    assert np.min(found) > 1e-3


@pytest.mark.parametrize("curvature", [1e2, 1e5, 1e7])
def test_a_sparse_ladder_far_beyond_the_edge_asks_for_lower_rates(curvature: float) -> None:
    """And it tells a rate that will do where none can be tried."""
    rates = np.geomspace(1e-4, 10, 12)
    losses = growing(rates, curvature)
    end = rules.end(losses, rules.head_of(12))
    verdict = rules.suggest(rates[:end], losses[:end], blew_up=end < 12, head=rules.head_of(12), updates=rules.PLAIN)
    rate = verdict.suggestion or verdict.modest or 0
    assert 0.02 * 2 / curvature < rate < 0.5 * 2 / curvature
    if curvature > 1e4:
        assert verdict.missing == "lower"


def test_a_plateau_beyond_a_rise_is_no_basin() -> None:
    """There a network has died."""
    losses = 0.05 + 200 / (1 + (RATES / 1e-3) ** 2) + 0.02 * np.random.default_rng(0).normal(size=300)
    died = np.where((RATES > 0.02) & (RATES < 0.05), 100.0, losses)
    dead = np.where(RATES > 0.05, 0.03 + 0.01 * np.random.default_rng(1).normal(size=300), died)
    assert 1e-3 < (suggest(dead).suggestion or 0) < 0.02


def test_heavy_tails_hide_no_fall() -> None:
    tails = np.exp(np.random.default_rng(0).normal(size=300))
    losses = tails * (0.1 + 1 / (1 + (RATES / 1e-3) ** 2)) + 10 ** np.minimum(6 * np.log10(RATES), 6)
    assert 1e-3 < (suggest(losses).suggestion or 0) < 1


def test_scale_free_updates_suggest_less() -> None:
    kinds = (rules.SCALE_FREE, rules.WITH_MOMENTUM, rules.PLAIN)
    found = [rules.suggest(RATES[:270], curve()[:270], blew_up=True, updates=kind).suggestion or 0 for kind in kinds]
    assert found == sorted(found)
    assert len(set(found)) == 3


@example([0.0] * 10 + [-1.0], 0.0)
@given(st.lists(st.floats(-1e308, 1e308), min_size=1, max_size=60), st.sampled_from([0.0, 1e-300, 1.0]))
def test_any_curve_gives_a_rate_of_the_ladder_or_a_reason(values: list[float], size: float) -> None:
    losses = np.array(values) * (size or 1e-308)
    rates = np.geomspace(1e-5, 10, max(len(losses), 2))[: len(losses)]
    end = rules.end(losses)
    for blew_up in (False, True):
        verdict = rules.suggest(rates[:end], losses[:end], blew_up=blew_up)
        assert verdict.reason if verdict.suggestion is None else 1e-8 < verdict.suggestion < 20
