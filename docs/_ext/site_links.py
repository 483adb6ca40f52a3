"""The links of the finished site: each one that stays inside leads to a file, and to an anchor in it.

Each picture has an alternative text, too.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata


class Page(HTMLParser):
    """The anchors and the links of a page, and its pictures without a text."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = {"", "top"}
        self.links: set[str] = set()
        self.without_text: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img" and "alt" not in dict(attrs):
            self.without_text.add(dict(attrs).get("src") or "")
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.add(value)


def faults(site: Path) -> list[str]:
    """Return a sentence for each dead link, and for each picture without an alternative text."""
    files = [path for path in sorted(site.rglob("*.html")) if not path.name.endswith("macros.html")]  # of the theme
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in files}
    found: list[str] = []
    for path, page in pages.items():
        here = path.relative_to(site)
        found += [f"{here}: the picture {name} has no alternative text" for name in sorted(page.without_text)]
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                found.append(f"{here}: {link} leads to no file")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{here}: {link} leads to no anchor")
    return found


def check(app: Sphinx, exception: Exception | None) -> None:
    from sphinx.util import logging

    logger = logging.getLogger(__name__)
    if exception is None and app.builder.format == "html":
        for fault in faults(app.outdir.resolve()):
            logger.warning(fault)


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
