"""DVAR against its definition, its golden numbers and its laws; caps and compositions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dvar import AnyOf, Criterion, Dvar, FixedSteps, Reason, RefusedInput, Trace, Verdict
from dvar.stopper.rules import schedule_problems

PAPER = ((310, 0.15), (440, 0.4), (180, 0.15))


def traced(values: Iterable[float], first: int = 0, every: int = 1) -> Trace:
    trace = Trace()
    for index, value in enumerate(values):
        trace.record(first + every * index, value)
    return trace


def stop_step(rule: Criterion, curve: Callable[[int], float], first: int = 0, every: int = 1, cap: int = 3000) -> int:
    """The step at which `rule` stops a run whose loss at a step is `curve(step)`."""
    trace = Trace()
    for step in range(first, cap, every):
        trace.record(step, curve(step))
        if rule(trace).stop:
            return step
    raise AssertionError(f"{rule} did not stop before step {cap}")


def line(step: int) -> float:
    return 1.0 - 1e-4 * step


# --- the definition -------------------------------------------------------------------------------------------------


def exact_ratio(steps: Sequence[int], values: Sequence[float], window: int) -> Fraction | None:
    """The ratio by its definition in rational numbers; None when all values are equal."""

    def variance(pairs: list[tuple[Fraction, int]]) -> Fraction:
        total = sum(weight for _, weight in pairs)
        mean = sum((value * weight for value, weight in pairs), Fraction(0)) / total
        return sum((weight * (value - mean) * (value - mean) for value, weight in pairs), Fraction(0)) / total

    previous = [steps[0] - 1, *steps[:-1]]
    opening = steps[-1] - window
    everything = [(Fraction(value), s - p) for s, p, value in zip(steps, previous, values, strict=True)]
    recent = [
        (Fraction(value), s - max(p, opening))
        for s, p, value in zip(steps, previous, values, strict=True)
        if s > opening
    ]
    return variance(recent) / variance(everything) if variance(everything) else None


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=9, max_size=60),
    gaps=st.lists(st.integers(1, 7), min_size=60, max_size=60),
    first=st.integers(0, 3),
    window=st.integers(8, 80),
)
def test_the_ratio_is_its_definition_in_rational_numbers(
    values: list[float], gaps: list[int], first: int, window: int
) -> None:
    steps = (first + np.cumsum([0, *gaps[: len(values) - 1]])).tolist()
    trace = Trace()
    for step, value in zip(steps, values, strict=True):
        trace.record(step, value)
    verdict = Dvar(window, 0.15)(trace)
    in_window = sum(step > steps[-1] - window for step in steps)
    expected = exact_ratio(steps, values, window)
    if steps[-1] - steps[0] < window or in_window < 8:
        assert verdict.reason is Reason.WARMING_UP
        assert verdict.metrics["ratio"] == 1.0
    elif expected is None:
        assert verdict.reason is Reason.NO_CHANGE
    else:
        assert verdict.metrics["ratio"] == pytest.approx(float(expected), rel=1e-9, abs=1e-24)
        assert verdict.stop == (verdict.metrics["ratio"] < 0.15)


@given(st.lists(st.floats(0, 1), min_size=9, max_size=80), st.integers(8, 40))
def test_at_cadence_one_both_variances_are_the_plain_ones(values: list[float], window: int) -> None:
    assume(len(values) > window and np.ptp(values) > 1e-6)
    metrics = Dvar(window, 0.15)(traced(values)).metrics
    assert metrics["window_var"] == pytest.approx(np.var(values[-window:]), rel=1e-9, abs=1e-24)
    assert metrics["total_var"] == pytest.approx(np.var(values), rel=1e-9)


def test_variances_have_ddof_zero() -> None:
    # n equally spaced values have the variance (n^2 - 1) / 12 with ddof 0 and n (n + 1) / 12 with ddof 1, so a window
    # of 8 in a line of 10 gives 63 / 99 and would give 72 / 110.
    assert Dvar(8, 0.15)(traced(range(10))).metrics["ratio"] == pytest.approx(63 / 99, rel=1e-12)


def test_the_threshold_is_strict() -> None:
    trace = traced([0.0] * 8 + [1.0, -1.0] * 4)
    ratio = Dvar(8, 0.5)(trace).metrics["ratio"]  # 1 of 1/2
    assert ratio == 2.0
    trace = traced([2.0] * 4 + [-2.0] * 4 + [1.0, -1.0] * 4)
    ratio = Dvar(8, 0.5)(trace).metrics["ratio"]  # 1 of 5/2
    assert ratio == 0.4
    assert not Dvar(8, 0.4)(trace).stop
    assert Dvar(8, math.nextafter(0.4, 1))(trace).stop


# --- golden numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "threshold", "records"), [(310, 0.15, 801), (440, 0.4, 696), (180, 0.15, 465)])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("slope", [-1e-4, 1e-4])
def test_a_straight_line_stops_at_window_over_root_threshold(
    window: int, threshold: float, records: int, first: int, slope: float
) -> None:
    # With n records on a line the ratio is (N^2 - 1) / (n^2 - 1); it falls below a at the first n above
    # sqrt(1 + (N^2 - 1) / a), which for these settings is the first above N / sqrt(a) = 800.4, 695.7, 464.8.
    # The n-th record is made at step first + n - 1: one step earlier when the untouched model is recorded as step 0.
    assert math.floor(math.sqrt(1 + (window**2 - 1) / threshold)) + 1 == records
    rule = Dvar(window, threshold)
    step = stop_step(rule, lambda step: 0.18 + slope * step, first)
    assert step == first + records - 1
    bound = rule(traced([1.0] * 10, first)).metrics["straight_line_step"]
    assert bound == pytest.approx(first + window / math.sqrt(threshold))
    assert step == math.floor(bound)


@pytest.mark.parametrize(
    ("window", "threshold", "lengths"),
    [
        (310, 0.15, (360, 407, 477, 561, 664)),
        (440, 0.4, (464, 488, 527, 574, 629)),
        (180, 0.15, (229, 267, 315, 363, 412)),
    ],
)
def test_an_exponential_stops_where_figure_3_stops_it(window: int, threshold: float, lengths: Sequence[int]) -> None:
    # The number of values at which `losses[-N:].var() / losses.var() < a` first holds for exp(-k / tau), k = 0, 1, ...
    for tau, length in zip((50, 100, 200, 400, 1000), lengths, strict=True):
        losses = np.exp(-np.arange(1000) / tau)
        ratios = (losses[n - window : n].var() / losses[:n].var() for n in range(window + 1, 1000))
        assert next(n for n, ratio in enumerate(ratios, start=window + 1) if ratio < threshold) == length
        assert stop_step(Dvar(window, threshold), losses.__getitem__) == length - 1


@pytest.mark.parametrize(("window", "threshold"), PAPER)
def test_a_spike_as_first_value_stops_it_once_the_spike_has_left_the_window(window: int, threshold: float) -> None:
    # Step 0 is inside (t - N, t] until t = N, and the window is full at t = N as well.
    assert stop_step(Dvar(window, threshold), lambda step: line(step) if step else 10.0) == window


@pytest.mark.parametrize(("window", "threshold"), PAPER)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_white_noise_never_stops(window: int, threshold: float, seed: int) -> None:
    trace, rule = Trace(), Dvar(window, threshold)
    for step, value in enumerate(np.random.default_rng(seed).normal(size=1500)):
        trace.record(step, value)
        assert not rule(trace).stop


# --- windows in steps -----------------------------------------------------------------------------------------------


def test_warming_up_until_a_window_of_steps_has_passed_and_holds_eight_records() -> None:
    rule = Dvar(window=80, threshold=0.15)
    for every, first in ((1, 0), (10, 0), (11, 3)):
        trace = Trace()
        for step in range(first, 200, every):
            trace.record(step, math.exp(-step / 5))
            verdict = rule(trace)
            assert (verdict.reason is Reason.WARMING_UP) == (step - first < 80)
            if verdict.reason is Reason.WARMING_UP:
                assert verdict.metrics["ratio"] == 1.0
                assert not verdict.stop
    every = 12  # 7 records in any window of 80
    assert Dvar(80, 0.15)(traced(np.exp(-np.arange(60.0)), every=every)).reason is Reason.WARMING_UP


@cache
def stop_at_every_step(tau: int, late: int, window: int, threshold: float) -> int:
    return stop_step(Dvar(window, threshold), lambda step: math.exp(-max(0, step - late) / tau))


@settings(max_examples=60, deadline=None)
@given(
    tau=st.sampled_from([60, 100, 200, 400, 1000, 10**6]),
    late=st.sampled_from([0, 0, 100, 400]),
    paper=st.sampled_from(PAPER),
    share=st.floats(0, 1),
)
def test_thinning_a_smooth_curve_moves_the_stop_by_about_one_cadence(
    tau: int, late: int, paper: tuple[int, float], share: float
) -> None:
    window, threshold = paper
    coarsest = (window - 1) // 7
    every = 1 + round(share * (coarsest - 1))
    assert schedule_problems(window, every, 10**4) == []
    thinned = stop_step(Dvar(window, threshold), lambda step: math.exp(-max(0, step - late) / tau), every=every)
    assert abs(thinned - stop_at_every_step(tau, late, window, threshold)) <= 1.25 * every


# --- laws -----------------------------------------------------------------------------------------------------------


@given(
    values=st.lists(st.floats(0, 1, width=32), min_size=20, max_size=60),
    power=st.integers(-500, 500),
    offset=st.floats(-10, 10),
)
def test_neither_scale_nor_origin_of_the_loss_matters(values: list[float], power: int, offset: float) -> None:
    assume(np.ptp(values) > 1e-3)
    rule = Dvar(12, 0.15)
    verdict = rule(traced(values))
    # A power of two scales without rounding, so the ratio is the same number, even where squares leave float64.
    scaled = rule(traced(math.ldexp(value, power) for value in values))
    assert (scaled.metrics["ratio"], scaled.reason) == (verdict.metrics["ratio"], verdict.reason)
    shifted = rule(traced(value + offset for value in values))
    assert shifted.metrics["ratio"] == pytest.approx(verdict.metrics["ratio"], rel=1e-9, abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=80), st.booleans(), st.integers(1, 5))
def test_replaying_a_recorded_run_gives_what_the_live_run_gave(values: list[float], strict: bool, every: int) -> None:
    rule = Dvar(window=20, threshold=0.5, strict_paper=strict)
    trace, live = Trace(), []
    for index, value in enumerate(values):
        trace.record(index * every, value)
        live.append((rule(trace), rule(trace).diagnoses))
    replayed = [rule(trace.cut(index * every)) for index in range(len(values))]
    assert [(verdict, verdict.diagnoses) for verdict in replayed] == live


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_strict_paper_is_the_trace_without_the_untouched_model(values: list[float]) -> None:
    with_start, without = traced([5.0, *values]), traced(values, first=1)
    strict, plain = Dvar(10, 0.3, strict_paper=True)(with_start), Dvar(10, 0.3)(without)
    assert (strict.metrics, strict.reason, strict.step) == (plain.metrics, plain.reason, plain.step)


def test_records_without_an_evaluation_change_nothing() -> None:
    sparse = Trace()
    for step in range(100):
        sparse.record(step, math.exp(-step / 9) if step % 5 == 0 else None, train_loss=0.1)
    rule = Dvar(40, 0.15)
    assert rule(sparse) == rule(traced([math.exp(-step / 9) for step in range(0, 100, 5)], every=5))


def test_a_trace_without_evaluations_is_warming_up() -> None:
    trace = Trace()
    assert Dvar(10, 0.15)(trace).reason is Reason.WARMING_UP
    trace.record(3, train_loss=0.2)
    verdict = Dvar(10, 0.15, strict_paper=True)(trace)
    assert str(verdict) == "go on at step 3: warming up, 0 of 10 steps and 0 records in the window"


# --- nothing to judge -----------------------------------------------------------------------------------------------


@given(st.floats(-1e300, 1e300), st.integers(1, 40))
def test_a_loss_that_never_changes_is_no_change_and_not_stabilised(value: float, records: int) -> None:
    verdict = Dvar(10, 0.15)(traced([value] * records))
    assert not verdict.stop
    assert verdict.reason is (Reason.NO_CHANGE if records > 10 else Reason.WARMING_UP)


def test_a_window_without_any_change_after_a_fall_has_no_variance_at_all() -> None:
    verdict = Dvar(10, 0.15)(traced([1.0] * 10 + [0.1] * 10))
    assert verdict.stop
    assert verdict.metrics["ratio"] == 0.0


@given(st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 39), st.integers(8, 20))
def test_a_loss_that_is_not_finite_anywhere_never_counts_as_stabilised(bad: float, at: int, window: int) -> None:
    values = [math.exp(-step / 2) for step in range(40)]
    assert Dvar(window, 0.9)(traced(values)).reason is Reason.STABILISED
    values[at] = bad
    verdict = Dvar(window, 0.9)(traced(values))
    assert not verdict.stop
    assert verdict.reason is Reason.NON_FINITE
    assert verdict.metrics["non_finite_step"] == at
    assert f"not finite at step {at}," in str(verdict)


def test_finite_losses_too_far_apart_for_float64_are_not_stabilised_either() -> None:
    verdict = Dvar(8, 0.9)(traced([-1.7e308, 1.7e308] + [0.0] * 20))
    assert not verdict.stop
    assert verdict.reason is Reason.NON_FINITE


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [7, 0, -310, 310.0, True, math.nan, "310"])
def test_a_window_that_is_no_whole_number_of_at_least_eight_is_refused(window: object) -> None:
    with pytest.raises(RefusedInput, match=r"window must be .* 8 or more, got"):
        Dvar(window, 0.15)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [0, 1, -0.1, 15, math.nan, math.inf, "0.15", True])
def test_a_threshold_outside_zero_and_one_is_refused(threshold: object) -> None:
    with pytest.raises(RefusedInput, match=r"threshold must lie between 0 and 1, .* got"):
        Dvar(310, threshold)  # type: ignore[arg-type]


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(RefusedInput) as caught:
        Dvar(0, 2.0)
    assert len(caught.value.problems) == 2
    assert len(str(caught.value).splitlines()) == 2


@given(st.integers(8, 500), st.integers(1, 80))
def test_a_cadence_is_refused_exactly_when_the_window_cannot_hold_eight_records(window: int, every: int) -> None:
    steady = traced(range(window // every + 60), every=every)
    never = Dvar(window, 0.15)(steady).reason is Reason.WARMING_UP
    assert bool(schedule_problems(window, every, 10**6)) == never


def test_a_refused_schedule_names_the_numbers_that_would_do() -> None:
    problems = schedule_problems(308, probe_every=50, max_steps=308)
    assert len(problems) == 2
    assert "every 43 or more often, or widen the window to 351" in problems[0]
    assert "window 308 and cap 308" in problems[1]
    assert schedule_problems(308, 43, 309) == [] == schedule_problems(351, 50, 400)
    assert schedule_problems(308, 44, 400) != [] != schedule_problems(350, 50, 400)


# --- caps and compositions ------------------------------------------------------------------------------------------


def test_a_cap_stops_at_the_record_after_its_last_update() -> None:
    rule = FixedSteps(3)
    trace, stops = Trace(), []
    for step in range(5):
        trace.record(step, train_loss=0.1)
        stops.append(rule(trace).stop)
    assert stops == [False, False, False, True, True]
    assert str(rule(trace)) == "stop at step 4: the cap of 3 steps is reached"
    assert str(rule(trace.cut(1))) == "go on at step 1: the cap is 3 steps"
    assert not rule(Trace()).stop
    for refused in (0, -1, 2.5, True):
        with pytest.raises(RefusedInput, match="max_steps must be"):
            FixedSteps(refused)  # type: ignore[arg-type]


def test_any_of_gives_the_verdict_of_the_first_rule_that_stops() -> None:
    dvar, cap = Dvar(310, 0.15), FixedSteps(500)
    both = AnyOf((dvar, cap))
    assert stop_step(both, line) == 500
    assert stop_step(both, lambda step: math.exp(-step / 100)) == 406
    assert stop_step(AnyOf((cap, dvar)), lambda step: math.exp(-step / 100)) == 406

    capped = both(traced(line(step) for step in range(501)))
    assert (capped.reason, capped.rule) == (Reason.CAP, "FixedSteps(max_steps=500)")
    assert str(capped) == (
        "stop at step 500: the cap of 500 steps is reached; "
        "variance of the last 310 steps is 38.3 % of all (threshold 15 %)"
    )
    assert any(text.startswith("still falling") for text in capped.diagnoses)

    going = both(traced(line(step) for step in range(400)))
    assert going.rule == repr(dvar)
    assert going.metrics["max_steps"] == 500
    with pytest.raises(RefusedInput):
        AnyOf(())


@pytest.mark.parametrize("order", [1, -1])
def test_a_cap_does_not_hide_a_loss_that_is_not_finite(order: int) -> None:
    rule = AnyOf((Dvar(310, 0.15), FixedSteps(9))[::order])
    capped = rule(traced([0.1] * 9 + [math.nan]))
    assert capped.stop
    assert capped.reason is Reason.NON_FINITE
    assert str(capped).startswith("stop at step 9: the loss is not finite at step 9")
    assert not rule(traced([math.nan])).stop


@pytest.mark.parametrize("order", [1, -1])
def test_a_cap_before_the_window_is_full_claims_nothing_of_the_variance(order: int) -> None:
    verdict = AnyOf((Dvar(310, 0.15), FixedSteps(9))[::order])(traced([0.1] * 10))
    assert str(verdict) == "stop at step 9: the cap of 9 steps is reached"


def test_a_rule_is_any_callable_from_a_trace_to_a_verdict() -> None:
    def patience(trace: Trace) -> Verdict:
        return Verdict(trace.last_step > 7, Reason.CAP, trace.last_step, "patience", {"max_steps": 7})

    assert stop_step(AnyOf((Dvar(310, 0.15), patience)), line) == 8
