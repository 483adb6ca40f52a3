"""Helpers that more than one test file uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from gdopt._compile import program


@dataclass
class Compilations:
    """The XLA compilations so far; ``names`` lists the compiled functions."""

    names: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.names)


_counters: list[Compilations] = []


def _listen(event: str, duration_secs: float, **metadata: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        for counter in _counters:
            counter.names.append(str(metadata.get("fun_name", "?")))


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextmanager
def count_compilations() -> Generator[Compilations]:
    """Count what XLA compiles inside the block, eager operations of new shapes included.

    >>> import jax.numpy as jnp
    >>> double = jax.jit(lambda x: 2 * x)
    >>> x = jnp.ones(3)
    >>> with count_compilations() as counter:
    ...     _ = double(x), double(x)
    >>> counter.count, counter.names
    (1, ['jit(<lambda>)'])
    """
    counter = Compilations()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters[:] = [other for other in _counters if other is not counter]


_traces: list[list[str]] = []


def _listen_to_traces(event: str, duration_secs: float, **metadata: object) -> None:
    if event == "/jax/core/compile/jaxpr_trace_duration":
        for names in _traces:
            names.append(str(metadata.get("fun_name", "?")))


jax.monitoring.register_event_duration_secs_listener(_listen_to_traces)


@contextmanager
def count_traces() -> Generator[list[str]]:
    """List the functions that JAX traces inside the block.

    >>> with count_traces() as names:
    ...     _ = jax.make_jaxpr(lambda x: 2 * x)(1.0)
    >>> names
    ['<lambda>']
    """
    names: list[str] = []
    _traces.append(names)
    try:
        yield names
    finally:
        _traces[:] = [other for other in _traces if other is not names]


def evaluate(loss: Callable, *args: Any) -> tuple:
    """Return loss and gradient, traced, differentiated, replayed and shared as in ``minimize``, without its loop."""
    value = program.trace(loss, *args, rules=True)
    both = jax.value_and_grad(lambda params, constants, *args: value.replay(constants, params, *args))
    traced = program.trace(both, args[0], value.constants, *args[1:])
    given = traced.constants, args[0], value.constants, *args[1:]
    return program.share(traced.replay, *given).call(*given)


def some_of(names: Iterable[str], usual: Container[str]) -> list[Any]:
    """Return all names as parameters of a test. Unusual ones are marked slow."""
    return [pytest.param(name, marks=[] if name in usual else pytest.mark.slow) for name in names]


def shared_traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the list of traces that ``program`` shares from here on. It grows with them."""
    share, traces = program.share, []

    def spy(function: Callable, *args: Any, **options: Any) -> program.Shared:
        traces.append(jax.make_jaxpr(function)(*args))
        return share(function, *args, **options)

    monkeypatch.setattr(program, "share", spy)
    return traces


def walk(machine: type[RuleBasedStateMachine], steps: int, examples: int) -> None:
    """Make so many random walks through the rules of a model, which may take long and are not shrunk."""
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=quiet,
            database=None,
            phases=[Phase.generate],
        ),
    )


def walk_on(machine: type[RuleBasedStateMachine], seconds: float) -> None:
    """Make random walks until the time is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        walk(machine, 50, 4)


def rule_of_a_computed_value(kind: Any) -> Any:
    """Return a loss with a derivative rule that closes over a value which the loss computes."""

    def loss(x: Any, data: Any) -> Any:
        size = 2 * jnp.mean(data)
        function = kind(lambda y: size * y**2)
        if kind is jax.custom_jvp:
            function.defjvp(lambda primals, tangents: (function(*primals), 2 * size * primals[0] * tangents[0]))
        else:
            function.defvjp(lambda y: (size * y**2, y), lambda y, g: (2 * size * y * g,))
        return jnp.sum(function(x - 1))

    return loss
