"""The reasons why a run ended."""

from __future__ import annotations

import enum

_NUMBER_FORMATS = tuple("bcdeEfFgGnoxX%")  # the last letters of format specs for numbers


class Status(enum.IntEnum):
    """The reason why a run ended.

    - ``CONVERGED``: little is left to gain, by ``tol`` or ``grad_tol``, or the gradient is exactly zero. This is
      verified at the point that is returned.
    - ``TARGET_REACHED``: the loss is at or below ``target``.
    - ``MAX_STEPS``: the steps or epochs that were asked for are done.
    - ``PRECISION_LIMIT``: the loss changes by no more than rounding, and what is left to gain is below that, too; or it
      has a kink, and no neighbour is lower.
    - ``DIVERGED``: the loss has grown a millionfold and the gradient a thousandfold, and both kept growing.
    - ``NON_FINITE``: the loss, its gradient or the params became infinite or NaN, other than at a trial that is taken
      back.
    - ``STOPPED``: the callback stopped the run.
    - ``EARLY_STOPPED``: the validation loss reached no new low for ``patience`` epochs.
    - ``INTERRUPTED``: Ctrl-C or SIGTERM.
    - ``DATA_EXHAUSTED``: a stream of batches ended before the steps or epochs that were asked for.
    - ``STALLED``: for 50 updates (or 1000 that moved nothing) the loss changed by no more than rounding, or no further
      step was found, although more is left to gain. Either the learning rate has decayed, or the point is a saddle, or
      params went so far that the loss depends on them no more, or most of what the loss gained is rounding.

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
    EARLY_STOPPED = 11

    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        return format(int(self) if spec.endswith(_NUMBER_FORMATS) else self.name, spec)


RUNNING = 0
FAILURES = (Status.DIVERGED, Status.NON_FINITE)
