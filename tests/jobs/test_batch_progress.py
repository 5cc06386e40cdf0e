"""What is shown of a batch, and its summary."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from dvar.cluster.task import EventKind
from dvar.config.methods import TextualInversionConfig
from dvar.jobs.batch import JobEvent
from dvar.jobs.job import Job
from dvar.jobs.progress import BatchLines, BatchTable, JsonLines, show_batch
from dvar.jobs.status import JobStatus, format_summary, summarise

END = {"steps": 60, "cap": 100, "verdict": "stabilised", "sentence": "stop at step 60: stable", "seconds": 61.0}


def event(job: str, kind: EventKind, **facts: Any) -> JobEvent:
    return JobEvent(job, kind, "worker-1", 1000.0, facts)


EVENTS = [
    event("mug", "started", attempt=1),
    event("mug", "progress", step=0, cap=100),
    event("mug", "retried", reason="killed by SIGKILL"),
    event("boot", "started", attempt=1),
    event("mug", "started", attempt=2),
    event("mug", "progress", step=40, cap=100, ratio=0.5, threshold=0.15),
    event("boot", "done", **END),
    event("cat", "failed", reason="x.png is not an image"),
]


def test_a_log_has_a_line_for_each_event_but_progress() -> None:
    stream = io.StringIO()
    with BatchLines(3, stream) as lines:
        for item in (*EVENTS, None):
            lines(item)
    text = stream.getvalue().splitlines()
    assert text[:4] == [
        "mug: started (worker-1)",
        "mug: retried, killed by SIGKILL (worker-1)",
        "boot: started (worker-1)",
        "mug: started, attempt 2 (worker-1)",
    ]
    assert text[4] == "boot: done, stop at step 60: stable, in 1:01"
    assert text[5].startswith("1 of 3 jobs (1 done) in 0:00")
    assert text[6] == "cat: failed, x.png is not an image (worker-1)"


def test_a_table_shows_the_running_jobs_and_what_happened_last() -> None:
    console = Console(file=io.StringIO(), width=100, height=30)
    table = BatchTable(3, console)
    for item in EVENTS:
        table(item)
    console.print(table.render())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 of 3 jobs (1 done, 1 failed)" in text
    assert "40 of 100" in text
    assert "0.500" in text
    assert "boot: done" in text
    assert "cat: failed, x.png is not an image" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_table_of_many_jobs_fits_on_the_terminal() -> None:
    console = Console(file=io.StringIO(), width=60, height=20)
    table = BatchTable(500, console)
    for number in range(200):
        table(event(f"job-{number}", "progress", step=number, cap=1000))
    console.print(table.render())
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) <= 20
    assert "and 190 more" in "\n".join(lines)


def test_each_event_is_a_line_of_json() -> None:
    stream = io.StringIO()
    with JsonLines(stream) as lines:
        lines(None)
        for item in EVENTS:
            lines(item)
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [row["event"] for row in rows] == [item.kind for item in EVENTS]
    assert rows[2] == {
        "time": 1000.0,
        "job": "mug",
        "event": "retried",
        "worker": "worker-1",
        "reason": "killed by SIGKILL",
    }


def test_what_libraries_print_is_no_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    with show_batch(1, as_json=True) as lines:
        print("(raylet) A worker died")
        lines(EVENTS[0])
    print("after it")
    output = capsys.readouterr()
    assert output.err == "(raylet) A worker died\n"
    first, last = output.out.splitlines()
    assert (json.loads(first)["event"], last) == ("started", "after it")


def test_a_summary_counts_jobs_verdicts_and_the_steps_that_stopping_has_saved() -> None:
    jobs = [Job(name, TextualInversionConfig()) for name in ("boot", "mug", "cat", "dog", "owl")]
    broken = {**END, "verdict": "non-finite", "reason": "the loss was nan"}
    statuses = [
        JobStatus(jobs[0], "done", END),
        JobStatus(jobs[1], "done", {**END, "steps": 100, "verdict": "cap reached"}),
        JobStatus(jobs[2], "missing", {}),
        JobStatus(jobs[3], "failed", broken),
        JobStatus(jobs[4], "missing", {}),
    ]
    summary = summarise(statuses, {"cat": "x.png is not an image"})
    assert (summary["done"], summary["failed"], summary["missing"]) == (2, 2, 1)
    assert (summary["steps"], summary["steps_saved"], summary["seconds"]) == (160, 40, 122.0)
    assert format_summary(summary) == [
        "jobs      2 done, 2 failed, 1 missing of 5",
        "verdicts  1 cap reached, 1 stabilised",
        "steps     160 of 200: stopping has saved 20 %",
        "failed    dog: the loss was nan",
        "failed    cat: x.png is not an image",
    ]
    assert format_summary(summarise([], {})) == ["jobs      none of 0"]
