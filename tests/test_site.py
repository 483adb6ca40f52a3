"""The helpers of the documentation's build, which need no Sphinx. `make docs` runs them on the whole site."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import gdopt

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


# What axe-core found, as the theme and Sphinx write it.
FAULTY = """<a class="navbar-brand logo" href="#">
<div class="sidebar-primary-item">

<a class="navbar-brand logo" href="#"><p>gdopt</p></a></div>
<button class="btn search-button-field" title="Search" aria-label="Search"><span>Search</span> Ctrl+K</button>
<li><a class="reference internal" href="a.html">A</a></li>
<li><a class="current reference internal" href="b.html"><code>B</code> &amp; C</a><details><summary><i></i></summary>
<dl class="py function"><dt class="sig sig-object py" id="f">f(<dl>
<dd><em>x</em>,</dd>
</dl>
)</dt><dd>Text.</dd></dl>
<tr><th class="head"><p></p></th><th class="head"><p>loss</p></th></tr>
"""


def test_pages_are_repaired_once() -> None:
    repaired = extension("accessible").repaired
    page = repaired(FAULTY)
    assert '<div class="sidebar-primary-item" role="navigation" aria-label="Home">' in page
    assert '<button class="btn search-button-field" title="Search"><span>' in page
    assert '<summary aria-label="Pages below B &amp; C"><i>' in page
    assert 'f(<div class="sig-lines">\n<div><em>x</em>,</div>\n</div>\n)</dt><dd>Text.</dd></dl>' in page
    assert '<tr><td class="head"></td><th class="head"><p>loss</p></th></tr>' in page
    assert len(re.findall("aria-label", page)) == 2
    assert repaired(page) == page


interactive = functools.cache(lambda: extension("interactive"))
interactive_runs = functools.cache(lambda: interactive().runs())


def test_the_interactive_page_counts_jumps_as_the_picture_of_a_valley_does() -> None:
    module = interactive()
    rates = [0.004, 0.06, 0.064, 0.1, 0.12, 0.132]
    results = {str(rate): module.run(module.one_weight, module.START[0], rate) for rate in rates}
    figure = gdopt.plot.valley(module.one_weight, results, args=(module.X, module.Y))
    for text, rate in zip(figure.axes[0].get_legend().get_texts(), rates, strict=True):
        run = interactive_runs()["one"][module.RATES.index(rate)]
        assert run["status"] in text.get_text()
        assert re.findall(r"overshoots \d+ times?", text.get_text()) == re.findall(
            r"overshoots \d+ times?", run["words"]
        )


def test_the_interactive_page_tells_the_truth() -> None:
    """The table below the picture, and the losses of its points."""
    module, page = interactive(), (ROOT / "docs" / "interactive.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (up to|from)? ?([\d.]+)(?: (?:to|and) ([\d.]+))? \|", page, re.MULTILINE)
    slow, good, jumping, endless, failing = (
        [
            index
            for index, rate in enumerate(module.RATES)
            if (word == "up to" or rate >= float(low)) and (word == "from" or rate <= float(high or low))
        ]
        for word, low, high in table
    )
    assert sorted(slow + good + jumping + endless + failing) == [*range(40)]
    runs = interactive_runs()

    def words(kind: str, indices: list[int]) -> set[str]:
        return {re.sub(r"\d+ times?", "N times", runs[kind][index]["words"]) for index in indices}

    for kind in ("one", "two"):
        assert words(kind, good) == {"converges"}
        assert words(kind, jumping) == {"overshoots N times, then converges"}
        assert words(kind, failing) == {"diverges"}
        assert {runs[kind][index]["status"] for index in endless} == {"MAX_STEPS"}
        assert {runs[kind][index]["status"] for index in failing} == {"DIVERGED"}
    assert np.all(np.diff([len(runs["one"][index]["losses"]) for index in good]) < 0)
    assert words("one", slow) == {"converges"}
    assert words("two", slow) == {"too slow: more steps are needed"}
    for index in (0, 24, 39):
        slope = runs["one"][index]["points"][-1]
        assert module.one_weight(slope, module.X, module.Y) == pytest.approx(runs["one"][index]["losses"][-1], rel=1e-3)


def test_runs_of_the_interactive_page_are_small_and_can_be_read(tmp_path: Path) -> None:
    module = interactive()
    file = tmp_path / "runs.js"
    file.write_text(module.BEGIN + json.dumps(interactive_runs()) + module.END)
    assert file.stat().st_size < 400_000
    assert np.shape(module.read(file)["one"][3]["points"])[0] == len(module.read(file)["one"][3]["losses"])
