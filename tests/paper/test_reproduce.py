"""``dvar reproduce`` from its arguments to its files and refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_record import write_fake_record

from dvar.cli.main import main
from dvar.mini import TUNING
from dvar.paper import reproduce
from dvar.paper.config import ReproduceConfig
from dvar.recordings import rescore, sweep
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.archive_file import write_traces
from dvar.recordings.recorded_run import RecordedRun, RescoredRun
from dvar.recordings.spec import RecordingSpec
from dvar.recordings.sweep import RecordingStatus

METHODS = ("textual-inversion", "dreambooth-lora", "custom-diffusion")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[RecordingSpec]:
    """The recordings that were requested; each is replaced by a fake run at once."""
    requested: list[RecordingSpec] = []

    def record(recordings: Sequence[RecordingSpec], notify: object, **_: object) -> list[RecordingStatus]:
        requested.extend(recordings)
        for spec in recordings:
            write_fake_record(Path(spec.records), spec.method, spec.concept, spec.seed, cap=60, learned=8.0)
        return [RecordingStatus(spec, "done") for spec in recordings]

    monkeypatch.setattr(sweep, "record_missing", record)
    return requested


def test_one_figure_is_made_from_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fake_record(tmp_path / "records", cap=60, learned=8.0)
    out = tmp_path / "out"
    assert main(["reproduce", "figure1", "--records", str(tmp_path / "records"), "--output_dir", str(out)]) == 0
    output = capsys.readouterr()
    assert output.out.strip() == str(out / "report.html")
    assert "dvar: figure1: Figure 1" in output.err
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "report.json",
        "figure1.json",
        *(f"figure1-convergence-textual-inversion.{kind}" for kind in ("svg", "png")),
    }


def test_table_1_has_its_checkpoints_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for concept in ("cup", "mug"):
        write_fake_record(tmp_path / "records", concept=concept, cap=60, learned=8.0)

    def rescore_runs(
        archive: RecordingArchive, steps_by_run: Mapping[RecordedRun, set[int]], notify: object, ray: str | None
    ) -> RecordingArchive:
        def score(run: RecordedRun, steps: list[int]) -> RescoredRun:
            return RescoredRun(np.array(steps), {of: np.ones((len(steps), 8)) for of in run.image_scores})

        return replace(archive, rescored={run.name: score(run, sorted(steps)) for run, steps in steps_by_run.items()})

    monkeypatch.setattr(rescore, "rescore_archive", rescore_runs)
    words = ["reproduce", "table1", "--records", str(tmp_path / "records"), "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    table = json.loads((tmp_path / "out" / "table1.json").read_text(encoding="utf-8"))["tables"][0]
    assert "on new images of as many seeds that chose nothing, the same for all strategies." in table["caption"]
    assert {row["Train CLIP img mean"] for row in table["rows"]} == {1.0}


def test_an_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "figure3"]) == 2
    assert "there is no experiment 'figure3': the nearest is figure" in capsys.readouterr().err


def test_without_records_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["reproduce", "all", "--records", str(tmp_path / "none"), "--output_dir", str(out)]) == 2
    assert f"there are no recorded runs in {tmp_path / 'none'}" in capsys.readouterr().err
    assert not out.exists()


def test_a_quick_report_records_what_it_needs_where_there_are_no_records(
    tmp_path: Path, recorded: list[RecordingSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    records, out = tmp_path / "records", tmp_path / "out"
    words = ["reproduce", "figure2", "--quick", "--records", str(records), "--output_dir", str(out)]
    assert main(words) == 0
    assert {spec.protocol for spec in recorded} == {"quick"}
    assert {Path(spec.records) for spec in recorded} == {records / "quick"}
    by_method = {method: [spec.concept for spec in recorded if spec.method == method] for method in METHODS}
    for concepts in by_method.values():
        assert [concept in TUNING for concept in concepts] == [False, False, True]
    assert "dvar: 9 done" in capsys.readouterr().err
    # The second time it goes through them again, which records what is missing.
    recorded.clear()
    assert main(words) == 0
    assert len(recorded) == 9


def test_what_changes_nothing_is_recorded_once_for_tables_and_variants(
    tmp_path: Path, recorded: list[RecordingSpec]
) -> None:
    config = ReproduceConfig(quick=True, records=(str(tmp_path / "records"),), output_dir=str(tmp_path / "out"))
    reproduce.record_missing_runs(replace(config, names=("table1", "initial", "sam")), lambda line: None)
    varied = [spec for spec in recorded if dict(spec.settings)]
    assert [dict(spec.settings).get("initializer", "sam") for spec in varied] == ["random", "clip", "clip-worst", "sam"]
    usual = [spec for spec in recorded if spec not in varied]
    assert len({(spec.method, spec.concept) for spec in usual}) == len(usual) == 9
    assert len({spec.records for spec in usual}) == 1
    recorded.clear()
    reproduce.record_missing_runs(replace(config, names=("sam",)), lambda line: None)  # which records its own
    assert [spec.records.endswith("runs/variants/usual/quick") for spec in recorded] == [True, False]


def test_a_quick_report_of_whole_recordings_reads_a_few_and_records_none(
    tmp_path: Path, recorded: list[RecordingSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    for concept in ("cup", "jar", "jug", "mug", "owl", "pot", "vase", TUNING[0]):
        write_fake_record(tmp_path / "records", concept=concept, cap=60, learned=8.0)
    words = ["reproduce", "figure1", "--quick", "--records", str(tmp_path / "records")]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    assert not recorded
    assert "Concepts: 6" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_quick_leaves_out_no_run_that_settings_are_tuned_on(tmp_path: Path) -> None:
    for seed in range(reproduce.QUICK + 1):
        write_fake_record(tmp_path, concept=TUNING[0], seed=seed, cap=60, learned=8.0)
    write_fake_record(tmp_path, concept="cup", cap=60, learned=8.0)
    archive = reproduce.open_archive(ReproduceConfig(names=("rules",), quick=True, records=(str(tmp_path),)))
    assert len(archive.tuning_runs("textual-inversion")) == reproduce.QUICK + 1


def test_records_may_be_in_several_folders(tmp_path: Path) -> None:
    for concept in ("cup", "mug"):
        write_fake_record(tmp_path / "old", concept=concept, cap=60, learned=8.0)
    write_fake_record(tmp_path / "new", concept="mug", cap=60, learned=8.0, images=16)
    write_fake_record(tmp_path / "new", concept="owl", cap=60, learned=8.0)
    traces, out = write_traces(RecordingArchive.open(tmp_path / "old"), tmp_path / "traces.npz"), tmp_path / "out"
    words = ["reproduce", "figure14", "--records", str(tmp_path / "new"), "--records", str(traces)]
    assert main([*words, "--output_dir", str(out)]) == 0
    facts = json.loads((out / "report.json").read_text(encoding="utf-8"))["facts"]
    assert "Concepts: 3;" in facts[0]
    assert "8 or 16 images of each kind" in facts[0]


def test_an_experiment_that_reads_no_records_records_none(tmp_path: Path, recorded: list[RecordingSpec]) -> None:
    assert main(["reproduce", "table2", "--quick", "--output_dir", str(tmp_path)]) == 0
    assert not recorded
