"""The pages that scripts write are current, and their examples run."""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree as ElementTree
from types import ModuleType
from typing import Any

import pytest
from docs_build import DOCS, load_script

from dvar import Dvar, Reason, Trace


@pytest.fixture(scope="module")
def verdicts() -> ModuleType:
    return load_script("verdicts")


def test_the_page_of_verdicts_and_its_figures_are_current(verdicts: ModuleType) -> None:
    pages = verdicts.build_pages()
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: make docs"
    assert set((DOCS / "concepts" / "verdicts").iterdir()) == {path for path in pages if path.suffix == ".svg"}


def test_the_page_of_performance_and_its_figure_are_current() -> None:
    performance = load_script("performance")
    for path, text in performance.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: make docs"


def test_the_page_of_scale_is_current() -> None:
    scale = load_script("scale")
    assert scale.PAGE.read_text(encoding="utf-8") == scale.page(), "run-many.md is old: make docs"


def test_what_the_readme_says_of_the_measurements_is_current() -> None:
    readme = load_script("readme")
    assert readme.README.read_text(encoding="utf-8") == readme.page(), "README.md is old: make docs"


def test_the_readme_follows_other_results() -> None:
    """What is said is read from the tables: with other numbers in them, the lines say these."""
    readme = load_script("readme")
    results = readme.RESULTS.read_text(encoding="utf-8")
    table, rules = (readme.read_table(results, title) for title in ("Table 1", "Every stopping rule"))
    speed, octaves = (
        next(row["Speed-up"] for row in table if row["Strategy"] == readme.TUNED),
        next(row["Octaves from the oracle"] for row in rules if row["Rule"] == "DVAR"),
    )
    answer, time, _, ranking, _ = readme.list_findings(results.replace(f"| {speed} |", "| 123.4× |"))
    assert "123.4 (Textual Inversion)" in time
    assert f"({octaves}) with tuned settings" in ranking
    assert "with the paper's; the best constant" in ranking
    changed = results.replace(octaves, f"9.99{octaves[4:]}")
    assert f"(9.99{octaves[4:]}) with tuned settings" in readme.list_findings(changed)[3]
    (first,) = (line for line in results.splitlines() if line.startswith("- Pre-registered 1: "))
    assert first.removeprefix("- Pre-registered 1: ") in answer
    other = readme.list_findings(results.replace(first, "- Pre-registered 1: nothing is known."))[0]
    assert "learning rate: nothing is known. (Its cheap form" in other
    without = results.replace("## In ten lines", "## Else")
    assert len(readme.list_findings(without)) == 4, "without a panel nothing is said of it"


def test_the_page_of_memory_is_current() -> None:
    assert load_script("memory").page() == (DOCS / "memory.md").read_text(encoding="utf-8"), (
        "memory.md is old: make docs"
    )


def test_the_figure_of_a_held_loss_is_current() -> None:
    held_loss = load_script("held_loss")
    assert held_loss.FIGURE.read_text(encoding="utf-8") == held_loss.plot_run(), "held-loss.svg is old: make docs"


def test_a_step_that_consists_of_the_networks_has_no_possible_gain() -> None:
    parts = {"data": 0.0, "encode": 0.0, "text": 1.0, "U-Net forward": 2.0, "backward": 3.0, "optimizer": 0.0}
    assert load_script("performance").ceiling({"parts": {"plain": parts}}) == 1
    assert load_script("performance").ceiling({"parts": {"plain": parts | {"encode": 3.0}}}) == 1.5


def test_every_reason_has_its_curve(verdicts: ModuleType) -> None:
    assert {case.reason for case in verdicts.CASES} == set(Reason)
    assert len(verdicts.CASES) == len(Reason)


def test_the_figures_are_well_formed(verdicts: ModuleType) -> None:
    for path in (DOCS / "concepts" / "verdicts").iterdir():
        ElementTree.parse(path)


def test_a_case_with_an_unexpected_verdict_is_reported(verdicts: ModuleType) -> None:
    case = verdicts.Case(Reason.RISING, lambda step: 1.0 - 1e-4 * step, "", "")
    with pytest.raises(AssertionError, match="'rising' is judged 'still falling'"):
        verdicts.judge_case(case)


def test_the_example_of_stop_on_runs_and_means_what_the_page_says() -> None:
    page = (DOCS / "concepts" / "verdicts.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(ast.parse(example), "verdicts.md", "exec"), names)
    straight, flat = Trace(), Trace()
    for step in range(1001):
        straight.record(step, 1.0 - 1e-4 * step)
        flat.record(step, 1.0)
    stops = {name: names[name](straight).stop for name in ("patient", "eager", "guarded", "published")}
    assert stops == {"patient": False, "eager": True, "guarded": False, "published": True}
    assert names["guarded"](flat).stop
    assert not Dvar(310, 0.15)(flat).stop


def test_numbers_of_runs_are_computed_and_not_typed() -> None:
    """A page that is written by hand points to the generated one, which counts the runs that there are."""
    generated = {"results.md", "verdicts.md", "performance.md", "run-many.md"}
    typed = [
        (page.name, count)
        for page in (DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md")))
        if page.name not in generated
        for count in re.findall(r"\b\d+ of (?:the )?\d+ (?:recorded )?runs\b", page.read_text(encoding="utf-8"))
    ]
    assert typed == []
