"""The page docs/results.md and its images: ``python docs/build/results.py FOLDER`` writes them from a report."""

# FOLDER is the output of ``dvar reproduce all --output_dir FOLDER``, or of ``dvar reproduce NAMES``; then the sections
# of other experiments stay as they are. The section on what was recorded comes with Table 1.

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dvar.paper.registry import EXPERIMENTS

DOCS = Path(__file__).parents[1]
LIMIT = 120_000
"""Bytes of an SVG; a larger one is shown as pixels."""
WIDTH = 1400
TITLE = """# Results

<!-- written by docs/build/results.py -->

"""
OPENING = """\
Every table and figure of the paper, reproduced and shown with the paper's numbers where it prints them. Everything
except what trains runs of its own is read from recorded runs, by the rules in [fidelity](fidelity.md); [their
traces](traces.md) come with this repository, so that anyone can read them again. `make results` records six concepts
and writes this page again; the runs that come with the repository are of sixteen (`dvar record --first 16`). The rule
octave came after them: it is not in the ranking of rules, and is compared with the others in the section on the panel,
by [a protocol](protocol.md) that was written before.

What differs from the paper throughout:

- The base model is the one bundled until 2026-11-28, unless a caption names another: a latent diffusion model of a
  picture-book world, 64 × 64 pixels, trained for this purpose. Its numbers cannot be compared with those of Stable
  Diffusion 1.5 one by one; patterns can, and each section says which of them are found here and which are not. The
  panel is of its successor ([the bundled models](bundled-models.md)), and more of it is being recorded.
- Training is shorter: the paper's windows and patiences are scaled by the ratio of the caps where a caption says so.
- All strategies are read from one run that continues past the stops of all of them; a replay check shows that a run
  that really stops gives the same.
- CLIP scores are those of a CLIP that conditions nothing; images that choose a step are never used to report on it.
- Minutes are counts of work times seconds measured on the machine of the recording, and not those of an A100.
- The raters of Table 2 are simulated.

"""
NOT_MADE = "Not made: "
RECORDS, SUMMARY, REST = "records", "summary", "opening"
"""The sections that say what was recorded, and in ten lines what the panel shows; and the mark of what follows them."""


def sections(folder: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return the sections that a report's folder gives, by name, and their images by file name."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    texts, images = dict[str, str](), dict[str, bytes]()
    if "table1" in report["experiments"]:
        texts[RECORDS] = "\n\n".join(report["facts"])
    for name in report["experiments"]:
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        parts = [f"## {content['title']}", ""]
        if content["missing"]:
            parts += [f"{NOT_MADE}{content['missing']}", ""]
        parts += [f"{paragraph}\n" for paragraph in content["says"]]
        for table in content["tables"]:
            parts += [*_format_table(table["shown"]), "", f"*{_escape(table['caption'])}*", ""]
        for plot in content["plots"]:
            file_name, image = _read_image(folder / f"{name}-{plot['name']}.svg")
            images[file_name] = image
            parts += [f"![{_escape(plot['name'])}](results/{file_name})", "", f"*{_escape(plot['caption'])}*", ""]
        texts[name] = "\n".join(parts)
        if lines := content.get("summary"):
            texts[SUMMARY] = "\n".join(["## In ten lines", "", *(f"- {_escape(line)}" for line in lines)])
    return texts, images


def read_sections(page: str) -> dict[str, str]:
    """Return the sections of a page by name."""
    parts = re.split(r"^<!-- (\w+) -->$", page, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def format_page(texts: Mapping[str, str]) -> str:
    """Return the page with these sections, in the order of the report, and the summary of the panel at its head."""
    order = (name for name in (RECORDS, *EXPERIMENTS) if name in texts)
    summary = f"<!-- {SUMMARY} -->\n{texts[SUMMARY].strip()}\n\n<!-- {REST} -->\n" if SUMMARY in texts else ""
    return TITLE + summary + OPENING + "\n".join(f"<!-- {name} -->\n{texts[name].strip()}\n" for name in order)


def _format_table(table: Mapping[str, Any]) -> Iterator[str]:
    bold = {(row, column) for row, column in table["bold"]}
    yield _format_line(table["columns"])
    yield _format_line(["---", *("---:" for _ in table["columns"][1:])])
    for row, cells in enumerate(table["cells"]):
        if len(cells) == 1:
            yield _format_line([f"**{_escape(cells[0])}**", *("" for _ in table["columns"][1:])])
        else:
            texts = [_escape(cell) for cell in cells]
            yield _format_line([f"**{text}**" if (row, column) in bold else text for column, text in enumerate(texts)])


def _format_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Return text that stays in its cell and is no markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;")


def _read_image(svg: Path) -> tuple[str, bytes]:
    """Return a figure's file name and content: the SVG itself where it is small, else its pixels."""
    drawing = svg.read_bytes()
    if len(drawing) <= LIMIT:
        return svg.name, drawing
    buffer = io.BytesIO()
    with Image.open(svg.with_suffix(".png")) as image:
        image.thumbnail((WIDTH, 4 * WIDTH), Image.Resampling.LANCZOS)
        image.convert("RGB").save(buffer, "webp", quality=85, method=6)
    return svg.with_suffix(".webp").name, buffer.getvalue()


def main(folder: Path, to: Path = DOCS) -> None:
    """Write the page and its images, and remove images that it no longer shows."""
    path = to / "results.md"
    texts, images = sections(folder)
    before = read_sections(path.read_text(encoding="utf-8") if path.exists() else "")
    # What could not be made from these records, as the panel from others, stays as it was made before.
    made = {name: text for name, text in texts.items() if NOT_MADE not in text or name not in before}
    page = format_page(before | made)
    (to / "results").mkdir(exist_ok=True)
    for name, image in images.items():
        (to / "results" / name).write_bytes(image)
    image_names = set(re.findall(r"\(results/([^)]+)\)", page))
    for stale in (file for file in (to / "results").iterdir() if file.name not in image_names):
        stale.unlink()
    path.write_text(page, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
