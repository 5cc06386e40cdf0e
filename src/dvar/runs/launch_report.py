"""The report of a launched script: its curve and the verdict, as a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dvar.errors import RefusedInput, TraceError
from dvar.launch.config import TRACE
from dvar.runs.config import ReplayConfig, problems
from dvar.runs.replay import replay_rules
from dvar.runs.replay_figure import write_replay
from dvar.stopping.trace import Trace

REPORT = "report.html"


def find_launch_trace(path: Path) -> Path | None:
    """Return the trace of a launched script, which is this file or in this folder; None where there is none."""
    trace = path / TRACE if path.is_dir() else path
    try:
        return trace if "launch" in Trace.read(trace).header else None
    except (OSError, TraceError):
        return None


def write_launch_report(path: Path, output: Path | None = None, launch: Mapping[str, Any] | None = None) -> Path:
    """Write the report of a launched script and return its path.

    Args:
        path: The trace.
        output: The page; ``report.html`` beside the trace by default.
        launch: Rule and settings to judge by, as in the header of a trace; those of the trace by default.

    Raises:
        RefusedInput: The trace holds no measurement, or the page cannot be written.
        TraceError: The trace is damaged.
    """
    trace = Trace.read(path)
    if not len(trace):
        raise RefusedInput([f"a report needs a measurement, got none in {path}: let the script run to its first step"])
    settings = launch or trace.header["launch"]
    names = {item.name for item in fields(ReplayConfig)} - {"rule"}
    if unknown := settings["settings"].keys() - names:
        raise RefusedInput([f"{path} names {', '.join(sorted(unknown))}, which no rule knows: restore the trace"])
    config = ReplayConfig(rule=(settings["rule"],), **settings["settings"])
    if wrong := problems(config):
        raise RefusedInput([f"{path}: {problem}: restore the trace" for problem in wrong])
    return write_replay(
        output or path.with_name(REPORT), settings["script"], trace, replay_rules(trace, config), config
    )
