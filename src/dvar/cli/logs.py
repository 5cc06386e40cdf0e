"""The command on logs of other programs: `dvar replay`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvar.cli.console import FAILED, REFUSED, print_message
from dvar.cli.options import raise_problems, with_flags_of
from dvar.runs.config import ReplayConfig, problems

if TYPE_CHECKING:
    from dvar.runs.follow import FollowedLog
    from dvar.runs.replay import ReplayOutcome
    from dvar.runs.watched_process import WatchedProcess
    from dvar.stopping.trace import Trace
    from dvar.stopping.verdict import Verdict

PLAIN_WIDTH = 200  # of a table that is written into a file or a pipe
SAVING_SECONDS = 600.0
"""How long a program that was interrupted may take to save, before what --on_stop names runs."""


@with_flags_of(ReplayConfig)
def replay(log: Path, /, **flags: Any) -> int:
    """Say when each rule would have stopped a recorded run, and why; or follow a log and act when a rule stops.

    Reads trace.jsonl, CSV, JSON lines, W&B's history and its .wandb files, the trainer_state.json of transformers, and
    the logs of SimpleTuner, ai-toolkit, DiffSynth, MLflow and trackio. With dvar[tensorboard] it reads event files too.
    A run of dvar, and a script that dvar launched, is judged by its own rule and settings unless you name others.

    Parameters
    ----------
    log
        File of a curve over steps, or a folder that holds one.
    """
    raise_problems(problems(ReplayConfig(**flags)))
    from dvar.logs.reader import read_log
    from dvar.runs.replay import read_own_settings, replay_rules
    from dvar.runs.replay_figure import write_replay

    own = {name: value for name, value in read_own_settings(log).items() if name not in flags}
    config = ReplayConfig(**flags, **own)
    raise_problems(problems(config))
    if own:
        print_message(f"judged with this run's own settings: {_format_settings(own)}")
    if config.follow:
        return _follow(log, config)
    trace = read_log(log, config.metric, config.step_column)
    outcomes = replay_rules(trace, config)
    _print_outcomes(outcomes)
    _print_choice(trace)
    if config.output:
        print(f"figure    {write_replay(Path(config.output), log.name, trace, outcomes, config)}")
    return 0


def _format_settings(settings: Mapping[str, Any]) -> str:
    """Return settings by name as a sentence lists them."""
    texts = {name: " ".join(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def _print_outcomes(outcomes: Iterable[ReplayOutcome]) -> None:
    """Print a table of the rules, wrapped to the width of the terminal; plain lines elsewhere."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("rule", no_wrap=True)
    table.add_column("stops at", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for outcome in outcomes:
        table.add_row(outcome.name, "–" if outcome.stop is None else f"{outcome.stop}", outcome.sentence)
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)


def _print_choice(trace: Trace) -> None:
    """Print which curve was judged."""
    log: Mapping[str, Any] = trace.header.get("log", {})
    if log:
        others = log.get("preferred_to", ())
        print(f"curve     {log['metric']} in {log['file']}{', rather than ' if others else ''}{', '.join(others)}")


# --- following a log ------------------------------------------------------------------------------------------------


def _follow(log: Path, config: ReplayConfig) -> int:
    """Follow a log, print verdicts as they change, and act at a stop."""
    from dvar.runs.follow import follow_log
    from dvar.runs.replay import build_rules
    from dvar.runs.watched_process import WatchedProcess

    (rule,) = build_rules(config).values()
    process = WatchedProcess(config.pid) if config.pid else None
    events = follow_log(
        log,
        rule,
        metric=config.metric,
        step_column=config.step_column,
        poll_seconds=config.poll_seconds,
        idle_seconds=60 * config.idle_minutes,
        is_running=process.is_running if process else lambda: True,
        only_new=bool(process or config.on_stop or config.stop_file),
    )
    try:
        return _act(log, _print_events(events, config), config, process)
    finally:
        if process:
            process.close()


def _print_events(events: Iterator[FollowedLog], config: ReplayConfig) -> FollowedLog | None:
    """Print notes and verdicts, those for the same reason every quarter of a window, and return the last event."""
    from dvar.runs.replay import find_sparse_records

    event, printed, sparse, chosen = None, None, False, False
    try:
        for event in events:
            if event.note and not event.end:
                print_message(event.note)
            if len(event.trace) and not chosen:
                _print_choice(event.trace)
                chosen = True
            if (
                not sparse
                and len(event.trace.steps) > 2
                and (problem := find_sparse_records(event.trace, config.window))
            ):
                print_message(problem)
                sparse = True
            if event.verdict and not event.end and _differs(event.verdict, printed, config.window // 4):
                print(event.verdict, flush=True)
                printed = event.verdict
    except KeyboardInterrupt:
        if event and event.verdict:
            print(f"the log is no longer followed: {event.verdict}", flush=True)
        raise
    return event


def _differs(verdict: Verdict, printed: Verdict | None, steps: int) -> bool:
    return printed is None or verdict.reason != printed.reason or abs(verdict.step - printed.step) >= steps


def _act(log: Path, event: FollowedLog | None, config: ReplayConfig, process: WatchedProcess | None) -> int:
    """Do at the end of a log what the flags say, and return the exit status."""
    import subprocess

    from dvar.files import write_json
    from dvar.runs.follow import STOPS
    from dvar.runs.replay import ReplayOutcome
    from dvar.runs.replay_figure import write_replay

    if event is None or event.verdict is None:
        print_message(f"{log} was never judged: {event.end if event else 'nothing was read'}")
        return REFUSED
    stops = event.end == STOPS
    print(event.verdict if stops else f"{event.end}: {event.verdict}", flush=True)
    status = 0
    if stops:
        if config.stop_file:
            write_json(Path(config.stop_file), event.verdict.to_json())
            print(f"stop file {config.stop_file}")
        if process:
            sent = process.interrupt(descendants=True)
            print(f"process   {process.pid} {'is interrupted' if sent else 'had ended already'}", flush=True)
            if config.on_stop and not process.wait(SAVING_SECONDS):
                print_message(f"process {process.pid} has not ended in {SAVING_SECONDS:g} seconds: on_stop runs now")
        if config.on_stop:
            environment = {"DVAR_STEP": f"{event.verdict.step}", "DVAR_VERDICT": str(event.verdict)}
            command = subprocess.run(config.on_stop, shell=True, env={**os.environ, **environment})
            if command.returncode:
                print_message(f"on_stop ended with status {command.returncode}: {config.on_stop}")
                status = FAILED
    if config.output:
        outcomes = [ReplayOutcome(config.rule[0], event.verdict)]
        print(f"figure    {write_replay(Path(config.output), log.name, event.trace, outcomes, config)}")
    return status
