"""The progress of a run in a log and in a terminal."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dvar.config.methods import TextualInversionConfig
from dvar.stopping.rules import AnyOf, Dvar, FixedSteps
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict
from dvar.training.progress import (
    LivePanel,
    LogLines,
    ProgressState,
    format_duration,
    read_earlier_losses,
    show_progress,
    sparkline,
)
from dvar.training.run_layout import TRACE

CAP = 150
RULE = AnyOf((Dvar(window=20, threshold=0.15), FixedSteps(CAP)))


@dataclass
class FakeStep:
    """A step as the loop yields it, of a tenth of a second."""

    step: int
    verdict: Verdict
    eval: tuple[float, ...] | None
    train_loss: float | None = 0.1
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.06, "probe": 0.03, "other": 0.01})


def run_until_stop(cap: int = CAP, cadence: int = 1) -> list[Any]:
    """Return the steps until the rule stops: a loss that falls by e every 10 steps, judged by a window of 20."""
    trace, steps = Trace(), []
    for step in range(cap + 1):
        losses = (0.04 + math.exp(-step / 10), 0.06 + math.exp(-step / 10)) if step % cadence == 0 else None
        trace.record(step, losses)
        steps.append(FakeStep(step, RULE(trace), losses, 0.1 if step else None))
        if steps[-1].verdict.stop:
            break
    return steps


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_lines_and_a_terminal_a_panel() -> None:
    assert isinstance(show_progress(CAP, "title", io.StringIO()), LogLines)
    assert isinstance(show_progress(CAP, "title", Terminal()), LivePanel)


def test_the_log_has_a_line_every_fiftieth_of_the_cap_and_at_the_stop() -> None:
    stream, steps = io.StringIO(), run_until_stop()
    with LogLines(CAP, stream) as show:
        for step in steps:
            show(step)
    lines = stream.getvalue().splitlines()
    last_step = steps[-1].step
    assert steps[-1].verdict.stop
    assert last_step % 3, "the stop falls between two lines"
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [*range(0, last_step, 3), last_step]


def test_a_line_shows_step_loss_ratio_and_remaining_time() -> None:
    stream, steps = io.StringIO(), run_until_stop()
    with LogLines(CAP, stream) as show:
        for step in steps:
            show(step)
    lines = stream.getvalue().splitlines()
    # Before any update there is no pace; L_det is the mean of 1.04 and 1.06.
    assert lines[0] == "step   0/150  L_det 1.050000  ratio 1.000, threshold 0.15"
    # At 0.1 s a step, the 126 steps that are left take 12.6 s.
    loss, ratio = 0.05 + math.exp(-2.4), steps[24].verdict.metrics["ratio"]
    start = f"step  24/150  L_det {loss:.6f}  ratio {ratio:.3f}, threshold 0.15"
    assert lines[8] == f"{start}  10 steps/s, 0:13 to the cap"


def test_a_log_says_why_a_run_goes_on_below_the_threshold() -> None:
    """A straight line passes the threshold after about 20 / sqrt(0.15) = 51.6 steps, still falling."""
    trace, stream = Trace(), io.StringIO()
    with LogLines(CAP, stream) as show:
        for step in range(61):
            trace.record(step, (1 - step / 1000,))
            show(FakeStep(step, RULE(trace), (1 - step / 1000,)))  # type: ignore[arg-type]
    lines = stream.getvalue().splitlines()
    assert ["goes on" in line for line in lines] == [step > 50 for step in range(0, 61, 3)]
    assert ", threshold 0.15, goes on: still falling  10 steps/s" in lines[-1]


def test_a_panel_of_a_resumed_run_shows_its_earlier_curve(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    trace = Trace()
    for step, loss in enumerate((4.0, 3.0, 2.0, 1.0)):
        trace.record(step, (loss,))
    trace.write(checkpoint / TRACE)
    for name in ("latest", "checkpoint-3"):
        config = TextualInversionConfig(output_dir=str(tmp_path), resume_from_checkpoint=name)
        assert read_earlier_losses(config) == [4, 3, 2, 1]
    assert read_earlier_losses(replace(config, resume_from_checkpoint=None)) == []
    (checkpoint / TRACE).write_text("damaged")
    assert read_earlier_losses(config) == []
    console = Console(file=io.StringIO(), width=80)
    console.print(LivePanel(CAP, "title", console, [4, 3, 2, 1]).render())
    assert "█▆▃▁" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_last_evaluation_is_shown_until_the_next() -> None:
    meter = ProgressState(CAP)
    for step in run_until_stop(cap=7, cadence=5):
        meter.take(step)
    assert meter.curve == pytest.approx([1.05, 0.05 + math.exp(-0.5)])
    assert meter.step == 7


def test_the_pace_is_that_of_the_last_fifty_steps() -> None:
    meter: Any = ProgressState(1000)
    for step in run_until_stop()[:1] * 100:
        meter.take(FakeStep(step.step, step.verdict, None, 0.1, {"train": 1.0}))
    assert meter.rate == pytest.approx(1)
    for number in range(50):
        meter.take(FakeStep(number + 1, step.verdict, None, 0.1, {"train": 0.2, "other": 0.05}))
    assert meter.rate == pytest.approx(4)
    assert meter.left == pytest.approx(950 / 4)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_panel_is_complete_at_any_width(width: int) -> None:
    console = Console(file=Terminal(), width=width, force_terminal=True, color_system=None)
    with LivePanel(CAP, "<thing> [not a tag]", console) as panel:
        for step in run_until_stop():
            panel(step)
        console.print(panel.render())
    output = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("<thing> [not a tag]", "step", "L_det", "ratio", "of 150"):
        assert text in output
    if width >= 100:
        assert run_until_stop()[-1].verdict.sentence in output
    if width >= 80:
        assert "stops below 0.15" in output
        assert all(len(line) <= width for line in output.splitlines() if "\x1b" not in line)


def test_the_panel_renders_before_the_first_step() -> None:
    console = Console(file=Terminal(), width=80, color_system=None)
    console.print(LivePanel(CAP, "title", console).render())
    assert "0 of 150" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_sparkline_goes_from_the_highest_to_the_lowest_block() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([4, 4, 1, 1], 2) == "█▁"
    assert sparkline([5, 5, 5], 10) == "▁▁▁"
    assert sparkline([], 10) == ""
    assert sparkline([math.nan, 1, math.inf, 2], 10) == "▁█"


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(1, 60))
def test_a_sparkline_is_as_wide_as_its_values_up_to_a_maximum(values: list[float], width: int) -> None:
    assert len(sparkline(values, width)) == min(width, len(values))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (9.4, "0:09"), (59.6, "1:00"), (600, "10:00"), (3599, "59:59"), (3661, "1:01:01")],
)
def test_a_duration_is_formatted_as_a_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
