"""
A character model
=================

Invent names of chemical elements. A network reads three letters and guesses the next
one. Its simplest relative, which reads only one letter, has a known best loss: it
counts pairs.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import gdopt

# %%
# The 118 names. A dot stands for their begin and end. A fifth of the names is held out
# (seed 0).

names = """hydrogen helium lithium beryllium boron carbon nitrogen oxygen fluorine
neon sodium magnesium aluminium silicon phosphorus sulfur chlorine argon potassium
calcium scandium titanium vanadium chromium manganese iron cobalt nickel copper zinc
gallium germanium arsenic selenium bromine krypton rubidium strontium yttrium
zirconium niobium molybdenum technetium ruthenium rhodium palladium silver cadmium
indium tin antimony tellurium iodine xenon caesium barium lanthanum cerium
praseodymium neodymium promethium samarium europium gadolinium terbium dysprosium
holmium erbium thulium ytterbium lutetium hafnium tantalum tungsten rhenium osmium
iridium platinum gold mercury thallium lead bismuth polonium astatine radon francium
radium actinium thorium protactinium uranium neptunium plutonium americium curium
berkelium californium einsteinium fermium mendelevium nobelium lawrencium
rutherfordium dubnium seaborgium bohrium hassium meitnerium darmstadtium roentgenium
copernicium nihonium flerovium moscovium livermorium tennessine oganesson"""
names = np.random.default_rng(0).permutation(names.split())
letters = ".abcdefghijklmnopqrstuvwxyz"


def rows(names):
    """Three letters, and the one that follows, for each place of each name."""
    text = ["..." + name + "." for name in names]
    table = [
        [letters.index(c) for c in word[k : k + 4]]
        for word in text
        for k in range(len(word) - 3)
    ]
    table = np.array(table, np.int32)
    return table[:, :3], table[:, 3]


train, held_out = rows(names[24:]), rows(names[:24])

# %%
# First the pairs. The loss is deterministic, so the run ends at its minimum, and that
# is known: the mean of minus the logarithm of each pair's frequency.


def pair_loss(table, before, after):
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(table[before[:, 2]], after)
    )


pairs = gdopt.minimize(pair_loss, jnp.zeros((27, 27)), args=train)
counts = np.zeros((27, 27))
np.add.at(counts, (train[0][:, 2], train[1]), 1)
frequency = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
known = -np.log(frequency[train[0][:, 2], train[1]]).mean()
print(pairs.message)
print(f"counted: {known:.4f}")
assert abs(pairs.loss - known) < 0.01

# %%
# Then three letters: each is embedded in eight numbers, and a hidden layer mixes them.


def logits(params, before):
    embedded = params["letters"][before].reshape(len(before), -1)
    return (
        jnp.tanh(embedded @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    )


def loss(params, batch):
    before, after = batch
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits(params, before), after)
    )


draws = np.random.default_rng(1)
shapes = {
    "letters": (27, 8),
    "w1": (24, 64),
    "b1": (1, 64),
    "w2": (64, 27),
    "b2": (1, 27),
}
start = {
    name: draws.normal(0, 0.2, shape).astype(np.float32)
    for name, shape in shapes.items()
}
result = gdopt.minimize(
    loss, start, data=train, batch_size=32, epochs=40, validation=held_out, patience=8
)
print(result.message)

# %%
# ``result.status`` is EARLY_STOPPED or MAX_STEPS, both with success. The params with
# the lowest loss on names that were not learned come back.

guess_all = np.log(27)
low = result.history.validation_loss.min()
smooth = np.log((counts + 0.1) / (counts + 0.1).sum(axis=1, keepdims=True))
counted = -smooth[held_out[0][:, 2], held_out[1]].mean()
print(f"held-out loss: {low:.3f} by three letters, {counted:.3f} by counted pairs")
print(f"by chance {guess_all:.3f}")
assert result.success
assert low < counted - 0.1

predict = jax.jit(lambda before: jax.nn.softmax(logits(result.params, before)))
invented = []
while len(invented) < 12:
    word = "..."
    while len(word) < 16 and (len(word) == 3 or word[-1] != "."):
        chances = np.asarray(
            predict(np.array([[letters.index(c) for c in word[-3:]]])), float
        )[0]
        word += letters[draws.choice(27, p=chances / chances.sum())]
    invented.append(word.strip("."))
print("invented:", ", ".join(invented))

# %%
# The losses by epoch, with the marks of simpler models.

figure, axes = plt.subplots(layout="constrained")
validation = result.history.validation_loss
means = (
    result.history.loss[: len(validation) * result.steps_per_epoch]
    .reshape(len(validation), -1)
    .mean(axis=1)
)
axes.plot(1 + np.arange(len(validation)), means, label="three letters, training")
axes.plot(1 + np.arange(len(validation)), validation, label="three letters, held out")
for mark, name, style in (
    (guess_all, "chance", ":"),
    (counted, "counted pairs, held out", "--"),
):
    axes.axhline(mark, color="black", linestyle=style, linewidth=0.8, label=name)
axes.set(
    xlabel="epoch",
    ylabel="mean loss of a letter",
    title="Invented: " + ", ".join(invented[:4]),
)
axes.legend()
plt.show()
