"""What does scale="curvature" do for losses in their natural units?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/scales.py              # about 10 minutes on 2 cores; --quick: 1; --markdown: for RESULTS.md

The problems are those of raw_problems.py, in float64. A run has solved one if it comes within 1e-5 of the gain from the
start to the best loss that any run on that problem reached, in at most 2000 evaluations. 10,000 evaluations of
`quasi_newton` and SciPy's BFGS, with and without scales, search for the best loss. The evaluations do not include the
Hessian products that the scale takes: one for each of up to 64 params, or ten.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdopt
import raw_problems
from cutest import spread
from solvers import by_scipy, first_within
from tables import Row, arguments, print_heading, print_table, processes

PACKAGES = ("jax", "jaxlib", "optax", "gdopt", "scipy", "scikit-learn", "numpy")
BUDGET, LONG = 2000, 10_000  # evaluations
SECONDS = 60.0  # for SciPy
TAU = 1e-5
SETTINGS: dict[str, dict[str, Any]] = {
    "`minimize(loss, params)`": {},
    "`optimizer=gdopt.gd`": {"optimizer": gdopt.gd},
    "`optimizer=optax.lbfgs()`": {"optimizer": optax.lbfgs()},
    "`optimizer=optax.adam, learning_rate=0.1`": {"optimizer": optax.adam, "learning_rate": 0.1},
}
SCALES = (None, "curvature")


def measure(name: str) -> list[list[float]]:
    """The evaluations that each setting needs with each of the scales; infinite if it does not solve the problem."""
    warnings.simplefilter("ignore")
    loss, start = raw_problems.make()[name]
    start = jnp.asarray(start)

    def run(steps: int, **options: Any) -> np.ndarray:
        history = gdopt.minimize(loss, start, tol=0, max_steps=steps - 1, **options).history
        assert history is not None
        return history.loss

    losses = [[run(BUDGET, scale=scale, **options) for scale in SCALES] for options in SETTINGS.values()]
    found = [each for row in losses for each in row] + [run(LONG, scale=scale) for scale in SCALES]
    found.append(by_scipy("BFGS")(loss, start, LONG, SECONDS).losses)
    first, best = float(loss(start)), min(np.nanmin(each) for each in found)
    jax.clear_caches()
    gdopt.clear_cache()
    return [[first_within(each, best + TAU * (first - best)) for each in row] for row in losses]


def main() -> None:
    """Prints the table."""
    options = arguments(__doc__, "every eighth problem")
    names = list(raw_problems.make())[:: 8 if options.quick else 1]
    print_heading("scales", options.flags, PACKAGES, options.markdown)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    with processes(os.cpu_count() or 1, x64=True) as pool:
        needed = np.array(spread(pool, "problems", measure, names))  # (problem, setting, scale)
    rows = []
    for number, name in enumerate(SETTINGS):
        without, scaled = needed[:, number].T
        both = np.isfinite(without) & np.isfinite(scaled)
        ratio = f"{np.median(scaled[both] / without[both]):.2f} ({both.sum()})" if both.any() else "-"
        rows.append(Row(name, [f"{np.isfinite(without).mean():.1%}", f"{np.isfinite(scaled).mean():.1%}", ratio]))
    title = f"Percent of {len(names)} problems solved to {TAU:.0e} within {BUDGET} evaluations"
    header = ["", "without", 'scale="curvature"', "evaluations, over those without; of problems that both solve"]
    print_table(title, header, rows, options.markdown)


if __name__ == "__main__":
    main()
