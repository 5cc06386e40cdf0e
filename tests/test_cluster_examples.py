"""The examples of clusters: files that parse, with flags and settings that exist."""

from __future__ import annotations

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


def test_the_settings_of_the_example_of_jobs_exist() -> None:
    content = tomllib.loads((EXAMPLES / "jobs.toml").read_text(encoding="utf-8"))
    jobs = content.pop("job")
    for job in jobs:
        method = job.get("method", content["method"])
        settings = {name: value for name, value in {**content, **job}.items() if name not in JOB_KEYS}
        assert canonical_settings(settings, METHODS[method].config_type)
