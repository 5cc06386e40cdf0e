"""Making experiments: from recorded runs to their files and one page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

from dvar.cluster.places import Places
from dvar.errors import DvarError, RefusedInput
from dvar.paper.config import ReproduceConfig
from dvar.paper.page import render_page
from dvar.paper.registry import Experiment, ExperimentInputs, selected_experiments
from dvar.paper.result import ExperimentResult, Provenance, save_result
from dvar.paper.style import STYLE
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.archive_file import open_records
from dvar.recordings.mixture import base_model_problems, protocol_problems

if TYPE_CHECKING:
    from dvar.recordings.spec import RecordingSpec

QUICK = 6
"""Concepts of each method that ``quick`` reads of whole recordings, besides those for tuning."""
QUICK_CONCEPTS, QUICK_TUNING = 2, 1
"""Concepts of each method, and for tuning, that ``quick`` records where there are no recorded runs."""
REPORT, FACTS = "report.html", "report.json"


def reproduce(config: ReproduceConfig, notify: Callable[[str], None] = lambda line: None) -> Path:
    """Make the experiments that ``config`` names and return the path of the page that shows them, ``report.html``.

    Next to it are the data and the figures of each experiment, and ``report.json`` with what they were made from. Among
    several experiments, one that cannot be made appears on the page with the reason.

    Args:
        config: Which experiments, made from what.
        notify: Called with a line of progress.

    Raises:
        RefusedInput: No recorded run can be read, or the only experiment asked for cannot be made.
    """
    folder = Path(config.output_dir)
    experiments = selected_experiments(config)
    if config.quick:
        record_missing_runs(config, notify)
    archive = open_archive(config) if _need_recorded_runs(experiments) else RecordingArchive(())
    archive = _score_checkpoints(experiments, archive, notify, config.ray)
    facts = _describe_inputs(experiments, archive, config.quick)
    inputs = ExperimentInputs(config, archive, notify)
    results = []
    with matplotlib.rc_context(STYLE):
        for experiment in experiments:
            notify(f"{experiment.name}: {experiment.title}")
            result = _make_result(experiment, inputs, is_only=len(experiments) == 1)
            save_result(experiment.name, experiment.title, result, folder)
            results.append((experiment, result))
    content = {"facts": facts, "experiments": [experiment.name for experiment in experiments]}
    (folder / FACTS).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path = folder / REPORT
    path.write_text(render_page(results, facts), encoding="utf-8", newline="\n")
    return path


def record_missing_runs(config: ReproduceConfig, notify: Callable[[str], None]) -> None:
    """Record all runs that a small report of these experiments reads and that are missing."""
    from dvar.recordings import sweep

    experiments = selected_experiments(config)
    extra_runs = ExperimentInputs(config, RecordingArchive(()), notify).extra_runs
    specs: list[RecordingSpec] = []
    if _need_recorded_runs(experiments) and config.sources == (extra_runs.records,):
        specs += extra_runs.small_sweep(QUICK_CONCEPTS, QUICK_TUNING)
    for experiment in experiments:
        own = experiment.recordings(extra_runs) if experiment.recordings else []
        specs += [spec for spec in own if replace(spec, records=str(extra_runs.records)) not in specs]
    if specs:
        places = Places(threads=specs[0].threads, ray=config.ray)
        for line in sweep.format_statuses(sweep.record_missing(list(dict.fromkeys(specs)), notify, places=places)):
            notify(line)


def open_archive(config: ReproduceConfig) -> RecordingArchive:
    """Return the recorded runs that ``config`` names, from folders of recorded runs and files of traces.

    Raises:
        RefusedInput: Runs of two base models under one name, or of two protocols, are mixed.
    """
    archive = RecordingArchive.join([open_records(path) for path in config.sources])
    if problems := [*base_model_problems(archive), *protocol_problems(archive)]:
        raise RefusedInput(problems)
    return _select_few(archive) if config.quick else archive


def _need_recorded_runs(experiments: Sequence[Experiment]) -> bool:
    return any(experiment.needs == "recorded runs" for experiment in experiments)


def _select_few(archive: RecordingArchive) -> RecordingArchive:
    """Return the archive with the first concepts of each method, and those for tuning."""
    names = {run.name for method in archive.methods for run in archive.example_runs(method, QUICK)}
    names |= {run.name for run in archive if run.concept in archive.tuning_concepts}
    return replace(archive, runs=tuple(run for run in archive if run.name in names))


def _score_checkpoints(
    experiments: Sequence[Experiment], archive: RecordingArchive, notify: Callable[[str], None], ray: str | None
) -> RecordingArchive:
    """Return the archive with the checkpoints scored again that the experiments ask for, where runs have folders."""
    if all(run.folder is None for run in archive):
        return archive
    for experiment in experiments:
        if experiment.checkpoints:
            from dvar.recordings.rescore import rescore_archive  # imports torch, which reading recorded runs does not

            archive = rescore_archive(archive, experiment.checkpoints(archive), notify, ray)
    return archive


def _make_result(experiment: Experiment, inputs: ExperimentInputs, is_only: bool) -> ExperimentResult:
    try:
        return experiment.make(inputs)
    except DvarError as error:
        if is_only:
            raise
        return ExperimentResult(missing=str(error))


def _describe_inputs(experiments: Sequence[Experiment], archive: RecordingArchive, quick: bool) -> list[str]:
    """Return paragraphs that say what the experiments were made from."""
    if all(experiment.needs == "nothing" for experiment in experiments):
        return ["No recorded run was read: this is a simulation."]
    if not _need_recorded_runs(experiments):
        return ["No recorded run was read: everything shown was trained for this page."]
    runs = [run for method in archive.methods for run in archive.runs_of(method)]
    if not runs:
        raise RefusedInput(
            ["every recorded run is of a tuning concept, and no table counts those: record other concepts"]
        )
    tuning = len({run.concept for run in archive if run.concept in archive.tuning_concepts})
    concepts = "1 other concept" if tuning == 1 else f"{tuning} other concepts"
    tuned = f"on {concepts}, which no table counts" if tuning else "for each concept on all others, cross-validated"
    facts = [str(Provenance.of(runs)), f"Settings were tuned {tuned}."]
    if quick:
        facts.append(f"Quick: at most {QUICK} concepts for each method, so intervals are wide.")
    if archive.unreadable:
        count = "1 run is" if len(archive.unreadable) == 1 else f"{len(archive.unreadable)} runs are"
        facts.append(f"{count} lost: " + "; ".join(f"{name} ({reason})" for name, reason in archive.unreadable.items()))
    return facts
