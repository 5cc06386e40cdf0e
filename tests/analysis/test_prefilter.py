"""The prefilter keeps every step at which a rule stops, and few others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvar.analysis.prefilter import Prefilter
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rules import AllOf, AnyOf, Dvar, EmaPercentile, FixedSteps, Hall, Plateau, Rule, Trend
from dvar.stopping.trace import Trace

WINDOW = 26
MAKERS: dict[str, Callable[[float], Rule]] = {
    "dvar": lambda t: Dvar(WINDOW, t),
    "strict": lambda t: Dvar(WINDOW, t, strict_paper=True),
    "ddof": lambda t: Dvar(WINDOW, t, strict_paper=True, ddof=1),
    "relative": lambda t: Dvar(WINDOW, t, metric="eval/first"),
    "sparse": lambda t: Dvar(3 * WINDOW, t, metric="sparse", strict_paper=True),
    "ema": lambda t: EmaPercentile(WINDOW, t / 3),
    "hall": lambda t: Hall(WINDOW, t / 5),
    "mean": lambda t: Hall(WINDOW, t / 5, level="mean"),
    "trend": lambda t: Trend(WINDOW, t / 30),
    "plateau": lambda t: Plateau("eval", 5, t / 20),
    "falls": lambda t: Plateau("eval", 5, mode="max"),
    "cap": lambda t: FixedSteps(1 + round(60 * t)),
    "both": lambda t: AllOf((Dvar(WINDOW, t, strict_paper=True), Dvar(3 * WINDOW, t, metric="sparse"))),
    "either": lambda t: AnyOf((Dvar(WINDOW, t), FixedSteps(40))),
    "no change": lambda t: Dvar(WINDOW, t, stop_on=(Reason.STABILISED, Reason.NO_CHANGE)),
}


def falling_trace(seed: int, gap: int, level: float, jitter: float) -> Trace:
    """Return a noisy fall, evaluated every `gap` steps, with a metric at every third step record."""
    random, trace = np.random.default_rng(seed), Trace()
    for number in range(110):
        step = number * gap
        losses = level * (1 + np.exp(-step / 15) + jitter * random.standard_normal(2))
        trace.record(step, losses, sparse=float(losses[0]) if number % 3 == 0 else None)
    return trace


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**16),
    gap=st.sampled_from([1, 3]),
    level=st.sampled_from([1e-6, 1.0, 1e6]),
    jitter=st.sampled_from([0.0, 1e-3, 0.1]),
    threshold=st.floats(0.01, 0.9),
)
@pytest.mark.parametrize("name", MAKERS)
def test_no_stop_is_filtered_out(name: str, seed: int, gap: int, level: float, jitter: float, threshold: float) -> None:
    complete, rule, growing = falling_trace(seed, gap, level, jitter), MAKERS[name](threshold), Trace()
    candidates = Prefilter(complete)(rule)
    assert candidates.shape == (len(complete),)
    for number, row in enumerate(complete.records):
        growing.record(**row)
        assert candidates[number] or not rule(growing).stop, row["step"]


@pytest.mark.parametrize("name", ["strict", "ddof", "sparse", "ema", "hall", "trend", "plateau", "falls", "cap"])
@pytest.mark.parametrize("gap", [1, 3])
def test_a_rule_without_diagnoses_is_called_only_where_it_stops(name: str, gap: int) -> None:
    complete, rule, growing = falling_trace(0, gap, 1.0, 0.01), MAKERS[name](0.3), Trace()
    stops = []
    for row in complete.records:
        growing.record(**row)
        verdict = rule(growing)
        stops.append(verdict.stop or verdict.reason in (Reason.STILL_FALLING, Reason.OUTLIER_DOMINATED))
    assert 0 < sum(stops) < len(stops)
    np.testing.assert_array_equal(Prefilter(complete)(rule), stops)


def test_a_loss_that_is_not_finite_is_left_to_the_rule() -> None:
    trace = Trace()
    for step, loss in enumerate([1.0, float("nan"), 1.0]):
        trace.record(step, loss)
    assert Prefilter(trace)(Dvar(8, 0.5, stop_on=(Reason.NON_FINITE,))).all()


def test_where_the_moving_average_is_zero_the_rule_is_left_to_refuse_it() -> None:
    trace = Trace()
    for step in range(80):
        trace.record(step, float(step >= 60))
    candidates = Prefilter(trace)(EmaPercentile(WINDOW, 0.01))
    np.testing.assert_array_equal(candidates, np.arange(80) >= WINDOW)  # the average of WINDOW steps before is 0
