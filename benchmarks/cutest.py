"""How many problems does gdopt.minimize solve with nothing but a loss and a start, against the quasi-Newton defaults?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/cutest.py              # under 30 minutes on 2 cores; --quick: 3; --markdown: for RESULTS.md
    python benchmarks/cutest.py --picture docs/cutest.png     # also draws the share solved over the evaluations

The problems are the 94 of ``cutest.json``: CUTEst's unconstrained ones, by sif2jax, with the best known value of each.
A problem is solved to tau once the loss is at most ``best + tau * (start - best)``. The cost is counted in evaluations
of the loss with its gradient, or of the loss alone, including that of the start. SciPy calls the script for each. An
ordered callback in the loss counts those inside a compiled line search. gdopt, optimistix's BFGS and Adam make one in
each step. Everything is in float64. A solver that raises, meets a NaN, stops by itself or runs out of time keeps what
it solved until then.

The first two tables compare the evaluations. The third has the status with which ``gdopt.minimize`` stops by itself. A
CONVERGED is wrong if the loss, evaluated in float64 at the returned params, is further from the best known than ten
times ``tol`` of the start's distance, also at another local minimum. The evaluations needed are those after which that
distance was ``tol``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import math
import os
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gdopt
from solvers import GDOPT, LONG, OURS, SHORT, SOLVERS, YARDSTICK, Loss, first_within, is_finite, value_and_grad
from tables import Row, arguments, plain, print_heading, print_table, processes

TAUS = (1e-3, 1e-5, 1e-7)
TAU = 1e-5  # of the comparison and the picture
TOLS = (1e-4, 1e-2, 1e-8, 0.0)  # the default first
NAMED = ("CONVERGED", "PRECISION_LIMIT")  # the statuses with a column of their own
STOP_STEPS = 5000
PACKAGES = ("jax", "jaxlib", "optax", "gdopt", "optimistix", "jaxopt", "scipy", "sif2jax", "numpy")


class Effort(NamedTuple):
    """The sizes of a full or a quick run."""

    every: int  # each problem, or each second, third ...
    budgets: Sequence[int]  # evaluations
    patience: float  # seconds for one run of SciPy's


FULL = Effort(every=1, budgets=(200, 1000, SHORT, 20_000), patience=300)
QUICK = Effort(every=12, budgets=(200, 1000, SHORT), patience=20)


# --- The problems.


class Case(NamedTuple):
    """A problem: its name, its size, the loss at the start and the best known."""

    name: str
    n: int
    start: float
    best: float

    def target(self, tau: float) -> float:
        return self.best + tau * (self.start - self.best)


def load_cases(every: int) -> list[Case]:
    """The problems of cutest.json, the largest first: at the end they would keep one core busy and no other."""
    problems = json.loads(Path(__file__).with_name("cutest.json").read_text())["problems"]
    cases = [Case(name, entry["n"], entry["f0"], entry["fbest"]) for name, entry in problems.items()]
    return sorted(cases[::every], key=lambda case: -case.n)


@functools.cache
def sif2jax_module(name: str) -> types.ModuleType:
    """One module of the problems: importing all of sif2jax takes half a minute and turns x64 on."""
    if "sif2jax" not in sys.modules:
        spec = importlib.util.find_spec("sif2jax")
        folder = Path(getattr(spec, "origin", "sif2jax")).parent
        for parent in ("sif2jax", "sif2jax.cutest", "sif2jax.cutest._quadratic_problems"):
            package = types.ModuleType(parent)
            package.__path__ = [str(folder.joinpath(*parent.split(".")[1:]))]
            sys.modules[parent] = package
    return importlib.import_module(f"sif2jax.cutest.{name}")


def build(name: str) -> tuple[Loss, jax.Array]:
    """The loss and the start of 'sif:NAME' or 'sif:NAME:field=value', in JAX's default dtype."""
    warnings.filterwarnings("ignore", "Explicitly requested dtype")  # some ask for float64 in any case
    _, class_name, *sizes = name.split(":")
    package = sif2jax_module("_unconstrained_minimisation")
    if not hasattr(package, class_name):  # some are there without being exported
        package = importlib.import_module(f"{package.__name__}.{class_name.lower()}")
    problem = getattr(package, class_name)(**{field: int(size) for field, size in (text.split("=") for text in sizes)})
    args = problem.args
    return lambda x: problem.objective(x, args), jnp.asarray(problem.y0, float)


# --- What is measured on one problem, in a process of the pool.


class Solved(NamedTuple):
    """The evaluations that a solver needed for each of TAUS (inf: never)."""

    evaluations: Sequence[float]
    remark: str


class Stop(NamedTuple):
    """The end of a run of gdopt that stopped by itself."""

    status: str
    ratio: float  # the evaluations made over those needed to come within tol; NaN where it never came
    params: Any
    remark: str
    gap: float = math.nan  # how far it ended from the best known loss


class Measured(NamedTuple):
    """All measurements on one problem."""

    solved: dict[str, Solved]  # by solver
    stops: dict[str, list[Stop]]  # by dtype; one for each of TOLS


def measure(case: Case, effort: Effort, float32_stops: list[Stop]) -> Measured:
    """Every solver on one problem, in float64, and how far from the best known loss gdopt stops."""
    loss, start = build(case.name)
    solved = {}
    for name, solver in SOLVERS.items():
        budget = max(effort.budgets) if name in LONG else SHORT
        trace = solver(loss, start, budget, effort.patience)
        solved[name] = Solved([first_within(trace.losses, case.target(tau)) for tau in TAUS], trace.remark)

    def judge(stop: Stop) -> Stop:
        if stop.params is None:
            return stop
        value, _ = value_and_grad(loss, jnp.asarray(stop.params, float))
        return stop._replace(gap=(float(value) - case.best) / (case.start - case.best))

    stops = {"float32": float32_stops, "float64": find_stops(case)}
    return Measured(solved, {dtype: [judge(stop) for stop in each] for dtype, each in stops.items()})


def find_stops(case: Case) -> list[Stop]:
    """The stops of gdopt by itself, for each of TOLS, in the dtype of the process."""
    loss, start = build(case.name)
    stops = []
    for tol in TOLS:
        try:
            result = gdopt.minimize(loss, start, tol=tol, max_steps=STOP_STEPS)
        except Exception as error:
            stops.append(Stop("an exception", math.nan, None, f"exception: {error!r}"))
            continue
        assert result.history is not None
        ratio = len(result.history.loss) / first_within(result.history.loss, case.target(tol)) or math.nan
        remark = "" if is_finite(result) else "NaN result"
        stops.append(Stop(result.status.name, ratio, np.asarray(result.params), remark))
    return stops


def spread(pool: ProcessPoolExecutor, title: str, task: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """``map`` over the processes, with a line of progress."""
    futures = [pool.submit(task, *each) for each in zip(*arguments, strict=True)]
    for done, _ in enumerate(as_completed(futures), start=1):
        print(f"\r{title}: {done} of {len(futures)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [future.result() for future in futures]


# --- The tables of the problems.


def solved_table(results: Sequence[Measured], budgets: Sequence[int]) -> tuple[list[str], list[Row]]:
    """Percent of problems solved to each of TAUS within each budget."""
    rows = []
    for name in SOLVERS:
        needed = np.array([result.solved[name].evaluations for result in results])  # (problem, tau)
        percents = [np.mean(needed <= budget, axis=0) * 100 for budget in budgets]
        cells = [" / ".join(f"{percent:.0f}" for percent in each) for each in percents]
        rows.append(Row(name, [c if name in LONG or b <= SHORT else "-" for c, b in zip(cells, budgets, strict=True)]))
    return ["evaluations", *map(str, budgets)], rows


def ratio_table(results: Sequence[Measured]) -> tuple[list[str], list[Row]]:
    """Evaluations to TAU over the yardstick's, where both solve the problem within SHORT."""
    needed = {name: np.array([r.solved[name].evaluations[TAUS.index(TAU)] for r in results]) for name in SOLVERS}
    rows = []
    for name in SOLVERS:
        both = (needed[name] <= SHORT) & (needed[YARDSTICK] <= SHORT)
        ratios = needed[name][both] / needed[YARDSTICK][both]
        rows.append(Row(name, [str(both.sum()), f"{np.median(ratios):.2f}", f"{np.mean(ratios <= 5):.0%}"]))
    return ["", "problems", "median ratio", "within 5 times"], rows


def stop_table(results: Sequence[Measured]) -> tuple[list[str], list[Row]]:
    """One row for each dtype and tol."""
    rows = []
    for dtype in ("float32", "float64"):
        for i, tol in enumerate(TOLS):
            runs = [result.stops[dtype][i] for result in results]
            cells = [*status_cells(runs), *(quality_cells(runs, tol) if tol else "--"), *failures(runs)]
            rows.append(Row(f"{dtype}, `tol={short(tol)}`", cells))
    header = ["", *NAMED, "other statuses", "wrong", "made / needed", "exceptions", "NaN results"]
    return header, rows


def status_cells(runs: Sequence[Stop]) -> list[str]:
    """The percent of each status."""
    percents = {status: f"{count / len(runs):.1%}" for status, count in Counter(run.status for run in runs).items()}
    others = ", ".join(f"{status} {percent}" for status, percent in percents.items() if status not in NAMED)
    return [*(percents.get(status, "0%") for status in NAMED), others or "none"]


def quality_cells(runs: Sequence[Stop], tol: float) -> list[str]:
    """The percent of all runs that say CONVERGED and are wrong, and the evaluations made over those needed."""
    converged = [run for run in runs if run.status == "CONVERGED"]
    ratios = [run.ratio for run in converged if math.isfinite(run.ratio)]
    wrong = sum(not run.gap <= 10 * tol for run in converged)  # a NaN is wrong too
    return [
        f"{wrong / len(runs):.1%} ({wrong} of {len(converged)} claims)",
        "{:.2f}, {:.2f}".format(*np.quantile(ratios, (0.5, 0.9))) if ratios else "-",
    ]


def failures(runs: Iterable[Stop | Solved]) -> list[str]:
    """Count gdopt's runs that raised, and those that gave a NaN: there should be none."""
    said = [run.remark for run in runs]
    return [str(sum(remark.startswith(kind) for remark in said)) for kind in ("exception", "NaN")]


def remarks(cases: Sequence[Case], results: Sequence[Measured]) -> str:
    """Count gdopt's failed runs, and list what else went wrong in which run."""
    ours = [result.solved[name] for result in results for name in OURS]
    lines = ["gdopt: exceptions: {}, NaN results: {}".format(*failures(ours))]
    for case, result in zip(cases, results, strict=True):
        lines += [f"{name} on {case.name}: {run.remark}" for name, run in result.solved.items() if run.remark]
    return "; ".join(lines)


def short(number: float) -> str:
    """Write 1e-5 instead of 1e-05."""
    return np.format_float_scientific(number, trim="-", exp_digits=1) if number else "0"


def draw(results: Sequence[Measured], longest: int, path: str) -> None:
    """The share of problems solved to TAU over the evaluations, one line for each solver."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    ends = []
    for i, name in enumerate(SOLVERS):
        needed = np.sort([r.solved[name].evaluations[TAUS.index(TAU)] for r in results])
        end = longest if name in LONG else SHORT
        needed = needed[needed <= end]
        share = np.arange(len(needed) + 1) / len(results) * 100
        style = (
            {"linewidth": 3.5 if name == GDOPT else 1.5, "color": ("black", "dimgray", "darkgray")[i], "zorder": 3}
            if name in OURS
            else {"linewidth": 1.5, "color": f"C{i - len(OURS)}"}
        )
        dashes = "-" if name in LONG else "--"
        (line,) = axes.plot([1, *needed, end], [*share, share[-1]], dashes, drawstyle="steps-post", **style)
        ends.append((share[-1], line, plain(name)))
    axes.set(xscale="log", xlim=(1, longest), ylim=(0, 102), xlabel="evaluations of the loss and its gradient")
    axes.set_ylabel(f"percent of {len(results)} CUTEst problems solved to {short(TAU)}")
    axes.grid(alpha=0.3)
    ends.sort(key=lambda each: -each[0])  # the legend in the order in which the lines end
    figure.legend([line for _, line, _ in ends], [name for *_, name in ends], loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Prints all tables."""
    options = arguments(
        __doc__,
        "every twelfth problem, fewer evaluations",
        "also draw the share of problems solved over the evaluations",
    )
    effort = QUICK if options.quick else FULL
    cases = load_cases(effort.every)
    cores = os.cpu_count() or 1
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # SciPy's, in the processes to come, of which each has one core

    print_heading("cutest", options.flags, PACKAGES, options.markdown)
    with processes(cores, x64=False) as pool:
        stops = spread(pool, "stops in float32", find_stops, cases)
    with processes(cores, x64=True) as pool:
        results = spread(pool, "solvers in float64", measure, cases, [effort] * len(cases), stops)

    taus = " / ".join(map(short, TAUS))
    title = f"Percent of {len(cases)} problems solved to {taus} within so many evaluations"
    print_table(title, *solved_table(results, effort.budgets), options.markdown)
    print(f"\n{remarks(cases, results) if options.markdown else plain(remarks(cases, results))}.")
    title = f"Evaluations to {short(TAU)} over those of {YARDSTICK}, on the problems that both solve within {SHORT}"
    print_table(title, *ratio_table(results), options.markdown)
    title = f"How {GDOPT} stops by itself within {STOP_STEPS} steps; of CONVERGED: wrong, evaluations at 50 and 90 %"
    print_table(title, *stop_table(results), options.markdown)
    if options.picture:
        draw(results, max(effort.budgets), options.picture)


if __name__ == "__main__":
    main()
