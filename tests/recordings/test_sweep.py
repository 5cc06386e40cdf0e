"""Sweeps of the tiny model: each run is a real process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_record import write_fake_record
from hypothesis import given
from hypothesis import strategies as st

from dvar.cluster.local import list_slots
from dvar.cluster.places import Places
from dvar.errors import ModelError, RefusedInput
from dvar.locks import lock_folder
from dvar.recordings import cost, sweep
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.cost import (
    ROUGH_UNITS,
    estimate_seconds,
    estimate_seconds_left,
    extrapolate_seconds_left,
    measure_unit_seconds,
)
from dvar.recordings.protocol import PROTOCOLS
from dvar.recordings.recorded_run import RecordedRun
from dvar.recordings.spec import RecordingSpec, read_conditions
from dvar.recordings.sweep import (
    RecordingStatus,
    format_protocol,
    format_statuses,
    read_status,
    record_missing,
    run_sweep,
    validate_recordings,
)
from dvar.testing import tiny_clip, tiny_concept

SETTINGS: dict[str, Any] = {
    "resolution": 32,
    "num_inference_steps": 2,
    "num_validation_images": 1,
    "max_train_steps": 84,
    "window": 8,
}


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RecordingSpec:
    folder = tmp_path_factory.mktemp("bench")
    for name in ("ball", "other"):
        tiny_concept(folder / "concepts" / name, images=2)
        (folder / "concepts" / f"{name}.json").write_text('{"noun": "mug"}')
    paths: dict[str, Any] = {
        "model": str(tiny_model),
        "concepts": str(folder / "concepts"),
        "clip": str(tiny_clip(folder / "clip")),
    }
    return RecordingSpec("textual-inversion", "ball", protocol="quick", settings=tuple(SETTINGS.items()), **paths)


def list_four_runs(base: RecordingSpec, records: Path) -> list[RecordingSpec]:
    """Return recordings of two concepts with two seeds each, seed by seed."""
    return [
        replace(base, records=str(records), concept=concept, seed=seed)
        for seed in (0, 1)
        for concept in ("ball", "other")
    ]


def write_program(recording: RecordingSpec, status: int = 0, output: str = "") -> str:
    """Return a program that stands in for a recording: it marks that it ran, prints something and ends."""
    return f"import sys; open({str(recording.folder / 'ran')!r}, 'a').write('x'); print({output!r}); sys.exit({status})"


STAND_IN = """
import json, sys
task, answers = json.loads(sys.stdin.readline()), sys.stdout
sys.stdout = sys.stderr  # which is the log of the task
try:
    exec(json.loads(sys.argv[1])[task["argument"]])
except SystemExit as end:
    if end.code:
        raise
print(json.dumps({"report": "done"}), file=answers, flush=True)
"""


@contextmanager
def handle_signal(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Set a signal's handler, whatever these tests were started under, and check that it is still there at the end."""
    before = signal.signal(number, handler)
    try:
        yield
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Programs by the recording, as JSON, that they stand in for."""
    programs: dict[str, str] = {}
    start = subprocess.Popen

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return start([command[0], "-c", STAND_IN, json.dumps(programs)], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return programs


@pytest.mark.slow
def test_a_sweep_records_what_is_missing_or_damaged_and_nothing_else(
    base: RecordingSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lines = replace(base, records=str(tmp_path)), list[str]()
    rows = run_sweep([run], notify=lines.append)
    assert [row.state for row in rows] == ["done"], rows
    assert lines[-1].startswith("1 of 1 runs, 100 %")
    assert len(RecordingArchive.open(tmp_path)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "start_pool", None)  # nothing may be made
        assert [row.state for row in run_sweep([run])] == ["done"]
    first_time = (run.folder / "done.json").stat().st_mtime_ns
    (run.folder / "scores.json").write_text("{}")
    row = read_status(run)
    assert row.state == "missing"
    assert "scores.json is not what was recorded" in row.reason
    assert [row.state for row in run_sweep([run])] == ["done"]
    assert (run.folder / "done.json").stat().st_mtime_ns > first_time
    RecordedRun.open(run.folder)


@pytest.mark.slow
def test_recordings_that_one_process_makes_are_those_that_each_makes_alone(base: RecordingSpec, tmp_path: Path) -> None:
    together, separate = (
        [replace(base, records=str(tmp_path / name), concept=concept) for concept in ("ball", "other")]
        for name in ("together", "separate")
    )
    assert [row.state for row in run_sweep(together, places=Places(1))] == ["done", "done"]
    for run in separate:
        run_sweep([run], places=Places(1))
    for first, second in zip(together, separate, strict=True):
        assert list_measurements(first) == list_measurements(second)


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_recordings_of_a_ray_cluster_are_those_of_local_processes(base: RecordingSpec, tmp_path: Path) -> None:
    import ray

    local, remote = (replace(base, records=str(tmp_path / name), concept="ball") for name in ("local", "remote"))
    assert [row.state for row in run_sweep([local], places=Places(1))] == ["done"]
    places = Places(1, ray="auto")
    try:
        assert places.problems(tmp_path) == []
        assert [row.state for row in run_sweep([remote], places=places)] == ["done"]
    finally:
        ray.shutdown()
    assert list_measurements(local) == list_measurements(remote)


def list_measurements(recording: RecordingSpec) -> list[dict[str, Any]]:
    """Return all that a recording has measured but seconds."""
    rows = [dict(row) for row in RecordedRun.open(recording.folder).trace.records]
    rows += json.loads((recording.folder / "scores.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_run_that_fails_is_a_row_with_its_reason_and_is_tried_again(
    base: RecordingSpec, tmp_path: Path, programs: dict[str, str]
) -> None:
    runs = list_four_runs(base, tmp_path)
    programs_in_order = [
        write_program(runs[0], 1, "a note\ndvar: the loss was not finite"),
        "import os; os.kill(os.getpid(), 9)",
        write_program(runs[2], 130),
        write_program(runs[3], 3),
    ]
    programs |= {run.to_json(): program for run, program in zip(runs, programs_in_order, strict=True)}
    rows = run_sweep(runs, places=Places(2))
    assert [(row.state, row.reason) for row in rows[:2]] == [
        ("failed", "the loss was not finite"),
        ("failed", "killed by SIGKILL"),
    ]
    assert rows[2].state == "missing"
    assert (rows[3].state, rows[3].reason) == ("failed", "ended with status 3 and said nothing")
    lines = list(format_statuses(rows))
    assert lines[-1] == "3 failed, 1 missing"
    assert "textual-inversion/ball/0" in lines[0]
    assert "failed  the loss was not finite" in lines[0]
    run_sweep(runs, places=Places(2))
    assert (runs[0].folder / "ran").read_text() == "xx"


def test_a_run_that_another_process_records_gets_no_failure_written_into_its_folder(
    base: RecordingSpec, tmp_path: Path, programs: dict[str, str]
) -> None:
    run = replace(base, records=str(tmp_path))
    programs[run.to_json()] = write_program(run, 1, "dvar: the folder is being written by process 1")
    with lock_folder(run.folder):
        run_sweep([run], places=Places(1))
        assert not (run.folder / "failed.json").exists()
    run_sweep([run], places=Places(1))
    assert (run.folder / "failed.json").exists()


def test_unit_seconds_are_measured_before_a_sweep_and_kept_with_its_recordings(
    base: RecordingSpec, tmp_path: Path, programs: dict[str, str]
) -> None:
    root = tmp_path / "not" / "there yet"
    run, lines = replace(base, records=str(root)), list[str]()
    programs |= {run.to_json(): write_program(run, 1)}
    record_missing([run], lines.append, only_estimate=True)
    assert not (root / "seconds.json").exists()
    record_missing([run], lines.append)
    prices = json.loads((root / "seconds.json").read_text())
    assert prices.keys() == {"textual-inversion"}
    assert prices["textual-inversion"].keys() == {"start_up", "train", "forward", "picture"}
    (root / "seconds.json").write_text("[3]")
    with pytest.raises(RefusedInput, match="must be JSON, and is not"):
        record_missing([run], lines.append, only_estimate=True)
    (root / "seconds.json").write_text('{"textual-inversion": {"train": 1.0}, "dreambooth-lora": {"train": 2.0}}')
    record_missing([run], lines.append)
    saved = json.loads((root / "seconds.json").read_text())
    assert saved == {"textual-inversion": {"train": 1.0}, "dreambooth-lora": {"train": 2.0}}


def test_a_sweep_under_nohup_outlives_its_terminal(
    base: RecordingSpec, tmp_path: Path, programs: dict[str, str]
) -> None:
    run = replace(base, records=str(tmp_path))
    programs[run.to_json()] = write_program(run)
    with handle_signal(signal.SIGHUP, signal.SIG_IGN):
        run_sweep([run], notify=lambda line: signal.raise_signal(signal.SIGHUP))
    assert (run.folder / "ran").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_sweep_asks_its_runs_to_save_and_starts_no_more(
    number: signal.Signals, base: RecordingSpec, tmp_path: Path, programs: dict[str, str]
) -> None:
    runs = list_four_runs(base, tmp_path)
    program = (
        "import signal, sys; signal.signal(15, lambda *_: (open({0!r}, 'w'), sys.exit(130))); print(1); signal.pause()"
    )
    programs |= {run.to_json(): program.format(str(run.folder / "asked")) for run in runs}

    def interrupt(line: str) -> None:
        # Called after a while without an end: the first run has had the time to report that it listens.
        while not (runs[0].folder / "record.log").read_text():
            pass
        signal.raise_signal(number)

    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    with handle_signal(number, usual), pytest.raises(KeyboardInterrupt):
        run_sweep(runs, places=Places(1), notify=interrupt, every=0.2)
    assert [(run.folder / "asked").exists() for run in runs] == [True, False, False, False]


def test_two_processes_do_not_record_one_run_at_once(base: RecordingSpec, tmp_path: Path) -> None:
    from dvar.locks import lock_folder
    from dvar.recordings.record import record_run

    run = replace(base, records=str(tmp_path))
    with lock_folder(run.folder), pytest.raises(RefusedInput, match="is being written by process"):
        record_run(run)


def test_every_problem_is_named_before_the_first_run(base: RecordingSpec, tmp_path: Path) -> None:
    specs = [replace(base, concept="bal"), replace(base, method="lora"), replace(base, concept="balll")]
    with pytest.raises(RefusedInput) as refused:
        validate_recordings(specs)
    assert len(refused.value.problems) == 3
    with pytest.raises(ModelError, match="does not load as a CLIP"):
        validate_recordings([replace(base, clip=str(tmp_path))])
    validate_recordings([base])


def test_the_judges_are_tried_on_the_images_of_the_first_recording(base: RecordingSpec, tmp_path: Path) -> None:
    tiny_concept(tmp_path / "more", images=4)
    (tmp_path / "more.json").write_text('{"noun": "mug"}')
    shutil.copytree(str(base.concepts), tmp_path, dirs_exist_ok=True)
    validate_recordings([replace(base, concept=name, concepts=str(tmp_path)) for name in ("ball", "more")])


def test_an_estimate_counts_all_that_is_measured(
    base: RecordingSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = {"start_up": 0.0, "train": 0.0, "forward": 0.0, "picture": 0.0}
    longer = tuple((SETTINGS | {"max_train_steps": 167}).items())
    plan, run = PROTOCOLS["quick"], replace(base, records=str(tmp_path), settings=longer)
    cap = run.config.max_train_steps
    assert cap == 20
    assert estimate_seconds(run, {**units, "start_up": 3.0}) == 3
    assert estimate_seconds(run, {**units, "train": 2.0}) == 2 * cap
    # 21 evaluations of 8; at steps 0 and 20 32, and 8 fresh ones by two models; at step 0 8 class pictures.
    twice = replace(run, settings=(*run.settings, ("train_batch_size", 2 * run.config.train_batch_size)))
    assert estimate_seconds(twice, {**units, "train": 2.0}) == 4 * cap
    assert estimate_seconds(run, {**units, "forward": 1.0}) == 21 * 8 + 2 * (32 + 16) + 8
    with_unseen = replace(run, model="mini", concepts=None, concept="black_cat")
    assert estimate_seconds(with_unseen, {**units, "forward": 1.0}) == 21 * 8 + 2 * (32 + 16 + 8) + 8
    # 2 parts, and the sample image of the end, generated in 2 steps instead of 10.
    images = len(run.scored_steps) * 2 * plan.prompts * plan.seeds
    assert estimate_seconds(run, {**units, "picture": 1.0}) == pytest.approx(images + 0.2)
    # The same for all rounds; a finished run needs only those that it lacks.
    monkeypatch.setitem(PROTOCOLS, "quick", replace(plan, rounds=3))
    assert estimate_seconds(run, {**units, "picture": 1.0}) == pytest.approx(3 * images + 0.2)
    assert estimate_seconds_left(run, {**units, "picture": 1.0}) == pytest.approx(3 * images + 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(cost, "_trained_share", lambda recording: 0.75)
        seconds = estimate_seconds_left(run, {**units, "picture": 1.0, "train": 1.0, "start_up": 3.0})
        assert seconds == pytest.approx(3 + 0.25 * (cap + images + 0.2) + 2 * images)
        patch.setattr(cost, "_trained_share", lambda recording: 1.0)
        assert estimate_seconds_left(run, {**units, "picture": 1.0, "train": 1.0, "start_up": 3.0}) == 2 * images + 3
    measured = measure_unit_seconds(run)
    assert measured.keys() == units.keys()
    assert min(measured.values()) > 0
    assert not run.folder.exists()
    monkeypatch.setattr(cost, "_median_seconds", lambda work, count: 12.0)
    per_unit = measure_unit_seconds(run)
    # An update is one; the probe is 8 samples; 2 prompts with 2 seeds are generated at once.
    assert (per_unit["train"], per_unit["forward"], per_unit["picture"]) == (12.0, 12 / 8, 12 / 4)


@given(st.floats(0, 1), st.floats(1, 1e5), st.integers(1, 8), st.floats(1, 100))
def test_time_left_begins_as_estimated_and_ends_as_measured(
    part: float, in_all: float, at_once: int, slow: float
) -> None:
    done = part * in_all
    assert extrapolate_seconds_left(done, in_all, done / at_once, at_once) == pytest.approx((in_all - done) / at_once)
    measured, expected = slow * (in_all - done) / at_once, (in_all - done) / at_once
    seconds = extrapolate_seconds_left(done, in_all, slow * done / at_once, at_once)
    assert seconds is not None
    assert expected * 0.999 <= seconds <= measured * 1.001
    assert part < 0.5 or seconds == pytest.approx(measured, rel=0.1)
    # The pace alone would say 9900.
    assert extrapolate_seconds_left(10, 1000, 100, 1) == 990 * (100 + 50) / (10 + 50)
    assert extrapolate_seconds_left(0, in_all, 60) is None
    assert extrapolate_seconds_left(in_all / 2, in_all, 60) == pytest.approx(60)


def test_a_run_that_must_be_repeated_takes_its_whole_time(base: RecordingSpec, tmp_path: Path) -> None:
    run = replace(base, records=str(tmp_path))
    record = write_fake_record(tmp_path, run.method, run.concept, run.seed, cap=run.config.max_train_steps)
    record.rename(run.folder)  # which has the settings in its name
    assert estimate_seconds_left(run, ROUGH_UNITS) == ROUGH_UNITS["start_up"]
    (run.folder / "done.json").unlink()
    assert estimate_seconds_left(run, ROUGH_UNITS) == ROUGH_UNITS["start_up"]  # trained, and not marked as done yet
    (run.folder / "done.json").write_text("{}")
    assert estimate_seconds_left(run, ROUGH_UNITS) == estimate_seconds(run, ROUGH_UNITS)


def test_headers_name_images_sampling_steps_and_cadence(base: RecordingSpec) -> None:
    line = format_protocol(base)
    for part in (
        "preset quick",
        "2 prompts x 2 seeds",
        "10 sampling steps",
        "stratified every 20",
        "all pairs",
        "12 %",
    ):
        assert part in line


def test_slots_are_cores_unless_the_config_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert list_slots(None, 2) == [""] * 3
    assert list_slots(None, 8) == [""]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert list_slots(None, 1) == ["0", "1"]
    assert list_slots(3, 1) == ["0", "1", "0"]


def test_an_empty_folder_is_missing(base: RecordingSpec, tmp_path: Path) -> None:
    run = replace(base, records=str(tmp_path))
    assert read_status(run) == RecordingStatus(run, "missing")
    assert read_conditions(run.folder) is None
    assert list(format_statuses([])) == ["nothing to record"]
