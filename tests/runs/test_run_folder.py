"""Reading the folder of a run, finished or not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from fake_run import CONFIG, falling_loss, generate_trace, write_run

from dvar.errors import RefusedInput, TraceError
from dvar.runs.run_folder import RunFolder
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rules import Dvar
from dvar.stopping.trace import Trace


def test_a_finished_run_is_read_back_completely(run_folder: Path) -> None:
    run = RunFolder.open(run_folder)
    assert run.result is not None
    assert run.verdict.reason is Reason.STABILISED
    assert run.steps == run.verdict.step == run.trace.last_step
    assert run.config == CONFIG
    assert [path.name for path in run.references] == ["00.png", "01.png", "02.png", "03.png"]
    assert list(run.samples) == [*range(0, run.steps, 60), run.steps]
    assert {len(images) for images in run.samples.values()} == {4}
    assert [prompt["seed"] for prompt in run.prompts] == [0, 1, 2, 3]


def test_an_unfinished_run_is_judged_by_its_settings_on_what_it_has_recorded(tmp_path: Path) -> None:
    trace = generate_trace(steps=200)
    run = RunFolder.open(write_run(tmp_path, trace, finished=False))
    assert run.result is None
    assert run.steps == 200
    assert run.verdict == Dvar(CONFIG["window"], CONFIG["threshold"])(trace)


def test_a_run_that_has_written_only_its_settings_is_empty(tmp_path: Path) -> None:
    write_run(tmp_path, Trace(), finished=False, sampled_every=0, images=0)
    (tmp_path / "trace.jsonl").unlink()
    run = RunFolder.open(tmp_path)
    assert (run.steps, len(run.trace), run.samples, run.references, run.best) == (0, 0, {}, (), None)


def test_the_replayed_ratios_are_those_of_the_live_rule(tmp_path: Path) -> None:
    trace = generate_trace(probe_every=5)
    run = RunFolder.open(write_run(tmp_path, trace))
    live = [Dvar(CONFIG["window"], CONFIG["threshold"])(trace.cut(int(step))).metrics["ratio"] for step in trace.steps]
    warming = trace.steps < CONFIG["window"]
    assert np.isnan(run.ratios[warming]).all()
    np.testing.assert_array_equal(run.ratios[~warming], np.array(live)[~warming])
    assert run.ratios[-1] == run.verdict.metrics["ratio"] < CONFIG["threshold"]


def test_there_is_no_ratio_from_a_lost_value_on(tmp_path: Path) -> None:
    trace = generate_trace(lambda step: math.nan if step == 170 else falling_loss(step), steps=180)
    ratios = RunFolder.open(write_run(tmp_path, trace, finished=False)).ratios
    assert np.isfinite(ratios[160:170]).all()
    assert np.isnan(ratios[170:]).all()


def test_the_lowest_step_ignores_lost_values(tmp_path: Path) -> None:
    trace = generate_trace(lambda step: {40: 0.001, 50: -math.inf, 60: math.nan}.get(step, 0.04), steps=80)
    step, value = RunFolder.open(write_run(tmp_path, trace, finished=False)).best or (None, math.nan)
    assert step == 40
    assert value == pytest.approx(0.001, rel=1e-3)


def test_seconds_are_those_of_the_result_or_else_of_the_records(tmp_path: Path) -> None:
    # step 0 probes and does not train; then each step trains 0.21 s, probes 0.12 s and spends 0.01 s on the rest
    expected = {"train": 20 * 0.21, "probe": 21 * 0.12, "other": 21 * 0.01}
    unfinished = RunFolder.open(write_run(tmp_path / "a", generate_trace(steps=20), finished=False))
    finished = RunFolder.open(write_run(tmp_path / "b", generate_trace(steps=20)))
    assert unfinished.seconds == pytest.approx(expected)
    assert finished.seconds == pytest.approx(expected)
    # (20 * 0.21 + 21 * 0.01) / 20 seconds a step without the probe, over 1000 steps
    assert finished.seconds_to_cap == pytest.approx(220.5)


def test_a_folder_that_holds_no_run_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match=r"config\.json.*--output_dir of a run") as refused:
        RunFolder.open(tmp_path)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("name", ["config.json", "result.json", "samples/prompts.json"])
def test_damaged_json_is_refused_by_name(run_folder: Path, name: str) -> None:
    (run_folder / name).write_text('{"torn": ')
    with pytest.raises(RefusedInput, match=name):
        RunFolder.open(run_folder)


def test_a_result_that_names_no_weights_is_refused(run_folder: Path) -> None:
    path = run_folder / "result.json"
    path.write_text(path.read_text().replace('"weights"', '"weighss"'))
    with pytest.raises(RefusedInput, match=r"result.json.*weights"):
        RunFolder.open(run_folder)


def test_a_damaged_trace_is_refused(run_folder: Path) -> None:
    (run_folder / "trace.jsonl").write_text("no trace\n")
    with pytest.raises(TraceError, match=r"trace\.jsonl"):
        RunFolder.open(run_folder)


def test_a_result_of_an_older_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """Older verdicts hold their diagnoses as sentences, without numbers."""
    folder = write_run(tmp_path, generate_trace())
    result = json.loads((folder / "result.json").read_text())
    for damage in ({"diagnoses": ["still falling: ..."]}, {"reason": "unheard of"}, {"diagnoses": None}):
        old = result | {"verdict": result["verdict"] | damage}
        (folder / "result.json").write_text(json.dumps(old))
        with pytest.raises(RefusedInput, match=r"result.json: a saved verdict must be of this version .* `dvar replay"):
            _ = RunFolder.open(folder).verdict
    (folder / "result.json").unlink()
    assert RunFolder.open(folder).verdict.sentence == result["verdict"]["sentence"]
