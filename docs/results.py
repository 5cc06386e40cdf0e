"""The page docs/results.md and its pictures: ``python docs/results.py FOLDER`` writes them anew.

FOLDER is what ``dvar reproduce all --output_dir FOLDER`` has made, or ``dvar reproduce NAMES``: then what the page
says of other experiments stays, and with Table 1 comes what it opens with, the records.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dvar.paper.config import EXPERIMENTS

HERE = Path(__file__).parent
LIMIT = 120_000
"""Bytes of an SVG; a larger one is shown as a picture of points."""
WIDTH = 1400
OPENING = """# Results

<!-- written by docs/results.py -->

Every table and figure of the paper, re-run by `make results` and set beside the paper's numbers where it prints them.
All but what trains runs of its own is read off recorded runs, by the rules that [fidelity](fidelity.md) gives;
[their traces](traces.md) come with this repository, so that anyone can read them again.

What differs from the paper throughout:

- The base model is the one that ships with this library unless a caption names another: a latent diffusion model of a
  picture book, 64 × 64 pixels, trained for this purpose. Numbers are therefore not comparable one by one with those of
  Stable Diffusion 1.5; patterns are, and each section says in words which of them are found here and which are not.
- Trainings are shorter: the paper's windows and patiences are scaled by the ratio of the caps where a caption says so.
- All ways of ending a run are read off one run that goes past them all; true runs beside them show
  that reading is running.
- CLIP scores are of a CLIP that conditions nothing; pictures that choose a step never report on it.
- Minutes are counts of work times seconds measured on the machine of the record, and not those of an A100.
- People are simulated in Table 2.

"""
RECORDS = "records"
"""The section that says what was recorded."""


def sections(folder: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """What a folder holds as sections of the page by name, and their pictures by the names that they have in it."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    found, pictures = dict[str, str](), dict[str, bytes]()
    if "table1" in report["experiments"]:
        found[RECORDS] = "\n\n".join(report["facts"])
    for name in report["experiments"]:
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        parts = [f"## {content['title']}", ""]
        if content["missing"]:
            parts += [f"Not made: {content['missing']}", ""]
        parts += [f"{line}\n" for line in content["says"]]
        for table in content["tables"]:
            parts += [*_table(table["shown"]), "", f"*{_flat(table['caption'])}*", ""]
        for plot in content["plots"]:
            shown, drawn = _picture(folder / f"{name}-{plot['name']}.svg")
            pictures[shown] = drawn
            parts += [f"![{_flat(plot['name'])}](results/{shown})", "", f"*{_flat(plot['caption'])}*", ""]
        found[name] = "\n".join(parts)
    return found, pictures


def kept(text: str) -> dict[str, str]:
    """The sections of a page by name."""
    parts = re.split(r"^<!-- (\w+) -->$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def page(found: Mapping[str, str]) -> str:
    """The page with these sections, in the order of the report."""
    order = (name for name in (RECORDS, *EXPERIMENTS) if name in found)
    return OPENING + "\n".join(f"<!-- {name} -->\n{found[name].strip()}\n" for name in order)


def _table(shown: Mapping[str, Any]) -> Iterator[str]:
    bold = {(row, column) for row, column in shown["bold"]}
    yield _line(shown["columns"])
    yield _line(["---", *("---:" for _ in shown["columns"][1:])])
    for row, cells in enumerate(shown["cells"]):
        if len(cells) == 1:
            yield _line([f"**{_flat(cells[0])}**", *("" for _ in shown["columns"][1:])])
        else:
            yield _line(
                [f"**{_flat(cell)}**" if (row, column) in bold else _flat(cell) for column, cell in enumerate(cells)]
            )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _flat(text: str) -> str:
    """Text that stays in its cell and is no markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;")


def _picture(svg: Path) -> tuple[str, bytes]:
    """A figure's file and what is in it: the drawing itself where it is small, else its points."""
    drawn = svg.read_bytes()
    if len(drawn) <= LIMIT:
        return svg.name, drawn
    written = io.BytesIO()
    with Image.open(svg.with_suffix(".png")) as opened:
        opened.thumbnail((WIDTH, 4 * WIDTH), Image.Resampling.LANCZOS)
        opened.convert("RGB").save(written, "webp", quality=85, method=6)
    return svg.with_suffix(".webp").name, written.getvalue()


def main(folder: Path, to: Path = HERE) -> None:
    """Write the page, and its pictures; those that it no longer shows are removed."""
    there = to / "results.md"
    found, pictures = sections(folder)
    text = page(kept(there.read_text(encoding="utf-8") if there.exists() else "") | found)
    (to / "results").mkdir(exist_ok=True)
    for name, drawn in pictures.items():
        (to / "results" / name).write_bytes(drawn)
    shown = set(re.findall(r"\(results/([^)]+)\)", text))
    for stale in (path for path in (to / "results").iterdir() if path.name not in shown):
        stale.unlink()
    there.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
