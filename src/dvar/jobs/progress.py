"""The progress of a batch: a live table on a terminal, lines in a log, or JSON."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stdout
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dvar.cluster.task import ENDS
from dvar.jobs.batch import JobEvent
from dvar.training.progress import format_duration

Consumer = Callable[[JobEvent | None], None]
_WIDTH, _BAR, _RECENT = 110, 28, 5


class BatchState:
    """The figures that are shown, updated by each event.

    Args:
        total: Jobs that are to be run.

    Attributes:
        running: The last event of each job that is running, by id.
        ends: Jobs by how they ended.
        recent: What happened last that a person should know, newest last.
    """

    def __init__(self, total: int) -> None:
        self.total, self.started = total, time.monotonic()
        self.running: dict[str, JobEvent] = {}
        self.ends: Counter[str] = Counter()
        self.recent: list[str] = []

    def take(self, event: JobEvent) -> None:
        """Update the figures by an event."""
        if event.kind in ("started", "progress"):
            self.running[event.job] = event
            return
        self.running.pop(event.job, None)
        if event.kind in ENDS:
            self.ends[event.kind] += 1
        self.recent = [*self.recent, format_event(event)][-_RECENT:]

    def format(self) -> str:
        """Return the state in one line, with the time left at the pace so far."""
        ended = sum(self.ends.values())
        seconds = time.monotonic() - self.started
        counts = ", ".join(f"{count} {kind}" for kind, count in self.ends.items())
        left = f", about {format_duration(seconds / ended * (self.total - ended))} left" if ended else ""
        details = f" ({counts})" if counts else ""
        return f"{ended} of {self.total} jobs{details} in {format_duration(seconds)}{left}"


def format_event(event: JobEvent) -> str:
    """Return an event in one line."""
    facts = event.facts
    if event.kind == "done":
        return f"{event.job}: done, {facts['sentence']}, in {format_duration(facts['seconds'])}"
    attempt = f", attempt {facts['attempt']}" if facts.get("attempt", 1) > 1 else ""
    reason = f", {facts['reason']}" if facts.get("reason") else ""
    return f"{event.job}: {event.kind}{reason}{attempt} ({event.worker})"


class BatchLines(AbstractContextManager["BatchLines"]):
    """A consumer that writes a line for each event but progress.

    Args:
        total: Jobs that are to be run.
        stream: Where the lines go.
    """

    def __init__(self, total: int, stream: TextIO) -> None:
        self.state, self.stream = BatchState(total), stream

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, event: JobEvent | None) -> None:
        if event is None or event.kind == "progress":
            return
        self.state.take(event)
        print(format_event(event), file=self.stream)
        if event.kind in ENDS:
            print(self.state.format(), file=self.stream, flush=True)


class JsonLines(AbstractContextManager["JsonLines"]):
    """A consumer that writes each event as a line of JSON, to be used as a context.

    What libraries print goes to stderr meanwhile: Ray prints the loss of a worker from a thread of its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self._printed = stream, redirect_stdout(sys.stderr)

    def __enter__(self) -> JsonLines:
        self._printed.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._printed.__exit__(*error)

    def __call__(self, event: JobEvent | None) -> None:
        if event:
            print(event.to_json(), file=self.stream, flush=True)


class BatchTable:
    """A consumer that shows the running jobs and what happened last, to be used as a context.

    Args:
        total: Jobs that are to be run.
        console: The terminal.
    """

    def __init__(self, total: int, console: Console) -> None:
        self.state, self.console = BatchState(total), console
        self._live = Live(get_renderable=self.render, console=console, refresh_per_second=4)

    def __enter__(self) -> BatchTable:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, event: JobEvent | None) -> None:
        if event:
            self.state.take(event)

    def render(self) -> RenderableType:
        """Return the panel with the current figures."""
        state, width = self.state, min(self.console.width, _WIDTH)
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for title in ("job", "", "step", "ratio", "worker"):
            table.add_column(title, justify="right" if title in ("step", "ratio") else "left", no_wrap=True)
        rows = max(1, self.console.height - _RECENT - 5)
        for name, event in list(state.running.items())[:rows]:
            table.add_row(Text(name), *_format_progress(event, max(8, min(_BAR, width - 70))), Text(event.worker))
        if len(state.running) > rows:
            table.add_row(Text(f"and {len(state.running) - rows} more", style="dim"))
        recent = [Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in state.recent]
        parts: list[RenderableType] = [table, *([Text("")] if recent else []), *recent]
        return Panel(Group(*parts), title=Text(state.format()), title_align="left", border_style="dim", width=width)


def _format_progress(event: JobEvent, width: int) -> tuple[RenderableType, Text, Text]:
    """Return the bar, the steps and the ratio of a running job."""
    facts = event.facts
    if "step" not in facts:
        return Text("loading", style="dim"), Text(""), Text("")
    bar = ProgressBar(facts["cap"], facts["step"], width=width, complete_style="cyan", finished_style="cyan")
    ratio, threshold = facts.get("ratio"), facts.get("threshold")
    close = ratio is not None and threshold is not None and ratio < threshold
    ratio_text = "" if ratio is None else f"{ratio:.3f}"
    return bar, Text(f"{facts['step']} of {facts['cap']}"), Text(ratio_text, style="green" if close else "")


def show_batch(total: int, *, as_json: bool = False) -> BatchLines | BatchTable | JsonLines:
    """Return a consumer of events, to be used as a context: JSON, a table on a terminal, or lines."""
    if as_json:
        return JsonLines(sys.stdout)
    return BatchTable(total, Console(file=sys.stderr)) if sys.stderr.isatty() else BatchLines(total, sys.stderr)
