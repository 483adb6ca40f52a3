"""
Matrix factorisation with gaps
==============================

Guess the ratings that viewers did not give. Each viewer and each film gets three
numbers, and their products are to be the ratings. Only one rating in five is known.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.decomposition import TruncatedSVD

import gdopt

# %%
# Ratings of 200 viewers for 100 films, made with seed 0: products of three hidden
# numbers, an average of 3, and a noise of 0.3. Four fifths are hidden. A tenth of the
# known ones is held out.

draws = np.random.default_rng(0)
truth = 3 + draws.normal(size=(200, 3)) @ draws.normal(size=(3, 100)) / np.sqrt(3)
viewer, film = np.nonzero(draws.random(truth.shape) < 0.2)
rating = (truth[viewer, film] + 0.3 * draws.normal(size=len(viewer))).astype(np.float32)
rows = (viewer.astype(np.int32), film.astype(np.int32), rating)
split = draws.permutation(len(rating))
held_out, train = (
    tuple(column[part] for column in rows)
    for part in np.split(split, [len(split) // 10])
)


# %%
# A batch is a list of (viewer, film, rating). The factors start at small random
# numbers; with zeros, the gradient would be zero, too.


def guess(params, viewer, film):
    return params["average"] + jnp.sum(
        params["viewers"][viewer] * params["films"][film], axis=1
    )


def loss(params, batch):
    viewer, film, rating = batch
    return jnp.mean((guess(params, viewer, film) - rating) ** 2)


start = {
    "average": jnp.float32(0.0),
    "viewers": 0.3 * draws.normal(size=(200, 3)).astype(np.float32),
    "films": 0.3 * draws.normal(size=(100, 3)).astype(np.float32),
}
result = gdopt.minimize(
    loss, start, data=train, batch_size=256, epochs=30, validation=held_out
)
print(result.message)

# %%
# ``result.status`` is MAX_STEPS, a success for mini-batches: the 30 epochs are done,
# for which gdopt planned its rates. The params with the lowest validation loss come
# back. Filling the gaps with the average and cutting the singular values, as
# scikit-learn's ``TruncatedSVD`` does, is much worse.

average = train[2].mean()
filled = np.full(truth.shape, average)
filled[train[0], train[1]] = train[2]
svd = TruncatedSVD(3, random_state=0).fit(filled - average)
reference = average + svd.inverse_transform(svd.transform(filled - average))

everyone, everything = np.indices(truth.shape).reshape(2, -1)
hidden = np.ones(truth.shape, bool)
hidden[viewer, film] = False
guessed = np.asarray(guess(result.params, everyone, everything)).reshape(truth.shape)
error, error_svd = (
    np.sqrt(np.mean((each - truth)[hidden] ** 2)) for each in (guessed, reference)
)
print(f"error of the hidden ratings {error:.3f}; filled and cut {error_svd:.3f}")
print(f"spread of the hidden ratings {truth[hidden].std():.3f}")
assert result.success
assert error < 0.6 * error_svd

# %%
# Hidden ratings and their guesses, and the losses by epoch.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
epochs = result.history.loss[:-1].reshape(-1, result.steps_per_epoch).mean(axis=1)
right.semilogy(np.arange(len(epochs)) + 0.5, epochs, label="training")
right.semilogy(
    np.arange(len(epochs)) + 1, result.history.validation_loss, label="held out"
)
right.axhline(0.09, color="black", linewidth=0.8, label="noise")
right.set(
    xlabel="epoch",
    ylabel="mean square error",
    title=f"{result.status.name} after {result.steps} steps",
)
right.legend()
left.plot(truth[hidden][::10], guessed[hidden][::10], ".", markersize=3)
left.axline((3, 3), slope=1, color="black", linewidth=0.8)
left.set(
    xlabel="true rating",
    ylabel="guess",
    title=f"Ratings that nobody gave: error {error:.2f}",
)
plt.show()
