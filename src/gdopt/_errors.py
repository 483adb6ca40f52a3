"""The exceptions of gdopt.

GdoptError
├── InputError           (also a ValueError)    bad input: raised before anything compiles
├── CheckpointError                             no checkpoint of a run can be used
└── NotConvergedError    (also a RuntimeError)  a run that ended without success, when asked to raise
"""

from __future__ import annotations

from typing import Any


class GdoptError(Exception):
    """The base class of every exception that gdopt raises on purpose."""


class InputError(GdoptError, ValueError):
    """An argument that cannot be used; the message names it, its value and the fix."""


class CheckpointError(GdoptError):
    """A checkpoint that cannot be read; the message names the file and says what is wrong with it."""


class NotConvergedError(GdoptError, RuntimeError):
    """A run that ended without success; ``result`` holds everything it found.

    Raised by ``Result.raise_for_status()`` and by ``minimize(..., throw=True)``.
    """

    def __init__(self, message: str, result: Any):
        super().__init__(message)
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.result), self.__dict__  # It may come from another process.
