"""Checkpoints of older versions, in today's form."""

from __future__ import annotations

from collections.abc import Callable

from gdopt._checkpoint import schema
from gdopt._checkpoint.changes import SCHEDULE, shortest
from gdopt._checkpoint.folder import Saved
from gdopt._loop.state import State
from gdopt._optimizers.optax_state import trials_in
from gdopt._stopping import Ending, Limits, Watch

# The fields of a state that version 0.1.0 did not have. A run from there resumes with those of a fresh one.
_ADDED = frozenset(
    {f"state.ending.{name}" for name in Ending._fields}
    | {f"state.watch.{name}" for name in Watch._fields}
    - {
        f"state.watch.{name}"
        for name in ("first_loss", "first_grad_norm", "mark", "stalled", "grad_norm", "epoch_loss")
    }
)


def is_of_0_1(saved: Saved) -> bool:
    """Tell whether version 0.1.0 made a checkpoint, which knew of no ending."""
    return "state.ending.left" not in saved.arrays


def stays_fresh(saved: Saved, fresh: State) -> Callable[[str], bool]:
    """Return a function that tells, by its name, whether a leaf of a fresh state is not to be replaced by a saved one.

    The searches of version 0.1.0 kept another state. They begin anew.
    """
    if not is_of_0_1(saved):
        return lambda name: False
    searches = trials_in(fresh.optimizer) is not None
    return lambda name: name in _ADDED or (searches and name.startswith("state.optimizer"))


def peak_of(saved: Saved) -> float | None:
    """Return the highest of the rates after a range test; that of version 0.1.0 was twice the suggestion."""
    test = saved.meta.get("range_test")
    return saved.meta.get("peak", None if test is None or test["suggestion"] is None else 2.0 * test["suggestion"])


def text_of_optimizer(text: str) -> str:
    """Return the description of an optimizer by its present name."""
    return text.replace("<function _checked_update>", "<function update>")


def usable(saved: Saved) -> Saved:
    """Return a checkpoint in today's form; raise CheckpointError if its contents are not those of a run."""
    if is_of_0_1(saved):
        limits = saved.meta.get("limits")
        if type(limits) is list and len(limits) == len(Limits._fields) - 2:  # There was no grad_tol between them.
            limits = [limits[0], "None", limits[1]]
        saved = saved._replace(meta={**saved.meta, "limits": limits})
    schema.check(saved)
    made = int(saved.arrays["state.step"])
    if "rates" not in saved.meta and made:  # The last rate is in the history.
        rates = {
            "kind": SCHEDULE,
            "steps": [made - 1],
            "rates": [shortest(saved.arrays["history.learning_rate"][made - 1])],
        }
        saved = saved._replace(meta={**saved.meta, "rates": {**rates, "schedule": ""}})
    return saved
