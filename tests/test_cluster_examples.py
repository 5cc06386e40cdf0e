"""The examples of clusters: files that parse, with flags and settings that exist."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from dvar.config.fields import canonical_settings
from dvar.jobs.config import BatchConfig
from dvar.jobs.read_jobs import JOB_KEYS
from dvar.training.methods.registry import METHODS

EXAMPLES = Path(__file__).parents[1] / "examples" / "cluster"


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_an_example_of_a_cluster_parses_and_its_flags_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    match path.suffix:
        case ".sh":
            subprocess.run(["bash", "-n", path], check=True)
        case ".yaml":
            assert yaml.safe_load(text)
        case ".toml":
            assert tomllib.loads(text)
    commands = re.findall(r"dvar batch \S+((?:[^\n\\]|\\\n)*)", text.replace(" \\\n", " "))
    assert commands or path.suffix == ".toml"
    flags = {flag for command in commands for flag in re.findall(r"--(\w+)", command)}
    assert flags <= {item.name for item in fields(BatchConfig)}


def test_the_example_for_skypilot_leaves_its_own_ray_alone() -> None:
    program = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text(encoding="utf-8"))["run"]
    subprocess.run(["bash", "-n"], input=program, text=True, check=True)
    assert {*re.findall(r"(?:--port |:)(\d{4})\b", program)} == {"6379"}  # SkyPilot's own is at 6380
    assert "ray stop" not in program  # which ends every Ray of the machine


def run_array(folder: Path, tasks: int) -> dict[str, str]:
    """Return the output folder of each concept, by the example of an array, whose ``dvar`` says what it is given."""
    program = folder / "bin" / "dvar"
    program.parent.mkdir(exist_ok=True)
    program.write_text('#!/bin/bash\nfor concept in "$2"/*/; do echo "$(basename "$concept") $4"; done\n')
    program.chmod(0o755)
    paths = {"PATH": f"{program.parent}:{os.environ['PATH']}", "TMPDIR": str(folder), "RUNS": "runs"}
    shares: dict[str, str] = {}
    for task in range(tasks):
        numbers = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(tasks)}
        environment = {**os.environ, **paths, **numbers, "CONCEPTS": str(folder / "concepts")}
        command = ["bash", str(EXAMPLES / "slurm_array.sh")]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for line in output.splitlines():
            concept, _, share = line.partition(" ")
            if share.startswith("runs/"):
                assert concept not in shares, "two tasks train it"
                shares[concept] = share
    return shares


def test_a_concept_stays_in_its_share_of_an_array_when_others_are_added(tmp_path: Path) -> None:
    names = [f"concept-{number}" for number in range(9)]
    for name in names:
        (tmp_path / "concepts" / name).mkdir(parents=True)
    before = run_array(tmp_path, 8)
    assert before.keys() == {*names}
    for name in ("a", "concept-10"):
        (tmp_path / "concepts" / name).mkdir()
    after = run_array(tmp_path, 8)
    assert after.keys() == {*names, "a", "concept-10"}
    assert before.items() <= after.items()
    assert run_array(tmp_path, 4).items() <= after.items()


def test_the_signal_of_slurm_reaches_the_command_that_its_shell_has_become() -> None:
    program = (EXAMPLES / "slurm_array.sh").read_text(encoding="utf-8")
    assert re.findall(r"#SBATCH --signal=(\S+)", program) == ["B:TERM@120"]  # without B: the steps alone get it
    assert program.splitlines()[-1].startswith("exec dvar batch")


def test_the_settings_of_the_example_of_jobs_exist() -> None:
    content = tomllib.loads((EXAMPLES / "jobs.toml").read_text(encoding="utf-8"))
    jobs = content.pop("job")
    for job in jobs:
        method = job.get("method", content["method"])
        settings = {name: value for name, value in {**content, **job}.items() if name not in JOB_KEYS}
        assert canonical_settings(settings, METHODS[method].config_type)
