"""
Logistic regression
===================

Tell benign from malignant tumours by 30 measurements of a cell image, with a ridge
penalty. The answer is that of scikit-learn.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import gdopt

# %%
# A quarter of the 569 patients is held out. Columns are standardised with the numbers
# of the training rows.

features, benign = load_breast_cancer(return_X_y=True)
X, X_test, y, y_test = train_test_split(
    features, benign, test_size=0.25, stratify=benign, random_state=0
)
scaler = StandardScaler().fit(X)
X, X_test = (scaler.transform(rows).astype(np.float32) for rows in (X, X_test))

# %%
# The loss is written with ``softplus``, which overflows for no logit. scikit-learn's
# ``C=1`` means a penalty of half the squared weights beside the sum over the rows. The
# offset is not penalised.


def loss(params, X, y):
    logits = X @ params["weights"] + params["offset"]
    losses = jax.nn.softplus(logits) - y * logits
    return jnp.mean(losses) + 0.5 * jnp.sum(params["weights"] ** 2) / len(y)


start = {"weights": jnp.zeros(30), "offset": 0.0}
result = gdopt.minimize(loss, start, args=(X, y.astype(np.float32)))
print(result.message)

# %%
# ``result.status`` is CONVERGED, which means that a Newton step from here would gain at
# most ``tol`` (1e-4) of what the second half of the run has gained. For the last digits
# of the weights pass a smaller ``tol``.

model = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(X, y)
logits = X_test @ np.asarray(result.params["weights"]) + float(result.params["offset"])
accuracy = np.mean((logits > 0) == y_test)
largest = np.abs(result.params["weights"] - model.coef_[0]).max()
print(f"accuracy {accuracy:.3f}, scikit-learn {model.score(X_test, y_test):.3f}")
print(f"weights differ by at most {largest:.3f}")
assert result.success
assert accuracy > 0.93
assert largest < 0.1

# %%
# The weights of both, and the logits of the held-out patients: zero is the border
# between the answers.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.plot(model.coef_[0], result.params["weights"], "o")
left.axline((0, 0), slope=1, color="silver", zorder=0)
left.set(xlabel="weight, scikit-learn", ylabel="weight, gdopt", title="Thirty weights")
right.hist(
    [logits[y_test == 0], logits[y_test == 1]],
    bins=30,
    stacked=True,
    label=["malignant", "benign"],
)
right.axvline(0, color="black", linewidth=0.8)
right.set(
    xlabel="logit", ylabel="patients", title=f"Held out: {accuracy:.1%} are right"
)
right.legend()
plt.show()
