"""The contract of everything that plugs in: one line in a list below, and all of this is checked for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations
from optax import contrib
from problems import PROBLEMS, Problem

import gdopt
from gdopt import loop, schedules

# --- the lists; functions, so that a test can have everything made anew ---


def optimizers() -> dict[str, tuple[Any, Any]]:
    """Name -> (optimizer, learning_rate), where ready optimizers have the rate None."""
    partial, chain, sgd, adam = functools.partial, optax.chain, optax.sgd, optax.adam
    adversary = chain(contrib.normalize(), sgd(0.01))
    return {
        "gd": (gdopt.gd, 0.3),
        "gd_scheduled": (gdopt.gd, schedules.triangular2(0.2, 0.8, 7)),
        "sgd": (sgd, 0.3),
        "momentum": (partial(sgd, momentum=0.9), 0.05),
        "nesterov": (partial(sgd, momentum=0.9, nesterov=True), 0.05),
        "noisy_sgd": (partial(optax.noisy_sgd, key=0), 0.1),
        "adam": (adam, 0.1),
        "adam_scheduled": (adam(schedules.one_cycle(0.2, 300)), None),
        "adamw": (optax.adamw, 0.1),
        "adafactor": (partial(optax.adafactor, min_dim_size_to_factor=2), 0.1),
        "adagrad": (optax.adagrad, 0.5),
        "lamb": (optax.lamb, 0.1),
        "lion": (optax.lion, 0.02),
        "radam": (optax.radam, 0.1),
        "rmsprop": (optax.rmsprop, 0.02),
        "rprop": (optax.rprop, 0.1),
        "yogi": (optax.yogi, 0.1),
        "lbfgs": (optax.lbfgs(), None),
        "polyak_sgd": (optax.polyak_sgd(), None),
        "backtracking": (chain(sgd(1.0), optax.scale_by_backtracking_linesearch(15)), None),
        "muon": (contrib.muon, 0.1),
        "sam": (contrib.sam(sgd(0.3), adversary), None),
        "sam_opaque": (contrib.sam(sgd(0.3), adversary, opaque_mode=True), None),
        "sophia": (contrib.sophia, 0.1),
        "cocob": (contrib.cocob, 1.0),
        "dadapt_adamw": (contrib.dadapt_adamw, 1.0),
        "dog": (contrib.dog, 1.0),
        "dowg": (contrib.dowg, 1.0),
        "mechanize": (contrib.mechanize(sgd(1.0)), None),
        "momo": (contrib.momo, 1.0),
        "momo_adam": (contrib.momo_adam, 0.1),
        "prodigy": (contrib.prodigy, 1.0),
        "reduce_on_plateau": (chain(adam(0.1), contrib.reduce_on_plateau(factor=0.5, patience=5)), None),
        "schedule_free_sgd": (contrib.schedule_free_sgd, 1.0),
        "schedule_free_adamw": (contrib.schedule_free_adamw(0.1, warmup_steps=10), None),
        "multi_steps": (optax.MultiSteps(sgd(0.3), every_k_schedule=3), None),
        "apply_every": (chain(optax.apply_every(3), sgd(0.1)), None),
        "inject_hyperparams": (optax.inject_hyperparams(adam)(learning_rate=0.1), None),
        "inject_hyperparams_factory": (optax.inject_hyperparams(adam), 0.1),
        "clipped": (lambda rate: chain(optax.clip_by_global_norm(1.0), sgd(rate)), 0.3),
        "apply_if_finite": (optax.apply_if_finite(adam(0.1), max_consecutive_errors=3), None),
        "masked": (chain(optax.masked(optax.scale_by_adam(), {"w": True, "b": False}), optax.scale(-0.1)), None),
        "multi_transform": (optax.multi_transform({"a": adam(0.1), "s": sgd(0.3)}, {"w": "a", "b": "s"}), None),
    }
