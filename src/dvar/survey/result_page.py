"""A survey's result as one page: the table with its intervals, who was left out, sides, and the pictures behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from dvar.config.training import CONFIGS
from dvar.html.elements import Html, element, join, page_head
from dvar.runs import report_figures
from dvar.survey.questions import THE_OBJECT, WORDING
from dvar.survey.scoring import ComparisonResult, Score, Tally
from dvar.survey.statistics import Interval
from dvar.survey.survey import PICTURES

SHOWN = 4  # pairs of most and of least agreement
LEAST_VOTES = 3  # fewer votes on a pair say nothing about agreement
FEW = 10  # fewer people or concepts say little about others than themselves
STYLES = ("charts.css", "style.css")


def write_page(folder: Path, score: Score, path: Path) -> Path:
    """Return ``path``, written: one file that loads nothing and runs no script; the same votes give the same bytes."""
    sheets = "".join(files("dvar.html").joinpath(name).read_text(encoding="utf-8") for name in STYLES)
    head = page_head(f"{score.candidate} against {score.baseline} · dvar", sheets)
    title = element(
        "header",
        element("p", "Human evaluation", class_="eyebrow"),
        element("h1", f"{score.candidate} against {score.baseline}"),
        element("p", _counted(score), class_="standfirst"),
    )
    body = element("body", element("main", title, section(score, folder / PICTURES)))
    path.write_text("<!doctype html>\n" + element("html", head, body, lang="en") + "\n", encoding="utf-8", newline="\n")
    return path


def section(score: Score, pictures: Path | None = None) -> Html:
    """Return the result as part of a page; with a folder of ``pictures`` also the pairs of most and least agreement."""
    parts = [_result(score), _exclusion(score), _sides(score), *(_agreement(score, pictures) if pictures else ())]
    return join(parts) if score.votes else element("p", "Nobody has answered yet.")


def named(method: str) -> str:
    """A method's name for people, or the names of two that were compared."""
    return " against ".join(CONFIGS[one].title if one in CONFIGS else one for one in method.split(" against "))


def _counted(score: Score) -> str:
    kept = [person for person in score.people if not person.excluded]
    votes = sum(person.votes for person in kept)
    left_out = f"; {len(score.excluded)} left out for failing the controls" if score.excluded else ""
    return f"{votes} answers to pairs of pictures by {_people(len(kept))}{left_out}."


def _people(count: int) -> str:
    return "1 person" if count == 1 else f"{count} people"


def _result(score: Score) -> Html:
    percent = f"{100 * score.confidence:g} %"
    heads = ("Method", "Asked about", "Better or equal", "Better · equal · worse", "Better, ties aside", "Strength")
    caption = (
        f"Better or equal counts every tie for {score.candidate}, as the paper does, so its split stands beside it. In "
        f"brackets {percent} intervals: people and concepts drawn again, because votes of one person or about one "
        "concept are alike, and never narrower than Wilson's; smaller, Wilson's, which takes every vote for "
        f"independent. Strength is Davidson's: the log of how often {score.candidate} is better for each time that it "
        "is worse, whichever side it stands on; where a rival or a side was never better there is none."
    )
    return element(
        "section",
        element("h2", "Result"),
        _table("Result", heads, [_result_row(row) for row in score.after]),
        *(element("p", said) for said in _few(score)),
        element("figcaption", caption),
    )


def _few(score: Score) -> Iterator[str]:
    """What the intervals cannot tell."""
    counts = {
        "people": min((row.people for row in score.after), default=FEW),
        "concepts": min((row.concepts for row in score.after), default=FEW),
    }
    few = [f"{count} {name}" for name, count in counts.items() if count < FEW]
    if few:
        said = " and ".join(few).replace("1 people", "1 person").replace("1 concepts", "1 concept")
        yield f"A row rests on as few as {said}: no interval tells much about others than these."


def _result_row(row: ComparisonResult) -> list[Html]:
    split = f"{row.better} · {row.equal} · {row.worse}"
    strength = row.strength
    fitted = f"{_signed(strength.advantage)} {_bracket(strength.interval)}" if strength else "none"
    wilson = element("small", f"Wilson {_percents(row.interval)}", class_="soft")
    win = f"{100 * row.win:.1f} % {_percents(row.win_wide)}" if row.better + row.worse else "none"
    return [
        join([named(row.method)]),
        join([WORDING[row.question].name]),
        element("span", element("b", f"{100 * row.share:.1f} %"), f" {_percents(row.wide)} ", wilson),
        join([split, _bar(row)]),
        join([win]),
        join([fitted]),
    ]


def _bar(row: ComparisonResult) -> Html:
    """Better, equal and worse as one bar."""
    parts, at = [], 0.0
    for name, count in (("better", row.better), ("equal", row.equal), ("worse", row.worse)):
        width = 120 * count / row.votes
        parts.append(element("rect", x=f"{at:.2f}", y="0", width=f"{width:.2f}", height="14", class_=name))
        at += width
    says = f"{row.better} better, {row.equal} equal, {row.worse} worse"
    return element("svg", *parts, viewBox="0 0 120 14", class_="split", role="img", aria_label=says)


def _exclusion(score: Score) -> Html:
    before = {(row.method, row.question): row for row in score.before}
    after = {(row.method, row.question): row for row in score.after}
    heads = ("Method", "Asked about", "Everyone", "Without who failed", "Agreement, everyone", "Agreement, without")
    rows = []
    for cell, row in before.items():
        kept = after.get(cell)
        rows.append(
            [
                join([named(row.method)]),
                join([WORDING[row.question].name]),
                _plain(row),
                _plain(kept) if kept else join(["nobody left"]),
                _alpha(row),
                _alpha(kept) if kept else join(["–"]),
            ]
        )
    who = ", ".join(f"number {person.number} ({person.right} of {person.controls})" for person in score.excluded)
    says = (
        f"Left out are people with fewer than {100 * score.min_accuracy:g} % of their controls right: "
        f"{who or 'nobody'}. Agreement is Krippendorff's alpha, 1 for full agreement and 0 for that of chance; in "
        "brackets, the alpha in which equal lies halfway between better and worse; –: too few answers, or all alike."
    )
    return element(
        "section", element("h2", "Who was counted"), _table("Who was counted", heads, rows), element("figcaption", says)
    )


def _plain(row: ComparisonResult) -> Html:
    return join([f"{100 * row.share:.1f} % of {row.votes} votes, {_people(row.people)}"])


def _alpha(row: ComparisonResult) -> Html:
    told = [_minus(f"{value:.2f}") if value is not None else "–" for value in (row.alpha, row.ordered_alpha)]
    return join([f"{told[0]} ({told[1]})"])


def _sides(score: Score) -> Html:
    if not any(row.better + row.worse for row in score.after):
        says = "No counted vote prefers a picture, so none tells whether people favour a side."
        return element("section", element("h2", "Left and right"), element("p", says))
    drawn = "is" if 0.5 in score.left_interval else "is not"
    says = (
        f"Of the votes that are no ties, {100 * score.left:.1f} % {_percents(score.left_interval)} went to the left "
        f"picture: this {drawn} what people without a favourite side would do. Each rival stood on either side about "
        "equally often, so a favourite side blurs the result and does not bend it."
    )
    return element("section", element("h2", "Left and right"), element("p", says))


def _agreement(score: Score, pictures: Path) -> Iterator[Html]:
    judged = [tally for tally in score.tallies if tally.better + tally.equal + tally.worse >= LEAST_VOTES]
    ranked = sorted(judged, key=lambda tally: (-tally.agreement, tally.task.id))
    many = min(SHOWN, len(ranked) // 2)
    if not many:
        says = f"Fewer than two pairs have {LEAST_VOTES} counted answers, too few to tell where people agree."
        yield element("section", element("h2", "Where people agreed"), element("p", says))
        return
    yield _gallery("Where people agreed most", ranked[:many], score, pictures)
    yield _gallery("Where they agreed least", ranked[::-1][:many], score, pictures)


def _gallery(title: str, tallies: Sequence[Tally], score: Score, pictures: Path) -> Html:
    shown = []
    for tally in tallies:
        task = tally.task
        asked = "" if task.question == "reconstruction" else f": “{task.prompt.replace('{}', THE_OBJECT)}”"
        said = f"{score.candidate} {tally.better} · equal {tally.equal} · {score.baseline} {tally.worse}"
        three = [
            ("the object", task.references[:1]),
            (score.candidate, (task.first,)),
            (score.baseline, (task.second,)),
        ]
        strip = [
            element("figure", report_figures.picture(pictures / f"{name}.png", of), element("figcaption", of))
            for of, names in three
            for name in names
        ]
        told = [
            element("b", said),
            element("br"),
            f"{named(task.method)} · {task.concept} · {WORDING[task.question].name}{asked}",
        ]
        shown.append(element("div", element("div", *strip, class_="three"), element("p", *told)))
    return element("section", element("h2", title), element("div", *shown, class_="judged"))


def _table(name: str, heads: Sequence[str], rows: Sequence[Sequence[Html]]) -> Html:
    """A table that a narrow screen scrolls sideways, with the keyboard too."""
    head = element("tr", *(element("th", name, scope="col") for name in heads))
    body = [
        element("tr", element("th", cells[0], scope="row"), *(element("td", cell) for cell in cells[1:]))
        for cells in rows
    ]
    table = element("table", element("thead", head), element("tbody", *body), class_="votes")
    return element("div", table, class_="scroll", role="region", aria_label=name, tabindex="0")


def _percents(interval: Interval) -> str:
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _bracket(interval: Interval) -> str:
    return f"[{_signed(interval.low)}, {_signed(interval.high)}]"


def _signed(value: float) -> str:
    return _minus(f"{value:+.2f}")


def _minus(number: str) -> str:
    return number.replace("-", "−")
