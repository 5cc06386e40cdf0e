"""The registry of experiments: what each is called, what it needs, and the function that makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from dvar.config.fields import invalid_fields
from dvar.errors import suggest
from dvar.files import writing_problem
from dvar.paper.config import ReproduceConfig
from dvar.registry import Registry

# Everything else is imported by the functions below when they are called: the names and titles that `dvar --help`
# lists, and the check of the settings, need neither matplotlib nor torch.
if TYPE_CHECKING:
    from dvar.paper.extra_runs import ExtraRuns
    from dvar.paper.result import ExperimentResult
    from dvar.recordings.archive import RecordingArchive
    from dvar.recordings.recorded_run import RecordedRun
    from dvar.recordings.spec import RecordingSpec

Needs = Literal["recorded runs", "runs of its own", "nothing"]


@dataclass(frozen=True)
class ExperimentInputs:
    """The inputs of an experiment.

    Args:
        config: The settings of ``dvar reproduce``.
        archive: The recorded runs; empty when no experiment that was asked for needs them.
        notify: Called with a line of progress.
    """

    config: ReproduceConfig
    archive: RecordingArchive
    notify: Callable[[str], None] = lambda line: None

    @cached_property
    def extra_runs(self) -> ExtraRuns:
        """Return where runs of its own are made. Importing it imports torch."""
        from dvar.paper.extra_runs import ExtraRuns

        return ExtraRuns.from_config(self.config, self.notify)


MakeResult = Callable[[ExperimentInputs], "ExperimentResult"]


@dataclass(frozen=True)
class Experiment:
    """One table or figure of the laboratory.

    Args:
        name: Its name on the command line and in the names of its files.
        title: Its heading on the page and in the help text.
        needs: What it is made from: recorded runs, runs that it trains or records itself, or nothing.
        make: Make the result; it imports what is slow to import when it is called.
        recordings: The runs that it records itself, so that all of them can be recorded in one sweep beforehand.
        checkpoints: The steps of each recorded run whose checkpoints are scored again, on fresh seeds, beforehand.
    """

    name: str
    title: str
    needs: Needs
    make: MakeResult
    recordings: Callable[[ExtraRuns], list[RecordingSpec]] | None = None
    checkpoints: Callable[[RecordingArchive], dict[RecordedRun, set[int]]] | None = None

    @property
    def summary(self) -> str:
        """Return the title, and whether the experiment trains runs of its own."""
        return f"{self.title}; trains runs of its own" if self.needs == "runs of its own" else self.title


EXPERIMENTS: Registry[Experiment] = Registry("experiment", plugins="dvar.experiments")
"""Every experiment by its name, in the order of the report. Other packages add theirs by an entry point."""


def selected_experiments(config: ReproduceConfig) -> list[Experiment]:
    """Return the experiments that ``config`` names, each once; "all" names every one."""
    return [EXPERIMENTS.find(name) for name in (EXPERIMENTS if "all" in config.names else dict.fromkeys(config.names))]


def reproduce_problems(config: ReproduceConfig) -> list[str]:
    """Return everything wrong with ``config``, one line each; empty when it can be used."""
    names = ["all", *EXPERIMENTS]
    problems = [message for _, message in invalid_fields(config)]
    if not problems and (problem := writing_problem(config.output_dir, folder=True)):
        problems.append(f"output_dir must be a folder that can be written, and {problem}: name another")
    problems += [
        f"there is no experiment {name!r}: {suggest(name, names)}" for name in config.names if name not in names
    ]
    return problems


def _experiment(
    name: str,
    title: str,
    needs: Needs = "recorded runs",
    *,
    recordings: Callable[[ExtraRuns], list[RecordingSpec]] | None = None,
    checkpoints: Callable[[RecordingArchive], dict[RecordedRun, set[int]]] | None = None,
) -> Callable[[MakeResult], MakeResult]:
    """Register the decorated function as what makes this experiment."""

    def register(make: MakeResult) -> MakeResult:
        EXPERIMENTS.register(name, Experiment(name, title, needs, make, recordings, checkpoints))
        return make

    return register


def _checkpoints_of_table_1(archive: RecordingArchive) -> dict[RecordedRun, set[int]]:
    from dvar.analysis.strategy_costs import kept_steps

    return kept_steps(archive)


def _recordings_of_initializers(extra_runs: ExtraRuns) -> list[RecordingSpec]:
    from dvar.paper.experiments import variants

    return variants.variant_recordings(extra_runs, variants.INITIALIZERS)


def _recordings_of_optimizers(extra_runs: ExtraRuns) -> list[RecordingSpec]:
    from dvar.paper.experiments import variants

    return variants.variant_recordings(extra_runs, variants.OPTIMIZERS)


@_experiment("table1", "Table 1: what each strategy costs and keeps", checkpoints=_checkpoints_of_table_1)
def _table_1(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.cost import table_1

    return table_1(inputs.archive)


@_experiment("agreement", "Stops read from recorded runs, checked by running them again")
def _agreement(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.replay_check import compare_replay_with_runs

    return compare_replay_with_runs(inputs.archive)


@_experiment("rules", "Every stopping rule, ranked on recorded runs")
def _rules(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.rule_ranking import rank_rules

    return rank_rules(inputs.archive, inputs.notify)


@_experiment("panel", "The panel: stopping rules where the time scale is not known")
def _panel(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.panel import compare_on_panel

    return compare_on_panel(inputs.archive)


@_experiment("figure1", "Figure 1: the training loss and the deterministic loss")
def _figure_1(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.convergence import figure_1

    return figure_1(inputs.archive)


@_experiment("figure2", "Figure 2: convergence of Textual Inversion")
def _figure_2(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.convergence import figure_2

    return figure_2(inputs.archive)


@_experiment("figure4", "Figure 4: scores during training, and where each strategy stops")
def _figure_4(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.scores import figure_4

    return figure_4(inputs.archive)


@_experiment("figure5", "Figure 5: which source of randomness hides convergence", "runs of its own")
def _figure_5(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.randomness import figure_5

    return figure_5(inputs.extra_runs)


@_experiment("figure6", "Figure 6: convergence of Custom Diffusion")
def _figure_6(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.convergence import figure_6

    return figure_6(inputs.archive)


@_experiment("figure7", "Figure 7: convergence of DreamBooth-LoRA")
def _figure_7(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.convergence import figure_7

    return figure_7(inputs.archive)


@_experiment("figure8", "Figure 8: smaller held batches")
def _figure_8(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.held_batch import figure_8

    return figure_8(inputs.archive)


@_experiment("figure9", "Figure 9: larger training batches", "runs of its own")
def _figure_9(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.training_batch import figure_9

    return figure_9(inputs.extra_runs)


@_experiment("figure11", "Figure 11: what other rules measure")
def _figure_11(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.other_rules import figure_11

    return figure_11(inputs.archive)


@_experiment("figure12", "Figure 12: images where DVAR and Baseline stop, side by side")
def _figure_12(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.samples import figure_12

    return figure_12(inputs.archive)


@_experiment("figure14", "Figure 14: convergence on more concepts")
def _figure_14(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.convergence import figure_14

    return figure_14(inputs.archive)


@_experiment("table2", "Table 2: which strategy people prefer (simulated)", "nothing")
def _table_2(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.human_evaluation import table_2

    return table_2()


@_experiment("table3", "Table 3: timesteps and scores")
def _table_3(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.timesteps import table_3

    return table_3(inputs.archive)


@_experiment(
    "initial",
    "First version of the paper: the initializer token",
    "runs of its own",
    recordings=_recordings_of_initializers,
)
def _initializers(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.variants import compare_initializers

    return compare_initializers(inputs.extra_runs)


@_experiment(
    "sam",
    "First version of the paper: SAM instead of AdamW",
    "runs of its own",
    recordings=_recordings_of_optimizers,
)
def _optimizers(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.variants import compare_optimizers

    return compare_optimizers(inputs.extra_runs)


@_experiment("traces", "All recorded runs in one file")
def _traces(inputs: ExperimentInputs) -> ExperimentResult:
    from dvar.paper.experiments.traces import write_traces_file

    return write_traces_file(inputs.archive, inputs.config.output_dir)
