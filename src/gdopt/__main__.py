"""``python -m gdopt``: what a bug report needs to say about the machine."""

from __future__ import annotations

import importlib.metadata
import platform
import warnings

import jax

import gdopt
from gdopt._compile.self_check import is_reliable

_PACKAGES = ("jax", "jaxlib", "numpy", "optax")
_EXTRAS = {"plot": "matplotlib", "progress": "tqdm", "checkpoint": "orbax-checkpoint"}


def main() -> None:
    """Print versions, devices and extras, and whether programs can be shared."""
    rows = {"gdopt": gdopt.__version__, "Python": platform.python_version(), "platform": platform.platform()}
    rows |= {name: _version(name) or "missing" for name in _PACKAGES}
    rows["devices"] = _devices()
    for extra, package in _EXTRAS.items():
        found = _version(package)
        cure = f'missing: pip install "gdopt[{extra}]"'
        rows[f"extra {extra}"] = f"{package} {found}" if found else cure
    rows["shared programs"] = _shared()
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        print(f"{name:{width}}{value}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> str:
    """Name the devices. JAX may find none that work, which is then what the report has to say."""
    try:
        found = jax.devices()
    except Exception as error:
        return f"none: {type(error).__name__}: {' '.join(str(error).split())}"
    kinds = [device.device_kind for device in found]
    counted = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    return f"{counted} ({jax.default_backend()})"


def _shared() -> str:
    """Tell whether equal calls share a program: it needs a JAX whose traces can be told apart."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reliable = is_reliable()
    why = " ".join(str(warning.message) for warning in caught)
    return "yes, the self-check holds" if reliable else f"no, the self-check fails. {why}".strip()


if __name__ == "__main__":
    main()
