"""Does gdopt.minimize keep its word when it stops?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/endings.py             # under 25 minutes on 2 cores; --quick: 3; --markdown: for RESULTS.md
    python benchmarks/endings.py --only small schedules      # these groups of problems alone

A run makes a claim if its result has ``success``. The table counts the wrong claims, the right answers without success,
the evaluations made over those needed by the runs that claim, and the exceptions. Below it, the script lists each wrong
claim and each right answer without success. The problems are CUTEst's (cutest.py), those of raw_problems.py and
natural_units.py, and small inputs (ending_problems.py). Each runs in float32 and in float64, with the default call and
with ``optimizer=gdopt.gd``. Some also run with other optimizers, and with 700 schedules whose rate decays.

Definitions:

- Really left: the loss at the returned params, evaluated in float64, minus the loss of the local minimum that a careful
  polish reaches from there. Another local minimum is no fault. A point without a gradient is also polished from a
  point near it. A lower minimum from the polish of another run replaces it if a straight line leads there: 20 points of
  the line, none of them above the returned loss. So does the best known loss of the problem if it already shows that
  the run is right. The minima at kinks and at bounds and of losses without lower bound are known beforehand.
- Claimed left: ``Result.left``. If the result has none, CONVERGED claims ``tol * (first - returned loss)``, other
  statuses claim 0, and TARGET_REACHED and mini-batch runs make no claim on what is left.
- A claim is wrong if ``really left > 10 * max(claimed left, 10 * eps * |loss|, 1e-12 * (first - returned loss))``, if
  the returned loss is above the start's, or if the status is TARGET_REACHED and the loss is above the target.
- A right answer without success has no success and did not end at max_steps, although
  ``really left <= max(10 * eps * |loss|, 1e-6 * (first - best known))``.
- Made: the entries of the history. Needed: those up to the first loss within ``1e-4 * (first - local minimum)`` of the
  local minimum; a second column has 1e-6.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import gdopt
import natural_units
from cutest import spread
from ending_problems import GROUPS, Loss, Options, Problem, best_of_cutest
from solvers import first_within, value_and_grad
from tables import Row, arguments, print_heading, print_table, processes

PACKAGES = ("jax", "jaxlib", "optax", "gdopt", "scipy", "scikit-learn", "sif2jax", "numpy")
DTYPES = ("float32", "float64")
TOL = 1e-4  # the default of minimize, which claims this part of the gain
NEAR = (1e-4, 1e-6)  # of the gain, for the evaluations needed
SLACK = 10  # a claim may be off by this factor
ROUNDING = 10  # times eps and the loss
LEAST = 1e-12  # of the gain, below which nothing is counted as left
RIGHT = 1e-6  # of the gain to the best known loss
PATIENCE = 30  # seconds for one polish
POINTS = 20  # of a straight line
BESIDE = 1e-3  # relative distance at which a polish starts beside a point without a gradient


# --- The runs, in the dtype of their process.


class Task(NamedTuple):
    """A problem of a group."""

    group: str
    name: str

    def build(self) -> Problem:
        return GROUPS[self.group].build(self.name)

    def settings(self, problem: Problem, dtype: str) -> Mapping[str, Options]:
        """The settings to run in a dtype: all of them, of the schedules every other one."""
        items = list(problem.settings.items())
        return dict(items[DTYPES.index(dtype) :: len(DTYPES)] if self.group == "schedules" else items)


class Run(NamedTuple):
    """The end of a run."""

    setting: str
    start: int
    dtype: str
    status: str
    success: bool = False
    losses: np.ndarray = np.zeros(0)
    loss: float = math.nan  # of the returned params, in the run's dtype
    left: float = math.nan  # what the result says of itself
    verified: bool = False
    params: Any = None

    @property
    def eps(self) -> float:
        return float(np.finfo(self.dtype).eps)


def find_runs(task: Task) -> list[Run]:
    """All runs on a problem in the dtype of the process."""
    problem = task.build()
    dtype = str(jnp.zeros(()).dtype)
    return [
        run_once(problem, setting, options, start, dtype)
        for setting, options in task.settings(problem, dtype).items()
        for start in range(len(problem.starts))
    ]


def run_once(problem: Problem, setting: str, options: Options, start: int, dtype: str) -> Run:
    """One call of minimize."""
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), problem.starts[start])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = gdopt.minimize(problem.on_batches or problem.loss, x, **options)
    except Exception as error:
        return Run(setting, start, dtype, f"exception: {type(error).__name__}")
    assert result.history is not None
    return Run(
        setting,
        start,
        dtype,
        result.status.name,
        result.success,
        np.asarray(result.history.loss, float),
        result.loss,
        float(getattr(result, "left", math.nan)),
        bool(getattr(result, "verified", False)),
        flatten(result.params),
    )


# --- What is really left, in float64.


class Minimum(NamedTuple):
    """A local minimum."""

    loss: float
    params: np.ndarray


class Floor:
    """The local minima of a problem, found by polishing what its runs return. All params are flat here."""

    def __init__(self, problem: Problem, known: float = math.inf) -> None:
        start = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), problem.starts[0])
        _, unravel = ravel_pytree(start)
        self.loss: Loss = lambda flat: problem.loss(unravel(flat))
        self.minimum = problem.minimum
        self.known = known  # the best loss that others found
        self.found: list[Minimum] = []
        self.unfinished = 0  # polishes that ran out of time

    def value(self, params: np.ndarray) -> float:
        return float(value_and_grad(self.loss, params)[0])

    def best(self) -> float:
        """The lowest loss that is known of the problem."""
        return min([self.known, *(minimum.loss for minimum in self.found)])

    def below(self, params: np.ndarray, enough: float) -> float:
        """The loss of the local minimum below a point, or the best known if that is less than ``enough`` away."""
        if self.minimum is not None:
            return self.minimum
        loss = self.value(params)
        if not math.isfinite(loss) or abs(loss - self.best()) <= enough:
            return min(self.best(), loss)
        self.found.sort(key=lambda minimum: minimum.loss)
        lower = [minimum for minimum in self.found if minimum.loss < loss]
        reached = next((minimum for minimum in lower if self.leads_down(params, minimum.params)), None)
        return reached.loss if reached else self.polish(params)

    def leads_down(self, params: np.ndarray, to: np.ndarray) -> bool:
        """Return whether no point of a straight line is above its beginning."""
        highest = self.value(params)
        highest += ROUNDING * float(np.finfo(float).eps) * abs(highest)
        weights = np.linspace(0, 1, POINTS + 2)[1:-1]
        return all(self.value(params + weight * (to - params)) <= highest for weight in weights)

    def polish(self, params: np.ndarray) -> float:
        """The lowest loss that a polish reaches from a point, or from beside it if it has no gradient."""
        starts = [params]
        if not np.any(np.asarray(value_and_grad(self.loss, params)[1])):
            starts.append(beside(params))
        reached = [self.polish_once(start) for start in starts]
        self.found += reached
        return min(minimum.loss for minimum in reached)

    def polish_once(self, params: np.ndarray) -> Minimum:
        """The local minimum below a point; after PATIENCE seconds the best known loss stands for it."""
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of overflows in line searches
            try:
                with time_limit(PATIENCE):
                    return Minimum(*natural_units.polish(self.loss, params))
            except TimeoutError:
                self.unfinished += 1
                return Minimum(min(self.best(), self.value(params)), params)


@contextlib.contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """Raise a TimeoutError in the block after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def beside(params: np.ndarray) -> np.ndarray:
    """A point near another one, with a small relative change of every entry."""
    sizes = np.abs(params)
    smallest = sizes[sizes > 0].min(initial=np.inf)
    sizes = np.where(sizes > 0, sizes, smallest if np.isfinite(smallest) else 1.0)
    return params + BESIDE * sizes * np.random.default_rng(0).normal(size=params.shape)


def flatten(params: Any) -> np.ndarray:
    """All leaves in one vector of float64."""
    return np.concatenate([np.ravel(np.asarray(leaf, float)) for leaf in jax.tree.leaves(params)])


# --- The verdicts.


class Verdict(NamedTuple):
    """A run and the verdict on it."""

    task: Task
    run: Run
    claimed: float = math.nan  # left
    left: float = math.nan
    wrong: bool = False
    missed: bool = False  # a right answer without success
    ratios: Sequence[float] = (math.nan, math.nan)  # made over needed, for each of NEAR

    @property
    def row(self) -> tuple[str, str]:
        """The label of its row in the table, and its dtype."""
        is_plain = self.run.setting in ("default", "gd") and self.task.group != "small"
        label = f"{self.task.group}, {self.run.setting}" if is_plain else self.task.group
        return label, self.run.dtype


class Measured(NamedTuple):
    """A problem with the verdicts on its runs."""

    verdicts: list[Verdict]
    unfinished: int  # polishes


def measure(task: Task, float32_runs: list[Run]) -> Measured:
    """All runs on a problem, with their verdicts. The lowest run comes first, so that few points need a polish."""
    problem = task.build()
    runs = float32_runs + find_runs(task)
    floor = Floor(problem, best_of_cutest()[task.name].best if task.group == "cutest" else math.inf)
    judged = sorted(filter(is_judged, runs), key=lambda run: floor.value(run.params))
    verdicts = [judge(task, run, problem, floor) for run in judged]
    others = [Verdict(task, run) for run in runs if not is_judged(run)]
    return Measured(verdicts + others, floor.unfinished)


def is_judged(run: Run) -> bool:
    """Return whether the verdict depends on what is left: the run claims success, or it could have."""
    if run.params is None or not np.isfinite(run.params).all():
        return False
    return run.success or run.status != "MAX_STEPS"


def judge(task: Task, run: Run, problem: Problem, floor: Floor) -> Verdict:
    """The verdict on a run that reached finite params."""
    first, loss = floor.value(flatten(problem.starts[run.start])), floor.value(run.params)
    noisy = problem.on_batches is not None
    claimed = claim(run, first - loss, noisy=noisy)
    rounding = ROUNDING * run.eps * abs(loss)
    allowed = SLACK * max(claimed, rounding, LEAST * (first - loss))
    minimum = floor.below(run.params, allowed if run.success else rounding)
    left = loss - minimum
    rise = loss > first if noisy else run.loss > run.losses[0]
    above = run.status == "TARGET_REACHED" and not run.loss <= problem.settings[run.setting]["target"]
    is_right = math.isfinite(left) and left <= max(rounding, RIGHT * (first - floor.best()))
    return Verdict(
        task,
        run,
        claimed,
        left,
        wrong=run.success and bool(rise or above or not left <= allowed),  # a NaN is wrong too
        missed=not run.success and run.status != "MAX_STEPS" and bool(is_right),
        ratios=[made_over_needed(run.losses, first, minimum, near) for near in NEAR],
    )


def claim(run: Run, gain: float, *, noisy: bool) -> float:
    """The most that a run claims to be left; infinite without a claim."""
    if noisy or run.status == "TARGET_REACHED":
        return math.inf
    if not math.isnan(run.left):
        return run.left
    return TOL * gain if run.status == "CONVERGED" else 0.0


def made_over_needed(losses: np.ndarray, first: float, minimum: float, near: float) -> float:
    """NaN if no loss came near."""
    if not math.isfinite(minimum):
        return math.nan
    return len(losses) / first_within(losses, minimum + near * (first - minimum)) or math.nan


# --- The table and the lists.

HEADER = [
    "",
    "runs",
    "claims",
    "wrong",
    "verified",
    "verified and wrong",
    "right without success",
    *(f"made / needed for {near:.0e}".replace("e-0", "e-") for near in NEAR),
    "exceptions",
]


def rows(verdicts: Sequence[Verdict]) -> Iterator[Row]:
    """One row for each group and dtype, and one for all."""
    for key in dict.fromkeys(verdict.row for verdict in sorted(verdicts, key=order)):
        yield row(", ".join(key), [verdict for verdict in verdicts if verdict.row == key])
    yield row("all", verdicts)


def row(label: str, verdicts: Sequence[Verdict]) -> Row:
    """The counts of some runs."""
    claims = [each for each in verdicts if each.run.success]
    verified = [each for each in claims if each.run.verified]
    counts = [
        len(verdicts),
        len(claims),
        sum(each.wrong for each in claims),
        len(verified),
        sum(each.wrong for each in verified),
        sum(each.missed for each in verdicts),
    ]
    ratios = [spread_of([each.ratios[i] for each in claims]) for i in range(len(NEAR))]
    exceptions = sum(each.run.status.startswith("exception") for each in verdicts)
    return Row(label, [*map(str, counts), *ratios, str(exceptions)])


def spread_of(ratios: Sequence[float]) -> str:
    """The median and the 90 % quantile."""
    finite = [ratio for ratio in ratios if math.isfinite(ratio)]
    return "{:.2f}, {:.2f}".format(*np.quantile(finite, (0.5, 0.9))) if finite else "-"


def order(verdict: Verdict) -> tuple[Any, ...]:
    """By group, setting, dtype and name."""
    group, run = verdict.task.group, verdict.run
    return list(GROUPS).index(group), verdict.row, verdict.task.name, run.start, run.setting


LIST_HEADER = ["group", "problem", "start", "called with", "dtype", "status", "claimed left", "really left", "loss"]


def list_row(verdict: Verdict) -> Row:
    """A run in a list."""
    task, run = verdict.task, verdict.run
    numbers = [f"{number:.2g}" for number in (verdict.claimed, verdict.left)]
    status = f"{run.status}, verified" if run.verified else run.status
    cells = [f"`{task.name}`", str(run.start + 1), run.setting, run.dtype, status, *numbers, f"{run.loss:.6g}"]
    return Row(task.group, cells)


def print_list(title: str, verdicts: Sequence[Verdict], markdown: bool) -> None:
    """Print a table of runs, or a word if there are none."""
    if verdicts:
        listed = [list_row(verdict) for verdict in sorted(verdicts, key=order)]
        print_table(f"{title}: {len(verdicts)}", LIST_HEADER, listed, markdown)
    else:
        print(f"\n{title}: none.", flush=True)


def main() -> None:
    """Prints the table and the lists."""
    options = arguments(__doc__, "some problems of each group", only=list(GROUPS))
    groups = options.only or list(GROUPS)
    tasks = [
        Task(name, inner)
        for name in groups
        for inner in GROUPS[name].names()[:: GROUPS[name].every if options.quick else 1]
    ]
    cores = os.cpu_count() or 1
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # SciPy's, in the processes to come, of which each has one core

    print_heading("endings", options.flags, PACKAGES, options.markdown)
    with processes(cores, x64=False) as pool:
        runs = spread(pool, "runs in float32", find_runs, tasks)
    with processes(cores, x64=True) as pool:
        measured = spread(pool, "runs in float64, and verdicts", measure, tasks, runs)
    verdicts = [verdict for each in measured for verdict in each.verdicts]

    title = "How `gdopt.minimize` stops; evaluations made over those needed by its claims at 50 and 90 %"
    print_table(title, HEADER, list(rows(verdicts)), options.markdown)
    print_list("Wrong claims", [each for each in verdicts if each.wrong], options.markdown)
    print_list("Right answers without success", [each for each in verdicts if each.missed], options.markdown)
    failed = [each for each in verdicts if each.run.status.startswith("exception")]
    print_list("Exceptions", failed, options.markdown)
    unfinished = [task.name for task, each in zip(tasks, measured, strict=True) if each.unfinished]
    print(f"\nProblems with a polish that ran out of time: {', '.join(unfinished) or 'none'}.")


if __name__ == "__main__":
    main()
