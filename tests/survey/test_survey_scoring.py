"""The score: counted votes, who is left out, the page; tables for platforms and back; simulated people."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fake_survey import small_survey

pytest.importorskip("itsdangerous", reason="needs the extra: pip install 'dvar[survey]'")

from dvar.cli.main import main
from dvar.errors import RefusedInput
from dvar.paper.published import TABLE_2
from dvar.paper.simulated_votes import Preferences, Rater, imagined, rate, split, table2
from dvar.survey.config import SurveyBuildConfig, SurveyScoreConfig, survey_problems
from dvar.survey.crowdsourcing import read_answers, write_tasks
from dvar.survey.result_page import write_page
from dvar.survey.scoring import score
from dvar.survey.server import read_secret
from dvar.survey.statistics import clustered, davidson, krippendorff, ordered, wilson
from dvar.survey.survey import PICTURES, VOTES, Task
from dvar.survey.vote_store import Vote, VoteStore

KEY = "k" * 40
SURVEY = imagined(["a", "b"], concepts=2, prompts=2, config=SurveyBuildConfig())
PAIRS = [task for task in SURVEY.of("reconstruction", "pair") if task.method == "a"]
CONTROLS = SURVEY.of("reconstruction", "control")


def votes(worker: str, answers: str, right: int = 1, wrong: int = 0, left: str = "first") -> list[Vote]:
    """A person's votes on the pairs of method a: + better, = equal, - worse; and on controls."""
    meant = {"+": "first", "=": "equal", "-": "second"}
    cast = [Vote(worker, task, left, meant[mark], 3.0) for task, mark in zip(PAIRS, answers, strict=False)]  # type: ignore[arg-type]
    checks = [Vote(worker, task, left, task.expected, 1.0) for task in CONTROLS[:right]]  # type: ignore[arg-type]
    missed = [Vote(worker, CONTROLS[0], left, "equal", 1.0)] * wrong  # type: ignore[arg-type]
    return [*cast, *checks, *missed]


def test_votes_are_counted_as_table_2_has_them_and_as_it_hides_them() -> None:
    found = score(SURVEY, [*votes("1", "++=-"), *votes("2", "+==-", left="second")])
    (row,) = found.after
    assert (row.method, row.question, row.people, row.concepts) == ("a", "reconstruction", 2, 2)
    assert (row.better, row.equal, row.worse, row.votes) == (3, 3, 2, 8)
    assert row.share == 6 / 8
    assert row.win == 3 / 5
    assert row.interval == wilson(6, 8)
    assert found.before == found.after
    # Person 1 saw the candidate on the left: 2 of 3 decided votes went left; person 2 on the right: 1 of 2.
    assert (found.left, found.left_interval) == (3 / 5, wilson(3, 5))
    assert [(tally.better, tally.equal, tally.worse) for tally in found.tallies] == [
        (2, 0, 0),
        (1, 1, 0),
        (0, 2, 0),
        (0, 0, 2),
    ]
    assert [tally.agreement for tally in found.tallies] == [1, 0, 1, 1]


def test_a_row_is_what_the_statistics_say_of_its_votes_as_the_settings_ask() -> None:
    said = {"1": "+++=", "2": "-+-=", "3": "+=--"}
    left = {"1": "first", "2": "second", "3": "first"}
    cast = [vote for who, marks in said.items() for vote in votes(who, marks, left=left[who])]
    found = score(SURVEY, cast, SurveyScoreConfig(confidence=0.8, resamples=300, seed=5))
    (row,) = found.after
    values = np.array([{"+": 1, "=": 0, "-": -1}[mark] for marks in said.values() for mark in marks])
    people, concepts = np.repeat(np.arange(3), 4), np.tile([PAIRS[at].concept for at in range(4)], 3)
    things = np.unique(concepts, return_inverse=True)[1]
    drawn = {"confidence": 0.8, "resamples": 300, "seed": 5}
    assert row.interval == wilson(8, 12, 0.8)
    assert row.wide == wilson(8, 12, 0.8) | clustered(values >= 0, people, things, **drawn)
    kept = values != 0
    won = clustered(values[kept] == 1, people[kept], things[kept], **drawn)
    assert row.win_wide == wilson(5, 9, 0.8) | won
    assert row.strength == davidson(values, people != 1, 0.8)
    assert row.strength is not None
    assert (row.alpha, row.ordered_alpha) == (
        krippendorff(values.reshape(3, 4)),
        krippendorff(values.reshape(3, 4), ordered),
    )
    assert found.left_interval == wilson(6, 9, 0.8)


def test_a_persons_seconds_are_those_of_the_middle_answer() -> None:
    cast = [Vote("1", task, "first", "first", seconds) for task, seconds in zip(PAIRS, (1.0, 2.0, 600.0), strict=False)]
    (person,) = score(SURVEY, cast).people
    assert person.seconds == 2


def test_who_fails_the_controls_is_left_out_and_the_score_before_it_is_kept() -> None:
    cast = [*votes("good", "++++", right=2), *votes("bad", "----", wrong=1), *votes("new", "====", right=0)]
    found = score(SURVEY, cast)
    assert [(person.name, person.right, person.controls, person.excluded) for person in found.people] == [
        ("good", 2, 2, False),
        ("bad", 1, 2, True),
        ("new", 0, 0, False),
    ]
    assert [(row.better, row.equal, row.worse) for row in (*found.before, *found.after)] == [(4, 4, 4), (4, 4, 0)]
    assert score(SURVEY, cast, SurveyScoreConfig(min_accuracy=0.5)).after == found.before
    assert (found.left, found.left_interval) == (1, wilson(4, 4)), "nor do their sides count"
    assert [(tally.better, tally.equal, tally.worse) for tally in found.tallies] == [(1, 1, 0)] * 4


def test_training_is_no_control() -> None:
    lessons = [
        Vote("1", task, "first", task.expected, 1.0, misses=2) for task in SURVEY.of("reconstruction", "training")
    ]  # type: ignore[arg-type]
    (person,) = score(SURVEY, [*lessons, *votes("1", "++", right=0, wrong=1)]).people
    assert (person.votes, person.right, person.controls, person.misses, person.excluded) == (2, 0, 1, 2, True)


def test_exactly_the_asked_share_of_controls_is_enough() -> None:
    # 0.55 * 20 is a little more than 11 in binary.
    found = score(SURVEY, votes("1", "+", right=0), SurveyScoreConfig(min_accuracy=0.55))
    assert not found.people[0].excluded
    checks = [Vote("1", CONTROLS[0], "first", "first" if n < 11 else "equal", 1.0) for n in range(20)]
    for least, out in ((0.55, False), (0.551, True)):
        (person,) = score(SURVEY, checks, SurveyScoreConfig(min_accuracy=least)).people
        assert (person.right, person.controls, person.excluded) == (11, 20, out)


def test_two_people_who_agree_do_not_make_a_result_certain(tmp_path: Path) -> None:
    found = score(SURVEY, [*votes("1", "+==-"), *votes("2", "+==-")])
    (row,) = found.after
    assert row.share == 3 / 4
    assert (row.wide.low, row.wide.high) == pytest.approx((row.interval.low, 1.0))
    assert row.win == 1 / 2
    assert row.win_wide.low <= wilson(2, 4).low < wilson(2, 4).high <= row.win_wide.high
    (all_won,) = score(SURVEY, votes("1", "+++")).after
    assert (all_won.win_wide.low, all_won.win_wide.high) == pytest.approx((wilson(3, 3).low, 1.0))
    assert "as few as 2 people and 2 concepts" in write_page(tmp_path, found, tmp_path / "score.html").read_text()
    many = [vote for number in range(10) for vote in votes(str(number), "+==-")]
    assert "as few as 2 concepts:" in write_page(tmp_path, score(SURVEY, many), tmp_path / "score.html").read_text()


def test_the_page_of_the_score_names_nobody(tmp_path: Path) -> None:
    cast = [*votes("1 Zerubbabel Z", "++++"), *votes("2 Habakkuk H", "----", right=0, wrong=2)]
    page = write_page(tmp_path, score(SURVEY, cast), tmp_path / "score.html").read_text()
    assert "number 2 (0 of 2)" in page
    assert "Habakkuk" not in page
    assert "Zerubbabel" not in page


def test_nobody_and_nobody_left_are_told(tmp_path: Path) -> None:
    empty = score(SURVEY, [])
    assert (empty.before, empty.votes, empty.left) == ((), 0, 0.5)
    page = write_page(tmp_path, empty, tmp_path / "score.html").read_text()
    assert "Nobody has answered yet." in page
    gone = score(SURVEY, votes("bad", "++--", right=0, wrong=2))
    assert gone.after == ()
    assert "nobody left" in write_page(tmp_path, gone, tmp_path / "score.html").read_text()


def test_where_all_is_equal_no_side_and_no_winner_is_told(tmp_path: Path) -> None:
    found = score(SURVEY, votes("1", "===="))
    page = write_page(tmp_path, found, tmp_path / "score.html").read_text()
    assert "4 answers to pairs of pictures by 1 person." in page
    assert "No counted vote prefers a picture" in page
    assert "50.0 %" not in page
    assert "went to the left" in write_page(tmp_path, score(SURVEY, votes("1", "+===")), tmp_path / "b").read_text()


def test_settings_are_checked() -> None:
    assert survey_problems(SurveyScoreConfig()) == []
    assert len(survey_problems(SurveyScoreConfig(min_accuracy=1.5))) == 1
    assert len(survey_problems(SurveyScoreConfig(confidence=1.0, resamples=3))) == 2


def voted(folder: Path, survey, people: int = 3) -> VoteStore:  # type: ignore[no-untyped-def]
    box = VoteStore(folder / VOTES, survey)
    truth = {
        ("textual-inversion", question): Preferences(0.6, 0.2, 0.2) for question in ("reconstruction", "customization")
    }
    rate(box, [Rater(1.0)] * people, truth)  # type: ignore[arg-type]
    return box


def test_the_page_shows_the_table_and_the_pictures_and_loads_nothing(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    folder, survey = small_survey(tmp_path)
    voted(folder, survey)
    assert main(["survey", "score", str(folder)]) == 0
    told = capsys.readouterr().out.splitlines()
    found = score(survey, VoteStore(folder / VOTES, survey).votes())
    assert told[0] == f"textual-inversion, reconstruction: {found.after[0]}"
    assert told[-1] == f"page      {folder / 'score.html'}"
    page = (folder / "score.html").read_text()
    for row in found.after:
        assert f"{100 * row.share:.1f} %" in page
        assert f"{row.better} · {row.equal} · {row.worse}" in page
    assert "Where people agreed most" in page
    assert page.count("data:image/") == 4 * 2 * 3
    assert "<script" not in page
    assert 'src="http' not in page
    assert (folder / "score.html").read_bytes() == write_page(folder, found, tmp_path / "again.html").read_bytes()


def test_the_galleries_show_where_people_agreed_and_only_where_enough_answered(tmp_path: Path) -> None:
    folder, survey = small_survey(tmp_path)
    alike, apart, lone = survey.of("customization", "pair")[:3]

    def cast(task: Task, *answers: str) -> list[Vote]:
        return [Vote(str(number), task, "first", answer, 1.0) for number, answer in enumerate(answers)]  # type: ignore[arg-type]

    some = [*cast(alike, "first", "first", "first"), *cast(lone, "second", "second")]
    few = write_page(folder, score(survey, some), tmp_path / "few.html").read_text()
    assert "Fewer than two pairs have 3 counted answers" in few
    assert "data:image/" not in few
    all_votes = [*some, *cast(apart, "first", "equal", "second")]
    page = write_page(folder, score(survey, all_votes), tmp_path / "page.html").read_text()
    most, _, least = page.partition("Where people agreed most")[2].partition("Where they agreed least")
    assert re.findall(r"<b>(.*?)</b>", most) == ["DVAR 3 · equal 0 · baseline 0"]
    assert re.findall(r"<b>(.*?)</b>", least) == ["DVAR 1 · equal 1 · baseline 1"]


def test_people_are_forgotten_by_their_numbers(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    folder, survey = small_survey(tmp_path)
    voted(folder, survey)
    votes = VoteStore(folder / VOTES, survey).votes()
    each = len(votes) // 3
    assert main(["survey", "forget", str(folder), "2", "9"]) == 2
    assert "has no 9" in capsys.readouterr().err
    assert main(["survey", "forget", str(folder)]) == 2
    assert VoteStore(folder / VOTES, survey).votes() == votes
    capsys.readouterr()
    assert main(["survey", "forget", str(folder), "2", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"forgotten {number}: {each} answers" for number in (2, 3)]
    assert {vote.worker for vote in VoteStore(folder / VOTES, survey).votes()} == {"1 simulated 0"}


# Tables


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def once(table: list[dict[str, str]]) -> list[dict[str, str]]:
    """One row of each task."""
    return list({frozenset((row["left"], row["right"])): row for row in table}.values())


def answered(path: Path, table: list[dict[str, str]], names: tuple[str, str, str], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(names)
        for worker in ("W1", "W2"):
            writer.writerows([worker, row["ticket"], row["expected"] or "left"] for row in once(table))
    return path


@pytest.mark.parametrize(
    ("names", "delimiter"),
    [
        (("worker", "ticket", "answer"), ","),
        (("WorkerId", "Input.ticket", "Answer.answer"), ","),
        (("ASSIGNMENT:worker_id", "INPUT:ticket", "OUTPUT:answer"), "\t"),
    ],
)
def test_answers_of_a_platform_come_back_as_votes(tmp_path: Path, names: tuple[str, str, str], delimiter: str) -> None:
    folder, survey = small_survey(tmp_path)
    table = tmp_path / "tasks.csv"
    written = write_tasks(folder, table, "customization", KEY, "https://a.example/pictures/")
    listed = rows(table)
    assert written == len(listed)
    pairs = [row for row in listed if row["role"] == "pair"]
    assert len(pairs) == 2 * len(survey.of("customization", "pair"))
    assert {int(row["people"]) for row in pairs} == {5}
    sides = Counter((row["left"], row["right"]) for row in pairs)
    assert all(sides[right, left] == count for (left, right), count in sides.items()), "both sides are asked"
    assert all(row["left"].startswith("https://a.example/pictures/") for row in listed)
    assert all(row["description"].startswith("a photo of the object ") for row in listed)
    path = answered(tmp_path / "answers", listed, names, delimiter)
    given = 2 * len(once(listed))
    assert read_answers(folder, path, KEY) == (given, 0)
    assert read_answers(folder, path, KEY) == (0, given), "read again, nothing is counted twice"
    counted = VoteStore(folder / VOTES, survey).votes()
    assert len(counted) == given
    sides = {row["ticket"]: row for row in listed}
    assert len(sides) == len(listed)
    for vote in counted:
        if vote.task.role == "pair":
            assert vote.answer == vote.left_side, "left was answered"
        elif vote.task.role == "control":
            assert vote.answer == "first"


def test_neither_a_ticket_nor_its_row_tells_what_a_task_is(tmp_path: Path) -> None:
    folder, survey = small_survey(tmp_path)
    tickets = dict[str, list[str]]()
    for secret in (KEY, "o" * 40):
        write_tasks(folder, tmp_path / f"{secret}.csv", "customization", secret, "https://a.example")
        tickets[secret] = [row["ticket"] for row in rows(tmp_path / f"{secret}.csv")]
        assert tickets[secret] == sorted(set(tickets[secret])), "in no order of roles"
        assert all(re.fullmatch("[0-9a-f]{32}", ticket) for ticket in tickets[secret])
    assert not set(tickets[KEY]) & set(tickets["o" * 40])
    assert not [task for task in survey.tasks if any(task.id in ticket for ticket in tickets[KEY])]


def test_an_odd_overlap_is_split_as_well_as_it_can_be(tmp_path: Path) -> None:
    folder, survey = small_survey(tmp_path, overlap=3)
    write_tasks(folder, tmp_path / "tasks.csv", "reconstruction", KEY, "https://a.example")
    wanted = [int(row["people"]) for row in rows(tmp_path / "tasks.csv") if row["role"] == "pair"]
    assert sorted(wanted) == [1, 1, 2, 2] == sorted([1, 2] * len(survey.of("reconstruction", "pair")))


def test_a_wrong_table_is_refused_whole(tmp_path: Path) -> None:
    folder, survey = small_survey(tmp_path)
    table = tmp_path / "tasks.csv"
    write_tasks(folder, table, "customization", KEY, "https://a.example")
    pairs = [row for row in rows(table) if row["role"] == "pair"]
    good = [row for row in pairs if {row["left"], row["right"]} == {pairs[0]["left"], pairs[0]["right"]}]
    wrong = tmp_path / "wrong.csv"
    lines = [
        f"W1,{good[0]['ticket']},left",
        f"W1,{good[0]['ticket'][:-3]}abc,left",
        f"W1,{good[1]['ticket']},better",
        f",{good[1]['ticket']},left",
        f"W1,{good[1]['ticket']},left",
    ]
    wrong.write_text("\n".join(["worker,ticket,answer", *lines]) + "\n")
    with pytest.raises(RefusedInput) as refused:
        read_answers(folder, wrong, KEY)
    said = refused.value.problems
    assert ["line 3" in said[0], "line 4" in said[1], "line 5" in said[2], "twice" in said[3]] == [True] * 4
    assert VoteStore(folder / VOTES, survey).votes() == ()
    (tmp_path / "none.csv").write_text("worker,answer\nW1,left\n")
    for name in ("none.csv", "missing.csv"):
        with pytest.raises(RefusedInput):
            read_answers(folder, tmp_path / name, KEY)
    with pytest.raises(RefusedInput, match="there already"):
        write_tasks(folder, table, "customization", KEY, "https://a.example")


def test_a_table_that_contradicts_what_stands_is_refused_whole(tmp_path: Path) -> None:
    folder, survey = small_survey(tmp_path)
    write_tasks(folder, tmp_path / "tasks.csv", "customization", KEY, "https://a.example")
    one, two = [row["ticket"] for row in once(rows(tmp_path / "tasks.csv")) if row["role"] == "pair"][:2]
    path = tmp_path / "answers.csv"
    path.write_text(f"worker,ticket,answer\nW1,{one},left\n")
    assert read_answers(folder, path, KEY) == (1, 0)
    path.write_text(f"worker,ticket,answer\nW1,{two},left\nW1,{one},equal\n")
    with pytest.raises(RefusedInput, match="W1 answers a task twice"):
        read_answers(folder, path, KEY)
    assert len(VoteStore(folder / VOTES, survey).votes()) == 1


def test_a_table_that_a_spreadsheet_wrote_is_read(tmp_path: Path) -> None:
    folder, survey = small_survey(tmp_path)
    write_tasks(folder, tmp_path / "tasks.csv", "customization", KEY, "https://a.example")
    ticket = next(row["ticket"] for row in rows(tmp_path / "tasks.csv") if row["role"] == "pair")
    (tmp_path / "answers.csv").write_text(f"worker,ticket,answer\r\nW1, {ticket} ,Left \r\n", encoding="utf-8-sig")
    assert read_answers(folder, tmp_path / "answers.csv", KEY) == (1, 0)
    (vote,) = VoteStore(folder / VOTES, survey).votes()
    assert vote.answer == vote.left_side


def test_the_commands_sign_with_the_surveys_own_secret(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    folder, _ = small_survey(tmp_path)
    table = tmp_path / "tasks.csv"
    words = ["--question", "reconstruction", "--pictures", "https://a.example", "--output", str(table)]
    assert main(["survey", "export", str(folder), *words]) == 0
    path = answered(tmp_path / "answers.csv", rows(table), ("worker", "ticket", "answer"))
    assert main(["survey", "import", str(folder), str(path)]) == 0
    assert " new, 0 counted before" in capsys.readouterr().out
    assert read_secret(folder)
    assert not list((folder / PICTURES).glob("secret*"))


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    folder, _ = small_survey(tmp_path)
    plan = folder / "survey.json"
    plan.write_text(plan.read_text().replace("a photo of {} at night", "=HYPERLINK({})"))
    write_tasks(folder, tmp_path / "tasks.csv", "customization", KEY, "https://a.example")
    assert "'=HYPERLINK(the object)" in {row["description"] for row in rows(tmp_path / "tasks.csv")}


# Simulated people


def test_a_rater_answers_as_often_as_their_chances_say() -> None:
    survey = imagined(["a"], concepts=1, prompts=1, config=SurveyBuildConfig())
    pair = VoteStore(":memory:", survey)
    pair.join()
    shown = pair.current(1)
    assert shown is not None
    draws, said = np.random.default_rng(0), []
    for _ in range(3000):
        said.append(Rater(0.7, left=0.3).answer(shown, {}, draws))
    # A training task: right with 0.7, else at random, where left has 1.3 / 3, equal 1 / 3, right 0.7 / 3.
    right = str(shown.task.expected)
    blind = 1.3 if right == shown.left_side else 0.7
    assert said.count(right) / 3000 == pytest.approx(0.7 + 0.3 * blind / 3, abs=0.025)  # type: ignore[arg-type]
    assert said.count("equal") / 3000 == pytest.approx(0.1, abs=0.02)


def recovered(careful: int, careless: int, concepts: int) -> None:
    found, truth = table2(careful=careful, careless=careless, concepts=concepts)
    assert [(row.method, row.question) for row in found.after] == list(TABLE_2)
    assert [person.votes > 0 for person in found.people] == [True] * len(found.people)
    assert len(found.excluded) == careless, "every careless person fails, no careful one"
    for row in found.after:
        meant = truth[row.method, row.question]
        assert meant.share in row.wide
        assert meant.better / (meant.better + meant.worse) in row.win_wide
        assert row.strength is not None
        assert np.log(meant.better / meant.worse) in row.strength.interval or row.question == "customization"
    assert 0.5 in found.left_interval
    pulled = [abs(row.share - truth[row.method, row.question].share) for row in found.before]
    assert sum(pulled) > sum(abs(row.share - truth[row.method, row.question].share) for row in found.after)


def test_the_truth_that_simulated_people_were_given_lies_in_the_intervals() -> None:
    recovered(careful=12, careless=4, concepts=4)


@pytest.mark.slow
def test_and_with_fifty_people_too() -> None:
    recovered(careful=40, careless=10, concepts=12)


@pytest.mark.slow
def test_table_2_is_reproduced_without_records_and_says_that_it_is_simulated(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra: pip install 'dvar[lab]'")
    assert main(["reproduce", "table2", "--records", str(tmp_path / "none"), "--output_dir", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "A simulation, not a finding" in page
    assert "The truth lies in 6 of 6 intervals." in page
    for share in TABLE_2.values():
        assert f">{100 * share:.1f}<" in page


def test_a_split_keeps_its_share() -> None:
    chances = split(0.6)
    assert sum(chances) == pytest.approx(1)
    assert chances.share == pytest.approx(0.6)
    assert chances.equal == pytest.approx(0.2)
