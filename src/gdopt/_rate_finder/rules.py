"""The rules that read a learning rate off the curve of a range test, its smoothing and its end, with NumPy alone.

In all of them ``rates`` rise. Entry k of a curve is the loss at the point from which the step with ``rates[k]`` was
made, and entry 0 the loss at the start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BETA = 0.9  # the factor of the moving average
_TRAIL = 9  # rungs by which the average trails, beta / (1 - beta): it shows the edges of the basin that much too late
_LEVEL = 0.05  # the height of the basin above the minimum, over the whole fall
_FEWEST = 20  # the fewest rungs that a suggestion needs
_NOISE = 6  # the least fall, in standard deviations of the smoothed curve
_SOON = 10  # the rate over the first rate below which a blow-up comes too soon
_FLAT = 100  # the last rate over that at the end of the fall from which on a low curve counts as a floor
_TINY = 1e-6  # the fall over the loss up to which it may be rounding


def smooth(losses: np.ndarray) -> np.ndarray:
    """Return the exponential moving average along the last axis, bias-corrected (Kingma & Ba, 2015, section 3)."""
    losses = np.asarray(losses, float)
    average, smoothed = np.zeros(losses.shape[:-1]), np.empty(losses.shape)
    for k in range(losses.shape[-1]):
        average = BETA * average + (1 - BETA) * losses[..., k]
        smoothed[..., k] = average / (1 - BETA ** (k + 1))
    return smoothed


def end(losses: np.ndarray) -> int:
    """Count the entries of a curve before the first that is not finite, and up to its blow-up.

    The curve has blown up once the smoothed loss is four times its best, as in fastai, and also above its first value.
    For losses near or below zero, it has once the loss is above its best by three times the size of the best.
    """
    finite = np.isfinite(losses)
    count = len(losses) if finite.all() else int(finite.argmin())
    smoothed = smooth(losses[:count])
    best = np.minimum.accumulate(smoothed)
    over = smoothed > best + np.maximum(3 * np.abs(best), smoothed[:1] - best)
    return int(over.argmax()) + 1 if over.any() else count


class Verdict(NamedTuple):
    """The suggestions of a curve."""

    suggestion: float | None
    reason: str = ""  # why there is no suggestion, and what to change
    missing: str = ""  # "higher" or "lower" if a longer ladder at that end would help


def suggest(rates: np.ndarray, losses: np.ndarray, smoothed: np.ndarray, *, blew_up: bool) -> Verdict:
    """Return the default suggestion from a combined curve, or say why there is none.

    It is the middle of the basin on the log axis. In the basin, the smoothed loss is within a twentieth of its whole
    fall from its minimum. The rungs by which the average trails, or half a decade if that is less, are subtracted. The
    middle of both edges varies less from seed to seed than the place of the minimum. The first tenth of the curve only
    gives the loss at the start: one lucky batch there would pass for a minimum.
    """
    count, head = len(rates), max(len(rates) // 10, 1)
    low, high = f"{rates[0]:.2g}", f"{rates[-1]:.2g}"
    if count < _FEWEST and not blew_up:
        return Verdict(None, f"The curve has {count} points, which is too few. Raise num_steps to {_FEWEST} or more.")
    if count < _FEWEST:
        return Verdict(
            None, f"The loss blows up soon after the rate {low}. Lower start_lr, or raise num_steps.", "lower"
        )
    bottom = head + int(smoothed[head:].argmin())
    fall = smoothed[:head].mean() - smoothed[bottom]
    noise = np.std(np.diff(losses[: bottom + 1])) / 2**0.5 * ((1 - BETA) / (1 + BETA)) ** 0.5
    fell = fall > max(_NOISE * noise, _TINY * abs(smoothed[0]))
    if not fell and blew_up and rates[-1] < _SOON * rates[0]:
        return Verdict(None, f"The loss rises from the rate {low} on. Lower start_lr.", "lower")
    if not fell and blew_up:
        reason = f"The loss does not fall by more than its noise before it blows up at {high}. "
        return Verdict(None, reason + "Raise num_steps, repeats or batch_size, or check the sign of the loss.")
    if not fell:
        return Verdict(
            None,
            f"The loss is flat from {low} to {high}. Raise end_lr. If it stays flat, it may not depend on params, or "
            "its noise hides the fall: raise batch_size or repeats.",
            "higher",
        )
    inside = smoothed <= smoothed[bottom] + _LEVEL * fall
    left = head + int(inside[head:].argmax())
    above = ~inside[bottom:]
    right = bottom + int(above.argmax()) if above.any() else count - 1
    trail = min(_TRAIL, int(np.sum(rates > rates[-1] / 10**0.5)))
    if left < 2 * head:
        return Verdict(None, f"The loss falls already at the rate {low}. Lower start_lr.", "lower")
    if not above.any() and not blew_up and rates[-1] < _FLAT * rates[left]:
        return Verdict(None, f"The loss falls, or stays low, up to the rate {high}. Raise end_lr.", "higher")
    if not above.any() and not blew_up:  # The loss is at a minimum that no rate leads away from.
        return Verdict(float(rates[max(left - trail, 0)]), missing="higher")
    return Verdict(float(rates[max((left + right) // 2 - trail, 0)]))


def steep(rates: np.ndarray, losses: np.ndarray) -> float:
    """Suggest the rate at which the loss falls fastest over its logarithm: the rule of the beginner's guides."""
    return float(rates[np.argmin(np.diff(losses) / np.diff(np.log(rates)))])


def minimum(rates: np.ndarray, losses: np.ndarray) -> float:
    """Return a tenth of the rate at the minimum."""
    return float(rates[np.argmin(losses)]) / 10


def valley(rates: np.ndarray, losses: np.ndarray) -> float:
    """Return the middle of the longest valley: of the span of the longest falling subsequence."""
    count = len(losses)
    length = np.ones(count, int)  # the length of the longest falling subsequence that ends here
    for k in range(1, count):
        length[k] = 1 + np.max(length[:k], initial=0, where=losses[:k] > losses[k])
    last = int(length.argmax())
    first = last - length[last] if length[last] > 1 else 0
    third = (last - first) / 3
    return float(rates[first + int(third) + int(third / 2)])


def slide(rates: np.ndarray, losses: np.ndarray) -> float:
    """Return the rate some 15 rungs before the last place whose slope differs from the slope there by at most 0.005."""
    slope = np.gradient(losses)
    right = len(losses) - 1
    while right >= 15 and abs(slope[right] - slope[right - 15]) > 0.005:
        right -= 1
    return float(rates[max(right - 15 + (right < len(losses) - 1), 0)])


RULES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "steep": steep,
    "valley": valley,
    "slide": slide,
    "minimum": minimum,
}


def by_rule(rates: np.ndarray, smoothed: np.ndarray, num_steps: int) -> dict[str, float | None]:
    """Return the suggestions of fastai's rules (2.8), which leave out the first tenth and the last five points."""
    window = slice(num_steps // 10, -5)
    rates, smoothed = rates[window], smoothed[window]
    enough = len(rates) >= 17  # The rule `slide` compares slopes 15 points apart.
    return {name: rule(rates, smoothed) if enough else None for name, rule in RULES.items()}
