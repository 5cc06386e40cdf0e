"""A survey's tasks as a table for crowdsourcing platforms, and their answers as votes."""

from __future__ import annotations

import csv
import hmac
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from dvar.errors import RefusedInput
from dvar.files import read_text, staged_file, writing_problem
from dvar.survey.questions import QUESTION_TEXTS, THE_OBJECT
from dvar.survey.secret import read_or_create_secret, read_secret
from dvar.survey.survey import QUESTIONS, VOTES_FILE, Answer, Question, Role, Survey, Task
from dvar.survey.vote_store import Assignment, Side, VoteStore, open_votes

ROLES: tuple[Role, ...] = ("training", "control", "pair")
SIDES: tuple[Side, ...] = ("first", "second")
BUTTONS = ("left", "right", "equal")
SOURCE = "table"  # of the raters in the vote store
# Column names of the platforms, without prefixes such as "Input." and "OUTPUT:" and without underscores.
COLUMN_NAMES = {"ticket": ("ticket",), "worker": ("worker", "workerid"), "answer": ("answer",)}
PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class ImportedAnswer:
    """One row of a table of answers."""

    rater: str
    task: Task
    side: Side
    answer: Answer


def write_tasks(folder: Path, path: Path, question: Question, image_url: str, secret_file: str | None = None) -> int:
    """Write every task of a question as two rows of a CSV table, one for each side.

    A row's ticket is signed and stands for a task and a side. Rows are sorted by ticket, so neither the ticket nor the
    place of a row reveals which tasks are controls. The columns "role" and "expected" are for the platform's own
    quality checks and must not be shown to raters; "people" is the number of raters wanted for the row.

    Args:
        folder: Folder of the survey.
        path: New file.
        question: The question whose tasks are written.
        image_url: Address of the survey's image folder.
        secret_file: File of the secret that signs the tickets; by default the survey's own, created where there is
            none.

    Returns:
        The number of rows.

    Raises:
        RefusedInput: The survey has no such question, the file exists, or the secret cannot be read; nothing is
            written.
    """
    survey = Survey.load(folder)
    tasks = [task for role in ROLES for task in survey.select(question, role)]
    if not tasks:
        raise RefusedInput([f"{folder} has no task of {question}: it has {', '.join(_questions_of(survey))}"])
    if path.exists():
        raise RefusedInput([f"{path} exists already: name another --output, or remove it"])
    if problem := writing_problem(path):
        raise RefusedInput([f"output must be a file that can be written, and {problem}: choose another"])
    reference_count = max(len(task.references) for task in tasks)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The secret comes once there is a file for what it signs: /proc is a folder that nothing can be written to.
    with staged_file(path) as staged, staged.open("w", encoding="utf-8", newline="") as file:
        secret = read_or_create_secret(folder, secret_file)
        rows = [
            _task_row(survey, task, side, secret, image_url.rstrip("/"), reference_count)
            for task in tasks
            for side in (SIDES[:1] if task.first == task.second else SIDES)
        ]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in sorted(rows, key=lambda row: row["ticket"]):
            writer.writerow({name: _escape_formula(value) for name, value in row.items()})
    return len(rows)


def import_answers(folder: Path, path: Path, secret_file: str | None = None) -> tuple[int, int]:
    """Add the answers in a table to the survey's votes; the same table may be imported again.

    Args:
        folder: Folder of the survey.
        path: Table, separated by commas or tabs, with the columns ticket, worker and answer, also under the names
            that platforms give them. An answer is left, right or equal.
        secret_file: File of the secret that signed the tickets; by default the survey's own.

    Returns:
        The number of new answers, and of answers that were there already.

    Raises:
        RefusedInput: The secret cannot be read, or some rows are wrong; they are named, and nothing is imported.
    """
    survey = Survey.load(folder)
    secret = read_secret(folder, secret_file)
    rows = _read_table(path)
    columns = _find_columns(path, list(rows[0]) if rows else [])
    tickets = {_sign_row(secret, task, side): (task, side) for task in survey.tasks for side in SIDES}
    problems, answers = [], list[ImportedAnswer]()
    for number, row in enumerate(rows, start=2):
        try:
            answers.append(_parse_answer(tickets, {name: (row[columns[name]] or "").strip() for name in COLUMN_NAMES}))
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
    problems += _find_contradictions(path, answers, open_votes(folder, survey))
    if problems:
        more = [f"and {len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else []
        raise RefusedInput([*problems[:PROBLEMS_SHOWN], *more])
    store = VoteStore(folder / VOTES_FILE, survey)
    new = sum(store.import_vote(item.rater, SOURCE, item.task, item.side, item.answer) for item in answers)
    return new, len(answers) - new


def _task_row(
    survey: Survey, task: Task, side: Side, secret: str, image_url: str, reference_count: int
) -> dict[str, str]:
    assignment = Assignment(0, 0, task, side, 0)
    left, right = assignment.image_ids
    text = QUESTION_TEXTS[task.question]
    half = survey.overlap // 2
    references = [*task.references, *[""] * (reference_count - len(task.references))]
    buttons = {assignment.answer_for(button): button for button in BUTTONS}
    return {
        "ticket": _sign_row(secret, task, side),
        "question": text.sentence,
        "description": task.prompt.replace("{}", THE_OBJECT) if task.question == "customization" else "",
        **{f"reference_{n}": f"{image_url}/{name}.png" if name else "" for n, name in enumerate(references, start=1)},
        "left": f"{image_url}/{left}.png",
        "right": f"{image_url}/{right}.png",
        "people": str(survey.overlap - half if side == SIDES[0] else half),
        "role": task.role,
        "expected": buttons[task.expected] if task.expected else "",
    }


def _read_table(path: Path) -> list[dict[str, str]]:
    try:
        text = read_text(path, "utf-8-sig")
        head = text.partition("\n")[0]
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in head else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RefusedInput([f"answers must be a table, {path} cannot be read ({error}): check its name"]) from error


def _find_columns(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the table's own name of each of our columns."""
    plain = {re.split(r"[.:]", name)[-1].strip().lower().replace("_", ""): name for name in reversed(names)}
    columns = {
        column: next((plain[name] for name in spellings if name in plain), "")
        for column, spellings in COLUMN_NAMES.items()
    }
    missing = [column for column, name in columns.items() if not name]
    if missing:
        problem = f"a table of answers has the columns {', '.join(COLUMN_NAMES)}; {path} has no {missing[0]}"
        raise RefusedInput([f"{problem}: add it"])
    return columns


def _parse_answer(tickets: Mapping[str, tuple[Task, Side]], row: Mapping[str, str]) -> ImportedAnswer:
    """Return the answer in a row; raise ValueError when it is none."""
    if row["ticket"] not in tickets:
        raise ValueError(f"the ticket {row['ticket'][:20]!r} is not of this survey")
    task, side = tickets[row["ticket"]]
    answer = Assignment(0, 0, task, side, 0).answer_for(row["answer"].lower())
    if answer is None:
        raise ValueError(f"an answer is left, right or equal, got {row['answer']!r}")
    if not row["worker"]:
        raise ValueError("the worker is missing")
    return ImportedAnswer(row["worker"], task, side, answer)


def _find_contradictions(path: Path, answers: Sequence[ImportedAnswer], store: VoteStore) -> Iterator[str]:
    """Yield a problem for each answer that differs from another of the same rater to the same task."""
    stored = {(vote.rater, vote.task.id): vote.answer for vote in store.load_votes()}
    labels = store.raters_from(SOURCE)
    first_answers = dict[tuple[str, str], Answer]()
    for item in answers:
        first = first_answers.setdefault((item.rater, item.task.id), item.answer)
        first = stored.get((labels.get(item.rater, ""), item.task.id), first)
        if first != item.answer:
            yield f"{path}: {item.rater} answers a task twice, {first} and {item.answer}: keep one of them"


def _questions_of(survey: Survey) -> list[str]:
    return [question for question in QUESTIONS if survey.select(question, "pair")]


def _escape_formula(value: str) -> str:
    """Return the text such that no spreadsheet takes it for a formula."""
    return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _sign_row(secret: str, task: Task, side: Side) -> str:
    return hmac.new(secret.encode(), f"row {task.id} {side}".encode(), sha256).hexdigest()[:32]
