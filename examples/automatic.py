"""`gdopt.spectral` finds the rate in your own loop, and is compared with guessed rates."""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale

import gdopt

X, y = load_breast_cancer(return_X_y=True)
X, y = jnp.asarray(scale(X)), jnp.asarray(y)


def loss(params):
    logits = X @ params["weights"] + params["offset"]
    return jnp.mean(jax.nn.softplus(logits) - y * logits) + 1e-3 * jnp.sum(params["weights"] ** 2)


def descend(optimizer, params, steps):
    """The loop of optax's documentation, with `value=`, which `spectral` needs and other optimizers ignore."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grad, state, params, value=value)
        return (optax.apply_updates(params, updates), state), value

    (_, state), values = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return values, state


start = {"weights": jnp.zeros(X.shape[1]), "offset": 0.0}
plugins = {f"gdopt.gd({rate:g})": gdopt.gd(rate) for rate in (0.01, 0.1, 1.0, 10.0)}
plugins |= {"optax.adam(0.1)": optax.adam(0.1), "gdopt.spectral()": gdopt.spectral()}

print(f"{'lowest loss within so many steps':34}{50:>10}{200:>10}{1000:>10}")
for name, optimizer in plugins.items():
    losses, _ = descend(optimizer, start, 1000)
    print(f"{name:34}" + "".join(f"{jnp.min(losses[:n]):10.6f}" for n in (50, 200, 1000)))

# The last trial point of `spectral` may be bad, but its state has the last accepted point.
_, state = descend(gdopt.spectral(), start, 50)
point = optax.tree.get(state, "params")
print(f"\n50 steps of spectral end at a loss of {loss(point):.6f}. gdopt.minimize also tests when to stop:\n")
print(gdopt.minimize(loss, start))
