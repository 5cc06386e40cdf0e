"""The notebooks: ``python docs/build/notebooks.py`` writes their pages; ``--execute NAME …`` runs some first."""

# A notebook is written as docs/notebooks/NAME.py in the percent format of jupytext. NAME.ipynb beside it is the same
# notebook after it has run, for Jupyter, Colab and GitHub; git holds both. The page NAME.md and its images come from
# there and are not held.

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
LIMIT = 1800
"""Seconds that a cell may take."""


def read_source(path: Path) -> Any:
    """Return the notebook that a source describes, without outputs; equal cells have equal ids in every run."""
    notebook = jupytext.read(path)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = hashlib.sha256(f"{number} {cell.source}".encode()).hexdigest()[:8]
        cell["metadata"] = {}
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    return notebook


def execute(notebook: Any, folder: Path) -> Any:
    """Run all cells of a notebook in ``folder``, and return it with their outputs.

    Raises:
        CellExecutionError: A cell raised an exception.
    """
    NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": str(folder)}}).execute()
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        cell.metadata = {}
        outputs = [output for output in cell.get("outputs", ()) if output.get("name") != "stderr"]
        if cell.cell_type == "code":
            cell.outputs = outputs
    return notebook


def format_page(notebook: Any, name: str) -> tuple[str, dict[str, bytes]]:
    """Return the Markdown of an executed notebook, and its images by file name."""
    parts, images = list[str](), dict[str, bytes]()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for text, image in _read_outputs(cell.outputs):
            if image:
                file_name = f"{name}-{len(images) + 1}.png"
                images[file_name] = image
                parts.append(f"![The output of this cell]({file_name})")
            elif text.strip():
                parts.append(f"```text\n{text.rstrip()}\n```")
    link = f"[Download this notebook]({name}.ipynb){{ .md-button download }}"
    return "\n\n".join([parts[0], link, *parts[1:]]) + "\n", images


def _read_outputs(outputs: list[Any]) -> Iterator[tuple[str, bytes]]:
    """Yield the text or the image of each output."""
    for output in outputs:
        data = output.get("data", {})
        if "image/png" in data:
            yield "", base64.b64decode(data["image/png"])
        else:
            yield re.sub(r"\x1b\[[0-9;]*m", "", output.get("text") or data.get("text/plain", "")), b""


def write_pages() -> None:
    """Write the page and the images of every notebook."""
    for stale in (*FOLDER.glob("*.md"), *FOLDER.glob("*.png")):
        stale.unlink()
    for path in sorted(FOLDER.glob("*.ipynb")):
        page, images = format_page(nbformat.read(path, as_version=4), path.stem)
        path.with_suffix(".md").write_text(page, encoding="utf-8", newline="\n")
        for file_name, image in images.items():
            (FOLDER / file_name).write_bytes(image)
        print(path.with_suffix(".md"))


def main() -> None:
    """Execute the notebooks that are named, each in an empty folder, and write all pages."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--execute", nargs="*", default=[], metavar="NAME")
    for name in parser.parse_args().execute:
        folder = FOLDER.parents[1] / "runs" / "notebooks" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        notebook = execute(read_source(FOLDER / f"{name}.py"), folder)
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
    write_pages()


if __name__ == "__main__":
    main()
