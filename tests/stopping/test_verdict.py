"""The sentence for a person, the diagnoses, and the verdict as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dvar import AnyOf, Dvar, FixedSteps, Reason, RefusedInput, Rule, Trace, Verdict
from dvar.stopping.curve import Curve
from dvar.stopping.diagnosis import Diagnosis, diagnose
from dvar.stopping.rules import CONDITION_REASONS, EmaPercentile, Hall, Plateau, Trend

RULE = Dvar(window=310, threshold=0.15, stop_on=CONDITION_REASONS)
NOISE = np.random.default_rng(7).normal(size=2000)


def judge_curve(curve: Callable[[int], float], rule: Dvar = RULE, every: int = 1, cap: int = 1500) -> Verdict:
    """Return the verdict that stops the run, or the last one before the cap."""
    trace = Trace()
    for step in range(0, cap, every):
        trace.record(step, curve(step))
        verdict = rule(trace)
        if verdict.stop:
            break
    return verdict


def name_diagnoses(verdict: Verdict) -> list[str]:
    assert all("\n" not in str(diagnosis) for diagnosis in verdict.diagnoses)
    if verdict.stop:
        assert verdict.reason.value == [*(diagnosis.reason.value for diagnosis in verdict.diagnoses), "stabilised"][0]
    return [diagnosis.reason.value for diagnosis in verdict.diagnoses]


# --- sentences ------------------------------------------------------------------------------------------------------


def test_the_sentence_of_a_stop() -> None:
    metrics = {"ratio": 0.1481, "threshold": 0.15, "window": 310, "total_var": 1.0}
    verdict = Verdict(True, Reason.STABILISED, 566, repr(RULE), metrics)
    assert str(verdict) == verdict.sentence
    assert (
        str(verdict) == "stop at step 566: the variance of the last 310 steps is 14.8 % of the total (threshold 15 %)"
    )


def test_the_sentence_on_the_way() -> None:
    assert str(judge_curve(lambda step: -step, cap=401)) == (
        # (310^2 - 1) / (401^2 - 1)
        "go on at step 400: the variance of the last 310 steps is 59.8 % of the total (threshold 15 %)"
    )
    assert str(judge_curve(lambda step: -step, cap=38)) == ("go on at step 37: warming up, 37 of 310 steps")
    assert str(judge_curve(lambda step: 0.1, cap=401)) == (
        "go on at step 400: no change, the loss is the same at every record"
    )


def record_trace(curve: Callable[[int], float], count: int) -> Trace:
    trace = Trace()
    for step in range(count):
        trace.record(step, curve(step))
    return trace


@pytest.mark.parametrize(
    ("rule", "curve", "sentence"),
    [
        (
            EmaPercentile(40, 1e-3),
            lambda step: 2.0 - step / 100,
            "moving average changed by -20.7 % over 40 steps (threshold 0.1 %)",
        ),
        (
            EmaPercentile(40, 1e-3),
            lambda step: 1.0 + step / 100,
            "moving average changed by +34.7 % over 40 steps (threshold 0.1 %)",
        ),
        (Hall(40, 0.1), lambda step: 100.0 - (step % 2) * 20, "steps range over 20 % of their level (threshold 10 %)"),
        (
            Hall(40, 0.1),
            lambda step: 100.0 - (step % 2) * 9.9996,
            "range over 9.9996 % of their level (threshold 10 %)",
        ),
        (Trend(40, 1e-3), lambda step: 1.0 + 1.0004e-3 * step, "the last 40 steps is 0.001 per step (threshold 0.001)"),
        (
            Trend(40, 1e-3),
            lambda step: 1.0 - 0.9996e-3 * step,
            "is -0.0009996 per step (threshold 0.001), but still fal",
        ),
        (Trend(40, 1e-3), lambda step: 1.0 - 2e-3 * step, "the last 40 steps is -0.002 per step (threshold 0.001)"),
        (Plateau("eval", 90), lambda step: float(step), "no improvement on 0 at step 0 for 60 steps (patience 90)"),
        (
            Plateau("eval", 90, min_delta=0.5),
            lambda step: float(step),
            "no improvement on 0 at step 0 by more than 0.5 for 60 steps (patience 90)",
        ),
    ],
)
def test_every_rule_tells_its_own_number_beside_its_threshold(
    rule: Rule, curve: Callable[[int], float], sentence: str
) -> None:
    assert sentence in str(rule(record_trace(curve, 61)))


def test_a_full_window_that_holds_too_few_records_says_which_of_both_it_waits_for() -> None:
    trace = Trace()
    for step in range(0, 200, 20):
        trace.record(step, 1 / (1 + step))
    assert str(Dvar(100, 0.15)(trace)) == ("go on at step 180: warming up, 100 of 100 steps, 5 of the 8 records needed")


@given(st.floats(1e-9, 3), st.floats(0.001, 0.999))
@example(0.149998, 0.15)
@example(0.150002, 0.15)
def test_a_sentence_never_contradicts_its_verdict(ratio: float, threshold: float) -> None:
    metrics = {"ratio": ratio, "threshold": threshold, "window": 310, "total_var": 1.0}
    reason = Reason.STABILISED if ratio < threshold else Reason.RUNNING
    words = Verdict(ratio < threshold, reason, 400, "", metrics).sentence.split(" is ")[1].split()
    assert float(words[0]) == pytest.approx(100 * ratio, rel=5e-3)
    if abs(ratio / threshold - 1) > 1e-12:
        assert (float(words[0]) < 100 * threshold) == (ratio < threshold)


def test_one_value_that_is_not_finite_is_not_counted_and_several_are() -> None:
    def judge_gap(last: int) -> str:
        return str(Dvar(8, 0.15)(record_trace(lambda step: math.nan if 9 <= step <= last else 0.1, 20)))

    assert judge_gap(9) == "go on at step 19: the loss is not finite at step 9, so its variance is undefined"
    assert judge_gap(12) == (
        "go on at step 19: the loss is not finite from step 9 to step 12 (4 records), so its variance is undefined"
    )


def test_what_is_not_finite_is_called_a_metric_where_the_rule_names_one() -> None:
    trace = record_trace(lambda step: math.nan if step == 9 else 0.1, 20)
    assert "the loss is not finite at step 9" in str(Dvar(8, 0.15)(trace))
    assert "the metric is not finite at step 9" in str(Plateau("eval", 8)(trace))


def test_the_sentence_of_a_rise() -> None:
    doubt = Diagnosis(Reason.RISING, {"rise": 0.01, "rise_share": 0.1234, "rise_steps": 155})
    assert doubt.sentence == (
        "over the last 155 steps the loss rose by 12 % of its range, so an earlier step may be better"
    )


def test_a_loss_that_moved_without_jitter_is_not_said_never_to_have_changed() -> None:
    metrics = {"start": 0.1, "level": 0.2, "jitter": 0.0, "window": 40}
    assert str(Diagnosis(Reason.NOT_LEARNING, metrics)) == (
        "not learning: the loss began at 0.1 and averages 0.2 over the last 40 steps, "
        "which is no clear fall beside its jitter of 0"
    )


def test_an_outlier_of_one_record_and_of_several_are_named_by_their_steps() -> None:
    metrics = {"outlier_first": 7, "outlier_last": 7, "outlier_share": 0.6, "ratio_without": 0.4}
    assert Diagnosis(Reason.OUTLIER_DOMINATED, metrics).sentence == (
        "step 7 accounts for 60 % of the total variance; without it the ratio is 40 %"
    )
    assert Diagnosis(Reason.OUTLIER_DOMINATED, {**metrics, "outlier_last": 9}).sentence == (
        "steps 7 to 9 account for 60 % of the total variance; without them the ratio is 40 %"
    )


# --- diagnoses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "doubts"), [(4, 1), (3, 0)])
def test_a_fall_is_fitted_through_four_records_or_more(window: int, doubts: int) -> None:
    curve = Curve.from_trace(record_trace(lambda step: 1 - step / 32, 17))  # exact in float64
    reasons = [diagnosis.reason for diagnosis in diagnose(curve, window)]
    assert reasons.count(Reason.STILL_FALLING) == doubts


@pytest.mark.parametrize("tau", [50, 100])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_curve_that_has_flattened_is_not_doubted(tau: int, noise: float) -> None:
    verdict = judge_curve(lambda step: 0.04 + math.exp(-step / tau) + noise * NOISE[step])
    assert verdict.stop
    assert name_diagnoses(verdict) == []


@pytest.mark.parametrize("rule", [RULE, replace(RULE, window=440, threshold=0.4), replace(RULE, window=180)])
@pytest.mark.parametrize(("noise", "every"), [(0.0, 1), (0.0, 7), (0.0, 25), (0.02, 1), (0.02, 7)])
def test_a_straight_line_is_still_falling(rule: Dvar, noise: float, every: int) -> None:
    verdict = judge_curve(lambda step: 0.18 - 1e-3 * step + noise * NOISE[step], rule, every)
    assert verdict.stop
    assert name_diagnoses(verdict) == ["still falling"]
    bound = math.floor(verdict.metrics["straight_line_step"])
    assert f"and the ratio passes the threshold at step {bound} whatever the slope" in str(verdict.diagnoses[0])
    # A line gives a quarter of its fall in any last quarter of its steps.
    assert verdict.metrics["late_share"] == pytest.approx(0.25, abs=0.01 + 2 * noise)


def test_a_slow_exponential_is_still_falling_when_the_ratio_passes() -> None:
    verdict = judge_curve(lambda step: math.exp(-step / 1000))
    assert name_diagnoses(verdict) == ["still falling"]
    # At step 663 the last quarter of the fall of exp(-t / 1000): (e^-0.497 - e^-0.663) / (1 - e^-0.663) = 19 %.
    assert verdict.step == 663
    assert verdict.metrics["late_share"] == pytest.approx(0.192, abs=0.003)
    assert "contributed 19 % of the fall so far" in str(verdict)


@pytest.mark.parametrize(("tau", "step"), [(100, 406), (400, 560), (1000, 1230)])
def test_by_default_a_fall_is_followed_until_its_last_quarter_gives_little(tau: int, step: int) -> None:
    # With u = t / tau the share is (e^-0.75u - e^-u) / (1 - e^-u), which falls below 15 % at u = 1.245.
    verdict = judge_curve(lambda step: math.exp(-step / tau), Dvar(310, 0.15))
    assert verdict.reason is Reason.STABILISED
    assert verdict.step == pytest.approx(step, abs=0.03 * step if tau == 1000 else 0)


def test_a_rising_curve_is_rising_and_not_learning() -> None:
    verdict = judge_curve(lambda step: 0.1 + 1e-4 * step)
    assert verdict.stop
    assert name_diagnoses(verdict) == ["rising", "not learning"]
    assert "rose by 19 % of its range" in str(verdict.diagnoses[0])  # 154 of 800 steps


def test_a_curve_that_learned_and_turned_is_rising_only() -> None:
    verdict = judge_curve(lambda step: math.exp(-step / 60) + 6e-4 * max(0, step - 150))
    assert verdict.stop
    assert name_diagnoses(verdict) == ["rising"]


@pytest.mark.parametrize("seed", range(8))
def test_the_chance_slope_of_noise_is_no_rise(seed: int) -> None:
    # In half of all pieces of noise the slope lies above 0, most of these above the pace that counts.
    noise = np.random.default_rng(seed).normal(size=401)
    assert "rising" not in name_diagnoses(judge_curve(lambda step: 0.18 + 0.01 * noise[step], cap=401))


@pytest.mark.parametrize(("pace", "doubts"), [(0.05, []), (0.2, ["rising"])])
def test_a_creep_slower_than_a_tenth_of_the_runs_pace_is_no_rise(pace: float, doubts: list[str]) -> None:
    # A fall of 1, then a rise that would take 1 / pace times the run's 600 steps to undo it.
    trace = Trace()
    for step in range(601):
        trace.record(step, math.exp(-step / 20) + pace * max(0, step - 200) / 600)
    assert name_diagnoses(RULE(trace)) == doubts


def test_the_chance_slope_of_noise_after_a_fall_is_seldom_still_falling() -> None:
    # Two standard errors leave 1 in 40; without them it is every tenth run.
    count = 0
    for seed in range(60):
        trace, noise = Trace(), np.random.default_rng(seed).normal(size=121)
        for step in range(121):
            trace.record(step, 0.04 * math.exp(-step / 5) + 0.01 * noise[step])
        count += "still falling" in name_diagnoses(Dvar(40, 0.15)(trace))
    assert count <= 3


def test_noise_is_not_learning_and_has_no_trend() -> None:
    verdict = judge_curve(lambda step: 0.18 + 0.01 * NOISE[step], cap=2000)
    assert not verdict.stop
    assert name_diagnoses(verdict) == ["not learning"]


@pytest.mark.parametrize(("jitters", "doubts"), [(1.5, ["not learning"]), (3.0, [])])
def test_a_fall_within_two_jitters_is_no_learning(jitters: float, doubts: list[str]) -> None:
    verdict = judge_curve(lambda step: 0.18 + 0.01 * (NOISE[step] if step else jitters), cap=400)
    assert name_diagnoses(verdict) == doubts


def test_a_constant_is_not_learning() -> None:
    verdict = judge_curve(lambda step: 0.18, cap=400)
    assert name_diagnoses(verdict) == ["not learning"]
    assert verdict.diagnoses[0].metrics == {"start": 0.18, "level": 0.18, "jitter": 0.0, "window": 310}
    assert "the loss never changed; the probe may not measure the model that is being trained" in str(
        verdict.diagnoses[0]
    )


# --- the numbers behind them ----------------------------------------------------------------------------------------


def test_the_numbers_of_a_loss_that_does_not_learn() -> None:
    values = 0.18 + 0.01 * NOISE[:500]
    (diagnosis,) = RULE(record_trace(values.__getitem__, 500)).diagnoses
    recent = values[-310:]
    assert diagnosis.metrics == {
        "start": values[0],
        "level": pytest.approx(recent.mean(), rel=1e-12),
        "jitter": pytest.approx(np.diff(recent).std() / math.sqrt(2), rel=1e-12),
        "window": 310,
    }


def test_the_numbers_of_a_loss_that_still_falls() -> None:
    values = np.exp(-np.arange(700) / 1000) + 1e-3 * NOISE[:700]
    trace = record_trace(values.__getitem__, 700)
    diagnosis = RULE(trace).diagnoses[0]
    # The fall over the last quarter by its least-squares line, and all of it from the first value to that line's end.
    (pace, _), late = np.polyfit(np.arange(175), values[-175:], 1), values[-175:].mean()
    gained = -pace * 699 / 4
    assert diagnosis.reason is Reason.STILL_FALLING
    assert diagnosis.metrics == {
        "late_share": pytest.approx(gained / (values[0] - (late - gained / 2)), rel=1e-9),
        "slope": pytest.approx(np.polyfit(np.arange(310), values[-310:], 1)[0], rel=1e-9),
        "slope_error": pytest.approx(Curve.from_trace(trace).last(310).slope_error(1.0), rel=1e-9),
        "window": 310,
        "straight_line_step": 310 / math.sqrt(0.15),
    }
    # A rule without a total variance has no such bound.
    assert "straight_line_step" not in Trend(310, 1.0, stop_on=CONDITION_REASONS)(trace).diagnoses[0].metrics
    assert "straight line" not in str(Trend(310, 1.0, stop_on=CONDITION_REASONS)(trace))


def test_the_numbers_of_a_loss_that_rises() -> None:
    verdict = RULE(record_trace(lambda step: 0.1 + 1e-4 * step + (0.5 if step == 3 else 0.0), 801))
    diagnosis = next(diagnosis for diagnosis in verdict.diagnoses if diagnosis.reason is Reason.RISING)
    # The latter half of the window: steps 646 to 800.
    assert diagnosis.metrics == {
        "rise": pytest.approx(154e-4, rel=1e-9),
        "rise_share": pytest.approx(154e-4 / (0.5 + 3e-4), rel=1e-9),
        "rise_steps": 154,
    }


def test_what_is_left_without_an_outlier_is_weighted_by_steps_too() -> None:
    gaps = np.tile([1, 3], 200)
    steps, values = np.cumsum(gaps), 0.1 - 1e-5 * np.cumsum(gaps) + 1e-3 * NOISE[:400]
    values[5] = 5.0
    trace = Trace()
    for step, value in zip(steps.tolist(), values.tolist(), strict=True):
        trace.record(step, value)
    diagnosis = RULE(trace).diagnoses[0]
    assert diagnosis.metrics["outlier_first"] == diagnosis.metrics["outlier_last"] == steps[5]
    # A record stands for as many equal values as steps have passed since the one before.
    rest = np.repeat(np.delete(values, 5), np.delete(gaps, 5))
    assert diagnosis.metrics["ratio_without"] == pytest.approx(rest[-310:].var() / rest.var(), rel=1e-9)


def test_the_gravest_doubt_comes_first() -> None:
    spiked = record_trace(lambda step: 0.1 + 1e-2 * step + (3.0 if step == 3 else 0.0), 61)
    assert name_diagnoses(Dvar(40, 0.15)(spiked)) == ["outlier-dominated", "rising", "not learning"]


def test_a_loss_that_falls_from_above_its_first_value_has_not_fallen_yet() -> None:
    assert name_diagnoses(
        RULE(record_trace(lambda step: step / 200 if step < 200 else 1 - (step - 200) / 800, 601))
    ) == ["not learning"]


def test_a_turn_within_the_latter_half_of_the_window_is_a_rise() -> None:
    # Over the whole window, steps 291 to 600, the line through it falls.
    verdict = RULE(record_trace(lambda step: 1.0 - 2e-3 * min(step, 440) + 1e-3 * max(0, step - 440), 601))
    assert "rising" in [diagnosis.reason.value for diagnosis in verdict.diagnoses]


def test_the_numbers_of_an_outlier() -> None:
    values = 0.1 - 1e-5 * np.arange(400) + 1e-3 * NOISE[:400]
    values[2:8] += 2.0
    diagnosis = RULE(record_trace(values.__getitem__, 400)).diagnoses[0]
    parts = np.square(values - values.mean())
    assert diagnosis.reason is Reason.OUTLIER_DOMINATED
    assert diagnosis.metrics == {
        "outlier_first": 0,
        "outlier_last": 19,
        "outlier_share": pytest.approx(parts[:20].sum() / parts.sum(), rel=1e-9),
        "ratio_without": pytest.approx(values[-310:].var() / values[20:].var(), rel=1e-9),
    }
    # Only DVAR divides by a variance that an outlier can hold.
    (hall,) = {tuple(each.reason for each in Hall(310, 9.0)(record_trace(values.__getitem__, 400)).diagnoses)}
    assert Reason.OUTLIER_DOMINATED not in hall


def test_a_spike_that_outweighs_all_other_records_is_named() -> None:
    verdict = judge_curve(lambda step: 5.0 if step == 4 else 0.1 - 1e-4 * step + 0.001 * NOISE[step])
    assert verdict.stop
    assert verdict.step == 314
    assert name_diagnoses(verdict)[0] == "outlier-dominated"
    assert "step 4 accounts for 100 % of the total variance; without it the ratio is" in str(verdict)
    going = judge_curve(lambda step: 5.0 if step == 4 else 0.1 - 1e-4 * step + 0.001 * NOISE[step], Dvar(310, 0.15))
    assert not going.stop
    slow = judge_curve(lambda step: 5.0 if step == 4 else math.exp(-step / 400))
    assert name_diagnoses(slow)[0] == "outlier-dominated"
    assert slow.metrics["outlier_first"] == slow.metrics["outlier_last"] == 4


def test_a_spike_is_forgiven_once_the_rule_would_stop_without_it() -> None:
    plain = judge_curve(lambda step: math.exp(-step / 100), Dvar(310, 0.15))
    spiked = judge_curve(lambda step: 9.0 if step == 4 else math.exp(-step / 100), Dvar(310, 0.15))
    assert spiked.reason is Reason.STABILISED
    assert abs(spiked.step - plain.step) <= 5


def test_an_early_burst_dominates_and_an_early_fall_does_not() -> None:
    burst = judge_curve(lambda step: 0.1 + 2.0 * (2 <= step < 8) - 1e-5 * step + 1e-3 * NOISE[step])
    assert burst.reason is Reason.OUTLIER_DOMINATED
    assert (burst.metrics["outlier_first"], burst.metrics["outlier_last"]) == (0, 15)
    fall = judge_curve(lambda step: 0.1 + math.exp(-step / 8) + 1e-3 * NOISE[step])
    assert fall.reason is Reason.STABILISED


def test_nothing_is_diagnosed_before_the_window_is_full_or_after_a_nan() -> None:
    assert judge_curve(lambda step: 5.0 if step == 4 else 0.1, cap=310).diagnoses == ()
    assert judge_curve(lambda step: math.nan, cap=400).diagnoses == ()


@settings(max_examples=40)
@given(power=st.integers(-400, 400), shape=st.sampled_from(["line", "slow", "noise", "spike"]))
def test_diagnoses_do_not_depend_on_the_scale(power: int, shape: str) -> None:
    curves: dict[str, Callable[[int], float]] = {
        "line": lambda step: 1 - step / 64,
        "slow": lambda step: math.exp(-step / 40),
        "noise": lambda step: float(NOISE[step]),
        "spike": lambda step: 9.0 if step == 0 else float(NOISE[step]) / 8,
    }
    curve = curves[shape]
    rule = replace(RULE, window=16)
    plain = judge_curve(curve, rule, cap=50)
    scaled = judge_curve(lambda step: math.ldexp(curve(step), power), rule, cap=50)
    assert name_diagnoses(plain) == name_diagnoses(scaled)
    assert name_diagnoses(plain)


def test_diagnoses_are_those_of_the_step_of_the_verdict() -> None:
    trace = Trace()
    for step in range(400):
        trace.record(step, -step)
    verdict = RULE(trace)
    for step in range(400, 900):
        trace.record(step, 1e6 * step)
    assert name_diagnoses(verdict) == ["still falling"]
    assert verdict.diagnoses == RULE(trace.cut(399)).diagnoses


# --- JSON -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(), min_size=1, max_size=30))
def test_a_verdict_survives_json(values: list[float]) -> None:
    trace = Trace()
    for step, value in enumerate(values):
        trace.record(step, value)
    for rule in (Dvar(10, 0.15), FixedSteps(20), AnyOf((Dvar(10, 0.15), FixedSteps(20)))):
        verdict = rule(trace)
        text = json.dumps(verdict.to_json(), allow_nan=False)
        again = Verdict.from_json(json.loads(text))
        assert again == verdict
        assert (again.sentence, again.diagnoses) == (verdict.sentence, verdict.diagnoses)
        assert again.to_json() == verdict.to_json()


def test_the_json_can_be_read_by_a_person() -> None:
    saved = judge_curve(lambda step: -step).to_json()
    assert saved["reason"] == "still falling"
    assert saved["stop"] is True
    assert saved["step"] == 800
    assert saved["sentence"].startswith("stop at step 800")
    assert saved["diagnoses"][0]["reason"] == "still falling"
    assert saved["diagnoses"][0]["sentence"] in saved["sentence"]
    assert saved["diagnoses"][0]["metrics"].items() <= saved["metrics"].items()
    assert saved["rule"].startswith("Dvar(window=310, threshold=0.15, stop_on=(Reason.STABILISED, ")


@pytest.mark.parametrize("change", [{"reason": "bored"}, {"diagnoses": [{"reason": "rising"}]}, {}])
def test_a_verdict_of_another_version_is_refused(change: dict[str, object]) -> None:
    saved = {**judge_curve(lambda step: -step).to_json(), **change}
    if not change:
        del saved["rule"]
    with pytest.raises(
        RefusedInput, match=r"a saved verdict must be of this version of dvar, and is not .*: judge its"
    ):
        str(Verdict.from_json(saved))
