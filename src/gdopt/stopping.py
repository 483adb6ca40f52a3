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
    """The reason why a run ended.

    - ``CONVERGED``: little is left to gain, by ``tol`` or ``grad_tol``, or the gradient is exactly zero. Verified at
      the point that is returned.
    - ``TARGET_REACHED``: the loss is at or below ``target``.
    - ``MAX_STEPS``: the steps or epochs that were asked for are done.
    - ``PRECISION_LIMIT``: the loss changes by no more than rounding, and what is left to gain is below that, too; or it
      has a kink, and no neighbour is lower.
    - ``DIVERGED``: the loss has grown a millionfold and the gradient a thousandfold, and they went on growing.
    - ``NON_FINITE``: the loss, its gradient or the params became infinite or NaN, other than at a trial that is taken
      back.
    - ``STOPPED``: the callback asked for the end.
    - ``INTERRUPTED``: Ctrl-C.
    - ``DATA_EXHAUSTED``: a stream of batches ended before the steps or epochs that were asked for.
    - ``STALLED``: for 50 updates (or 1000 that moved nothing) the loss changed by no more than rounding, or no further
      step was found, although more is left to gain: the learning rate has decayed, the point is a saddle, params went
      so far that the loss does not depend on them any more, or most of what the loss gained is rounding.

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
    STALLED = 10

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
_CODES = 16  # more than there are
FAILURES = (Status.DIVERGED, Status.NON_FINITE)

# A diverging quadratic's loss grows with the square of its gradient. Asking for both keeps a loss whose zero is
# arbitrary (f0 near 0), or a start near a saddle (g0 near 0), from being called divergence.
_GROWN_LOSS = 1e6
_GROWN_GRADIENT = 1e3
_GROWN_FOR = 20  # doublings, at least
_HELD = 5  # evaluations in a row at which little is left
_HELD_ACCEPTED = 2  # the same of accepted points, whose curvature is known
_PART_LEFT = 0.1  # of the loss: with more of it left, its size is not yet that of the minimum
NOTHING = 1e-12  # of what was gained: a loss below counts as zero
_LESS = 0.1  # of what is asked for: asked for after a claim that was contradicted
LEAST_BAR = 1e-30  # after 30 of them a run that is stuck has stalled, even if there is a lower point
_STALLED_UPDATES = 50
_PER_UPDATE = 20
_IDLE = 1000  # evaluations of a search without a gain, after which nothing more is expected
_RECENT = 20  # evaluations of a loss with random keys that are averaged
_PART = 10  # of a stream that ended in its first pass, so much at either end is compared
_WORTHLESS = 1e4  # a gradient that grew so much in one step tells of no quadratic
_ROUNDING = 100  # evaluations within this many eps |f| of each other differ by rounding only
_KNOWN = 30  # eps |f|: how well a loss is known that is a sum of many terms


class Limits(NamedTuple):
    """The limits of a run; traced, so that new values compile nothing."""

    max_steps: jax.Array | int
    tol: jax.Array | float
    grad_tol: jax.Array | float | None  # None: not tested
    target: jax.Array | float


class Watch(NamedTuple):
    """The memory of the tests between two evaluations."""

    first_loss: jax.Array
    first_grad_norm: jax.Array
    mark: jax.Array  # the best loss when it last improved by more than rounding
    stalled: jax.Array  # how long it has not, in units of 1 / _PER_UPDATE updates
    idle: jax.Array  # of a search, the same in evaluations, wherever the trials were in between
    grad_norm: jax.Array  # of the last evaluation
    peak: jax.Array  # the highest loss, up to a factor of two
    grown: jax.Array  # how often that was surpassed in a row, after loss and gradient had grown
    # Of a loss that is the same function at each step:
    older: jax.Array  # the best loss after between a quarter and half of the steps made so far
    recent: jax.Array  # the same after half of them or more
    doubles: jax.Array  # the step at which they are renewed
    accepted: jax.Array  # points, of an optimizer that takes others back
    held: jax.Array  # how often in a row little was left
    bar: jax.Array  # the share of what is asked for that is asked for now
    patience: jax.Array  # the step before which nothing is claimed
    # Of a noisy one:
    epoch_loss: jax.Array  # the sum of this epoch's losses
    mean_loss: jax.Array  # of the last epoch, or of the last evaluations
    spread: jax.Array  # how far the last evaluations were from that


class Epoch(NamedTuple):
    """The place of an evaluation of a noisy loss in its pass over the data."""

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
    largest: jax.Array | None  # entry of the gradient, if that is tested


class Search(NamedTuple):
    """The state of an optimizer that takes bad points back, before it has seen an evaluation."""

    gave_up: jax.Array  # it has found no further step
    accepted: jax.Array  # points so far
    left: jax.Array  # what its curvature says is left to gain at the last one


class Ending(NamedTuple):
    """The facts about the point that is returned."""

    left: Any  # to gain, in units of the loss; NaN if unknown
    verified: Any  # NOT_VERIFIED, BY_CURVATURE, BY_NEIGHBOURS or UP_TO_NOISE
    flaw: Any  # that shows it to be no minimum: NONE_SEEN, SADDLE, SATURATED or DROWNED


NOT_VERIFIED, BY_CURVATURE, BY_NEIGHBOURS, UP_TO_NOISE = range(4)
NONE_SEEN, SADDLE, SATURATED, DROWNED = range(4)  # a saddle may be a maximum; a loss drowns in its rounding


def first_ending(dtype: Any) -> Ending:
    """Before anything is known."""
    return Ending(jnp.full((), jnp.nan, dtype), jnp.int32(NOT_VERIFIED), jnp.int32(NONE_SEEN))


def first_watch(loss_dtype, norm_dtype) -> Watch:
    """Before the first evaluation."""
    unknown = jnp.full((), jnp.inf, loss_dtype)
    none = jnp.int32(0)
    return Watch(
        first_loss=unknown,
        first_grad_norm=jnp.full((), jnp.inf, norm_dtype),
        mark=unknown,
        stalled=none,
        idle=none,
        grad_norm=jnp.full((), jnp.inf, norm_dtype),
        peak=-unknown,
        grown=none,
        older=unknown,
        recent=unknown,
        doubles=jnp.int32(2),
        accepted=none,
        held=none,
        bar=jnp.ones((), loss_dtype),
        patience=none,
        epoch_loss=jnp.zeros((), loss_dtype),
        mean_loss=jnp.zeros((), loss_dtype),
        spread=jnp.zeros((), loss_dtype),
    )


# jit, inlined, so that these many small operations are traced once in a process and not at each call.
@functools.partial(jax.jit, static_argnums=5, inline=True)
def judge(
    watch: Watch,
    kept_loss: jax.Array,
    point: Evaluation,
    limits: Limits,
    search: Search | None,
    eps: float,
    epoch: Epoch | None,
) -> tuple[jax.Array, Watch]:
    """The code of this evaluation (RUNNING or a Status) and what to remember; ``kept_loss`` is of the point to return.

    CONVERGED and PRECISION_LIMIT are claims that are still to be verified. ``epoch`` is None for a loss that is the
    same function at each step. For a noisy one (mini-batches, random keys) a single small gradient says nothing, so
    only the target (on the mean of an epoch), divergence and the number of steps are tested.

    ``search`` is of an optimizer that takes bad points back by itself. Its points are trials, and no trial is a
    failure. None for all other optimizers.
    """
    k, loss, grad_norm = point.step, point.loss, point.grad_norm
    start = watch.first_loss == jnp.inf  # nothing was evaluated yet
    first_loss = jnp.where(start, loss, watch.first_loss)
    first_grad_norm = jnp.where(start, grad_norm, watch.first_grad_norm)

    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & point.finite  # what a loss does not read may be NaN
    size = jnp.maximum(jnp.abs(first_loss), first_loss - kept_loss)
    grows = (loss - first_loss > _GROWN_LOSS * size) & (grad_norm > _GROWN_GRADIENT * first_grad_norm)
    higher = loss > jnp.maximum(2 * watch.peak, watch.peak)
    grown = jnp.where(grows, watch.grown + higher, 0)  # some optimizers stay up there for long, and come back
    peak = jnp.where(finite & higher, loss, watch.peak)
    failed = ~finite
    if search is not None:
        grown = jnp.zeros_like(grown)
        failed = failed & (start | (loss == -jnp.inf) | ~point.finite)  # below that nothing is to be found
    diverged = (grown >= _GROWN_FOR) | (failed & (watch.grown > 0))

    # The precision test looks at the loss, so it must not take for a limit what is a pause: an evaluation that repeats
    # the last one may come from gradients that are being accumulated or a rate of 0, and counts a twentieth; and an
    # iterate that wanders above the best by more than rounding is on its way. Rounding is relative to the loss, and to
    # that part of the gain which is asked for: towards a loss of zero there would be no end to what can be gained.
    rounding = eps * jnp.maximum(jnp.abs(watch.mark), limits.tol * (first_loss - watch.mark))
    gained = start | (loss < watch.mark - rounding)
    mark = jnp.where(gained, loss, watch.mark)
    wanders = ~(loss <= mark + _ROUNDING * rounding)
    stalled = jnp.where(gained | wanders, 0, watch.stalled + jnp.where(grad_norm == watch.grad_norm, 1, _PER_UPDATE))
    new = watch._replace(
        first_loss=first_loss,
        first_grad_norm=first_grad_norm,
        mark=mark,
        stalled=stalled,
        grad_norm=grad_norm,
        peak=peak,
        grown=grown,
    )

    if epoch is None:
        reached = finite & (loss <= limits.target)
        new = _count_held(new, kept_loss, point, limits, search, start)
        held = _HELD if search is None else _HELD_ACCEPTED
        flat = (grad_norm == 0) & (start | (loss <= kept_loss))  # a plateau higher up has no gradient, too
        converged = ((new.held >= held) & (k >= watch.patience)) | flat
        if point.largest is not None and limits.grad_tol is not None:
            converged = converged | (finite & (point.largest <= limits.grad_tol) & (start | (loss <= kept_loss)))
        limited = stalled >= _STALLED_UPDATES * _PER_UPDATE
        if search is not None:
            new = new._replace(idle=jnp.where(gained, 0, watch.idle + 1))
            limited = limited | search.gave_up | ((new.idle >= _IDLE) & (mark < first_loss))
    else:
        epoch_loss = jnp.where(epoch.begins, 0, watch.epoch_loss) + loss
        mean = epoch_loss / epoch.steps
        reached = epoch.ends & (mean <= limits.target)
        converged = limited = jnp.asarray(False)
        # Before the first epoch has ended, and for random keys, of which each is an epoch: the last evaluations.
        some = watch.mean_loss + (loss - watch.mean_loss) / jnp.minimum(k + 1, _RECENT)
        whole = jnp.asarray(epoch.steps) > 1
        mean_loss = jnp.where(epoch.ends & whole, mean, jnp.where(whole & (k >= epoch.steps), watch.mean_loss, some))
        off = jnp.where(start, 0, jnp.abs(loss - watch.mean_loss))
        spread = watch.spread + (off - watch.spread) / jnp.minimum(k + 1, _RECENT)
        new = new._replace(
            epoch_loss=epoch_loss, mean_loss=mean_loss.astype(loss.dtype), spread=spread.astype(loss.dtype)
        )

    causes = (  # the later, the stronger
        (Status.MAX_STEPS, k >= limits.max_steps),
        (Status.PRECISION_LIMIT, limited),
        (Status.CONVERGED, converged),
        (Status.TARGET_REACHED, reached),
        (Status.NON_FINITE, failed),
        (Status.DIVERGED, diverged),
    )
    # As a reduction, which XLA computes once: anything else it would compute anew for each leaf of the params that the
    # code decides on, and compile as often.
    holds = jnp.stack([holds for _, holds in causes])
    ranked = jnp.stack([jnp.int32(rank * _CODES + status) for rank, (status, _) in enumerate(causes)])
    code = jnp.max(jnp.where(holds, ranked, RUNNING)) % _CODES
    return code, new


def _count_held(
    watch: Watch,
    kept_loss: jax.Array,
    point: Evaluation,
    limits: Limits,
    search: Search | None,
    start: jax.Array,
) -> Watch:
    """Count the points in a row at which what seems to be left is little.

    An optimizer that learns the curvature tells what is left. Little is ``tol`` of what about the second half of the
    run has gained: what it gained from a bad start says nothing of the scale of the minimum. As long as all of a loss
    is left, its size does not either. Of another optimizer, what is left is at most |g| |x - x*| for a convex loss
    (Boyd & Vandenberghe, "Convex Optimization", section 9.1.2), with |x - x0| for the unknown distance; then little is
    ``tol`` of what the run has gained, as the claim is to be verified anyway.
    """
    best = jnp.where(start, point.loss, jnp.fmin(kept_loss, point.loss))
    renews = point.step >= watch.doubles
    older = jnp.where(start, best, jnp.where(renews, watch.recent, watch.older))
    recent = jnp.where(start | renews, best, watch.recent)
    doubles = jnp.where(renews, 2 * watch.doubles, watch.doubles)
    if search is None:
        here, counts, accepted = point.loss, jnp.asarray(True), watch.accepted
        gain = watch.first_loss - here
        little = (point.distance > 0) & (gain > 0)
        little &= point.grad_norm * (point.distance / gain) <= watch.bar * limits.tol
    else:
        here, counts, accepted = kept_loss, search.accepted != watch.accepted, search.accepted
        gain = older - here
        little = (search.accepted > 1) & (gain > 0) & (search.left <= watch.bar * (limits.tol * gain))
        little &= ~is_all(search.left, here, watch, NOTHING)
    held = jnp.where(counts, jnp.where(little, watch.held + 1, 0), watch.held)
    return watch._replace(older=older, recent=recent, doubles=doubles, accepted=accepted, held=held)


def is_all(left: Any, loss: Any, watch: Watch, nothing: Any) -> Any:
    """Tell whether most of a loss is left to gain: the minimum may then be zero, whatever the size of the loss.

    A share of ``nothing`` of what was gained is not worth the question.
    """
    return (left > _PART_LEFT * abs(loss)) & (abs(loss) > nothing * (watch.first_loss - loss))


def allowed(np: Any, watch: Watch, loss: Any, limits: Limits) -> Any:
    """Return what may be left to gain at the point that is returned, by ``tol``."""
    gain = watch.older - loss
    known = (gain > 0) & np.isfinite(gain)
    return (limits.tol * np.where(known, gain, 0)).astype(loss.dtype)


def resolution(loss: Any, eps: float) -> Any:
    """Return the precision to which a loss is known."""
    return _KNOWN * eps * abs(loss)


def contradicted(np: Any, watch: Watch, step: Any) -> Watch:
    """Return the watch after a claim that does not hold: the next one comes later, and with less left."""
    none = watch.held * 0
    patience = (step + np.maximum(step // 4, _HELD)).astype(watch.patience.dtype)
    bar = (watch.bar * _LESS).astype(watch.bar.dtype)
    return watch._replace(held=none, stalled=none, idle=none, bar=bar, patience=patience)


def failed(code: jax.Array) -> jax.Array:
    """Tell whether a run ended by a failure."""
    return functools.reduce(jnp.logical_or, [code == status for status in FAILURES])


def is_good(watch: Watch, loss: jax.Array) -> jax.Array:
    """Tell whether a noisy run may fall back on this point: its loss is at most the start's."""
    return loss <= watch.first_loss


def succeeded(code: Any, watch: Watch, *, noisy: bool, has_target: bool) -> Any:
    """Tell whether a run ended as asked, after its claim was verified; all of it may be traced."""
    done = (code == Status.CONVERGED) | (code == Status.TARGET_REACHED) | (code == Status.PRECISION_LIMIT)
    return done | ((code == Status.MAX_STEPS) & is_better(watch)) if noisy and not has_target else done


def is_better(watch: Watch) -> Any:
    """Tell whether a noisy run ended at most at the loss of its start, by the mean of its last epoch.

    The start's loss is known of a single batch, so up to how much batches differ, and to twice that loss.
    """
    size, first = watch.spread, watch.first_loss
    return (watch.mean_loss <= first + size) & (watch.mean_loss <= first + 2 * abs(first))


class Told(NamedTuple):
    """The facts that a message is made of."""

    steps: int
    returned_step: int
    history: tuple[np.ndarray, np.ndarray, np.ndarray]
    limits: Limits
    noisy: bool
    steps_per_epoch: int | None
    eps: float
    how: Rates
    success: bool
    ending: Ending
    farthest: float  # entry of the params that are returned
    not_finite: tuple[str, str] = ("", "")  # what is known of a last point that is not, and the remedy for that
    is_better: bool = True  # whether a noisy run ended below its start
    overshoots: bool = False  # whether a step of gradient descent turns the gradient round
    apart: bool = False  # whether the scales of some params differ by far, which the message says elsewhere
    stable: float | None = None  # the largest rate at which gradient descent does not diverge, if it was looked for


def explain(status: Status, told: Told) -> str:
    """The sentence for a status, with its remedy."""
    losses, grad_norms, rates = told.history
    steps, how, noisy, eps = told.steps, told.how, told.noisy, told.eps
    found, cure = told.not_finite
    # A single batch says little: with mini-batches, the mean of the first and of the last epoch, without the evaluation
    # after the last update. A full-batch run that did not fail speaks of the point that it returns.
    width = (told.steps_per_epoch or max(steps // _PART, 1)) if noisy and status not in FAILURES else 1
    end = steps if noisy or status in FAILURES else told.returned_step
    seen = losses[: max(end, 1) if width > 1 and status is not Status.TARGET_REACHED else end + 1]
    means = losses[:width].mean(), seen[-width:].mean()
    first, last = (f"{mean:.6g}" for mean in means)
    after = f"after {steps} step{'' if steps == 1 else 's'}"
    back = "" if told.returned_step == steps else f" The point of step {told.returned_step} is returned."
    plain = how is Rates.PLAIN and not noisy
    slower = "Raise max_steps." if how is Rates.SEARCHED else _slower(told, plain)
    match status:
        case Status.CONVERGED if grad_norms[end] == 0:
            what = "the gradient is exactly zero, and no direction was seen in which the loss falls"
            return (
                f"converged {after}: {what if told.ending.verified else 'the gradient is exactly zero'} (loss {last})."
            )
        case Status.CONVERGED:
            fall = f"the loss fell from {first} to {last}" if fell(losses, eps) else f"the loss is {last}"
            return f"converged {after}: {fall}{_left(told)}"
        case Status.TARGET_REACHED:
            what = "mean loss of an epoch" if noisy else "loss"
            return f"reached the target {after}: the {what}, {last}, is at or below {float(told.limits.target):g}."
        case Status.MAX_STEPS if noisy:
            per_epoch = told.steps_per_epoch
            count = steps / (per_epoch or 1)
            epochs = "" if per_epoch in (1, None) else f" ({count:g} epoch{'s' * (count != 1)})"
            which, worse = "the mean loss of an epoch" if width > 1 else "the loss", ""
            went = f"was {first}" if width > 1 and steps <= width else f"went from {first} to {last}"
            if not told.is_better:
                worse = f" That is above the loss of the start, {losses[0]:.6g}. {slower}"
            elif not (told.success or means[1] < means[0]):
                worse = f" The loss did not decrease. {slower}"
            most = told.limits.max_steps
            what = f"the {steps} steps asked for" if steps <= most else f"{steps} steps, more than asked for"
            return f"took {what}{epochs}: {which} {went}.{worse}"
        case Status.MAX_STEPS if not fell(losses, eps):
            if how is Rates.SEARCHED and steps >= _MANY_TRIALS:
                slower = f"Of {steps} points along the gradient none is lower, so it may not match the loss."
            return f"stopped at max_steps={steps}: the loss never fell below its start, {first}. {slower}"
        case Status.MAX_STEPS if told.farthest > _FAR:
            return _unbounded(f"stopped at max_steps={steps}", told)
        case Status.MAX_STEPS:
            return (
                f"stopped at max_steps={steps} before it converged: the loss fell from {first} to {last}, the gradient "
                f"norm is {grad_norms[end]:.3g}.{back} {_more(told)}"
            )
        case Status.PRECISION_LIMIT if told.ending.verified == BY_NEIGHBOURS:
            much = f": less than about {float(told.ending.left):.1g} is left to gain" if told.ending.left > 0 else ""
            return (
                f"reached the precision limit {after}: the loss {last} has a kink there, and neither {TRIED} "
                f"neighbours nor the gradients around it show a way down{much}."
            )
        case Status.PRECISION_LIMIT:
            more = " float64 may gain more." if eps > _COARSE else ""
            return f"reached the precision limit {after}: the loss {last} no longer changes{_left(told)}{more}"
        case Status.STALLED:
            return _stalled(told, after, first, last)
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
        case Status.NON_FINITE if told.farthest > _FAR:
            return _unbounded(f"left the range at step {steps}", told)
        case Status.NON_FINITE if how in (Rates.PLAIN, Rates.GIVEN) and not np.isfinite(rates[:steps]).all():
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


_FAR = 1e15  # an entry of the params, beyond what anything is measured in
TRIED = 96  # neighbours, at the most
_RATE_OF_ZERO = "the learning rate was 0 at each step. With one above 0 the loss can fall."
_COARSE = 1e-10  # eps: above it, a wider dtype has more digits
_DECAYED = 1e-3  # of the highest rate
_TURNS, _MOSTLY = 50, 0.8  # of the loss, which rises and falls in turn if the rate is too high
_MANY_TRIALS = 60  # one search gives up after so many
_LAST = 1000  # steps: what they gained tells whether more of them would


def _left(told: Told) -> str:
    """Say what is left, in units of the loss, and how that is known."""
    left = float(told.ending.left)
    if told.ending.verified == UP_TO_NOISE:
        return f", and less is left to gain than its rounding there, {left:.2g}."
    much = f"about {left:.2g} is left to gain" if left > 0 else "nothing is left to gain"
    return f", and {much} by its curvature there."


def _unbounded(what: str, told: Told) -> str:
    losses = told.history[0]
    return (
        f"{what}: the loss fell from {losses[0]:.6g} to {np.fmin.reduce(losses):.6g} as the params grew to "
        f"{told.farthest:.2g}, so it seems to have no lower bound. Check its sign, or add a penalty."
    )


def _more(told: Told) -> str:
    """The remedy for a run that took all its steps."""
    losses, how = told.history[0], told.how
    before = np.fmin.reduce(losses[:-_LAST]) if losses.size > _LAST else losses[0]
    if before - np.fmin.reduce(losses) > _ROUNDING * told.eps * abs(before):
        return "Raise max_steps." if how is Rates.SEARCHED else f"Raise max_steps, or try {_other(told)}."
    if told.apart:
        return f"The last {_LAST} steps gained no more than rounding."
    return f"The last {_LAST} steps gained no more than rounding: try {_other(told)}."


def _other(told: Told, *, smaller: bool = False) -> str:
    """Name what to try in place of what decided the rates."""
    if told.how is Rates.SEARCHED:
        return "another start"
    if told.how is Rates.OWNED:
        return "another optimizer"
    if smaller:
        return "a smaller learning_rate, or another start"
    losses = told.history[0][-_LAST:]
    turns = np.diff(np.sign(np.diff(losses)))
    if told.overshoots or (turns.size >= _TURNS and np.mean(np.abs(turns) == 2) > _MOSTLY):
        return "a smaller learning_rate, as each step leads to the other side of the valley"
    if losses.min() == losses.max() == told.history[0].max():
        return "a larger learning_rate"
    return "another learning_rate"


def _stalled(told: Told, after: str, first: str, last: str) -> str:
    losses, grad_norms, rates = told.history
    left = float(told.ending.left)
    much = f"about {left:.2g}" if np.isfinite(left) and left > 0 else "more"
    more = f"{much} may be left to gain"
    known = rates[np.isfinite(rates)]
    tried = (losses + grad_norms)[losses != losses[-1]][-1:].sum()  # the last trial that led elsewhere
    if told.farthest > _FAR:
        return _unbounded(f"stalled {after}", told)
    if told.how in (Rates.PLAIN, Rates.GIVEN) and known.size and known[-1] <= _DECAYED * known.max():
        if known.max() == 0:
            return f"stalled {after} at a loss of {last}: {_RATE_OF_ZERO}"
        step = int(np.flatnonzero(rates > _DECAYED * known.max())[-1]) + 1
        return (
            f"stalled {after}: the learning rate decayed to {known[-1]:.2g} (below a thousandth of its highest after "
            f"step {step}), and nothing changes any more, though {more}. The loss went from {first} to {last}. Let the "
            "rate decay more slowly, or not so far."
        )
    if told.how is Rates.SEARCHED and not np.isfinite(tried):
        return (
            f"stalled {after} at a loss of {last}: however small the next step, the loss or its gradient is not "
            "finite there. Start elsewhere, or make the loss finite around that point."
        )
    if told.ending.flaw == SATURATED:
        return (
            f"stalled {after} at a loss of {last}: it does not depend on some of the params any more, as it did at the "
            "start, so they have gone too far. Start nearer to what you expect, or keep them within bounds."
        )
    if told.ending.flaw == DROWNED:
        return (
            f"stalled {after} at a loss of {last}: most of what it gained is rounding, as it changes by {left:.2g} "
            "where the params change by a few roundings. Compute the loss without large terms that cancel, or start "
            "elsewhere."
        )
    saddle = told.ending.flaw == SADDLE
    near = saddle and grad_norms[told.returned_step] <= 1e-3 * grad_norms[0]
    if near or grad_norms[-1] == 0:
        where = "a saddle or a maximum, where the curvature is negative" if saddle else "no minimum"
        if grad_norms[told.returned_step] > 0 and not near:
            return (
                f"stalled {after}: the gradient is exactly zero at the last point, but not at the best, whose loss is "
                f"{last}. Try {_other(told, smaller=True)}."
            )
        return f"stalled {after}: the gradient vanishes at {where} (loss {last}). Start elsewhere, such as at random."
    rate = "" if told.how is Rates.SEARCHED else f" Try {_other(told)}."
    wider = " float64 may gain more." if told.eps > _COARSE else ""
    if not fell(losses, told.eps):
        return (
            f"stalled {after}: the loss stays at {last}, within rounding ({told.eps:.1g} of it), though {more}. Either "
            f"the gradient does not match the loss, or the steps do not fit.{rate}{wider}"
        )
    return (
        f"stalled {after}: the loss {last} no longer changes by more than rounding ({told.eps:.1g} of it), though "
        f"{more}.{rate}{wider}"
    )


def chosen_rates(rates: np.ndarray) -> str:
    """Return the sentence on the rates that were found."""
    used = rates[rates > 0]  # not the one that leads back to where a search began
    if not used.size:
        return ""
    return f" The learning rate was chosen at each step, between {used.min():.2g} and {used.max():.2g}."


def fell(losses: np.ndarray, eps: float) -> bool:
    """Tell whether the loss has fallen by more than rounding; the trials of a search need not be finite."""
    return bool(_fell(losses[0], np.nanmin(losses), eps))


def _fell(first: Any, best: Any, eps: float) -> Any:
    with np.errstate(invalid="ignore"):  # of a loss that is infinite at the start, and did not fall
        return first - best > _ROUNDING * eps * abs(first)


def _slower(told: Told, plain: bool) -> str:
    """The advice to lower the rate; with a number where the growth of the gradient betrays the curvature.

    Along the direction in which x - lr g diverges, the gradient is multiplied by 1 - lr L at each step, so the ratio r
    of two gradient norms gives L = (1 + r) / lr, and the largest stable rate 2 / L.
    """
    losses, grad_norms, rates = told.history
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
        return _RATE_OF_ZERO[0].upper() + _RATE_OF_ZERO[1:]
    if losses.min() == losses.max():
        return "It has not changed at all: raise max_steps, or try a larger learning_rate."
    with np.errstate(all="ignore"):
        ratio = grad_norms[1:] / grad_norms[:-1]
        stable = 2 * rates[:-1] / (1 + ratio)
    grew = (stable > 0) & (ratio > 1) & (ratio < _WORTHLESS)
    limit = float(np.median(stable[grew])) if plain and grew.any() else told.stable
    if limit is None:
        return f"Try a learning_rate well below {highest:.2g} (a tenth of it)."
    digit = 10.0 ** (np.floor(np.log10(limit)) - 1)
    return f"Try a learning_rate below {np.floor(limit / digit) * digit:.2g}."
