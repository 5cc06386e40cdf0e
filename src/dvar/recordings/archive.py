"""Archives of recorded runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dvar.errors import RefusedInput, TraceError
from dvar.mini import TUNING
from dvar.recordings.recorded_run import SECONDS, RecordedRun, RescoredRun, read_failure, read_recorded_json
from dvar.training.run_layout import CONFIG

RUNS = f"*/*/*/{CONFIG}"
"""Pattern of the recorded runs in a folder."""


@dataclass(frozen=True, eq=False)
class RecordingArchive:
    """Recorded runs, read from a folder or from one file.

    Attributes:
        runs: Every run that can be read.
        unreadable: The name of every other run, with the reason.
        tuning_concepts: Concepts for choosing settings; no table counts their runs.
        measured_seconds: Method to unit seconds, where a sweep measured them.
        rescored: The rescored steps of a run, by `RecordedRun.name`.
    """

    runs: tuple[RecordedRun, ...]
    unreadable: Mapping[str, str] = field(default_factory=dict)
    tuning_concepts: tuple[str, ...] = TUNING
    measured_seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rescored: Mapping[str, RescoredRun] = field(default_factory=dict)

    @classmethod
    def open(cls, root: str | Path, tuning_concepts: tuple[str, ...] = TUNING) -> RecordingArchive:
        """Return the recorded runs in the folder ``root``.

        Raises:
            RefusedInput: No run can be read.
        """
        root = Path(root)
        runs, unreadable = [], {}
        for folder in sorted(path.parent for path in root.glob(RUNS)):
            try:
                runs.append(RecordedRun.open(folder))
            except (RefusedInput, TraceError) as error:
                reason = read_failure(folder) or str(error).splitlines()[0].removeprefix(f"{folder}/")
                unreadable["/".join(folder.parts[-3:])] = reason
        if not runs:
            rule = f"there are no recorded runs in {root}, <method>/<concept>/<seed>/done.json each"
            raise RefusedInput([f"{rule}: record some, or name another --records"])
        seconds = root / SECONDS
        measured = read_recorded_json(seconds, {str: {str: float}}) if seconds.exists() else {}
        return cls(tuple(runs), unreadable, tuning_concepts, measured, load_rescored(runs))

    @classmethod
    def join(cls, archives: Sequence[RecordingArchive]) -> RecordingArchive:
        """Return one archive with the runs of all; the first archive that has a run or a method's seconds wins."""
        sources = {run.name: (run, archive) for archive in reversed(archives) for run in archive}
        return cls(
            runs=tuple(sources[name][0] for name in sorted(sources)),
            unreadable={
                name: reason
                for archive in archives
                for name, reason in archive.unreadable.items()
                if name not in sources
            },
            tuning_concepts=tuple(dict.fromkeys(name for archive in archives for name in archive.tuning_concepts)),
            measured_seconds={
                method: units for archive in reversed(archives) for method, units in archive.measured_seconds.items()
            },
            rescored={
                name: archive.rescored[name]
                for name, (_, archive) in sorted(sources.items())
                if name in archive.rescored
            },
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that have a run on other than tuning concepts, in the paper's order."""
        order = ("textual-inversion", "dreambooth-lora", "custom-diffusion")
        methods = {run.method for run in self.runs if run.concept not in self.tuning_concepts}
        return tuple(method for method in order if method in methods) + tuple(sorted(methods.difference(order)))

    def runs_of(self, method: str) -> tuple[RecordedRun, ...]:
        """Return the runs of a method that tables count: under one setting, and of no tuning concept."""
        return tuple(run for run in self._under_one_setting(method) if run.concept not in self.tuning_concepts)

    def tuning_runs(self, method: str) -> tuple[RecordedRun, ...]:
        """Return the runs of a method that settings are chosen on."""
        return tuple(run for run in self._under_one_setting(method) if run.concept in self.tuning_concepts)

    @property
    def has_tuning_runs(self) -> bool:
        """Whether a run of a tuning concept is here."""
        return any(run.concept in self.tuning_concepts for run in self.runs)

    def runs_to_tune_on(self, method: str, concept: str) -> tuple[RecordedRun, ...]:
        """Return the runs of a method that settings for a concept are chosen on.

        They are those of the tuning concepts or, where there are none, those of all other concepts: cross-validation.
        """
        if self.has_tuning_runs:
            return self.tuning_runs(method)
        return tuple(run for run in self.runs_of(method) if run.concept != concept)

    def example_runs(self, method: str, count: int) -> tuple[RecordedRun, ...]:
        """Return one run each of a method's first ``count`` concepts by name, so that none is picked for its looks.

        Raises:
            RefusedInput: The method has no run.
        """
        by_concept = {run.concept: run for run in reversed(self.runs_of(method))}
        if not by_concept:
            raise RefusedInput([f"there is no recorded run of {method}: record one, or name another --records"])
        return tuple(by_concept[name] for name in sorted(by_concept))[:count]

    def unit_seconds(self, method: str) -> dict[str, float]:
        """Return the seconds of each unit of a method's work: as measured, or else the median over its runs."""
        of_runs = [run.unit_seconds for run in self.runs if run.method == method]
        names = sorted({name for units in of_runs for name in units})
        medians = {name: float(np.median([units[name] for units in of_runs if name in units])) for name in names}
        return medians | dict(self.measured_seconds.get(method, {}))

    def _under_one_setting(self, method: str) -> Iterator[RecordedRun]:
        """Yield the runs of a method under its preset's settings, or under its most common ones where there are none.

        No table mixes settings; the panel, which compares them, reads all runs.
        """
        counts = Counter(run.variant for run in self.runs if run.method == method)
        counted = "" if "" in counts else min(counts, key=lambda variant: (-counts[variant], variant), default="")
        yield from (run for run in self.runs if run.method == method and run.variant == counted)

    def __iter__(self) -> Iterator[RecordedRun]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)


def load_rescored(runs: Iterable[RecordedRun]) -> dict[str, RescoredRun]:
    """Return the rescored steps in the folders of these runs, by the name of the run."""
    rescored = {run.name: RescoredRun.open(run.folder) for run in runs if run.folder}
    return {name: run for name, run in rescored.items() if run}
