"""Logs followed while they are written: growth, rotation, restarts, faults, and each way it ends."""

from __future__ import annotations

import json
import math
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvar import Dvar, RefusedInput, Trace
from dvar.runs.follow import FollowedLog, find_last_agreed_step, follow_log, join_traces
from dvar.runs.replay import replay_rule
from dvar.stopping.rules import Hall
from dvar.stopping.verdict import Verdict

RULE = Dvar(60, 0.15)


def loss(step: int) -> float:
    return 0.1 + 0.01 * math.exp(-step / 20)


def format_rows(steps: Iterable[int]) -> str:
    return "".join(f"{step},{loss(step)!r}\n" for step in steps)


def record_trace(steps: Iterable[int]) -> Trace:
    trace = Trace()
    for step in steps:
        trace.record(step, loss(step))
    return trace


class Trainer:
    """A program that does the next of its actions whenever `follow_log` waits, on a clock that only moves then."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        self.actions = list(actions)
        self.time, self.running = 0.0, True

    def wait(self, seconds: float) -> None:
        self.time += seconds
        if self.actions:
            self.actions.pop(0)()

    def end(self) -> None:
        self.running = False

    def follow(self, log: Path, **settings: Any) -> Iterator[FollowedLog]:
        settings = {"rule": RULE, "poll_seconds": 10.0, "idle_seconds": 100.0, **settings}
        return follow_log(log, is_running=lambda: self.running, wait=self.wait, clock=lambda: self.time, **settings)


def append(path: Path, text: str) -> Callable[[], object]:
    def write() -> None:
        with path.open("a") as file:
            file.write(text)

    return write


def list_verdicts(events: Iterable[FollowedLog]) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for event in events:
        if event.verdict and event.verdict not in verdicts[-1:]:
            verdicts.append(event.verdict)
    return verdicts


# --- growth ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 400), max_size=12))
def test_the_verdicts_are_those_of_the_live_run_whatever_was_written_between_two_looks(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    log = tmp_path_factory.mktemp("run") / "log.csv"
    text = "step,val_loss\n" + format_rows(range(0, 120, 2))
    places = sorted({*(cut * len(text) // 400 for cut in cuts), len(text)})
    parts = [text[start:end] for start, end in zip([0, *places], places, strict=False)]
    events = list(Trainer(*(append(log, part) for part in parts)).follow(log))
    expected = []
    for verdict in replay_rule(record_trace(range(0, 120, 2)), RULE):
        expected.append(verdict)
        if verdict.stop:
            break
    assert list_verdicts(events) == expected
    assert expected[-1].stop
    assert events[-1].end == "the rule stops"


def test_a_log_that_does_not_exist_yet_is_waited_for_and_each_reason_is_reported_once(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    trainer = Trainer(
        lambda: None,
        append(log, "step,"),
        lambda: None,
        append(log, "val_loss\n"),
        append(log, format_rows(range(200))),
    )
    events = list(trainer.follow(log))
    problems = ("does not exist: check the path", "a log must hold numbers over steps")
    for event, problem in zip(events, problems, strict=False):
        assert problem in event.note
    assert [event.note for event in events[len(problems) :]] == [""] * (len(events) - len(problems))
    assert events[-1].verdict
    assert events[-1].verdict.stop


def test_a_stop_that_the_log_has_passed_already_is_the_first_one(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    append(log, "step,val_loss\n" + format_rows(range(400)))()
    (*_, last) = Trainer().follow(log)
    assert last.verdict == next(verdict for verdict in replay_rule(record_trace(range(400)), RULE) if verdict.stop)
    assert last.trace.last_step == 399


def test_a_stop_of_an_earlier_run_does_not_end_the_next_one(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    append(log, "step,val_loss\n" + format_rows(range(400)))()
    trainer = Trainer(lambda: None, lambda: log.write_text("step,val_loss\n0,0.5\n"), append(log, "1,0.4\n"))
    events = list(trainer.follow(log, only_new=True))
    assert any(event.note.startswith("the log holds a stop from before it was followed") for event in events)
    assert events[-1].end == "there was no new record for 1.66667 minutes"
    assert events[-1].verdict
    assert (events[-1].verdict.step, events[-1].verdict.stop) == (1, False)


def test_a_stop_that_was_passed_before_following_counts_once_the_log_grows(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    append(log, "step,val_loss\n" + format_rows(range(400)))()
    first = next(verdict for verdict in replay_rule(record_trace(range(400)), RULE) if verdict.stop)
    (*_, last) = Trainer(lambda: None, append(log, format_rows([400]))).follow(log, only_new=True)
    assert (last.verdict, last.end) == (first, "the rule stops")
    (*_, last) = Trainer(lambda: None, lambda: None).follow(log, only_new=True)
    assert "no new record" in last.end


def test_a_log_that_begins_while_it_is_followed_counts_from_its_first_record(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    (*_, last) = Trainer(append(log, "step,val_loss\n" + format_rows(range(400)))).follow(log, only_new=True)
    assert last.end == "the rule stops"


def test_a_line_that_is_still_being_written_is_not_judged(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    append(log, "step,val_loss\n0,0.5\n1,0.4")()
    events = Trainer(append(log, "75\n")).follow(log)
    assert next(events).trace.values.tolist() == [0.5]
    assert next(events).trace.values.tolist() == [0.5, 0.475]


def test_a_database_is_followed_by_what_is_written_beside_it(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "loss_log.db")) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE metrics (step INTEGER, key TEXT, value_real REAL, value_text TEXT)")
        database.commit()

        def insert(steps: Iterable[int]) -> Callable[[], object]:
            def write() -> None:
                rows = [(step, loss(step)) for step in steps]
                database.executemany("INSERT INTO metrics VALUES (?, 'val/loss', ?, NULL)", rows)
                database.commit()

            return write

        trainer = Trainer(insert(range(50)), insert(range(50, 100)), insert(range(100, 150)))
        (*_, last) = trainer.follow(tmp_path)
    assert last.verdict == next(verdict for verdict in replay_rule(record_trace(range(150)), RULE) if verdict.stop)


def test_files_are_read_again_only_when_they_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.csv"
    append(log, "step,val_loss\n" + format_rows(range(20)))()
    reads = []

    def read_log(*arguments: Any, **settings: Any) -> Trace:
        reads.append(arguments)
        return record_trace(range(20))

    monkeypatch.setattr("dvar.runs.follow.read_log", read_log)
    (*_, last) = Trainer().follow(log)
    assert last.end == "there was no new record for 1.66667 minutes"
    assert len(reads) == 1


def test_a_log_that_cannot_be_read_for_a_moment_is_read_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = [RefusedInput("database is locked"), PermissionError("in use"), record_trace(range(200))]

    def read_log(*arguments: Any, **settings: Any) -> Trace:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    monkeypatch.setattr("dvar.runs.follow.read_log", read_log)
    events = list(Trainer().follow(tmp_path))
    assert [event.note for event in events[:2]] == ["database is locked", "in use"]
    assert events[-1].end == "the rule stops"


def test_a_folder_that_is_removed_while_the_files_are_listed_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(tmp_path / "log.csv", "step,val_loss\n" + format_rows(range(20)))()
    rglob, listings = Path.rglob, 0

    def list_while_a_folder_is_removed(folder: Path, pattern: str) -> Iterator[Path]:
        nonlocal listings
        listings += 1
        yield from rglob(folder, pattern)
        if listings == 1:
            raise FileNotFoundError("checkpoint-500")

    monkeypatch.setattr("dvar.runs.follow.read_log", lambda *_, **__: record_trace(range(20 * listings)))
    monkeypatch.setattr(Path, "rglob", list_while_a_folder_is_removed)
    events = Trainer(append(tmp_path / "log.csv", format_rows(range(20, 40)))).follow(tmp_path)
    assert {event.trace.last_step for event in events} == {19, 39}


def test_a_warning_about_the_log_is_given_once(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    append(log, "step,loss\n0,0.5\n")()
    trainer = Trainer(append(log, "1,0.4\n"), append(log, "2,0.4\n"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        events = list(trainer.follow(log, metric="loss"))
    assert len(caught) == 1
    assert "training loss with random timesteps" in str(caught[0].message)
    assert events[-1].trace.steps.tolist() == [0, 1, 2]


def test_a_curve_that_the_rule_cannot_judge_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    append(log, "step,val_loss\n" + "".join(f"{step},{-1 - step}\n" for step in range(40)))()
    with pytest.raises(RefusedInput, match="Hall divides by the level of the loss"):
        list(Trainer().follow(log, rule=Hall(20, 0.01)))


# --- rotation, truncation, resumes ----------------------------------------------------------------------------------


def test_a_rotated_log_goes_on_in_the_new_file(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    append(log, "step,val_loss\n" + format_rows(range(50)))()

    def rotate() -> None:
        log.rename(tmp_path / "log.csv.1")
        append(log, "step,val_loss\n" + format_rows(range(50, 55)))()

    events = list(Trainer(rotate, append(log, format_rows(range(55, 100)))).follow(log))
    notes = [event.note for event in events if event.note]
    assert notes == ["the log goes on in a new file from step 50: the records before it count"]
    expected = next(verdict for verdict in replay_rule(record_trace(range(100)), RULE) if verdict.stop)
    assert events[-1].verdict == expected


def test_a_truncated_log_is_judged_from_its_new_beginning(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    append(log, "step,val_loss\n" + "".join(f"{step},{5 - step / 100}\n" for step in range(55)))()

    def begin_again() -> None:
        log.write_text("step,val_loss\n" + format_rows(range(10)))

    events = list(Trainer(begin_again, append(log, format_rows(range(10, 100)))).follow(log))
    assert [event.note for event in events if event.note] == ["the log was restarted at step 0"]
    expected = next(verdict for verdict in replay_rule(record_trace(range(100)), RULE) if verdict.stop)
    assert events[-1].verdict == expected


def test_a_log_cut_to_what_it_held_before_has_the_verdict_of_then(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    append(log, "step,val_loss\n" + format_rows(range(40)))()

    def cut() -> None:
        log.write_text("step,val_loss\n" + format_rows(range(20)))

    (*_, last) = Trainer(cut).follow(log)
    assert last.trace.last_step == 19
    assert last.verdict == RULE(record_trace(range(20)))


def test_a_resumed_run_is_judged_by_its_last_attempt(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    append(log, "step,val_loss\n" + format_rows(range(30)) + "".join(f"{step},9.0\n" for step in range(30, 50)))()
    trainer = Trainer(append(log, format_rows(range(30, 100))))
    with pytest.warns(UserWarning, match="resumed from step 30"):
        (*_, last) = trainer.follow(log)
    assert last.verdict == next(verdict for verdict in replay_rule(record_trace(range(100)), RULE) if verdict.stop)


def test_a_new_file_with_another_number_of_samples_is_another_run() -> None:
    past, newest = Trace(), Trace()
    for step in range(20):
        past.record(step, [1.0, 2.0])
        newest.record(step + 10, 1.0)
    assert join_traces(past, newest) == (newest, "the log was restarted at step 10")


def test_traces_agree_up_to_the_first_difference() -> None:
    past = record_trace(range(10))
    assert find_last_agreed_step(past, record_trace(range(20))) == 9
    assert find_last_agreed_step(past, record_trace(range(5))) == 4
    other = record_trace(range(4))
    other.record(4, math.nan)
    assert find_last_agreed_step(past, other) == 3
    assert find_last_agreed_step(other, other.cut(4)) == 4
    assert find_last_agreed_step(past, Trace()) == find_last_agreed_step(past, record_trace(range(1, 4))) == -1


# --- ends -----------------------------------------------------------------------------------------------------------


def test_what_the_program_wrote_last_is_judged_before_following_ends(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    append(log, "step,val_loss\n" + format_rows(range(10)))()
    trainer = Trainer()

    def end() -> None:
        append(log, format_rows(range(10, 20)))()
        trainer.end()

    trainer.actions.append(end)
    (*_, last) = trainer.follow(log)
    assert (last.end, last.trace.last_step) == ("the program that writes the log has ended", 19)
    assert last.verdict == RULE(record_trace(range(20)))


def test_a_last_line_without_its_break_counts_once_the_program_has_ended(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    append(log, "step,val_loss\n0,0.5\n1,0.4")()
    trainer = Trainer()
    trainer.actions.append(trainer.end)
    assert [event.trace.last_step for event in trainer.follow(log)] == [0, 1, 1]


def test_a_log_without_new_records_ends_after_the_idle_time_counted_from_the_last_one(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    append(log, "step,val_loss\n0,0.5\n")()
    trainer = Trainer(*(append(log, f"{step},0.5\n") for step in range(1, 30)))
    (*_, last) = trainer.follow(log, idle_seconds=120.0)
    assert trainer.time == 290 + 120
    assert last.end == "there was no new record for 2 minutes"
    assert last.trace.last_step == 29


def test_a_log_that_never_holds_a_record_ends_without_a_verdict(tmp_path: Path) -> None:
    events = list(Trainer().follow(tmp_path / "log.csv"))
    assert [event.verdict for event in events] == [None, None]
    assert "does not exist" in events[-1].note
    assert events[-1].end


def test_a_trace_of_ours_is_followed_too(tmp_path: Path) -> None:
    trace = record_trace(range(100))
    (tmp_path / "trace.jsonl").write_text(json.dumps(trace.header) + "\n")
    trainer = Trainer(*(append(tmp_path / "trace.jsonl", trace.line(step) + "\n") for step in range(100)))
    (*_, last) = trainer.follow(tmp_path)
    assert last.verdict == next(verdict for verdict in replay_rule(trace, RULE) if verdict.stop)
