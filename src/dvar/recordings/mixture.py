"""Recorded runs that must not be mixed: of two base models under one name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dvar.config.training import BUNDLED_MODELS
from dvar.errors import name_some
from dvar.recordings.recorded_run import RecordedRun

_UNKNOWN = "a model from before headers named it"


def base_model_problems(runs: Iterable[RecordedRun]) -> list[str]:
    """Return which base models of one name are mixed, with the runs of each.

    Older headers do not say which model it was. Of the bundled model it was another one; of others nothing is said.
    """
    problems = []
    models = group_runs((str(run.config.get("pretrained_model_name_or_path")), run) for run in runs)
    for model, of_model in models.items():
        judged = [run for run in of_model if model in BUNDLED_MODELS or "base" in run.header]
        bases = group_runs((str(run.header["base"])[:12] if "base" in run.header else _UNKNOWN, run) for run in judged)
        if len(bases) > 1:
            rule = f"base model {model} must be one and the same, got {name_groups(bases)}"
            problems.append(f"{rule}: name the records of one alone")
    return problems


def protocol_of(run: RecordedRun) -> tuple[str, int]:
    """Return the name and the version of the protocol that a run was recorded by."""
    protocol = run.header.get("protocol", {})
    return str(protocol.get("name", "before the panel")), int(protocol.get("version", 0))


def protocol_problems(runs: Iterable[RecordedRun]) -> list[str]:
    """Return which protocols of recording, or versions of one, are mixed, with the runs of each."""
    protocols = group_runs((f"{name}, version {version}", run) for run in runs for name, version in [protocol_of(run)])
    if len(protocols) < 2:
        return []
    return [f"recorded runs must be of one protocol, got {name_groups(protocols)}: name the records of one alone"]


def group_runs(pairs: Iterable[tuple[str, RecordedRun]]) -> dict[str, list[RecordedRun]]:
    """Return the runs by name of their group, in the order in which the groups come."""
    groups: dict[str, list[RecordedRun]] = {}
    for name, run in pairs:
        groups.setdefault(name, []).append(run)
    return groups


def name_groups(groups: Mapping[str, Sequence[RecordedRun]]) -> str:
    """Return the names of groups, each with some of its runs."""
    return " and ".join(f"{name} ({name_some([run.name for run in runs])})" for name, runs in groups.items())
