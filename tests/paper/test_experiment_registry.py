"""The registry of experiments: light to list, and open to other packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
from fake_record import write_fake_record

from dvar.paper import registry
from dvar.paper.config import ReproduceConfig
from dvar.paper.registry import EXPERIMENTS, Experiment, ExperimentInputs, reproduce_problems, selected_experiments
from dvar.paper.reproduce import reproduce
from dvar.paper.result import ExperimentResult
from dvar.registry import Registry


def count_runs(inputs: ExperimentInputs) -> ExperimentResult:
    return ExperimentResult((f"There are {len(inputs.archive)} recorded runs.",))


COUNT = Experiment("count", "How many runs were recorded", "recorded runs", count_runs)


def test_listing_experiments_loads_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from dvar.paper.config import ReproduceConfig\n"
        "from dvar.paper.registry import EXPERIMENTS, reproduce_problems\n"
        "assert all(experiment.summary for experiment in EXPERIMENTS.values())\n"
        "assert reproduce_problems(ReproduceConfig(names=('figure3',)))\n"
        "print(*[name for name in ('torch', 'matplotlib', 'scipy', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_experiment_is_registered_under_its_own_name() -> None:
    assert {name: experiment.name for name, experiment in EXPERIMENTS.items()} == {name: name for name in EXPERIMENTS}
    titles = [experiment.title for experiment in EXPERIMENTS.values()]
    assert len(set(titles)) == len(titles)


def test_experiments_are_selected_once_and_all_means_all() -> None:
    config = ReproduceConfig(names=("figure8", "figure1", "figure8"))
    assert [experiment.name for experiment in selected_experiments(config)] == ["figure8", "figure1"]
    everything = selected_experiments(replace(config, names=("figure8", "all")))
    assert [experiment.name for experiment in everything] == list(EXPERIMENTS)


def test_another_package_can_add_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = EntryPoints([EntryPoint("count", f"{__name__}:COUNT", "dvar.experiments")])
    monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: plugins.select(group=group))
    monkeypatch.setattr(registry, "EXPERIMENTS", Registry[Experiment]("experiment", "dvar.experiments"))
    write_fake_record(tmp_path / "records", cap=60, learned=8.0)
    config = ReproduceConfig(names=("count",), records=(str(tmp_path / "records"),), output_dir=str(tmp_path / "out"))
    assert reproduce_problems(config) == []
    page = reproduce(config).read_text(encoding="utf-8")
    assert "<h2>How many runs were recorded</h2>" in page
    content = json.loads((tmp_path / "out" / "count.json").read_text(encoding="utf-8"))
    assert content["says"] == ["There are 1 recorded runs."]


def test_an_experiment_that_trains_says_so_in_the_help() -> None:
    assert EXPERIMENTS["figure5"].summary.endswith("; trains runs of its own")
    assert EXPERIMENTS["figure8"].summary == EXPERIMENTS["figure8"].title
