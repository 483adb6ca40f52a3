"""Gradient descent on JAX where nobody has to guess: ``gdopt.minimize(loss, params)``."""

from importlib.metadata import version

from gdopt import plot, schedules
from gdopt._gd_step import gd_step
from gdopt.checkpoint import Checkpoint
from gdopt.diagnosis import Diagnosis, diagnose
from gdopt.driver import clear_cache, minimize
from gdopt.errors import CheckpointError, GdoptError, InputError, NotConvergedError
from gdopt.lr_finder import lr_find
from gdopt.optimizers import gd, spectral
from gdopt.quasi_newton import quasi_newton
from gdopt.result import History, RangeTest, Refinement, Report, Result
from gdopt.sharding import shard
from gdopt.stopping import Status

__version__ = version("gdopt")

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Diagnosis",
    "GdoptError",
    "History",
    "InputError",
    "NotConvergedError",
    "RangeTest",
    "Refinement",
    "Report",
    "Result",
    "Status",
    "clear_cache",
    "diagnose",
    "gd",
    "gd_step",
    "lr_find",
    "minimize",
    "plot",
    "quasi_newton",
    "schedules",
    "shard",
    "spectral",
]


def __dir__() -> list[str]:
    """The public names, and not those that this file needs itself."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
