"""Every experiment on records whose truth is known, and the page of them all."""

from __future__ import annotations

import csv
import json
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_record import fake_record, fake_sheets, oracle_step
from PIL import Image

from dvar.analysis import strategies
from dvar.analysis.signal_to_noise import information
from dvar.analysis.strategies import StrategyFamily
from dvar.errors import RefusedInput
from dvar.paper import reproduce as made
from dvar.paper.config import EXPERIMENTS, ReproduceConfig
from dvar.paper.experiments import convergence, cost, criteria, held_batch, rule_ranking, samples, timesteps
from dvar.paper.page import page, section
from dvar.paper.reproduce import MAKERS, SIMULATED, TRAINED, reproduce
from dvar.paper.result import ExperimentResult, Provenance, compared, spread
from dvar.recordings.archive import RecordedRun, RecordingArchive, RescoredRun
from dvar.recordings.archive_file import read_traces
from dvar.recordings.restore import ANEW, sheet_at, write_sheet
from dvar.stopping.trace import Trace

METHODS = ("textual-inversion", "dreambooth-lora")
CAP = 240


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods on three concepts that learn at different paces, and one for tuning."""
    root = tmp_path_factory.mktemp("records")
    for method in METHODS:
        for concept, learned in (("cup", 15.0), ("mug", 20.0), ("owl", 30.0), ("purple_cat", 20.0)):
            folder = fake_record(root, method, concept, cap=CAP, learned=learned, noise=0.002, pictures=8)
            if concept == "cup":
                fake_sheets(folder, steps=(0, 20, 60, 200))
    return root


@pytest.fixture(scope="module")
def shelf(root: Path) -> RecordingArchive:
    return RecordingArchive.open(root)


@pytest.fixture(autouse=True, scope="module")
def short_baseline() -> object:
    """Baseline's cap is that of the presets, and these records are shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies, "_preset", lambda record: {"max_train_steps": 200, "validation_steps": 40})
        grid = StrategyFamily.grid
        patch.setattr(StrategyFamily, "grid", lambda kind: grid(kind)[::9])  # the whole of it takes a while
        patch.setattr(convergence, "MORE", 1)
        patch.setattr(made, "_trained", lambda name, *_: ExperimentResult(name, name, missing="trained elsewhere"))
        patch.setattr(held_batch, "SHOWN", 1)
        yield


@pytest.fixture(scope="module")
def report(root: Path, short_baseline: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("laboratory")
    return reproduce(ReproduceConfig(records=(str(root),), output_dir=str(out)))


def test_every_experiment_is_in_the_report_and_what_cannot_be_made_is_told(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert set(re.findall(r'<section id="([^"]+)"', page)) == set(EXPERIMENTS)
    assert page.count("Not made") == 2 + len(TRAINED)  # Figure 6, and true runs of what is a fake
    assert "there is no record of custom-diffusion" in page  # Figure 6
    assert {*MAKERS, *TRAINED, "traces"} == set(EXPERIMENTS)


def test_the_page_loads_nothing(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert "<script" not in page
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)', page))
    asked, given = (set(re.findall(pattern, page)) for pattern in (r"var\((--[a-z]+)", r"(--[a-z]+):"))
    assert asked <= given  # every colour and typeface that the page asks for is its own


def test_every_exhibit_leaves_data_and_both_kinds_of_figure(report: Path) -> None:
    for name in EXPERIMENTS:
        content = json.loads((report.parent / f"{name}.json").read_text(encoding="utf-8"))
        for table in content["tables"]:
            with (report.parent / f"{name}-{table['name']}.csv").open(encoding="utf-8") as file:
                assert len(list(csv.DictReader(file))) == len(table["rows"]) > 0
        for plot in content["plots"]:
            assert (report.parent / f"{name}-{plot['name']}.png").read_bytes().startswith(b"\x89PNG")
            assert "<svg" in (report.parent / f"{name}-{plot['name']}.svg").read_text(encoding="utf-8")


def test_every_caption_says_what_it_was_made_on(report: Path) -> None:
    for name in set(MAKERS) - {"figure6", "agreement", *SIMULATED}:
        content = json.loads((report.parent / f"{name}.json").read_text(encoding="utf-8"))
        ours = [shown for shown in (*content["tables"], *content["plots"]) if shown["name"] != "paper"]
        assert ours
        for shown in ours:
            for fact in ("Base model: the bundled model", "Concepts: ", "seeds: 1", "paired all pairs"):
                assert fact in shown["caption"], (name, shown["name"])


def test_the_same_records_give_the_same_files(root: Path, report: Path, tmp_path: Path) -> None:
    reproduce(ReproduceConfig(names=("figure8",), records=(str(root),), output_dir=str(tmp_path)))
    for path in tmp_path.glob("figure8*"):
        assert path.read_bytes() == (report.parent / path.name).read_bytes(), path.name


def test_how_dvar_does_against_a_constant_is_said_of_both_kinds_of_setting(report: Path) -> None:
    content = json.loads((report.parent / "rules.json").read_text(encoding="utf-8"))
    told = [line for line in content["says"] if "DVAR stops" in line]
    assert [line.split(", DVAR")[0] for line in told] == [
        "With one setting per method",
        "With one setting, in shares of Baseline's cap, for all methods",
    ]
    for line, table in zip(told, content["tables"], strict=False):
        (row,) = (row for row in table["shown"]["cells"] if row[0] == "DVAR")
        assert f"({row[3]})" in line


@pytest.mark.slow  # two whole rankings
def test_rules_on_the_file_of_traces_are_rules_on_the_records(root: Path, report: Path, tmp_path: Path) -> None:
    config = ReproduceConfig(names=("rules",), records=(str(report.parent / "traces.npz"),), output_dir=str(tmp_path))
    reproduce(config)
    there, here = (json.loads((at / "rules.json").read_text()) for at in (report.parent, tmp_path))
    stops = [
        [(row["rule"], row["setting"], round(row["steps"], 3)) for row in one["tables"][0]["rows"]]
        for one in (there, here)
    ]
    assert sorted(stops[0]) == sorted(stops[1])


# Table 1


def test_a_row_of_table_1_is_its_readings(shelf: RecordingArchive) -> None:
    found = {row.way: row for row in cost.rows(shelf, "textual-inversion")}
    assert {"Baseline", "CLIP-s", "Few iters (mean)", "Few iters (max)", "DVAR (tuned)"} < set(found)
    assert [reading.stop for reading in found["Baseline"].readings] == [200] * 3
    clip = [reading.stop for reading in found["CLIP-s"].readings]
    assert {reading.stop for reading in found["Few iters (max)"].readings} == {max(clip)}
    assert {reading.stop for reading in found["Few iters (mean)"].readings} == {round(np.mean(clip))}
    assert all(reading.kept <= reading.stop for row in found.values() for reading in row.readings)


def test_scores_of_table_1_are_of_the_very_checkpoints_where_all_were_scored_anew(shelf: RecordingArchive) -> None:
    method = "textual-inversion"
    kept = {record: sorted(steps) for record, steps in cost.selected(shelf).items()}
    anew = {
        record.name: RescoredRun(
            np.array(steps), {of: np.repeat(np.array(steps)[:, None], 8, 1) * 1e-3 for of in record.pictures}
        )
        for record, steps in kept.items()
        if record.method == method
    }
    found = cost.rows(replace(shelf, rescored=anew), method)
    for row in found:
        assert row.scores("validation", "clip_text") == [pytest.approx(of.kept * 1e-3) for of in row.readings]
        assert row.scores("train", "dino") == []
    table = cost.make(replace(shelf, rescored=anew)).tables[0]
    assert (
        "drawn anew on as many seeds that chose nothing, for all ways alike (Textual Inversion), else" in table.caption
    )
    # One step of one record less, and all ways are read off the line again, so that they stay comparable.
    first = next(iter(anew))
    less = {**anew, first: RescoredRun(anew[first].steps[1:], anew[first].pictures)}
    fallen_back = cost.rows(replace(shelf, rescored=less), method)
    assert [row.scores("train", "clip_image") for row in fallen_back] == [
        row.scores("train", "clip_image") for row in cost.rows(shelf, method)
    ]
    assert "drawn anew" not in cost.make(shelf).tables[0].caption


def test_differences_that_table_1_speaks_of_are_paired_by_concept(shelf: RecordingArchive) -> None:
    found = {row.way: row.scores("train", "clip_image") for row in cost.rows(shelf, "textual-inversion")}
    apart = np.array(found["Baseline"]) - np.array(found["DVAR (tuned)"])
    assert f"paired by concept {apart.mean():.3f} [".replace("-", "−") in cost.make(shelf).says[0]


def test_minutes_of_table_1_by_hand(shelf: RecordingArchive) -> None:
    row = cost.make(shelf).tables[0].data[0]
    # 200 updates of 0.2 s and 8 pictures of 0.5 s at each of 0, 40, ..., 200
    assert row["way"] == "Baseline"
    assert row["Minutes mean"] == pytest.approx((200 * 0.2 + 6 * 8 * 0.5) / 60)
    assert row["Final pictures, min"] == pytest.approx(8 * 0.5 / 60)


def test_lost_runs_are_named_and_the_table_is_made(root: Path) -> None:
    shelf = RecordingArchive.open(root)
    broken = RecordingArchive(shelf.records, {"textual-inversion/vase/0": "the disk was full"})
    exhibit = cost.make(broken)
    assert any("textual-inversion/vase/0: the disk was full" in line for line in exhibit.says)
    assert len(exhibit.tables[0].data) == 14


# The ranking


def test_the_ranking_knows_the_oracle(shelf: RecordingArchive) -> None:
    """Without noise the oracle of the other half is the oracle: nothing can rank before it."""
    records = shelf.of("textual-inversion")
    found = rule_ranking.ranking(records, {method: rule_ranking.tuned(shelf.for_tuning(method)) for method in METHODS})
    oracle = next(one for one in found if one.rule == rule_ranking.ORACLE_NAME)
    truth = [oracle_step({"cup": 15.0, "mug": 20.0, "owl": 30.0}[record.concept]) for record in records]
    np.testing.assert_allclose(np.log2(oracle.stops), np.log2(truth), atol=0.15)
    assert np.mean(oracle.errors) < 0.1
    assert found[0].rule == rule_ranking.ORACLE_NAME
    random = next(one for one in found if one.rule == "Random step")
    assert np.mean(random.errors) > 1
    assert {kind.name for kind in strategies.KINDS} < {one.rule for one in found}


def test_a_rule_is_not_further_from_the_oracle_than_itself(shelf: RecordingArchive) -> None:
    records = shelf.of("textual-inversion")
    found = rule_ranking.ranking(records, {method: rule_ranking.tuned(shelf.for_tuning(method)) for method in METHODS})
    same = rule_ranking._difference(found[0], found[0])
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert rule_ranking._difference(found[-1], found[0]).low > 0


def test_without_tuning_concepts_the_rest_is_ranked(root: Path) -> None:
    shelf = RecordingArchive.open(root, tuning=("no_such",))
    exhibit = rule_ranking.make(shelf)
    assert any("No tuning concept was recorded" in line for line in exhibit.says)
    ranked = {row["rule"] for row in exhibit.tables[0].data}
    assert ranked == {
        rule_ranking.ORACLE_NAME,
        "Random step",
        "Baseline",
        "DVAR (paper's preset)",
        "DVAR (preset scaled in time)",
    }


def test_rules_are_not_ranked_on_a_method_that_fails_the_gate(tmp_path: Path) -> None:
    """Without records enough to judge by, the bundled model's own gates hold: Custom Diffusion's is shut."""
    for method in ("textual-inversion", "custom-diffusion"):
        fake_record(tmp_path, method, "vase")
    shelf = RecordingArchive.open(tmp_path)
    exhibit = rule_ranking.make(shelf)
    assert any("Custom Diffusion does not pass the gate" in line and "61 %" in line for line in exhibit.says)
    assert {one["rule"] for table in exhibit.tables[:-1] for one in table.data} >= {"Baseline", "Random step"}
    assert all("1 runs, ranked" in table.caption for table in exhibit.tables[:-1])
    judged = [(row[0], row[-1]) for row in exhibit.tables[-1].rows]
    assert judged == [("Textual Inversion", "yes"), ("Custom Diffusion", "no")]
    alone = replace(shelf, records=shelf.of("custom-diffusion"))
    with pytest.raises(RefusedInput, match="rules are ranked on no method here: Custom Diffusion does not pass"):
        rule_ranking.make(alone)


# Figures


def test_correlations_of_curves_that_mirror_each_other(shelf: RecordingArchive) -> None:
    record = shelf.of("textual-inversion")[0]
    for _, low, high in timesteps.INTERVALS:
        loss, score = timesteps.correlations(record, "Train image score", low, high)
        assert np.corrcoef(loss, score)[0, 1] < -0.98
    cells = timesteps.make(shelf).tables[0].data
    assert {row["interval"] for row in cells} == {where[0] for where in timesteps.INTERVALS}


def test_records_without_stratified_draws_are_refused(shelf: RecordingArchive) -> None:
    bare = RecordingArchive(
        tuple(SimpleNamespace(**vars(r), has=lambda _: False) for r in shelf.of("textual-inversion"))
    )  # type: ignore[arg-type]
    with pytest.raises(RefusedInput, match="no record holds stratified draws"):
        timesteps.make(bare)


def test_smaller_batches_are_parts_of_the_recorded_one(shelf: RecordingArchive) -> None:
    record = shelf.of("textual-inversion")[0]
    assert [len(held_batch._batches(record, size)) for size in (1, 2, 4, 8)] == [8, 4, 2, 1]
    np.testing.assert_allclose(held_batch._mean(record, list(range(8)))[1], record.trace.values)


def test_a_measure_is_what_the_rule_measures(shelf: RecordingArchive) -> None:
    record = shelf.of("textual-inversion")[0]
    steps, values = criteria.measured(record, criteria.MEASURES["DVAR"][1](50), "ratio")
    losses = record.trace.values[1:]  # the paper's rule has no value before the first step
    assert steps[0] == 51
    np.testing.assert_allclose(values[-1], losses[-50:].var() / losses.var())


def test_information_by_hand() -> None:
    random = np.random.default_rng(0)
    steps = np.arange(2000)
    noisy = information(steps, 1.0 - 0.5 * (steps >= 1000) + 0.1 * random.standard_normal(2000))
    assert noisy.ratio == pytest.approx(5, rel=0.1)
    assert noisy.steps_to_detect == pytest.approx(2, rel=0.2)  # 2 (5 / 5)^2
    assert noisy.steps_told == "2"
    assert information(steps, np.linspace(0, 1, 2000)).steps_told == "never"
    assert replace(noisy, gain=1e-3).steps_told == "over 10000"
    assert information(steps, np.linspace(0, 1, 2000)).ratio == 0
    assert information(steps, np.linspace(0, 1, 2000)).steps_to_detect == np.inf
    assert information(5 * steps, 1.0 - steps / 2000).steps_to_detect == 5  # one record, at its cadence


def test_pictures_are_those_of_the_nearest_scored_step(shelf: RecordingArchive, report: Path) -> None:
    record = shelf.of("textual-inversion")[0]
    assert [samples.shown_step(record, step) for step in (0, 9, 21, 41, 199, 240)] == [0, 20, 20, 60, 200, 200]
    shown = json.loads((report.parent / "figure12.json").read_text(encoding="utf-8"))["plots"]
    assert [plot["name"] for plot in shown] == [f"pictures-{method}" for method in METHODS]
    assert {(one["way"], one["record"]) for one in shown[0]["data"]} == {
        ("Baseline", "textual-inversion/cup/0"),
        ("DVAR (tuned)", "textual-inversion/cup/0"),
    }


def test_pictures_are_those_of_the_very_steps_where_both_were_drawn_anew(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "records")
    shelf = RecordingArchive.open(tmp_path / "records")
    for row in cost.rows(shelf, "textual-inversion"):
        folder, kept = row.records[0].folder, row.readings[0].kept
        assert folder
        if row.way in ("Baseline", "DVAR (tuned)"):
            assert "its pictures on fresh seeds" not in samples.make(shelf).plots[0].caption
            write_sheet(sheet_at(folder, kept, ANEW), [[Image.new("RGB", (16, 16), "red")] * 4] * 2)
    made = samples.make(shelf).plots[0]
    assert "shown are its pictures on fresh seeds. " in made.caption
    assert all(one["shown"] == one["kept"] for one in made.data)
    assert "on fresh seeds" not in samples.make(shelf).plots[1].caption  # of the other method none was


def test_a_file_of_traces_has_no_pictures(report: Path) -> None:
    with pytest.raises(RefusedInput, match="no recorded run has kept its pictures"):
        samples.make(read_traces(report.parent / "traces.npz"))


# Saying it


def test_the_page_of_results_holds_every_section_and_its_pictures(report: Path, tmp_path: Path) -> None:
    results = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "results.py"))
    results["main"](report.parent, to=tmp_path)
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    for name in EXPERIMENTS:
        content = json.loads((report.parent / f"{name}.json").read_text(encoding="utf-8"))
        assert f"## {content['title']}" in page
        for table in content["tables"]:
            assert "| " + " | ".join(table["shown"]["columns"]) + " |" in page
    shown = set(re.findall(r"\(results/([^)]+)\)", page))
    assert shown == {path.name for path in (tmp_path / "results").iterdir()}
    assert max(path.stat().st_size for path in (tmp_path / "results").iterdir()) <= 200_000
    assert "Base model: the bundled model. Concepts: 3" in page
    assert "| Few iters (mean) | 0.801 ± 0.071 |" in page  # the paper's


def test_the_page_of_results_keeps_what_was_not_made_again(report: Path, root: Path, tmp_path: Path) -> None:
    results = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "results.py"))
    results["main"](report.parent, to=tmp_path)
    before = results["kept"]((tmp_path / "results.md").read_text(encoding="utf-8"))
    pictures = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    (tmp_path / "results" / "figure8-stale.svg").write_text("<svg/>")
    records = tmp_path / "records"
    fake_record(records, concept="lone_mug", cap=80, learned=9.0)
    reproduce(ReproduceConfig(names=("figure8",), records=(str(records),), output_dir=str(tmp_path / "more")))
    results["main"](tmp_path / "more", to=tmp_path)
    after = results["kept"]((tmp_path / "results.md").read_text(encoding="utf-8"))
    assert list(after) == list(before) == ["records", *EXPERIMENTS]
    assert [name for name in after if after[name] != before[name]] == ["figure8"]
    found = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    assert found.keys() == pictures.keys()
    assert {name.split("-")[0] for name in found if found[name] != pictures[name]} == {"figure8"}


def test_a_pattern_that_differs_is_said_to_differ() -> None:
    assert compared("water is wet", True) == "As in the paper, water is wet."
    assert compared("water is wet", False) == "Unlike in the paper, it is not so here that water is wet."


def test_a_spread_by_hand() -> None:
    assert spread([0.1, float("nan"), 0.3]) == "0.200 ± 0.100"
    assert spread([-1.0], 1) == "−1.0", "one value has no spread"
    assert spread([float("nan")]) == spread([]) == "–"


def test_a_loss_that_a_gradient_threw_off_is_told(tmp_path: Path) -> None:
    record = RecordedRun.open(fake_record(tmp_path, cap=60, learned=8.0))
    assert convergence.relapse(record) is None
    trace = Trace(record.trace.header)
    for row in record.trace.records:
        loss = np.array(row["eval"]) * (1.1 if row["step"] >= 40 else 1.0)
        large = {"grad_norm": 500.0} if row["step"] == 38 else {}
        trace.record(**{**row, "eval": loss, **large})
    thrown = replace(record, trace=trace)
    assert convergence.relapse(thrown) == pytest.approx(500 / np.median(thrown.series("grad_norm")[1]))
    assert convergence._relapses([record]).startswith("As in the paper, once it has fallen half")
    assert "climbs back in 1 of 2, within 30 steps of a gradient" in convergence._relapses([record, thrown])


def test_a_caption_says_which_methods_were_recorded_on_fewer_concepts(tmp_path: Path) -> None:
    for method, concepts in zip(METHODS, (("cup", "mug", "owl"), ("cup", "mug")), strict=True):
        for concept in concepts:
            fake_record(tmp_path, method, concept, cap=60, learned=8.0)
    assert "Concepts: 3 (2 of DreamBooth-LoRA); seeds: 1." in str(
        Provenance.of(RecordingArchive.open(tmp_path).records)
    )


def test_a_prompt_cannot_become_part_of_the_page(shelf: RecordingArchive) -> None:
    assert "<b>" not in section(ExperimentResult("x", "<b>", ("<b>",)))
    assert "2 seeds" not in str(Provenance.of(shelf.records))


def test_the_one_experiment_asked_for_is_refused_where_it_cannot_be_made(root: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="no record of custom-diffusion"):
        reproduce(ReproduceConfig(names=("figure6",), records=(str(root),), output_dir=str(tmp_path)))


def test_the_page_defines_every_colour_and_font_that_it_uses() -> None:
    style = page([], ())
    used = set(re.findall(r"var\((--[a-z-]+)\)", style))
    assert used
    assert used <= set(re.findall(r"(--[a-z-]+):", style))
