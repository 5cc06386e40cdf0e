"""Runs that an experiment needs of its own: made once, gone on with after a kill, read back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dvar.config.training import BUNDLED_MODEL, CONFIGS, AnyConfig
from dvar.errors import CheckpointError, RefusedInput
from dvar.mini import TUNING
from dvar.paper.result import title
from dvar.recordings.archive import RecordedRun
from dvar.recordings.concepts import concept_folders, laboratory_concepts
from dvar.recordings.spec import RecordingSpec
from dvar.recordings.sweep import grid, recorded, standing
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rules import FixedSteps
from dvar.stopping.trace import Trace
from dvar.training.checkpoint import latest
from dvar.training.loop import Series
from dvar.training.personalise import interruption, prepared
from dvar.training.run import TrainingRun


@dataclass(frozen=True)
class ExtraRuns:
    """Where such runs are made, on which model, and whether they are to be small; ``tell`` is told how far they are.

    Small and whole runs stand in folders of their own, so that neither is taken for the other.  ``records`` is where
    recorded runs of their size stand, if anywhere.
    """

    folder: Path
    quick: bool
    model: str = BUNDLED_MODEL
    concepts: str | None = None
    tell: Callable[[str], None] = lambda line: None
    records: Path | None = None

    def planned(self, experiment: str, concept: str | None = None, **settings: object) -> RecordingSpec:
        """The run of an experiment, as it would be recorded: Textual Inversion of a concept, the first by name."""
        return RecordingSpec(
            method="textual-inversion",
            concept=concept or laboratory_concepts(self.concepts)[0],
            records=str(self.folder / experiment / ("quick" if self.quick else "whole")),
            plan="quick" if self.quick else "cpu",
            model=self.model,
            concepts=self.concepts,
            settings=tuple(settings.items()),
        )

    def found(self, one: RecordingSpec) -> RecordingSpec:
        """The same run among the records, where it stands there whole; else as it was planned."""
        there = replace(one, records=str(self.records))
        return there if self.records and not there.foreign() and standing(there).state == "done" else one

    def few(self, records: str, concepts: int, tuning: int) -> list[RecordingSpec]:
        """The least that shows everything: small runs of every method on some concepts, the last of them for tuning."""
        names = [name for name in concept_folders(self.concepts) if name in TUNING][:tuning]
        base = RecordingSpec("", "", records=records, plan="quick", model=self.model, concepts=self.concepts)
        return grid(base, list(CONFIGS), laboratory_concepts(self.concepts)[:concepts] + names, [0])

    def stated(self, one: RecordingSpec) -> str:
        """What a caption must say of such a run."""
        model = "the bundled model" if one.model == BUNDLED_MODEL else one.model
        small = " A small run (--quick): the whole one goes on for longer, with larger batches." if self.quick else ""
        named = f"1, the first by name ({one.concept.replace('_', ' ')})"
        return f"{title(one.method)}. Base model: {model}. Concepts: {named}; seeds: 1.{small}"

    def recorded(self, recordings: Sequence[RecordingSpec]) -> list[RecordedRun]:
        """These runs, recorded where they are missing; how long that takes is told first.

        Raises: RefusedInput when one of them failed.
        """
        lost = [row for row in recorded(recordings, self.tell) if row.state != "done"]
        if lost:
            raise RefusedInput([f"{row.recording.name} is {row.state}: {row.reason or 'see its log'}" for row in lost])
        return [RecordedRun.open(recording.folder) for recording in recordings]


def trained(config: AnyConfig, series: Callable[[TrainingRun], Series], tell: Callable[[str], None]) -> Trace:
    """Return the trace of the run that ``config`` describes, trained to its cap whatever any rule says of it.

    ``series`` gives, of the run's job while its model is untouched, what is measured beside.  A run that is there is
    read, and one that was interrupted goes on from its last checkpoint.
    Raises: CheckpointError when the folder holds a run under other settings; KeyboardInterrupt when asked to stop;
    RefusedInput when training breaks.
    """
    folder = Path(config.output_dir)
    try:
        latest(folder)
        there = replace(config, resume_from_checkpoint="latest")
    except CheckpointError:
        there = replace(config, overwrite=True)
    job, checkpoint = prepared(there)
    job.criterion = FixedSteps(config.max_train_steps)
    measured = series(job)
    job.open(checkpoint)
    tenth = max(1, config.max_train_steps // 10)
    with interruption() as interrupted:
        for step in job.steps(interrupted, measured):
            if step.step % tenth == 0:
                tell(f"step {step.step} of {config.max_train_steps}")
            if step.verdict.reason is Reason.INTERRUPTED:
                raise KeyboardInterrupt
            if step.verdict.reason is Reason.NON_FINITE:
                raise RefusedInput([f"training broke at step {step.step}: {step.verdict.sentence}"])
    return job.learner.trace
