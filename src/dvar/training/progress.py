"""A run as a person watches it: redrawn in place on a terminal, one line every so often in a log."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dvar.stopping.diagnosis import Reason
from dvar.stopping.verdict import Verdict

if TYPE_CHECKING:
    from dvar.training.loop import StepRecord

_RECENT = 50
_LINES = 50
_WIDTH = 100
_BLOCKS = "▁▂▃▄▅▆▇█"


class ProgressState:
    """The figures a watcher asks for, kept up from step to step; each is None until it is known.

    ``rate`` is in steps a second over the last 50 steps, ``left`` the seconds to the cap at that rate; ``curve`` holds
    every L_det, the mean over the fixed batch.
    """

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.step = 0
        self.curve: list[float] = []
        self.verdict: Verdict | None = None
        self._seconds: deque[float] = deque(maxlen=_RECENT)

    def take(self, step: StepRecord) -> None:
        self.step = step.step
        self.verdict = step.verdict
        if step.train_loss is not None:
            self._seconds.append(sum(step.seconds.values()))
        if step.eval:
            self.curve.append(sum(step.eval) / len(step.eval))

    @property
    def rate(self) -> float | None:
        spent = sum(self._seconds)
        return len(self._seconds) / spent if spent else None

    @property
    def left(self) -> float | None:
        return (self.cap - self.step) / self.rate if self.rate else None

    @property
    def ratio(self) -> float | None:
        return self.verdict.metrics.get("ratio") if self.verdict else None

    @property
    def threshold(self) -> float | None:
        return self.verdict.metrics.get("threshold") if self.verdict else None

    @property
    def pace(self) -> str:
        if self.rate is None or self.left is None:
            return ""
        stopped = self.verdict is not None and self.verdict.stop
        return f"{self.rate:.3g} steps/s" + ("" if stopped else f", {clock(self.left)} to the cap")


class LogLines:
    """Writes a line at the first step, at every fiftieth part of the cap, and where the run stops."""

    def __init__(self, cap: int, stream: TextIO) -> None:
        self.meter = ProgressState(cap)
        self.every = max(1, cap // _LINES)
        self.stream = stream

    def __enter__(self) -> LogLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.flush()

    def __call__(self, step: StepRecord) -> None:
        self.meter.take(step)
        if step.step % self.every == 0 or step.verdict.stop:
            print(self._line(), file=self.stream, flush=True)

    def _line(self) -> str:
        meter = self.meter
        parts = [f"step {meter.step:>{len(str(meter.cap))}}/{meter.cap}"]
        if meter.curve:
            parts.append(f"L_det {meter.curve[-1]:.6f}")
        if meter.ratio is not None and meter.threshold is not None:
            parts.append(f"ratio {meter.ratio:.3f}, threshold {meter.threshold:g}")
        return "  ".join([*parts, meter.pace]).rstrip()


class LivePanel:
    """Redraws the run's figures in place: progress to the cap, L_det as a curve, the ratio against its threshold."""

    def __init__(self, cap: int, title: str, console: Console) -> None:
        self.meter = ProgressState(cap)
        self.title = title
        self.console = console
        self._live = Live(get_renderable=self.draw, console=console, refresh_per_second=8)

    def __enter__(self) -> LivePanel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, step: StepRecord) -> None:
        self.meter.take(step)
        if not self._live.is_started:
            self._live.start()

    def draw(self) -> RenderableType:
        """The panel as it stands now."""
        meter, width = self.meter, min(self.console.width, _WIDTH)
        bar = max(10, width - 44)
        done = ProgressBar(meter.cap, meter.step, width=bar, complete_style="cyan", finished_style="cyan")
        newest = f"{meter.curve[-1]:.6f}" if meter.curve else ""
        rows = Table.grid(padding=(0, 2))
        rows.add_row("step", done, f"{meter.step} of {meter.cap}")
        rows.add_row("L_det", Text(sparkline(meter.curve, bar), style="cyan"), newest)
        rows.add_row("ratio", *self._against_threshold(bar))
        rows.add_row("", Text(meter.pace, style="dim"), "")
        sentence = Text(meter.verdict.sentence if meter.verdict else "")
        if meter.verdict and meter.verdict.stop:
            sentence.stylize("bold green" if meter.verdict.reason is Reason.STABILISED else "bold yellow")
        title = Text(self.title)
        return Panel(Group(rows, sentence), title=title, title_align="left", border_style="dim", width=width)

    def _against_threshold(self, width: int) -> tuple[Text, str]:
        ratio, threshold = self.meter.ratio, self.meter.threshold
        if ratio is None or threshold is None:
            return Text(""), ""
        filled, mark = round(min(ratio, 1) * width), min(round(threshold * width), width - 1)
        bar = Text("━" * filled, style="green" if ratio < threshold else "yellow")
        bar.append("━" * (width - filled), style="grey23")
        bar.plain = bar.plain[:mark] + "┃" + bar.plain[mark + 1 :]
        bar.stylize("bold white", mark, mark + 1)
        return bar, f"{ratio:.3f}, stops below {threshold:g}"


def watch(cap: int, title: str, stream: TextIO) -> LogLines | LivePanel:
    """A consumer of steps for ``stream``: a panel where it is a terminal, lines elsewhere.  Use it as a context."""
    return LivePanel(cap, title, Console(file=stream)) if stream.isatty() else LogLines(cap, stream)


def sparkline(values: Sequence[float], width: int) -> str:
    """The finite ``values`` as a row of at most ``width`` blocks, each the mean of its share, lowest to highest."""
    values = [value for value in values if math.isfinite(value)]
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)] if count else [0]
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
    lowest, spread = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    return "".join(_BLOCKS[round((mean - lowest) / spread * (len(_BLOCKS) - 1)) if spread else 0] for mean in means)


def clock(seconds: float) -> str:
    """A span of time as minutes:seconds, or hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
