"""Runs that are recorded elsewhere: they are left out if they are the same recordings, and refused if they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import dvar
from fake_record import write_fake_record

from dvar import mini
from dvar.diffusion.backbone import load_backbone
from dvar.errors import RefusedInput
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.archive_file import open_records, write_traces
from dvar.recordings.config import RecordConfig
from dvar.recordings.elsewhere import find_recorded
from dvar.recordings.panel_plan import format_stages, plan_panel
from dvar.recordings.protocol import PROTOCOLS
from dvar.recordings.spec import RecordingSpec


@pytest.fixture(scope="module")
def header() -> dict[str, Any]:
    protocol = {"name": "panel", "version": PROTOCOLS["panel"].version}
    return {"protocol": protocol, "base": load_backbone(mini.path()).digest}


@pytest.fixture
def specs(tmp_path: Path) -> list[RecordingSpec]:
    """Two recordings at four times the preset's rate, the shortest ones of the panel."""
    ((_, planned), *_) = plan_panel(RecordConfig(panel="shift", records=str(tmp_path / "here"))).items()
    return [spec for spec in planned if spec.config.max_train_steps < 1000][:2]


def write(spec: RecordingSpec, folder: Path, header: dict[str, Any], cap: int | None = None) -> None:
    cap = cap or spec.config.max_train_steps
    write_fake_record(folder, spec.method, spec.concept, cap=cap, setting=spec.setting, header=header)


def test_what_a_file_of_traces_has_is_left_out(
    specs: list[RecordingSpec], header: dict[str, Any], tmp_path: Path
) -> None:
    write(specs[0], tmp_path / "there", header)
    traces = write_traces(RecordingArchive.open(tmp_path / "there"), tmp_path / "traces" / "first.npz")
    for source in (traces, traces.parent, tmp_path / "there"):
        assert list(find_recorded(specs, [str(source)])) == [specs[0].name_in_records]
    (stage, planned), *_ = plan_panel(RecordConfig(panel="shift", records=str(tmp_path / "here"))).items()
    (line,) = format_stages({stage: planned}, {}, find_recorded(planned, [str(traces)]))
    assert line.endswith("1 of 32 recorded")


@pytest.mark.parametrize(
    ("difference", "change"),
    [
        ("max_train_steps", {"cap": 20}),
        ("protocol", {"protocol": {"name": "panel", "version": 0}}),
        ("base model", {"base": "another"}),
        ("pairing of images", {"pairing": "row by row"}),
    ],
)
def test_a_run_under_other_conditions_is_refused_by_name(
    specs: list[RecordingSpec], header: dict[str, Any], tmp_path: Path, difference: str, change: dict[str, Any]
) -> None:
    cap = change.pop("cap", None)
    write(specs[0], tmp_path / "there", header | change, cap)
    with pytest.raises(RefusedInput, match=f"got another {difference} in {specs[0].name_in_records}: name other"):
        find_recorded(specs, [str(tmp_path / "there")])
    assert find_recorded(specs[1:], [str(tmp_path / "there")]) == {}, "other runs do not matter"


def test_a_run_of_the_same_name_under_another_preset_is_refused(
    specs: list[RecordingSpec], header: dict[str, Any], tmp_path: Path
) -> None:
    write(specs[0], tmp_path / "there", header)
    path = next((tmp_path / "there").glob("*/*/*/config.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank": 64, "lr_warmup_steps": 7}))
    with pytest.raises(RefusedInput, match="got another lr_warmup_steps in"):
        find_recorded(specs, [str(tmp_path / "there")])


def test_the_command_records_nothing_that_is_elsewhere(tmp_path: Path) -> None:
    method, concept = "textual-inversion", "red_bird"
    config = ["record", method, "--concepts", concept, "--records", tmp_path / "here"]
    write_fake_record(tmp_path / "there", method, concept)
    answer = dvar(*config, "--skip_recorded", tmp_path / "there")
    assert answer.status == 2
    assert "must hold the same recordings, got another protocol in textual-inversion/red_bird/0" in answer.err
    answer = dvar(*config, "--skip_recorded", tmp_path / "nowhere")
    assert answer.status == 2
    assert "there are no recorded runs in" in answer.err
    assert not (tmp_path / "here").exists()


def test_a_folder_with_runs_and_files_of_traces_is_read_whole(tmp_path: Path) -> None:
    for folder, concept, cap in (("a", "red_mug", 30), ("b", "red_cat", 30), ("c", "red_mug", 40)):
        write_fake_record(tmp_path / folder, concept=concept, cap=cap)
    both = tmp_path / "a"
    write_traces(RecordingArchive.open(tmp_path / "b"), both / "second.npz")
    write_traces(RecordingArchive.open(tmp_path / "c"), both / "first.npz")
    assert {run.concept: run.cap for run in open_records(both)} == {"red_mug": 30, "red_cat": 30}
    only = tmp_path / "traces"
    write_traces(RecordingArchive.open(tmp_path / "a"), only / "1.npz")
    write_traces(RecordingArchive.open(tmp_path / "c"), only / "2.npz")
    assert {run.concept: run.cap for run in open_records(only)} == {"red_mug": 30}
    with pytest.raises(RefusedInput, match="there are no recorded runs"):
        open_records(tmp_path / "nothing")
