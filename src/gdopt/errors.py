"""What can go wrong.

GdoptError
├── InputError           (also a ValueError)    bad input: raised before anything compiles
└── NotConvergedError    (also a RuntimeError)  a run that ended without success, when asked to raise
"""

from __future__ import annotations

from typing import Any


class GdoptError(Exception):
    """The base of every exception that gdopt raises on purpose."""


class InputError(GdoptError, ValueError):
    """An argument cannot be used; the message names it, its value and the cure."""


class NotConvergedError(GdoptError, RuntimeError):
    """A run ended without success; ``result`` holds everything it found.

    Raised by ``Result.raise_for_status()`` and by ``minimize(..., throw=True)``.
    """

    def __init__(self, message: str, result: Any):
        super().__init__(message)
        self.result = result
