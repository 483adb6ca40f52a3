"""Gradient descent on JAX without guesswork: ``gdopt.minimize(loss, params)``."""

from importlib.metadata import version

from gdopt import plot, prox, schedules
from gdopt._checkpoint.folder import Checkpoint
from gdopt._checkpoint.load import load
from gdopt._devices.sharding import shard
from gdopt._errors import CheckpointError, GdoptError, InputError, NotConvergedError
from gdopt._gd_step import gd_step
from gdopt._minimize import clear_cache, minimize
from gdopt._optimizers.distance import distance_adamw
from gdopt._optimizers.quasi_newton import quasi_newton
from gdopt._optimizers.spectral import gd, spectral
from gdopt._outcome.diagnose import Diagnosis, diagnose
from gdopt._prepare import Prepared, prepare
from gdopt._rate_finder.lr_find import lr_find
from gdopt._result import History, RangeTest, Refinement, Report, Result
from gdopt._status import Status

__version__ = version("gdopt")

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Diagnosis",
    "GdoptError",
    "History",
    "InputError",
    "NotConvergedError",
    "Prepared",
    "RangeTest",
    "Refinement",
    "Report",
    "Result",
    "Status",
    "clear_cache",
    "diagnose",
    "distance_adamw",
    "gd",
    "gd_step",
    "load",
    "lr_find",
    "minimize",
    "plot",
    "prepare",
    "prox",
    "quasi_newton",
    "schedules",
    "shard",
    "spectral",
]


def __dir__() -> list[str]:
    """Return the public names, without those that only this file needs."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
