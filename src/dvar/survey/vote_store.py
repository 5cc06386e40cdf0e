"""The votes of a survey in one SQLite file: who was shown what on which side, and what they answered.

Every change is one transaction that is on the disk before it is acknowledged, so that a killed server loses no vote it
has confirmed; a task has one place for each person, so that no vote counts twice.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dvar.survey.survey import QUESTIONS, Answer, Question, Survey, Task, key

IDLE = 1800.0  # seconds after which a task that was shown and not answered is offered to others
BUSY = 30.0  # seconds to wait for another writer
# No number is given twice: an old link or an old form must not become another person's.
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

PERSON = "trim(w.id || ' ' || w.name)"  # what tells people apart among the votes: a name alone may not be one's own

Side = Literal["first", "second"]
Outcome = Literal["counted", "again", "repeated", "refused"]


@dataclass(frozen=True)
class Assignment:
    """A task as one person is shown it: ``left_side`` is the picture on the left, ``misses`` wrong training answers."""

    id: int
    worker: int
    task: Task
    left_side: Side
    misses: int

    @property
    def pictures(self) -> tuple[str, str]:
        """The ids of the left and of the right picture."""
        both = self.task.first, self.task.second
        return both if self.left_side == "first" else (both[1], both[0])

    def answer(self, pressed: str) -> Answer | None:
        """What "left", "right" or "equal" means here; None for any other word."""
        other: Side = "second" if self.left_side == "first" else "first"
        said: dict[str, Answer] = {"left": self.left_side, "right": other, "equal": "equal"}
        return said.get(pressed)


@dataclass(frozen=True)
class Vote:
    """One answer; ``seconds`` from the showing to the answer."""

    worker: str
    task: Task
    left_side: Side
    answer: Answer
    seconds: float
    misses: int = 0


class VoteStore:
    """The votes on a survey, in a file that one server writes and anyone may read at the same time.

    Each thread keeps one connection. The path ":memory:" keeps the votes of one thread until it ends. Orders and sides
    are drawn from the survey's seed and a ``secret``: without one, who knows this code can tell where controls come.
    """

    def __init__(
        self, path: Path | str, survey: Survey, clock: Callable[[], float] = time.time, secret: str = ""
    ) -> None:
        self.path, self.survey, self.clock, self.secret = path, survey, clock, secret
        self.connections = threading.local()
        self._db.executescript(TABLES)

    def join(self, name: str = "") -> int:
        """Return the number of a new person; two people may have one name, or none."""
        with self._change() as db:
            made = db.execute("insert into worker (name, joined) values (?, ?)", (name, self.clock()))
        return int(made.lastrowid or 0)

    def name(self, worker: int) -> str | None:
        """The name of a person; None when there is no such person."""
        row = self._db.execute("select name from worker where id = ?", (worker,)).fetchone()
        return row[0] if row else None

    def current(self, worker: int) -> Assignment | None:
        """Return what a person is to answer now; None when all is done.

        The same until it is answered. Then, for each question: the training round, and pairs with controls among them,
        the pairs with the fewest answers first.
        """
        with self._change() as db:
            open_one = db.execute(
                "select * from assignment where worker = ? and answer is null order by id limit 1", (worker,)
            ).fetchone()
            if open_one:
                db.execute("update assignment set given = ? where id = ?", (self.clock(), open_one["id"]))
                return self._assignment(open_one)
            task = self._next(db, worker)
            if task is None:
                return None
            place = task.question, task.role, task.id
            of = "select left_side, count(*) from assignment where question = ? and role = ? and task = ? group by 1"
            shown = {"first": 0, "second": 0, **dict(db.execute(of, place).fetchall())}
            drawn = ("first", "second")[self._drawn("side", task.id) % 2]
            side = min(shown, key=lambda side: (shown[side], side != drawn))
            return self._assignment(_assign(db, worker, task, side, self.clock()))

    def vote(self, worker: int, assignment: int, pressed: str) -> tuple[Outcome, Task | None]:
        """Record an answer: "left", "right" or "equal".

        Returns the task, if it is this person's, and "counted"; "again" when a training task was answered wrongly and
        is asked again; "repeated" when the very answer stands already; "refused" when it is not theirs to give or
        contradicts what stands.
        """
        with self._change() as db:
            row = db.execute("select * from assignment where id = ? and worker = ?", (assignment, worker)).fetchone()
            shown = self._assignment(row) if row else None
            answer = shown.answer(pressed) if shown else None
            if shown is None or answer is None:
                return "refused", shown.task if shown else None
            if row["answer"]:
                return "repeated" if row["answer"] == answer else "refused", shown.task
            if shown.task.role == "training" and answer != shown.task.expected:
                db.execute("update assignment set misses = misses + 1 where id = ?", (assignment,))
                return "again", shown.task
            _answered(db, assignment, answer, self.clock())
        return "counted", shown.task

    def enter(self, name: str, source: str, task: Task, side: Side, answer: Answer) -> bool:
        """Record an answer that was given elsewhere; return whether it is new.

        Raises: ValueError when the same person gave another answer to this task before.
        """
        with self._change() as db:
            now = self.clock()
            person = "select id from worker where source = ? and name = ?"
            known = db.execute(person, (source, name)).fetchone()
            if not known:
                db.execute("insert into worker (name, source, joined) values (?, ?, ?)", (name, source, now))
                known = db.execute(person, (source, name)).fetchone()
            stands = db.execute(
                "select answer from assignment where worker = ? and task = ?", (known[0], task.id)
            ).fetchone()
            if stands:
                if stands[0] != answer:
                    raise ValueError(f"{name} answered {stands[0]} before")
                return False
            row = _assign(db, known[0], task, side, now)
            _answered(db, row["id"], answer, now)
        return True

    def forget(self, worker: int) -> int | None:
        """Delete a person with all they answered, also from the disk; return how many answers, None for no such person.

        Their number is never given to another.
        """
        with self._change() as db:
            gone = db.execute("select count(answer) from assignment where worker = ?", (worker,)).fetchone()[0]
            if not db.execute("delete from worker where id = ?", (worker,)).rowcount:
                return None
        self._db.execute("pragma wal_checkpoint(truncate)")  # the log still has what was deleted
        return int(gone)

    def known(self, source: str) -> dict[str, str]:
        """The people of a source: their name there to their name among the votes."""
        rows = self._db.execute(f"select name, {PERSON} as person from worker w where source = ?", (source,)).fetchall()
        return {row["name"]: row["person"] for row in rows}

    def progress(self, worker: int) -> tuple[int, int]:
        """How many tasks a person has answered, and how many they will meet at most."""
        done = self._db.execute(
            "select count(*) from assignment where worker = ? and answer is not null", (worker,)
        ).fetchone()[0]
        return int(done), sum(self.survey.longest(question) for question in QUESTIONS)

    def votes(self) -> tuple[Vote, ...]:
        """Every vote on a task of the survey, in the order of casting."""
        rows = self._db.execute(
            f"select {PERSON} as person, a.* from assignment a join worker w on w.id = a.worker "
            "where answer is not null order by answered, a.id"
        ).fetchall()
        tasks = self.survey.by_id
        return tuple(
            Vote(
                worker=row["person"],
                task=tasks[row["task"]],
                left_side=row["left_side"],
                answer=row["answer"],
                seconds=row["answered"] - row["given"],
                misses=row["misses"],
            )
            for row in rows
            if row["task"] in tasks
        )

    def _next(self, db: sqlite3.Connection, worker: int) -> Task | None:
        met = {row["task"] for row in db.execute("select task from assignment where worker = ?", (worker,))}
        for question in sorted(QUESTIONS, key=lambda q: (QUESTIONS.index(q) + worker) % len(QUESTIONS)):
            had, every = sum(task.id in met for task in self.survey.of(question, "pair")), self.survey.control_every
            pair = self._fairest(db, worker, question, met, had)
            training = [task for task in self.survey.of(question, "training") if task.id not in met]
            if pair and training:
                return training[0]
            controls = self.survey.of(question, "control")
            left = [task for task in controls if task.id not in met]
            met_controls = len(controls) - len(left)
            stretch, place = divmod(had + met_controls, every)
            # One control in each stretch of tasks, where its own draw puts it; one at the end if there was none.
            due = (
                met_controls < self.survey.controls(question)
                and met_controls <= stretch
                and place >= self._drawn("control", worker, question, stretch) % every
            )
            if left and (pair or had) and (due or not (pair or met_controls)):
                return left[0]
            if pair:
                return pair
        return None

    def _fairest(self, db: sqlite3.Connection, worker: int, question: Question, met: set[str], had: int) -> Task | None:
        """The pair that has been answered least and that this person has not met; None when there is none for them."""
        if had >= self.survey.per_person:
            return None
        counted = db.execute(
            "select task, count(*) from assignment where question = ? and role = 'pair' "
            "and (answered is not null or given > ?) group by task",
            (question, self.clock() - IDLE),
        )
        asked = {task: int(number) for task, number in counted}
        open_ones = [
            task
            for task in self.survey.of(question, "pair")
            if task.id not in met and asked.get(task.id, 0) < self.survey.overlap
        ]
        own = self._drawn("order", worker)  # another order for each person
        return min(open_ones, key=lambda task: (asked.get(task.id, 0), int(task.id, 16) ^ own), default=None)

    def _drawn(self, *parts: object) -> int:
        return key(self.survey.seed, self.secret, *parts)

    def _assignment(self, row: sqlite3.Row) -> Assignment:
        return Assignment(row["id"], row["worker"], self.survey.by_id[row["task"]], row["left_side"], row["misses"])

    @property
    def _db(self) -> sqlite3.Connection:
        """This thread's connection; a vote is on the disk once its transaction is committed."""
        db: sqlite3.Connection | None = getattr(self.connections, "db", None)
        if db is None:
            db = self.connections.db = sqlite3.connect(self.path, timeout=BUSY, isolation_level=None)
            db.row_factory = sqlite3.Row
            for setting in ("journal_mode = wal", "synchronous = full", "foreign_keys = on", "secure_delete = on"):
                db.execute(f"pragma {setting}")
        return db

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction, alone from its first read on; on the disk when the scope is left."""
        db = self._db
        db.execute("begin immediate")
        try:
            yield db
        except BaseException:
            db.execute("rollback")
            raise
        db.execute("commit")


def _answered(db: sqlite3.Connection, assignment: int, answer: Answer, now: float) -> None:
    db.execute("update assignment set answer = ?, answered = ? where id = ?", (answer, now, assignment))


def _assign(db: sqlite3.Connection, worker: int, task: Task, side: str, now: float) -> sqlite3.Row:
    made = db.execute(
        "insert into assignment (worker, task, question, role, left_side, given) values (?, ?, ?, ?, ?, ?) returning *",
        (worker, task.id, task.question, task.role, side, now),
    )
    row: sqlite3.Row = made.fetchone()
    return row
