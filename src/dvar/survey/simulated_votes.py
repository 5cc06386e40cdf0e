"""Simulated raters of known accuracy who vote on an imagined survey: a test of the whole path to a score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dvar.survey.config import SurveyBuildConfig
from dvar.survey.survey import ANSWERS, QUESTIONS, Answer, Question, Role, Survey, Task, count_controls, stable_hash
from dvar.survey.vote_store import Assignment, VoteStore

BUTTONS = ("left", "equal", "right")


@dataclass(frozen=True)
class Preferences:
    """Probabilities that an attentive rater finds the candidate better, equal or worse; they sum to 1."""

    better: float
    equal: float
    worse: float

    def __iter__(self) -> Iterator[float]:
        return iter((self.better, self.equal, self.worse))

    @property
    def share(self) -> float:
        """Probability of better or equal."""
        return self.better + self.equal


Truth = Mapping[tuple[str, Question], Preferences]


@dataclass(frozen=True)
class SimulatedRater:
    """A rater who is attentive with probability ``accuracy`` and otherwise presses one of the three buttons at random.

    Args:
        accuracy: Probability of an attentive answer: the right one to a control or a training task, and to a pair one
            drawn from the preferences of its method and question.
        left: How much more likely than the right button the left one is when the rater is not attentive, in thirds.
    """

    accuracy: float
    left: float = 0.0

    def answer(self, assignment: Assignment, truth: Truth, generator: np.random.Generator) -> Answer:
        """Draw an answer to a task as it is shown."""
        task = assignment.task
        if generator.random() < self.accuracy:
            if task.expected:
                return task.expected
            answers: tuple[Answer, ...] = ("first", "equal", "second")
            return answers[int(generator.choice(3, p=tuple(truth[task.method, task.question])))]
        probabilities = np.array([1 + self.left, 1.0, 1 - self.left]) / 3
        return assignment.answer_for(BUTTONS[int(generator.choice(3, p=probabilities))]) or "equal"


def split_share(share: float, ties: float = 1 / 3) -> Preferences:
    """Return preferences with a given share of better or equal, of which ``ties`` are equal: our assumption."""
    return Preferences(share * (1 - ties), share * ties, 1 - share)


def imagine_survey(methods: Sequence[str], concepts: int, prompts: int, config: SurveyBuildConfig) -> Survey:
    """Return a survey without images: for each question, ``prompts`` pairs of each method and concept."""
    tasks = list[Task]()
    for question in QUESTIONS:
        pairs = [
            _imagine_pair(question, method, f"concept {concept:02d}", prompt)
            for method in methods
            for concept in range(concepts)
            for prompt in range(prompts)
        ]
        count = count_controls(min(config.per_person, len(pairs)), config.control_every)
        tasks.append(_imagine_control(pairs[0], "training", 0))
        tasks += [_imagine_control(pairs[0], "control", number) for number in range(count)]
        tasks += pairs
    return Survey(
        candidate=config.candidate,
        baseline=config.baseline,
        overlap=config.overlap,
        per_person=config.per_person,
        control_every=config.control_every,
        seed=config.seed,
        tasks=tuple(tasks),
    )


def simulate_votes(store: VoteStore, raters: Sequence[SimulatedRater], truth: Truth, seed: int = 0) -> None:
    """Let raters vote in turn until nobody has anything left to answer."""
    generator = np.random.default_rng(seed)
    active = [(store.add_rater(f"simulated {number}"), rater) for number, rater in enumerate(raters)]
    while active:
        active = [item for item in active if _vote_once(store, *item, truth, generator)]


def _vote_once(
    store: VoteStore, number: int, rater: SimulatedRater, truth: Truth, generator: np.random.Generator
) -> bool:
    """Let a rater answer one task; return False when there was none."""
    assignment = store.current_assignment(number)
    if assignment is None:
        return False
    answer = rater.answer(assignment, truth, generator)
    button = next(button for button in BUTTONS if assignment.answer_for(button) == answer)
    store.record_vote(number, assignment.id, button)
    return True


def _imagine_pair(question: Question, method: str, concept: str, prompt: int) -> Task:
    name = f"{stable_hash(0, 'imagined', question, method, concept, prompt):016x}"
    return Task(name, question, "pair", method, concept, f"{{}} {prompt}", prompt, (), f"{name}a", f"{name}b")


def _imagine_control(task: Task, role: Role, number: int) -> Task:
    name = f"{stable_hash(0, 'imagined', task.question, role, number):016x}"
    return replace(task, id=name, role=role, expected=ANSWERS[number % 2])
