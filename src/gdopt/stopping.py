"""When a run ends, and what is said about it: the device returns a code, the host turns it into a sentence."""

from __future__ import annotations

import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_NUMBER_FORMATS = tuple("bcdeEfFgGnoxX%")  # the last letter of what formats a number


class Status(enum.IntEnum):
    """Why a run ended.

    - ``CONVERGED``: what is left to gain is at most ``tol`` of what was gained, or the gradient is exactly zero.
    - ``TARGET_REACHED``: the loss is at or below ``target``.
    - ``MAX_STEPS``: the steps or epochs that were asked for are done.
    - ``PRECISION_LIMIT``: for 50 updates (or 1000 that moved nothing) the loss changed by no more than rounding, or the
      search for a rate found no further step.
    - ``DIVERGED``: the loss has grown a millionfold and the gradient a thousandfold.
    - ``NON_FINITE``: the loss, its gradient or the params became infinite or NaN, other than at a trial that is taken
      back.
    - ``STOPPED``: the callback asked for the end.
    - ``INTERRUPTED``: Ctrl-C.
    - ``DATA_EXHAUSTED``: a stream of batches ended before the steps or epochs that were asked for.

    Prints as its name; otherwise it is an int.

    Example:
        >>> import gdopt
        >>> print(gdopt.Status.CONVERGED)
        CONVERGED
        >>> f"{gdopt.Status(3)} has the number {gdopt.Status(3):d}"
        'MAX_STEPS has the number 3'
    """

    CONVERGED = 1
    TARGET_REACHED = 2
    MAX_STEPS = 3
    PRECISION_LIMIT = 4
    DIVERGED = 5
    NON_FINITE = 6
    STOPPED = 7
    INTERRUPTED = 8
    DATA_EXHAUSTED = 9

    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        return format(int(self) if spec.endswith(_NUMBER_FORMATS) else self.name, spec)


class Rates(enum.Enum):
    """Who decided the rates of a run, which says what to try next."""

    PLAIN = "given, and each step was x - lr * g"
    GIVEN = "given to another optimizer"
    OWNED = "the optimizer's own"
    SEARCHED = "found by trial at each step"


RUNNING = 0
FAILURES = (Status.DIVERGED, Status.NON_FINITE)

# A diverging quadratic's loss grows with the square of its gradient. Asking for both keeps a loss whose zero is
# arbitrary (f0 near 0), or a start near a saddle (g0 near 0), from being called divergence.
_GROWN_LOSS = 1e6
_GROWN_GRADIENT = 1e3
_STALLED_UPDATES = 50
_PER_UPDATE = 20
_NEAR = 3e5
_NEAR_ROOT = 30
_PART = 10  # of a stream that ended in its first pass, so much at either end is compared
_WORTHLESS = 1e4  # a gradient that grew so much in one step tells of no quadratic
_ROUNDING = 100  # evaluations within this many eps |f| of each other differ by rounding only


class Limits(NamedTuple):
    """What a run is asked for; traced, so that new values compile nothing."""

    max_steps: jax.Array | int
    tol: jax.Array | float
    target: jax.Array | float


class Watch(NamedTuple):
    """What the tests remember between two evaluations."""

    first_loss: jax.Array
    first_grad_norm: jax.Array
    mark: jax.Array  # the best loss when it last improved by more than rounding
    stalled: jax.Array  # how long it has not, in units of 1 / _PER_UPDATE updates
    grad_norm: jax.Array  # of the last evaluation
    epoch_loss: jax.Array  # sum of this epoch's losses


class Epoch(NamedTuple):
    """Where an evaluation of a noisy loss stands in its pass over the data."""

    begins: jax.Array | bool
    ends: jax.Array | bool
    steps: jax.Array | int  # of the whole pass; read where it ends


class Evaluation(NamedTuple):
    """One point: how many updates led to it, and what was measured there."""

    step: jax.Array
    loss: jax.Array
    grad_norm: jax.Array
    distance: jax.Array  # |x - x0|; zero or infinite where squares leave the dtype's range
    finite: jax.Array  # whether the params are


def first_watch(loss_dtype, norm_dtype) -> Watch:
    """Before the first evaluation."""
    unknown = jnp.full((), jnp.inf, loss_dtype)
    return Watch(
        first_loss=unknown,
        first_grad_norm=jnp.full((), jnp.inf, norm_dtype),
        mark=unknown,
        stalled=jnp.int32(0),
        grad_norm=jnp.full((), jnp.inf, norm_dtype),
        epoch_loss=jnp.zeros((), loss_dtype),
    )


# jit, inlined, so that these forty small operations are traced once in a process and not at each call.
@functools.partial(jax.jit, static_argnums=5, inline=True)
def judge(
    watch: Watch,
    kept_loss: jax.Array,
    point: Evaluation,
    limits: Limits,
    gave_up: jax.Array | None,
    eps: float,
    epoch: Epoch | None,
) -> tuple[jax.Array, Watch]:
    """The code of this evaluation (RUNNING or a Status) and what to remember; ``kept_loss`` is of the point to return.

    ``epoch`` is None for a loss that is the same function at each step. For a noisy one (mini-batches, random
    keys) a single small gradient says nothing, so only the target (on the mean of an epoch), divergence and the number
    of steps are tested.

    ``gave_up`` is of an optimizer that takes bad points back by itself: whether it has found no further step. Its
    points are trials, and no trial is a failure. None for all other optimizers.
    """
    k, loss, grad_norm = point.step, point.loss, point.grad_norm
    start = watch.first_loss == jnp.inf  # nothing was evaluated yet
    first_loss = jnp.where(start, loss, watch.first_loss)
    first_grad_norm = jnp.where(start, grad_norm, watch.first_grad_norm)

    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & point.finite  # what a loss does not read may be NaN
    size = jnp.maximum(jnp.abs(first_loss), first_loss - kept_loss)
    diverged = (loss - first_loss > _GROWN_LOSS * size) & (grad_norm > _GROWN_GRADIENT * first_grad_norm)
    failed = ~finite
    if gave_up is not None:
        diverged = jnp.asarray(False)
        failed = failed & (start | (loss == -jnp.inf) | ~point.finite)  # below that nothing is to be found

    # The precision test looks at the loss, so it must not take for a limit what is a pause: an evaluation that repeats
    # the last one may come from gradients that are being accumulated or a rate of 0, and counts a twentieth; and an
    # iterate that wanders above the best by more than rounding is on its way. Rounding is relative to the loss, and to
    # that part of the gain which is asked for: towards a loss of zero there would be no end to what can be gained.
    rounding = eps * jnp.maximum(jnp.abs(watch.mark), limits.tol * (first_loss - watch.mark))
    gained = start | (loss < watch.mark - rounding)
    mark = jnp.where(gained, loss, watch.mark)
    wanders = ~(loss <= mark + _ROUNDING * rounding)
    stalled = jnp.where(gained | wanders, 0, watch.stalled + jnp.where(grad_norm == watch.grad_norm, 1, _PER_UPDATE))

    if epoch is None:
        reached = loss <= limits.target
        # For convex f, f(x) - f* <= |g| |x - x*|, with |x - x0| for the unknown distance: what is left is at most tol
        # of what was gained. No step size appears, so tiny rates and accumulating optimizers cannot fool it.
        gain = first_loss - loss
        converged = ((gain > 0) & (point.distance > 0) & (grad_norm * (point.distance / gain) <= limits.tol)) | (
            grad_norm == 0
        )
        limited = stalled >= _STALLED_UPDATES * _PER_UPDATE
        if gave_up is not None:
            converged = converged & (start | (loss <= kept_loss))  # a trial on a plateau higher up has no gradient, too
            limited = limited | gave_up
        epoch_loss = watch.epoch_loss
    else:
        epoch_loss = jnp.where(epoch.begins, 0, watch.epoch_loss) + loss
        reached = epoch.ends & (epoch_loss / epoch.steps <= limits.target)
        converged = limited = jnp.asarray(False)

    code = jnp.int32(RUNNING)
    for status, holds in (  # the later, the stronger
        (Status.MAX_STEPS, k >= limits.max_steps),
        (Status.PRECISION_LIMIT, limited),
        (Status.DIVERGED, diverged),
        (Status.CONVERGED, converged),
        (Status.TARGET_REACHED, reached),
        (Status.NON_FINITE, failed),
    ):
        code = jnp.where(holds, jnp.int32(status), code)
    return code, Watch(first_loss, first_grad_norm, mark, stalled, grad_norm, epoch_loss)


def failed(code: jax.Array) -> jax.Array:
    """Whether a run ended by a failure."""
    return functools.reduce(jnp.logical_or, [code == status for status in FAILURES])


def is_good(watch: Watch, kept_loss: jax.Array, loss: jax.Array) -> jax.Array:
    """Whether a noisy run may fall back on this point: its loss is at most the start's, give or take its own size."""
    size = jnp.maximum(jnp.abs(watch.first_loss), watch.first_loss - kept_loss)
    return loss <= watch.first_loss + size


def explain(
    status: Status,
    *,
    steps: int,
    returned_step: int,
    history: tuple[np.ndarray, np.ndarray, np.ndarray],
    limits: Limits,
    noisy: bool,
    steps_per_epoch: int | None,
    eps: float,
    how: Rates,
    success: bool,
    not_finite: tuple[str, str] = ("", ""),
) -> str:
    """The sentence for a status, with its remedy; ``not_finite``, what is known of a last point that is not, and the
    remedy for that."""
    losses, grad_norms, rates = history
    found, cure = not_finite
    # A single batch says little: with mini-batches, the mean of the first and of the last epoch. A full-batch run that
    # did not fail speaks of the point that it returns.
    width = (steps_per_epoch or max(steps // _PART, 1)) if noisy and status not in FAILURES else 1
    end = steps if noisy or status in FAILURES else returned_step
    first, last = f"{losses[:width].mean():.6g}", f"{losses[: end + 1][-width:].mean():.6g}"
    after = f"after {steps} step{'' if steps == 1 else 's'}"
    back = "" if returned_step == steps else f" The point of step {returned_step} is returned."
    tried = losses[losses != losses[-1]][-1:].sum()  # the last trial that led elsewhere
    plain = how is Rates.PLAIN and not noisy
    slower = "Raise max_steps." if how is Rates.SEARCHED else _slower(losses, grad_norms, rates, plain)
    match status:
        case Status.CONVERGED if grad_norms[-1] == 0:
            return f"converged {after}: the gradient is exactly zero (loss {last})."
        case Status.CONVERGED:
            return (
                f"converged {after}: the loss fell from {first} to {last}, and at most about {float(limits.tol):g} of "
                "that is left to gain (by the convexity bound)."
            )
        case Status.TARGET_REACHED:
            what = "mean loss of an epoch" if noisy else "loss"
            return f"reached the target {after}: the {what}, {last}, is at or below {float(limits.target):g}."
        case Status.MAX_STEPS if noisy:
            epochs = "" if steps_per_epoch in (1, None) else f" ({steps / steps_per_epoch:g} epochs)"
            worse = f" That is no fall. {slower}" if losses[-width:].mean() >= losses[:width].mean() else ""
            what = (
                f"the {steps} steps asked for" if steps <= limits.max_steps else f"{steps} steps, more than asked for"
            )
            return f"took {what}{epochs}: the loss went from {first} to {last}.{worse}"
        case Status.MAX_STEPS if not fell(losses, eps):
            return f"stopped at max_steps={steps}: the loss never fell below its start, {first}. {slower}"
        case Status.MAX_STEPS:
            another = "" if how is Rates.SEARCHED else ", or try another learning_rate"
            return (
                f"stopped at max_steps={steps} before it converged: the loss fell from {first} to {last}, the gradient "
                f"norm is {grad_norms[end]:.3g}.{back} Raise max_steps{another}."
            )
        case Status.PRECISION_LIMIT if how is Rates.SEARCHED and not success and not np.isfinite(tried):
            return (
                f"got stuck {after} at a loss of {last}: however small the next step, the loss or its gradient is not "
                "finite there. Start elsewhere, or make the loss finite around that point."
            )
        case Status.PRECISION_LIMIT if not fell(losses, eps):
            rate = "" if how is Rates.SEARCHED else ", or the learning rate does not fit: try a larger or a smaller one"
            return (
                f"nothing has changed {after}: the loss stays at {last}, within rounding ({eps:.1g} of it). Either the "
                f"start is a minimum already{rate}, or the gradient is not that of the loss."
            )
        case Status.PRECISION_LIMIT if not success:
            larger = "" if how is Rates.SEARCHED else "a larger rate or "
            return (
                f"got stuck {after}: the loss {last} no longer changes by more than rounding ({eps:.1g} of it), though "
                f"by its gradient (norm {grad_norms[end]:.3g}) more may be gained. Try {larger}float64."
            )
        case Status.PRECISION_LIMIT:
            return (
                f"reached the precision limit {after}: the loss {last} no longer changes by more than rounding "
                f"({eps:.1g} of it). Where that is not enough, float64 may gain more."
            )
        case Status.DIVERGED:
            return f"diverged at step {steps}: the loss grew from {first} to {last}.{back} {slower}"
        case Status.NON_FINITE if steps == 0:
            what = f"loss is {last}" if not np.isfinite(losses[0]) else f"gradient norm is {grad_norms[0]:g}"
            return f"the {what} at the start.{found} {cure or 'Start where the loss and its gradient are finite.'}"
        case Status.NON_FINITE if losses[-1] == -np.inf:
            return (
                f"the loss became -inf at step {steps}, from {first} at the start: it has no lower bound, so no "
                f"minimum can be found.{back} Check its sign, or add a penalty."
            )
        case Status.NON_FINITE if how is not Rates.OWNED and not np.isfinite(rates[:steps]).all():
            bad = int(np.flatnonzero(~np.isfinite(rates[:steps]))[0])
            return f"the schedule gave the learning rate {rates[bad]:g} for step {bad}.{back} Correct the schedule."
        case Status.NON_FINITE:
            what = "params became NaN or infinite"  # those that the loss does not read, or by which it is saturated
            if not np.isfinite(grad_norms[-1]):
                what = f"gradient norm became {grad_norms[-1]:g}"
            if not np.isfinite(losses[-1]):
                what = f"loss became {last}"
            rate = f", after an update with the learning rate {rates[-2]:.3g}" if np.isfinite(rates[-2]) else ""
            return (
                f"the {what} at step {steps}{rate}, from a loss of {first} at the start.{found}{back} {cure or slower}"
            )
        case Status.STOPPED:
            return f"stopped by the callback {after}: the loss went from {first} to {last}."
        case Status.DATA_EXHAUSTED:
            return f"the data ended {after}: the loss went from {first} to {last}."
        case Status.INTERRUPTED:
            return f"interrupted {after}: the loss went from {first} to {last}."


def chosen_rates(rates: np.ndarray) -> str:
    """What a message adds where nobody gave a rate."""
    used = rates[rates > 0]  # not the one that leads back to where a search began
    if not used.size:
        return ""
    return f" The learning rate was chosen at each step, between {used.min():.2g} and {used.max():.2g}."


def fell(losses: np.ndarray, eps: float) -> bool:
    """Whether the loss has fallen by more than rounding; the trials of a search need not be finite."""
    return bool(_fell(losses[0], np.nanmin(losses), eps))


def _fell(first: Any, best: Any, eps: float) -> Any:
    with np.errstate(invalid="ignore"):  # of a loss that is infinite at the start, and did not fall
        return first - best > _ROUNDING * eps * abs(first)


def succeeded(code: Any, first: Any, best: Any, left: Any, eps: float, *, noisy: bool, has_target: bool) -> Any:
    """Whether a run ended as asked; all of it may be traced.

    ``left`` is |g| |x - x0|, the convexity bound of what is left to gain.
    """
    # Steps too small to change anything look just like the precision limit: they have gained nothing, or the gradient
    # is still large. Measured at true limits: left up to 1.4e5 eps |f|; where the rate had run out: from 3e6.
    # Where the loss is flat to rounding the gradient still goes as its root: of that, 30 times in float64.
    share = max(_NEAR * eps, _NEAR_ROOT * eps**0.5)
    little = (left <= share * abs(first)) | (left <= share * abs(best))
    at_limit = (code == Status.PRECISION_LIMIT) & _fell(first, best, eps) & little
    done = (code == Status.MAX_STEPS) & (noisy and not has_target)
    return (code == Status.CONVERGED) | (code == Status.TARGET_REACHED) | at_limit | done


def _slower(losses: np.ndarray, grad_norms: np.ndarray, rates: np.ndarray, plain: bool) -> str:
    """The advice to lower the rate; with a number where the growth of the gradient betrays the curvature.

    Along the direction in which x - lr g diverges, the gradient is multiplied by 1 - lr L at each step, so the ratio r
    of two gradient norms gives L = (1 + r) / lr, and the largest stable rate 2 / L.
    """
    known = rates[np.isfinite(rates)]
    if not known.size:
        return (
            "Try a smaller learning rate in the optimizer; one that is made of parts, such as optax.scale_by_adam(), "
            "needs optax.scale_by_learning_rate(...) as its last."
        )
    highest = known.max()
    if known.min() < 0:
        return f"The schedule gave a negative rate, {known.min():.3g}: with a rate above 0 the loss can fall."
    if highest == 0:
        return "The learning rate was 0 at each step: with one above 0 the loss can fall."
    if losses.min() == losses.max():
        return "It has not changed at all: raise max_steps, or try a larger learning_rate."
    with np.errstate(all="ignore"):
        ratio = grad_norms[1:] / grad_norms[:-1]
        stable = 2 * rates[:-1] / (1 + ratio)
    grew = (stable > 0) & (ratio > 1) & (ratio < _WORTHLESS)
    if not plain or not grew.any():
        return f"Try a learning_rate well below {highest:.2g}, a tenth of it, say."
    limit = float(np.median(stable[grew]))
    digit = 10.0 ** (np.floor(np.log10(limit)) - 1)
    return f"Try a learning_rate below {np.floor(limit / digit) * digit:.2g}."
