"""The documentation site in a real browser. `make test-site` builds it and runs this; other runs leave it out.

The site is served from this machine, and the interactive page is opened as a file as well. Pictures of pages go to
build/site, to be looked at.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import importlib
import importlib.util
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "docs" / "html"
PICTURES = ROOT / "build" / "site"
AXE = PICTURES / "node_modules" / "axe-core" / "axe.min.js"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAGES = ["index", "start", "reading", "coming_from/scipy", "api/gdopt.minimize", "reference", "interactive"]
PAGES += ["auto_gallery/index", "auto_gallery/plot_21_valley", "notebooks/first_descent", "results", "search"]
# What of axe-core's rules counts: all of WCAG 2.2, levels A and AA, and the rules that it calls best practice.
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]

NewPage = Callable[..., Any]


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of the built site, served from this machine."""
    assert (SITE / "index.html").exists(), "There is no site. Run `make test-site`, or `make docs` first."
    with Server(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"Chromium is missing: none of {BROWSERS} was found. Install it, or set CHROMIUM to its path."
    with importlib.import_module("playwright.sync_api").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser: Any, address: str) -> Iterator[NewPage]:
    """Open pages; at the end, none of them may have reported an error, or asked for anything from elsewhere."""
    faults: list[str] = []
    with contextlib.ExitStack() as stack:

        def opened(name: str, *, as_file: bool = False, **options: Any) -> Any:
            context = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}} | options)
            stack.callback(context.close)
            page = context.new_page()
            here = f"{SITE.as_uri()}/" if as_file else address
            page.on("console", lambda message: message.type in ("error", "warning") and faults.append(message.text))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("request", lambda request: request.url.startswith((here, "data:")) or faults.append(request.url))
            page.on("response", lambda response: response.status < 400 or faults.append(f"no {response.url}"))
            page.goto(f"{here}{name}.html")
            return page

        yield opened
    assert not faults


@functools.cache
def runs() -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("interactive", ROOT / "docs" / "_ext" / "interactive.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.read(SITE / "_static" / "interactive" / "runs.js")


def pixels(page: Any, picture: str, axis: str) -> Callable[[float], float]:
    """Return where a picture has a value, by the numbers at its axis."""
    ticks = page.locator(f"#{picture} .gd-{axis}")
    low, high = (
        (float(tick.get_attribute("data-value")), float(tick.get_attribute(axis)) - (4 if axis == "y" else 0))
        for tick in (ticks.first, ticks.last)
    )
    return lambda value: low[1] + (value - low[0]) / (high[0] - low[0]) * (high[1] - low[1])


def ball(page: Any, picture: str, kind: str) -> dict[str, Any]:
    found = page.locator(f"#{picture} .gd-ball.gd-{kind}")
    names = {"x": "data-x", "y": "data-y", "left": "cx", "top": "cy"}
    numbers = {name: float(found.get_attribute(attribute)) for name, attribute in names.items()}
    return numbers | {"outside": "gd-outside" in found.get_attribute("class")}


def heading(page: Any) -> str:
    """Return the title of a page, without the sign of its link."""
    return page.locator("article h1").inner_text().strip(" #\n")


def set_slider(page: Any, slider: str, value: int) -> None:
    """Move a slider as a reader with a keyboard does."""
    page.locator(slider).focus()
    page.keyboard.press("Home")
    for _ in range(value):
        page.keyboard.press("ArrowRight")


@pytest.mark.parametrize("as_file", [False, True], ids=["served", "file"])
def test_the_slider_moves_the_balls_to_the_points_of_the_runs(new_page: NewPage, as_file: bool) -> None:
    page = new_page("interactive", as_file=as_file)
    set_slider(page, "#gd-step", 7)
    seen = set()
    for index in (0, 5, 15, 24, 31, 39):
        set_slider(page, "#gd-rate", index)
        assert page.locator("#gd-rate-value").inner_text() == str(runs()["rates"][index])
        one, two = runs()["one"][index], runs()["two"][index]
        step = min(7, len(one["points"]) - 1)
        valley, contour = ball(page, "gd-valley", "one"), ball(page, "gd-contour", "two")
        assert (valley["x"], valley["y"]) == (one["points"][step], one["losses"][step])
        assert [contour["x"], contour["y"]] == two["points"][7]
        for shown, picture in ((valley, "gd-valley"), (contour, "gd-contour")):
            if not shown["outside"]:
                assert shown["left"] == pytest.approx(pixels(page, picture, "x")(shown["x"]), abs=0.1)
                assert shown["top"] == pytest.approx(pixels(page, picture, "y")(shown["y"]), abs=0.1)
        low, high = runs()["slopes"]
        assert valley["outside"] == (not low <= valley["x"] <= high or valley["y"] > runs()["losses"][1])
        seen.add(valley["left"])
        curve = ball(page, "gd-curve", "one")
        assert (curve["x"], curve["y"]) == (step, one["losses"][step])
        assert not curve["outside"]
    assert len(seen) == 6


def test_captions_say_how_each_run_ended(new_page: NewPage) -> None:
    page = new_page("interactive")
    set_slider(page, "#gd-rate", 0)
    for index, rate in enumerate(runs()["rates"]):
        one, two = runs()["one"][index], runs()["two"][index]
        says = f"Learning rate {rate}. One weight: {one['words']}. Two weights: {two['words']}."
        assert page.locator("#gd-caption").inner_text() == says
        assert page.locator("#gd-one").inner_text() == f"{one['status']}: {one['message']}"
        assert page.locator("#gd-two").inner_text() == f"{two['status']}: {two['message']}"
        assert page.locator("#gd-rate").get_attribute("aria-valuetext") == str(rate)
        page.keyboard.press("ArrowRight")
    words = " ".join(run["words"] for run in runs()["one"])
    assert all(word in words for word in ("converges", "overshoots", "diverges"))


def test_play_pause_step_and_back(new_page: NewPage) -> None:
    page = new_page("interactive")
    page.clock.install()
    page.reload()
    value = lambda: int(page.locator("#gd-step").input_value())
    page.get_by_role("button", name="To the start").click()
    assert value() == 0
    page.get_by_role("button", name="One step").click()
    assert value() == 1
    page.get_by_role("button", name="Play").click()
    page.clock.run_for(1000)
    page.get_by_role("button", name="Pause").click()
    paused = value()
    assert 1 < paused < 42
    page.clock.run_for(1000)
    assert value() == paused
    page.get_by_role("button", name="Play").click()
    page.clock.run_for(20_000)
    last = len(runs()["two"][24]["points"]) - 1
    assert value() == last
    assert page.locator("#gd-step-value").inner_text() == f"{last} of {last}"
    shown = ball(page, "gd-contour", "two")
    assert [shown["x"], shown["y"]] == runs()["two"][24]["points"][-1]
    assert page.get_by_role("button", name="Play").is_visible()


def test_nothing_moves_for_those_who_ask_for_less_motion(new_page: NewPage) -> None:
    page = new_page("interactive", reduced_motion="reduce")
    page.clock.install()
    page.reload()
    page.get_by_role("button", name="To the end").click()
    assert page.locator("#gd-step").input_value() == page.locator("#gd-step").get_attribute("max")


def test_without_scripts_the_page_says_what_is_missing(new_page: NewPage) -> None:
    page = new_page("interactive", java_script_enabled=False)
    assert page.get_by_text("needs JavaScript").is_visible()
    assert not page.locator("#gd-rate").is_visible()


def test_fingers_move_the_slider(new_page: NewPage) -> None:
    options = {"has_touch": True, "is_mobile": True, "viewport": {"width": 390, "height": 844}}
    page = new_page("interactive", **options)
    for part, low, high in ((0.02, 0, 2), (0.98, 37, 39)):
        box = page.locator("#gd-rate").bounding_box()
        page.touchscreen.tap(box["x"] + part * box["width"], box["y"] + box["height"] / 2)
        assert low <= int(page.locator("#gd-rate").input_value()) <= high
    page.locator("#gd-next").tap()
    assert page.locator("#gd-step").input_value() == "6"
    for control in page.locator("#gd-descent :is(input, button)").all():
        assert control.bounding_box()["height"] >= 44
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "the page is too wide"


def test_the_keyboard_reaches_all_controls_and_shows_where_it_is(new_page: NewPage) -> None:
    page = new_page("interactive")
    page.locator("#gd-rate").focus()
    for expected in ("gd-rate", "gd-step", "gd-play", "gd-next", "gd-back"):
        # The first one is reached by Tab, too, because a script's focus may not show.
        if expected == "gd-rate":
            page.keyboard.press("Shift+Tab")
        page.keyboard.press("Tab")
        found = page.evaluate(
            "(() => { const e = document.activeElement, s = getComputedStyle(e);"
            " return [e.id, s.outlineStyle, parseFloat(s.outlineWidth)]; })()"
        )
        assert found == [expected, "solid", 3]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_to_look_at(new_page: NewPage, scheme: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page = new_page("interactive", color_scheme=scheme)
    for index, name in ((4, "converges"), (24, "overshoots"), (36, "diverges")):
        set_slider(page, "#gd-rate", index)
        file = PICTURES / f"interactive_{name}_{scheme}.png"
        page.locator("#gd-descent").screenshot(path=file, animations="disabled")
    for name in ("index", "auto_gallery/plot_21_valley"):
        page = new_page(name, color_scheme=scheme)
        page.screenshot(path=PICTURES / f"{name.rpartition('/')[2]}_{scheme}.png", animations="disabled")
    assert len([*PICTURES.glob(f"*_{scheme}.png")]) == 5


def test_each_link_of_the_sidebar_leads_to_its_page(new_page: NewPage) -> None:
    page = new_page("index")
    links = page.locator("nav.bd-links a.reference.internal:visible")
    names = [name.strip() for name in links.all_inner_texts()]
    assert len(names) > 20
    assert "Move the learning rate" in names
    for name in names:
        page.locator("nav.bd-links").get_by_role("link", name=name, exact=True).first.click()
        page.wait_for_load_state()
        active = page.locator("nav.bd-links .current.active > a").last
        assert active.inner_text().strip() == name
        assert heading(page)
        page.locator(".navbar-brand.logo:visible").first.click()  # leads back
        page.wait_for_load_state()
        assert heading(page) == "gdopt"


def test_next_and_previous_lead_through_the_pages(new_page: NewPage) -> None:
    page = new_page("index")
    for direction in (".right-next", ".right-next", ".left-prev"):
        link = page.locator(direction)
        title = link.locator(".prev-next-title").inner_text()
        link.click()
        page.wait_for_load_state()
        assert heading(page) == title


SEARCHES = {"patience": "batches", "lr_find": "api/gdopt.lr_find", "overshoot": "interactive"}


@pytest.mark.parametrize(("words", "name"), SEARCHES.items())
def test_search_finds_pages(new_page: NewPage, words: str, name: str) -> None:
    page = new_page("index")
    page.keyboard.press("Control+k")
    page.keyboard.type(words)
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results ul.search li a")
    page.wait_for_function("document.querySelector('.search-summary').textContent.includes('found')")
    page.locator(f"#search-results li a[href*='{name}.html']").first.click()
    page.wait_for_load_state()
    assert f"/{name}.html" in page.url
    assert words in page.locator("article").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_accessible(new_page: NewPage, name: str, scheme: str) -> None:
    page = new_page(name, color_scheme=scheme, reduced_motion="reduce")
    page.wait_for_function("document.getAnimations().length === 0")  # colours in transition have no contrast
    page.add_script_tag(content=AXE.read_text(encoding="utf-8"))
    found = page.evaluate("tags => axe.run(document, {runOnly: tags})", TAGS)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    violations = [
        f"{violation['id']}: {violation['help']}\n  {node['html'][:200]}\n  {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]
    assert not violations, "\n".join(violations)


def test_the_check_of_accessibility_finds_faults(new_page: NewPage) -> None:
    page = new_page("interactive")
    page.add_script_tag(content=AXE.read_text(encoding="utf-8"))
    page.evaluate("document.querySelector('label[for=gd-rate]').remove()")
    page.evaluate("document.querySelector('#gd-caption').style.color = '#999'")
    found = page.evaluate("tags => axe.run(document, {runOnly: tags})", TAGS)
    assert {violation["id"] for violation in found["violations"]} >= {"label", "color-contrast"}
