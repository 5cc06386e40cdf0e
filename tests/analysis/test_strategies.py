"""Strategies on recorded runs: the same stop as in training, every cost counted, no stop after the recording ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from fake_record import write_fake_record

from dvar.analysis import families, strategies
from dvar.analysis.families import CLIP_FAMILY, CONSTANT_FAMILY, DVAR_FAMILY, FAMILIES, StrategyFamily, tune_family
from dvar.analysis.stop_quality import LearningCurve, assess_stop
from dvar.analysis.strategies import StopResult, Strategy, evaluate_strategies, evaluate_strategy
from dvar.recordings.protocol import START_UP_CLASS_IMAGES
from dvar.recordings.recorded_run import MEAN_SERIES, RecordedRun
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rules import AllOf, AnyOf, AtMost, Dvar, FixedSteps, Hall, NotBefore, Plateau, Rule, Trend
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict


@dataclass(frozen=True)
class ForeignRule:
    """A rule that the library does not know, on two series at once."""

    def __call__(self, trace: Trace) -> Verdict:
        stratified = trace.metric("stratified")[1]
        stop = len(trace.values) > 50 and trace.values[-1] < trace.values[:50].min() and stratified[-1] < stratified[0]
        return Verdict(bool(stop), Reason.RUNNING, trace.last_step, "foreign", {})


@dataclass(frozen=True)
class ForeignClock:
    """A rule that the library does not know, which stops between two values of its metric."""

    metric: str = "stratified"

    def __call__(self, trace: Trace) -> Verdict:
        return Verdict(trace.last_step >= 123, Reason.RUNNING, trace.last_step, "foreign", {})


RULES: tuple[Rule, ...] = (
    ForeignRule(),
    ForeignClock(),
    AnyOf((Dvar(60, 1e-9), ForeignRule())),
    Dvar(60, 0.15),
    Dvar(60, 0.15, strict_paper=True),
    Dvar(60, 0.15, metric="eval/first"),
    Hall(60, 0.002),
    Trend(60, 1e-5, metric="eval/first"),
    Plateau("eval", patience=40),
    FixedSteps(123),
    AnyOf((Dvar(60, 0.15), FixedSteps(100))),
    AllOf((Dvar(60, 0.15), Hall(60, 0.002))),
    NotBefore(Dvar(20, 0.15), 90),
    AtMost(Dvar(60, 1e-9), 77),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    return RecordedRun.open(write_fake_record(tmp_path_factory.mktemp("records"), cap=400, learned=40.0, noise=0.005))


def find_live_stop(rule: Rule, run: RecordedRun) -> int | None:
    """Return where the rule stops a run, by its own verdict after each step record."""
    trace = Trace(run.trace.header)
    means = {}
    for name in MEAN_SERIES:
        steps, values = run.series(name)
        means[name] = dict(zip(steps.tolist(), values.mean(axis=1).tolist(), strict=True))
    for row in run.trace.records:
        metrics = {name: values.get(row["step"]) for name, values in means.items()}
        trace.record(row["step"], row["eval"], **metrics)
        if rule(trace).stop:
            return trace.last_step
    return None


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_evaluating_is_running(run: RecordedRun, rule: Rule) -> None:
    result = evaluate_strategy(Strategy("way", rule), run)
    expected = find_live_stop(rule, run)
    assert (None if result.censored else result.stop) == expected


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_many_settings_at_once_stop_where_each_does_in_training(run: RecordedRun, family: StrategyFamily) -> None:
    settings = family.settings()[5::31]
    for strategy, result in evaluate_strategies([family.strategy(setting, 400) for setting in settings], run).items():
        if strategy.sample_every is None:
            assert (None if result.censored else result.stop) == find_live_stop(strategy.rule, run)
        assert result == evaluate_strategy(strategy, run)


def test_a_recording_that_ends_first_censors(run: RecordedRun) -> None:
    result = evaluate_strategy(Strategy("too long", FixedSteps(401)), run)
    assert (result.stop, result.censored) == (400, True)
    assert not evaluate_strategy(Strategy("just", FixedSteps(400)), run).censored


def test_every_strategy_pays_for_its_own_probe(run: RecordedRun) -> None:
    def forwards(rule: Rule) -> int:
        return evaluate_strategy(Strategy("way", AnyOf((rule, FixedSteps(100)))), run).forwards

    assert evaluate_strategy(Strategy("way", FixedSteps(100)), run).forwards == 0
    assert forwards(Dvar(60, 1e-9)) == 101 * 8
    assert forwards(AllOf((Dvar(60, 1e-9), Dvar(60, 1e-9, metric="eval/first")))) == 101 * 8
    assert forwards(Dvar(60, 1e-9, metric="stratified")) == 21 * 32
    assert forwards(Dvar(60, 1e-9, metric="paired")) == 21 * 8 * 2  # both models


def test_baseline_generates_images_to_its_own_cap_and_keeps_the_best(run: RecordedRun) -> None:
    strategy = Strategy("Baseline", FixedSteps(300), sample_every=100, keep_best=True)
    result = evaluate_strategy(strategy, run)
    # It wants images at 0, 100, 200 and 300; the scored steps 0, 105 and 218 have them, and the next is 314. Of their
    # 8 images it reads the half that chooses.
    assert (result.stop, result.images, result.forwards) == (300, 3 * 4, 0)
    steps, values = run.sample_scores(100)
    best = steps[steps <= 300][values[steps <= 300].argmax()]
    assert result.kept_step == best
    assert (np.diff(steps) >= 50).all()


def test_a_strategy_pays_for_the_images_that_it_read(tmp_path: Path) -> None:
    """A cadence finer than the scored steps reads no more images than were scored, and 8 at most of each step."""
    for images, read in ((8, 4), (16, 8), (32, 8)):
        run = RecordedRun.open(write_fake_record(tmp_path / str(images), cap=400, images=images))
        for every in (1, 5, 60):
            strategy = Strategy("CLIP-s", FixedSteps(200), sample_every=every, keep_best=True)
            measured = run.sample_scores(every)[0]
            assert evaluate_strategy(strategy, run).images == read * (measured <= 200).sum()
        assert (run.sample_scores(1)[0] == run.scored_steps).all()


def test_a_sample_is_eight_images_of_the_half_that_chooses(tmp_path: Path) -> None:
    run = RecordedRun.open(write_fake_record(tmp_path, cap=60, images=32, noise=0.05))
    _, values = run.scores("train", "clip_image")
    np.testing.assert_allclose(run.sample_scores(1)[1], values[:, 0:16:2].mean(axis=1))


def test_tuning_chooses_the_cheaper_of_two_settings_that_stop_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both cadences stop at the same step with the same checkpoint, and the dense one reads many more images."""
    monkeypatch.setattr(families, "baseline_cap", lambda run: 300)
    run = RecordedRun.open(write_fake_record(tmp_path, cap=300, learned=30.0))
    either = StrategyFamily("fixed", lambda n, t: FixedSteps(n), (0.0,), (0.4,), sample_shares=(0.01, 0.2))
    assert tune_family(either, [run]) == (0.4, 0.0, 0.2)


def test_a_checkpoint_is_chosen_by_images_that_are_not_reported(tmp_path: Path) -> None:
    run = RecordedRun.open(write_fake_record(tmp_path, cap=60, noise=0.01))
    before = run.sample_scores(1)[1]
    for values in run.image_scores.values():
        values[:, 1::2] = 0.0  # the odd images, which are reported
    np.testing.assert_array_equal(run.sample_scores(1)[1], before)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_the_same_budget_and_can_be_evaluated(run: RecordedRun, family: StrategyFamily) -> None:
    assert 20 <= len(family.settings()) <= 100
    assert len(set(family.settings())) == len(family.settings())
    strategy = family.strategy(family.settings()[-1], 400)
    assert strategies.can_evaluate(strategy.rule, run)
    assert isinstance(evaluate_strategy(strategy, run), StopResult)


@pytest.mark.parametrize(("name", "low", "high"), [("EMA percentile", 1e-5, 1e-2), ("Hall", 2e-4, 5e-2)])
def test_thresholds_that_the_paper_does_not_give_are_spaced_evenly(name: str, low: float, high: float) -> None:
    (family,) = (family for family in FAMILIES if family.name == name)
    assert (len(family.thresholds), family.thresholds[0], family.thresholds[-1]) == (10, low, high)
    octaves = np.diff(np.log2(family.thresholds))
    np.testing.assert_allclose(octaves, np.log2(high / low) / 9, atol=0.1)  # written with two digits


def test_tuning_a_constant_finds_the_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All concepts learn alike, so the fewest steps with 90 % of the gain are the oracle's, to one step of the grid."""
    monkeypatch.setattr(families, "baseline_cap", lambda run: 600)
    runs = [RecordedRun.open(write_fake_record(tmp_path, concept=name, cap=600)) for name in "ab"]
    setting = tune_family(CONSTANT_FAMILY, runs)
    assert setting is not None
    stop = evaluate_strategy(CONSTANT_FAMILY.strategy(setting, 600), runs[0]).stop
    oracle = LearningCurve.of_run(runs[0]).step_at()
    assert oracle <= stop <= 1.05 * oracle + 1
    assert abs(assess_stop(runs[0], stop).distance) < 0.1


def test_tuning_keeps_enough_of_the_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "baseline_cap", lambda run: 300)
    runs = [RecordedRun.open(write_fake_record(tmp_path, concept=name, cap=300, learned=30.0)) for name in "ab"]
    for family in (DVAR_FAMILY, CLIP_FAMILY):
        setting = tune_family(family, runs)
        assert setting is not None
        strategy = family.strategy(setting, 300)
        gains = [LearningCurve.of_run(run).gain_at(evaluate_strategy(strategy, run).kept_step) for run in runs]
        assert np.mean(gains) >= 0.9


def test_without_anything_learned_nothing_is_tuned(tmp_path: Path) -> None:
    run = RecordedRun.open(write_fake_record(tmp_path, cap=60, learned=1e12))
    assert tune_family(DVAR_FAMILY, [run]) is None
    assert tune_family(DVAR_FAMILY, []) is None


def test_minutes_are_counts_times_seconds() -> None:
    result = StopResult(stop=600, kept_step=600, censored=False, forwards=1200, images=30)
    assert strategies.estimate_minutes(result, {"train": 0.1, "forward": 0.05, "picture": 2.0}) == pytest.approx(3.0)
    assert np.isnan(strategies.estimate_minutes(result, {"train": 0.1}))
    assert strategies.estimate_minutes(StopResult(600, 600, False, 0, 0), {"train": 0.1}) == pytest.approx(1.0)


def with_config(run: RecordedRun, **settings: object) -> RecordedRun:
    return replace(run, config={"train_batch_size": 4, **settings})


def test_forward_equivalents_count_samples_and_passes(run: RecordedRun) -> None:
    result = StopResult(stop=10, kept_step=10, censored=False, forwards=7, images=3)
    # 10 updates of 4 samples, forward and backward; 7 held samples; 3 guided images of 25 sampling steps.
    assert strategies.count_forward_equivalents(result, with_config(run)) == 10 * 4 * 2 + 7 + 3 * 2 * 25
    accumulated = with_config(run, gradient_accumulation_steps=3)
    assert strategies.count_forward_equivalents(result, accumulated) == 10 * 12 * 2 + 7 + 150


@pytest.mark.parametrize(
    ("settings", "samples"),
    [
        ({}, 4),
        ({"prior_loss_weight": 1.0}, 8),  # Custom Diffusion always has class images,
        ({"prior_loss_weight": 0.0}, 4),  # unless their loss has no weight;
        ({"prior_loss_weight": 1.0, "with_prior_preservation": False}, 4),  # DreamBooth has them where asked
        ({"prior_loss_weight": 1.0, "with_prior_preservation": True}, 8),
    ],
)
def test_class_images_are_counted_where_a_run_trains_on_them(
    run: RecordedRun, settings: dict[str, object], samples: int
) -> None:
    result = StopResult(stop=10, kept_step=10, censored=False, forwards=0, images=0)
    assert strategies.count_forward_equivalents(result, with_config(run, **settings)) == 10 * samples * 2


def test_forwards_and_minutes_count_the_same_images(run: RecordedRun) -> None:
    """What was recorded is timed and counted, and not what the run's own sample images would take."""
    result = StopResult(stop=0, kept_step=0, censored=False, forwards=0, images=3)
    recorded = replace(with_config(run, num_inference_steps=25), header={**run.header, "sampling_steps": 10})
    assert strategies.count_forward_equivalents(result, recorded) == 3 * 2 * 10


@pytest.mark.parametrize(
    ("settings", "class_images"),
    [
        ({"num_class_images": 64, "prior_loss_weight": 1.0}, 64),
        ({"num_class_images": 64, "prior_loss_weight": 0.0}, 0),
        ({"num_class_images": 64, "prior_loss_weight": 1.0, "with_prior_preservation": False}, 0),
        ({"num_class_images": 64, "prior_loss_weight": 1.0, "class_data_dir": "images/cats"}, 0),
    ],
)
def test_starting_up_generates_all_class_images(
    run: RecordedRun, settings: dict[str, object], class_images: int
) -> None:
    """Unit seconds are measured with `START_UP_CLASS_IMAGES`; a class image takes the run's own sampling steps."""
    seconds = {"start_up": 3.0, "picture": 0.2}
    recorded = replace(with_config(run, num_inference_steps=25, **settings), header={"sampling_steps": 10})
    further = max(0, class_images - START_UP_CLASS_IMAGES)
    assert strategies.estimate_start_up(recorded, seconds) == pytest.approx((3.0 + further * 0.2 * 25 / 10) / 60)
    assert np.isnan(strategies.estimate_start_up(recorded, {"train": 0.1}))


def test_presets_are_shortened_as_the_training_is(run: RecordedRun) -> None:
    # The bundled model's cap for Textual Inversion is shorter than the paper's 6100.
    short = strategies.baseline_cap(run) / 6100
    assert strategies.time_scale(run) == pytest.approx(short)
    assert strategies.paper_dvar_strategy(run, scaled=False).rule == Dvar(310, 0.15, strict_paper=True)
    assert strategies.paper_dvar_strategy(run, scaled=True).rule == Dvar(round(310 * short), 0.15, strict_paper=True)
    clip_s = strategies.clip_s_strategy(run)
    assert clip_s.sample_every == round(50 * short)
    assert clip_s.rule == Plateau("clip_image", patience=round(7 * 50 * short), min_delta=0.02, mode="max")
