"""The documentation shows what happens: README.md and docs/*.md block by block, and each example."""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import itertools
import re
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

import gdopt

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

FENCE = re.compile(
    r"^(?P<indent>[ ]*)(?P<fence>`{3,})(?P<language>\w*)(?: needs=(?P<needs>\w+))?[^`\n]*\n"
    r"(?P<body>.*?)^(?P=indent)(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    code: str
    line: int  # of the first line of code, from 1
    output: str | None  # the ```text block that directly follows
    needs: str | None  # the library that is compared with gdopt: ```python needs=jaxopt


def python_blocks(text: str) -> Iterator[Block]:
    fences = list(FENCE.finditer(text))
    for fence, following in itertools.zip_longest(fences, fences[1:]):
        if fence["language"] != "python":
            continue
        output = None
        if following and following["language"] == "text" and not text[fence.end() : following.start()].strip():
            output = textwrap.dedent(following["body"])
        yield Block(
            textwrap.dedent(fence["body"]), text.count("\n", 0, fence.start("body")) + 1, output, fence["needs"]
        )


def same_output(want: str, got: str) -> bool:
    """Compare up to trailing whitespace; ``...`` stands for anything."""
    want, got = ("\n".join(line.rstrip() for line in text.rstrip().splitlines()) + "\n" for text in (want, got))
    return doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS | doctest.DONT_ACCEPT_BLANKLINE)


def run_page(path: Path, namespace: dict[str, object]) -> None:
    for block in python_blocks(path.read_text(encoding="utf-8")):
        if block.needs and not importlib.util.find_spec(block.needs):
            continue
        # The empty lines in front give tracebacks the line numbers of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            exec(code, namespace)
        if block.output is not None and not same_output(block.output, stdout.getvalue()):
            pytest.fail(
                f"{path.name}:{block.line} prints\n\n{stdout.getvalue()}\nand the page says\n\n{block.output}",
                pytrace=False,
            )


@pytest.mark.parametrize("page", [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES])
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # dataclasses look their module up
    x64 = jax.config.read("jax_enable_x64")
    try:
        run_page(page, vars(module))
    finally:
        jax.config.update("jax_enable_x64", x64)


# Each takes ten seconds or more. The blocks of README.md make the calls of these, too; the modules are in
# test_modules.py.
SLOW = {"automatic.py", "equinox_module.py", "finder.py", "flax_nnx.py", "plugins.py", "valley.py", "walls.py"}


@pytest.mark.parametrize(
    "example", [pytest.param(e, id=e.name, marks=[pytest.mark.slow] if e.name in SLOW else []) for e in EXAMPLES]
)
def test_example(example: Path, tmp_path: Path) -> None:
    started = time.time()
    run = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    pictures = [tmp_path / name for name in re.findall(r"\S+\.(?:png|gif)\b", run.stdout)]
    for kind in {*re.findall(r"\.(?:png|gif)\b", example.read_text(encoding="utf-8"))}:
        assert [picture for picture in pictures if picture.suffix == kind], f"it names no {kind}:\n{run.stdout}"
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG" if picture.suffix == ".png" else b"GIF89a"), picture
        assert picture.stat().st_size < 2e6, f"{picture} is too large for a page"
        assert picture.stat().st_mtime >= started - 2, f"{picture} is an old one"  # some clocks are coarse


def test_the_reference_lists_every_public_name() -> None:
    listed = re.findall(r"^   ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    modules = {
        name: getattr(gdopt, name) for name in gdopt.__all__ if isinstance(getattr(gdopt, name), types.ModuleType)
    }
    public = {name for name in gdopt.__all__ if name not in modules}
    public |= {f"{name}.{inner}" for name, module in modules.items() for inner in module.__all__}
    assert sorted(listed) == sorted(public)


PAGE = """
```python
x = [1, 2]
print(*x)
```

```text
1 2
```

  ```python
  print(x, 0.125,
        id(x))
  ```
  ```text
  [1, 2] 0.125 ...
  ```

```python
print("not compared")
```
A sentence.
```text
something else
```
"""


def test_blocks_are_found() -> None:
    blocks = list(python_blocks(PAGE))
    assert [block.line for block in blocks] == [3, 12, 20]
    assert [block.output for block in blocks] == ["1 2\n", "[1, 2] 0.125 ...\n", None]


def test_a_block_that_needs_a_library_that_is_missing_does_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python needs=json\nx = 1\n```\n\n```python needs=no_such_library\nx = 2\n```\n\n```text\n3\n```\n"
    )
    namespace: dict[str, object] = {}
    run_page(page, namespace)
    assert namespace["x"] == 1
    assert [block.needs for block in python_blocks(page.read_text())] == ["json", "no_such_library"]


def test_a_page_without_code_has_no_blocks() -> None:
    assert list(python_blocks("# Title\n\nWords, and `code` within a line.\n")) == []


def test_a_correct_page_passes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    run_page(page, {})


@pytest.mark.parametrize(("old", "new"), [("\n1 2", "\n1 3"), ("0.125 ...", "0.5 ..."), ("\n1 2", "\n1 2\n3")])
def test_a_wrong_page_fails(old: str, new: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace(old, new))
    with pytest.raises(pytest.fail.Exception, match="and the page says"):
        run_page(page, {})
