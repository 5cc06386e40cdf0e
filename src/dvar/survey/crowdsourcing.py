"""A survey's tasks as a table for platforms that find people to answer, and their answers back as votes.

A row's ``ticket`` stands for a task and a side and follows from the secret: a table can be answered anywhere, no answer
can be made up for a task that was not asked, and neither a ticket nor its place in the table tells what is a control.
Each task is two rows, its sides swapped.
"""

from __future__ import annotations

import csv
import hmac
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from dvar.errors import RefusedInput
from dvar.survey.questions import THE_OBJECT, WORDING
from dvar.survey.survey import QUESTIONS, VOTES, Answer, Question, Survey, Task
from dvar.survey.vote_store import Assignment, Side, VoteStore

SIDES: tuple[Side, Side] = ("first", "second")
# What platforms call the three columns, once prefixes such as "Input." and "OUTPUT:" and underscores are off.
COLUMNS = {"ticket": ("ticket",), "worker": ("worker", "workerid"), "answer": ("answer",)}
TOLD = 10  # problems of a table that are told at once


@dataclass(frozen=True)
class ImportedAnswer:
    """One row of a table of answers, understood."""

    worker: str
    task: Task
    side: Side
    answer: Answer


def write_tasks(folder: Path, path: Path, question: Question, secret: str, pictures: str) -> int:
    """Return the number of rows written: every task of a question twice, with ``pictures`` before each picture's name.

    ``people`` is how many are wanted for a row; ``role`` and ``expected`` are for whoever sets up the platform's own
    controls, not for those who answer.

    Raises: RefusedInput when the survey has no such question, or the file is there already.
    """
    survey = Survey.open(folder)
    tasks = [task for role in ("training", "control", "pair") for task in survey.of(question, role)]
    if not tasks:
        raise RefusedInput([f"{folder} has no task of {question}: it has {', '.join(_asked(survey))}"])
    if path.exists():
        raise RefusedInput([f"{path} is there already: name another --output, or remove it"])
    shown = max(len(task.references) for task in tasks)
    rows = sorted(
        (
            _row(survey, task, number, secret, pictures.rstrip("/"), shown)
            for task in tasks
            for number in range(1 if task.first == task.second else len(SIDES))
        ),
        key=lambda row: row["ticket"],
    )
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows({name: _harmless(value) for name, value in row.items()} for row in rows)
    return len(rows)


def read_answers(folder: Path, path: Path, secret: str) -> tuple[int, int]:
    """Enter a table of answers into the survey's votes; return how many were new and how many stood already.

    The columns ticket, worker and answer are found under the names that platforms give them. Answers are left, right
    and equal. The same table may be read again.

    Raises: RefusedInput, before anything is entered, naming the rows that are wrong.
    """
    survey = Survey.open(folder)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            rows = list(csv.DictReader(file, delimiter="\t" if "\t" in head else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RefusedInput([f"answers are a table, {path} cannot be read ({error}): check its name"]) from error
    columns = _columns(path, list(rows[0]) if rows else [])
    asked = {_ticket(secret, task, side): (task, side) for task in survey.tasks for side in SIDES}
    problems, given = [], list[ImportedAnswer]()
    for number, row in enumerate(rows, start=2):
        try:
            given.append(_understood(asked, {name: (row[columns[name]] or "").strip() for name in COLUMNS}))
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
    ballots = VoteStore(folder / VOTES, survey)
    source = "table"
    problems += _contradictions(path, given, ballots, source)
    if problems:
        more = [f"and {len(problems) - TOLD} more"] if len(problems) > TOLD else []
        raise RefusedInput([*problems[:TOLD], *more])
    new = sum(ballots.enter(one.worker, source, one.task, one.side, one.answer) for one in given)
    return new, len(given) - new


def _row(survey: Survey, task: Task, number: int, secret: str, pictures: str, shown: int) -> dict[str, str]:
    side = SIDES[number]
    at = Assignment(0, 0, task, side, 0)
    half = survey.overlap // 2
    words = WORDING[task.question]
    references = {
        f"reference_{place + 1}": f"{pictures}/{name}.png" if name else ""
        for place, name in enumerate([*task.references, *[""] * (shown - len(task.references))])
    }
    pressed = {at.answer(word): word for word in ("left", "right", "equal")}
    return {
        "ticket": _ticket(secret, task, side),
        "question": words.asks,
        "description": task.prompt.replace("{}", THE_OBJECT) if task.question == "customization" else "",
        **references,
        "left": f"{pictures}/{at.pictures[0]}.png",
        "right": f"{pictures}/{at.pictures[1]}.png",
        "people": str(half if number else survey.overlap - half),
        "role": task.role,
        "expected": pressed[task.expected] if task.expected else "",
    }


def _understood(asked: Mapping[str, tuple[Task, Side]], row: Mapping[str, str]) -> ImportedAnswer:
    """Raises: ValueError that says what is wrong with the row."""
    if row["ticket"] not in asked:
        raise ValueError(f"its ticket {row['ticket'][:20]!r} is not one of this survey's")
    task, side = asked[row["ticket"]]
    answer = Assignment(0, 0, task, side, 0).answer(row["answer"].lower())
    if answer is None:
        raise ValueError(f"an answer is left, right or equal, got {row['answer']!r}")
    if not row["worker"]:
        raise ValueError("its worker is missing")
    return ImportedAnswer(row["worker"], task, side, answer)


def _contradictions(path: Path, given: list[ImportedAnswer], ballots: VoteStore, source: str) -> Iterator[str]:
    """Two answers of one person to one task, in the table or already counted, that are not the same."""
    stands = {(vote.worker, vote.task.id): vote.answer for vote in ballots.votes()}
    said = dict[tuple[str, str], Answer]()
    names = ballots.known(source)
    for one in given:
        before = said.setdefault((one.worker, one.task.id), one.answer)
        before = stands.get((names.get(one.worker, ""), one.task.id), before)
        if before != one.answer:
            yield f"{path}: {one.worker} answers a task twice, {before} and {one.answer}: keep one of them"


def _columns(path: Path, names: list[str]) -> dict[str, str]:
    plain = {re.split(r"[.:]", name)[-1].strip().lower().replace("_", ""): name for name in reversed(names)}
    found = {want: next((plain[name] for name in known if name in plain), "") for want, known in COLUMNS.items()}
    missing = [name for name, column in found.items() if not column]
    if missing:
        raise RefusedInput([f"a table of answers has the columns {', '.join(COLUMNS)}; {path} lacks {missing[0]}"])
    return found


def _asked(survey: Survey) -> list[str]:
    return [question for question in QUESTIONS if survey.of(question, "pair")]


def _harmless(value: str) -> str:
    """The text so that no spreadsheet takes it for a formula."""
    return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _ticket(secret: str, task: Task, side: Side) -> str:
    return hmac.new(secret.encode(), f"row {task.id} {side}".encode(), sha256).hexdigest()[:32]
