"""Write what README says of the measurements from the tables of the results: python docs/build/readme.py"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README, RESULTS = ROOT / "README.md", ROOT / "docs" / "results.md"
START, END = "<!-- measured: docs/build/readme.py -->", "<!-- /measured -->"
METHODS = ("Textual Inversion", "DreamBooth-LoRA", "Custom Diffusion")
TUNED, PAPER, CAP, ORACLE = "DVAR (tuned)", "DVAR (paper's preset)", "Baseline", "Oracle of the other half"
WIDTH = 120

Row = dict[str, str]


def read_table(text: str, title: str) -> list[Row]:
    """Return the rows of the first table after a heading, by the names of its columns, without their markup."""
    section = text.partition(f"\n## {title}")[2]
    lines = section[section.index("\n| ") + 1 :].partition("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip().replace("**", "") for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def by_method(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Return the rows of Table 1 by method and strategy."""
    table: dict[str, dict[str, Row]] = {}
    for row in rows:
        name = row["Strategy"]
        if method := next((method for method in METHODS if name.startswith(f"{method} (")), ""):
            strategies = table.setdefault(method, {})
        else:
            strategies[name] = row
    return table


def list_findings(results: str) -> list[str]:
    """Return what the measurements say, in four lines."""
    table, rules = by_method(read_table(results, "Table 1")), read_table(results, "Every stopping rule")
    times, paper_times = (list_speedups(table, strategy) for strategy in (TUNED, PAPER))
    likeness = ", ".join(
        f"{mean(strategies[TUNED])} against {mean(strategies[CAP])} ({name})" for name, strategies in table.items()
    )
    ranked = [(row["Rule"], row["Octaves from the oracle"]) for row in rules if row["Rule"] != ORACLE]
    ranking = ", ".join(f"“{name}” ({octaves})" for name, octaves in ranked[:3])
    (constant,) = (octaves for name, octaves in ranked if name == "Best constant")
    comparison = re.search(r"With one setting per method, (DVAR [^\n]+)", results)
    assert comparison, "results.md compares DVAR with a constant"
    concepts = re.search(r"Concepts: (\d+); seeds: (\d+)", results)
    assert concepts, "results.md says how much was recorded"
    return [
        *list_answers(results),
        "**Time.** Stopped by DVAR, with the fixed batch evaluated at every step, training is so many times as fast as "
        f"up to the cap: with settings that were tuned on other concepts {times}; with the paper's window and "
        f"threshold, which the preset `lean` has too, {paper_times}.",
        f"**What it costs.** The likeness of the images (CLIP) at the stop with tuned settings and at the cap is "
        f"{likeness}.",
        "**Ranking.** Rules are ranked by the distance of their stops from the *oracle* (the best step: the first with "
        "90 % of a run's gain in likeness, known only afterwards), in *octaves* (doublings of the step count), with "
        f"95 % intervals over concepts. Nearest on average are {ranking}. DVAR as published is "
        f"{find_place(ranked, 'DVAR')} with tuned settings, {find_place(ranked, PAPER)} with the paper's; the best "
        f"constant number of steps has {constant}.",
        f"**Against a constant.** {comparison[1]} ({concepts[1]} concepts, {concepts[2]} seed each.)",
    ]


def list_answers(results: str) -> list[str]:
    """Return what the panel answers, once the page has its summary: two comparisons, and what they mean for a user."""
    summary = results.partition("\n## In ten lines\n")[2].partition("\n<!--")[0]
    if not summary:
        return []
    named = dict(line.removeprefix("- ").split(": ", 1) for line in summary.splitlines() if ": " in line)
    runs = re.search(r"\d+ recorded runs of \d+ concepts", summary)
    assert runs, "the summary says how much was recorded"
    cheap = re.search(r"Its cheap form[^.]*? by ([^ ]+ \[[^]]+\]) octaves", summary)
    assert cheap, "the summary says what the cheap form is worth"
    at_preset = next(text for name, text in named.items() if name.startswith("At the preset itself"))
    return [
        "**When an adaptive stop pays.** By [a protocol](docs/protocol.md) that was written before the recordings "
        f"({runs[0]}; an octave is a factor of two in steps), at a quarter and at four times the usual learning rate: "
        f"{named['Pre-registered 1']} (Its cheap form, `--rule octave` by default: {cheap[1]}.) "
        f"{named['Pre-registered 2'].capitalize()} At the usual rate, whose number of steps is known: {at_preset} "
        f"For a user: {named['For a user'].partition('. ')[0]}."
    ]


def list_speedups(table: dict[str, dict[str, Row]], strategy: str) -> str:
    """Return how many times as fast a strategy is as training to the cap, with each method."""
    return ", ".join(f"{rows[strategy]['Speed-up'].removesuffix('×')} ({name})" for name, rows in table.items())


def find_place(ranked: list[tuple[str, str]], rule: str) -> str:
    """Return the place of a rule among those that are ranked, with its distance."""
    place = [name for name, _ in ranked].index(rule)
    return f"number {place + 1} of {len(ranked)} ({ranked[place][1]})"


def mean(row: Row) -> str:
    """Return the mean of a score without its deviation."""
    return row["Train CLIP img"].partition(" ")[0]


def fill(text: str) -> str:
    """Return a list item wrapped at the width of the project's pages."""
    words, lines = text.split(" "), ["-"]
    for word in words:
        if len(lines[-1]) + 1 + len(word) <= WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}")
    return "\n".join(lines)


def page() -> str:
    """Return README with the findings of the results as they are now."""
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    _, found, after = rest.partition(END)
    assert found, f"README has a part between {START} and {END}"
    findings = "\n".join(fill(line) for line in list_findings(RESULTS.read_text(encoding="utf-8")))
    return f"{before}{START}\n{findings}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(page(), encoding="utf-8")
    print(README, file=sys.stderr)
