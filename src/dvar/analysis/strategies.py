"""Strategies that end a run, and their evaluation on recorded runs."""

# Draws are keyed by step, so a run that stops early is the beginning of the same run that goes on: one recorded run
# answers for every strategy that ends inside it.  One that does not end there is censored: its stop is only known to be
# later.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np

from dvar.analysis.prefilter import Prefilter
from dvar.config import presets
from dvar.recordings.protocol import START_UP_CLASS_IMAGES
from dvar.recordings.recorded_run import MEAN_SERIES, SCORE, RecordedRun
from dvar.stopping.rules import CLIP_S, AllOf, Dvar, FixedSteps, Rule
from dvar.stopping.trace import LOSS, RELATIVE_LOSS, Trace

BACKWARD = 1
"""Forward-equivalents of one backward pass, through activations alone: few weights are trained."""
_CLIP_EVERY = 50


@dataclass(frozen=True)
class Strategy:
    """One way to end a run: a rule, and the images that its user generates to decide.

    Attributes:
        sample_every: Steps between two samples of `IMAGES` images, as far as the recording has them; None for a
            strategy without images.
        keep_best: Keep the checkpoint with the highest score, as Baseline and CLIP-s do, rather than the last one.
    """

    name: str
    rule: Rule
    sample_every: int | None = None
    keep_best: bool = False


@dataclass(frozen=True)
class StopResult:
    """The end of a recorded run by a strategy: its step, the step it keeps, and its cost.

    Attributes:
        stop: The step that the run is trained to.
        kept_step: The step of the checkpoint that is kept.
        censored: Whether the recording ends before the strategy stops.
        forwards: Held samples that the strategy's own probe sends through the model.
        images: Images that the strategy reads to decide; no more than were scored.
    """

    stop: int
    kept_step: int
    censored: bool
    forwards: int
    images: int


def baseline_cap(run: RecordedRun) -> int:
    """Return the steps of Baseline by the run's preset, or as much of them as the protocol trains."""
    return round(int(_preset(run)["max_train_steps"]) * float(run.header.get("share", 1.0)))


def time_scale(run: RecordedRun) -> float:
    """Return the length of the run's training relative to the paper's: the ratio of Baseline's steps."""
    return baseline_cap(run) / int(presets.preset_settings("paper", run.method)["max_train_steps"])


def baseline_strategy(run: RecordedRun) -> Strategy:
    """Return the original training: to the preset's last step, keeping the checkpoint with the best images."""
    every = max(1, round(_preset(run)["validation_steps"] * run.header.get("share", 1.0)))
    return Strategy("Baseline", FixedSteps(baseline_cap(run)), every, keep_best=True)


def clip_s_strategy(run: RecordedRun) -> Strategy:
    """Return CLIP-s with the released values, its cadence and patience shortened by `time_scale`."""
    rule, scale = CLIP_S[run.method], time_scale(run)
    shortened = replace(rule, patience=max(1, round(rule.patience * scale)))
    return Strategy("CLIP-s", shortened, max(1, round(_CLIP_EVERY * scale)), keep_best=True)


def paper_dvar_strategy(run: RecordedRun, scaled: bool) -> Strategy:
    """Return DVAR with the paper's values; ``scaled``: with its window shortened by `time_scale`."""
    name = "DVAR (preset scaled in time)" if scaled else "DVAR (paper's preset)"
    threshold = presets.preset_settings("paper", run.method)["threshold"]
    return Strategy(name, Dvar(paper_window(run, scaled), threshold, strict_paper=True))


def paper_window(run: RecordedRun, scaled: bool) -> int:
    """Return the paper's window of DVAR in steps; ``scaled``: shortened by `time_scale`."""
    window = int(presets.preset_settings("paper", run.method)["window"])
    return max(8, round(window * time_scale(run))) if scaled else window


def evaluate_strategy(strategy: Strategy, run: RecordedRun) -> StopResult:
    """Return where a strategy ends a recorded run."""
    return evaluate_strategies([strategy], run)[strategy]


def evaluate_strategies(strategies: Sequence[Strategy], run: RecordedRun) -> dict[Strategy, StopResult]:
    """Return where each strategy ends a recorded run, with every rule called at each step record, as in training."""
    results: dict[Strategy, StopResult] = {}
    for every in dict.fromkeys(strategy.sample_every for strategy in strategies):
        group = [strategy for strategy in strategies if strategy.sample_every == every]
        stops = _find_stops(list(dict.fromkeys(strategy.rule for strategy in group)), run, every)
        results |= {strategy: _stop_result(strategy, run, stops[strategy.rule]) for strategy in group}
    return results


def can_evaluate(rule: Rule, run: RecordedRun) -> bool:
    """Return whether the recorded run holds everything that the rule reads."""
    metrics = _metrics_of(rule)
    return all(run.has_series(name) for name in metrics - {SCORE, RELATIVE_LOSS}) and (
        SCORE not in metrics or ("train", SCORE) in run.image_scores
    )


def estimate_minutes(result: StopResult, unit_seconds: Mapping[str, float]) -> float:
    """Return the minutes of a run that ends as in ``result``, without start-up and final images.

    Args:
        unit_seconds: As `RecordedRun.unit_seconds`; where a unit that is needed is missing, the result is nan.
    """
    seconds = result.stop * unit_seconds.get("train", float("nan"))
    for count, unit in ((result.forwards, "forward"), (result.images, "picture")):
        seconds += count * unit_seconds.get(unit, float("nan")) if count else 0.0
    return seconds / 60


def estimate_start_up(run: RecordedRun, unit_seconds: Mapping[str, float]) -> float:
    """Return the minutes before the first step: loading the model, and generating the class images that a run needs.

    Args:
        run: A recorded run.
        unit_seconds: As for `estimate_minutes`; "start_up" was measured with `START_UP_CLASS_IMAGES`.
    """
    seconds, config = unit_seconds.get("start_up", float("nan")), run.config
    if _trains_on_class_images(config) and not config.get("class_data_dir"):
        further = max(0, config.get("num_class_images", 0) - START_UP_CLASS_IMAGES)
        length = config.get("num_inference_steps", 50) / _sampling_steps(run)
        seconds += further * length * unit_seconds.get("picture", float("nan"))
    return seconds / 60


def count_forward_equivalents(result: StopResult, run: RecordedRun) -> float:
    """Return the work of a run that ends as in ``result``, in forward passes of the U-Net for one sample.

    A trained sample is a forward pass and a backward pass, which counts as `BACKWARD`; a run with prior preservation
    trains on as many class images again; an image is two passes for each of the sampling steps that it was recorded
    with, since it is guided.

    Args:
        run: The run, whose settings and sampling steps count.
    """
    samples = run.config.get("train_batch_size", 1) * run.config.get("gradient_accumulation_steps", 1)
    samples *= 2 if _trains_on_class_images(run.config) else 1
    image = 2 * _sampling_steps(run)
    return float(result.stop * samples * (1 + BACKWARD) + result.forwards + result.images * image)


def _trains_on_class_images(config: Mapping[str, Any]) -> bool:
    """Return whether a run has a prior loss: Custom Diffusion unless its weight is 0, others where they are asked."""
    return bool(config.get("prior_loss_weight")) and bool(config.get("with_prior_preservation", True))


def _sampling_steps(run: RecordedRun) -> int:
    return int(run.header.get("sampling_steps") or run.config.get("num_inference_steps", 50))


def _preset(run: RecordedRun) -> Mapping[str, Any]:
    return presets.preset_settings(run.config.get("preset") or "paper", run.method)


def _find_stops(rules: Sequence[Rule], run: RecordedRun, every: int | None) -> dict[Rule, int | None]:
    """Return the first step at which each rule stops; None where it never does."""
    metrics = set().union(*(_metrics_of(rule) for rule in rules)) if rules else set()
    if not all(map(_is_builtin, rules)):  # what a foreign rule reads is not known, so it gets every series
        metrics |= {LOSS, *(name for name in MEAN_SERIES if run.has_series(name))}
    *_, complete = run.replay(metrics, every)
    prefilter = Prefilter(complete)
    due: dict[int, list[Rule]] = {}
    for rule in rules:
        for number in np.flatnonzero(prefilter(rule)).tolist():
            due.setdefault(number, []).append(rule)
    last, answers = max(due, default=-1), dict[Rule, tuple[int, bool]]()
    stops: dict[Rule, int | None] = dict.fromkeys(rules)
    for number, trace in enumerate(run.replay(metrics, every)):
        for rule in due.get(number, ()):
            if stops[rule] is None and _stops(rule, trace, answers):
                stops[rule] = trace.last_step
        if number >= last or None not in stops.values():
            break
    return stops


def _stops(rule: Rule, trace: Trace, answers: dict[Rule, tuple[int, bool]]) -> bool:
    """Return whether the rule stops; of rules that must all stop, none is called after one that does not.

    A rule that reads one metric is called again only when that has a new value.

    Args:
        answers: The answer of each rule, with the number of values that it has seen.
    """
    if isinstance(rule, AllOf):
        return all(_stops(part, trace, answers) for part in rule.rules)
    metric = getattr(rule, "metric", None)
    if metric is None or not _is_builtin(rule):
        return rule(trace).stop
    count = len(trace.metric(metric)[0])
    if rule not in answers or answers[rule][0] != count:
        answers[rule] = count, rule(trace).stop
    return answers[rule][1]


def _stop_result(strategy: Strategy, run: RecordedRun, stop: int | None) -> StopResult:
    """Return the result of a strategy whose rule stops at ``stop``, or never."""
    end = run.cap if stop is None else stop
    probed = {LOSS if name == RELATIVE_LOSS else name for name in _metrics_of(strategy.rule) - {SCORE}}
    forwards = sum(run.count_samples(name, end) for name in sorted(probed))
    kept_step, images = end, 0
    if strategy.sample_every:
        steps, values = run.sample_scores(strategy.sample_every)
        images = run.sample_size * int((steps <= end).sum())
        if strategy.keep_best:
            kept_step = int(steps[steps <= end][values[steps <= end].argmax()])
    return StopResult(end, kept_step, stop is None, forwards, images)


def _metrics_of(rule: Any) -> set[str]:
    """Return the metrics that a rule says it reads, those of the rules inside it included."""
    metrics = {rule.metric} if hasattr(rule, "metric") else set()
    return metrics.union(*map(_metrics_of, _inner_rules(rule)))


def _is_builtin(rule: Any) -> bool:
    """Return whether a rule and those inside it are of this library."""
    return type(rule).__module__.startswith("dvar.") and all(map(_is_builtin, _inner_rules(rule)))


def _inner_rules(rule: Any) -> Iterator[Any]:
    """Yield the rules that a combined rule is made of."""
    for item in fields(rule) if is_dataclass(rule) else ():
        value = getattr(rule, item.name)
        yield from (part for part in (value if isinstance(value, tuple) else (value,)) if callable(part))
