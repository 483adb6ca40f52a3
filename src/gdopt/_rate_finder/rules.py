"""The rules that read a learning rate off the curve of a range test, its smoothing and its end, with NumPy alone.

In all of them ``rates`` rise. Entry k of a curve is the loss at the point from which the step with ``rates[k]`` was
made, and entry 0 the loss at the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BETA = 0.9  # the factor of the moving average that is shown
_DENSE = 50  # rungs to a decade, from which on the average has its full memory
_TRAIL = 9  # rungs by which that average trails, beta / (1 - beta): it shows the edges of the basin that much too late
_MEMORY = 0.6  # the power of the density by which the memory shrinks on a sparser ladder
_LEVEL = 0.05  # the height of the basin above the minimum, over the whole fall
_HEAD = 5  # the fewest losses that tell the level of the start
_FEWEST = 1.5  # the fewest rungs to a decade that a suggestion needs
_SOONEST = 5  # the fewest rungs up to a blow-up that a suggestion needs
_NOISE = 6  # the least fall, in standard deviations of the smoothed curve
_SOON = 10  # the rate over the first rate below which a blow-up comes too soon
_FLAT = 100  # the last rate over that at the end of the fall from which on a low curve counts as a floor
_TINY = 1e-6  # the fall over the loss up to which it may be rounding
_LASTING = 4  # the last losses that all have to be above the start in a blow-up
_WINDOW, _OUTLIER = 4, 5.0  # rungs on each side, and the deviations from their median, from which on a loss is clipped
_GROWTH = 0.06  # the part of a decade over which growth is measured at least
_RISE = 4  # the rungs of a steady rise to more than a hundred times, which counts as growth below the start's level
_BELOW = 0.5  # the highest suggestion over the edge of stability
_BELOW_IF_UNSEEN = 0.15  # the suggestion over that edge if noise hides the basin, and the loss grew a hundred times
_BELOW_IF_UNSURE = 0.1  # and if it grew less
_CLEAR = 4.0  # the last loss over those of the start from which on it has blown up, whatever its noise
_ON_A_FLOOR = 0.5  # the suggestion over the left edge of a basin without a right one


def smooth(losses: np.ndarray, beta: float = BETA) -> np.ndarray:
    """Return the exponential moving average along the last axis, bias-corrected (Kingma & Ba, 2015, section 3)."""
    losses = np.asarray(losses, float)
    average, smoothed = np.zeros(losses.shape[:-1]), np.empty(losses.shape)
    for k in range(losses.shape[-1]):
        average = beta * average + (1 - beta) * losses[..., k]
        smoothed[..., k] = average / (1 - beta ** (k + 1))
    return smoothed


def head_of(num_steps: int) -> int:
    """Return the number of first rungs of a ladder whose losses tell the level of the start."""
    return max(num_steps // 10, min(_HEAD, num_steps // 3), 1)


@np.errstate(over="ignore", invalid="ignore")
def end(losses: np.ndarray, head: int = 1) -> int:
    """Count the entries of a curve before the first that is not finite, and up to its blow-up.

    The curve has blown up once the smoothed loss is four times its best, as in fastai, and also above its first values.
    For losses near or below zero, it has once the loss is above its best by three times the size of the best. All of
    the last four losses have to be, too: one of a heavy tail is no blow-up.
    """
    finite = np.isfinite(losses)
    count = len(losses) if finite.all() else int(finite.argmin())
    if count == 0:
        return 0
    losses = losses[:count]
    smoothed, start = smooth(losses), losses[:head].max()
    best = np.minimum.accumulate(smoothed)
    before = np.append(np.full(_LASTING - 1, -np.inf), losses)
    lasting = np.lib.stride_tricks.sliding_window_view(before, _LASTING).min(axis=1)
    over = (smoothed > best + np.maximum(3 * np.abs(best), start - best)) & (lasting > start)
    return int(over.argmax()) + 1 if over.any() else count


class Verdict(NamedTuple):
    """The suggestions of a curve."""

    suggestion: float | None
    reason: str = ""  # why there is no suggestion, and what to change
    missing: str = ""  # "higher" or "lower" if a longer ladder at that end would help
    modest: float | None = None  # a rate that will do where no more rates can be tried


class Updates(NamedTuple):
    """The effect of an optimizer's updates on a curve."""

    times: float  # the suggestion over the middle of the basin: a training is longer than a range test
    show_edge: bool  # whether the growth of the loss tells the edge of stability
    reach: float = math.inf  # the most decades from the left edge of the basin to its middle


# On a ladder, Adam's steps grow with the rate alone, so it finds its way at rates that are much too high to begin with.
PLAIN, WITH_MOMENTUM, SCALE_FREE = Updates(1.5, True), Updates(1.0, True), Updates(0.7, False, reach=0.4)


class _Basin(NamedTuple):
    """The rungs at which the smoothed loss is within a twentieth of its whole fall from its minimum."""

    left: int
    right: int
    is_closed: bool  # whether the loss rises again
    noises: float  # the fall over the noise of the smoothed curve
    trail: float  # the rungs by which the edges come too late


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def suggest(
    rates: np.ndarray, losses: np.ndarray, *, blew_up: bool, head: int | None = None, updates: Updates = WITH_MOMENTUM
) -> Verdict:
    """Return the default suggestion from a combined curve, or say why there is none.

    It is the middle of the basin on the log axis, times a factor for the kind of updates. The rungs by which the
    average trails, or half a decade if that is less, are subtracted. The middle of both edges varies less from seed to
    seed than the place of the minimum. The first ``head`` rungs, by default a tenth, only give the loss at the start:
    one lucky batch there would pass for a minimum.

    A sparse ladder passes the basin in a few steps, and without noise the loss falls so low that it takes many rungs to
    come back. So the suggestion is at most half of the edge of stability, which the growth of the loss tells. It is
    lower on a sparse ladder.
    """
    count, low, high = len(rates), f"{rates[0]:.2g}", f"{rates[-1]:.2g}"
    head = min(head or head_of(count), max(count // 3, 1))
    density = 1 / np.median(np.diff(np.log10(rates))) if count > 1 else 0.0
    if density < _FEWEST and not (blew_up and count < _SOONEST):
        return Verdict(None, f"The curve has {count} points, which is too few. Raise num_steps to 10 or more.")
    if count < _SOONEST:
        modest = None
        if blew_up and count > 1 and updates.show_edge:
            modest = _BELOW_IF_UNSEEN * _edge(rates, losses, head, density, blew_up)
        reason = f"The loss blows up soon after the rate {low}. " if blew_up else f"The curve has {count} points. "
        return Verdict(None, f"{reason}Lower start_lr, or raise num_steps.", "lower" if blew_up else "", modest)
    caution = math.exp(min(math.log(10) * (1 / _DENSE - 1 / density), 0))
    basin, edge = _basin(rates, losses, head, density), _edge(rates, losses, head, density, blew_up)
    if basin.noises <= _NOISE:
        edge = edge if updates.show_edge else 0.0
        return _without_basin(rates, losses, basin.noises, blew_up, head, edge, caution)
    if basin.left < 2 * head and count >= 20:
        modest = _BELOW_IF_UNSEEN * edge if updates.show_edge and math.isfinite(edge) else None
        return Verdict(None, f"The loss falls already at the rate {low}. Lower start_lr.", "lower", modest)
    rungs, decades = np.arange(count), np.log10(rates)
    at = lambda rung: float(10 ** np.interp(rung - basin.trail, rungs, decades))
    if basin.is_closed or blew_up:
        reached = np.interp(decades[basin.left] + updates.reach, decades, rungs)
        middle = at(min((basin.left + basin.right) / 2, reached))
        highest = max(_BELOW * edge, at(basin.left))
        return Verdict(caution * min(updates.times * middle, highest))
    on_floor = caution * _ON_A_FLOOR * at(basin.left)
    if rates[-1] < _FLAT * rates[basin.left]:
        reason = f"The loss falls, or stays low, up to the rate {high}. Raise end_lr."
        return Verdict(None, reason, "higher", on_floor)
    return Verdict(on_floor, missing="higher")  # The loss is at a minimum that no rate leads away from.


def _without_basin(
    rates: np.ndarray, losses: np.ndarray, noises: float, blew_up: bool, head: int, edge: float, caution: float
) -> Verdict:
    """Return what a curve whose fall may be noise suggests: a rate well below the edge of stability, if it shows."""
    low, high = f"{rates[0]:.2g}", f"{rates[-1]:.2g}"
    start = losses[:head].max()
    is_certain = losses[-1] > 100 * start > 0
    shows = losses[-1] > _CLEAR * start > 0 and 0 < edge < math.inf
    modest = _BELOW_IF_UNSEEN * edge if shows else None
    if not blew_up:
        return Verdict(
            None,
            f"The loss is flat from {low} to {high}. Raise end_lr. If it stays flat, it may not depend on params, or "
            "its noise hides the fall: raise batch_size or repeats.",
            "higher",
            modest,
        )
    # A sparse ladder is soon far beyond that edge.
    if rates[-1] < _SOON * rates[0] or 0 < caution * edge <= 3 * rates[0]:
        return Verdict(None, f"The loss rises from the rate {low} on. Lower start_lr.", "lower", modest)
    if (is_certain or noises > 1) and edge > 0:
        return Verdict(caution * edge * (_BELOW_IF_UNSEEN if is_certain else _BELOW_IF_UNSURE))
    reason = f"The loss does not fall by more than its noise before it blows up at {high}. "
    return Verdict(None, reason + "Raise num_steps, repeats or batch_size, or check the sign of the loss.")


def _basin(rates: np.ndarray, losses: np.ndarray, head: int, density: float) -> _Basin:
    """Find the basin of the smoothed curve. A sparse ladder cannot afford the full memory of the average."""
    count = len(rates)
    memory = _TRAIL * min(1.0, (density / _DENSE) ** _MEMORY)
    beta = memory / (1 + memory)
    clipped = _clipped(losses)
    smoothed = smooth(clipped, beta)
    start, best = smoothed[:head].mean(), np.minimum.accumulate(smoothed)
    turned = smoothed > best + np.maximum(3 * np.abs(best), _LEVEL * (start - best))
    floor = losses.min()
    turned |= (losses - floor > 1.5 * (losses[:head].max() - floor)) & (best < (start + floor) / 2)
    turn = head + int(turned[head:].argmax()) if turned[head:].any() else count
    bottom = head + int(smoothed[head : max(turn, head + 1)].argmin())
    fall = start - smoothed[bottom]
    noise = np.std(np.diff(clipped[: bottom + 1])) / 2**0.5 * ((1 - beta) / (1 + beta)) ** 0.5
    least = max(noise, _TINY / _NOISE * abs(smoothed[0]))
    inside = smoothed <= smoothed[bottom] + _LEVEL * fall
    left, above = head + int(inside[head:].argmax()), ~inside[bottom:]
    right = bottom + int(above.argmax()) if above.any() else count - 1
    trail = min(memory, float(np.sum(rates > rates[-1] / 10**0.5)))
    return _Basin(left, right, bool(above.any()), float(fall / least) if fall > 0 else 0.0, trail)


def _clipped(losses: np.ndarray) -> np.ndarray:
    """Lower the losses that are far above those around them: a heavy tail would hide the fall."""
    padded = np.pad(losses, _WINDOW, constant_values=np.nan)
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * _WINDOW + 1)
    middle = np.nanmedian(around, axis=1)
    deviation = np.nanmedian(np.abs(around - middle[:, None]), axis=1)
    return np.minimum(losses, middle + _OUTLIER * deviation)


def _edge(rates: np.ndarray, losses: np.ndarray, head: int, density: float, blew_up: bool) -> float:
    """Return the rate from which on gradient descent is unstable, by the growth at the end of a curve; or infinity.

    At a rate r along a curvature c, a step multiplies the loss over its minimum by (1 - r c)^2, and 2 / c is the edge.
    Growth is measured from where the loss got above the level of the start. On a curve that has not got there it is
    that of a steady rise.
    """
    last, best, start = len(losses) - 1, losses.min(), losses[:head]
    first, least = last, 0.01 * (start.max() - best)
    if blew_up or losses[-1] > start.max():
        while first > 0 and losses[first - 1] > start.mean():
            first -= 1
        first = max(min(first, last - max(round(_GROWTH * density), 1)), 0)
    else:
        while first > 0 and losses[first - 1] < losses[first]:
            first -= 1
        best, first, least = losses[first], first + 1, 0.0
        if last - first < _RISE - 1 or losses[-1] - best < 100 * (losses[first] - best):
            return math.inf
    log = lambda x: math.log(max(x, np.finfo(float).tiny))
    growth = log(losses[-1] - best) - log(max(losses[first] - best, least))
    rate = np.exp(np.log(rates[first:last]).mean())
    return float(2 * rate / (1 + math.exp(max(growth, 0.0) / 2 / (last - first))))


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
