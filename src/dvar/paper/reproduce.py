"""Every table and figure of the paper by its name: made from recorded runs, written as files and as one page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

from dvar.errors import DvarError, RefusedInput
from dvar.paper.config import EXPERIMENTS, ReproduceConfig
from dvar.paper.page import page
from dvar.paper.result import ExperimentResult, Provenance, save
from dvar.paper.style import STYLE
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.archive_file import read_traces, write_traces

if TYPE_CHECKING:
    from dvar.paper.extra_runs import ExtraRuns

QUICK = 6
"""Concepts of each method that ``quick`` reads of whole records, beside those for tuning."""
QUICK_CONCEPTS, QUICK_TUNING = 2, 1
"""Concepts of each method, and for tuning, that ``quick`` records where there are no records."""
SMALL = "quick"
"""Folder of small records, beside whole ones."""
TRACES = "traces.npz"
REPORT, FACTS = "report.html", "report.json"


def reproduce(config: ReproduceConfig, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Make the experiments that ``config`` names and return the page that shows them, ``report.html``.

    Beside it lie each experiment's data and figures, and ``report.json`` with what they were made from.  Of several,
    one that cannot be made is told in its place with the reason; alone it is refused.

    Raises: RefusedInput when no record can be read, or when the one experiment asked for cannot be made.
    """
    folder = Path(config.output_dir)
    names = config.experiments
    if config.quick:
        _record(config, names, tell)
    shelf = opened(config) if _reads_records(names) else RecordingArchive(())
    if "table1" in names:
        shelf = _rescored(shelf, tell)
    facts = _facts(shelf, names, config.quick)
    made = []
    with matplotlib.rc_context(STYLE):
        for name in names:
            tell(f"{name}: {EXPERIMENTS[name]}")
            exhibit = _made(name, shelf, config, tell)
            save(exhibit, folder)
            made.append(exhibit)
    content = {"facts": facts, "experiments": names}
    (folder / FACTS).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path = folder / REPORT
    path.write_text(page(made, facts), encoding="utf-8", newline="\n")
    return path


def _reads_records(names: Sequence[str]) -> bool:
    return not set(names) <= {*SIMULATED, *TRAINED}


def _record(config: ReproduceConfig, names: Sequence[str], tell: Callable[[str], None]) -> None:
    """Record all that a small report of these experiments reads and that is not there."""
    from dvar.paper.experiments import variants
    from dvar.recordings import sweep

    bench, runs = _bench(config, tell), []
    if _reads_records(names) and _sources(config) == (bench.records,):
        runs += bench.few(str(bench.records), QUICK_CONCEPTS, QUICK_TUNING)
    for name, changes in (("initial", variants.STARTS), ("sam", variants.OPTIMIZERS)):
        if name in names:
            planned = [one for of in variants.planned(bench, changes).values() for one in of]
            runs += [one for one in planned if replace(one, records=str(bench.records)) not in runs]
    if runs:
        for line in sweep.table(sweep.recorded(list(dict.fromkeys(runs)), tell)):
            tell(line)


def _sources(config: ReproduceConfig) -> tuple[Path, ...]:
    """Where records are read: as named, or where quick finds none there, in "quick" beside where whole ones stand."""
    named = tuple(map(Path, config.records))
    whole = any(one.is_file() or any(one.glob("*/*/*/config.json")) for one in named)
    return named if whole or not config.quick else (named[0] / SMALL,)


def _rescored(shelf: RecordingArchive, tell: Callable[[str], None]) -> RecordingArchive:
    """The shelf with the checkpoints scored anew that ways of Table 1 keep, where runs have folders to draw with."""
    if all(record.folder is None for record in shelf):
        return shelf
    from dvar.paper.experiments import cost
    from dvar.recordings.rescore import with_rescored  # and with it torch, which recorded runs are read without

    return with_rescored(shelf, cost.selected(shelf), tell)


def _bench(config: ReproduceConfig, tell: Callable[[str], None]) -> ExtraRuns:
    from dvar.paper.extra_runs import ExtraRuns  # and with it torch

    folder = next((Path(named) for named in config.records if not Path(named).is_file()), None)
    records = folder / SMALL if folder and config.quick else folder
    return ExtraRuns(Path(config.output_dir) / "runs", config.quick, config.model, config.concepts_dir, tell, records)


def opened(config: ReproduceConfig) -> RecordingArchive:
    """The records that the settings name, in folders of recorded runs and files of traces."""
    sources = _sources(config)
    shelf = RecordingArchive.joined(
        [read_traces(one) if one.is_file() else RecordingArchive.open(one) for one in sources]
    )
    return _few(shelf) if config.quick else shelf


def _few(shelf: RecordingArchive) -> RecordingArchive:
    kept = {record.name for method in shelf.methods for record in shelf.examples(method, QUICK)}
    kept |= {record.name for record in shelf if record.concept in shelf.tuning}
    return replace(shelf, records=tuple(record for record in shelf if record.name in kept))


def _made(name: str, shelf: RecordingArchive, config: ReproduceConfig, tell: Callable[[str], None]) -> ExperimentResult:
    try:
        if name in TRAINED:
            return _trained(name, config, tell)
        return _traces(shelf, Path(config.output_dir)) if name == "traces" else _maker(MAKERS[name])(shelf)
    except DvarError as error:
        if config.experiments == [name]:
            raise
        return ExperimentResult(name, EXPERIMENTS[name], missing=str(error))


def _maker(place: str) -> Callable[[Any], ExperimentResult]:
    module, _, function = place.partition(":")
    found = import_module(f"dvar.paper.experiments.{module}")
    made: Callable[[Any], ExperimentResult] = getattr(found, function or "make")
    return made


def _trained(name: str, config: ReproduceConfig, tell: Callable[[str], None]) -> ExperimentResult:
    return _maker(TRAINED[name])(_bench(config, tell))


MAKERS = {
    "table1": "cost",
    "agreement": "replay_check",
    "rules": "rule_ranking",
    "figure1": "convergence:figure_1",
    "figure2": "convergence:figure_2",
    "figure4": "scores",
    "figure6": "convergence:figure_6",
    "figure7": "convergence:figure_7",
    "figure8": "held_batch",
    "figure11": "criteria",
    "figure12": "samples",
    "figure14": "convergence:figure_14",
    "table2": "human_evaluation",
    "table3": "timesteps",
}
"""Where each experiment is made that is read off recorded runs."""

SIMULATED = ("table2",)
"""What is made without any record."""

TRAINED = {"figure5": "randomness", "figure9": "training_batch", "initial": "variants:initial", "sam": "variants:sam"}
"""Where each is made that trains runs of its own."""


def _traces(shelf: RecordingArchive, folder: Path) -> ExperimentResult:
    path = write_traces(shelf, folder / TRACES)
    size = path.stat().st_size / 1e6
    said = (
        f"{path.name} ({size:.1f} MB) holds {len(shelf)} recorded runs: every series of the loss, sample by sample, "
        "and the scores of every picture. dvar.recordings.archive_file.read_traces reads it; "
        "dvar reproduce rules --records "
        f"{path.name} ranks the rules of this library on it, and any rule can be added: it is a function of a trace.",
    )
    return ExperimentResult("traces", EXPERIMENTS["traces"], said)


def _facts(shelf: RecordingArchive, names: Sequence[str], quick: bool) -> list[str]:
    if set(names) <= set(SIMULATED):
        return ["No record was read: this is a simulation."]
    if not _reads_records(names):
        return ["No record was read: what is shown was trained for it."]
    counted = [record for method in shelf.methods for record in shelf.of(method)]
    if not counted:
        raise RefusedInput(["every record is of a tuning concept, and no table counts those: record other concepts"])
    told = [str(Provenance.of(counted))]
    tuning = len({record.concept for record in shelf if record.concept in shelf.tuning})
    others = "1 other concept" if tuning == 1 else f"{tuning} other concepts"
    told.append(
        f"Settings were tuned on {others}, which no table counts." if tuning else "No concept was recorded for tuning."
    )
    if quick:
        told.append(f"Quick: {QUICK} concepts a method at most; the intervals are as wide as that makes them.")
    if shelf.lost:
        lost = "1 run is lost: " if len(shelf.lost) == 1 else f"{len(shelf.lost)} runs are lost: "
        told.append(lost + "; ".join(f"{name} ({why})" for name, why in shelf.lost.items()))
    return told
