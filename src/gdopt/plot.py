"""Pictures of results by matplotlib, which is imported only when a picture is drawn."""

from gdopt._pictures.animation import animate
from gdopt._pictures.descent import descent
from gdopt._pictures.live import live
from gdopt._pictures.path import path
from gdopt._pictures.rates import lr_find, schedule
from gdopt._pictures.valley import valley

__all__ = ["animate", "descent", "live", "lr_find", "path", "schedule", "valley"]


def __dir__() -> list[str]:
    return __all__
