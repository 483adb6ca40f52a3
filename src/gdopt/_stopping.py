"""The compiled tests that end a run: their measurements, memory and verdict."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from gdopt._status import FAILURES, RUNNING, Status

_CODES = 16  # more than the number of statuses

# A diverging quadratic's loss grows with the square of its gradient. Both tests together keep a loss whose zero is
# arbitrary (f0 near 0), or a start near a saddle (g0 near 0), from being called divergence.
_GROWN_LOSS = 1e6
_GROWN_GRADIENT = 1e3
_GROWN_FOR = 20  # the fewest doublings of the loss
_HELD = 5  # the evaluations in a row at which little has to be left
_HELD_ACCEPTED = 2  # the same for accepted points, whose curvature is known
_PART_LEFT = 0.1  # the gain that is left over the loss above which the loss does not have the size of the minimum yet
NOTHING = 1e-12  # the loss over the gain below which it counts as zero
_LESS = 0.1  # the factor on what may be left after a claim that was contradicted
LEAST_BAR = 1e-30  # the last such bar: after 30 of these claims a run has stalled, even if there is a lower point
_STALLED_UPDATES = 50
_PER_UPDATE = 20
_IDLE = 1000  # the evaluations of a search without a gain after which it ends
_RECENT = 20  # the evaluations of a loss with random keys that are averaged
ROUNDING = 100  # the difference of two evaluations that may be rounding, in eps |f|
_KNOWN = 30  # the precision of a loss that is a sum of many terms, in eps |f|


class Limits(NamedTuple):
    """The limits of a run, which are traced, so that new values recompile nothing."""

    max_steps: jax.Array | int
    tol: jax.Array | float
    grad_tol: jax.Array | float | None  # None: not tested
    target: float  # -inf: none

    @property
    def has_target(self) -> bool:
        return self.target > -math.inf


class Watch(NamedTuple):
    """The memory of the tests between two evaluations."""

    first_loss: jax.Array
    first_grad_norm: jax.Array
    mark: jax.Array  # the best loss when it last improved by more than rounding
    stalled: jax.Array  # the updates since then, in units of 1 / _PER_UPDATE updates
    idle: jax.Array  # for a search, the evaluations since then, wherever the trials were
    grad_norm: jax.Array  # of the last evaluation
    peak: jax.Array  # the highest loss, up to a factor of two
    grown: jax.Array  # how often that was surpassed in a row, after loss and gradient had grown
    # These are for a deterministic loss.
    older: jax.Array  # the best loss after between a quarter and half of the steps made so far
    recent: jax.Array  # the same after half of them or more
    doubles: jax.Array  # the step at which they are renewed
    accepted: jax.Array  # the number of accepted points, for an optimizer that takes others back
    held: jax.Array  # how often in a row little was left
    bar: jax.Array  # the factor on what may be left, after contradicted claims
    patience: jax.Array  # the step before which nothing is claimed
    # These are for a noisy loss.
    epoch_loss: jax.Array  # the sum of this epoch's losses
    mean_loss: jax.Array  # of the last epoch, or of the last evaluations
    spread: jax.Array  # the mean distance of the last evaluations from that
    good: jax.Array | None = None  # this epoch's losses that were finite, if the optimizer may skip others


class Epoch(NamedTuple):
    """The place of an evaluation of a noisy loss in its pass over the data."""

    begins: jax.Array | bool
    ends: jax.Array | bool
    steps: jax.Array | int  # of the whole pass; read when it ends


class Evaluation(NamedTuple):
    """The number of a point, and the measurements there."""

    step: jax.Array
    loss: jax.Array
    grad_norm: jax.Array
    distance: jax.Array | None  # |x - x0|; zero or infinite if squares leave the dtype's range; None if not needed
    finite: jax.Array  # whether the params are finite
    largest: jax.Array | None  # the largest entry of the gradient, if it is tested


class Search(NamedTuple):
    """The state of an optimizer that takes bad points back, before it has seen an evaluation."""

    gave_up: jax.Array  # whether it found no further step
    accepted: jax.Array  # the number of accepted points so far
    left: jax.Array  # the gain that is left at the last one, by its curvature


class Ending(NamedTuple):
    """The facts about the point that is returned."""

    left: Any  # the gain that is left, in units of the loss; NaN if unknown
    verified: Any  # NOT_VERIFIED, BY_CURVATURE, BY_NEIGHBOURS or UP_TO_NOISE
    flaw: Any  # the sign that it is no minimum: NONE_SEEN, SADDLE, SATURATED, DROWNED or OUTSIDE


NOT_VERIFIED, BY_CURVATURE, BY_NEIGHBOURS, UP_TO_NOISE = range(4)
NONE_SEEN, SADDLE, SATURATED, DROWNED, OUTSIDE = range(5)  # a saddle may be a maximum; a loss drowns in its rounding


def first_ending(dtype: Any) -> Ending:
    """Return the facts before anything is known."""
    return Ending(jnp.full((), jnp.nan, dtype), jnp.int32(NOT_VERIFIED), jnp.int32(NONE_SEEN))


def first_watch(loss_dtype: Any, norm_dtype: Any, *, skips: bool = False) -> Watch:
    """Return the memory before the first evaluation; ``skips`` tells whether the optimizer may skip some."""
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
        good=none if skips else None,
    )


# With an inlined jit, these many small operations are traced once in a process and not at each call.
@functools.partial(jax.jit, static_argnums=5, inline=True)
def judge(
    watch: Watch,
    kept_loss: jax.Array,
    point: Evaluation,
    limits: Limits,
    search: Search | None,
    eps: float,
    epoch: Epoch | None,
    skipped: jax.Array | None = None,
) -> tuple[jax.Array, Watch]:
    """Return the code of this evaluation (RUNNING or a Status) and the new memory.

    ``kept_loss`` is the loss of the point to return. CONVERGED and PRECISION_LIMIT are claims that are still to be
    verified. ``epoch`` is None for a deterministic loss. For a noisy one (mini-batches, random keys, a model's state) a
    single small gradient says nothing, so only the target (on the mean of an epoch), divergence and the number of steps
    are tested.

    ``search`` describes an optimizer that takes bad points back by itself: its points are trials, and no trial is a
    failure. It is None for all other optimizers.

    ``skipped`` tells whether the optimizer skips a loss or gradient that is not finite: then nothing is learned from
    it, and it is no failure. It is None for an optimizer that skips nothing.
    """
    before, start = watch, watch.first_loss == jnp.inf  # Nothing was evaluated yet.
    watch = watch._replace(
        first_loss=jnp.where(start, point.loss, watch.first_loss),
        first_grad_norm=jnp.where(start, point.grad_norm, watch.first_grad_norm),
    )
    # The loss may not read a NaN among the params.
    finite = jnp.isfinite(point.loss) & jnp.isfinite(point.grad_norm) & point.finite
    grown, peak, failed, diverged = _growth(watch, kept_loss, point, search, finite, start)
    new, gained, limited = _progress(watch, point, limits, eps, start)
    new = new._replace(grown=grown, peak=peak)
    if epoch is None:
        reached = finite & (point.loss <= limits.target)
        new, converged, idle = _claims(new, watch, kept_loss, point, limits, search, gained, finite, start)
        limited = limited if idle is None else limited | idle
    else:
        new, mean = _epoch_mean(new, watch, point, epoch, start, skipped)
        reached = epoch.ends & (mean <= limits.target)
        converged = limited = jnp.asarray(False)
    if skipped is not None:
        sums = {"epoch_loss": new.epoch_loss, "mean_loss": new.mean_loss, "good": new.good}
        new = jax.tree.map(lambda old, new: jnp.where(skipped, old, new), before, new)._replace(**sums)
        failed, diverged = failed & ~skipped, diverged & ~skipped
    causes = (  # the later, the stronger
        (Status.MAX_STEPS, point.step >= limits.max_steps),
        (Status.PRECISION_LIMIT, limited),
        (Status.CONVERGED, converged),
        (Status.TARGET_REACHED, reached),
        (Status.NON_FINITE, failed),
        (Status.DIVERGED, diverged),
    )
    # XLA computes a reduction once. It would compile and compute anything else anew for each leaf of the params that
    # depends on the code.
    holds = jnp.stack([holds for _, holds in causes])
    ranked = jnp.stack([jnp.int32(rank * _CODES + status) for rank, (status, _) in enumerate(causes)])
    code = jnp.max(jnp.where(holds, ranked, RUNNING)) % _CODES
    return code, new


def _growth(
    watch: Watch,
    kept_loss: jax.Array,
    point: Evaluation,
    search: Search | None,
    finite: jax.Array,
    start: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return how often the highest loss doubled, that loss, and whether the run failed and whether it diverged.

    Some optimizers stay far above the start for long, and come back: growth counts if it lasts.
    """
    loss, first_loss = point.loss, watch.first_loss
    size = jnp.maximum(jnp.abs(first_loss), first_loss - kept_loss)
    grows = (loss - first_loss > _GROWN_LOSS * size) & (point.grad_norm > _GROWN_GRADIENT * watch.first_grad_norm)
    higher = loss > jnp.maximum(2 * watch.peak, watch.peak)
    grown = jnp.where(grows, watch.grown + higher, 0)
    peak = jnp.where(finite & higher, loss, watch.peak)
    failed = ~finite
    if search is not None:
        grown = jnp.zeros_like(grown)
        failed = failed & (start | (loss == -jnp.inf) | ~point.finite)  # No loss is below -inf.
    return grown, peak, failed, (grown >= _GROWN_FOR) | (failed & (watch.grown > 0))


def _progress(
    watch: Watch, point: Evaluation, limits: Limits, eps: float, start: jax.Array
) -> tuple[Watch, jax.Array, jax.Array]:
    """Count the updates without a gain; return whether this one has a gain, and whether there were too many.

    A pause is no limit of precision. An evaluation that repeats the last one counts only a twentieth, because it may
    come from accumulated gradients or from a rate of 0. An iterate that wanders above the best by more than rounding is
    still on its way. Rounding is relative to the loss, and to the part of the gain that ``tol`` asks for: otherwise a
    run towards a loss of zero would never end.
    """
    loss, grad_norm = point.loss, point.grad_norm
    rounding = eps * jnp.maximum(jnp.abs(watch.mark), limits.tol * (watch.first_loss - watch.mark))
    gained = start | (loss < watch.mark - rounding)
    mark = jnp.where(gained, loss, watch.mark)
    wanders = ~(loss <= mark + ROUNDING * rounding)
    stalled = jnp.where(gained | wanders, 0, watch.stalled + jnp.where(grad_norm == watch.grad_norm, 1, _PER_UPDATE))
    new = watch._replace(mark=mark, stalled=stalled, grad_norm=grad_norm)
    return new, gained, stalled >= _STALLED_UPDATES * _PER_UPDATE


def _claims(
    new: Watch,
    watch: Watch,
    kept_loss: jax.Array,
    point: Evaluation,
    limits: Limits,
    search: Search | None,
    gained: jax.Array,
    finite: jax.Array,
    start: jax.Array,
) -> tuple[Watch, jax.Array, jax.Array | None]:
    """Test a deterministic loss: return whether it converged, and whether a search has no more to gain."""
    new = _count_held(new, kept_loss, point, limits, search, start)
    held = _HELD if search is None else _HELD_ACCEPTED
    lowest = start | (point.loss <= kept_loss)
    flat = (point.grad_norm == 0) & lowest  # A plateau higher up has no gradient, too.
    converged = ((new.held >= held) & (point.step >= watch.patience)) | flat
    if point.largest is not None and limits.grad_tol is not None:
        converged = converged | (finite & (point.largest <= limits.grad_tol) & lowest)
    if search is None:
        return new, converged, None
    new = new._replace(idle=jnp.where(gained, 0, watch.idle + 1))
    return new, converged, search.gave_up | ((new.idle >= _IDLE) & (new.mark < new.first_loss))


def _epoch_mean(
    new: Watch, watch: Watch, point: Evaluation, epoch: Epoch, start: jax.Array, skipped: jax.Array | None
) -> tuple[Watch, jax.Array]:
    """Average a noisy loss over its epoch; before the first one has ended, over the last evaluations.

    Each random key is an epoch, so their losses are averaged over the last evaluations, too. The mean of an epoch whose
    batches were all skipped is NaN, and then the one before stays.
    """
    k, loss, steps, good = point.step, point.loss, epoch.steps, watch.good
    if skipped is not None and good is not None:
        loss = jnp.where(skipped, 0, loss)
        good = steps = jnp.where(epoch.begins, 0, good) + ~skipped
    epoch_loss = jnp.where(epoch.begins, 0, watch.epoch_loss) + loss
    mean = epoch_loss / steps
    some = watch.mean_loss + (loss - watch.mean_loss) / jnp.minimum(k + 1, _RECENT)
    if skipped is not None:
        some = jnp.where(skipped, watch.mean_loss, jnp.where(start, loss, some))
    whole = jnp.asarray(epoch.steps) > 1
    ends = epoch.ends & whole if good is None else epoch.ends & whole & (good > 0)
    mean_loss = jnp.where(ends, mean, jnp.where(whole & (k >= epoch.steps), watch.mean_loss, some))
    off = jnp.where(start, 0, jnp.abs(loss - watch.mean_loss))
    spread = watch.spread + (off - watch.spread) / jnp.minimum(k + 1, _RECENT)
    dtype = loss.dtype
    new = new._replace(epoch_loss=epoch_loss, mean_loss=mean_loss.astype(dtype), spread=spread.astype(dtype), good=good)
    return new, mean


def _count_held(
    watch: Watch,
    kept_loss: jax.Array,
    point: Evaluation,
    limits: Limits,
    search: Search | None,
    start: jax.Array,
) -> Watch:
    """Count the points in a row at which little seems to be left.

    An optimizer that learns the curvature reports what is left. Little is ``tol`` of what about the second half of the
    run has gained: the gain from a bad start says nothing about the scale of the minimum. Nor does the size of the
    loss, as long as all of it is left. For other optimizers, at most |g| |x - x*| is left if the loss is convex (Boyd &
    Vandenberghe, "Convex Optimization", section 9.1.2), with |x - x0| for the unknown distance. Then little is ``tol``
    of the gain of the whole run, because the claim is verified anyway.
    """
    best = jnp.where(start, point.loss, jnp.fmin(kept_loss, point.loss))
    renews = point.step >= watch.doubles
    older = jnp.where(start, best, jnp.where(renews, watch.recent, watch.older))
    recent = jnp.where(start | renews, best, watch.recent)
    doubles = jnp.where(renews, 2 * watch.doubles, watch.doubles)
    if search is None:
        here, counts, accepted = point.loss, jnp.asarray(True), watch.accepted
        gain, distance = watch.first_loss - here, cast(jax.Array, point.distance)
        little = (distance > 0) & (gain > 0)
        little &= point.grad_norm * (distance / gain) <= watch.bar * limits.tol
    else:
        here, counts, accepted = kept_loss, search.accepted != watch.accepted, search.accepted
        gain = older - here
        little = (search.accepted > 1) & (gain > 0) & (search.left <= watch.bar * (limits.tol * gain))
        little &= ~is_all(search.left, here, watch, NOTHING)
    held = jnp.where(counts, jnp.where(little, watch.held + 1, 0), watch.held)
    return watch._replace(older=older, recent=recent, doubles=doubles, accepted=accepted, held=held)


def is_all(left: Any, loss: Any, watch: Watch, nothing: Any) -> Any:
    """Tell whether most of a loss is left to gain: the minimum may then be zero, whatever the size of the loss.

    A loss below the share ``nothing`` of the gain does not count.
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
    """Return the watch after a claim that does not hold: the next one comes later, with less left."""
    none = watch.held * 0
    patience = (step + np.maximum(step // 4, _HELD)).astype(watch.patience.dtype)
    bar = (watch.bar * _LESS).astype(watch.bar.dtype)
    return watch._replace(held=none, stalled=none, idle=none, bar=bar, patience=patience)


def is_failure(code: jax.Array) -> jax.Array:
    """Tell whether a run ended by a failure."""
    return functools.reduce(jnp.logical_or, [code == status for status in FAILURES])


def succeeded(code: Any, watch: Watch, *, noisy: bool, has_target: bool) -> Any:
    """Tell whether a run ended as asked, after its claim was verified; all of it may be traced."""
    done = (code == Status.CONVERGED) | (code == Status.TARGET_REACHED) | (code == Status.PRECISION_LIMIT)
    return done | ((code == Status.MAX_STEPS) & is_better(watch)) if noisy and not has_target else done


def is_better(watch: Watch) -> Any:
    """Tell whether a noisy run ended at most at the loss of its start, by the mean of its last epoch.

    The start's loss is that of a single batch. So allow for the difference between batches, and for twice that loss.
    """
    size, first = watch.spread, watch.first_loss
    return (watch.mean_loss <= first + size) & (watch.mean_loss <= first + 2 * abs(first))
