"""The monitor measures, records and judges; its file is all that a resumed run needs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvar import AnyOf, Dvar, DvarError, FixedSteps, Reason, RefusedInput, StopMonitor, Trace, Verdict
from dvar.errors import TraceError
from dvar.stopping.monitor import broadcast_verdict
from dvar.stopping.rules import AtMost

STOP = Dvar(window=20, threshold=0.2)


class Decay:
    """Held losses that fall from 1 and 2 with the steps made, as a training would move them."""

    def __init__(self, pace: float = 8.0) -> None:
        self.step, self.pace, self.calls = 0, pace, 0

    def __call__(self) -> np.ndarray[Any, Any]:
        self.calls += 1
        return np.array([1.0, 2.0]) * math.exp(-self.step / self.pace)


def drive_monitor(monitor: StopMonitor, model: Decay, first: int, last: int) -> Verdict:
    """Call the monitor from step `first` to `last`, or to the stop."""
    for model.step in range(first, last + 1):
        verdict = monitor(model.step)
        if verdict.stop:
            break
    return verdict


def run_plain_loop(every: int = 1) -> tuple[Trace, Verdict]:
    """Return the trace and the verdict of the README's loop on the same losses."""
    trace, model = Trace(), Decay()
    for model.step in range(0, 1000, every):
        trace.record(model.step, model())
        if (verdict := STOP(trace)).stop:
            break
    return trace, verdict


@pytest.mark.parametrize("every", [1, 2])
def test_it_gives_the_verdict_of_a_loop_written_by_hand(tmp_path: Path, every: int) -> None:
    model = Decay()
    monitor = StopMonitor(STOP, model, tmp_path / "run" / "trace.jsonl", every=every)
    verdict = drive_monitor(monitor, model, 0, 1000)
    trace, expected = run_plain_loop(every)
    assert verdict == expected == monitor.verdict
    assert verdict.reason is Reason.STABILISED
    assert monitor.trace.records == trace.records == Trace.read(monitor.path).records


def test_a_loop_that_counts_by_more_than_one_is_measured_at_the_first_call_after_each_due_step(tmp_path: Path) -> None:
    """Lightning counts a batch of two optimizers as two steps."""
    monitor = StopMonitor(Dvar(60, 0.15), Decay(), tmp_path / "trace.jsonl", every=5)
    monitor.begin(0)
    for step in range(2, 31, 2):
        monitor(step)
    assert monitor.trace.steps.tolist() == [0, 6, 10, 16, 20, 26, 30]
    monitor.begin(17)  # a resume
    for step in (18, 21, 24, 25):
        monitor(step)
    assert monitor.trace.steps.tolist() == [0, 6, 10, 16, 21, 25]


@settings(max_examples=25)
@given(killed=st.integers(1, 30), distance=st.integers(0, 10), every=st.sampled_from([1, 2]))
def test_a_run_killed_anywhere_and_resumed_anywhere_before_stops_as_if_nothing_had_happened(
    tmp_path_factory: pytest.TempPathFactory, killed: int, distance: int, every: int
) -> None:
    path, model = tmp_path_factory.mktemp("run") / "trace.jsonl", Decay()
    drive_monitor(StopMonitor(STOP, model, path, every=every), model, 0, killed)
    checkpoint = max(1, killed - distance)
    drive_monitor(StopMonitor(STOP, model, path, every=every), model, checkpoint, checkpoint)
    verdict = drive_monitor(resumed := StopMonitor(STOP, model, path, every=every), model, checkpoint + 1, 1000)
    trace, expected = run_plain_loop(every)
    assert verdict == expected
    assert resumed.trace.records == trace.records == Trace.read(path).records


def test_a_record_is_in_the_file_before_it_is_judged(tmp_path: Path) -> None:
    there = []

    def rule(trace: Trace) -> Verdict:
        there.append(len(Trace.read(tmp_path / "trace.jsonl")) if len(trace) else 0)
        return FixedSteps(9)(trace)

    drive_monitor(StopMonitor(rule, Decay(), tmp_path / "trace.jsonl"), Decay(), 0, 3)
    assert there[-4:] == [1, 2, 3, 4]


def test_what_is_cut_or_replaced_is_kept_beside_it(tmp_path: Path) -> None:
    path, model = tmp_path / "trace.jsonl", Decay()
    drive_monitor(StopMonitor(STOP, model, path), model, 0, 12)
    content = path.read_bytes()
    for expected in ("trace.jsonl.cut-5", "trace.jsonl.cut-5.2"):
        drive_monitor(StopMonitor(STOP, model, path), model, 5, 12)
        assert (tmp_path / expected).read_bytes() == content == path.read_bytes()
    with pytest.warns(UserWarning, match=r"a run begins and .*trace\.jsonl already exists: it is moved to .*cut-0$"):
        drive_monitor(again := StopMonitor(STOP, model, path), model, 0, 3)
    assert (tmp_path / "trace.jsonl.cut-0").read_bytes() == content
    assert len(again.trace) == 4


def test_a_record_that_is_there_is_not_measured_again(tmp_path: Path) -> None:
    path, model = tmp_path / "trace.jsonl", Decay()
    drive_monitor(StopMonitor(STOP, model, path), model, 0, 7)
    other = Decay(pace=1.0)
    drive_monitor(resumed := StopMonitor(STOP, other, path), other, 7, 8)
    assert other.calls == 1
    assert resumed.trace.values[7] == pytest.approx(1.5 * math.exp(-7 / 8), rel=1e-15)
    assert list(tmp_path.iterdir()) == [path]  # nothing was lost, so nothing is kept aside


def test_a_stopped_run_stays_stopped_when_it_is_resumed(tmp_path: Path) -> None:
    path, model = tmp_path / "trace.jsonl", Decay()
    stopped = drive_monitor(StopMonitor(STOP, model, path), model, 0, 1000)
    calls, content = model.calls, path.read_bytes()
    resumed = StopMonitor(STOP, model, path)
    assert resumed.begin(stopped.step) == stopped
    assert resumed(stopped.step + 1) == stopped
    assert (model.calls, path.read_bytes()) == (calls, content)


def test_between_evaluations_and_when_asked_twice_nothing_is_measured(tmp_path: Path) -> None:
    model = Decay()
    monitor = StopMonitor(STOP, model, tmp_path / "trace.jsonl", every=2)
    for step in (0, 0, 1, 2, 2, 3):
        assert monitor(step).step == step // 2 * 2
    assert model.calls == 2


def test_going_back_needs_a_new_beginning(tmp_path: Path) -> None:
    model = Decay()
    monitor = StopMonitor(STOP, model, tmp_path / "trace.jsonl", every=2)
    drive_monitor(monitor, model, 0, 6)
    with pytest.raises(TraceError, match=r"got 5 after 6: .*call begin\(5\) first"):
        monitor(5)
    monitor.begin(5)
    assert monitor.trace.steps.tolist() == [0, 2, 4]
    with pytest.raises(TraceError, match=r"a step is a whole number of updates, got 5\.5"):
        monitor(5.5)  # type: ignore[arg-type]


def test_a_rule_may_read_what_the_call_brings(tmp_path: Path) -> None:
    rule = Dvar(window=20, threshold=0.2, metric="val_loss")
    values = [math.exp(-step / 8) for step in range(1000)]

    def stops(first: int, last: int) -> Verdict:
        monitor = StopMonitor(rule, None, tmp_path / "trace.jsonl")
        for step in range(first, last):
            if (verdict := monitor(step, val_loss=values[step], accuracy=0.5)).stop:
                break
        return verdict

    stops(0, 15)
    assert stops(15, 1000).step == run_plain_loop()[1].step
    assert Trace.read(tmp_path / "trace.jsonl").metric("accuracy")[1].tolist()[:2] == [0.5, 0.5]


def test_the_same_metric_twice_is_refused_and_not_dropped(tmp_path: Path) -> None:
    monitor = StopMonitor(STOP, None, tmp_path / "trace.jsonl")
    monitor(0, val_loss=1.0)
    with pytest.raises(TraceError, match="steps must grow, got 0 after 0"):
        monitor(0, val_loss=2.0)


def test_a_probe_that_needs_the_step_is_given_it(tmp_path: Path) -> None:
    class Stepwise:
        header: ClassVar = {"reading": "paired"}

        def __call__(self, step: int) -> float:
            return -float(step)

        def measure(self, step: int) -> dict[str, Any]:
            return {"eval": self(step), "timesteps": [step]}

    monitor = StopMonitor(STOP, Stepwise(), tmp_path / "trace.jsonl")
    monitor(0), monitor(1)
    assert monitor.trace.values.tolist() == [0.0, -1.0]
    assert monitor.trace.header["reading"] == "paired"


def test_a_trace_of_other_held_timesteps_is_refused(tmp_path: Path) -> None:
    def probe(timesteps: list[int]) -> Decay:
        model = Decay()
        model.header = {"timesteps": timesteps}  # type: ignore[attr-defined]
        return model

    path = tmp_path / "trace.jsonl"
    drive_monitor(StopMonitor(STOP, probe([1, 2]), path), Decay(), 0, 3)
    with pytest.raises(TraceError, match="has another header: move it away"):
        StopMonitor(STOP, probe([3, 4]), path)(3)


def test_a_run_that_continues_without_its_trace_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"is resumed at step 300 and .*trace\.jsonl does not exist"):
        StopMonitor(STOP, Decay(), tmp_path / "trace.jsonl")(300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StopMonitor(STOP, Decay(), tmp_path / "other.jsonl")(1)  # a loop that counts from 1 is no such case


def test_building_a_monitor_touches_no_file(tmp_path: Path) -> None:
    monitor = StopMonitor(STOP, Decay(), tmp_path / "run" / "trace.jsonl")
    assert (monitor.verdict.reason, len(monitor.trace)) == (Reason.WARMING_UP, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_probe_leaves_the_trace_as_it_was(tmp_path: Path) -> None:
    model = Decay()
    monitor = StopMonitor(STOP, model, tmp_path / "trace.jsonl")
    monitor(0)
    content = monitor.path.read_bytes()
    model.pace = 0.0
    with pytest.raises(ZeroDivisionError):
        monitor(1)
    assert (monitor.path.read_bytes(), len(monitor.trace)) == (content, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": 3}, "rule must be a rule, which is called on a trace, got 3: pass Dvar"),
        ({"rule": Dvar}, "rule must be a rule, which is called on a trace, got <class"),
        ({"probe": 0.5}, "probe must be a function that returns losses, or a Probe, got 0.5"),
        ({"every": 0}, "every must be a whole number of steps, 1 or more, got 0"),
        ({"every": True}, "every must be a whole number of steps, 1 or more, got True"),
        ({"every": 3}, "a window of 20 steps holds fewer than 8 evaluations when one is made every 3 steps"),
        ({"every": 3, "rule": AnyOf((FixedSteps(9), STOP))}, "a window of 20 steps holds fewer than 8 evaluations"),
        ({"every": 3, "rule": AtMost(STOP, 9)}, "a window of 20 steps holds fewer than 8 evaluations"),
    ],
)
def test_what_cannot_work_is_refused_before_any_step(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedInput) as refused:
        StopMonitor(**{"rule": STOP, "probe": Decay(), "path": tmp_path / "trace.jsonl", **change})
    assert len(refused.value.problems) == 1
    assert refused.value.problems[0].startswith(message)


def judge_on_two_ranks(judge: Callable[[], Verdict]) -> tuple[Verdict, Verdict]:
    """Return the verdicts of the first rank and of another one, which receives what the first one sends."""
    sent: list[Any] = []

    def send(value: Any) -> Any:
        sent.append(value)
        return value

    try:
        first = broadcast_verdict(judge, True, send)
    finally:
        other = broadcast_verdict(lambda: pytest.fail("only the first rank judges"), False, lambda value: sent[0])
    return first, other


def test_every_rank_hears_the_verdict_and_its_diagnoses() -> None:
    _, verdict = run_plain_loop()
    first, other = judge_on_two_ranks(lambda: verdict)
    assert first is verdict
    assert (other, other.sentence) == (verdict, verdict.sentence)
    line = Trace()
    for step in range(60):
        line.record(step, 1.0)
    verdict = Dvar(20, 0.2, stop_on=(Reason.NO_CHANGE,))(line)
    assert verdict.stop
    assert judge_on_two_ranks(lambda: verdict)[1].diagnoses == verdict.diagnoses != ()
    going = replace(verdict, stop=False, diagnose=lambda: pytest.fail("worked out for nobody"))
    assert judge_on_two_ranks(lambda: going)[1].diagnoses == ()


def test_where_the_first_rank_fails_every_rank_does() -> None:
    def judge() -> Verdict:
        raise ValueError("out of memory")

    with pytest.raises(DvarError, match="the first rank could not judge: ValueError: out of memory") as refused:
        judge_on_two_ranks(judge)
    assert isinstance(refused.value.__context__, ValueError)
