"""What a survey asks: its tasks and pictures, as one frozen value and as a folder that says nothing of who drew what.

A survey's folder holds ``survey.json``, ``pictures/<id>.png`` and, once it is served, ``votes.sqlite`` and ``secret``.
Only ``survey.json`` knows which picture is whose; the pages know ids alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from dvar.errors import RefusedInput

Question = Literal["reconstruction", "customization"]
Role = Literal["pair", "control", "training"]
Answer = Literal["first", "second", "equal"]
QUESTIONS: tuple[Question, ...] = ("reconstruction", "customization")
ANSWERS: tuple[Answer, ...] = ("first", "second", "equal")
FORMAT = 1
PLAN, PICTURES, VOTES, SECRET = "survey.json", "pictures", "votes.sqlite", "secret"


@dataclass(frozen=True)
class Task:
    """One question about two pictures; ``id`` is 16 hexadecimal digits that tell nothing.

    ``first`` and ``second`` are ids of pictures, as are ``references``: in a pair the candidate's and the baseline's.
    ``prompt`` has {} where the subject stands.  ``expected`` is the right answer of a control or a training task, and
    ``lesson`` what a training task teaches.
    """

    id: str
    question: Question
    role: Role
    method: str
    concept: str
    prompt: str
    seed: int
    references: tuple[str, ...]
    first: str
    second: str
    expected: Answer | None = None
    lesson: str = ""


@dataclass(frozen=True)
class Survey:
    """The plan of a survey: who is compared, how often, and every task.

    ``overlap`` votes are asked of different people for each pair; one person is asked at most ``per_person`` pairs of
    each question, with a control among every ``control_every`` tasks.  ``seed`` draws orders and sides.
    """

    candidate: str
    baseline: str
    overlap: int
    per_person: int
    control_every: int
    seed: int
    tasks: tuple[Task, ...]
    runs: tuple[Mapping[str, str], ...] = ()

    @classmethod
    def open(cls, folder: str | Path) -> Survey:
        """Return the survey in a folder.

        Raises: RefusedInput when there is none, it is damaged, or it lacks pictures.
        """
        path = Path(folder) / PLAN
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            if read.pop("format") != FORMAT:
                raise RefusedInput([f"{path} was written by another version of dvar: build the survey anew"])
            tasks = tuple(Task(**{**task, "references": tuple(task["references"])}) for task in read.pop("tasks"))
            survey = cls(**{**read, "tasks": tasks, "runs": tuple(read["runs"])})
        except OSError as error:
            said = f"a survey's folder holds {PLAN}, {folder} does not: name the folder that dvar survey build wrote"
            raise RefusedInput([said]) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, RefusedInput):
                raise
            raise RefusedInput([f"{path} is damaged ({error}): restore it or build the survey anew"]) from error
        missing = [name for name in survey.pictures if not (Path(folder) / PICTURES / f"{name}.png").is_file()]
        if missing:
            said = f"{folder} lacks {len(missing)} of its pictures, the first is {missing[0]}.png: restore them"
            raise RefusedInput([said])
        return survey

    def write(self, folder: Path) -> None:
        """Write ``survey.json`` into a folder."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
        (folder / PLAN).write_text(text + "\n", encoding="utf-8")

    @cached_property
    def by_id(self) -> Mapping[str, Task]:
        """Every task by its id."""
        return {task.id: task for task in self.tasks}

    @cached_property
    def pictures(self) -> tuple[str, ...]:
        """The ids of all pictures, sorted."""
        return tuple(sorted({name for task in self.tasks for name in (task.first, task.second, *task.references)}))

    def of(self, question: Question, role: Role) -> tuple[Task, ...]:
        """The tasks of one question and role, in the order of the plan."""
        return self._by_kind.get((question, role), ())

    @cached_property
    def _by_kind(self) -> Mapping[tuple[Question, Role], tuple[Task, ...]]:
        kinds = dict.fromkeys((task.question, task.role) for task in self.tasks)
        return {kind: tuple(task for task in self.tasks if (task.question, task.role) == kind) for kind in kinds}

    def longest(self, question: Question) -> int:
        """The most tasks that one person meets under a question: training, pairs and the controls among them."""
        pairs = min(self.per_person, len(self.of(question, "pair")))
        return len(self.of(question, "training")) + pairs + self.controls(question) if pairs else 0

    def controls(self, question: Question) -> int:
        """How many controls go with the pairs that one person meets: one in every ``control_every`` tasks."""
        return controls(min(self.per_person, len(self.of(question, "pair"))), self.control_every)


def controls(pairs: int, every: int) -> int:
    """The number of controls among ``pairs`` pairs when one task in ``every`` is a control, at least one."""
    return max(1, round(pairs / (every - 1))) if pairs else 0


def key(seed: int, *parts: Any) -> int:
    """A number in [0, 2**64) that seed and parts alone decide: the same on every machine, unlike `hash()`."""
    written = "\0".join(str(part) for part in (seed, *parts))
    return int.from_bytes(blake2b(written.encode(), digest_size=8).digest(), "big")
