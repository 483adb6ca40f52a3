"""The helpers of the documentation's build, which need no Sphinx. `make docs` runs them on the whole site."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def extension(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "_ext" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("folder", "link", "on_the_site"),
    [
        ("docs", "start.md", "start.md"),
        ("docs", "reading.md#ctrl-c", "reading.md#ctrl-c"),
        ("docs", "../examples/digits.py", "https://github.com/gdopt/gdopt/blob/main/examples/digits.py"),
        ("docs/coming_from", "../finder.md", "../finder.md"),
        ("docs", "../CONTRIBUTING.md#make-a-change", "contributing.md#make-a-change"),
        (".", "docs/finder.md", "finder.md"),
        ("benchmarks", "README.md", "https://github.com/gdopt/gdopt/blob/main/benchmarks/README.md"),
        ("docs", "https://example.org/start.md", "https://example.org/start.md"),
        ("docs", "no_such_page.md", "no_such_page.md"),  # MyST warns
    ],
)
def test_links_of_the_repository_hold_on_the_site(folder: str, link: str, on_the_site: str) -> None:
    text = extension("repository_links").absolute(f"See [this]({link}), and ![that](that.png).", ROOT / folder)
    assert text == f"See [this]({on_the_site}), and ![that](that.png)."


def test_dead_links_and_pictures_without_a_text_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h1 id="top">A</h1><a href="b.html#here">b</a> <img src="c.svg" alt="c">')
    (tmp_path / "b.html").write_text(
        '<h1 id="here">B</h1><a href="a.html#gone">a</a><a href="https://example.org">e</a>'
    )
    (tmp_path / "c.svg").write_text("<svg/>")
    assert extension("site_links").faults(tmp_path) == ["b.html: a.html#gone leads to no anchor"]
    (tmp_path / "d.html").write_text('<a href="e.html">e</a><img src="c.svg">')
    assert extension("site_links").faults(tmp_path)[1:] == [
        "d.html: the picture c.svg has no alternative text",
        "d.html: e.html leads to no file",
    ]
