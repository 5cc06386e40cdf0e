"""Every experiment on recorded runs whose truth is known, and the page of them all."""

from __future__ import annotations

import csv
import json
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from fake_record import compute_oracle_step, write_fake_record, write_fake_sheets
from PIL import Image

from dvar.analysis import families, strategies
from dvar.analysis.families import StrategyFamily
from dvar.analysis.rule_ranking import CONTROL, ORACLE_NAME, RankedRule, compare_errors, compute_ranking, tune_rules
from dvar.analysis.signal_to_noise import measure_signal_to_noise
from dvar.analysis.stop_quality import LearningCurve, MeanInterval
from dvar.analysis.strategy_costs import cost_rows, kept_steps
from dvar.errors import RefusedInput
from dvar.paper.config import ReproduceConfig
from dvar.paper.experiments import (
    convergence,
    cost,
    held_batch,
    other_rules,
    rule_ranking,
    samples,
    scores,
    timesteps,
    variants,
)
from dvar.paper.page import render_page
from dvar.paper.registry import EXPERIMENTS, Experiment
from dvar.paper.reproduce import reproduce
from dvar.paper.result import ExperimentResult, Provenance, compare_with_paper, format_mean_sd
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.archive_file import read_traces
from dvar.recordings.recorded_run import RecordedRun, RescoredRun
from dvar.recordings.restore import RESCORED_SHEETS, sheet_path, write_sheet
from dvar.stopping.trace import Trace

METHODS = ("textual-inversion", "dreambooth-lora")
CAP = 240
TRAINED = {name for name, experiment in EXPERIMENTS.items() if experiment.needs == "runs of its own"}
READ = {name for name, experiment in EXPERIMENTS.items() if experiment.needs == "recorded runs"}


def skip_training(inputs: object) -> ExperimentResult:
    return ExperimentResult(missing="trained elsewhere")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods on three concepts that learn at different paces, and one for tuning."""
    root = tmp_path_factory.mktemp("records")
    for method in METHODS:
        for concept, learned in (("cup", 15.0), ("mug", 20.0), ("owl", 30.0), ("purple_cat", 20.0)):
            folder = write_fake_record(root, method, concept, cap=CAP, learned=learned, noise=0.002, images=8)
            if concept == "cup":
                write_fake_sheets(folder, steps=(0, 20, 60, 200))
    return root


@pytest.fixture(scope="module")
def archive(root: Path) -> RecordingArchive:
    return RecordingArchive.open(root)


@pytest.fixture(autouse=True, scope="module")
def short_baseline() -> object:
    """Baseline's cap is that of the presets, and these runs are shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies, "_preset", lambda run: {"max_train_steps": 200, "validation_steps": 40})
        settings = StrategyFamily.settings
        patch.setattr(StrategyFamily, "settings", lambda family: settings(family)[::9])  # all of them take a while
        patch.setattr(convergence, "MORE", 1)
        for name in TRAINED:
            patch.setitem(EXPERIMENTS._items, name, replace(EXPERIMENTS[name], make=skip_training))
        patch.setattr(held_batch, "SHOWN", 1)
        yield


@pytest.fixture(scope="module")
def report(root: Path, short_baseline: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("laboratory")
    return reproduce(ReproduceConfig(records=(str(root),), output_dir=str(out)))


def test_every_experiment_is_in_the_report_with_the_reason_where_it_cannot_be_made(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert set(re.findall(r'<section id="([^"]+)"', page)) == set(EXPERIMENTS)
    assert page.count("Not made") == 3 + len(TRAINED)  # Figure 6, the panel, and fake runs cannot be run again
    assert "there is no recorded run of custom-diffusion" in page  # Figure 6


def test_the_page_loads_nothing(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert "<script" not in page
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)', page))
    used, defined = (set(re.findall(pattern, page)) for pattern in (r"var\((--[a-z]+)", r"(--[a-z]+):"))
    assert used <= defined  # every colour and typeface that the page asks for is its own


def test_every_experiment_leaves_data_and_both_kinds_of_figure(report: Path) -> None:
    for name in EXPERIMENTS:
        content = json.loads((report.parent / f"{name}.json").read_text(encoding="utf-8"))
        for table in content["tables"]:
            with (report.parent / f"{name}-{table['name']}.csv").open(encoding="utf-8") as file:
                assert len(list(csv.DictReader(file))) == len(table["rows"]) > 0
        for plot in content["plots"]:
            assert (report.parent / f"{name}-{plot['name']}.png").read_bytes().startswith(b"\x89PNG")
            assert "<svg" in (report.parent / f"{name}-{plot['name']}.svg").read_text(encoding="utf-8")


def test_every_caption_says_what_it_was_made_on(report: Path) -> None:
    for name in READ - {"figure6", "panel", "agreement", "traces"}:
        content = json.loads((report.parent / f"{name}.json").read_text(encoding="utf-8"))
        ours = [item for item in (*content["tables"], *content["plots"]) if item["name"] != "paper"]
        assert ours
        for item in ours:
            for fact in ("Base model: the bundled model", "Concepts: ", "seeds: 1", "paired all pairs"):
                assert fact in item["caption"], (name, item["name"])


def test_the_same_records_give_the_same_files(root: Path, report: Path, tmp_path: Path) -> None:
    reproduce(ReproduceConfig(names=("figure8",), records=(str(root),), output_dir=str(tmp_path)))
    for path in tmp_path.glob("figure8*"):
        assert path.read_bytes() == (report.parent / path.name).read_bytes(), path.name


def test_dvar_is_compared_with_a_constant_for_both_kinds_of_setting(report: Path) -> None:
    content = json.loads((report.parent / "rules.json").read_text(encoding="utf-8"))
    lines = [line for line in content["says"] if line.startswith("With one setting")]
    assert [line.split(", DVAR")[0] for line in lines] == [
        "With one setting per method",
        "With one setting, in shares of Baseline's cap, for all methods",
    ]
    for line, table in zip(lines, content["tables"], strict=False):
        (row,) = (row for row in table["shown"]["cells"] if row[0] == "DVAR")
        assert f"({row[3]} octaves" in line


def test_dvar_and_a_constant_are_a_tie_where_the_interval_includes_0() -> None:
    def judge(*errors: float) -> RankedRule:
        runs = tuple(SimpleNamespace(concept=f"concept {number}") for number in range(len(errors)))
        outcomes = tuple(SimpleNamespace(distance=error) for error in errors)
        return RankedRule("", "", cast(Any, runs), cast(Any, outcomes), 0.0, ())

    def compare(*errors: float) -> str:
        ranking = [replace(judge(*errors), rule="DVAR"), replace(judge(*[1.0] * len(errors)), rule=CONTROL)]
        (sentence,) = rule_ranking._compare_with_constant("one setting", ranking)
        return sentence

    assert compare(*[0.5] * 8).startswith("With one setting, DVAR stops nearer to the oracle than a constant number")
    assert compare(*[1.5] * 8).startswith("With one setting, DVAR stops further from the oracle than a constant number")
    assert "are a tie (−0.10 [" in compare(0.0, 2.0, 0.5, 1.6, 0.3, 0.9, 1.2, 0.7)
    assert compare(*[0.5] * 5).endswith("(−0.50 [−0.50, −0.50] octaves of distance over 5 concepts): too few concepts.")


@pytest.mark.slow  # two whole rankings
def test_rules_on_the_file_of_traces_are_rules_on_the_records(root: Path, report: Path, tmp_path: Path) -> None:
    config = ReproduceConfig(names=("rules",), records=(str(report.parent / "traces.npz"),), output_dir=str(tmp_path))
    reproduce(config)
    there, here = (json.loads((at / "rules.json").read_text()) for at in (report.parent, tmp_path))
    stops = [
        {(row["rule"], row["setting"]): row["steps"] for row in content["tables"][0]["rows"]}
        for content in (there, here)
    ]
    # The file holds scores in 13 bits, by which an oracle is a little earlier or later; rules read losses alone.
    assert stops[0] == pytest.approx(stops[1], rel=5e-3)
    rules = {key for key in stops[0] if not key[0].startswith("Oracle")}
    assert {key: stops[0][key] for key in rules} == pytest.approx({key: stops[1][key] for key in rules}, rel=1e-6)


# Table 1


def test_a_row_of_table_1_is_its_stop_results(archive: RecordingArchive) -> None:
    rows = {row.strategy: row for row in cost_rows(archive, "textual-inversion")}
    assert {"Baseline", "CLIP-s", "Few iters (mean)", "Few iters (max)", "DVAR (tuned)"} < set(rows)
    assert [result.stop for result in rows["Baseline"].results] == [200] * 3
    clip = [result.stop for result in rows["CLIP-s"].results]
    assert {result.stop for result in rows["Few iters (max)"].results} == {max(clip)}
    assert {result.stop for result in rows["Few iters (mean)"].results} == {round(np.mean(clip))}
    assert all(result.kept_step <= result.stop for row in rows.values() for result in row.results)


def test_few_iterations_are_the_mean_and_the_longest_of_clip_s(tmp_path: Path) -> None:
    for concept, learned in (("cup", 6.0), ("mug", 8.0), ("owl", 60.0)):
        write_fake_record(tmp_path, concept=concept, cap=CAP, learned=learned)
    rows = {row.strategy: row for row in cost_rows(RecordingArchive.open(tmp_path), "textual-inversion")}
    stops = [result.stop for result in rows["CLIP-s"].results]
    assert max(stops) > 1.2 * np.mean(stops)
    assert [result.stop for result in rows["Few iters (max)"].results] == [max(stops)] * 3
    assert [result.stop for result in rows["Few iters (mean)"].results] == [round(np.mean(stops))] * 3


def test_scores_of_table_1_are_of_the_kept_checkpoints_where_all_were_scored_again(archive: RecordingArchive) -> None:
    method = "textual-inversion"
    steps_by_run = {run: sorted(steps) for run, steps in kept_steps(archive).items()}
    rescored = {
        run.name: RescoredRun(
            np.array(steps), {of: np.repeat(np.array(steps)[:, None], 8, 1) * 1e-3 for of in run.image_scores}
        )
        for run, steps in steps_by_run.items()
        if run.method == method
    }
    for row in cost_rows(replace(archive, rescored=rescored), method):
        assert row.scores("validation", "clip_text") == [
            pytest.approx(result.kept_step * 1e-3) for result in row.results
        ]
        assert row.scores("train", "dino") == []
    table = cost.table_1(replace(archive, rescored=rescored)).tables[0]
    assert (
        "on new images of as many seeds that chose nothing, the same for all strategies (Textual Inversion), else"
        in table.caption
    )
    # Without one step of one run, all strategies are interpolated again, so that they stay comparable.
    first = next(iter(rescored))
    less = {**rescored, first: RescoredRun(rescored[first].steps[1:], rescored[first].image_scores)}
    fallen_back = cost_rows(replace(archive, rescored=less), method)
    assert [row.scores("train", "clip_image") for row in fallen_back] == [
        row.scores("train", "clip_image") for row in cost_rows(archive, method)
    ]
    assert "on new images" not in cost.table_1(archive).tables[0].caption


def test_differences_in_table_1_are_paired_by_concept(archive: RecordingArchive) -> None:
    scores = {row.strategy: row.scores("train", "clip_image") for row in cost_rows(archive, "textual-inversion")}
    differences = np.array(scores["Baseline"]) - np.array(scores["DVAR (tuned)"])
    assert f"paired by concept {differences.mean():.3f} [".replace("-", "−") in cost.table_1(archive).paragraphs[0]


def test_minutes_of_table_1_by_hand(archive: RecordingArchive) -> None:
    row = cost.table_1(archive).tables[0].data[0]
    # 200 updates of 0.2 s, and at the scored steps 0, 43, 82, 126 and 174, the first after each 40, 4 images of 0.5 s
    assert row["way"] == "Baseline"
    assert row["Minutes mean"] == pytest.approx((200 * 0.2 + 5 * 4 * 0.5) / 60)
    assert row["Forwards, thousands mean"] == pytest.approx((200 * 4 * 2 + 5 * 4 * 2 * 25) / 1000)
    assert row["Final pictures, min"] == pytest.approx(8 * 0.5 / 60)


def test_the_violin_of_stops_is_their_density_and_names_the_number_of_runs(archive: RecordingArchive) -> None:
    outline = cost.outline_violin([50, 100, 100, 100, 200])
    assert outline is not None
    steps, widths = outline
    assert steps[widths.argmax()] == pytest.approx(100, rel=0.03)
    assert widths.max() == pytest.approx(0.4)
    assert steps[0] < 50 < 200 < steps[-1]
    np.testing.assert_allclose(widths, widths[::-1], atol=1e-6)  # the stops are symmetric in octaves
    assert cost.outline_violin([100, 100, 100]) is None
    assert cost.outline_violin([100, 200]) is None
    (plot,) = cost.table_1(archive).plots
    assert [panel.get_title() for panel in plot.figure.axes] == ["Textual Inversion, n = 3", "DreamBooth-LoRA, n = 3"]


def test_lost_runs_are_named_and_the_table_is_still_built(root: Path) -> None:
    archive = RecordingArchive.open(root)
    broken = RecordingArchive(archive.runs, {"textual-inversion/vase/0": "the disk was full"})
    result = cost.table_1(broken)
    assert any("textual-inversion/vase/0: the disk was full" in line for line in result.paragraphs)
    assert len(result.tables[0].data) == 14


# The ranking


def read_ranking(archive: RecordingArchive) -> list[RankedRule]:
    runs = archive.runs_of("textual-inversion")
    return compute_ranking(runs, dict.fromkeys(runs, tune_rules(archive.tuning_runs("textual-inversion"))))


def test_the_ranking_knows_the_oracle(archive: RecordingArchive) -> None:
    """Without noise the oracle of the other half is the oracle: nothing can rank before it."""
    runs = archive.runs_of("textual-inversion")
    ranking = read_ranking(archive)
    oracle = next(rule for rule in ranking if rule.rule == ORACLE_NAME)
    truth = [compute_oracle_step({"cup": 15.0, "mug": 20.0, "owl": 30.0}[run.concept]) for run in runs]
    np.testing.assert_allclose(np.log2(oracle.stops), np.log2(truth), atol=0.15)
    assert np.mean(oracle.errors) < 0.1
    assert ranking[0].rule == ORACLE_NAME
    random = next(rule for rule in ranking if rule.rule == "Random step")
    assert np.mean(random.errors) > 1
    assert {family.name for family in families.FAMILIES} < {rule.rule for rule in ranking}


def test_rules_are_ranked_by_where_they_stop_and_valued_by_what_they_keep(archive: RecordingArchive) -> None:
    """Baseline trains to its cap of 200 steps and keeps an earlier checkpoint."""
    runs = archive.runs_of("textual-inversion")
    ranking = {rule.rule: rule for rule in read_ranking(archive)}
    baseline = ranking["Baseline"]
    assert set(baseline.stops) == {200.0}
    for run, quality in zip(runs, baseline.outcomes, strict=True):
        curve = LearningCurve.of_run(run)
        steps, values = run.sample_scores(40)
        kept_step = int(steps[steps <= 200][values[steps <= 200].argmax()])
        assert kept_step < 200
        assert quality.distance == pytest.approx(np.log2(200 / curve.step_at()))
        assert quality.kept_distance == pytest.approx(np.log2(kept_step / curve.step_at()))
        assert quality.gain_kept == pytest.approx(curve.gain_at(kept_step))
    assert baseline.errors == [abs(quality.distance) for quality in baseline.outcomes]
    means = [np.mean(rule.errors) for rule in read_ranking(archive)]
    assert means == sorted(means)
    lines: list[str] = []
    table = rule_ranking.rank_rules(archive, lines.append).tables[0]
    count = sum(len(archive.tuning_runs(method)) for method in METHODS)
    assert sum(line.startswith("tuning on ") for line in lines) == count
    assert lines[-1].startswith("ranking the rules on ")
    assert "what they train to decides, and not what they keep" in table.caption
    (row,) = (row for row in table.data if row["rule"] == "Baseline")
    assert row["median"] > row["kept median"]


def test_a_half_without_a_gain_has_no_oracle_and_the_ranking_goes_on(tmp_path: Path) -> None:
    """The even images of one concept fall below their start; the odd ones, which are reported, rise."""
    for concept in ("cup", "mug"):
        write_fake_record(tmp_path, concept=concept, cap=CAP, learned=20.0)
    runs = RecordingArchive.open(tmp_path).runs
    runs[0].image_scores["train", "clip_image"][1:, 0::2] = 0.1
    ranking = {rule.rule: rule for rule in compute_ranking(runs, dict.fromkeys(runs, tune_rules(())))}
    assert [run.concept for run in ranking[ORACLE_NAME].runs] == ["mug"]
    assert compare_errors(ranking[ORACLE_NAME], ranking["Baseline"]).concepts == 1
    assert compare_errors(ranking["Baseline"], ranking[ORACLE_NAME]).concepts == 1


def test_a_rule_is_not_further_from_the_oracle_than_itself(archive: RecordingArchive) -> None:
    ranking = read_ranking(archive)
    same = compare_errors(ranking[0], ranking[0])
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert compare_errors(ranking[-1], ranking[0]).low > 0


def test_without_tuning_concepts_each_concept_is_tuned_on_all_others(archive: RecordingArchive) -> None:
    """What a rule has on a concept does not depend on that concept's own curves."""
    untuned = replace(archive, tuning_concepts=("no_such",))
    runs = untuned.runs_of("textual-inversion")
    held = runs[0]
    assert {run.concept for run in untuned.runs_to_tune_on(held.method, held.concept)} == {
        run.concept for run in runs if run is not held
    }
    result = rule_ranking.rank_rules(untuned)
    assert {family.name for family in families.FAMILIES} < {row["rule"] for row in result.tables[0].data}
    assert "for each concept on all others" in result.tables[0].caption
    costs = {row.strategy: row for row in cost_rows(untuned, "textual-inversion")}
    expected = [
        families.DVAR_FAMILY.strategy(
            cast(Any, families.tune_family(families.DVAR_FAMILY, untuned.runs_to_tune_on(run.method, run.concept))),
            strategies.baseline_cap(run),
        )
        for run in runs
    ]
    stops = [strategies.evaluate_strategy(strategy, run).stop for strategy, run in zip(expected, runs, strict=True)]
    assert [outcome.stop for outcome in costs["DVAR (tuned)"].results] == stops


def test_rules_that_read_a_series_which_a_run_lacks_are_named(archive: RecordingArchive) -> None:
    def drop(run: RecordedRun) -> RecordedRun:
        trace = Trace(run.trace.header)
        for record in run.trace.records:
            trace.record(**{name: value for name, value in record.items() if name != "stratified"})
        return replace(run, trace=trace)

    first, *rest = archive.runs
    assert rule_ranking._describe_unreadable(archive.runs) == []
    (sentence,) = rule_ranking._describe_unreadable([drop(first), *rest])
    assert sentence == (
        f"Left out, because {first.name} lacks a series that they read: DVAR, stratified draws, DVAR on both batches."
    )


def test_with_one_concept_alone_nothing_is_tuned(tmp_path: Path) -> None:
    write_fake_record(tmp_path, concept="vase", cap=CAP, learned=20.0)
    archive = RecordingArchive.open(tmp_path)
    result = rule_ranking.rank_rules(archive)
    assert any("No concept to tune on was recorded for Textual Inversion" in line for line in result.paragraphs)
    ranked = {row["rule"] for row in result.tables[0].data}
    assert ranked == {
        ORACLE_NAME,
        "Random step",
        "Baseline",
        "DVAR (paper's preset)",
        "DVAR (preset scaled in time)",
    }


def test_rules_are_not_ranked_on_a_method_that_is_not_eligible(tmp_path: Path) -> None:
    """Without enough recorded runs to judge by, what is known of the bundled model holds: not Custom Diffusion."""
    for method in ("textual-inversion", "custom-diffusion"):
        write_fake_record(tmp_path, method, "vase")
    archive = RecordingArchive.open(tmp_path)
    result = rule_ranking.rank_rules(archive)
    assert any("Custom Diffusion is not eligible" in line and "61 %" in line for line in result.paragraphs)
    assert {row["rule"] for table in result.tables[:-1] for row in table.data} >= {"Baseline", "Random step"}
    assert all("1 runs. Rules are ranked" in table.caption for table in result.tables[:-1])
    verdicts = [(row[0], row[-1]) for row in result.tables[-1].rows]
    assert verdicts == [("Textual Inversion", "yes"), ("Custom Diffusion", "no")]
    custom = replace(archive, runs=archive.runs_of("custom-diffusion"))
    with pytest.raises(RefusedInput, match="rules are ranked on no method here: Custom Diffusion is not eligible"):
        rule_ranking.rank_rules(custom)


# Figures


def test_correlations_of_curves_that_mirror_each_other(archive: RecordingArchive) -> None:
    run = archive.runs_of("textual-inversion")[0]
    for low, high in timesteps.INTERVALS.values():
        loss, score = timesteps.read_interval(run, "Train image score", low, high)
        assert np.corrcoef(loss, score)[0, 1] < -0.98
    cells = timesteps.table_3(archive).tables[0].data
    assert {row["interval"] for row in cells} == set(timesteps.INTERVALS)


def remove_stratified_draws(trace: Trace) -> Trace:
    bare = Trace(trace.header)
    for record in trace.records:
        bare.record(**{name: value for name, value in record.items() if name != "stratified"})
    return bare


def test_records_without_stratified_draws_are_refused(archive: RecordingArchive) -> None:
    runs = [replace(run, trace=remove_stratified_draws(run.trace)) for run in archive.runs_of("textual-inversion")]
    with pytest.raises(RefusedInput, match="no recorded run holds stratified draws"):
        timesteps.table_3(RecordingArchive(tuple(runs)))


def test_smaller_batches_are_parts_of_the_recorded_one(archive: RecordingArchive) -> None:
    run = archive.runs_of("textual-inversion")[0]
    assert [len(held_batch.split_batches(run, size)) for size in (1, 2, 4, 8)] == [8, 4, 2, 1]
    np.testing.assert_allclose(held_batch.mean_loss(run, list(range(8)))[1], run.trace.values)


def test_a_measure_is_what_the_rule_measures(archive: RecordingArchive) -> None:
    run = archive.runs_of("textual-inversion")[0]
    steps, values = other_rules.read_measure(run, other_rules.MEASURES["DVAR"].rule(50), "ratio")
    losses = run.trace.values[1:]  # the paper's rule has no value before the first step
    assert steps[0] == 51
    np.testing.assert_allclose(values[-1], losses[-50:].var() / losses.var())


def test_information_by_hand() -> None:
    random = np.random.default_rng(0)
    steps = np.arange(2000)
    noisy = measure_signal_to_noise(steps, 1.0 - 0.5 * (steps >= 1000) + 0.1 * random.standard_normal(2000))
    assert noisy.ratio == pytest.approx(5, rel=0.1)
    assert noisy.steps_to_detect == pytest.approx(2, rel=0.2)  # 2 (5 / 5)^2
    assert noisy.steps_label == "2"
    assert measure_signal_to_noise(steps, np.linspace(0, 1, 2000)).steps_label == "never"
    assert replace(noisy, gain=1e-3).steps_label == "over 10000"
    assert measure_signal_to_noise(steps, np.linspace(0, 1, 2000)).ratio == 0
    assert measure_signal_to_noise(steps, np.linspace(0, 1, 2000)).steps_to_detect == np.inf
    assert measure_signal_to_noise(5 * steps, 1.0 - steps / 2000).steps_to_detect == 5  # one evaluation, at its cadence


def test_images_are_those_of_the_nearest_scored_step(archive: RecordingArchive, report: Path) -> None:
    run = archive.runs_of("textual-inversion")[0]
    assert [samples.nearest_sheet_step(run, step) for step in (0, 9, 21, 41, 199, 240)] == [0, 20, 20, 60, 200, 200]
    plots = json.loads((report.parent / "figure12.json").read_text(encoding="utf-8"))["plots"]
    assert [plot["name"] for plot in plots] == [f"pictures-{method}" for method in METHODS]
    assert {(row["way"], row["record"]) for row in plots[0]["data"]} == {
        ("Baseline", "textual-inversion/cup/0"),
        ("DVAR (tuned)", "textual-inversion/cup/0"),
    }


def test_images_are_those_of_the_kept_steps_where_both_were_generated_again(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "records")
    archive = RecordingArchive.open(tmp_path / "records")
    for row in cost_rows(archive, "textual-inversion"):
        folder, kept_step = row.runs[0].folder, row.results[0].kept_step
        assert folder
        if row.strategy in ("Baseline", "DVAR (tuned)"):
            assert "its images on fresh seeds" not in samples.figure_12(archive).plots[0].caption
            write_sheet(sheet_path(folder, kept_step, RESCORED_SHEETS), [[Image.new("RGB", (16, 16), "red")] * 4] * 2)
    plot = samples.figure_12(archive).plots[0]
    assert "shown are its images on fresh seeds. " in plot.caption
    assert all(row["shown"] == row["kept"] for row in plot.data)
    assert "on fresh seeds" not in samples.figure_12(archive).plots[1].caption  # none of the other method was generated


def test_a_file_of_traces_has_no_images(report: Path) -> None:
    with pytest.raises(RefusedInput, match="no recorded run has kept its images"):
        samples.figure_12(read_traces(report.parent / "traces.npz"))


# Pages and sentences


def test_the_page_of_results_holds_every_section_and_its_images(report: Path, tmp_path: Path) -> None:
    results = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "build" / "results.py"))
    results["main"](report.parent, to=tmp_path)
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    for name in EXPERIMENTS:
        content = json.loads((report.parent / f"{name}.json").read_text(encoding="utf-8"))
        assert f"## {content['title']}" in page
        for table in content["tables"]:
            assert "| " + " | ".join(table["shown"]["columns"]) + " |" in page
    image_names = set(re.findall(r"\(results/([^)]+)\)", page))
    assert image_names == {path.name for path in (tmp_path / "results").iterdir()}
    assert max(path.stat().st_size for path in (tmp_path / "results").iterdir()) <= 200_000
    assert "Base model: the bundled model. Concepts: 3" in page
    assert "| Few iters (mean) | 0.801 ± 0.071 |" in page  # the paper's


def test_the_page_of_results_keeps_sections_that_were_not_repeated(report: Path, root: Path, tmp_path: Path) -> None:
    results = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "build" / "results.py"))
    results["main"](report.parent, to=tmp_path)
    before = results["read_sections"]((tmp_path / "results.md").read_text(encoding="utf-8"))
    images = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    (tmp_path / "results" / "figure8-stale.svg").write_text("<svg/>")
    records = tmp_path / "records"
    write_fake_record(records, concept="lone_mug", cap=80, learned=9.0)
    reproduce(ReproduceConfig(names=("figure8",), records=(str(records),), output_dir=str(tmp_path / "more")))
    results["main"](tmp_path / "more", to=tmp_path)
    after = results["read_sections"]((tmp_path / "results.md").read_text(encoding="utf-8"))
    assert list(after) == list(before) == ["records", *EXPERIMENTS]
    assert [name for name in after if after[name] != before[name]] == ["figure8"]
    changed = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    assert changed.keys() == images.keys()
    assert {name.split("-")[0] for name in changed if changed[name] != images[name]} == {"figure8"}
    assert "Not made" in after["panel"]
    page = tmp_path / "results.md"
    page.write_text(page.read_text(encoding="utf-8").replace(after["panel"], "\n## The panel\n\nFrom other records.\n"))
    results["main"](report.parent, to=tmp_path)
    assert "From other records." in page.read_text(encoding="utf-8"), "what cannot be made here stays as it was"


def test_a_pattern_that_is_not_found_is_negated() -> None:
    def sentence(mean: float, low: float, high: float, concepts: int = 6) -> str:
        return compare_with_paper(MeanInterval(mean, low, high, concepts), "water is wet", "water is dry", "by 3")

    assert sentence(1, 0.5, 2) == "As in the paper, water is wet (by 3)."
    assert sentence(-1, -2, -0.5) == "Unlike in the paper, water is dry (by 3)."
    for undecided in ((1, -0.5, 2), (-1, -2, 0.5), (1, 0, 2), (0, np.nan, np.nan)):
        assert sentence(*undecided) == "Whether, as in the paper, water is wet cannot be seen (by 3)."
    too_few = "On 5 concepts, too few to compare with the paper, water is"
    assert sentence(1, 0.5, 2, concepts=5) == f"{too_few} wet (by 3)."
    assert sentence(-1, -2, -0.5, concepts=5) == f"{too_few} dry (by 3)."
    single = MeanInterval(1, np.nan, np.nan, 1)
    assert compare_with_paper(single, "wet", "dry", "by 3").startswith("On 1 concept, too few")


def test_three_concepts_are_never_said_to_be_as_in_the_paper(report: Path) -> None:
    compared = 0
    for name in READ:
        content = json.loads((report.parent / f"{name}.json").read_text(encoding="utf-8"))
        for line in content["says"]:
            assert not re.search(r"(As|Unlike) in the paper", line), (name, line)
            compared += line.count("On 3 concepts, too few to compare with the paper")
    assert compared >= 15


CONCEPTS = tuple(f"thing_{letter}" for letter in "abcdefgh")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, short_baseline: object) -> RecordingArchive:
    """Enough concepts of one method for an interval."""
    root = tmp_path_factory.mktemp("many")
    for number, concept in enumerate(CONCEPTS):
        write_fake_record(root, concept=concept, cap=CAP, learned=15.0 + 2 * number, noise=0.002)
    return RecordingArchive.open(root)


def test_enough_concepts_are_compared_with_the_paper(many: RecordingArchive) -> None:
    """By construction L_det falls as the score rises, validation text falls, and nothing relapses."""
    (costs,) = cost.table_1(many).paragraphs
    assert "As in the paper, DVAR (tuned) takes less time than Baseline (minutes: " in costs
    (text,) = scores.figure_4(many).paragraphs
    assert text.startswith("Textual Inversion. As in the paper, Validation CLIP text falls in long training (the fall ")
    visible, low = convergence.figure_2(many).paragraphs
    assert visible.startswith(
        "As in the paper, in most runs L_det shows the fall and the training loss hides it (in 8 of"
    )
    assert low.startswith("As in the paper, in most runs L_det stays below its first value")
    assert "(in 8 of 8 runs of Textual Inversion)" in low


def test_a_text_score_that_rises_is_unlike_the_paper(many: RecordingArchive) -> None:
    def reverse(run: RecordedRun) -> RecordedRun:
        return replace(run, image_scores={of: 1 - values for of, values in run.image_scores.items()})

    (line,) = scores.figure_4(replace(many, runs=tuple(map(reverse, many.runs)))).paragraphs
    assert "Unlike in the paper, Validation CLIP text rises" in line
    half = (*many.runs[:4], *map(reverse, many.runs[4:]))
    (line,) = scores.figure_4(replace(many, runs=half)).paragraphs
    assert "Whether, as in the paper, Validation CLIP text falls in long training cannot be seen" in line


def test_table_3_compares_what_the_paper_pools(many: RecordingArchive) -> None:
    """Concepts with a higher loss have the higher score: along each run the correlation is -1, pooled it is not."""

    def shift(run: RecordedRun, number: int) -> RecordedRun:
        image_scores = {of: values + number for of, values in run.image_scores.items()}
        trace = Trace(run.trace.header)
        for record in run.trace.records:
            raised = (
                {"stratified": (np.array(record["stratified"]) + number).tolist()} if "stratified" in record else {}
            )
            trace.record(**{**record, **raised})
        return replace(run, image_scores=image_scores, trace=trace)

    apart = replace(many, runs=tuple(shift(run, number) for number, run in enumerate(many.runs)))
    result = timesteps.table_3(apart)
    assert "Unlike in the paper, image scores fall as L_det falls, pooled over concepts" in result.paragraphs[0]
    assert "Along a run the mean correlation is −0.99" in result.paragraphs[0] or "−1.00" in result.paragraphs[0]
    (row,) = (
        row for row in result.tables[0].data if (row["score"], row["interval"]) == ("Train image score", timesteps.FULL)
    )
    assert row["pooled mean"] > 0.9
    assert row["levels mean"] < -0.9
    assert "As in the paper, the intervals of a row differ little" in result.paragraphs[0]
    pairs = [timesteps.read_interval(run, "Train image score", 0, 1) for run in apart.runs]
    losses, values = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    assert row["pooled mean"] == pytest.approx(np.corrcoef(losses, values)[0, 1])


def test_seeds_of_a_concept_do_not_narrow_the_intervals_of_table_3(many: RecordingArchive) -> None:
    runs = [run for run in many.runs if run.method == "textual-inversion"]
    once = timesteps._correlate(runs, "Train image score", timesteps.FULL).pooled
    twice = timesteps._correlate([*runs, *runs], "Train image score", timesteps.FULL).pooled
    assert once.concepts == twice.concepts == len(runs)
    for name in ("mean", "low", "high"):
        assert getattr(twice, name) == pytest.approx(getattr(once, name))
    assert timesteps._measure_spread([*runs, *runs]).concepts == len(runs)


def test_the_spread_of_a_row_is_its_largest_less_its_least_correlation(archive: RecordingArchive) -> None:
    runs = archive.runs_of("textual-inversion")

    def pooled(score: str, interval: tuple[float, float]) -> float:
        pairs = [timesteps.read_interval(run, score, *interval) for run in runs]
        losses, values = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
        return float(np.corrcoef(losses, values)[0, 1])

    rows = [[pooled(score, interval) for interval in timesteps.INTERVALS.values()] for score in timesteps.SCORES]
    spread = max(max(row) - min(row) for row in rows)
    assert spread > 0
    assert timesteps._measure_spread(runs).mean == pytest.approx(spread)


def test_only_the_draws_of_an_interval_count(archive: RecordingArchive) -> None:
    """Draws at early timesteps have losses of 3 and more, late ones less than 0.3."""
    run = archive.runs_of("textual-inversion")[0]
    timesteps_drawn = np.array(run.trace.header["series"]["stratified"]["timesteps"])
    steps, values = run.series("stratified")
    at_start = {}
    for interval, (low, high) in timesteps.INTERVALS.items():
        loss, _ = timesteps.read_interval(run, "Train image score", low, high)
        inside = (timesteps_drawn >= 1000 * low) & (timesteps_drawn < 1000 * high)
        np.testing.assert_allclose(loss, np.interp(run.scored_steps, steps, values[:, inside].mean(axis=1)))
        at_start[interval] = loss[0]
    assert at_start["Begin (0–333)"] > 3 * at_start["End (666–1000)"]


def test_a_cell_of_table_3_is_the_correlation_on_its_interval(archive: RecordingArchive) -> None:
    runs = archive.runs_of("textual-inversion")
    means = {}
    for row in timesteps.table_3(archive).tables[0].data:
        pairs = [timesteps.read_interval(run, row["score"], *timesteps.INTERVALS[row["interval"]]) for run in runs]
        levels = [np.corrcoef(*pair)[0, 1] for pair in pairs]
        changes = [np.corrcoef(np.diff(loss), np.diff(score))[0, 1] for loss, score in pairs]
        assert row["levels mean"] == pytest.approx(np.mean(levels))
        assert row["changes mean"] == pytest.approx(np.mean(changes))
        means[row["score"], row["interval"]] = row["levels mean"]
    assert len(set(means.values())) == len(means) == 4 * 4


def test_the_octaves_between_two_stops_do_not_grow_with_the_number_of_batches() -> None:
    assert held_batch.measure_spread([100, 200, 800]) == pytest.approx((1 + 3 + 2) / 3)
    assert np.isnan(held_batch.measure_spread([100]))
    random = np.random.default_rng(0)

    def mean_spread(batches: int) -> float:
        samples = 100 * 2 ** random.standard_normal((4000, batches))
        return float(np.mean([held_batch.measure_spread(stops) for stops in samples]))

    # Two standard normal numbers are 2 / sqrt(pi) apart on average.
    for batches in (2, 4, 8):
        assert mean_spread(batches) == pytest.approx(2 / np.sqrt(np.pi), rel=0.04)


def test_stops_are_further_apart_on_smaller_batches_where_an_interval_says_so(many: RecordingArchive) -> None:
    """Every other sample alternates and falls late, so that batches of one stop apart, and batches of four alike."""
    assert "Whether, as in the paper" in held_batch.figure_8(many).paragraphs[0]

    def disturb(run: RecordedRun) -> RecordedRun:
        trace = Trace(run.trace.header)
        for record in run.trace.records:
            losses = np.array(record["eval"])
            losses[::2] *= 1 + 0.05 * (-1) ** record["step"] - 0.3 * (record["step"] >= 120)
            trace.record(**{**record, "eval": losses})
        return replace(run, trace=trace)

    result = held_batch.figure_8(replace(many, runs=tuple(map(disturb, many.runs))))
    assert (
        "As in the paper, stops are further apart on smaller batches (octaves between two stops: "
        in (result.paragraphs[0])
    )
    assert "between the earliest and the latest" not in result.tables[0].caption


def test_levels_at_the_oracle_are_compared_with_an_interval() -> None:
    random = np.random.default_rng(0)
    narrow, wide = (2 ** (spread * random.standard_normal(16)) for spread in (0.2, 3.0))
    measures = {"EMA percentile": wide, "Hall": wide, "Trend": wide, "DVAR": narrow}
    assert other_rules._compare_levels(measures).startswith("As in the paper, what DVAR measures at the oracle differs")
    assert other_rules._compare_levels({**measures, "DVAR": wide, "Hall": narrow}).startswith(
        "Unlike in the paper, what another rule measures"
    )
    assert other_rules._compare_levels({**measures, "Hall": narrow}).startswith("Whether, as in the paper, what DVAR")
    few = {name: of_measure[:5] for name, of_measure in measures.items()}
    assert other_rules._compare_levels(few).startswith("On 5 concepts, too few")


def test_the_best_word_is_not_compared_where_it_is_the_class_noun(many: RecordingArchive) -> None:
    for run in many:
        run.config["initializer_token"] = "mug"  # type: ignore[index]
    same = variants._compare_word("best word by CLIP", many.runs, many.runs)
    assert same == "The best word by CLIP is the class noun itself on every concept here, so that nothing is compared."
    others = [replace(run, config={**run.config, "initializer_token": "cat"}) for run in many]
    line = variants._compare_word("random word", [*others[:7], many.runs[7]], many.runs)
    assert line.startswith("As in the paper, the random word ends as well as the class noun (0.8")
    assert line.endswith("on 1 of 8 concepts it is the same word).")
    worse = [replace(run, image_scores={of: values - 0.1 for of, values in run.image_scores.items()}) for run in others]
    assert variants._compare_word("random word", worse, many.runs).startswith("Unlike in the paper, the random word")


def test_a_spread_by_hand() -> None:
    assert format_mean_sd([0.1, float("nan"), 0.3]) == "0.200 ± 0.100"
    assert format_mean_sd([-1.0], 1) == "−1.0", "one value has no spread"
    assert format_mean_sd([float("nan")]) == format_mean_sd([]) == "–"


def test_a_relapse_of_the_loss_is_described_with_its_gradient(tmp_path: Path) -> None:
    run = RecordedRun.open(write_fake_record(tmp_path, cap=60, learned=8.0))
    assert convergence.measure_relapse(run) is None
    trace = Trace(run.trace.header)
    for row in run.trace.records:
        loss = np.array(row["eval"]) * (1.1 if row["step"] >= 40 else 1.0)
        large = {"grad_norm": 500.0} if row["step"] == 38 else {}
        trace.record(**{**row, "eval": loss, **large})
    relapsed = replace(run, trace=trace)
    assert convergence.measure_relapse(relapsed) == pytest.approx(500 / np.median(relapsed.series("grad_norm")[1]))
    assert "(in 1 of 1 runs of Textual Inversion)" in convergence._compare_relapses([run])
    line = convergence._compare_relapses([run, relapsed])
    assert "in 1 of 2 runs of Textual Inversion; it rises above it in 1, within 30 steps of a gradient" in line


def test_a_caption_says_which_methods_were_recorded_on_fewer_concepts(tmp_path: Path) -> None:
    for method, concepts in zip(METHODS, (("cup", "mug", "owl"), ("cup", "mug")), strict=True):
        for concept in concepts:
            write_fake_record(tmp_path, method, concept, cap=60, learned=8.0)
    assert "Concepts: 3 (2 of DreamBooth-LoRA); seeds: 1." in str(Provenance.of(RecordingArchive.open(tmp_path).runs))


def test_text_cannot_become_markup_of_the_page(archive: RecordingArchive) -> None:
    experiment = Experiment("x", "<b>", "nothing", skip_training)
    page = render_page([(experiment, ExperimentResult(("<b>",), missing="<b>"))], ["<b>"])
    assert "<b>" not in page.replace("<b>Not made: </b>", "")
    assert page.count("&lt;b&gt;") == 5  # contents, heading, reason, paragraph and fact
    assert "2 seeds" not in str(Provenance.of(archive.runs))


def test_a_single_requested_experiment_is_refused_where_it_cannot_be_made(root: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="no recorded run of custom-diffusion"):
        reproduce(ReproduceConfig(names=("figure6",), records=(str(root),), output_dir=str(tmp_path)))


def test_the_page_defines_every_colour_and_font_that_it_uses() -> None:
    style = render_page([], ())
    used = set(re.findall(r"var\((--[a-z-]+)\)", style))
    assert used
    assert used <= set(re.findall(r"(--[a-z-]+):", style))
