"""Nobody guesses the rate: `gdopt.spectral` in a loop of your own, beside rates that were guessed."""

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
    """The loop of optax's documentation; the one thing that `spectral` needs and others do not mind is `value=`."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grad, state, params, value=value)
        return (optax.apply_updates(params, updates), state), value

    (_, state), values = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return values, state


start = {"weights": jnp.zeros(X.shape[1]), "offset": 0.0}
print(f"the best loss after so many evaluations{50:12}{200:10}{1000:10}")
optimizers = {f"gdopt.gd({rate:g})": gdopt.gd(rate) for rate in (0.01, 0.1, 1.0, 10.0)}
for name, optimizer in {**optimizers, "optax.adam(0.1)": optax.adam(0.1), "gdopt.spectral()": gdopt.spectral()}.items():
    values, state = descend(optimizer, start, 1000)
    print(f"{name:39}" + "".join(f"{jnp.min(values[:n]):{width}.6f}" for n, width in ((50, 12), (200, 10), (1000, 10))))

# The last trial point of `spectral` may be a bad one; its state has the last accepted point.
print(f"\nthe accepted point's own loss: {loss(state.params):.6f}")
print(gdopt.minimize(loss, start))
