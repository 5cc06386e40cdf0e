"""Table 2: which way people prefer.  Of simulated people, who are given the paper's numbers as the truth."""

from __future__ import annotations

from dvar.paper.result import ExperimentResult, Table, number, title
from dvar.paper.simulated_votes import Truth, table2
from dvar.recordings.archive import RecordingArchive
from dvar.survey.questions import WORDING
from dvar.survey.scoring import ComparisonResult, Score
from dvar.survey.statistics import Interval

COLUMNS = ("Question", "Truth", "Better or equal", "Everyone", "Better", "Equal", "Worse", "Votes", "Alpha")


def make(shelf: RecordingArchive | None = None) -> ExperimentResult:
    """Table 2, simulated: no picture and no record is looked at, so ``shelf`` does not matter."""
    score, truth = table2()
    held = sum(truth[row.method, row.question].share in row.wide for row in score.after)
    says = (
        "A simulation, not a finding: the voters are simulated, and the truth they were given is the paper's Table 2. "
        f"It tests the path from showing to score. The truth lies in {held} of {len(score.after)} intervals.",
        f"The controls found {len(score.excluded)} of {len(score.people)} people, who press buttons at random; the "
        "column Everyone shows what they would have done to the result.",
        "With people: dvar survey build, serve and score (docs/survey.md).",
    )
    return ExperimentResult("table2", "Table 2: which way people prefer (simulated)", says, (_table(score, truth),))


def _table(score: Score, truth: Truth) -> Table:
    before = {(row.method, row.question): row for row in score.before}
    methods = dict.fromkeys(row.method for row in score.after)
    lines = [
        line
        for method in methods
        for line in (
            (title(method),),
            *(_line(row, before[row.method, row.question], truth) for row in score.after if row.method == method),
        )
    ]
    data = [
        {
            "method": row.method,
            "question": row.question,
            "truth": truth[row.method, row.question].share,
            "share": row.share,
            "low": row.wide.low,
            "high": row.wide.high,
            "better": row.better,
            "equal": row.equal,
            "worse": row.worse,
        }
        for row in score.after
    ]
    caption = (
        f"Percentage of votes in which {score.candidate} was better or equal, with {100 * score.confidence:g} %"
        " intervals that draw people and concepts again. Simulated votes on imagined pictures; how the truth splits "
        "into better and equal is assumed, since the paper does not say it. Alpha is Krippendorff's; it is near 0 "
        "because all imagined pairs of a row have the same chances: there is nothing about a single pair to agree on."
    )
    return Table("table2", caption, COLUMNS, tuple(lines), tuple(data))


def _line(row: ComparisonResult, everyone: ComparisonResult, truth: Truth) -> tuple[str, ...]:
    return (
        WORDING[row.question].name,
        f"{100 * truth[row.method, row.question].share:.1f}",
        f"{100 * row.share:.1f} {_percents(row.wide)}",
        f"{100 * everyone.share:.1f}",
        *(str(count) for count in (row.better, row.equal, row.worse, row.votes)),
        number(float("nan") if row.alpha is None else row.alpha, 2),
    )


def _percents(interval: Interval) -> str:
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
