"""Links from pages to files of the repository that are no pages.

Pages are read on GitHub, too. So they link to sources and to results by relative paths, which this extension makes
absolute for the site. It does the same for README.md, CONTRIBUTING.md and CHANGELOG.md, which pages include.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
BLOB = "https://github.com/gdopt/gdopt/blob/main/"
LINK = re.compile(r"(?<!!)(\[[^\]]*\]\()(?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
# The files of the root that pages include, and those pages.
INCLUDED = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "benchmarks/RESULTS.md": "results.md"}


def absolute(text: str, folder: Path) -> str:
    """Return the text of a file in a folder with links that hold on the site."""

    def replaced(link: re.Match[str]) -> str:
        path = (folder / link[2]).resolve()
        if not path.exists() or (path.is_relative_to(DOCS) and folder.is_relative_to(DOCS)):
            return link[0]  # A page; if it does not exist, MyST says so.
        name, anchor = path.relative_to(ROOT).as_posix(), link[3] or ""
        if path.is_relative_to(DOCS):
            return f"{link[1]}{path.relative_to(DOCS).as_posix()}{anchor})"
        return f"{link[1]}{INCLUDED.get(name) or BLOB + name}{anchor})"

    return LINK.sub(replaced, text)


def on_page(app: Sphinx, docname: str, content: list[str]) -> None:
    if Path(app.env.doc2path(docname)).suffix == ".md":
        content[0] = absolute(content[0], Path(app.env.doc2path(docname)).resolve().parent)


def on_include(app: Sphinx, path: Path, docname: str, content: list[str]) -> None:
    content[0] = absolute(content[0], (app.srcdir / path).resolve().parent)


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("source-read", on_page)
    app.connect("include-read", on_include)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
