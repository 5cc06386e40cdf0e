"""Settings of the commands on finished runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from dvar.runs.config import ExportConfig, GenerateConfig, ReplayConfig, ReportConfig, RunsConfig, problems


@pytest.mark.parametrize(
    "config",
    [
        GenerateConfig(prompt="a mug"),
        GenerateConfig(prompt="a mug", scheduler="model", guidance_scale=0.0, num_inference_steps=1),
        ExportConfig(merged="whole"),
        ReportConfig(),
        ReportConfig(output="report.html"),
        ReplayConfig(),
        ReplayConfig(output="replay.svg"),
    ],
)
def test_sound_settings_have_no_problem(config: RunsConfig) -> None:
    assert problems(config) == []


def test_settings_are_refused_by_name_and_all_at_once() -> None:
    assert problems(
        GenerateConfig(
            num_images=0,
            seed=-1,
            guidance_scale=-1.0,
            num_inference_steps=0,
            scheduler="DDIM",  # type: ignore[arg-type]
        )
    ) == [
        "num_images must be at least 1, got 0",
        "seed must be at least 0, got -1",
        "guidance_scale must be at least 0, got -1.0",
        "num_inference_steps must be at least 1, got 0",
        "scheduler must be one of model, DPMSolverMultistepScheduler, UniPCMultistepScheduler, DDIMScheduler, "
        "got 'DDIM'",
        "prompt is missing: give --prompt the text of the images, with the learned word in it",
    ]
    message = "export needs --step, --merged, --kohya, --embedding or --push_to_hub, got none: name what to write"
    assert problems(ExportConfig()) == [message]
    assert problems(ExportConfig(kohya="lora.safetensors", mixed_precision="bf16")) == [
        "mixed_precision is for a pipeline, got bf16 without --merged: drop it"
    ]
    assert problems(GenerateConfig(prompt="a mug", quantize="int4")) == [  # type: ignore[arg-type]
        "quantize must be one of no, nf4, int8, got 'int4'"
    ]
    assert problems(ReportConfig(output="report.pdf")) == ["output must end in .html, got 'report.pdf': name a page"]


def test_what_no_clock_and_no_system_can_count_is_refused() -> None:
    assert problems(ReplayConfig(follow=True, pid=99_999_999_999, poll_seconds=1e300)) == [
        "pid must be at most 2147483647, got 99999999999",
        "poll_seconds must be at most 86400, got 1e+300",
    ]


def test_the_settings_of_a_replay_are_refused_by_name() -> None:
    config = ReplayConfig(rule=("dvra",), hall_threshold=0.0, patience=0, output="replay.png")
    assert problems(config) == [
        "rule must be one of dvar, paper, ema, hall, trend, plateau, octave, all, got ('dvra',)",
        "hall_threshold must be above 0, got 0.0",
        "patience must be at least 1, got 0",
        "output must end in .svg or .html, got 'replay.png': name a figure or a page",
    ]


def test_the_settings_of_following_a_log_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "stop.json").write_text("of another run")
    config = ReplayConfig(on_stop="true", stop_file=str(tmp_path / "stop.json"), pid=0, poll_seconds=0.0)
    assert problems(config) == [
        "pid must be at least 1, got 0",
        "poll_seconds must be above 0, got 0.0",
        "on_stop and stop_file and pid are for a log that is followed, got no --follow: add it",
        f"stop_file must be a new file, and {tmp_path / 'stop.json'} exists: remove it, or name another",
    ]
    config = ReplayConfig(follow=True, rule=("dvar", "ema"), stop_file=str(tmp_path / "none" / "stop.json"))
    assert problems(config) == [
        "one rule decides when a log is followed, got dvar, ema: name one --rule",
        f"stop_file must be in a folder that exists, and {tmp_path / 'none'} does not: create it",
    ]
    assert problems(ReplayConfig(follow=True, on_stop="true", stop_file=str(tmp_path / "new.json"), pid=1)) == []
