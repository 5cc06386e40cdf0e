"""The sentence for a person, the diagnoses, and the verdict as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dvar import AnyOf, Dvar, FixedSteps, Reason, Trace, Verdict

RULE = Dvar(window=310, threshold=0.15)
NOISE = np.random.default_rng(7).normal(size=2000)


def stopped(curve: Callable[[int], float], rule: Dvar = RULE, every: int = 1, cap: int = 1500) -> Verdict:
    """The verdict that stops the run, or the last one before the cap."""
    trace = Trace()
    for step in range(0, cap, every):
        trace.record(step, curve(step))
        verdict = rule(trace)
        if verdict.stop:
            break
    return verdict


def names(verdict: Verdict) -> list[str]:
    known = ("not learning", "still falling", "rising", "one record holds more than half of the total variance")
    found = [next(name for name in known if text.startswith(f"{name}: ")) for text in verdict.diagnoses]
    assert all("\n" not in text for text in verdict.diagnoses)
    return found


# --- sentences ------------------------------------------------------------------------------------------------------


def test_the_sentence_of_a_stop() -> None:
    metrics = {"ratio": 0.1481, "threshold": 0.15, "window": 310}
    verdict = Verdict(True, Reason.STABILISED, 566, repr(RULE), metrics)
    assert str(verdict) == verdict.sentence
    assert str(verdict) == "stop at step 566: variance of the last 310 steps is 14.8 % of all (threshold 15 %)"


def test_the_sentence_on_the_way() -> None:
    assert str(stopped(lambda step: -step, cap=401)) == (
        "go on at step 400: variance of the last 310 steps is 59.8 % of all (threshold 15 %)"  # (310^2 - 1)/(401^2 - 1)
    )
    assert str(stopped(lambda step: -step, cap=38)) == (
        "go on at step 37: warming up, 37 of 310 steps and 38 records in the window"
    )
    assert str(stopped(lambda step: 0.1, cap=401)) == (
        "go on at step 400: no change, the loss is the same number at every record"
    )


@given(st.floats(1e-9, 3), st.floats(0.001, 0.999))
@example(0.149998, 0.15)
@example(0.150002, 0.15)
def test_a_sentence_never_contradicts_its_verdict(ratio: float, threshold: float) -> None:
    metrics = {"ratio": ratio, "threshold": threshold, "window": 310, "total_var": 1.0}
    reason = Reason.STABILISED if ratio < threshold else Reason.RUNNING
    words = Verdict(ratio < threshold, reason, 400, "", metrics).sentence.split("is ")[1].split()
    assert float(words[0]) == pytest.approx(100 * ratio, rel=5e-3)
    if abs(ratio / threshold - 1) > 1e-12:
        assert (float(words[0]) < 100 * threshold) == (ratio < threshold)


# --- diagnoses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [50, 100])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_curve_that_has_flattened_is_not_doubted(tau: int, noise: float) -> None:
    verdict = stopped(lambda step: 0.04 + math.exp(-step / tau) + noise * NOISE[step])
    assert verdict.stop
    assert names(verdict) == []


@pytest.mark.parametrize("rule", [RULE, Dvar(440, 0.4), Dvar(180, 0.15)])
@pytest.mark.parametrize(("noise", "every"), [(0.0, 1), (0.0, 7), (0.0, 25), (0.02, 1), (0.02, 7)])
def test_a_straight_line_is_still_falling(rule: Dvar, noise: float, every: int) -> None:
    verdict = stopped(lambda step: 0.18 - 1e-3 * step + noise * NOISE[step], rule, every)
    assert verdict.stop
    assert names(verdict) == ["still falling"]
    bound = math.floor(verdict.metrics["straight_line_step"])
    assert f"which this rule stops at step {bound} whatever its slope" in verdict.diagnoses[0]


def test_a_slow_exponential_is_still_falling_though_stabilised() -> None:
    verdict = stopped(lambda step: math.exp(-step / 1000))
    assert verdict.reason is Reason.STABILISED
    assert names(verdict) == ["still falling"]
    # The slope of exp(-t / tau) late in the window, over the mean slope since the start: exp(-u) u / (1 - exp(-u)).
    u = (verdict.step - 77) / 1000
    pace = math.exp(-u) * verdict.step / 1000 / (1 - math.exp(-verdict.step / 1000))
    assert f"at {100 * pace:.0f} % of the pace" in verdict.diagnoses[0]


def test_a_rising_curve_is_rising_and_not_learning() -> None:
    verdict = stopped(lambda step: 0.1 + 1e-4 * step)
    assert verdict.stop
    assert names(verdict) == ["not learning", "rising"]
    assert "rose by 19 % of its range" in verdict.diagnoses[1]  # 154 of 800 steps


def test_a_curve_that_learned_and_turned_is_rising_only() -> None:
    verdict = stopped(lambda step: math.exp(-step / 60) + 6e-4 * max(0, step - 150))
    assert verdict.stop
    assert names(verdict) == ["rising"]


def test_noise_is_not_learning_and_has_no_trend() -> None:
    verdict = stopped(lambda step: 0.18 + 0.01 * NOISE[step], cap=2000)
    assert not verdict.stop
    assert names(verdict) == ["not learning"]


@pytest.mark.parametrize(("jitters", "found"), [(1.5, ["not learning"]), (3.0, [])])
def test_a_fall_within_two_jitters_is_no_learning(jitters: float, found: list[str]) -> None:
    verdict = stopped(lambda step: 0.18 + 0.01 * (NOISE[step] if step else jitters), cap=400)
    assert names(verdict) == found


def test_a_constant_is_not_learning() -> None:
    assert names(stopped(lambda step: 0.18, cap=400)) == ["not learning"]


def test_a_spike_that_outweighs_all_other_records_is_named() -> None:
    verdict = stopped(lambda step: 5.0 if step == 4 else 0.1 - 1e-4 * step + 0.001 * NOISE[step])
    assert verdict.stop
    assert verdict.step == 314
    assert names(verdict) == ["one record holds more than half of the total variance"]
    assert "step 4 holds 100 % of it" in verdict.diagnoses[0]
    slow = stopped(lambda step: 5.0 if step == 4 else math.exp(-step / 400))
    assert "one record holds more than half of the total variance" in names(slow)


def test_nothing_is_diagnosed_before_the_window_is_full_or_after_a_nan() -> None:
    assert stopped(lambda step: 5.0 if step == 4 else 0.1, cap=310).diagnoses == ()
    assert stopped(lambda step: math.nan, cap=400).diagnoses == ()


@given(power=st.integers(-400, 400), shape=st.sampled_from(["line", "slow", "noise", "spike"]))
def test_diagnoses_do_not_depend_on_the_scale(power: int, shape: str) -> None:
    curve = {
        "line": lambda step: 1 - step / 64,
        "slow": lambda step: math.exp(-step / 40),
        "noise": lambda step: float(NOISE[step]),
        "spike": lambda step: 9.0 if step == 0 else float(NOISE[step]) / 8,
    }[shape]
    rule = Dvar(16, 0.15)
    plain = stopped(curve, rule, cap=50)
    scaled = stopped(lambda step: math.ldexp(curve(step), power), rule, cap=50)
    assert names(plain) == names(scaled)
    assert names(plain)


def test_diagnoses_are_those_of_the_step_of_the_verdict() -> None:
    trace = Trace()
    for step in range(400):
        trace.record(step, -step)
    verdict = RULE(trace)
    for step in range(400, 900):
        trace.record(step, 1e6 * step)
    assert names(verdict) == ["still falling"]
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
    saved = stopped(lambda step: -step).to_json()
    assert saved["reason"] == "stabilised"
    assert saved["stop"] is True
    assert saved["step"] == 800
    assert saved["sentence"].startswith("stop at step 800")
    assert saved["diagnoses"][0].startswith("still falling")
    assert saved["rule"] == "Dvar(window=310, threshold=0.15, strict_paper=False)"
