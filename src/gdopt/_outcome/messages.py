"""The message on the end of a run, with its remedy."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from gdopt._optimizers.method import Rates
from gdopt._optimizers.trials import MAX_REJECTED
from gdopt._outcome.ending import Ended
from gdopt._status import FAILURES, Status
from gdopt._stopping import BY_NEIGHBOURS, DROWNED, OUTSIDE, ROUNDING, SADDLE, SATURATED, UP_TO_NOISE
from gdopt._verify.counterexamples import TRIED

_RATE_OF_ZERO = "the learning rate was 0 at each step. With one above 0 the loss can fall."
_COARSE = 1e-10  # the eps above which a wider dtype has more digits
_DECAYED = 1e-3  # the last rate over the highest, for a schedule that decayed too far
_TURNS, _MOSTLY = 50, 0.8  # the turns and their share of the steps that show a loss rising and falling in turn
_LAST = 1000  # the last steps, whose gain shows whether more steps would help
_PART = 10  # the steps over those averaged at either end, for a stream that ended in its first pass
_WORTHLESS = 1e4  # the growth of a gradient in one step above which it reveals no curvature
_FROM_OUTSIDE = {
    Status.STOPPED: "stopped by the callback",
    Status.DATA_EXHAUSTED: "the data ended",
    Status.INTERRUPTED: "interrupted",
    Status.EARLY_STOPPED: "stopped early",
}


class _Words(NamedTuple):
    """Parts that several sentences share."""

    first: str  # the first loss of the sentence
    last: str  # its last loss
    end: int  # the evaluation of the last loss
    width: int  # the number of evaluations that are averaged
    falls: bool  # whether the mean of the last losses is below that of the first
    after: str
    back: str  # the sentence on which point is returned, if not the last
    slower: str  # advice on a lower rate


def explain(ended: Ended) -> str:
    """Return the sentences on how a run ended."""
    message = _explain(ended.status, ended) + _by_validation(ended) + _at_bounds(ended)
    if ended.status is Status.DATA_EXHAUSTED and not ended.success:
        message += f" {ended.why_exhausted}"
    if ended.hindsight.apart is not None:
        larger, smaller = ended.hindsight.apart
        other, out = " and another learning_rate", "optimizer and the learning_rate"
        if ended.rates is Rates.SEARCHED:
            other, out = "", "optimizer"
        divided, what = "", "scale='curvature'"
        if ended.problem.objective.sizes is not None:
            divided, what = "Divided by scale, ", "other sizes"
        message += (
            f" {divided}{larger} and {smaller} differ in scale by 100 times or more. Pass {what}{other}, or leave the "
            f"{out} out."
        )
    message += _skipped(ended)
    if ended.method.name:
        message += f" The optimizer was {ended.method.name}."
    elif ended.rates is Rates.SEARCHED:
        message += _chosen_rates(ended.history.learning_rate)
    return message + _automatic(ended)


def failure(ended: Ended) -> str:
    """Return the sentence on a try that failed, for the message of the next one."""
    rates = ended.history.learning_rate
    if ended.status in FAILURES:
        what = f"the loss {'diverged' if ended.status is Status.DIVERGED else 'became infinite or NaN'}"
    else:
        what = "the loss had risen again" if ended.is_better else "the loss ended above that of the start"
    return f"At rates up to {np.nanmax(rates):.2g} {what} at step {ended.steps}, so gdopt tried again at lower ones."


def _automatic(ended: Ended) -> str:
    """Return the sentences on rates that gdopt chose by a range test, or by the distance that the params went."""
    if ended.method.tried is None:
        return ""
    test, rates = ended.range_test, ended.history[2]
    if not np.isfinite(rates).any():
        return ""
    highest = f"up to {np.nanmax(rates):.2g}"
    most, short = ended.inputs.limits.max_steps, ""
    if ended.status is Status.EARLY_STOPPED and ended.steps < most:  # A loss often falls most at the end of a cycle.
        many = "It was" if test is None else "They were"
        short = f" {many} meant for {most} steps, and the low rates at the end were not reached."
        short += " Ask for fewer steps, or leave patience out."
    if test is None:
        if ended.status is Status.DATA_EXHAUSTED and not ended.has_steps and ended.steps < most:
            short = f" It was meant for {most} steps. Pass max_steps={ended.steps} for a whole one."
        return f" gdopt chose the learning rates: one cycle {highest}.{short}"
    suggested = "nothing" if test.suggestion is None else f"{test.suggestion:.3g}"
    return (
        f" The learning rates were chosen by a range test of {len(test.learning_rate)} rates, which suggested "
        f"{suggested}: three cycles (triangular2) {highest}.{short}"
    )


def _skipped(ended: Ended) -> str:
    """Return the sentence on the batches that the optimizer skipped; "" if it skipped none."""
    bad = ~(np.isfinite(ended.history.loss) & np.isfinite(ended.history.grad_norm))
    bad = bad[:-1] if ended.status in FAILURES else bad
    if not ended.problem.noisy or not bad.any():
        return ""
    count, last = int(bad.sum()), bool(bad[-1]) and ended.status not in FAILURES
    was, back = "was" if count == 1 else "were", ""
    if last and ended.returned_step < ended.steps:
        back = f" The last one is among them, so the point of step {ended.returned_step} is returned."
    return f" The optimizer skipped {count} of {bad.size} evaluations, which {was} not finite.{back}"


def _by_validation(ended: Ended) -> str:
    """Return the sentences on the validation; "" if there was none."""
    found, why = ended.judgement, ""
    if found is None:
        return ""
    if ended.status is Status.EARLY_STOPPED:
        epochs = "an epoch" if found.patience == 1 else f"{found.patience} epochs"
        why = f" The validation loss reached no new low for {epochs}."
    if found.step is None:
        nan = f" {found.holds_nan} holds NaN. Leave out what is NaN, or fill it." if found.holds_nan else ""
        return f"{why} The validation loss was never finite.{nan}"
    returned = " is returned: it" if found.is_returned else ""
    return f"{why} The point of step {found.step}{returned} has the lowest validation loss, {found.loss:.6g}."


def _at_bounds(ended: Ended) -> str:
    """Return the sentence on the entries that are at their bounds; "" without bounds, or after a failure."""
    if ended.at_bounds is None or ended.status in FAILURES:
        return ""
    leaves = [leaf for leaf in jax.tree.leaves(ended.at_bounds) if isinstance(leaf, jax.Array)]
    count, size = sum(int(leaf.sum()) for leaf in leaves), sum(leaf.size for leaf in leaves)
    if count == 0:
        return " No entry of the params is at a bound."
    return f" {count} of {size} entries of the params {'is at its bound' if count == 1 else 'are at their bounds'}."


def _explain(status: Status, ended: Ended) -> str:
    """Return the sentence on the status, with its remedy."""
    words = _words(status, ended)
    first, last, after = words.first, words.last, words.after
    match status:
        case Status.CONVERGED:
            return _converged(ended, words)
        case Status.TARGET_REACHED:
            what = "mean loss of an epoch" if ended.problem.noisy else "loss"
            return (
                f"reached the target {after}: the {what}, {last}, is at or below {float(ended.inputs.limits.target):g}."
            )
        case Status.MAX_STEPS:
            return _noisy_max_steps(ended, words) if ended.problem.noisy else _max_steps(ended, words)
        case Status.PRECISION_LIMIT:
            return _precision_limit(ended, words)
        case Status.STALLED:
            return _stalled(ended, words)
        case Status.DIVERGED:
            return f"diverged at step {ended.steps}: the loss grew from {first} to {last}.{words.back} {words.slower}"
        case Status.NON_FINITE:
            return _non_finite(ended, words)
        case Status.STOPPED | Status.DATA_EXHAUSTED | Status.INTERRUPTED | Status.EARLY_STOPPED:
            went = f"the loss went from {first} to {last}"
            if words.width > 1 and words.width >= ended.steps:  # Both would be the same mean.
                went = f"the mean loss of these was {first}"
            return f"{_FROM_OUTSIDE[status]} {after}: {went}."


def _words(status: Status, ended: Ended) -> _Words:
    losses, steps, how, noisy = ended.history.loss, ended.steps, ended.rates, ended.problem.noisy
    # A single batch says little. So with mini-batches the sentence compares the means of the first and the last epoch,
    # without the evaluation after the last update. A full-batch run that did not fail ends with the returned point.
    width = (ended.steps_per_epoch or max(steps // _PART, 1)) if noisy and status not in FAILURES else 1
    end = steps if noisy or status in FAILURES else ended.returned_step
    seen = losses[: max(end, 1) if width > 1 and status is not Status.TARGET_REACHED else end + 1]
    if noisy and status not in FAILURES:  # The optimizer may have skipped some.
        losses, seen = (some[np.isfinite(some)] if np.isfinite(some).any() else some for some in (losses, seen))
    first, last = losses[:width].mean(), seen[-width:].mean()
    return _Words(
        first=f"{first:.6g}",
        last=f"{last:.6g}",
        end=end,
        width=width,
        falls=bool(last < first),
        after=f"after {steps} step{'' if steps == 1 else 's'}",
        back="" if ended.returned_step == steps else f" The point of step {ended.returned_step} is returned.",
        slower="Raise max_steps." if how is Rates.SEARCHED else _slower(ended, how is Rates.PLAIN and not noisy),
    )


def _converged(ended: Ended, words: _Words) -> str:
    losses, grad_norms = ended.history[:2]
    if grad_norms[words.end] == 0:
        seen = ", and no direction was seen in which the loss falls" if ended.ending.verified else ""
        return f"converged {words.after}: the {_gradient(ended)} is exactly zero{seen} (loss {words.last})."
    fall = f"the loss fell from {words.first} to {words.last}"
    fall = fall if fell(losses, ended.compiled.eps) else f"the loss is {words.last}"
    return f"converged {words.after}: {fall}{_left(ended)}"


def _noisy_max_steps(ended: Ended, words: _Words) -> str:
    steps, per_epoch, most = ended.steps, ended.steps_per_epoch, ended.inputs.limits.max_steps
    count = steps / (per_epoch or 1)
    epochs = "" if per_epoch in (1, None) else f" ({count:g} epoch{'s' * (count != 1)})"
    went, worse = f"went from {words.first} to {words.last}", ""
    which = f"the mean loss of {'an epoch' if per_epoch else f'{words.width} steps'}" if words.width > 1 else "the loss"
    if 1 < words.width >= steps:
        went = f"was {words.first}"
    if not ended.is_better:
        worse = f" That is above the loss of the start, {ended.history[0][0]:.6g}. {words.slower}"
    elif not (ended.success or words.falls):
        worse = f" The loss did not decrease. {words.slower}"
    what = f"the {steps} steps asked for" if ended.has_steps else f"{steps} steps, the default of max_steps"
    what = what if steps <= most else f"{steps} steps, more than asked for"
    return f"took {what}{epochs}: {which} {went}.{worse}"


def _max_steps(ended: Ended, words: _Words) -> str:
    losses, grad_norms = ended.history[:2]
    if not fell(losses, ended.compiled.eps):
        remedy = words.slower
        if ended.rates is Rates.SEARCHED and ended.steps >= MAX_REJECTED:
            remedy = f"None of {ended.steps} points along the gradient is lower, so it may not match the loss."
        return f"stopped at max_steps={ended.steps}: the loss never fell below its start, {words.first}. {remedy}"
    if ended.ran_away:
        return _unbounded(f"stopped at max_steps={ended.steps}", ended)
    if ended.noise:
        return _drowned(f"stopped at max_steps={ended.steps}, at a loss of {words.last}", ended.noise)
    return (
        f"stopped at max_steps={ended.steps} before it converged: the loss fell from {words.first} to {words.last}, "
        f"the {_gradient(ended)} norm is {grad_norms[words.end]:.3g}.{words.back} {_more(ended)}{_full_batch(ended)}"
    )


def _full_batch(ended: Ended) -> str:
    """Say that an epoch is one step, if there are data without a batch_size."""
    return " Without a batch_size an epoch is one step on all rows." if ended.problem.data is not None else ""


def _precision_limit(ended: Ended, words: _Words) -> str:
    if ended.ending.verified == BY_NEIGHBOURS:
        much = f": less than about {float(ended.ending.left):.1g} is left to gain" if ended.ending.left > 0 else ""
        return (
            f"reached the precision limit {words.after}: the loss {words.last} has a kink there, and neither {TRIED} "
            f"neighbours nor the gradients around it show a way down{much}."
        )
    more = " float64 may gain more." if ended.compiled.eps > _COARSE else ""
    return f"reached the precision limit {words.after}: the loss {words.last} no longer changes{_left(ended)}{more}"


def _non_finite(ended: Ended, words: _Words) -> str:
    (losses, grad_norms, rates), steps = ended.history[:3], ended.steps
    found, cure = ("", "") if ended.evidence is None else (ended.evidence.sentence, ended.evidence.cure)
    if steps == 0:
        is_scaled = ended.problem.objective.sizes is not None and np.isfinite(losses[0])
        if is_scaled and not (ended.evidence and ended.evidence.leaves):
            return (
                f"the gradient times scale is {grad_norms[0]:g} at the start, beyond the range of the params' dtype. "
                "Pass smaller sizes in scale=, or params of a wider dtype."
            )
        what = f"loss is {words.last}" if not np.isfinite(losses[0]) else f"gradient norm is {grad_norms[0]:g}"
        return f"the {what} at the start.{found} {cure or 'Start where the loss and its gradient are finite.'}"
    if losses[-1] == -np.inf:
        return (
            f"the loss became -inf at step {steps}, from {words.first} at the start: it has no lower bound, so no "
            f"minimum can be found.{words.back} Check its sign, or add a penalty."
        )
    if ended.ran_away:
        return _unbounded(f"left the range at step {steps}", ended)
    if ended.rates in (Rates.PLAIN, Rates.GIVEN) and not np.isfinite(rates[:steps]).all():
        bad = int(np.flatnonzero(~np.isfinite(rates[:steps]))[0])
        return f"the schedule gave the learning rate {rates[bad]:g} for step {bad}.{words.back} Correct the schedule."
    what = "params became NaN or infinite"  # The loss may not read these, or they may saturate it.
    if not np.isfinite(grad_norms[-1]):
        what = f"gradient norm became {grad_norms[-1]:g}"
    if not np.isfinite(losses[-1]):
        what = f"loss became {words.last}"
    rate = f", after an update with the learning rate {rates[-2]:.3g}" if np.isfinite(rates[-2]) else ""
    start = f"from a loss of {words.first} at the start"
    return f"the {what} at step {steps}{rate}, {start}.{found}{words.back} {cure or words.slower}"


def _gradient(ended: Ended) -> str:
    return "gradient" if ended.problem.constraint is None else "projected gradient"


def _left(ended: Ended) -> str:
    """Say how much is left to gain, in units of the loss, and how that is known."""
    left = float(ended.ending.left)
    if ended.ending.verified == UP_TO_NOISE:
        return f", and less is left to gain than its rounding there, {left:.2g}."
    much = f"about {left:.2g} is left to gain" if left > 0 else "nothing is left to gain"
    return f", and {much} by its curvature there."


def _unbounded(what: str, ended: Ended) -> str:
    losses = ended.history[0]
    return (
        f"{what}: the loss fell from {losses[0]:.6g} to {np.fmin.reduce(losses):.6g} as the params grew to "
        f"{ended.farthest:.2g}, so it seems to have no lower bound. Check its sign, or add a penalty."
    )


def _more(ended: Ended) -> str:
    """Return the remedy for a run that took all its steps."""
    losses, how = ended.history[0], ended.rates
    before = np.fmin.reduce(losses[:-_LAST]) if losses.size > _LAST else losses[0]
    if before - np.fmin.reduce(losses) > ROUNDING * ended.compiled.eps * abs(before):
        return "Raise max_steps." if how is Rates.SEARCHED else f"Raise max_steps, or try {_other(ended)}."
    if ended.hindsight.apart:
        return f"The last {_LAST} steps gained no more than rounding."
    return f"The last {_LAST} steps gained no more than rounding. Try {_other(ended)}."


def _other(ended: Ended, *, smaller: bool = False) -> str:
    """Name an alternative to what decided the rates."""
    if ended.rates is Rates.SEARCHED:
        return "another start"
    if ended.rates is Rates.OWNED:
        return "another optimizer"
    if smaller:
        return "a smaller learning_rate, or another start"
    losses = ended.history[0][-_LAST:]
    turns = np.diff(np.sign(np.diff(losses)))
    if ended.hindsight.overshoots or (turns.size >= _TURNS and np.mean(np.abs(turns) == 2) > _MOSTLY):
        return "a smaller learning_rate, because each step leads to the other side of the valley"
    if losses.min() == losses.max() == ended.history[0].max():
        return "a larger learning_rate"
    return "another learning_rate"


def _stalled(ended: Ended, words: _Words) -> str:
    (losses, grad_norms), after, last = ended.history[:2], words.after, words.last
    eps = ended.compiled.eps
    left = float(ended.ending.left)
    more = f"{f'about {left:.2g}' if np.isfinite(left) and left > 0 else 'more'} may be left to gain"
    tried = (losses + grad_norms)[losses != losses[-1]][-1:].sum()  # from the last trial with another loss
    if ended.ran_away:
        return _unbounded(f"stalled {after}", ended)
    if (decayed := _decayed(ended, words, more)) is not None:
        return decayed
    if ended.rates is Rates.SEARCHED and not np.isfinite(tried):
        return (
            f"stalled {after} at a loss of {last}: the loss or its gradient is not finite after the next step, however "
            "small it is. Start elsewhere, or make the loss finite around that point."
        )
    if (flawed := _flawed(ended, words, left)) is not None:
        return flawed
    rate = "" if ended.rates is Rates.SEARCHED else f" Try {_other(ended)}."
    wider = " float64 may gain more." if eps > _COARSE else ""
    if not fell(losses, eps):
        return (
            f"stalled {after}: the loss stays at {last}, within rounding ({eps:.1g} of it), though {more}. Either "
            f"the gradient does not match the loss, or the steps do not fit.{rate}{wider}"
        )
    return (
        f"stalled {after}: the loss {last} no longer changes by more than rounding ({eps:.1g} of it), though "
        f"{more}.{rate}{wider}"
    )


def _decayed(ended: Ended, words: _Words, more: str) -> str | None:
    """Say that the learning rate decayed too far, if it did."""
    rates, after, last = ended.history[2], words.after, words.last
    known = rates[np.isfinite(rates)]
    if ended.rates not in (Rates.PLAIN, Rates.GIVEN) or not known.size or known[-1] > _DECAYED * known.max():
        return None
    if known.max() == 0:
        return f"stalled {after} at a loss of {last}: {_RATE_OF_ZERO}"
    step = int(np.flatnonzero(rates > _DECAYED * known.max())[-1]) + 1
    return (
        f"stalled {after}: the learning rate decayed to {known[-1]:.2g} (below a thousandth of its highest after "
        f"step {step}), and nothing changes any more, though {more}. The loss went from {words.first} to {last}. Let "
        "the rate decay more slowly, or not so far."
    )


def _flawed(ended: Ended, words: _Words, left: float) -> str | None:
    """Say why the point is no minimum, if that was seen."""
    grad_norms, after, last = ended.history.grad_norm, words.after, words.last
    if ended.ending.flaw == OUTSIDE:
        name = "project" if ended.problem.constraint.prox is None else "prox"
        return (
            f"stalled {after} at a loss of {last}: {name} moves this point, so it is not in the set. Steps between two "
            "points of a set leave it if it is not convex. Pass the nearest point of a convex set."
        )
    if ended.ending.flaw == SATURATED:
        return (
            f"stalled {after} at a loss of {last}: unlike at the start, the loss does not depend on some of the "
            "params, so they have gone too far. Start nearer to what you expect, or keep them within bounds."
        )
    if ended.ending.flaw == DROWNED:
        return _drowned(f"stalled {after} at a loss of {last}", left)
    saddle = ended.ending.flaw == SADDLE
    near = saddle and grad_norms[ended.returned_step] <= 1e-3 * grad_norms[0]
    if not near and grad_norms[-1] != 0:
        return None
    if grad_norms[ended.returned_step] > 0 and not near:
        return (
            f"stalled {after}: the gradient is exactly zero at the last point, but not at the best, whose loss is "
            f"{last}. Try {_other(ended, smaller=True)}."
        )
    where = "a saddle or a maximum, where the curvature is negative" if saddle else "no minimum"
    return f"stalled {after}: the gradient vanishes at {where} (loss {last}). Start elsewhere, such as at random."


def _drowned(what: str, noise: float) -> str:
    return (
        f"{what}: most of what it gained is rounding, because it changes by {noise:.2g} if the params change by a few "
        "roundings. Compute the loss without large terms that cancel, or start elsewhere."
    )


def _chosen_rates(rates: np.ndarray) -> str:
    """Return the sentence on the rates that were found."""
    used = rates[rates > 0]  # A rate of 0 only leads back to the accepted point.
    if not used.size:
        return ""
    return f" The learning rate was chosen at each step, between {used.min():.2g} and {used.max():.2g}."


def fell(losses: np.ndarray, eps: float) -> bool:
    """Tell whether the loss has fallen by more than rounding; trials need not be finite."""
    first = losses[0]
    with np.errstate(invalid="ignore"):  # The loss may be infinite at the start, and not fall.
        return bool(first - np.nanmin(losses) > ROUNDING * eps * abs(first))


def _slower(ended: Ended, plain: bool) -> str:
    """Advise to lower the rate, with a number if the growth of the gradient reveals the curvature.

    Along the direction in which x - lr g diverges, the gradient is multiplied by 1 - lr L at each step. So the ratio r
    of two gradient norms gives L = (1 + r) / lr, and the largest stable rate 2 / L.
    """
    losses, grad_norms, rates = ended.history[:3]
    known = rates[np.isfinite(rates)]
    if not known.size:
        return (
            "Try a smaller learning rate in the optimizer. If you chain parts (for example optax.scale_by_adam()), the "
            "last one has to be optax.scale_by_learning_rate(...)."
        )
    highest = known.max()
    if known.min() < 0:
        return f"The schedule gave a negative rate, {known.min():.3g}. With a rate above 0 the loss can fall."
    if highest == 0:
        return _RATE_OF_ZERO[0].upper() + _RATE_OF_ZERO[1:]
    if losses.min() == losses.max():
        return "It has not changed at all. Raise max_steps, or try a larger learning_rate."
    with np.errstate(all="ignore"):
        ratio = grad_norms[1:] / grad_norms[:-1]
        stable = 2 * rates[:-1] / (1 + ratio)
    grew = (stable > 0) & (ratio > 1) & (ratio < _WORTHLESS)
    limit = float(np.median(stable[grew])) if plain and grew.any() else ended.hindsight.stable
    if limit is None:
        return f"Try a learning_rate well below {highest:.2g} (a tenth of it)."
    digit = 10.0 ** (np.floor(np.log10(limit)) - 1)
    return f"Try a learning_rate below {np.floor(limit / digit) * digit:.2g}."
