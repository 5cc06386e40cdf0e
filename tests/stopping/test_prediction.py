"""The prediction of a stop: laws on ratios made up for them, and its coverage on the recorded runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dvar.stopping.prediction import EARLIEST, LATEST, MIN_RATIOS, StopPrediction, predict_stop
from dvar.stopping.rules import Dvar
from dvar.stopping.trace import Trace

TRACES = Path(__file__).parents[2] / "docs" / "traces.npz"
WINDOW, THRESHOLD = 200, 0.15
STEPS = np.arange(200, 400, 10)


def decline(rate: float, steps: NDArray[np.int64] = STEPS) -> NDArray[np.float64]:
    """Return a ratio that is 1 at the first step and falls exponentially, by this rate per step."""
    ratios: NDArray[np.float64] = np.exp(-rate * (steps - steps[0]))
    return ratios


def test_an_exponential_decline_meets_the_threshold_where_it_will() -> None:
    prediction = predict_stop(STEPS, decline(0.005), WINDOW, THRESHOLD)
    stop = 200 - math.log(THRESHOLD) / 0.005  # 579.4
    left = stop - STEPS[-1]
    assert prediction == StopPrediction(
        round(stop), round(STEPS[-1] + EARLIEST * left), round(STEPS[-1] + LATEST * left)
    )
    assert prediction is not None
    assert STEPS[-1] < prediction.low < prediction.step < prediction.high


def test_only_the_last_half_window_counts() -> None:
    ratios = decline(0.005)
    earlier = STEPS[-1] - STEPS >= WINDOW / 2
    assert predict_stop(STEPS, np.where(earlier, 9.0, ratios), WINDOW, THRESHOLD) == predict_stop(
        STEPS, ratios, WINDOW, THRESHOLD
    )


@pytest.mark.parametrize("factor", [2, 7])
def test_more_steps_a_record_stretch_the_prediction_as_they_stretch_the_run(factor: int) -> None:
    once = predict_stop(STEPS, decline(0.005), WINDOW, THRESHOLD)
    stretched = predict_stop(STEPS * factor, decline(0.005), WINDOW * factor, THRESHOLD)
    assert once is not None
    assert stretched is not None
    assert abs(stretched.step - factor * once.step) <= factor
    assert abs(stretched.high - factor * once.high) <= factor


def test_a_faster_decline_stops_earlier() -> None:
    slow, fast = (predict_stop(STEPS, decline(rate), WINDOW, THRESHOLD) for rate in (0.004, 0.006))
    assert slow is not None
    assert fast is not None
    assert fast.step < slow.step


def test_a_ratio_of_zero_is_left_out_as_one_that_is_missing() -> None:
    zero, missing = (np.r_[decline(0.005)[:-10], value, decline(0.005)[-9:]] for value in (0.0, np.nan))
    assert predict_stop(STEPS, zero, WINDOW, THRESHOLD) == predict_stop(STEPS, missing, WINDOW, THRESHOLD) is not None


def test_a_line_that_has_met_the_threshold_leaves_one_more_record() -> None:
    """The last ratio lies above the line through those before it, which met the threshold already."""
    line = THRESHOLD * np.exp(-0.02 * (STEPS - 340))
    last = int(STEPS[-1])
    prediction = predict_stop(STEPS, np.r_[line[:-1], 1.1 * THRESHOLD], WINDOW, THRESHOLD)
    assert prediction == StopPrediction(last + 10, round(last + EARLIEST * 10), round(last + LATEST * 10))


@pytest.mark.parametrize(
    "ratios",
    [
        np.ones(len(STEPS)),
        np.linspace(0.3, 0.9, len(STEPS)),
        decline(0.05),
        np.full(len(STEPS), np.nan),
        np.where(np.arange(len(STEPS)) > len(STEPS) - MIN_RATIOS, decline(0.005), np.nan),
        np.empty(0),
    ],
    ids=["level", "rising", "below the threshold", "warming up", "too few", "nothing"],
)
def test_what_cannot_be_foreseen_has_no_prediction(ratios: NDArray[np.float64]) -> None:
    assert predict_stop(STEPS[: len(ratios)], ratios, WINDOW, THRESHOLD) is None


def predictions_of_recorded_runs(every: int) -> Iterator[tuple[str, StopPrediction | None, float]]:
    """Yield (method, prediction, stop) at a quarter, a half and three quarters of the way from the window to a stop."""
    pytest.importorskip("torch")
    from dvar.recordings.archive_file import read_traces

    for run in read_traces(TRACES).runs[::every]:
        rule = Dvar(run.config["window"], run.config["threshold"])
        trace, steps, ratios, stop = Trace(run.trace.header), list[int](), list[float](), math.inf
        for step, losses in zip(run.trace.steps, run.trace.samples, strict=True):
            if step % 10:
                continue
            trace.record(int(step), losses)
            verdict = rule(trace)
            steps.append(int(step))
            ratios.append(verdict.metrics["ratio"] if "total_var" in verdict.metrics else math.nan)
            if verdict.stop:
                stop = float(step)
                break
        for share in (0.25, 0.5, 0.75):
            count = int(np.searchsorted(steps, rule.window + share * (steps[-1] - rule.window), side="right"))
            yield run.method, predict_stop(steps[:count], ratios[:count], rule.window, rule.threshold), stop


@pytest.mark.slow
def test_four_stops_in_five_of_the_recorded_runs_lie_in_the_interval() -> None:
    rows = list(predictions_of_recorded_runs(every=1))
    answers = [(method, prediction, stop) for method, prediction, stop in rows if prediction]
    inside = [prediction.low - 10 <= stop <= prediction.high + 10 for _, prediction, stop in answers]
    errors = [abs(math.log2(prediction.step / stop)) for _, prediction, stop in answers if math.isfinite(stop)]
    print(
        f"{len(answers)} answers of {len(rows)}, coverage {np.mean(inside):.2f}, error {np.median(errors):.2f} octaves"
    )
    for name in sorted({method for method, _, _ in answers}):
        of_method = [flag for flag, (method, _, _) in zip(inside, answers, strict=True) if method == name]
        print(f"  {name}: {len(of_method)} answers, coverage {np.mean(of_method):.2f}")
    assert len(answers) > 0.6 * len(rows)
    assert 0.75 < np.mean(inside) < 0.95
    assert np.median(errors) < 0.25
