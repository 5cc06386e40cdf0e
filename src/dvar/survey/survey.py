"""The plan of a survey: its tasks, and the folder that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from dvar.errors import RefusedInput
from dvar.files import read_json, write_json

Question = Literal["reconstruction", "customization"]
Role = Literal["pair", "control", "training"]
Answer = Literal["first", "second", "equal"]
QUESTIONS: tuple[Question, ...] = ("reconstruction", "customization")
ANSWERS: tuple[Answer, ...] = ("first", "second", "equal")
FORMAT = 1
# Only the survey file says which run generated which image; the pages know nothing but ids.
SURVEY_FILE, IMAGE_FOLDER, VOTES_FILE, SECRET_FILE = "survey.json", "pictures", "votes.sqlite", "secret"


_SCHEMA = {
    **dict.fromkeys(("candidate", "baseline"), str),
    **dict.fromkeys(("overlap", "per_person", "control_every", "seed"), int),
    "tasks": [
        {
            **dict.fromkeys(("id", "method", "concept", "prompt", "first", "second"), str),
            "question": QUESTIONS,
            "role": ("pair", "control", "training"),
            "seed": int,
            "references": [str],
            "expected?": (*ANSWERS, None),
            "lesson?": str,
        }
    ],
    "runs?": [{str: str}],
}


@dataclass(frozen=True)
class Task:
    """A question about two images.

    Args:
        id: 16 hexadecimal digits that reveal nothing about the task.
        question: What is asked.
        role: A comparison of two runs, a control with an obvious answer, or a training task.
        method: The method of both runs.
        concept: The concept of both runs.
        prompt: The prompt of both images, with {} where the subject stands.
        seed: The seed of both images.
        references: Ids of the reference images.
        first: Id of the first image; in a pair, the candidate's.
        second: Id of the second image; in a pair, the baseline's.
        expected: The right answer to a control or a training task.
        lesson: What a training task teaches.
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
    """A survey: which runs are compared, in which tasks, and how often.

    Args:
        candidate: Name of the run that is named first in each pair.
        baseline: Name of the run that is named second.
        overlap: Number of raters for each pair.
        per_person: Maximum number of pairs of each question for one rater.
        control_every: One task in this many is a control.
        seed: Seed of orders and sides.
        tasks: Every task.
        runs: For each pair of runs: method, concept, and the folders of candidate and baseline.
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
    def load(cls, folder: str | Path) -> Survey:
        """Return the survey in ``folder``.

        Raises:
            RefusedInput: The folder holds no survey, the survey is damaged, or images are missing.
        """
        path = Path(folder) / SURVEY_FILE
        try:
            survey = cls._parse(path)
        except FileNotFoundError as error:
            problem = f"a survey's folder holds {SURVEY_FILE}, {folder} does not"
            raise RefusedInput([f"{problem}: name the folder that dvar survey build wrote"]) from error
        except (OSError, ValueError, TypeError) as error:
            if isinstance(error, RefusedInput):
                raise
            raise RefusedInput([f"{path} is damaged ({error}): restore it or build the survey again"]) from error
        missing = [name for name in survey.image_ids if not (Path(folder) / IMAGE_FOLDER / f"{name}.png").is_file()]
        if missing:
            problem = f"{len(missing)} images are missing from {folder}, the first is {missing[0]}.png"
            raise RefusedInput([f"{problem}: restore them"])
        return survey

    @classmethod
    def _parse(cls, path: Path) -> Survey:
        if read_json(path, {"format": int})["format"] != FORMAT:
            raise RefusedInput([f"{path} was written by another version of dvar: build the survey again"])
        content = read_json(path, _SCHEMA)
        del content["format"]
        tasks = tuple(Task(**{**task, "references": tuple(task["references"])}) for task in content.pop("tasks"))
        return cls(**{**content, "tasks": tasks, "runs": tuple(content.get("runs", ()))})

    def save(self, folder: Path) -> None:
        """Write the survey file into ``folder``."""
        write_json(folder / SURVEY_FILE, {"format": FORMAT, **asdict(self)})

    @cached_property
    def task_by_id(self) -> Mapping[str, Task]:
        """Every task by its id."""
        return {task.id: task for task in self.tasks}

    @cached_property
    def image_ids(self) -> tuple[str, ...]:
        """The ids of all images, sorted."""
        return tuple(sorted({name for task in self.tasks for name in (task.first, task.second, *task.references)}))

    def select(self, question: Question, role: Role) -> tuple[Task, ...]:
        """Return the tasks of one question and role, in the order of the plan."""
        return self._groups.get((question, role), ())

    @cached_property
    def _groups(self) -> Mapping[tuple[Question, Role], tuple[Task, ...]]:
        keys = dict.fromkeys((task.question, task.role) for task in self.tasks)
        return {key: tuple(task for task in self.tasks if (task.question, task.role) == key) for key in keys}

    def max_tasks(self, question: Question) -> int:
        """Return the maximum number of tasks of a question for one rater: training, pairs and controls."""
        pairs = min(self.per_person, len(self.select(question, "pair")))
        return len(self.select(question, "training")) + pairs + self.control_count(question) if pairs else 0

    def control_count(self, question: Question) -> int:
        """Return how many controls one rater meets among the pairs of a question."""
        return count_controls(min(self.per_person, len(self.select(question, "pair"))), self.control_every)


def count_controls(pairs: int, every: int) -> int:
    """Return the number of controls among ``pairs`` pairs: one task in ``every``, and at least one."""
    return max(1, round(pairs / (every - 1))) if pairs else 0


def stable_hash(seed: int, *parts: Any) -> int:
    """Return a number in [0, 2**64) that depends on ``seed`` and ``parts`` alone; unlike `hash`, on every machine."""
    text = "\0".join(str(part) for part in (seed, *parts))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
