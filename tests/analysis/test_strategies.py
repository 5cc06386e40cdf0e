"""Ways read off records: the same stop as live, a price for everything, and no stop where the record ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from fake_record import fake_record

from dvar.analysis import strategies
from dvar.analysis.stop_quality import LearningCurve, outcome
from dvar.analysis.strategies import (
    CLIP,
    CONSTANT,
    DVAR,
    KINDS,
    StopResult,
    Strategy,
    StrategyFamily,
    read,
    read_all,
    tune,
)
from dvar.recordings.archive import RecordedRun
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rules import AllOf, AnyOf, AtMost, Dvar, FixedSteps, Hall, NotBefore, Plateau, Rule, Trend
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict


@dataclass(frozen=True)
class Another:
    """A rule that the library knows nothing of, on two series at once."""

    def __call__(self, trace: Trace) -> Verdict:
        stratified = trace.metric("stratified")[1]
        stop = len(trace.values) > 50 and trace.values[-1] < trace.values[:50].min() and stratified[-1] < stratified[0]
        return Verdict(bool(stop), Reason.RUNNING, trace.last_step, "another's", {})


RULES: tuple[Rule, ...] = (
    Another(),
    AnyOf((Dvar(60, 1e-9), Another())),
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
def record(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    return RecordedRun.open(fake_record(tmp_path_factory.mktemp("records"), cap=400, learned=40.0, noise=0.005))


def live(rule: Rule, record: RecordedRun) -> int | None:
    """Where the rule stops a run: its own verdict after each record."""
    trace = Trace(record.trace.header)
    means = {name: dict(zip(*strategies._means(record, name), strict=True)) for name in strategies.EXTRA}
    for row in record.trace.records:
        found = {name: values.get(row["step"]) for name, values in means.items()}
        trace.record(row["step"], row["eval"], **found)
        if rule(trace).stop:
            return trace.last_step
    return None


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_reading_is_running(record: RecordedRun, rule: Rule) -> None:
    reading = read(Strategy("way", rule), record)
    expected = live(rule, record)
    assert (None if reading.censored else reading.stop) == expected


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_many_settings_read_at_once_stop_where_each_alone_does_live(record: RecordedRun, kind: StrategyFamily) -> None:
    settings = kind.grid()[5::31]
    for way, reading in read_all([kind.way(one, 400) for one in settings], record).items():
        if way.every is None:
            assert (None if reading.censored else reading.stop) == live(way.rule, record)
        assert reading == read(way, record)


def test_a_record_that_ends_first_censors(record: RecordedRun) -> None:
    reading = read(Strategy("too long", FixedSteps(401)), record)
    assert (reading.stop, reading.censored) == (400, True)
    assert not read(Strategy("just", FixedSteps(400)), record).censored


def test_every_way_pays_for_its_own_probe(record: RecordedRun) -> None:
    def forwards(rule: Rule) -> int:
        return read(Strategy("way", AnyOf((rule, FixedSteps(100)))), record).forwards

    assert read(Strategy("way", FixedSteps(100)), record).forwards == 0
    assert forwards(Dvar(60, 1e-9)) == 101 * 8
    assert forwards(AllOf((Dvar(60, 1e-9), Dvar(60, 1e-9, metric="eval/first")))) == 101 * 8
    assert forwards(Dvar(60, 1e-9, metric="stratified")) == 21 * 32
    assert forwards(Dvar(60, 1e-9, metric="paired")) == 21 * 8 * 2  # both models


def test_baseline_draws_pictures_to_its_own_cap_and_keeps_the_best(record: RecordedRun) -> None:
    way = Strategy("Baseline", FixedSteps(300), every=100, best=True)
    reading = read(way, record)
    assert (reading.stop, reading.pictures, reading.forwards) == (300, 4 * 8, 0)
    steps, values = strategies.measured(record, 100)
    best = steps[steps <= 300][values[steps <= 300].argmax()]
    assert reading.kept == best
    assert (np.diff(steps) >= 50).all()


def test_a_checkpoint_is_chosen_by_pictures_that_are_not_reported(tmp_path: Path) -> None:
    record = RecordedRun.open(fake_record(tmp_path, cap=60, noise=0.01))
    before = strategies.measured(record, 1)[1]
    for values in record.pictures.values():
        values[:, 1::2] = 0.0  # the odd pictures, which are reported
    np.testing.assert_array_equal(strategies.measured(record, 1)[1], before)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_has_the_same_budget_and_can_be_read(record: RecordedRun, kind: StrategyFamily) -> None:
    assert 20 <= len(kind.grid()) <= 100
    assert len(set(kind.grid())) == len(kind.grid())
    way = kind.way(kind.grid()[-1], 400)
    assert strategies.readable(way.rule, record)
    assert isinstance(read(way, record), StopResult)


def test_tuning_a_constant_finds_the_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All concepts learn alike, so the fewest steps with 90 % of the gain are the oracle's, to one step of the grid."""
    monkeypatch.setattr(strategies, "cap", lambda record: 600)
    records = [RecordedRun.open(fake_record(tmp_path, concept=name, cap=600)) for name in "ab"]
    setting = tune(CONSTANT, records)
    assert setting is not None
    stop = read(CONSTANT.way(setting, 600), records[0]).stop
    oracle = LearningCurve.of(records[0]).reached()
    assert oracle <= stop <= 1.05 * oracle + 1
    assert abs(outcome(records[0], stop).distance) < 0.1


def test_tuning_keeps_enough_of_the_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "cap", lambda record: 300)
    records = [RecordedRun.open(fake_record(tmp_path, concept=name, cap=300, learned=30.0)) for name in "ab"]
    for kind in (DVAR, CLIP):
        setting = tune(kind, records)
        assert setting is not None
        kept = [LearningCurve.of(one).at(read(kind.way(setting, 300), one).kept) for one in records]
        assert np.mean(kept) >= 0.9


def test_without_anything_learned_nothing_is_tuned(tmp_path: Path) -> None:
    record = RecordedRun.open(fake_record(tmp_path, cap=60, learned=1e12))
    assert tune(DVAR, [record]) is None
    assert tune(DVAR, []) is None


def test_minutes_are_counts_times_seconds() -> None:
    reading = StopResult(stop=600, kept=600, censored=False, forwards=1200, pictures=30)
    assert strategies.minutes(reading, {"train": 0.1, "forward": 0.05, "picture": 2.0}) == pytest.approx(3.0)
    assert np.isnan(strategies.minutes(reading, {"train": 0.1}))
    assert strategies.minutes(StopResult(600, 600, False, 0, 0), {"train": 0.1}) == pytest.approx(1.0)


def test_forward_equivalents_count_samples_and_passes() -> None:
    reading = StopResult(stop=10, kept=10, censored=False, forwards=7, pictures=3)
    config = {"train_batch_size": 4, "num_inference_steps": 25}
    assert strategies.forward_equivalents(reading, config) == 10 * 4 * 2 + 7 + 3 * 2 * 25
    assert strategies.forward_equivalents(reading, config | {"prior_loss_weight": 1.0}) == 10 * 8 * 2 + 7 + 150


def test_presets_are_shortened_as_the_training_is(record: RecordedRun) -> None:
    # The bundled model's cap for Textual Inversion is shorter than the paper's 6100.
    short = strategies.cap(record) / 6100
    assert strategies.in_time(record) == pytest.approx(short)
    assert strategies.paper_dvar(record, scaled=False).rule == Dvar(310, 0.15, strict_paper=True)
    assert strategies.paper_dvar(record, scaled=True).rule == Dvar(round(310 * short), 0.15, strict_paper=True)
    assert strategies.clip_s(record).every == round(50 * short)
