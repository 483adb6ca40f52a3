"""Names in docstrings and type hints: which page they lead to.

No inventory of another project is read, so the site builds without a network. The few types of other packages that
public signatures use are listed here.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from docutils import nodes
from docutils.nodes import Element, TextElement
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.typing import ExtensionMetadata

PYTHON = "https://docs.python.org/3/library/"
JAX = "https://docs.jax.dev/en/latest/"
NUMPY = "https://numpy.org/doc/stable/reference/"
OPTAX = "https://optax.readthedocs.io/en/latest/"
MATPLOTLIB = "https://matplotlib.org/stable/api/"
ELSEWHERE = {
    "Any": PYTHON + "typing.html#typing.Any",
    "Literal": PYTHON + "typing.html#typing.Literal",
    "NamedTuple": PYTHON + "typing.html#typing.NamedTuple",
    "Callable": PYTHON + "collections.abc.html#collections.abc.Callable",
    "Mapping": PYTHON + "collections.abc.html#collections.abc.Mapping",
    "Sequence": PYTHON + "collections.abc.html#collections.abc.Sequence",
    "IntEnum": PYTHON + "enum.html#enum.IntEnum",
    "PathLike": PYTHON + "os.html#os.PathLike",
    "Exception": PYTHON + "exceptions.html#Exception",
    "RuntimeError": PYTHON + "exceptions.html#RuntimeError",
    "ValueError": PYTHON + "exceptions.html#ValueError",
    "None": PYTHON + "constants.html#None",
    "True": PYTHON + "constants.html#True",
    "False": PYTHON + "constants.html#False",
    "Array": JAX + "_autosummary/jax.Array.html",
    "Mesh": JAX + "jax.sharding.html#jax.sharding.Mesh",
    "ndarray": NUMPY + "generated/numpy.ndarray.html",
    **dict.fromkeys(("GradientTransformation", "GradientTransformationExtraArgs"), OPTAX + "api/transformations.html"),
    "Axes": MATPLOTLIB + "_as_gen/matplotlib.axes.Axes.html",
    "Figure": MATPLOTLIB + "_as_gen/matplotlib.figure.Figure.html",
    **{name: PYTHON + f"stdtypes.html#{name}" for name in ("dict", "list", "str", "tuple")},
    **{name: PYTHON + f"functions.html#{name}" for name in ("bool", "complex", "float", "int", "object", "slice")},
}
ALIASES = ("Loss", "Optimizer", "PyTree", "Scalar", "Schedule")


def keep_aliases() -> None:
    """Let signatures show the aliases of gdopt._types by their names. docs/reference.md explains them.

    Annotations are strings in the source, so only the documentation evaluates them. (``autodoc_type_aliases`` would
    do the same, but not in unions.)
    """
    stands = {name: type(name, (), {"__module__": "gdopt"}) for name in ALIASES}
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "gdopt"]:
        for name in ALIASES:
            if name in vars(module):
                setattr(module, name, stands[name])


def elsewhere(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: TextElement) -> Element | None:
    """Lead to a public name of another module of gdopt, or to the documentation of another package."""
    if node.get("refdomain") != "py":
        return None
    domain: Any = env.get_domain("py")
    for module in ("gdopt", "gdopt.plot", "gdopt.prox", "gdopt.schedules"):
        full = f"{module}.{node['reftarget']}"
        if full in domain.objects:
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", full, node, text)
    link = ELSEWHERE.get(node["reftarget"].rpartition(".")[2])
    return link and nodes.reference("", "", text, internal=False, refuri=link)


def skip_field(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of tuples, which the text of the class explains."""
    return True if type(value).__name__ == "_tuplegetter" else None


def shorten(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None] | None:
    """Leave private fields out of the signature of a class, and the whole of one that only gdopt makes."""
    if name == "gdopt.Prepared":
        return "", None
    return signature and re.sub(r", _\w+: [^,)]+", "", signature), returned


def setup(app: Sphinx) -> ExtensionMetadata:
    keep_aliases()
    app.connect("missing-reference", elsewhere)
    app.connect("autodoc-skip-member", skip_field)
    app.connect("autodoc-process-signature", shorten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
