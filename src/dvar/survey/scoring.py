"""The score of a survey: shares with intervals, strength, agreement, and the effect of excluding raters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
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
    clustered_interval,
    fit_davidson,
    krippendorff_alpha,
    nominal_distance,
    squared_distance,
    wilson_interval,
)
from dvar.survey.survey import QUESTIONS, Question, Survey, Task
from dvar.survey.vote_store import Vote

K = TypeVar("K")
VOTE_VALUES = {"first": BETTER, "equal": EQUAL, "second": WORSE}


@dataclass(frozen=True)
class ComparisonResult:
    """The votes on one method and question.

    Args:
        method: The method of both runs.
        question: The question.
        better: Number of votes for the candidate.
        equal: Number of ties.
        worse: Number of votes for the baseline.
        raters: Number of raters.
        concepts: Number of concepts.
        wilson_interval: Wilson's interval of ``share``, which takes votes as independent.
        share_interval: Interval of ``share`` from resampled raters and concepts. It is never narrower than Wilson's:
            two raters who happen to agree make nothing certain about a third.
        win_interval: The same for ``win_share``.
        strength: Davidson's model, None where the votes do not determine it.
        alpha: Krippendorff's alpha with nominal distance, None where the votes do not determine it.
        ordered_alpha: Krippendorff's alpha with squared distance, likewise.
    """

    method: str
    question: Question
    better: int
    equal: int
    worse: int
    raters: int
    concepts: int
    wilson_interval: Interval
    share_interval: Interval
    win_interval: Interval
    strength: Strength | None
    alpha: float | None
    ordered_alpha: float | None

    @property
    def votes(self) -> int:
        """Number of votes."""
        return self.better + self.equal + self.worse

    @property
    def share(self) -> float:
        """Share of better or equal, as in Table 2."""
        return (self.better + self.equal) / self.votes

    @property
    def win_share(self) -> float:
        """Share of better among the votes that are not ties; 0.5 when all are."""
        decided = self.better + self.worse
        return self.better / decided if decided else 0.5

    def __str__(self) -> str:
        interval = f"[{100 * self.share_interval.low:.1f}, {100 * self.share_interval.high:.1f}]"
        share = f"better or equal {100 * self.share:.1f} % {interval}"
        return f"{share}, better {self.better}, equal {self.equal}, worse {self.worse}"


@dataclass(frozen=True)
class RaterSummary:
    """The answers of one rater in numbers.

    Args:
        name: Label of the rater: number and name.
        votes: Number of answers to pairs.
        controls: Number of controls answered.
        correct_controls: Number of controls answered correctly.
        misses: Number of wrong answers to training tasks.
        seconds: Median time for an answer.
        excluded: Whether the rater failed the controls.
    """

    name: str
    votes: int
    controls: int
    correct_controls: int
    misses: int
    seconds: float
    excluded: bool

    @property
    def number(self) -> str:
        """The number alone, which identifies the rater and reveals no more."""
        return self.name.partition(" ")[0]


@dataclass(frozen=True)
class Tally:
    """The votes on one pair, without those of excluded raters."""

    task: Task
    better: int
    equal: int
    worse: int

    @property
    def votes(self) -> int:
        """Number of votes."""
        return self.better + self.equal + self.worse

    @property
    def agreement(self) -> float:
        """Share of pairs of votes that are the same, 1 for a single vote."""
        counts, total = (self.better, self.equal, self.worse), self.votes
        return sum(count * (count - 1) for count in counts) / (total * (total - 1)) if total > 1 else 1.0


@dataclass(frozen=True)
class Score:
    """The result of a survey.

    Args:
        candidate: Name of the candidate.
        baseline: Name of the baseline.
        votes_wanted: Number of answers to pairs that the survey asks for.
        votes: Number of answers to pairs so far.
        all_results: A result for each method and question, from all raters.
        results: The same without excluded raters.
        raters: Every rater.
        tallies: The votes on each pair, without excluded raters.
        left_share: Share of the left image among the votes that are not ties.
        left_interval: Wilson's interval of ``left_share``.
        confidence: Coverage of the intervals.
        min_accuracy: Share of controls that had to be right.
    """

    candidate: str
    baseline: str
    votes_wanted: int
    votes: int
    all_results: tuple[ComparisonResult, ...]
    results: tuple[ComparisonResult, ...]
    raters: tuple[RaterSummary, ...]
    tallies: tuple[Tally, ...]
    left_share: float
    left_interval: Interval
    confidence: float
    min_accuracy: float

    @property
    def excluded(self) -> tuple[RaterSummary, ...]:
        """The raters who failed the controls."""
        return tuple(rater for rater in self.raters if rater.excluded)


def score_votes(survey: Survey, votes: Iterable[Vote], config: SurveyScoreConfig | None = None) -> Score:
    """Return the score of ``votes``.

    Raters below ``config.min_accuracy`` on the controls they met are excluded; a rater who met no control counts.
    """
    config, votes = config or SurveyScoreConfig(), tuple(votes)
    raters = _summarise_raters(votes, config.min_accuracy)
    excluded = {rater.name for rater in raters if rater.excluded}
    pair_votes = [vote for vote in votes if vote.task.role == "pair"]
    counted = [vote for vote in pair_votes if vote.rater not in excluded]
    decided = [vote for vote in counted if vote.answer != "equal"]
    left_votes = sum(vote.answer == vote.left_side for vote in decided)
    return Score(
        candidate=survey.candidate,
        baseline=survey.baseline,
        votes_wanted=survey.overlap * sum(len(survey.select(question, "pair")) for question in QUESTIONS),
        votes=len(pair_votes),
        all_results=_compare_all(survey, pair_votes, config),
        results=_compare_all(survey, counted, config),
        raters=raters,
        tallies=_count_pairs(counted),
        left_share=left_votes / len(decided) if decided else 0.5,
        left_interval=wilson_interval(left_votes, len(decided), config.confidence),
        confidence=config.confidence,
        min_accuracy=config.min_accuracy,
    )


def _compare_all(survey: Survey, votes: Sequence[Vote], config: SurveyScoreConfig) -> tuple[ComparisonResult, ...]:
    groups = _group_votes(votes, lambda vote: (vote.task.method, vote.task.question))
    return tuple(
        _compare(method, question, groups[method, question], config)
        for method in dict.fromkeys(task.method for task in survey.tasks)
        for question in QUESTIONS
        if (method, question) in groups
    )


def _compare(method: str, question: Question, votes: Sequence[Vote], config: SurveyScoreConfig) -> ComparisonResult:
    values = np.array([VOTE_VALUES[vote.answer] for vote in votes], np.int64)
    raters = _number_names([vote.rater for vote in votes])
    concepts = _number_names([vote.task.concept for vote in votes])
    ratings = _rating_matrix(raters, _number_names([vote.task.id for vote in votes]), values)
    bootstrap = partial(clustered_interval, confidence=config.confidence, resamples=config.resamples, seed=config.seed)
    better, equal, worse = (int((values == value).sum()) for value in (BETTER, EQUAL, WORSE))
    decided = values != EQUAL
    share_wilson = wilson_interval(better + equal, len(votes), config.confidence)
    win_wilson = wilson_interval(better, better + worse, config.confidence)
    return ComparisonResult(
        method=method,
        question=question,
        better=better,
        equal=equal,
        worse=worse,
        raters=len(np.unique(raters)),
        concepts=len(np.unique(concepts)),
        wilson_interval=share_wilson,
        share_interval=share_wilson | bootstrap(values >= EQUAL, raters, concepts),
        win_interval=win_wilson | bootstrap(values[decided] == BETTER, raters[decided], concepts[decided]),
        strength=fit_davidson(values, np.array([vote.left_side == "first" for vote in votes]), config.confidence),
        alpha=krippendorff_alpha(ratings, nominal_distance),
        ordered_alpha=krippendorff_alpha(ratings, squared_distance),
    )


def _summarise_raters(votes: Sequence[Vote], min_accuracy: float) -> tuple[RaterSummary, ...]:
    groups = _group_votes(votes, lambda vote: vote.rater)
    return tuple(_summarise_rater(name, rater_votes, min_accuracy) for name, rater_votes in groups.items())


def _summarise_rater(name: str, votes: Sequence[Vote], min_accuracy: float) -> RaterSummary:
    controls = [vote for vote in votes if vote.task.role == "control"]
    correct = sum(vote.answer == vote.task.expected for vote in controls)
    return RaterSummary(
        name=name,
        votes=sum(vote.task.role == "pair" for vote in votes),
        controls=len(controls),
        correct_controls=correct,
        misses=sum(vote.misses for vote in votes),
        seconds=float(np.median([vote.seconds for vote in votes])),
        excluded=bool(controls) and correct / len(controls) < min_accuracy,
    )


def _count_pairs(votes: Sequence[Vote]) -> tuple[Tally, ...]:
    tallies = []
    for task, task_votes in _group_votes(votes, lambda vote: vote.task).items():
        answers = [vote.answer for vote in task_votes]
        tallies.append(Tally(task, answers.count("first"), answers.count("equal"), answers.count("second")))
    return tuple(tallies)


def _rating_matrix(raters: Votes, tasks: Votes, values: Votes) -> Votes:
    matrix = np.full((int(raters.max()) + 1, int(tasks.max()) + 1), MISSING, np.int64)
    matrix[raters, tasks] = values
    return matrix


def _number_names(names: Sequence[str]) -> Votes:
    """Return the index of each name among the sorted unique names: int64 [names]."""
    return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)


def _group_votes(votes: Sequence[Vote], key: Callable[[Vote], K]) -> dict[K, list[Vote]]:
    groups = defaultdict[K, list[Vote]](list)
    for vote in votes:
        groups[key(vote)].append(vote)
    return groups
