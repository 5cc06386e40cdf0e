"""What the votes say: shares with intervals, strength, agreement, sides, and how much the excluded people matter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dvar.survey.config import SurveyScoreConfig
from dvar.survey.statistics import (
    BETTER,
    EQUAL,
    MISSING,
    WORSE,
    Interval,
    Strength,
    Votes,
    clustered,
    davidson,
    krippendorff,
    nominal,
    ordered,
    wilson,
)
from dvar.survey.survey import QUESTIONS, Question, Survey, Task
from dvar.survey.vote_store import Vote

K = TypeVar("K")
VALUES = {"first": BETTER, "equal": EQUAL, "second": WORSE}


@dataclass(frozen=True)
class ComparisonResult:
    """One method and question: how often the candidate was better, equal and worse, and how sure that is.

    ``share`` is "better or equal", the paper's number; ``interval`` takes votes for independent, ``wide`` draws people
    and concepts again and is never narrower than ``interval``: of two people who happen to agree, drawing them again
    knows nothing of a third.  ``win_wide`` is the same of ``win``.  ``strength`` and ``alpha`` are None where the votes
    cannot tell them.
    """

    method: str
    question: Question
    better: int
    equal: int
    worse: int
    people: int
    concepts: int
    interval: Interval
    wide: Interval
    win_wide: Interval
    strength: Strength | None
    alpha: float | None
    ordered_alpha: float | None

    @property
    def votes(self) -> int:
        return self.better + self.equal + self.worse

    @property
    def share(self) -> float:
        """Better or equal, as Table 2 has it."""
        return (self.better + self.equal) / self.votes

    def __str__(self) -> str:
        told = f"better or equal {100 * self.share:.1f} % [{100 * self.wide.low:.1f}, {100 * self.wide.high:.1f}]"
        return f"{told}, better {self.better}, equal {self.equal}, worse {self.worse}"

    @property
    def win(self) -> float:
        """Better, of the votes that are no ties; a half where all are."""
        decided = self.better + self.worse
        return self.better / decided if decided else 0.5


@dataclass(frozen=True)
class Person:
    """Who voted: answers to pairs, controls met and right, wrong training answers, median seconds an answer.

    ``name`` begins with their number, which tells them apart and says no more.
    """

    name: str
    votes: int
    controls: int
    right: int
    misses: int
    seconds: float
    excluded: bool

    @property
    def number(self) -> str:
        return self.name.partition(" ")[0]


@dataclass(frozen=True)
class Tally:
    """The votes on one pair, excluded people left out."""

    task: Task
    better: int
    equal: int
    worse: int

    @property
    def agreement(self) -> float:
        """The share of pairs of votes that are alike; of a single vote 1."""
        counts = (self.better, self.equal, self.worse)
        total = sum(counts)
        return sum(count * (count - 1) for count in counts) / (total * (total - 1)) if total > 1 else 1.0


@dataclass(frozen=True)
class Score:
    """A survey's result: the rows ``before`` anyone is left out and ``after``, and what they rest on.

    ``left`` is the share of the left picture among all votes that are no ties, with Wilson's interval.
    """

    candidate: str
    baseline: str
    wanted: int
    votes: int
    before: tuple[ComparisonResult, ...]
    after: tuple[ComparisonResult, ...]
    people: tuple[Person, ...]
    tallies: tuple[Tally, ...]
    left: float
    left_interval: Interval
    confidence: float
    min_accuracy: float

    @property
    def excluded(self) -> tuple[Person, ...]:
        return tuple(person for person in self.people if person.excluded)


def score(survey: Survey, votes: Iterable[Vote], config: SurveyScoreConfig | None = None) -> Score:
    """Return what votes say; people below ``config.min_accuracy`` on the controls they met are left out of ``after``.

    Who met no control is counted.
    """
    config, votes = config or SurveyScoreConfig(), tuple(votes)
    people = _people(votes, config.min_accuracy)
    out = {person.name for person in people if person.excluded}
    pairs = [vote for vote in votes if vote.task.role == "pair"]
    kept = [vote for vote in pairs if vote.worker not in out]
    decided = [vote for vote in kept if vote.answer != "equal"]
    leftward = sum(vote.answer == vote.left_side for vote in decided)
    return Score(
        candidate=survey.candidate,
        baseline=survey.baseline,
        wanted=survey.overlap * sum(len(survey.of(question, "pair")) for question in QUESTIONS),
        votes=len(pairs),
        before=_rows(survey, pairs, config),
        after=_rows(survey, kept, config),
        people=people,
        tallies=_tallies(kept),
        left=leftward / len(decided) if decided else 0.5,
        left_interval=wilson(leftward, len(decided), config.confidence),
        confidence=config.confidence,
        min_accuracy=config.min_accuracy,
    )


def _rows(survey: Survey, votes: Sequence[Vote], config: SurveyScoreConfig) -> tuple[ComparisonResult, ...]:
    groups = _grouped(votes, lambda vote: (vote.task.method, vote.task.question))
    return tuple(
        _row(method, question, groups[method, question], config)
        for method in dict.fromkeys(task.method for task in survey.tasks)
        for question in QUESTIONS
        if (method, question) in groups
    )


def _row(method: str, question: Question, votes: Sequence[Vote], config: SurveyScoreConfig) -> ComparisonResult:
    values = np.array([VALUES[vote.answer] for vote in votes], np.int64)
    people, concepts = _numbered([v.worker for v in votes]), _numbered([v.task.concept for v in votes])
    sampling = {"confidence": config.confidence, "resamples": config.resamples, "seed": config.seed}
    better, equal, worse = (int((values == value).sum()) for value in (BETTER, EQUAL, WORSE))
    decided = values != EQUAL
    interval = wilson(better + equal, len(votes), config.confidence)
    win_interval = wilson(better, better + worse, config.confidence)
    ratings = _ratings(people, _numbered([vote.task.id for vote in votes]), values)
    return ComparisonResult(
        method=method,
        question=question,
        better=better,
        equal=equal,
        worse=worse,
        people=len(np.unique(people)),
        concepts=len(np.unique(concepts)),
        interval=interval,
        wide=interval | clustered(values >= EQUAL, people, concepts, **sampling),  # type: ignore[arg-type]
        win_wide=win_interval | clustered(values[decided] == BETTER, people[decided], concepts[decided], **sampling),  # type: ignore[arg-type]
        strength=davidson(values, np.array([vote.left_side == "first" for vote in votes]), config.confidence),
        alpha=krippendorff(ratings, nominal),
        ordered_alpha=krippendorff(ratings, ordered),
    )


def _people(votes: Sequence[Vote], least: float) -> tuple[Person, ...]:
    found = []
    for name, cast in _grouped(votes, lambda vote: vote.worker).items():
        controls = [vote for vote in cast if vote.task.role == "control"]
        right = sum(vote.answer == vote.task.expected for vote in controls)
        found.append(
            Person(
                name=name,
                votes=sum(vote.task.role == "pair" for vote in cast),
                controls=len(controls),
                right=right,
                misses=sum(vote.misses for vote in cast),
                seconds=float(np.median([vote.seconds for vote in cast])),
                excluded=bool(controls) and right / len(controls) < least,
            )
        )
    return tuple(found)


def _tallies(votes: Sequence[Vote]) -> tuple[Tally, ...]:
    found = []
    for task, cast in _grouped(votes, lambda vote: vote.task).items():
        said = [vote.answer for vote in cast]
        found.append(Tally(task, said.count("first"), said.count("equal"), said.count("second")))
    return tuple(found)


def _ratings(people: Votes, tasks: Votes, values: Votes) -> Votes:
    table = np.full((int(people.max()) + 1, int(tasks.max()) + 1), MISSING, np.int64)
    table[people, tasks] = values
    return table


def _numbered(names: Sequence[str]) -> Votes:
    return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)


def _grouped(votes: Sequence[Vote], by: Callable[[Vote], K]) -> dict[K, list[Vote]]:
    groups = defaultdict[K, list[Vote]](list)
    for vote in votes:
        groups[by(vote)].append(vote)
    return groups
