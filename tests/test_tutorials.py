"""The tutorial notebooks are committed without outputs, run to their end, and show their pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "docs" / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in NOTEBOOKS])


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@each
def test_it_is_clean(path: Path) -> None:
    cells = code_cells(json.loads(path.read_text(encoding="utf-8")))
    assert cells
    assert [cell["outputs"] for cell in cells] == [[] for _ in cells]
    assert [cell["execution_count"] for cell in cells] == [None for _ in cells]


@each
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jupyter's own packages
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel takes the one of notebooks
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    texts = [output for output in outputs if output["output_type"] == "stream"]
    assert not [text["text"] for text in texts if text["name"] == "stderr"]
    assert texts
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
