"""Settings for all tests, stricter than those of users."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# What one process has compiled, another one loads: a run that is killed and started again above all. The version of
# jaxlib is part of the keys, so that environments with different versions can share the folder.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", "build", "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling takes longer than any deadline. Choose with HYPOTHESIS_PROFILE=thorough, say.
hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Tests start these scripts in processes of their own; those for eight devices are collected there.
collect_ignore = ["scripts"] if jax.device_count() != 8 else []
