"""One training on several processes, each with its own devices. Needs scikit-learn.

For one process: ``python examples/processes.py``. For two, in two shells (or on two machines, with the address of the
first one instead of 127.0.0.1):

    python examples/processes.py 127.0.0.1:7654 2 0
    python examples/processes.py 127.0.0.1:7654 2 1
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import gdopt

if len(sys.argv) == 4:  # before any other use of JAX
    address, processes, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    jax.distributed.initialize(
        address,
        processes,
        process,
        coordinator_bind_address=address if process == 0 else None,  # by default it listens on all interfaces
        shutdown_timeout_seconds=10,  # for which the others wait if one is gone
    )

images, labels = load_digits(return_X_y=True)
rows = len(images) // 64 * 64  # divisible by the number of devices
images, labels = (images[:rows] / 16).astype(np.float32), labels[:rows]


def loss(params, images, labels):
    logits = images @ params["weights"] + params["bias"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


# Every process makes the same calls. Each keeps the rows for its own devices, and a copy of the params.
mesh = jax.make_mesh((jax.device_count(),), ("data",))
data = gdopt.shard((images, labels), mesh, rows="data")
params = gdopt.shard({"weights": np.zeros((64, 10), np.float32), "bias": np.zeros((1, 10), np.float32)}, mesh)
result = gdopt.minimize(loss, params, args=data, tol=1e-2)

if jax.process_index() == 0:  # one process writes
    logits = images @ np.asarray(result.params["weights"]) + np.asarray(result.params["bias"])
    print(f"{jax.process_count()} process(es), {jax.device_count()} device(s): {result.message}")
    print(f"{np.mean(logits.argmax(1) == labels):.1%} of the digits are recognised.")
