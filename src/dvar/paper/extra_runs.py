"""Runs that experiments train or record themselves: made once, continued after an interruption, then read back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dvar.config.training import BUNDLED_MODEL, BUNDLED_MODELS, TrainingConfig
from dvar.diffusion.devices import float32_arithmetic
from dvar.errors import CheckpointError, RefusedInput
from dvar.locks import lock_folder
from dvar.mini import TUNING
from dvar.paper.config import ReproduceConfig
from dvar.paper.result import method_title
from dvar.recordings.concepts import concept_folders, laboratory_concepts
from dvar.recordings.config import RecordConfig
from dvar.recordings.recorded_run import RecordedRun
from dvar.recordings.spec import RecordingSpec, plan_recordings
from dvar.recordings.sweep import read_status, record_missing
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rules import FixedSteps
from dvar.stopping.trace import Trace
from dvar.training.checkpoint import latest_checkpoint
from dvar.training.loop import Series
from dvar.training.personalise import interruption, prepare
from dvar.training.run import TrainingRun


@dataclass(frozen=True)
class ExtraRuns:
    """The folder, model and concepts of the runs that experiments train themselves.

    Args:
        folder: Folder of the runs. Small and whole runs are in different folders, so that neither is taken for the
            other.
        quick: Whether the runs are small.
        model: Base model.
        concepts: Folder of concepts; the bundled concepts by default.
        notify: Called with a line of progress.
        records: Folder of recorded runs of the same size, if any.
    """

    folder: Path
    quick: bool
    model: str = BUNDLED_MODEL
    concepts: str | None = None
    notify: Callable[[str], None] = lambda line: None
    records: Path | None = None

    @classmethod
    def from_config(cls, config: ReproduceConfig, notify: Callable[[str], None]) -> ExtraRuns:
        """Return where the runs of a report are made."""
        folder = Path(config.output_dir) / "runs"
        return cls(folder, config.quick, config.model, config.concepts_dir, notify, config.records_folder)

    def recording_spec(self, experiment: str, concept: str | None = None, **settings: object) -> RecordingSpec:
        """Return the recording of an experiment's run: Textual Inversion of ``concept``, by default the first by name.

        Args:
            experiment: Name of the experiment, and of the run's folder.
            concept: Name of the concept.
            settings: Settings of the method that differ from the preset.
        """
        return RecordingSpec(
            method="textual-inversion",
            concept=concept or laboratory_concepts(self.concepts)[0],
            records=str(self.folder / experiment / ("quick" if self.quick else "whole")),
            protocol="quick" if self.quick else "cpu",
            model=self.model,
            concepts=self.concepts,
            settings=tuple(settings.items()),
        )

    def reuse_recorded(self, spec: RecordingSpec) -> RecordingSpec:
        """Return the same recording in ``records`` where it is finished there, else ``spec``."""
        there = replace(spec, records=str(self.records))
        return there if self.records and not there.find_conflict() and read_status(there).state == "done" else spec

    def small_sweep(self, concepts: int, tuning: int) -> list[RecordingSpec]:
        """Return the smallest sweep that shows everything: small runs of every method in ``records``.

        Args:
            concepts: Number of concepts that tables count.
            tuning: Number of further concepts for tuning.
        """
        names = [name for name in concept_folders(self.concepts) if name in TUNING][:tuning]
        config = RecordConfig(
            concepts=(*laboratory_concepts(self.concepts)[:concepts], *names),
            records=str(self.records),
            preset="quick",
            model=self.model,
            concepts_dir=self.concepts,
        )
        return plan_recordings(config)

    def describe(self, spec: RecordingSpec) -> str:
        """Return what a caption must say about a run."""
        model = BUNDLED_MODELS.get(spec.model, spec.model)
        small = " A small run (--quick): the whole one is longer, with larger batches." if self.quick else ""
        concepts = f"1, the first by name ({spec.concept.replace('_', ' ')})"
        return f"{method_title(spec.method)}. Base model: {model}. Concepts: {concepts}; seeds: 1.{small}"

    def record(self, specs: Sequence[RecordingSpec]) -> list[RecordedRun]:
        """Record the runs that are missing and return all of them; how long it takes is announced first.

        Raises:
            RefusedInput: A run failed.
        """
        failed = [row for row in record_missing(specs, self.notify) if row.state != "done"]
        if failed:
            raise RefusedInput(
                [f"{row.recording.name} is {row.state}: {row.reason or 'see its log'}" for row in failed]
            )
        return [RecordedRun.open(spec.folder) for spec in specs]


def train_to_cap(
    config: TrainingConfig, series: Callable[[TrainingRun], Series], notify: Callable[[str], None]
) -> Trace:
    """Return the trace of the run that ``config`` describes, trained to its cap whatever its rule says.

    A finished run is read, and an interrupted one continues from its last checkpoint.

    Args:
        config: The settings of the run.
        series: From the run, while its model is untouched, to what is measured at each step.
        notify: Called with a line of progress.

    Raises:
        CheckpointError: The folder holds a run under other settings.
        FolderInUse: Another process writes into the folder.
        KeyboardInterrupt: The user asked to stop.
        RefusedInput: The loss is not finite.
    """
    folder = Path(config.output_dir)
    tenth = max(1, config.max_train_steps // 10)
    with lock_folder(folder), float32_arithmetic(config.allow_tf32), interruption() as interrupted:
        try:
            latest_checkpoint(folder)
            resumed = replace(config, resume_from_checkpoint="latest")
        except CheckpointError:
            resumed = replace(config, overwrite=True)
        run, checkpoint = prepare(resumed)
        run.rule = FixedSteps(config.max_train_steps)
        measure = series(run)
        run.open(checkpoint)
        for step in run.steps(interrupted, measure):
            if step.step % tenth == 0:
                notify(f"step {step.step} of {config.max_train_steps}")
            if step.verdict.reason is Reason.INTERRUPTED:
                raise KeyboardInterrupt
            if step.verdict.reason is Reason.NON_FINITE:
                raise RefusedInput([f"training broke at step {step.step}: {step.verdict.sentence}"])
    return run.learner.trace
