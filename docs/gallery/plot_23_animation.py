"""
A ball that rolls
=================

The same run as a moving picture: ``gdopt.plot.animate`` writes a GIF for a talk, or a
page of HTML with a slider.
"""

import base64
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gdopt

# %%
# The banana valley of Rosenbrock: its floor is curved and nearly flat, and its walls
# are steep. The lowest point is (1, 1).


def loss(w):
    return (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2


result = gdopt.minimize(loss, jnp.array([-1.2, 1.0]), record_params=True)
print(result)

# %%
# ``result.status`` is CONVERGED, and the minimum is known. Loss and params of each step
# belong together: entry k of ``history.params`` has the loss of entry k of
# ``history.loss``.

assert result.success
assert np.allclose(result.params, 1.0, atol=0.05)
assert np.allclose(
    [loss(w) for w in result.history.params], result.history.loss, rtol=1e-3, atol=1e-5
)

# %%
# The ending of the file decides what is written. ``Moving`` shows the GIF on this page;
# in a notebook use ``IPython.display.Image``.


class Moving:
    def __init__(self, path):
        self.data = base64.b64encode(path.read_bytes()).decode()

    def _repr_html_(self):
        source = f"data:image/gif;base64,{self.data}"
        return f'<img alt="A ball rolls through a curved valley" src="{source}">'


with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "ball.gif"
    gdopt.plot.animate(loss, result, file)
    print(f"{file.stat().st_size / 1000:.0f} kB")
    moving = Moving(file)
moving

# %%
# The same path, at rest.

figure, axes = plt.subplots(layout="constrained")
gdopt.plot.path(loss, result, ax=axes)
axes.set(xlabel="first weight", ylabel="second weight")
plt.show()
