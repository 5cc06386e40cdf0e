"""Simulated people of known accuracy, who answer a survey through its own ballots.  A simulation, never a finding.

It proves the whole path from showing to score: the truth that the people were given must lie in the interval that comes
out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dvar.paper.published import TABLE_2
from dvar.survey.config import SurveyBuildConfig, SurveyScoreConfig
from dvar.survey.scoring import Score, score
from dvar.survey.survey import ANSWERS, QUESTIONS, Answer, Question, Survey, Task, controls, key
from dvar.survey.vote_store import Assignment, VoteStore


@dataclass(frozen=True)
class Preferences:
    """How often people who look would find the candidate better, equal and worse; they sum to 1."""

    better: float
    equal: float
    worse: float

    def __iter__(self) -> Iterator[float]:
        return iter((self.better, self.equal, self.worse))

    @property
    def share(self) -> float:
        """Better or equal."""
        return self.better + self.equal


Truth = Mapping[tuple[str, Question], Preferences]


@dataclass(frozen=True)
class Rater:
    """A person who looks with probability ``accuracy`` and otherwise presses one of the three buttons at random.

    Looking, they answer a task with a right answer rightly, and a pair by the chances of its method and question.
    ``left`` is added to the chance of the left button among the two sides when they do not look.
    """

    accuracy: float
    left: float = 0.0

    def answer(self, shown: Assignment, truth: Truth, draws: np.random.Generator) -> Answer:
        """What they answer to a task as shown."""
        if draws.random() < self.accuracy:
            if shown.task.expected:
                return shown.task.expected
            chances = truth[shown.task.method, shown.task.question]
            named: tuple[Answer, ...] = ("first", "equal", "second")
            return named[int(draws.choice(3, p=tuple(chances)))]
        aside = np.array([1 + self.left, 1.0, 1 - self.left]) / 3
        pressed = ("left", "equal", "right")[int(draws.choice(3, p=aside))]
        return shown.answer(pressed) or "equal"


def split(share: float, ties: float = 1 / 3) -> Preferences:
    """Return chances with the given share of better or equal, of which ``ties`` are equal: our assumption."""
    return Preferences(share * (1 - ties), share * ties, 1 - share)


def imagined(methods: Sequence[str], concepts: int, prompts: int, config: SurveyBuildConfig) -> Survey:
    """Return a survey of pictures that do not exist: for each method and concept as many pairs of each question."""
    tasks = list[Task]()
    for question in QUESTIONS:
        pairs = [
            _imagined(question, method, f"concept {concept:02d}", prompt)
            for method in methods
            for concept in range(concepts)
            for prompt in range(prompts)
        ]
        asked = controls(min(config.per_person, len(pairs)), config.control_every)
        tasks += [_obvious(pairs[0], "training", 0), *(_obvious(pairs[0], "control", n) for n in range(asked)), *pairs]
    kept = ("candidate", "baseline", "overlap", "per_person", "control_every", "seed")
    return Survey(**{name: getattr(config, name) for name in kept}, tasks=tuple(tasks))


def rate(ballots: VoteStore, raters: Sequence[Rater], truth: Truth, seed: int = 0) -> None:
    """Let people answer until each has nothing left to answer, taking turns."""
    draws = np.random.default_rng(seed)
    going = [(ballots.join(f"simulated {number}"), rater) for number, rater in enumerate(raters)]
    while going:
        still = []
        for worker, rater in going:
            shown = ballots.current(worker)
            if shown is None:
                continue
            answer = rater.answer(shown, truth, draws)
            pressed = next(word for word in ("left", "right", "equal") if shown.answer(word) == answer)
            ballots.vote(worker, shown.id, pressed)
            still.append((worker, rater))
        going = still


def table2(*, careful: int = 24, careless: int = 6, concepts: int = 12, seed: int = 0) -> tuple[Score, Truth]:
    """Return the score of simulated people on an imagined survey of the paper's three methods, and the truth they had.

    The truth's shares are the paper's; how they split into better and equal is assumed (`split`). Careful people look
    always, careless ones never.
    """
    truth = {cell: split(share) for cell, share in TABLE_2.items()}
    methods = list(dict.fromkeys(method for method, _ in TABLE_2))
    config = SurveyBuildConfig(per_person=36, seed=seed)
    survey = imagined(methods, concepts=concepts, prompts=4, config=config)
    ballots = VoteStore(":memory:", survey)
    raters = [Rater(1.0)] * careful + [Rater(0.0, left=0.3)] * careless
    order = np.random.default_rng(seed).permutation(len(raters))
    rate(ballots, [raters[at] for at in order], truth, seed)
    return score(survey, ballots.votes(), SurveyScoreConfig(seed=seed)), truth


def _imagined(question: Question, method: str, concept: str, prompt: int) -> Task:
    name = f"{key(0, 'imagined', question, method, concept, prompt):016x}"
    return Task(name, question, "pair", method, concept, f"{{}} {prompt}", prompt, (), f"{name}a", f"{name}b")


def _obvious(task: Task, role: str, number: int) -> Task:
    name = f"{key(0, 'imagined', task.question, role, number):016x}"
    kept = {"id": name, "role": role, "expected": ANSWERS[number % 2]}
    return Task(**{**vars(task), **kept})
