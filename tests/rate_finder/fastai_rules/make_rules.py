"""Writes rules.npz: the answers of fastai's own rules for some curves. Run it again only for a new fastai.

python -m pip install torch==2.13.0 numpy && python -m pip install --no-deps fastai==2.8.12
python tests/fastai_rules/make_rules.py
"""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path

import numpy as np

RULES = ("steep", "valley", "slide", "minimum")


def fastai_rules() -> dict:
    """The four functions of fastai/callback/schedule.py, without importing all that fastai needs."""
    (path,) = (file for file in importlib.metadata.files("fastai") if str(file) == "fastai/callback/schedule.py")
    source = Path(path.locate()).read_text()
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name in RULES]
    names = {"np": np, "tuple": tuple, "to_np": lambda tensor: tensor.numpy()}
    exec(compile(ast.Module([*functions], []), "fastai", "exec"), names)
    return {name: names[name] for name in RULES}


def curves() -> dict[str, np.ndarray]:
    """Losses over a ladder, as range tests should and should not look."""
    random = np.random.default_rng(0)
    x = np.linspace(-5, 1, 120)
    fall = 2.3 - 2 / (1 + np.exp(-3 * (x + 1.5)))
    cliff = fall + np.exp(8 * (x - 0.6))
    return {
        "smooth": cliff,
        "noisy": cliff + 0.05 * random.normal(size=120),
        "very noisy": cliff + 0.5 * random.normal(size=120),
        "falling": fall,
        "rising": fall[::-1].copy(),
        "flat": np.full(120, 2.0),
        "noise alone": random.normal(size=120),
        "negative": cliff - 10,
        "short": cliff[-20:],
        "staircase": np.round(cliff, 1),
    }


def main() -> None:
    """Ask all rules about all curves."""
    import torch  # here, so that collecting doctests does not need it

    rules, arrays = fastai_rules(), {}
    for name, losses in curves().items():
        rates = np.logspace(-5, 1, 120)[-len(losses) :]
        arrays[f"{name}/losses"] = losses
        arrays[f"{name}/rates"] = rates
        for rule in RULES:
            found, _ = rules[rule](torch.tensor(rates), torch.tensor(losses), len(losses))
            arrays[f"{name}/{rule}"] = np.asarray(found, float)
    np.savez_compressed(Path(__file__).with_name("rules.npz"), **arrays)


if __name__ == "__main__":
    main()
