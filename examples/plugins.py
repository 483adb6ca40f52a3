"""Plugging in: one regression, minimised with gdopt's optimizer, with optax's, and with your own."""

import functools

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import scale

import gdopt

X, y = (jnp.asarray(scale(array)) for array in load_diabetes(return_X_y=True))


def loss(params):
    return jnp.mean((X @ params["slopes"] + params["offset"] - y) ** 2)


# Your own optimizer is an optax transformation, or a function that makes one for a learning rate.
def heavy_ball(learning_rate, friction=0.1):
    """A ball that rolls: the gradient changes its velocity, and the velocity its position."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None):  # updates: the gradient; state: the velocity
        velocity = jax.tree.map(lambda v, g: (1 - friction) * v - learning_rate * g, state, updates)
        return velocity, velocity  # the update of the parameters, and the new state

    return optax.GradientTransformation(init, update)


# An optax optimizer with its other arguments fixed is such a function, too.
nesterov = functools.partial(optax.sgd, momentum=0.9, nesterov=True)

# A learning rate is a number or any function of the step: one of gdopt's or optax's schedules, or your own.
cosine = optax.cosine_decay_schedule(0.1, decay_steps=1000)
warm_up = lambda step: jnp.minimum(0.2, 0.01 * (step + 1))

plugins = {
    "gdopt.gd": {"optimizer": gdopt.gd, "learning_rate": 0.2},
    "gdopt.gd, my own warm-up": {"optimizer": gdopt.gd, "learning_rate": warm_up},
    "optax.adam, cosine": {"optimizer": optax.adam, "learning_rate": cosine},
    "optax.sgd, Nesterov": {"optimizer": nesterov, "learning_rate": 0.05},
    "optax.lbfgs": {"optimizer": optax.lbfgs()},  # ready: it finds its rate itself
    "my own heavy_ball": {"optimizer": heavy_ball, "learning_rate": 0.05},
}

start = {"slopes": jnp.zeros(X.shape[1]), "offset": 0.0}
print(f"{'optimizer':26}{'status':12}{'steps':>6}{'loss':>10}")
for name, plugin in plugins.items():
    # tol=1e-3: stop once at most a thousandth of the gain is left.
    result = gdopt.minimize(loss, start, tol=1e-3, **plugin)
    print(f"{name:26}{result.status.name:12}{result.steps:6}{result.loss:10.5f}")
