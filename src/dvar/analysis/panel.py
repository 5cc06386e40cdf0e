"""The panel's runs and where each rule of the protocol stops them, tuned by cross-validation over concepts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from dvar.analysis.families import FAMILIES, StrategyFamily
from dvar.analysis.prefilter import Prefilter
from dvar.analysis.stop_quality import LearningCurve
from dvar.config.presets import OCTAVE as OCTAVE_SETTINGS
from dvar.config.presets import preset_settings
from dvar.config.training import BUNDLED_MODELS
from dvar.errors import RefusedInput, name_some
from dvar.mini import TUNING
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.mixture import base_model_problems, group_runs, name_groups, protocol_of, protocol_problems
from dvar.recordings.panel import PRESET, PROTOCOL, STAGES, name_variation
from dvar.recordings.recorded_run import CHOOSE, Floats, RecordedRun, Steps
from dvar.stopping.octave import FIRST_STEP, Octave
from dvar.stopping.rules import Dvar, Rule
from dvar.stopping.trace import LOSS, Trace

STRATIFIED = "stratified"
OCTAVE, CONSTANT, CORRECTED = "octave", "constant", "constant × old rate / new rate"
DVAR_PRESET, DVAR_TUNED, TREND_TUNED = "DVAR, preset", "DVAR, tuned", "Trend, tuned"
OCTAVE_CHEAP, DVAR_STRATIFIED = "octave, cheap", "DVAR, tuned, 64 stratified draws"
PERFECT = "perfect rule"
REGISTERED = (OCTAVE, OCTAVE_CHEAP, CONSTANT, CORRECTED, DVAR_PRESET, DVAR_TUNED, TREND_TUNED)
LATER = (DVAR_STRATIFIED,)
"""Rules that the protocol does not name; nothing is claimed of them."""
CHEAP_DRAWS, CHEAP_PER_OCTAVE = OCTAVE_SETTINGS["eval_batch_size"][0], OCTAVE_SETTINGS["probes_per_octave"][0]
CHEAP_FIRST = FIRST_STEP // 2
"""What octave reads where it must be cheap: so many draws, how often in an octave, and from which step on."""
MIN_LENGTH = 4.0
"""Oracles that a run should be long."""
_TUNED = {DVAR_TUNED: ("DVAR", LOSS), DVAR_STRATIFIED: ("DVAR", STRATIFIED), TREND_TUNED: ("Trend", LOSS)}
"""Tuned rules: the family, and the series that it reads."""


@dataclass(frozen=True)
class Stop:
    """The end of a run by a rule: the step, and whether the record ended before the rule stopped."""

    step: float
    censored: bool = False


@dataclass(frozen=True, eq=False)
class PanelRun:
    """A run of the panel that has learned.

    Attributes:
        run: The recorded run.
        variation: What is changed in it, as the panel calls it.
        rate: Its learning rate over the preset's.
        oracle: The right step, by the images that are reported.
        choice: The right step by the other half of the images, what a perfect rule would stop at; nan if it has none.
    """

    run: RecordedRun
    variation: str
    rate: float
    oracle: float
    choice: float

    @classmethod
    def of(cls, run: RecordedRun) -> PanelRun:
        """Return a recorded run with its place in the panel."""
        rate = run.setting.get("learning_rate")
        return cls(
            run,
            _title(run),
            rate["value"] / rate["preset"] if rate else 1.0,
            max(LearningCurve.of_run(run).step_at(), 1.0),
            LearningCurve.of_run(run, CHOOSE).step_at(),
        )

    @property
    def is_short(self) -> bool:
        """Whether the run is shorter than `MIN_LENGTH` oracles."""
        return self.run.cap < MIN_LENGTH * self.oracle

    def error(self, stop: Stop) -> float:
        """Return the distance of a stop from the oracle, in octaves; nan for no stop."""
        return float(abs(np.log2(max(stop.step, 1.0) / self.oracle)))


@dataclass(frozen=True, eq=False)
class PanelRuns:
    """The runs of the panel that count, and those that do not.

    Attributes:
        runs: The runs that have learned.
        unlearned: The others.
    """

    runs: tuple[PanelRun, ...]
    unlearned: tuple[RecordedRun, ...]

    @classmethod
    def of(cls, archive: RecordingArchive) -> PanelRuns:
        """Return the panel in an archive.

        Raises:
            RefusedInput: There is none, or it is mixed with runs of another protocol, version or base model, some run
                is not in the plan of the panel, or lacks a series that a rule reads; the runs are named.
        """
        runs = [run for run in archive if protocol_of(run)[0] == PROTOCOL]
        if not runs:
            rule = "no run of the panel was recorded"
            raise RefusedInput([f"{rule}: dvar record --panel all records them, as docs/protocol.md says"])
        problems = [*_mixture_problems(list(archive)), *_plan_problems(runs), *_series_problems(runs)]
        if problems:
            raise RefusedInput(problems)
        learned = [run for run in runs if LearningCurve.of_run(run).learned]
        names = {run.name for run in learned}
        return cls(tuple(map(PanelRun.of, learned)), tuple(run for run in runs if run.name not in names))

    def select(self, variations: Iterable[str], methods: Iterable[str] = ()) -> list[PanelRun]:
        """Return the runs of these variations; with ``methods``, those of these methods alone."""
        variations, methods = set(variations), set(methods)
        return [run for run in self.runs if run.variation in variations and (not methods or run.run.method in methods)]

    def list_concepts(self, variations: Iterable[str]) -> set[str]:
        """Return the concepts that take part where these variations are compared.

        A concept does if a run of it, learned or not, was recorded in these variations or others of their stages: "3
        images" varies nothing for a concept that has three, and settings are chosen on it all the same.
        """
        titles = set(variations)
        for stage in STAGES:
            if titles & (of_stage := {variation.title for variation in stage.variations}):
                titles |= of_stage
        recorded = [*((run.run, run.variation) for run in self.runs), *((run, _title(run)) for run in self.unlearned)]
        return {run.concept for run, title in recorded if title in titles}


@dataclass(frozen=True, eq=False)
class PanelStops:
    """The stops of every rule on the runs of a comparison.

    Args:
        runs: The runs.
        presets: The runs at the preset on which settings are chosen.
    """

    runs: tuple[PanelRun, ...]
    presets: tuple[PanelRun, ...]

    @classmethod
    def of(cls, panel: PanelRuns, runs: Sequence[PanelRun], concepts: Collection[str]) -> PanelStops:
        """Return the stops on some runs of a panel, whose settings are chosen on these concepts at the preset."""
        presets = [run for run in panel.select([PRESET.title]) if run.run.concept in concepts]
        return cls(tuple(runs), tuple(presets))

    @cached_property
    def stops(self) -> Mapping[str, Mapping[PanelRun, Stop]]:
        """The stop of each rule on each run; a run without other concepts to tune on has none of the tuned rules."""
        stops: dict[str, dict[PanelRun, Stop]] = {name: {} for name in (*REGISTERED, *LATER, PERFECT)}
        for run in self.runs:
            stops[PERFECT] |= {run: Stop(run.choice)} if np.isfinite(run.choice) else {}
            stops[OCTAVE][run] = find_stops((Octave(),), run.run, STRATIFIED)[0]
            stops[OCTAVE_CHEAP][run] = find_stops((Octave(),), run.run, STRATIFIED, cheap=True)[0]
            preset = preset_settings("mini", run.run.method)
            rule = Dvar(int(preset["window"]), preset["threshold"], strict_paper=True)
            stops[DVAR_PRESET][run] = find_stops((rule,), run.run, LOSS)[0]
            others = self._others(run)
            if not others:
                continue
            constant = float(2 ** np.median([np.log2(other.oracle) for other in others]))
            stops[CONSTANT][run], stops[CORRECTED][run] = Stop(constant), Stop(constant / run.rate)
            for name, (family, series) in _TUNED.items():
                # Of equally good settings the first of the grid.
                best = int(np.mean([_grid_errors(name, other) for other in others], axis=0).argmin())
                stops[name][run] = find_stops((make_grid(family, run.run.method)[best],), run.run, series)[0]
        return stops

    def _others(self, run: PanelRun) -> list[PanelRun]:
        return [
            other
            for other in self.presets
            if other.run.method == run.run.method and other.run.concept != run.run.concept
        ]


def make_grid(family: str, method: str) -> tuple[Rule, ...]:
    """Return the rules of a family that are tried for a method, their windows in steps of its preset."""
    named = next(each for each in FAMILIES if each.name == family)
    return tuple(dict.fromkeys(_make_rule(named, setting, method) for setting in named.settings()))


def list_cheap_records(steps: Steps) -> Steps:
    """Return the indices of the records that the cheap octave reads: the first, and one in each sixth of an octave."""
    octaves = np.floor(CHEAP_PER_OCTAVE * np.log2(np.maximum(steps, 1)))
    first = np.concatenate([[True], (steps[1:] >= CHEAP_FIRST) & (octaves[1:] > octaves[:-1])])
    indices: Steps = np.flatnonzero(first)
    return indices


def find_stops(rules: Sequence[Rule], run: RecordedRun, series: str, *, cheap: bool = False) -> list[Stop]:
    """Return where each rule stops a run whose held losses are one of its series; the end of the record if nowhere.

    Args:
        rules: Rules that read the losses, such as `Octave`.
        run: A recorded run.
        series: Name of the series.
        cheap: Read only `CHEAP_DRAWS` of the draws, evenly, at `list_cheap_records`.
    """
    steps, losses = run.series(series)
    if cheap:
        records = list_cheap_records(steps)
        steps, losses = steps[records], losses[records, :: max(1, losses.shape[1] // CHEAP_DRAWS)]
    complete = Trace()
    for step, values in zip(steps.tolist(), losses, strict=True):
        complete.record(step, values)
    prefilter = Prefilter(complete)
    due: dict[Rule, list[int]] = {rule: np.flatnonzero(prefilter(rule)).tolist() for rule in rules}
    callers = defaultdict[int, list[Rule]](list)
    for rule, indices in due.items():
        for index in indices:
            callers[index].append(rule)
    stops: dict[Rule, Stop] = {}
    trace = Trace()
    for index, (step, values) in enumerate(zip(steps.tolist(), losses, strict=True)):
        trace.record(step, values)
        for rule in callers[index]:
            if rule not in stops and rule(trace).stop:
                stops[rule] = Stop(float(step))
    return [stops.get(rule, Stop(float(run.cap), censored=True)) for rule in rules]


@cache
def _grid_errors(name: str, run: PanelRun) -> Floats:
    """Return the errors of every setting of a tuned rule on a run, [settings]."""
    family, series = _TUNED[name]
    return np.array([run.error(stop) for stop in find_stops(make_grid(family, run.run.method), run.run, series)])


def _make_rule(family: StrategyFamily, setting: tuple[float, float, float], method: str) -> Rule:
    return family.strategy(setting, int(preset_settings("mini", method)["max_train_steps"])).rule


def _title(run: RecordedRun) -> str:
    return name_variation(run.setting) if run.setting else PRESET.title


def _mixture_problems(runs: Sequence[RecordedRun]) -> list[str]:
    """Return which protocols and base models are mixed, with the runs of each."""
    problems = [*protocol_problems(runs), *base_model_problems(runs)]
    models = group_runs((str(run.config.get("pretrained_model_name_or_path")), run) for run in runs)
    if others := {model: of_model for model, of_model in models.items() if model not in BUNDLED_MODELS}:
        names = name_groups(others)
        problems.append(f"the panel is of {' and '.join(BUNDLED_MODELS)}, got {names}: take the others away")
    return problems


def _plan_problems(runs: Sequence[RecordedRun]) -> list[str]:
    """Return which runs are none that the panel plans, though they were measured as it measures."""
    planned = {variation.title for stage in STAGES for variation in stage.variations}
    problems = []
    if seeds := [run.name for run in runs if run.seed]:
        problems.append(f"the panel is of seed 0, got {name_some(seeds)}: take them away")
    if tuning := [run.name for run in runs if run.concept in TUNING]:
        problems.append(f"tuning concepts take no part in the panel, got {name_some(tuning)}: take them away")
    if others := [run.name for run in runs if _title(run) not in planned]:
        problems.append(f"the panel varies what docs/protocol.md lists, got {name_some(others)}: take them away")
    return problems


def _series_problems(runs: Sequence[RecordedRun]) -> list[str]:
    """Return which rules read series that some runs lack."""
    problems = []
    for series, rules in ((STRATIFIED, (OCTAVE, OCTAVE_CHEAP, *LATER)), (LOSS, (DVAR_PRESET, DVAR_TUNED, TREND_TUNED))):
        if lacking := [run.name for run in runs if not run.has_series(series)]:
            names = ", ".join(rules)
            problems.append(f"{names} read the series {series!r}, which {name_some(lacking)} lacks: record it again")
    return problems
