"""Octave against its definition, its invariants, and the curves that it must not stop on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dvar import AnyOf, FixedSteps, Reason, RefusedInput, Trace
from dvar.stopping.rule import build_rule
from dvar.stopping.rules import Octave
from dvar.testing import RuleContract

EIGHTHS = sorted({round(2 ** (k / 8)) for k in range(16, 97)})
"""Steps of which each octave holds eight, from 4 to 4,096."""


class TestOctave(RuleContract):
    rule = Octave()


class TestOctaveOnAnotherMetric(RuleContract):
    rule = Octave(metric="held", first_step=16)
    metric = "held"


def record(steps: Iterable[int], curves: Sequence[Callable[[int], float]]) -> Trace:
    trace = Trace()
    for step in [0, *steps]:
        trace.record(step, [curve(step) for curve in curves])
    return trace


def find_stop(trace: Trace, rule: Octave) -> int | None:
    """Return the first step at which ``rule`` stops, replayed record by record."""
    steps = trace.steps.tolist()
    return next((step for step in steps if rule(trace.cut(step)).stop), None)


def exponential(scale: float, first: float = 1.0, fall: float = 0.2) -> Callable[[int], float]:
    return lambda step: first * (1 - fall * (1 - math.exp(-step / scale)))


def late_logarithm(step: int) -> float:
    return 1 - 0.02 * max(0.0, math.log2(max(step, 1)) - 5)


def holds_by_definition(trace: Trace, share: float, agreement: float, noise: float) -> bool:
    """Return the condition at the newest record, written out as the rule's page defines it."""
    t = trace.last_step
    samples = dict(zip(trace.steps.tolist(), trace.samples.tolist(), strict=True))
    first, octave = samples[0], [step for step in samples if t / 2 < step <= t]
    gains = {
        step: [1 - now / start for now, start in zip(losses, first, strict=True)] for step, losses in samples.items()
    }
    count = len(first)
    recent = [step for step in samples if t / math.sqrt(2) < step <= t]
    level = [sum(gains[step][i] for step in recent) / len(recent) for i in range(count)]

    def line(values: Sequence[float]) -> tuple[float, float]:
        slope, at_zero = np.polyfit([math.log2(step) for step in octave], values, 1)
        return float(slope), float(at_zero)

    slopes = [line([gains[step][i] for step in octave])[0] for i in range(count)]
    means = [sum(gains[step]) / count for step in octave]
    slope, at_zero = line(means)
    squares = sum((mean - slope * math.log2(s) - at_zero) ** 2 for s, mean in zip(octave, means, strict=True))
    sigma = math.sqrt(squares / (len(octave) - 2))
    doubts = [share * level[i] - slopes[i] for i in range(count)]
    mean_doubt = sum(doubts) / count
    spread = math.sqrt(sum((doubt - mean_doubt) ** 2 for doubt in doubts) / count)
    return bool(sum(level) / count > noise * sigma and mean_doubt > agreement * spread)


@given(
    scales=st.lists(st.floats(20, 2000), min_size=1, max_size=6),
    jitter=st.floats(0, 0.02),
    seed=st.integers(0, 9),
    until=st.integers(40, 80),
)
def test_it_is_its_definition(scales: list[float], jitter: float, seed: int, until: int) -> None:
    rng = np.random.default_rng(seed)
    curves = [exponential(scale, first=1 + index) for index, scale in enumerate(scales)]
    trace = record(
        EIGHTHS[:until],
        [lambda step, curve=curve: curve(step) * (1 + jitter * rng.standard_normal() * (step > 0)) for curve in curves],  # type: ignore[misc]
    )
    verdict = Octave()(trace)
    metrics = verdict.metrics
    # On the edge of its condition either answer is right: the two compute in another order.
    assume(abs(metrics["doubt"] - 0.6 * metrics["disagreement"]) > 1e-12)
    assume(abs(metrics["gain"] - 4 * metrics["noise"]) > 1e-12)
    assert verdict.stop == holds_by_definition(trace, 0.45, 0.6, 4.0)


@given(scale=st.floats(60, 300), slower=st.sampled_from([2, 4]))
def test_a_run_that_learns_more_slowly_stops_as_much_later(scale: float, slower: int) -> None:
    steps = [step for step in EIGHTHS if step <= 1024]
    stop = find_stop(record(steps, [exponential(scale)]), Octave())
    assert stop is not None
    later = find_stop(record([slower * step for step in steps], [exponential(slower * scale)]), Octave())
    assert stop == 64 or later == slower * stop  # before the floor of 64 steps nothing stops


@given(factors=st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3))
def test_the_scale_of_a_sample_does_not_matter(factors: list[float]) -> None:
    scales = (50.0, 120.0, 300.0)
    plain = record(EIGHTHS, [exponential(scale) for scale in scales])
    scaled = record(EIGHTHS, [exponential(scale, first) for scale, first in zip(scales, factors, strict=True)])
    assert find_stop(plain, Octave()) == find_stop(scaled, Octave())


def test_where_a_curve_in_log_time_stops() -> None:
    """x = c (log2(t) - 5) from step 32 on has s = c and G = c (m - 5), m being the mean of log2 over (t / sqrt(2), t]:
    the rule stops at the first step with m > 5 + 1 / 0.45."""
    stop = find_stop(record(EIGHTHS, [late_logarithm]), Octave())
    # Of eight an octave (t / sqrt(2), t] holds four: their middle lies 3/16 of an octave before t.
    assert stop == min(step for step in EIGHTHS if math.log2(step) > 5 + 3 / 16 + 1 / 0.45)


def test_a_power_that_never_slows_does_not_stop() -> None:
    """x = c t: the last doubling brings half of the gain at t, 0.69 octave-slopes of it, at every t."""
    assert find_stop(record(EIGHTHS, [lambda step: 1 - 1e-4 * step]), Octave()) is None


@pytest.mark.parametrize("level", [1e-4, 1e-2])
def test_noise_alone_never_stops(level: float) -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        trace = record(EIGHTHS[:64], [lambda step: 1 + level * rng.standard_normal()] * 8)
        assert find_stop(trace, Octave()) is None


def test_a_loss_that_rises_never_stops() -> None:
    assert find_stop(record(EIGHTHS, [lambda step: 1 + 1e-4 * step] * 3), Octave()) is None


def test_samples_that_disagree_delay_the_stop() -> None:
    """One sample that still learns among seven that are done."""
    done, learning = [exponential(40.0)] * 7, lambda step: 1 - 8e-3 * step
    agreed = find_stop(record(EIGHTHS, done), Octave())
    split = find_stop(record(EIGHTHS, [*done, learning]), Octave())
    assert agreed is not None
    assert split is None or split > agreed
    assert find_stop(record(EIGHTHS, [*done, learning]), Octave(agreement=0)) == agreed


def test_what_it_waits_for_is_said() -> None:
    curves = [exponential(200.0)]
    short = Octave()(record(EIGHTHS[:20], curves))
    assert short.reason is Reason.WARMING_UP
    assert "warming up, 32 of 64 steps" in str(short)
    flat = Octave()(record(EIGHTHS, [lambda step: 1.0]))
    assert str(flat).endswith("the samples' losses have fallen by 0 %, no more than 4 times the noise of 0 %")
    early = Octave()(record([step for step in EIGHTHS if step <= 100], curves))
    assert not early.stop
    assert "the last doubling of the steps brought" in str(early)
    stop = Octave()(record(EIGHTHS, curves))
    assert (stop.stop, stop.reason) == (True, Reason.STABILISED)
    assert "% of the gain (limit 45 %)" in str(stop)


def test_the_share_of_the_last_doubling_is_that_of_the_gain() -> None:
    """x = c (log2(t) - 5) has s = c and G = c (m - 5), m being the mean of log2 over (t / sqrt(2), t]."""
    trace = record([step for step in EIGHTHS if step <= 128], [late_logarithm])
    verdict = Octave()(trace)
    assert (verdict.stop, verdict.reason) == (False, Reason.RUNNING)
    share = verdict.metrics["octave_gain"] / verdict.metrics["gain"]
    # Steps are whole numbers, so that 91 lies inside (90.5, 128]: the middle one of five is 2/8 before the last.
    assert share == pytest.approx(1 / (2 - 2 / 8), rel=0.01)
    assert verdict.sentence == (
        f"go on at step 128: the last doubling of the steps brought {100 * share:.3g} % of the gain (limit 45 %)"
    )


def test_an_empty_trace_has_no_records() -> None:
    verdict = Octave()(Trace())
    assert (verdict.rule, verdict.metrics) == ("Octave()", {"window": 64, "seen": 0, "records": 0})


def test_an_octave_with_too_few_records_says_how_many_it_needs() -> None:
    verdict = Octave()(record([40, 64], [exponential(200.0)]))
    assert verdict.sentence == "go on at step 64: warming up, 64 of 64 steps, 2 of the 4 records needed"


def test_the_earliest_stop_may_be_as_early_as_the_records_of_an_octave() -> None:
    assert Octave(first_step=4).first_step == 4


def test_a_stop_shows_what_speaks_against_it_and_stops_all_the_same() -> None:
    falling = record(EIGHTHS, [late_logarithm])
    stop = find_stop(falling, Octave())
    assert stop is not None
    verdict = Octave()(falling.cut(stop))
    assert verdict.stop
    (doubt,) = (diagnosis for diagnosis in verdict.diagnoses if diagnosis.reason is Reason.STILL_FALLING)
    assert doubt.metrics["window"] == math.ceil(stop / 2)  # the last octave


def test_a_run_that_began_at_another_step_is_judged_from_there() -> None:
    curve = exponential(100.0)
    plain, shifted = record(EIGHTHS, [curve]), Trace()
    for step in [0, *EIGHTHS]:
        shifted.record(5000 + step, [curve(step)])
    stop = find_stop(plain, Octave())
    assert stop is not None
    assert find_stop(shifted, Octave()) == 5000 + stop


def test_the_cap_ends_what_it_does_not() -> None:
    trace = record(EIGHTHS, [lambda step: 1.0])
    verdict = AnyOf((Octave(), FixedSteps(trace.last_step)))(trace)
    assert (verdict.stop, verdict.reason) == (True, Reason.CAP)


def test_losses_that_are_not_positive_are_refused() -> None:
    trace = Trace()
    trace.record(0, [0.3, 0.0])
    with pytest.raises(RefusedInput, match="first losses, and that of sample 1 is 0"):
        Octave()(trace)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.0}, "share must lie between 0 and 1"),
        ({"share": "a"}, "share must lie between 0 and 1"),
        ({"agreement": -1}, "agreement must be a finite number, 0 or more, got -1"),
        ({"noise": math.inf}, "noise must be a finite number, 0 or more, got inf"),
        ({"first_step": 3}, "first_step must be a whole number of steps, 4 or more, got 3"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedInput, match=message):
        Octave(**settings)


def test_it_can_be_chosen_by_name() -> None:
    assert build_rule("octave", {"window": 310, "threshold": 0.15}) == Octave()
