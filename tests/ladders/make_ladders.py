"""Makes ladders.npz: the rates of torch's schedulers, step by step in float64, that gdopt's schedules must match.

Made with torch 2.13.0, numpy 2.4.6 and Python 3.11. To remake it, in an environment of its own:

    pip install torch==2.13.0 numpy
    python tests/ladders/make_ladders.py

"<name>" holds the rates of steps 0, 1, 2, ..., each read before ``optimizer.step()``, and "<name>@" those of the steps
in ``FAR``, where torch cannot be stepped to in reasonable time: there ``last_epoch`` is set by hand and ``get_lr()``
asked, which reads nothing else. (Not for triangular2, where torch raises OverflowError.) "cases" holds, as JSON, what
each name stands for: the scheduler and its arguments, a scale_fn written as Python's expression of x.
"""

import json
import warnings
from pathlib import Path

import numpy as np

STEPS = 10_001
FAR = (10**8 - 1, 10**8, 10**8 + 1, 10**8 + 12_345)

_CYCLIC = {
    # max_lr = 1 and base_lr = 0 show the bare heights; asymmetric cycles have lengths that float32 cannot divide by.
    "triangular": {"base_lr": 0.001, "max_lr": 0.6, "step_size_up": 100},
    "triangular asymmetric": {"base_lr": 0.1, "max_lr": 0.3, "step_size_up": 3, "step_size_down": 7},
    "triangular from zero": {"base_lr": 0.0, "max_lr": 1.0, "step_size_up": 1999, "step_size_down": 1234},
    "triangular every step": {"base_lr": 0.25, "max_lr": 0.5, "step_size_up": 1},
    "triangular2": {"base_lr": 0.001, "max_lr": 0.6, "step_size_up": 100, "mode": "triangular2"},
    "triangular2 asymmetric": {
        "base_lr": 1e-5,
        "max_lr": 0.3,
        "step_size_up": 777,
        "step_size_down": 333,
        "mode": "triangular2",
    },
    "exp_range": {"base_lr": 0.001, "max_lr": 0.6, "step_size_up": 100, "mode": "exp_range", "gamma": 0.99994},
    "exp_range asymmetric": {
        "base_lr": 0.0,
        "max_lr": 2.0,
        "step_size_up": 50,
        "step_size_down": 17,
        "mode": "exp_range",
        "gamma": 0.999,
    },
    "exp_range far": {
        "base_lr": 0.0,
        "max_lr": 0.6,
        "step_size_up": 64,
        "step_size_down": 36,
        "mode": "exp_range",
        "gamma": 0.9999999,
    },
    "scale_fn of cycles": {
        "base_lr": 0.001,
        "max_lr": 0.6,
        "step_size_up": 100,
        "step_size_down": 60,
        "scale_fn": "1 / 5 ** (x * 0.0001)",
        "scale_mode": "cycle",
    },
    "scale_fn of iterations": {
        "base_lr": 0.1,
        "max_lr": 0.6,
        "step_size_up": 50,
        "step_size_down": 150,
        "scale_fn": "1 / (1 + x / 1000)",
        "scale_mode": "iterations",
    },
}
_ONE_CYCLE = {
    "one_cycle cos": {"max_lr": 0.1, "total_steps": STEPS},
    "one_cycle linear": {"max_lr": 0.1, "total_steps": STEPS, "anneal_strategy": "linear"},
    "one_cycle cos 12345": {
        "max_lr": 3.0,
        "total_steps": 12_345,
        "pct_start": 0.123,
        "div_factor": 3.0,
        "final_div_factor": 100.0,
    },
    **{
        f"one_cycle {strategy} {steps}": {"max_lr": 1.0, "total_steps": steps, "anneal_strategy": strategy}
        for strategy, steps in (("cos", 1), ("cos", 2), ("cos", 3), ("cos", 100), ("linear", 1), ("linear", 7))
    },
    "one_cycle without rise": {"max_lr": 1.0, "total_steps": 50, "pct_start": 0.0},
    "one_cycle without fall": {"max_lr": 1.0, "total_steps": 50, "pct_start": 1.0},
}


def scheduler_of(kind, arguments):
    """The scheduler over an optimizer with one parameter, and that optimizer."""
    import torch  # here, because the tests go through all modules and do without torch

    arguments = dict(arguments)
    if "scale_fn" in arguments:
        arguments["scale_fn"] = eval(f"lambda x: {arguments['scale_fn']}")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return getattr(torch.optim.lr_scheduler, kind)(optimizer, cycle_momentum=False, **arguments), optimizer


def rates_of(kind, arguments, steps):
    """The rates of the first steps, as a training loop sees them."""
    scheduler, optimizer = scheduler_of(kind, arguments)
    rates = []
    for k in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if k < steps - 1:
            scheduler.step()
    return np.array(rates)


def far_rates_of(kind, arguments):
    """The rates of the steps in FAR."""
    scheduler, _ = scheduler_of(kind, arguments)
    rates = []
    for step in FAR:
        scheduler.last_epoch = step
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="To get the last learning rate")
            rates.append(scheduler.get_lr()[0])
    return np.array(rates)


def main():
    cases, arrays = [], {}
    for name, arguments in _CYCLIC.items():
        cases.append({"name": name, "kind": "CyclicLR", "arguments": arguments})
        arrays[name] = rates_of("CyclicLR", arguments, STEPS)
        if arguments.get("mode") != "triangular2":
            arrays[f"{name}@"] = far_rates_of("CyclicLR", arguments)
    for name, arguments in _ONE_CYCLE.items():
        cases.append({"name": name, "kind": "OneCycleLR", "arguments": arguments})
        arrays[name] = rates_of("OneCycleLR", arguments, arguments["total_steps"])
    arrays["cases"] = np.array(json.dumps({"far": FAR, "cases": cases}))
    np.savez_compressed(Path(__file__).with_name("ladders.npz"), **arrays)


if __name__ == "__main__":
    main()
