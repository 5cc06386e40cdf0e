"""The progress of a run: a live panel on a terminal, lines in a log."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dvar.errors import DvarError
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rule import CONDITION_REASONS
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict
from dvar.training.run_layout import TRACE, checkpoint_paths

if TYPE_CHECKING:
    from dvar.config.training import TrainingConfig
    from dvar.training.loop import StepRecord

_RECENT = 50
_LINES = 50
_WIDTH = 100
_BLOCKS = "▁▂▃▄▅▆▇█"


class ProgressState:
    """The figures that are shown, updated at each step.

    Attributes:
        cap: The cap of the run, in steps.
        earlier: L_det at the evaluations before the run was resumed.
        step: The last step.
        curve: Every L_det so far.
        verdict: The last verdict; None before the first step.
    """

    def __init__(self, cap: int, earlier: Sequence[float] = ()) -> None:
        self.cap = cap
        self.step = 0
        self.curve = [*earlier]
        self.verdict: Verdict | None = None
        self._seconds: deque[float] = deque(maxlen=_RECENT)

    def take(self, step: StepRecord) -> None:
        """Update the figures by a step."""
        self.step = step.step
        self.verdict = step.verdict
        if step.train_loss is not None:
            self._seconds.append(sum(step.seconds.values()))
        if step.eval:
            self.curve.append(sum(step.eval) / len(step.eval))

    @property
    def rate(self) -> float | None:
        """Steps a second over the last 50 steps; None before the first update."""
        seconds = sum(self._seconds)
        return len(self._seconds) / seconds if seconds else None

    @property
    def left(self) -> float | None:
        """Seconds to the cap at this rate; None before the first update."""
        return (self.cap - self.step) / self.rate if self.rate else None

    @property
    def ratio(self) -> float | None:
        """The ratio that the rule compares with its threshold; None while it has none."""
        return self.verdict.metrics.get("ratio") if self.verdict else None

    @property
    def threshold(self) -> float | None:
        """The threshold of the rule; None while it has no ratio."""
        return self.verdict.metrics.get("threshold") if self.verdict else None

    @property
    def doubt(self) -> str:
        """The reason why the run goes on below the threshold; empty where it does not, or stops."""
        if self.verdict is None or self.verdict.stop or self.verdict.reason not in CONDITION_REASONS:
            return ""
        return f"goes on: {self.verdict.reason}"

    @property
    def pace(self) -> str:
        """The rate and the time to the cap, in words."""
        if self.rate is None or self.left is None:
            return ""
        stopped = self.verdict is not None and self.verdict.stop
        return f"{self.rate:.3g} steps/s" + ("" if stopped else f", {format_duration(self.left)} to the cap")


class LogLines:
    """A consumer of steps that writes a line at the first step, at every fiftieth of the cap, and at the last step.

    Args:
        cap: The cap of the run, in steps.
        stream: Where the lines go.
    """

    def __init__(self, cap: int, stream: TextIO) -> None:
        self.state = ProgressState(cap)
        self.every = max(1, cap // _LINES)
        self.stream = stream

    def __enter__(self) -> LogLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __call__(self, step: StepRecord) -> None:
        self.state.take(step)
        if step.step % self.every == 0 or step.verdict.stop:
            with suppress(OSError):  # a terminal that closed, a full disk: training matters more
                print(self._line(), file=self.stream, flush=True)

    def _line(self) -> str:
        """Return the line of the last step."""
        state = self.state
        parts = [f"step {state.step:>{len(str(state.cap))}}/{state.cap}"]
        if state.curve:
            parts.append(f"L_det {state.curve[-1]:.6f}")
        if state.ratio is not None and state.threshold is not None:
            ratio = f"ratio {state.ratio:.3f}, threshold {state.threshold:g}"
            parts.append(f"{ratio}, {state.doubt}" if state.doubt else ratio)
        return "  ".join([*parts, state.pace]).rstrip()


class LivePanel:
    """A consumer of steps that shows progress, the curve of L_det and the ratio against its threshold, in place.

    Args:
        cap: The cap of the run, in steps.
        title: The title of the panel.
        console: Where it is shown.
        earlier: L_det at the evaluations before the run was resumed.
    """

    def __init__(self, cap: int, title: str, console: Console, earlier: Sequence[float] = ()) -> None:
        self.state = ProgressState(cap, earlier)
        self.title = title
        self.console = console
        self._live = Live(get_renderable=self.render, console=console, refresh_per_second=8)

    def __enter__(self) -> LivePanel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._live.stop()

    def __call__(self, step: StepRecord) -> None:
        self.state.take(step)
        if not self._live.is_started:
            with suppress(OSError):
                self._live.start()

    def render(self) -> RenderableType:
        """Return the panel with the current figures."""
        state, width = self.state, min(self.console.width, _WIDTH)
        bar = max(10, width - 44)
        progress = ProgressBar(state.cap, state.step, width=bar, complete_style="cyan", finished_style="cyan")
        last_loss = f"{state.curve[-1]:.6f}" if state.curve else ""
        rows = Table.grid(padding=(0, 2))
        rows.add_row("step", progress, f"{state.step} of {state.cap}")
        rows.add_row("L_det", Text(sparkline(state.curve, bar), style="cyan"), last_loss)
        rows.add_row("ratio", *self._ratio_bar(bar))
        rows.add_row("", Text(state.pace, style="dim"), "")
        sentence = Text(state.verdict.sentence if state.verdict else "")
        if state.verdict and state.verdict.stop:
            sentence.stylize("bold green" if state.verdict.reason is Reason.STABILISED else "bold yellow")
        title = Text(self.title)
        return Panel(Group(rows, sentence), title=title, title_align="left", border_style="dim", width=width)

    def _ratio_bar(self, width: int) -> tuple[Text, str]:
        """Return the ratio as a bar with a mark at the threshold, and in words."""
        ratio, threshold = self.state.ratio, self.state.threshold
        if ratio is None or threshold is None:
            return Text(""), ""
        filled, mark = round(min(ratio, 1) * width), min(round(threshold * width), width - 1)
        bar = Text("━" * filled, style="green" if ratio < threshold else "yellow")
        bar.append("━" * (width - filled), style="grey23")
        bar.plain = bar.plain[:mark] + "┃" + bar.plain[mark + 1 :]
        bar.stylize("bold white", mark, mark + 1)
        return bar, f"{ratio:.3f}, stops below {threshold:g}"


def show_progress(cap: int, title: str, stream: TextIO, earlier: Sequence[float] = ()) -> LogLines | LivePanel:
    """Return a consumer of steps, to be used as a context: a panel if ``stream`` is a terminal, lines otherwise.

    Args:
        cap: The cap of the run, in steps.
        title: The title of a panel.
        stream: Where it is shown.
        earlier: L_det at the evaluations before the run was resumed.
    """
    return LivePanel(cap, title, Console(file=stream), earlier) if stream.isatty() else LogLines(cap, stream)


def read_earlier_losses(config: TrainingConfig) -> list[float]:
    """Return L_det at the evaluations up to the checkpoint that ``config`` resumes from, if it resumes."""
    if not config.resume_from_checkpoint:
        return []
    folder, name = Path(config.output_dir).expanduser(), Path(config.resume_from_checkpoint).name
    checkpoints = checkpoint_paths(folder)[:1] if name == "latest" else [folder / name]
    try:
        return [loss for checkpoint in checkpoints for loss in Trace.read(checkpoint / TRACE).values.tolist()]
    except (OSError, DvarError):  # a damaged checkpoint, which the run itself reports or passes over
        return []


def sparkline(values: Sequence[float], width: int) -> str:
    """Return the finite ``values`` as a row of at most ``width`` blocks, each the mean of an equal share of them."""
    values = [value for value in values if math.isfinite(value)]
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)] if count else [0]
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
    lowest, spread = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    return "".join(_BLOCKS[round((mean - lowest) / spread * (len(_BLOCKS) - 1)) if spread else 0] for mean in means)


def format_duration(seconds: float) -> str:
    """Return a duration as minutes:seconds, or hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
