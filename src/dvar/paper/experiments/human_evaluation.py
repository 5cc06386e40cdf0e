"""Table 2: which strategy people prefer, with simulated raters whose true preferences are the paper's."""

from __future__ import annotations

import numpy as np

from dvar.html.tables import Column
from dvar.paper.published import TABLE_2
from dvar.paper.result import ExperimentResult, Table, build_table, format_number, method_title
from dvar.survey.config import SurveyBuildConfig, SurveyScoreConfig
from dvar.survey.questions import QUESTION_TEXTS
from dvar.survey.scoring import ComparisonResult, Score, score_votes
from dvar.survey.simulated_votes import SimulatedRater, Truth, imagine_survey, simulate_votes, split_share
from dvar.survey.vote_store import VoteStore


def table_2() -> ExperimentResult:
    """Return a simulated Table 2: no image and no recorded run is read."""
    score, truth = simulate_table_2()
    covered = sum(truth[row.method, row.question].share in row.share_interval for row in score.results)
    paragraphs = (
        "A simulation, not a finding: the raters are simulated, and their true preferences are those of the paper's "
        "Table 2. It tests the path from what raters are shown to the score. The truth is inside "
        f"{covered} of {len(score.results)} intervals.",
        f"The control questions identified {len(score.excluded)} of {len(score.raters)} raters, who press buttons at "
        "random; the column Everyone shows the result with their votes.",
        "With real people: dvar survey build, serve and score (docs/guides/survey.md).",
    )
    return ExperimentResult(paragraphs, (_table_of_preferences(score, truth),))


def simulate_table_2(*, careful: int = 24, careless: int = 6, concepts: int = 12, seed: int = 0) -> tuple[Score, Truth]:
    """Simulate Table 2: raters vote on an imagined survey of the paper's three methods.

    Args:
        careful: Number of raters who are always attentive.
        careless: Number of raters who never are.
        concepts: Number of concepts for each method.
        seed: Seed of the survey, of the raters' order and of their answers.

    Returns:
        The score, and the preferences that the raters were given. The shares are the paper's; how they split into
        better and equal is assumed, by `split_share`.
    """
    truth = {cell: split_share(share) for cell, share in TABLE_2.items()}
    methods = list(dict.fromkeys(method for method, _ in TABLE_2))
    config = SurveyBuildConfig(per_person=36, seed=seed)
    survey = imagine_survey(methods, concepts=concepts, prompts=4, config=config)
    store = VoteStore(":memory:", survey)
    raters = [SimulatedRater(1.0)] * careful + [SimulatedRater(0.0, left=0.3)] * careless
    order = np.random.default_rng(seed).permutation(len(raters))
    simulate_votes(store, [raters[index] for index in order], truth, seed)
    return score_votes(survey, store.load_votes(), SurveyScoreConfig(seed=seed)), truth


def _table_of_preferences(score: Score, truth: Truth) -> Table:
    everyone = {(row.method, row.question): row.share for row in score.all_results}
    columns = (
        Column[ComparisonResult]("Question", lambda row: QUESTION_TEXTS[row.question].name),
        Column[ComparisonResult]("Truth", lambda row: truth[row.method, row.question].share, _format_share),
        Column[ComparisonResult]("Better or equal", lambda row: row, _format_interval),
        Column[ComparisonResult]("Everyone", lambda row: everyone[row.method, row.question], _format_share),
        Column[ComparisonResult]("Better", "better"),
        Column[ComparisonResult]("Equal", "equal"),
        Column[ComparisonResult]("Worse", "worse"),
        Column[ComparisonResult]("Votes", "votes"),
        Column[ComparisonResult]("Alpha", lambda row: float("nan") if row.alpha is None else row.alpha, _format_alpha),
    )
    methods = list(dict.fromkeys(row.method for row in score.results))
    data = [
        {
            "method": row.method,
            "question": row.question,
            "truth": truth[row.method, row.question].share,
            "share": row.share,
            "low": row.share_interval.low,
            "high": row.share_interval.high,
            "better": row.better,
            "equal": row.equal,
            "worse": row.worse,
        }
        for row in score.results
    ]
    caption = (
        f"Percentage of votes in which {score.candidate} was better or equal, with {100 * score.confidence:g} %"
        " intervals from resampling raters and concepts. Simulated votes on images that do not exist; how the truth "
        "splits into better and equal is assumed, since the paper does not report it. Alpha is Krippendorff's; it is "
        "near 0 because all pairs of a row have the same chances: there is nothing about a single pair to agree on."
    )
    rows = sorted(score.results, key=lambda row: methods.index(row.method))
    return build_table("table2", caption, columns, rows, data=data, heading=lambda row: method_title(row.method))


def _format_share(share: float) -> str:
    return f"{100 * share:.1f}"


def _format_interval(row: ComparisonResult) -> str:
    return f"{100 * row.share:.1f} [{100 * row.share_interval.low:.1f}, {100 * row.share_interval.high:.1f}]"


def _format_alpha(alpha: float) -> str:
    return format_number(alpha, 2)
