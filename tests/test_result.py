"""What comes back from a run, as Python and JAX handle it."""

from __future__ import annotations

import pickle

import jax.numpy as jnp
import numpy as np

from gdopt import Status


def test_a_status_prints_as_its_name_and_is_an_int() -> None:
    status = Status.DIVERGED
    assert (str(status), f"{status}", f"{status:s}") == ("DIVERGED", "DIVERGED", "DIVERGED")
    assert (f"{status:>10}", f"{status!r}") == ("  DIVERGED", "<Status.DIVERGED: 5>")
    assert (f"{status:d}", f"{status:03d}", f"{status:.1f}") == ("5", "005", "5.0")
    assert status == 5
    assert status > Status.CONVERGED
    assert pickle.loads(pickle.dumps(status)) is status
    np.testing.assert_array_equal(np.array([status, Status.CONVERGED]) == np.array([5, 1]), [True, True])
    assert jnp.asarray(status).dtype == jnp.int32
