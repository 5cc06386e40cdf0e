"""The benchmarks run, and their results follow from the times they measured."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dvar.stopping.rules import Dvar
from dvar.stopping.trace import Trace

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load_benchmark(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load_benchmark


@pytest.mark.parametrize("method", ["textual-inversion", "dreambooth-lora", "custom-diffusion"])
def test_both_loops_are_timed_part_by_part(
    method: str,
    benchmark: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    tiny_images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "step.json"
    flags = ["--model", tiny_model, "--images", tiny_images, "--resolution", "32", "--method", method]
    monkeypatch.setattr(sys, "argv", ["step.py", *map(str, flags), "--rounds", "1", "--output", str(output)])
    benchmark("step").main()
    result = json.loads(output.read_text())["methods"][method]
    ours, plain = result["parts"]["dvar"], result["parts"]["plain"]
    assert plain["encode"] > 0 == ours["encode"]
    for name in ("data", "text", "U-Net forward", "backward", "optimizer"):
        assert ours[name] > 0 < plain[name]
    seconds = result["whole"]
    assert result["ratios"]["step"] == pytest.approx(seconds["plain"] / seconds["dvar"])
    assert "a probe" in capsys.readouterr().out


def test_a_stop_read_at_every_step_is_the_rules_own(benchmark: Callable[[str], Any]) -> None:
    curve = 0.05 - 0.01 * (1 - np.exp(-np.arange(400) / 40))
    rule, trace = Dvar(100, 0.15), Trace()
    for step, value in enumerate(curve):
        trace.record(step, [value])
        if rule(trace).stop:
            break
    cadence = benchmark("cadence")
    assert cadence.find_stop(curve, range(400), rule) == step
    assert 0 <= cadence.find_stop(curve, range(0, 400, 10), rule) - step <= 10
    assert cadence.find_stop(np.linspace(1, 0, 400), range(90), rule) is None


def test_a_launched_step_is_compared_with_a_plain_one(
    benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["launched_step.py", "--steps", "20", "--rounds", "1"])
    benchmark("launched_step").main()
    plain, added, share = capsys.readouterr().out.splitlines()[-3:]
    assert int(plain.split()[2]) > 0 < int(share.split(" is ")[1].split()[0])
    microseconds, milliseconds = int(added.split()[3]), int(share.split(" is ")[1].split()[0])
    assert float(share.split(": ")[1].split()[0]) == pytest.approx(microseconds / milliseconds / 10, rel=0.1, abs=0.02)


@pytest.mark.slow
def test_time_to_quality_reports_minutes_steps_and_a_score(benchmark: Callable[[str], Any], tmp_path: Path) -> None:
    quality = benchmark("time_to_quality")
    short = ("--max_train_steps", "10", "--window", "8", "--probe_every", "1", "--num_inference_steps", "2")
    row = quality.train_and_score(
        "textual-inversion", "purple_cat", [*short, "--num_validation_images", "1"], tmp_path / "run"
    )
    assert row["steps"] <= 10
    assert row["minutes"] > sum(row["seconds"].values()) / 60
    assert 0 < row["clip"] < 1
    assert {"train", "probe"} <= row["seconds"].keys()


@pytest.mark.slow
def test_a_pack_is_measured_against_runs_alone(
    benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "pack.json"
    flags = ["--packs", "1", "2", "--steps", "4", "--workers", "1", "--methods", "textual-inversion"]
    monkeypatch.setattr(sys, "argv", ["pack.py", *flags, "--output", str(output)])
    benchmark("pack").main()
    single, packed = json.loads(output.read_text())["rows"]
    assert (single["pack"], single["ratio"], single["difference"]) == (1, 1.0, 0.0)
    assert packed["ratio"] == pytest.approx(single["processor"] / packed["processor"])
    assert packed["an_hour"] == pytest.approx(3600 / (300 * packed["processor"]))
    assert packed["difference"] < 1e-5
    assert packed["memory"] > 0
