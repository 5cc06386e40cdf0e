"""The result page of a survey: the table with its intervals, excluded raters, sides, and the images behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from dvar.html.images import embed_image
from dvar.html.svg_elements import element
from dvar.html.tables import Column
from dvar.html.templates import render, write_page
from dvar.survey.questions import QUESTION_TEXTS, THE_OBJECT
from dvar.survey.scoring import ComparisonResult, RaterSummary, Score, Tally
from dvar.survey.statistics import Interval
from dvar.survey.survey import IMAGE_FOLDER
from dvar.training.methods.registry import METHODS

PAIRS_SHOWN = 4  # of most and of least agreement
MIN_VOTES = 3  # fewer votes on a pair say nothing about agreement
FEW = 10  # fewer raters or concepts say little about others
BAR_WIDTH, BAR_HEIGHT = 120, 14


@dataclass(frozen=True)
class ExclusionRow:
    """A result with and without the excluded raters; ``counted`` is None when nobody is left."""

    everyone: ComparisonResult
    counted: ComparisonResult | None


@dataclass(frozen=True)
class GalleryItem:
    """One pair in a gallery: its images with their captions, the votes, and what was asked."""

    images: Sequence[tuple[str, Markup]]
    votes: str
    question: str


def write_result_page(folder: Path, score: Score, path: Path) -> Path:
    """Write the result of a survey as one file that loads nothing and runs no script.

    Args:
        folder: Folder of the survey.
        score: The score of its votes; the same score gives the same bytes.
        path: File to write.

    Returns:
        ``path``.

    Raises:
        RefusedInput: The file cannot be written.
    """
    context = _context(score, folder / IMAGE_FOLDER)
    page = render("dvar.survey", "result_page.html", summary=_summary(score), **context)
    return write_page(path, page + "\n")


def render_score(score: Score, images: Path | None = None) -> Markup:
    """Return the result as a part of a page, with galleries if ``images`` names the survey's image folder."""
    return Markup(render("dvar.survey", "score.html", **_context(score, images)))


def format_method(method: str) -> str:
    """Return the title of a method, or of two methods that were compared."""
    return " against ".join(METHODS[name].title if name in METHODS else name for name in method.split(" against "))


def _context(score: Score, images: Path | None) -> dict[str, object]:
    return {
        "score": score,
        "result_columns": RESULT_COLUMNS,
        "exclusion_columns": EXCLUSION_COLUMNS,
        "exclusion_rows": _exclusion_rows(score),
        "few": _describe_few(score),
        "excluded": ", ".join(
            f"number {rater.number} ({rater.correct_controls} of {rater.controls})" for rater in score.excluded
        ),
        "decided": any(row.better + row.worse for row in score.results),
        "left": f"{_format_share(score.left_share)} {_format_shares(score.left_interval)}",
        "balanced": 0.5 in score.left_interval,
        "galleries": dict(_galleries(score, images)) if images else None,
        "min_votes": MIN_VOTES,
    }


def _summary(score: Score) -> str:
    counted = [rater for rater in score.raters if not rater.excluded]
    votes = sum(rater.votes for rater in counted)
    excluded = f"; {len(score.excluded)} excluded for failing the controls" if score.excluded else ""
    return f"{votes} answers to pairs of images by {_count_people(len(counted))}{excluded}."


def _count_people(count: int) -> str:
    return "1 person" if count == 1 else f"{count} people"


def _describe_few(score: Score) -> str:
    """Return how few people and concepts a row rests on, or an empty text when they are enough."""
    counts = {
        ("person", "people"): min((row.raters for row in score.results), default=FEW),
        ("concept", "concepts"): min((row.concepts for row in score.results), default=FEW),
    }
    return " and ".join(
        f"{count} {singular if count == 1 else plural}" for (singular, plural), count in counts.items() if count < FEW
    )


def _exclusion_rows(score: Score) -> list[ExclusionRow]:
    counted = {(row.method, row.question): row for row in score.results}
    return [ExclusionRow(row, counted.get((row.method, row.question))) for row in score.all_results]


def _galleries(score: Score, images: Path) -> Iterator[tuple[str, list[GalleryItem]]]:
    tallies = [tally for tally in score.tallies if tally.votes >= MIN_VOTES]
    ranked = sorted(tallies, key=lambda tally: (-tally.agreement, tally.task.id))
    count = min(PAIRS_SHOWN, len(ranked) // 2)
    if count:
        yield "Where people agreed most", [_gallery_item(tally, score, images) for tally in ranked[:count]]
        yield "Where people agreed least", [_gallery_item(tally, score, images) for tally in ranked[::-1][:count]]


def _gallery_item(tally: Tally, score: Score, images: Path) -> GalleryItem:
    task = tally.task
    names = [("the object", name) for name in task.references[:1]]
    names += [(score.candidate, task.first), (score.baseline, task.second)]
    description = "" if task.question == "reconstruction" else f": “{task.prompt.replace('{}', THE_OBJECT)}”"
    return GalleryItem(
        images=[(caption, embed_image(images / f"{name}.png", caption)) for caption, name in names],
        votes=f"{score.candidate} {tally.better} · equal {tally.equal} · {score.baseline} {tally.worse}",
        question=f"{format_method(task.method)} · {task.concept} · {QUESTION_TEXTS[task.question].name}{description}",
    )


def _share_cell(row: ComparisonResult) -> Markup:
    wilson = element("small", f"Wilson {_format_shares(row.wilson_interval)}", class_="soft")
    share = element("b", _format_share(row.share))
    return element("span", share, f" {_format_shares(row.share_interval)} ", wilson)


def _split_cell(row: ComparisonResult) -> Markup:
    """Return the counts as numbers and as one bar."""
    bars, offset = [], 0.0
    for name, count in (("better", row.better), ("equal", row.equal), ("worse", row.worse)):
        width = BAR_WIDTH * count / row.votes
        bars.append(element("rect", x=f"{offset:.2f}", y="0", width=f"{width:.2f}", height=BAR_HEIGHT, class_=name))
        offset += width
    label = f"{row.better} better, {row.equal} equal, {row.worse} worse"
    size = f"0 0 {BAR_WIDTH} {BAR_HEIGHT}"
    bar = element("svg", *bars, viewBox=size, class_="split", role="img", aria_label=label)
    return element("span", f"{row.better} · {row.equal} · {row.worse}", bar)


def _win_cell(row: ComparisonResult) -> str:
    return f"{_format_share(row.win_share)} {_format_shares(row.win_interval)}" if row.better + row.worse else "none"


def _strength_cell(row: ComparisonResult) -> str:
    if row.strength is None:
        return "none"
    low, high = row.strength.interval.low, row.strength.interval.high
    return f"{_format_signed(row.strength.advantage)} [{_format_signed(low)}, {_format_signed(high)}]"


def _votes_cell(row: ComparisonResult | None) -> str:
    if row is None:
        return "nobody left"
    return f"{_format_share(row.share)} of {row.votes} votes, {_count_people(row.raters)}"


def _alpha_cell(row: ComparisonResult | None) -> str:
    return f"{_format_alpha(row.alpha)} ({_format_alpha(row.ordered_alpha)})" if row else "–"


def _question_name(row: ComparisonResult) -> str:
    return QUESTION_TEXTS[row.question].name


def _format_share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _format_shares(interval: Interval) -> str:
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _format_signed(value: float) -> str:
    return _replace_minus(f"{value:+.2f}")


def _format_alpha(alpha: float | None) -> str:
    return "–" if alpha is None else _replace_minus(f"{alpha:.2f}")


def _replace_minus(number: str) -> str:
    return number.replace("-", "−")


def _unchanged(value: Markup) -> Markup:
    return value


RESULT_COLUMNS = (
    Column[ComparisonResult]("Method", "method", format_method),
    Column[ComparisonResult]("Question", _question_name),
    Column[ComparisonResult]("Better or equal", _share_cell, _unchanged),
    Column[ComparisonResult]("Better · equal · worse", _split_cell, _unchanged),
    Column[ComparisonResult]("Better, without ties", _win_cell),
    Column[ComparisonResult]("Strength", _strength_cell),
)
EXCLUSION_COLUMNS = (
    Column[ExclusionRow]("Method", lambda row: row.everyone.method, format_method),
    Column[ExclusionRow]("Question", lambda row: _question_name(row.everyone)),
    Column[ExclusionRow]("Everyone", lambda row: _votes_cell(row.everyone)),
    Column[ExclusionRow]("Without the excluded", lambda row: _votes_cell(row.counted)),
    Column[ExclusionRow]("Alpha, everyone", lambda row: _alpha_cell(row.everyone)),
    Column[ExclusionRow]("Alpha, without", lambda row: _alpha_cell(row.counted)),
)
PROGRESS_COLUMNS = (
    Column[ComparisonResult]("Method", "method", format_method),
    Column[ComparisonResult]("Question", _question_name),
    Column[ComparisonResult]("Answers", "votes"),
    Column[ComparisonResult]("Better", "better"),
    Column[ComparisonResult]("Equal", "equal"),
    Column[ComparisonResult]("Worse", "worse"),
    Column[ComparisonResult]("Agreement", lambda row: _format_alpha(row.alpha)),
)
RATER_COLUMNS = (
    Column[RaterSummary]("Rater", lambda rater: f"{rater.name} (excluded)" if rater.excluded else rater.name),
    Column[RaterSummary]("Answers", "votes"),
    Column[RaterSummary]("Controls right", lambda rater: f"{rater.correct_controls} of {rater.controls}"),
    Column[RaterSummary]("Training misses", "misses"),
    Column[RaterSummary]("Seconds", "seconds", "{:.0f}".format),
)
