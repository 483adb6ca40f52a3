"""How does gdopt.minimize descend within bounds, with an l1 penalty and on the simplex, against the usual solvers?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/bounds.py              # some 40 minutes on 2 cores; --quick: 4; --markdown: for RESULTS.md
    python benchmarks/bounds.py --only nnls lasso        # these groups of problems alone
    python benchmarks/bounds.py --reference  # some 30 minutes: finds the best known values anew, for bounds.json

The problems are in ``bounded_problems.py``, the solvers in ``bounded_solvers.py``, and the best known values in
``bounds.json``. These are the lowest objectives of L-BFGS-B with tolerances of zero from the start and from four starts
near it, TNC, trust-constr or SLSQP, and the exact ``nnls`` and ``Lasso``, each with a polish. A lower value that the
file has already stays: that of PALMER7E is from a run of gdopt. Everything is in float64.

A problem is solved to tau once the objective of a feasible point is at most ``best + tau * (start - best)``. The cost
is counted in evaluations of the loss with its gradient, or of the loss alone, including that of the start.

A run to its own end makes a claim if it says success. For the convex groups, what is really left is the objective minus
the best known. For the others it is the objective minus that of the local minimum that a polish reaches from the
returned params without a climb. A claim is wrong if more than 1e-4 of the gain from the start is left, or if the params
are not feasible. gdopt also says how much is left, and its claim is wrong, too, if more than ten times that is. A right
answer without success has no success, although at most 1e-6 of the gain is left.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gdopt
from bounded_problems import BOUNDS_JSON, CONVEX, Case, Problem, build, load_cases, names
from bounded_solvers import (
    ENDS,
    GDOPT,
    SOLVERS,
    TIGHT,
    YARDSTICK,
    End,
    Form,
    by_lasso,
    by_nnls,
    constraint,
    make_form,
    polish,
    polish_nearby,
    run_scipy,
    until_target,
)
from cutest import short, spread
from solvers import SHORT, Enough, first_within
from tables import Row, alone, arguments, interleaved, plain, print_heading, print_table, processes, seconds

TAUS = (1e-3, 1e-5, 1e-7)
TAU = 1e-5  # of the comparison of evaluations and of the timed runs
GROUPS = ("cutest", "fits", *CONVEX)
PACKAGES = ("jax", "jaxlib", "optax", "gdopt", "jaxopt", "scipy", "scikit-learn", "sif2jax", "numpy")
PATIENCE = 120  # seconds for one run of SciPy's
LONG = 40  # seconds for one of the long runs that look for the best known value
POLISH = 30  # seconds for one polish
WRONG = 1e-4  # of the gain, the default tolerance of minimize
RIGHT = 1e-6  # of the gain
FACTOR = 10  # by which a claim may be off
ROUNDING = 10 * float(np.finfo(float).eps)  # times the objective
LEAST = 1e-12  # of the gain, below which nothing is counted as left


# --- What is measured on one problem, in a process of the pool.


class Verdict(NamedTuple):
    """How a run by the default call ended, and what is really left."""

    end: End
    objective: float
    left: float
    wrong: bool
    missed: bool  # a right answer without success


class Measured(NamedTuple):
    """All measurements on one problem."""

    needed: dict[str, Sequence[float]]  # evaluations for each of TAUS (inf: never), by solver
    remarks: dict[str, str]
    verdicts: dict[str, Verdict]
    exact: float  # the objective of nnls or Lasso; NaN for other groups


def measure(case: Case, budget: int) -> Measured:
    """Every solver on one problem: its evaluations, and how it ends by itself."""
    problem = build(case.name)
    form = make_form(problem)
    needed, remarks, verdicts = {}, {}, {}
    for name, (solver, kinds) in SOLVERS.items():
        if problem.kind in kinds:
            trace = solver(form, case.target(min(TAUS)), budget, PATIENCE)
            needed[name] = [first_within(trace.losses, case.target(tau)) for tau in TAUS]
            remarks[name] = trace.remark
    for name, find_end in ENDS.items():
        verdicts[name] = judge(case, form, find_end(form))
    exact = form.objective(exact_params(case, problem)) if problem.table else math.nan
    return Measured(needed, remarks, verdicts, exact)


def exact_params(case: Case, problem: Problem) -> np.ndarray:
    return by_nnls(problem) if case.group == "nnls" else by_lasso(problem)


def judge(case: Case, form: Form, end: End) -> Verdict:
    """The verdict on the end of a run."""
    if end.params is None or not np.isfinite(end.params).all():
        return Verdict(end, math.nan, math.nan, wrong=end.success, missed=False)
    objective = form.objective(end.params)
    if not math.isfinite(objective):  # not feasible
        return Verdict(end, objective, math.nan, wrong=end.success, missed=False)
    gain = case.start - objective
    rounding = ROUNDING * abs(objective)
    floor = min(case.best, objective)
    if case.group not in CONVEX and objective - floor > max(rounding, LEAST * gain):
        floor = below(form, end.params, objective)
    left = objective - floor
    allowed = max(WRONG * gain, rounding)
    if not math.isnan(end.left):
        allowed = min(allowed, FACTOR * max(end.left, rounding, LEAST * gain))
    is_right = left <= max(rounding, RIGHT * (case.start - case.best))
    return Verdict(
        end,
        objective,
        left,
        wrong=end.success and not left <= allowed,  # a NaN is wrong too
        missed=not end.success and end.status != "MAX_STEPS" and is_right,
    )


def below(form: Form, params: np.ndarray, objective: float) -> float:
    """The objective of the local minimum below a point: another one behind a wall does not count."""
    for minimum in (polish, polish_nearby):
        value, found = minimum(form, params, POLISH)
        line = [form.objective(params + part * (found - params)) for part in np.linspace(0, 1, 22)[1:-1]]
        if max(line) <= objective + ROUNDING * abs(objective):
            return min(objective, value)
    return objective


# --- The tables. Each has a column for each group.

Pairs = Sequence[tuple[Case, Measured]]


def by_group(pairs: Pairs) -> dict[str, Pairs]:
    """The problems with their measurements, by group."""
    found = {group: [pair for pair in pairs if pair[0].group == group] for group in GROUPS}
    return {group: each for group, each in found.items() if each}


def table(pairs: Pairs, names: Sequence[str], cell: Callable[[str, Pairs], str]) -> tuple[list[str], list[Row]]:
    """One row for each solver; ``cell`` has what a solver did on a group."""
    groups = by_group(pairs)
    header = ["", *(f"{group} ({len(each)})" for group, each in groups.items())]
    return header, [Row(name, [cell(name, each) for each in groups.values()]) for name in names]


def solved(name: str, pairs: Pairs) -> str:
    """Percent of problems solved to each of TAUS."""
    needed = np.array([result.needed[name] for _, result in pairs if name in result.needed])
    return " / ".join(f"{percent:.0f}" for percent in np.mean(needed <= SHORT, axis=0) * 100) if len(needed) else "-"


def ratio(name: str, pairs: Pairs) -> str:
    """The median of the evaluations to TAU over the yardstick's, and the number of problems that both solve."""
    at = TAUS.index(TAU)
    needed = [(result.needed[name][at], result.needed[YARDSTICK][at]) for _, result in pairs if name in result.needed]
    ratios = [mine / theirs for mine, theirs in needed if max(mine, theirs) <= SHORT]
    return f"{np.median(ratios):.2f} ({len(ratios)})" if ratios else "-"


def endings(name: str, pairs: Pairs) -> str:
    """Claims, wrong claims and right answers without success."""
    verdicts = [result.verdicts[name] for _, result in pairs]
    counts = [sum(verdict.end.success for verdict in verdicts)]
    counts += [sum(getattr(verdict, kind) for verdict in verdicts) for kind in ("wrong", "missed")]
    return " / ".join(map(str, counts))


def above_exact(name: str, pairs: Pairs) -> str:
    """The median and the largest of what the objective is above that of nnls or Lasso, relative to the latter.

    An exact objective of zero is replaced by that of the start.
    """
    differences = [
        (result.verdicts[name].objective - result.exact)
        / (result.exact if result.exact > LEAST * case.start else case.start)
        for case, result in pairs
    ]
    return f"{np.median(differences):.1e}, {np.max(differences):.1e}"


# --- The lists.


def behind(pairs: Pairs) -> tuple[list[str], list[str]]:
    """The problems that the yardstick alone solves to TAU, and those that gdopt alone solves."""
    at = TAUS.index(TAU)
    theirs, ours = [], []
    for case, result in pairs:
        mine, yardstick = (result.needed[name][at] <= SHORT for name in (GDOPT, YARDSTICK))
        theirs += [case.name] * (yardstick and not mine)
        ours += [case.name] * (mine and not yardstick)
    return theirs, ours


def verdict_rows(pairs: Pairs, kind: str) -> list[Row]:
    """gdopt's wrong claims, or its right answers without success."""
    rows = []
    for case, result in pairs:
        for name in (GDOPT, TIGHT):
            verdict = result.verdicts[name]
            if getattr(verdict, kind):
                part = verdict.left / (case.start - case.best)
                numbers = [f"{number:.2g}" for number in (verdict.end.left, verdict.left, part)]
                cells = [name, verdict.end.status, *numbers, f"{verdict.objective:.6g}"]
                rows.append(Row(f"`{case.name}`", cells))
    return rows


def print_lists(pairs: Pairs, markdown: bool) -> None:
    """What is not as it should be."""
    theirs, ours = behind(pairs)
    print(f"\nSolved to {short(TAU)} by {plain(YARDSTICK)} and not by gdopt: {', '.join(theirs) or 'none'}.")
    print(f"\nSolved to {short(TAU)} by gdopt and not by {plain(YARDSTICK)}: {', '.join(ours) or 'none'}.")
    columns = ["problem", "call", "status", "claimed left", "really left", "part of the gain", "objective"]
    for title, kind in (("Wrong claims of gdopt", "wrong"), ("Right answers of gdopt without success", "missed")):
        if rows := verdict_rows(pairs, kind):
            print_table(f"{title}: {len(rows)}", columns, rows, markdown)
        else:
            print(f"\n{title}: none.")
    lines = []
    for case, result in pairs:
        lines += [f"{name} on {case.name}: {remark}" for name, remark in result.remarks.items() if remark]
        lower = float(np.nanmin([math.inf, *(verdict.objective for verdict in result.verdicts.values())]))
        if case.best - lower > max(ROUNDING * abs(case.best), LEAST * (case.start - case.best)):
            lines.append(f"lower than the best known on {case.name}: {lower!r}")
    remarks = "; ".join(lines) or "none"
    print(f"\nRemarks: {remarks if markdown else plain(remarks)}.", flush=True)


# --- Times.

TIMED = (
    "sif:HS110",
    "sif:TORSION1:q=15",
    "fit:lifetimes",
    "nnls:spectrum",
    "nnls:large",
    "lasso:cancer:0.02",
    "lasso:sparse:0.02",
    "simplex:mixture_60",
    "simplex:portfolio_300",
)
EXACT = "scipy `nnls`, scikit-learn `Lasso`"


def warm_times(case: Case, rounds: int) -> dict[str, float]:
    """The median milliseconds of warm calls that reach TAU; NaN for a solver that does not."""
    problem = build(case.name)
    form = make_form(problem)
    target = case.target(TAU)
    runs: dict[str, Callable[[], Any]] = {
        GDOPT: lambda: (
            gdopt.minimize(
                problem.loss, problem.start, target=target, tol=0, max_steps=SHORT, **constraint(problem)
            ).params
        )
    }
    for method in ("L-BFGS-B", "TNC"):
        runs[f"scipy {method}"] = functools.partial(scipy_to_target, form, method, target)
    for name, (_, kinds) in SOLVERS.items():
        if name.startswith("jaxopt") and problem.kind in kinds:
            runs[name] = until_target(name.split("`")[1], problem, target, SHORT)
    if problem.table:
        runs[EXACT] = functools.partial(exact_params, case, problem)
    reached = {name: form.objective(run()) <= target for name, run in runs.items()}
    clocks = {name: functools.partial(seconds, run) for name, run in runs.items() if reached[name]}
    times = np.median(interleaved(clocks, 1 + rounds)[1:], axis=0) * 1e3
    return dict.fromkeys(runs, math.nan) | dict(zip(clocks, map(float, times), strict=True))


def scipy_to_target(form: Form, method: str, target: float) -> np.ndarray:
    """The params at which SciPy's method first reaches the target, or its last ones."""
    last: list[Any] = [form.start]
    options = {"maxfun": SHORT}  # TNC's default may be too few

    def evaluate(z: Any) -> Any:
        last[0] = z
        value, grad, objective = form.evaluate(z)
        if objective <= target:
            raise Enough
        return value, grad, objective

    run_scipy(form._replace(evaluate=evaluate), method, options, PATIENCE, SHORT)
    return np.asarray(form.params(jnp.asarray(last[0])))


def time_table(cases: Sequence[Case], rounds: int) -> tuple[list[str], list[Row]]:
    """One row for each problem, which runs alone."""
    columns = [GDOPT, YARDSTICK, "scipy TNC", *(name for name in SOLVERS if name.startswith("jaxopt")), EXACT]
    rows = []
    for case in cases:
        times = alone(warm_times, case, rounds, x64=True)
        cells = [
            "-" if name not in times else "never" if math.isnan(times[name]) else f"{times[name]:.3g}"
            for name in columns
        ]
        rows.append(Row(f"`{case.name}`", cells))
        print(f"\rtimed problems: {len(rows)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return ["", *columns], rows


# --- The best known values.


class Reference(NamedTuple):
    """The best known objective of a problem, and what found it."""

    start: float
    best: float
    size: int
    by: str


def find_reference(group: str, name: str) -> Reference:
    """The lowest objective of many long runs, each polished."""
    problem = build(name)
    form = make_form(problem)
    random = np.random.default_rng([*name.encode()])
    found: dict[str, np.ndarray] = {}
    for i in range(5):
        start = form.start if i == 0 else moved(form, random)
        found[f"L-BFGS-B from start {i}"] = long_run(form, "L-BFGS-B", {"ftol": 0, "gtol": 0, "maxiter": 20_000}, start)
    found["TNC"] = long_run(form, "TNC", {"maxfun": 20_000}, form.start)
    if len(form.start) <= 100 and problem.kind != "simplex":
        found["trust-constr"] = long_run(
            form, "trust-constr", {"gtol": 1e-12, "xtol": 1e-14, "maxiter": 2000}, form.start
        )
    if problem.kind == "simplex":
        found["SLSQP"] = by_slsqp(problem)
    if problem.kind == "bounds" and len(form.start) <= 100:
        for i in range(2):  # natural units need scales from the beginning
            start = form.start if i == 0 else moved(form, random)
            found[f"scaled from start {i}"] = polish(form, start, LONG)[1]
    if group == "nnls":
        found["nnls"] = by_nnls(problem)
    if group == "lasso":
        found["Lasso"] = by_lasso(problem, 1e-14)
    objectives = {by: form.objective(x) for by, x in found.items()}
    best = min(objectives, key=lambda by: objectives[by] if math.isfinite(objectives[by]) else math.inf)
    polished, _ = polish(form, found[best], POLISH)
    if polished < objectives[best]:
        best = f"{best}, polished"
        objectives[best] = polished
    return Reference(form.objective(problem.start), objectives[best], problem.start.size, best)


def moved(form: Form, random: np.random.Generator) -> np.ndarray:
    """The start with each entry moved by a tenth of its size, within the bounds."""
    sizes = np.where(form.start != 0, np.abs(form.start), np.abs(form.start).mean() or 1.0)
    z = form.start + 0.1 * sizes * random.normal(size=form.start.shape)
    return z if form.bounds is None else np.clip(z, form.bounds.lb, form.bounds.ub)


def long_run(form: Form, method: str, options: dict[str, Any], start: np.ndarray) -> np.ndarray:
    """The best params of a run that is cut after 20,000 evaluations or LONG seconds."""
    best = [math.inf, start]

    def evaluate(z: Any) -> Any:
        value, grad, objective = form.evaluate(z)
        if objective < best[0]:
            best[:] = float(objective), np.array(z)
        return value, grad, objective

    run_scipy(form._replace(evaluate=evaluate), method, options, LONG, 20_000, start=start)
    return np.asarray(form.params(jnp.asarray(best[1])))


def by_slsqp(problem: Problem) -> np.ndarray:
    """On the simplex itself."""
    import scipy.optimize

    evaluate = jax.jit(jax.value_and_grad(problem.loss))
    size = problem.start.size
    whole = {"type": "eq", "fun": lambda x: np.sum(x) - 1, "jac": lambda _: np.ones(size)}
    both = lambda x: tuple(np.asarray(part, float) for part in evaluate(x))
    found = scipy.optimize.minimize(
        both,
        problem.start,
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * size,
        constraints=whole,
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    x = np.maximum(found.x, 0)
    return x / x.sum()


def write_references(cores: int, only: Sequence[str] | None) -> None:
    """Writes bounds.json, and says which problems are left out."""
    listed = [(group, name) for group, each in names().items() if not only or group in only for name in each]
    with processes(cores, x64=True) as pool:
        references = spread(pool, "references", find_reference, *zip(*listed, strict=True))
    known = json.loads(BOUNDS_JSON.read_text())["problems"] if BOUNDS_JSON.exists() else {}
    entries, omitted = {}, []
    for (group, name), found in zip(listed, references, strict=True):
        gain = found.start - found.best
        if math.isfinite(gain) and gain > 1e-8 * max(abs(found.best), abs(found.start)) and found.best > -1e20:
            entry = {"group": group, "n": found.size, "f0": found.start, "fbest": found.best, "by": found.by}
            old = known.get(name, entry)
            entries[name] = old if old["f0"] == entry["f0"] and old["fbest"] < entry["fbest"] else entry
        else:
            omitted.append(f"{name} ({found.start:.6g} to {found.best:.6g})")
    kept = {name: entry for name, entry in known.items() if only and entry["group"] not in only}
    ordered = {name: (kept | entries)[name] for each in names().values() for name in each if name in kept | entries}
    about = (
        "The problems of bounded_problems.py: the objective f0 at the start moved into the bounds, and the best known "
        "fbest, with the method that found it. Written by `python benchmarks/bounds.py --reference`."
    )
    BOUNDS_JSON.write_text(json.dumps({"about": about, "problems": ordered}, indent=0) + "\n")
    print(f"{len(ordered)} problems; left out, because nothing is to gain: {', '.join(omitted) or 'none'}")


def main() -> None:
    """Prints all tables."""
    options = arguments(__doc__, "every tenth problem", only=GROUPS, reference="find the best known values anew")
    cores = os.cpu_count() or 1
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # SciPy's, in the processes to come, of which each has one core
    if options.reference:
        write_references(cores, options.only)
        return
    listed = [case for case in load_cases() if not options.only or case.group in options.only]
    cases = sorted(listed[:: 10 if options.quick else 1], key=lambda case: -case.n)  # the largest first
    timed = [case for case in listed if case.name in TIMED][:: 4 if options.quick else 1]

    print_heading("bounds", options.flags, PACKAGES, options.markdown)
    with processes(cores, x64=True) as pool:
        results = spread(pool, "problems", measure, cases, [SHORT] * len(cases))

    pairs = list(zip(cases, results, strict=True))
    taus = " / ".join(map(short, TAUS))
    title = f"Percent of the problems of a group solved to {taus} within {SHORT} evaluations"
    print_table(title, *table(pairs, list(SOLVERS), solved), options.markdown)
    title = f"Median ratio of the evaluations to {short(TAU)} to those of {YARDSTICK} (problems that both solve)"
    print_table(title, *table(pairs, list(SOLVERS), ratio), options.markdown)
    title = "How a call ends: claims of success / wrong ones / right answers without success"
    print_table(title, *table(pairs, list(ENDS), endings), options.markdown)
    if exact := [pair for pair in pairs if not math.isnan(pair[1].exact)]:
        title = "Objective at the end above that of `nnls` and `Lasso`, relative to the latter: median, largest"
        print_table(title, *table(exact, list(ENDS), above_exact), options.markdown)
    print_lists(pairs, options.markdown)
    title = f"Milliseconds of a warm call to {short(TAU)}; the exact methods go on to the end"
    print_table(title, *time_table(timed, rounds=3 if options.quick else 9), options.markdown)


if __name__ == "__main__":
    main()
