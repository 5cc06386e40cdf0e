"""The panel's tables, sentences and summary, made from records whose answer is known."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_record import write_fake_record

from dvar.analysis.stop_quality import MeanInterval
from dvar.paper.config import ReproduceConfig
from dvar.paper.experiments.panel import _describe_comparisons, _describe_runs, compare_on_panel
from dvar.paper.panel_default import Condition, describe_default, list_default_conditions
from dvar.paper.panel_results import MAIN, PanelResults
from dvar.paper.panel_summary import MAX_LINES, summarise_panel
from dvar.paper.reproduce import reproduce
from dvar.paper.result import ExperimentResult, Table
from dvar.recordings.archive import RecordingArchive

HEADER = {"protocol": {"name": "panel", "version": 1}, "base": "a" * 64}
RATES = (0.25, 0.5, 1.0, 2.0, 4.0)


def write_record(root: Path, concept: str, learned: float, setting: dict[str, Any], cap: int) -> None:
    options: dict[str, Any] = {"header": HEADER, "images": 4, "jitter": 1e-5, "every": 4}
    write_fake_record(root, concept=concept, cap=cap, learned=learned, setting=setting, **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six concepts at five learning rates, whose time scales as 1 / rate; and three of them on one image."""
    root = tmp_path_factory.mktemp("panel")
    for index, concept in enumerate("abcdef"):
        learned = 32.0 * 2 ** (index / 10 - 0.25)
        for rate in RATES:
            setting = {"learning_rate": {"value": 0.005 * rate, "preset": 0.005}} if rate != 1 else {}
            write_record(root, concept, learned / rate, setting, round(10 * learned / rate))
        if index < 3:
            write_record(root, concept, learned, {"images": {"value": 1, "preset": 4}}, round(10 * learned))
    return root


@pytest.fixture(scope="module")
def results(root: Path) -> PanelResults:
    return PanelResults.of(RecordingArchive.open(root))


@pytest.fixture(scope="module")
def result(root: Path) -> ExperimentResult:
    return compare_on_panel(RecordingArchive.open(root))


def find_table(result: ExperimentResult, name: str) -> Table:
    return next(table for table in result.tables if table.name == name)


def read_row(table: Table, rule: str) -> dict[str, Any]:
    return dict(next(row for row in table.data if row["rule"] == rule))


def test_the_second_clock_is_judged_on_all_runs(result: ExperimentResult, results: PanelResults) -> None:
    table = find_table(result, "clocks")
    rows = {row["signal"]: row for row in table.data}
    assert list(rows) == ["constant", "held-out gap", "drift"]
    assert rows["constant"]["difference"].mean == 0
    assert {row["runs"] for row in rows.values()} == {len(results.panel.runs)}
    # These runs obey less from the first scored step after their oracle on, which scales with the rate.
    assert {row["memorising"] for row in rows.values()} == {len(results.panel.runs)}
    assert [row[-1] for row in table.rows] == ["yes" if row["supported"] else "no" for row in rows.values()]


def test_the_tables_hold_the_known_errors(result: ExperimentResult) -> None:
    table = find_table(result, "rates")
    assert table.columns == ("Rule", "× 1/4", "× 1/2", "preset", "× 2", "× 4", "× 1/4 and × 4")
    constant, corrected = read_row(table, "constant"), read_row(table, "constant × old rate / new rate")
    assert [constant[rate].mean for rate in ("× 1/4", "× 1/2", "× 2")] == pytest.approx([2, 1, 1], abs=0.12)
    assert corrected["× 1/4"].mean < 0.3
    assert read_row(table, "perfect rule")["× 1/4 and × 4"].mean == 0
    assert [row[0] for row in table.rows if row[0].endswith("(later)")] == ["DVAR, tuned, 64 stratified draws (later)"]
    assert {table.name for table in result.tables} == {
        "comparisons",
        "rates",
        "rates-textual-inversion",
        "preset",
        "others",
        "clocks",
    }


def test_registered_comparisons_come_first_and_say_what_may_be_claimed(
    result: ExperimentResult, results: PanelResults
) -> None:
    data = find_table(result, "comparisons").data
    assert [row["name"] for row in data[:3]] == ["1", "2", "3"]
    assert [row["second"] for row in data[:3]] == ["constant", "constant × old rate / new rate", "DVAR, tuned"]
    assert {row["group"] for row in data[3:5]} == {"Registered for the default alone"}
    assert {row["first"] for row in data[3:5]} == {"octave, cheap"}
    assert {row["group"] for row in data[5:]} == {"Looked at later"}
    assert data[0]["outcome"] == "won"
    assert data[1]["outcome"] != "won", "the corrected constant knows the time scale"
    assert data[2]["outcome"].endswith("not claimed")
    assert result.paragraphs[0].startswith("Comparison 1, octave − constant: won (−")
    assert results.claims == [True, True, False]


def test_three_concepts_give_no_interval(result: ExperimentResult) -> None:
    table = find_table(result, "comparisons")
    (row,) = [row for row in table.rows if row[0] == "images 1: octave − constant"]
    assert row[1].endswith(", too few concepts")
    assert row[-1] == "too few concepts"
    assert len(read_row(find_table(result, "others"), "octave")) == 2


def test_the_summary_is_plain_and_short_and_agrees_with_the_tables(
    result: ExperimentResult, results: PanelResults
) -> None:
    assert result.summary == summarise_panel(results)
    assert 7 <= len(result.summary) <= MAX_LINES
    assert "33 recorded runs of 6 concepts" in result.summary[0]
    assert result.summary[1].startswith("Pre-registered 1: octave stops nearer to the right step than a fixed number")
    assert "(not claimed: one before was not won)" in result.summary[3] or "no difference" in result.summary[3]
    (advice,) = [line for line in result.summary if line.startswith("For a user: ")]
    assert "multiply it by the old rate over the new one" in advice, "comparison 2 is lost: time scales as 1 / rate"
    assert "The default rule stays what it is: comparison 3 is " in advice
    assert result.summary[-1].startswith("Not shown here: anything about Stable Diffusion")


def test_a_tie_is_printed_as_a_tie(results: PanelResults) -> None:
    tie = MeanInterval(-0.1, -0.4, 0.2, 8)
    tied = replace(results, comparisons=tuple(replace(each, difference=tie, p=0.4) for each in results.comparisons))
    sentences = _describe_comparisons(tied)
    detail = "a tie (−0.10 [−0.40, 0.20] octaves, p = 0.400); which of them is nearer cannot be said."
    assert all(sentence.endswith(detail) for sentence in sentences)
    lines = summarise_panel(tied)
    assert "no difference can be seen between octave and a fixed number of steps" in lines[1]
    assert any("nothing here is a reason to prefer an adaptive stop" in line for line in lines)
    lost = replace(results, comparisons=(replace(results.comparisons[0], difference=MeanInterval(1, 0.5, 1.5, 8)),) * 3)
    assert _describe_comparisons(lost)[0].startswith("Comparison 1, octave − constant: lost (1.00 [0.50, 1.50]")
    assert "would be lost" in _describe_comparisons(lost)[1]
    assert any("octave is no reason to give up a fixed number" in line for line in summarise_panel(lost))
    won = replace(tied.comparisons[0], difference=MeanInterval(-1, -1.5, -0.5, 8), p=0.01)
    first = replace(results, comparisons=(won, *tied.comparisons[1:]))
    assert any("no number of steps is known, let octave stop" in line for line in summarise_panel(first))


def test_the_summary_heads_the_page_and_stays_when_other_sections_are_made_again(root: Path, tmp_path: Path) -> None:
    page = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "build" / "results.py"))
    config = ReproduceConfig(names=("panel",), records=(str(root),), output_dir=str(tmp_path / "out"))
    reproduce(config)
    summary = json.loads((tmp_path / "out" / "panel.json").read_text(encoding="utf-8"))["summary"]
    page["main"](tmp_path / "out", to=tmp_path)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[5] == "## In ten lines"
    assert len([line for line in lines[6:20] if line.startswith("- ")]) >= len(summary)
    assert text.index(summary[0][:40]) < text.index("What differs from the paper throughout")
    again = page["format_page"](page["read_sections"](text))
    assert again == text
    without = {name: part for name, part in page["read_sections"](text).items() if name != "summary"}
    assert "In ten lines" not in page["format_page"](without)


def test_the_default_changes_only_where_every_condition_is_met(
    result: ExperimentResult, results: PanelResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions = list_default_conditions(results)
    assert [condition.met for condition in conditions[:2]] == [True, False], "comparison 3 may not be claimed"
    assert [condition.text.split(" is ")[0] for condition in conditions[2:4]] == [
        "octave, cheap − constant",
        "octave, cheap − DVAR, tuned",
    ]
    assert [condition.met for condition in conditions[2:4]] == [row["outcome"] == "won" for row in default_rows(result)]
    assert conditions[4].met is None, "two methods are missing"
    assert conditions[5].met is (results.probe_share() <= 0.1)
    sentences = {
        (True, True): "Octave becomes the default: a; b.",
        (True, None): "Whether octave becomes the default is not known yet: b.",
        (False, None): "The default rule stays what it is: a.",
    }
    for met, sentence in sentences.items():
        monkeypatch.setattr(
            "dvar.paper.panel_default.list_default_conditions", lambda _, met=met: tuple(map(Condition, "ab", met))
        )
        assert describe_default(results) == sentence


def default_rows(result: ExperimentResult) -> list[dict[str, Any]]:
    data = find_table(result, "comparisons").data
    return [dict(row) for row in data if row["group"] == "Registered for the default alone"]


def test_the_main_panel_is_judged_when_it_is_whole(results: PanelResults, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ("textual-inversion",)
    monkeypatch.setattr("dvar.paper.panel_results.panel_concepts", lambda: [*"abcdefgh"])
    for count, whole in ((6, True), (5, True), (7, False)):
        main = replace(MAIN, concepts=count, methods=methods)
        monkeypatch.setattr("dvar.paper.panel_results.MAIN", main)
        fresh = replace(results)
        assert (fresh.main is not None) is whole
        if fresh.main is not None:
            assert {run.run.concept for run in fresh.main.runs} == {*"abcdef"[:count]}
            assert list_default_conditions(fresh)[4].met in ((True, False) if count == 6 else (None,))


def test_runs_that_broke_are_named(results: PanelResults) -> None:
    broken = {"textual-inversion/g/0": "the loss is not finite at step 12"}
    sentences = _describe_runs(replace(results, archive=replace(results.archive, unreadable=broken)))
    named = "textual-inversion/g/0 (the loss is not finite at step 12)."
    assert f"Recordings that broke or are unfinished, and are left out: {named}" in sentences
    assert any(sentence.startswith("The least gain of those that count is ") for sentence in sentences)
