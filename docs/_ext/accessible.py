"""Repairs of the finished pages for readers with a keyboard or a screen reader, which the theme has no option for.

`make test-site` checks pages by axe-core. These are its findings that no style sheet can mend.
"""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata

TAG = re.compile(r"<[^>]+>")
# The arrow behind a page of the sidebar, which has no text of its own.
ARROW = re.compile(r'(<a class="[^"]*reference internal" href="[^"]*">)((?:(?!</a>).)*)(</a><details[^>]*><summary)>')
# The button for searching says "Search Ctrl+K", and its label hides the second half.
SEARCH = re.compile(r'(<button class="btn search-button-field[^>]*?) aria-label="Search"')
# The logo stands outside of all landmarks.
LOGO = re.compile(r'(<div class="sidebar-primary-item")(>\s*<a class="navbar-brand logo")')
# Sphinx writes a signature of several lines as a list of definitions without terms.
SIGNATURE = re.compile(r'<dt class="sig .*?</dt>', re.DOTALL)
# Tables whose rows have names leave the corner above them empty.
CORNER = re.compile(r'<th class="head([^"]*)"><p></p></th>')
LISTS = {"<dl>": '<div class="sig-lines">', "</dl>": "</div>", "<dd>": "<div>", "</dd>": "</div>"}


def repaired(page: str) -> str:
    """Return a page with the repairs; a page that has them stays the same."""

    def named(arrow: re.Match[str]) -> str:
        title = html.escape(html.unescape(TAG.sub("", arrow[2])).strip())
        return f'{arrow[1]}{arrow[2]}{arrow[3]} aria-label="Pages below {title}">'

    def lines(signature: re.Match[str]) -> str:
        return re.sub("|".join(LISTS), lambda tag: LISTS[tag[0]], signature[0])

    page = CORNER.sub(r'<td class="head\1"></td>', SIGNATURE.sub(lines, ARROW.sub(named, page)))
    return LOGO.sub(r'\1 role="navigation" aria-label="Home"\2', SEARCH.sub(r"\1", page))


def repair(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        for path in app.outdir.rglob("*.html"):
            page = path.read_text(encoding="utf-8")
            if (better := repaired(page)) != page:
                path.write_text(better, encoding="utf-8")


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("build-finished", repair)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
