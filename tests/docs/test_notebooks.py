"""The notebooks: what git holds is what their sources say, and they run from the first cell to the last."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from docs_build import DOCS, ROOT, load_script

SOURCES = sorted((DOCS / "notebooks").glob("*.py"))


@pytest.fixture(scope="module")
def notebooks() -> ModuleType:
    return load_script("notebooks")


def read_cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_what_its_source_says(source: Path, notebooks: ModuleType) -> None:
    held = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(held)
    remedy = f"it is old: python docs/build/notebooks.py --execute {source.stem}"
    assert read_cells(held) == read_cells(notebooks.read_source(source)), remedy
    assert all(cell.execution_count for cell in held.cells if cell.cell_type == "code"), remedy


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_installation(source: Path, notebooks: ModuleType) -> None:
    first = next(cell.source for cell in notebooks.read_source(source).cells if cell.cell_type == "code")
    assert first.startswith("REPOSITORY = ")
    assert "pip" in first


def test_a_page_shows_text_code_and_outputs(notebooks: ModuleType) -> None:
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("1 + 1")]
    cells[1].outputs = [
        nbformat.v4.new_output("stream", text="two\n"),
        nbformat.v4.new_output("display_data", {"image/png": "aGVsbG8="}),
    ]
    page, images = notebooks.format_page(nbformat.v4.new_notebook(cells=cells), "sum")
    assert page.startswith("# Title\n\n[Download this notebook](sum.ipynb)")
    assert "```python\n1 + 1\n```\n\n```text\ntwo\n```\n\n![The output of this cell](sum-1.png)\n" in page
    assert images == {"sum-1.png": b"hello"}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs(source: Path, notebooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = notebooks.execute(notebooks.read_source(source), tmp_path)
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "stop at step" in text or "octaves from the oracle" in text


@pytest.mark.slow
def test_a_notebook_with_a_fault_fails(notebooks: ModuleType, tmp_path: Path) -> None:
    from nbclient.exceptions import CellExecutionError

    source = tmp_path / "fault.py"
    header = SOURCES[0].read_text(encoding="utf-8").partition("# %%")[0]
    source.write_text(f"{header}# %%\n1 / 0\n", encoding="utf-8")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.execute(notebooks.read_source(source), tmp_path)
