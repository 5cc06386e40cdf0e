"""The votes of a survey in one SQLite file: what each rater was shown on which side, and the answers."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dvar.survey.survey import QUESTIONS, VOTES_FILE, Answer, Question, Survey, Task, stable_hash

IDLE_SECONDS = 1800.0  # after which a task that was shown and not answered is offered to others
LOCK_TIMEOUT = 30.0  # seconds to wait for another writer
# "autoincrement": an id is never used again, so that an old link or form cannot become another rater's.
TABLES = """
create table if not exists worker (
    id integer primary key autoincrement,
    name text not null,
    source text not null default 'web',
    joined real not null
);
create unique index if not exists worker_elsewhere on worker (source, name) where source <> 'web';
create table if not exists assignment (
    id integer primary key autoincrement,
    worker integer not null references worker on delete cascade,
    task text not null,
    question text not null,
    role text not null,
    left_side text not null check (left_side in ('first', 'second')),
    given real not null,
    misses integer not null default 0,
    answer text check (answer in ('first', 'second', 'equal')),
    answered real,
    unique (worker, task)
);
create index if not exists assignment_task on assignment (question, role, task, given, answered);
"""

LARGEST_NUMBER = 2**63 - 1  # of SQLite
RATER_LABEL = "trim(w.id || ' ' || w.name)"  # two raters may have the same name

Side = Literal["first", "second"]
VoteOutcome = Literal["counted", "again", "repeated", "refused"]


@dataclass(frozen=True)
class Assignment:
    """A task as one rater is shown it.

    Args:
        id: Number of the assignment.
        rater: Number of the rater.
        task: The task.
        left_side: Which image of the task is on the left.
        misses: Number of wrong answers to a training task so far.
    """

    id: int
    rater: int
    task: Task
    left_side: Side
    misses: int

    @property
    def image_ids(self) -> tuple[str, str]:
        """The ids of the left and of the right image."""
        ids = self.task.first, self.task.second
        return ids if self.left_side == "first" else (ids[1], ids[0])

    def answer_for(self, button: str) -> Answer | None:
        """Return the answer that "left", "right" or "equal" stands for here, None for any other button."""
        right_side: Side = "second" if self.left_side == "first" else "first"
        answers: dict[str, Answer] = {"left": self.left_side, "right": right_side, "equal": "equal"}
        return answers.get(button)


@dataclass(frozen=True)
class Vote:
    """One answer of a rater.

    Args:
        rater: Label of the rater: number and name.
        task: The task that was answered.
        left_side: Which image of the task was on the left.
        answer: The answer.
        seconds: Time from the last showing of the task to the answer.
        misses: Number of wrong answers to a training task before this one.
    """

    rater: str
    task: Task
    left_side: Side
    answer: Answer
    seconds: float
    misses: int = 0


class VoteStore:
    """The votes on a survey, in a file that one server writes and others may read at the same time.

    Each change is one transaction, on disk before it is acknowledged, so that a killed server loses no confirmed vote.
    A rater has one assignment for each task, so that no vote counts twice. Each thread keeps one connection.

    Args:
        path: The SQLite file; ":memory:" keeps the votes of one thread until it ends.
        survey: The survey that is voted on.
        clock: Returns the time in seconds.
        secret: Decides orders and sides together with the seed of the survey. Without it, whoever knows this code can
            work out which tasks are controls.
    """

    def __init__(
        self, path: Path | str, survey: Survey, clock: Callable[[], float] = time.time, secret: str = ""
    ) -> None:
        self.path, self.survey, self.clock, self.secret = path, survey, clock, secret
        self._local = threading.local()
        if isinstance(path, Path):
            path.touch(mode=0o600)
            path.chmod(0o600)  # a survey from before has it open to all; SQLite's files beside it follow it
        self._connection.executescript(TABLES)

    def add_rater(self, name: str = "") -> int:
        """Return the number of a new rater; names need not be unique."""
        with self._transaction() as db:
            cursor = db.execute("insert into worker (name, joined) values (?, ?)", (name, self.clock()))
        return int(cursor.lastrowid or 0)

    def rater_name(self, rater: int) -> str | None:
        """Return the name of a rater, None when there is no such rater."""
        if not 0 < rater <= LARGEST_NUMBER:
            return None
        row = self._connection.execute("select name from worker where id = ?", (rater,)).fetchone()
        return row[0] if row else None

    def raters_from(self, source: str) -> dict[str, str]:
        """Return the raters of a source: the label among the votes by the name in the source."""
        query = f"select name, {RATER_LABEL} as label from worker w where source = ?"
        return {row["name"]: row["label"] for row in self._connection.execute(query, (source,))}

    def current_assignment(self, rater: int) -> Assignment | None:
        """Return what a rater is to answer now, None when all is done.

        The assignment stays the same until it is answered. For each question, training comes first, then pairs with
        controls among them; pairs with the fewest answers come first.
        """
        with self._transaction() as db:
            unanswered = "select * from assignment where worker = ? and answer is null order by id limit 1"
            row = db.execute(unanswered, (rater,)).fetchone()
            if row:
                db.execute("update assignment set given = ? where id = ?", (self.clock(), row["id"]))
                return self._read_assignment(row)
            task = self._next_task(db, rater)
            if task is None:
                return None
            return self._read_assignment(_insert_assignment(db, rater, task, self._left_side(db, task), self.clock()))

    def record_vote(self, rater: int, assignment: int, button: str) -> tuple[VoteOutcome, Task | None]:
        """Record an answer.

        Args:
            rater: Number of the rater.
            assignment: Number of the assignment.
            button: "left", "right" or "equal".

        Returns:
            What became of the answer, and the task if it is this rater's. "counted": the vote is recorded. "again":
            the answer to a training task is wrong, and the task is asked again. "repeated": the same answer is
            recorded already. "refused": the task is not theirs, or has another answer.
        """
        with self._transaction() as db:
            query = "select * from assignment where id = ? and worker = ?"
            row = db.execute(query, (assignment, rater)).fetchone()
            stored_assignment = self._read_assignment(row) if row else None
            answer = stored_assignment.answer_for(button) if stored_assignment else None
            if stored_assignment is None or answer is None:
                return "refused", stored_assignment.task if stored_assignment else None
            if row["answer"]:
                return "repeated" if row["answer"] == answer else "refused", stored_assignment.task
            if stored_assignment.task.role == "training" and answer != stored_assignment.task.expected:
                db.execute("update assignment set misses = misses + 1 where id = ?", (assignment,))
                return "again", stored_assignment.task
            _write_answer(db, assignment, answer, self.clock())
        return "counted", stored_assignment.task

    def import_vote(self, name: str, source: str, task: Task, side: Side, answer: Answer) -> bool:
        """Record an answer that was given elsewhere, and return whether it is new.

        Raises:
            ValueError: The same rater gave another answer to this task before.
        """
        with self._transaction() as db:
            now = self.clock()
            rater = _find_or_insert_rater(db, name, source, now)
            query = "select answer from assignment where worker = ? and task = ?"
            row = db.execute(query, (rater, task.id)).fetchone()
            if row is None:
                _write_answer(db, _insert_assignment(db, rater, task, side, now)["id"], answer, now)
            elif row["answer"] != answer:
                raise ValueError(f"{name} answered {row['answer']} before")
        return row is None

    def delete_rater(self, rater: int) -> int | None:
        """Delete a rater and their answers, also from the disk; the number is never used again.

        Returns:
            The number of answers deleted, None when there is no such rater.
        """
        with self._transaction() as db:
            count = db.execute("select count(answer) from assignment where worker = ?", (rater,)).fetchone()[0]
            if not db.execute("delete from worker where id = ?", (rater,)).rowcount:
                return None
        self._connection.execute("pragma wal_checkpoint(truncate)")  # the log still holds what was deleted
        return int(count)

    def progress(self, rater: int) -> tuple[int, int]:
        """Return how many tasks a rater has answered, and the maximum number that they will meet."""
        query = "select count(*) from assignment where worker = ? and answer is not null"
        done = self._connection.execute(query, (rater,)).fetchone()[0]
        return int(done), sum(self.survey.max_tasks(question) for question in QUESTIONS)

    def load_votes(self) -> tuple[Vote, ...]:
        """Return every vote on a task of the survey, in the order of voting."""
        rows = self._connection.execute(
            f"select {RATER_LABEL} as label, a.* from assignment a join worker w on w.id = a.worker "
            "where answer is not null order by answered, a.id"
        ).fetchall()
        tasks = self.survey.task_by_id
        return tuple(
            Vote(
                rater=row["label"],
                task=tasks[row["task"]],
                left_side=row["left_side"],
                answer=row["answer"],
                seconds=row["answered"] - row["given"],
                misses=row["misses"],
            )
            for row in rows
            if row["task"] in tasks
        )

    def _next_task(self, db: sqlite3.Connection, rater: int) -> Task | None:
        seen = {row["task"] for row in db.execute("select task from assignment where worker = ?", (rater,))}
        for question in sorted(QUESTIONS, key=lambda q: (QUESTIONS.index(q) + rater) % len(QUESTIONS)):
            pairs_seen = sum(task.id in seen for task in self.survey.select(question, "pair"))
            pair = self._least_answered_pair(db, rater, question, seen, pairs_seen)
            training = [task for task in self.survey.select(question, "training") if task.id not in seen]
            if pair and training:
                return training[0]
            if control := self._due_control(rater, question, seen, pairs_seen, last=pair is None):
                return control
            if pair:
                return pair
        return None

    def _due_control(self, rater: int, question: Question, seen: set[str], pairs_seen: int, last: bool) -> Task | None:
        """Return the next control if one is due.

        Each stretch of ``control_every`` tasks has one control, at a place that depends on the rater; when no pair is
        left and there was no control, one comes at the end.
        """
        controls = self.survey.select(question, "control")
        unseen = [task for task in controls if task.id not in seen]
        controls_seen = len(controls) - len(unseen)
        stretch, place = divmod(pairs_seen + controls_seen, self.survey.control_every)
        due = (
            controls_seen < self.survey.control_count(question)
            and controls_seen <= stretch
            and place >= self._hash("control", rater, question, stretch) % self.survey.control_every
        )
        possible = bool(unseen) and (not last or pairs_seen > 0)
        return unseen[0] if possible and (due or (last and not controls_seen)) else None

    def _least_answered_pair(
        self, db: sqlite3.Connection, rater: int, question: Question, seen: set[str], pairs_seen: int
    ) -> Task | None:
        """Return the pair with the fewest answers that this rater has not met, None when there is none for them."""
        if pairs_seen >= self.survey.per_person:
            return None
        rows = db.execute(
            "select task, count(*) from assignment where question = ? and role = 'pair' "
            "and (answered is not null or given > ?) group by task",
            (question, self.clock() - IDLE_SECONDS),
        )
        counts = {task: int(count) for task, count in rows}
        pairs = [
            task
            for task in self.survey.select(question, "pair")
            if task.id not in seen and counts.get(task.id, 0) < self.survey.overlap
        ]
        order = self._hash("order", rater)  # a different order for each rater
        return min(pairs, key=lambda task: (counts.get(task.id, 0), int(task.id, 16) ^ order), default=None)

    def _left_side(self, db: sqlite3.Connection, task: Task) -> Side:
        """Return the side that was on the left less often; the hash of the task decides a tie."""
        query = "select left_side, count(*) from assignment where question = ? and role = ? and task = ? group by 1"
        counts = dict[str, int](db.execute(query, (task.question, task.role, task.id)).fetchall())
        sides: tuple[Side, Side] = ("first", "second")
        preferred = sides[self._hash("side", task.id) % 2]
        return min(sides, key=lambda side: (counts.get(side, 0), side != preferred))

    def _hash(self, *parts: object) -> int:
        return stable_hash(self.survey.seed, self.secret, *parts)

    def _read_assignment(self, row: sqlite3.Row) -> Assignment:
        task = self.survey.task_by_id[row["task"]]
        return Assignment(row["id"], row["worker"], task, row["left_side"], row["misses"])

    @property
    def _connection(self) -> sqlite3.Connection:
        """The connection of this thread."""
        db: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if db is None:
            db = self._local.connection = sqlite3.connect(self.path, timeout=LOCK_TIMEOUT, isolation_level=None)
            db.row_factory = sqlite3.Row
            for setting in ("journal_mode = wal", "synchronous = full", "foreign_keys = on", "secure_delete = on"):
                db.execute(f"pragma {setting}")
        return db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the write lock from the first read on; commit to disk at the end, roll back on an error."""
        db = self._connection
        db.execute("begin immediate")
        try:
            yield db
        except BaseException:
            db.execute("rollback")
            raise
        db.execute("commit")


def open_votes(folder: Path, survey: Survey) -> VoteStore:
    """Return the votes on a survey, to be read: where nobody has voted, no file is created."""
    path = folder / VOTES_FILE
    return VoteStore(path if path.exists() else ":memory:", survey)


def _find_or_insert_rater(db: sqlite3.Connection, name: str, source: str, now: float) -> int:
    row = db.execute("select id from worker where source = ? and name = ?", (source, name)).fetchone()
    if row:
        return int(row["id"])
    cursor = db.execute("insert into worker (name, source, joined) values (?, ?, ?)", (name, source, now))
    return int(cursor.lastrowid or 0)


def _insert_assignment(db: sqlite3.Connection, rater: int, task: Task, side: Side, now: float) -> sqlite3.Row:
    cursor = db.execute(
        "insert into assignment (worker, task, question, role, left_side, given) values (?, ?, ?, ?, ?, ?) returning *",
        (rater, task.id, task.question, task.role, side, now),
    )
    row: sqlite3.Row = cursor.fetchone()
    return row


def _write_answer(db: sqlite3.Connection, assignment: int, answer: Answer, now: float) -> None:
    db.execute("update assignment set answer = ?, answered = ? where id = ?", (answer, now, assignment))
