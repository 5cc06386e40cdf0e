"""The score of a survey: counted votes, excluded raters, the page, tables for platforms, simulated raters."""

from __future__ import annotations

import csv
import json
import re
import socket
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fake_survey import build_small_survey

pytest.importorskip("itsdangerous", reason="needs the extra: pip install 'dvar[survey]'")

from dvar.cli.main import main
from dvar.errors import RefusedInput
from dvar.paper.experiments.human_evaluation import simulate_table_2
from dvar.paper.published import TABLE_2
from dvar.survey.config import SurveyBuildConfig, SurveyScoreConfig, problems
from dvar.survey.crowdsourcing import import_answers, write_tasks
from dvar.survey.result_page import write_result_page
from dvar.survey.scoring import score_votes
from dvar.survey.secret import read_secret
from dvar.survey.simulated_votes import Preferences, SimulatedRater, Truth, imagine_survey, simulate_votes, split_share
from dvar.survey.statistics import (
    clustered_interval,
    fit_davidson,
    krippendorff_alpha,
    squared_distance,
    wilson_interval,
)
from dvar.survey.survey import IMAGE_FOLDER, QUESTIONS, VOTES_FILE, Answer, Survey, Task
from dvar.survey.vote_store import Side, Vote, VoteStore

KEY = "k" * 40
SURVEY = imagine_survey(["a", "b"], concepts=2, prompts=2, config=SurveyBuildConfig())
PAIRS = [task for task in SURVEY.select("reconstruction", "pair") if task.method == "a"]
CONTROLS = SURVEY.select("reconstruction", "control")


MARKS: dict[str, Answer] = {"+": "first", "=": "equal", "-": "second"}


def cast_votes(rater: str, answers: str, right: int = 1, wrong: int = 0, left: Side = "first") -> list[Vote]:
    """Return a rater's votes on the pairs of method a: + better, = equal, - worse, and on controls."""
    pairs = [Vote(rater, task, left, MARKS[mark], 3.0) for task, mark in zip(PAIRS, answers, strict=False)]
    passed = [Vote(rater, task, left, task.expected or "equal", 1.0) for task in CONTROLS[:right]]
    failed = [Vote(rater, CONTROLS[0], left, "equal", 1.0)] * wrong
    return [*pairs, *passed, *failed]


def test_votes_are_counted_as_in_table_2_and_ties_are_counted_apart() -> None:
    score = score_votes(SURVEY, [*cast_votes("1", "++=-"), *cast_votes("2", "+==-", left="second")])
    (row,) = score.results
    assert (row.method, row.question, row.raters, row.concepts) == ("a", "reconstruction", 2, 2)
    assert (row.better, row.equal, row.worse, row.votes) == (3, 3, 2, 8)
    assert row.share == 6 / 8
    assert row.win_share == 3 / 5
    assert row.wilson_interval == wilson_interval(6, 8)
    assert score.all_results == score.results
    # Rater 1 saw the candidate on the left: 2 of 3 decided votes went left; rater 2 on the right: 1 of 2.
    assert (score.left_share, score.left_interval) == (3 / 5, wilson_interval(3, 5))
    assert [(tally.better, tally.equal, tally.worse) for tally in score.tallies] == [
        (2, 0, 0),
        (1, 1, 0),
        (0, 2, 0),
        (0, 0, 2),
    ]
    assert [tally.agreement for tally in score.tallies] == [1, 0, 1, 1]


def test_a_result_is_that_of_the_statistics_under_the_settings() -> None:
    answers = {"1": "+++=", "2": "-+-=", "3": "+=--"}
    left: dict[str, Side] = {"1": "first", "2": "second", "3": "first"}
    cast = [vote for rater, marks in answers.items() for vote in cast_votes(rater, marks, left=left[rater])]
    score = score_votes(SURVEY, cast, SurveyScoreConfig(confidence=0.8, resamples=300, seed=5))
    (row,) = score.results
    values = np.array([{"+": 1, "=": 0, "-": -1}[mark] for marks in answers.values() for mark in marks])
    raters, names = np.repeat(np.arange(3), 4), np.tile([pair.concept for pair in PAIRS], 3)
    concepts = np.unique(names, return_inverse=True)[1]
    bootstrap = partial(clustered_interval, confidence=0.8, resamples=300, seed=5)
    assert row.wilson_interval == wilson_interval(8, 12, 0.8)
    assert row.share_interval == wilson_interval(8, 12, 0.8) | bootstrap(values >= 0, raters, concepts)
    decided = values != 0
    won = bootstrap(values[decided] == 1, raters[decided], concepts[decided])
    assert row.win_interval == wilson_interval(5, 9, 0.8) | won
    assert row.strength == fit_davidson(values, raters != 1, 0.8)
    assert row.strength is not None
    assert (row.alpha, row.ordered_alpha) == (
        krippendorff_alpha(values.reshape(3, 4)),
        krippendorff_alpha(values.reshape(3, 4), squared_distance),
    )
    assert score.left_interval == wilson_interval(6, 9, 0.8)


def test_a_raters_seconds_are_the_median() -> None:
    cast = [Vote("1", task, "first", "first", seconds) for task, seconds in zip(PAIRS, (1.0, 2.0, 600.0), strict=False)]
    (rater,) = score_votes(SURVEY, cast).raters
    assert rater.seconds == 2


def test_raters_who_fail_the_controls_are_excluded_and_the_score_of_everyone_is_reported_too() -> None:
    cast = [
        *cast_votes("good", "++++", right=2),
        *cast_votes("bad", "----", wrong=1),
        *cast_votes("new", "====", right=0),
    ]
    score = score_votes(SURVEY, cast)
    assert [(rater.name, rater.correct_controls, rater.controls, rater.excluded) for rater in score.raters] == [
        ("good", 2, 2, False),
        ("bad", 1, 2, True),
        ("new", 0, 0, False),
    ]
    assert [(row.better, row.equal, row.worse) for row in (*score.all_results, *score.results)] == [
        (4, 4, 4),
        (4, 4, 0),
    ]
    assert score_votes(SURVEY, cast, SurveyScoreConfig(min_accuracy=0.5)).results == score.all_results
    assert (score.left_share, score.left_interval) == (1, wilson_interval(4, 4)), "their sides do not count either"
    assert [(tally.better, tally.equal, tally.worse) for tally in score.tallies] == [(1, 1, 0)] * 4


def test_training_is_not_a_control() -> None:
    lessons = [
        Vote("1", task, "first", task.expected or "equal", 1.0, misses=2)
        for task in SURVEY.select("reconstruction", "training")
    ]
    (rater,) = score_votes(SURVEY, [*lessons, *cast_votes("1", "++", right=0, wrong=1)]).raters
    assert (rater.votes, rater.correct_controls, rater.controls, rater.misses, rater.excluded) == (
        2,
        0,
        1,
        2,
        True,
    )


def test_exactly_the_required_share_of_controls_is_enough() -> None:
    # 0.55 * 20 is a little more than 11 in binary.
    score = score_votes(SURVEY, cast_votes("1", "+", right=0), SurveyScoreConfig(min_accuracy=0.55))
    assert not score.raters[0].excluded
    checks = [Vote("1", CONTROLS[0], "first", "first" if n < 11 else "equal", 1.0) for n in range(20)]
    for least, out in ((0.55, False), (0.551, True)):
        (rater,) = score_votes(SURVEY, checks, SurveyScoreConfig(min_accuracy=least)).raters
        assert (rater.correct_controls, rater.controls, rater.excluded) == (11, 20, out)


def test_two_raters_who_agree_do_not_make_a_result_certain(tmp_path: Path) -> None:
    score = score_votes(SURVEY, [*cast_votes("1", "+==-"), *cast_votes("2", "+==-")])
    (row,) = score.results
    assert row.share == 3 / 4
    assert (row.share_interval.low, row.share_interval.high) == pytest.approx((row.wilson_interval.low, 1.0))
    assert row.win_share == 1 / 2
    assert row.win_interval.low <= wilson_interval(2, 4).low < wilson_interval(2, 4).high <= row.win_interval.high
    (all_won,) = score_votes(SURVEY, cast_votes("1", "+++")).results
    assert (all_won.win_interval.low, all_won.win_interval.high) == pytest.approx((wilson_interval(3, 3).low, 1.0))
    assert (
        "as few as 2 people and 2 concepts" in write_result_page(tmp_path, score, tmp_path / "score.html").read_text()
    )
    many = [vote for number in range(10) for vote in cast_votes(str(number), "+==-")]
    assert (
        "as few as 2 concepts:"
        in write_result_page(tmp_path, score_votes(SURVEY, many), tmp_path / "score.html").read_text()
    )


def test_the_page_of_the_score_names_nobody(tmp_path: Path) -> None:
    cast = [*cast_votes("1 Zerubbabel Z", "++++"), *cast_votes("2 Habakkuk H", "----", right=0, wrong=2)]
    page = write_result_page(tmp_path, score_votes(SURVEY, cast), tmp_path / "score.html").read_text()
    assert "number 2 (0 of 2)" in page
    assert "Habakkuk" not in page
    assert "Zerubbabel" not in page


def test_the_page_says_when_nobody_answered_and_when_nobody_is_left(tmp_path: Path) -> None:
    empty = score_votes(SURVEY, [])
    assert (empty.all_results, empty.votes, empty.left_share) == ((), 0, 0.5)
    page = write_result_page(tmp_path, empty, tmp_path / "score.html").read_text()
    assert "Nobody has answered yet." in page
    score = score_votes(SURVEY, cast_votes("bad", "++--", right=0, wrong=2))
    assert score.results == ()
    assert "nobody left" in write_result_page(tmp_path, score, tmp_path / "score.html").read_text()


def test_ties_alone_show_no_side_and_no_winner(tmp_path: Path) -> None:
    score = score_votes(SURVEY, cast_votes("1", "===="))
    page = write_result_page(tmp_path, score, tmp_path / "score.html").read_text()
    assert "4 answers to pairs of images by 1 person." in page
    assert "No counted vote prefers an image" in page
    assert "50.0 %" not in page
    assert (
        "went to the left"
        in write_result_page(tmp_path, score_votes(SURVEY, cast_votes("1", "+===")), tmp_path / "b").read_text()
    )


def test_settings_are_checked() -> None:
    assert problems(SurveyScoreConfig()) == []
    assert len(problems(SurveyScoreConfig(min_accuracy=1.5))) == 1
    assert len(problems(SurveyScoreConfig(confidence=1.0, resamples=3))) == 2


def vote_on(folder: Path, survey: Survey, raters: int = 3) -> VoteStore:
    store = VoteStore(folder / VOTES_FILE, survey)
    truth: Truth = {("textual-inversion", question): Preferences(0.6, 0.2, 0.2) for question in QUESTIONS}
    simulate_votes(store, [SimulatedRater(1.0)] * raters, truth)
    return store


def test_the_page_shows_the_table_and_the_images_and_loads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, survey = build_small_survey(tmp_path)
    vote_on(folder, survey)
    assert main(["survey", "score", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    score = score_votes(survey, VoteStore(folder / VOTES_FILE, survey).load_votes())
    assert lines[0] == f"textual-inversion, reconstruction: {score.results[0]}"
    assert lines[-1] == f"page      {folder / 'score.html'}"
    page = (folder / "score.html").read_text()
    for row in score.results:
        assert f"{100 * row.share:.1f} %" in page
        assert f"{row.better} · {row.equal} · {row.worse}" in page
    assert "Where people agreed most" in page
    assert page.count("data:image/") == 4 * 2 * 3
    assert "<script" not in page
    assert 'src="http' not in page
    assert (folder / "score.html").read_bytes() == write_result_page(
        folder, score, tmp_path / "again.html"
    ).read_bytes()


def test_the_galleries_show_where_raters_agreed_and_only_pairs_with_enough_answers(tmp_path: Path) -> None:
    folder, survey = build_small_survey(tmp_path)
    alike, apart, lone = survey.select("customization", "pair")[:3]

    def cast(task: Task, *answers: Answer) -> list[Vote]:
        return [Vote(str(number), task, "first", answer, 1.0) for number, answer in enumerate(answers)]

    some = [*cast(alike, "first", "first", "first"), *cast(lone, "second", "second")]
    few = write_result_page(folder, score_votes(survey, some), tmp_path / "few.html").read_text()
    assert "Fewer than two pairs have 3 counted answers" in few
    assert "data:image/" not in few
    all_votes = [*some, *cast(apart, "first", "equal", "second")]
    page = write_result_page(folder, score_votes(survey, all_votes), tmp_path / "page.html").read_text()
    most, _, least = page.partition("Where people agreed most")[2].partition("Where people agreed least")
    assert re.findall(r"<b>(.*?)</b>", most) == ["DVAR 3 · equal 0 · baseline 0"]
    assert re.findall(r"<b>(.*?)</b>", least) == ["DVAR 1 · equal 1 · baseline 1"]


def test_raters_are_deleted_by_their_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, survey = build_small_survey(tmp_path)
    vote_on(folder, survey)
    votes = VoteStore(folder / VOTES_FILE, survey).load_votes()
    each = len(votes) // 3
    assert main(["survey", "forget", str(folder), "2", "9"]) == 2
    assert "has no 9" in capsys.readouterr().err
    assert main(["survey", "forget", str(folder), str(2**63)]) == 2
    assert f"has no {2**63}" in capsys.readouterr().err
    assert main(["survey", "forget", str(folder)]) == 2
    assert VoteStore(folder / VOTES_FILE, survey).load_votes() == votes
    capsys.readouterr()
    assert main(["survey", "forget", str(folder), "2", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"forgotten {number}: {each} answers" for number in (2, 3)]
    assert {vote.rater for vote in VoteStore(folder / VOTES_FILE, survey).load_votes()} == {"1 simulated 0"}


# Tables


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def select_one_row_per_task(table: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return one row of each task."""
    return list({frozenset((row["left"], row["right"])): row for row in table}.values())


def write_answers(path: Path, table: list[dict[str, str]], names: tuple[str, str, str], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(names)
        for worker in ("W1", "W2"):
            writer.writerows(
                [worker, row["ticket"], row["expected"] or "left"] for row in select_one_row_per_task(table)
            )
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
    folder, survey = build_small_survey(tmp_path)
    table = tmp_path / "tasks.csv"
    count = write_tasks(folder, table, "customization", "https://a.example/pictures/")
    listed = read_rows(table)
    assert count == len(listed)
    pairs = [row for row in listed if row["role"] == "pair"]
    assert len(pairs) == 2 * len(survey.select("customization", "pair"))
    assert {int(row["people"]) for row in pairs} == {5}
    sides = Counter((row["left"], row["right"]) for row in pairs)
    assert all(sides[right, left] == count for (left, right), count in sides.items()), "both sides are asked"
    assert all(row["left"].startswith("https://a.example/pictures/") for row in listed)
    assert all(row["description"].startswith("a photo of the object ") for row in listed)
    path = write_answers(tmp_path / "answers", listed, names, delimiter)
    answer_count = 2 * len(select_one_row_per_task(listed))
    assert import_answers(folder, path) == (answer_count, 0)
    assert import_answers(folder, path) == (0, answer_count), "read again, nothing is counted twice"
    counted = VoteStore(folder / VOTES_FILE, survey).load_votes()
    assert len(counted) == answer_count
    assert len({row["ticket"] for row in listed}) == len(listed)
    for vote in counted:
        if vote.task.role == "pair":
            assert vote.answer == vote.left_side, "left was answered"
        elif vote.task.role == "control":
            assert vote.answer == "first"


def test_tasks_for_a_file_that_cannot_be_written_leave_no_secret(tmp_path: Path) -> None:
    folder, _ = build_small_survey(tmp_path)
    (tmp_path / "file").touch()
    before = sorted(folder.iterdir())
    with pytest.raises(RefusedInput, match=r"output must be a file that can be written, and .*file is a file"):
        write_tasks(folder, tmp_path / "file" / "tasks.csv", "customization", "https://a.example")
    assert sorted(folder.iterdir()) == before
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "tasks.csv.part").mkdir()  # in the way of the file, as no look at the disk foresees
    with pytest.raises(OSError, match=r"tasks\.csv\.part"):
        write_tasks(folder, tmp_path / "taken" / "tasks.csv", "customization", "https://a.example")
    assert sorted(folder.iterdir()) == before
    assert write_tasks(folder, tmp_path / "new" / "tasks.csv", "customization", "https://a.example")


def test_neither_a_ticket_nor_its_row_reveals_the_role_of_a_task(tmp_path: Path) -> None:
    folder, survey = build_small_survey(tmp_path)
    tickets = dict[str, list[str]]()
    for secret in (KEY, "o" * 40):
        (tmp_path / "secret").write_text(secret)
        path = tmp_path / f"{secret}.csv"
        write_tasks(folder, path, "customization", "https://a.example", str(tmp_path / "secret"))
        tickets[secret] = [row["ticket"] for row in read_rows(path)]
        assert tickets[secret] == sorted(set(tickets[secret])), "in no order of roles"
        assert all(re.fullmatch("[0-9a-f]{32}", ticket) for ticket in tickets[secret])
    assert not set(tickets[KEY]) & set(tickets["o" * 40])
    assert not [task for task in survey.tasks if any(task.id in ticket for ticket in tickets[KEY])]


def test_an_odd_overlap_is_split_as_evenly_as_possible(tmp_path: Path) -> None:
    folder, survey = build_small_survey(tmp_path, overlap=3)
    write_tasks(folder, tmp_path / "tasks.csv", "reconstruction", "https://a.example")
    raters = [int(row["people"]) for row in read_rows(tmp_path / "tasks.csv") if row["role"] == "pair"]
    assert sorted(raters) == [1, 1, 2, 2] == sorted([1, 2] * len(survey.select("reconstruction", "pair")))


def test_a_table_with_wrong_rows_is_refused_as_a_whole(tmp_path: Path) -> None:
    folder, _ = build_small_survey(tmp_path)
    table = tmp_path / "tasks.csv"
    write_tasks(folder, table, "customization", "https://a.example")
    pairs = [row for row in read_rows(table) if row["role"] == "pair"]
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
        import_answers(folder, wrong)
    messages = refused.value.problems
    parts = ("line 3", "line 4", "line 5", "twice")
    assert [part in message for part, message in zip(parts, messages, strict=True)] == [True] * 4
    assert not (folder / VOTES_FILE).exists()
    (tmp_path / "none.csv").write_text("worker,answer\nW1,left\n")
    for name in ("none.csv", "missing.csv"):
        with pytest.raises(RefusedInput):
            import_answers(folder, tmp_path / name)
    with pytest.raises(RefusedInput, match="exists already"):
        write_tasks(folder, table, "customization", "https://a.example")


def test_a_table_that_contradicts_stored_votes_is_refused_as_a_whole(tmp_path: Path) -> None:
    folder, survey = build_small_survey(tmp_path)
    write_tasks(folder, tmp_path / "tasks.csv", "customization", "https://a.example")
    first, second = [
        row["ticket"] for row in select_one_row_per_task(read_rows(tmp_path / "tasks.csv")) if row["role"] == "pair"
    ][:2]
    path = tmp_path / "answers.csv"
    path.write_text(f"worker,ticket,answer\nW1,{first},left\n")
    assert import_answers(folder, path) == (1, 0)
    path.write_text(f"worker,ticket,answer\nW1,{second},left\nW1,{first},equal\n")
    with pytest.raises(RefusedInput, match="W1 answers a task twice"):
        import_answers(folder, path)
    assert len(VoteStore(folder / VOTES_FILE, survey).load_votes()) == 1


def test_a_table_from_a_spreadsheet_is_read(tmp_path: Path) -> None:
    folder, survey = build_small_survey(tmp_path)
    write_tasks(folder, tmp_path / "tasks.csv", "customization", "https://a.example")
    ticket = next(row["ticket"] for row in read_rows(tmp_path / "tasks.csv") if row["role"] == "pair")
    (tmp_path / "answers.csv").write_text(f"worker,ticket,answer\r\nW1, {ticket} ,Left \r\n", encoding="utf-8-sig")
    assert import_answers(folder, tmp_path / "answers.csv") == (1, 0)
    (vote,) = VoteStore(folder / VOTES_FILE, survey).load_votes()
    assert vote.answer == vote.left_side


def test_the_commands_sign_with_the_secret_of_the_survey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = build_small_survey(tmp_path)
    table = tmp_path / "tasks.csv"
    words = ["--question", "reconstruction", "--images_url", "https://a.example", "--output", str(table)]
    assert main(["survey", "export", str(folder), *words]) == 0
    path = write_answers(tmp_path / "answers.csv", read_rows(table), ("worker", "ticket", "answer"))
    assert main(["survey", "import", str(folder), str(path)]) == 0
    assert " new, 0 counted before" in capsys.readouterr().out
    assert read_secret(folder)
    assert not list((folder / IMAGE_FOLDER).glob("secret*"))


def test_no_cell_is_read_as_a_formula(tmp_path: Path) -> None:
    folder, _ = build_small_survey(tmp_path)
    plan = folder / "survey.json"
    plan.write_text(plan.read_text().replace("a photo of {} at night", "=HYPERLINK({})"))
    write_tasks(folder, tmp_path / "tasks.csv", "customization", "https://a.example")
    assert "'=HYPERLINK(the object)" in {row["description"] for row in read_rows(tmp_path / "tasks.csv")}


# Simulated raters


def test_a_simulated_rater_answers_with_the_stated_probabilities() -> None:
    survey = imagine_survey(["a"], concepts=1, prompts=1, config=SurveyBuildConfig())
    store = VoteStore(":memory:", survey)
    assignment = store.current_assignment(store.add_rater())
    assert assignment is not None
    generator = np.random.default_rng(0)
    answers = [SimulatedRater(0.7, left=0.3).answer(assignment, {}, generator) for _ in range(3000)]
    # A training task: right with 0.7, else at random, where left has 1.3 / 3, equal 1 / 3, right 0.7 / 3.
    right = assignment.task.expected
    assert right is not None
    blind = 1.3 if right == assignment.left_side else 0.7
    assert answers.count(right) / 3000 == pytest.approx(0.7 + 0.3 * blind / 3, abs=0.025)
    assert answers.count("equal") / 3000 == pytest.approx(0.1, abs=0.02)


def check_recovery(careful: int, careless: int, concepts: int) -> None:
    score, truth = simulate_table_2(careful=careful, careless=careless, concepts=concepts)
    assert [(row.method, row.question) for row in score.results] == list(TABLE_2)
    assert [rater.votes > 0 for rater in score.raters] == [True] * len(score.raters)
    assert len(score.excluded) == careless, "every careless rater fails, no careful one"
    for row in score.results:
        preferences = truth[row.method, row.question]
        assert preferences.share in row.share_interval
        assert preferences.better / (preferences.better + preferences.worse) in row.win_interval
        assert row.strength is not None
        assert (
            np.log(preferences.better / preferences.worse) in row.strength.interval or row.question == "customization"
        )
    assert 0.5 in score.left_interval
    errors_of_everyone = [abs(row.share - truth[row.method, row.question].share) for row in score.all_results]
    assert sum(errors_of_everyone) > sum(
        abs(row.share - truth[row.method, row.question].share) for row in score.results
    )


def test_the_intervals_hold_the_preferences_of_simulated_raters() -> None:
    check_recovery(careful=12, careless=4, concepts=4)


@pytest.mark.slow
def test_the_intervals_hold_the_preferences_of_fifty_simulated_raters() -> None:
    check_recovery(careful=40, careless=10, concepts=12)


@pytest.mark.slow
def test_table_2_is_reproduced_without_records_and_says_that_it_is_simulated(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra: pip install 'dvar[lab]'")
    assert main(["reproduce", "table2", "--records", str(tmp_path / "none"), "--output_dir", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "A simulation, not a finding" in page
    assert "The truth is inside 6 of 6 intervals." in page
    for share in TABLE_2.values():
        assert f">{100 * share:.1f}<" in page


def test_a_split_keeps_its_share() -> None:
    chances = split_share(0.6)
    assert sum(chances) == pytest.approx(1)
    assert chances.share == pytest.approx(0.6)
    assert chances.equal == pytest.approx(0.2)


def test_what_is_refused_or_only_read_leaves_no_secret_and_no_votes(tmp_path: Path) -> None:
    folder, _ = build_small_survey(tmp_path)
    before = sorted(folder.rglob("*"))
    (tmp_path / "answers.csv").write_text("ticket,worker,answer\nabc,ann,left\n")
    assert main(["survey", "import", str(folder), str(tmp_path / "answers.csv")]) == 2
    assert main(["survey", "forget", str(folder), "1"]) == 2
    words = ["--question", "reconstruction", "--images_url", "https://a.example", "--output", str(tmp_path)]
    assert main(["survey", "export", str(folder), *words]) == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["survey", "serve", str(folder), "--port", str(taken.getsockname()[1])]) == 2
    assert main(["survey", "score", str(folder), "--output", str(tmp_path / "score.html")]) == 0
    assert sorted(folder.rglob("*")) == before


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a device that never ends")
def test_a_table_that_never_ends_is_refused(tmp_path: Path) -> None:
    folder, _ = build_small_survey(tmp_path)
    write_tasks(folder, tmp_path / "tasks.csv", "customization", "https://a.example")
    with pytest.raises(RefusedInput, match="a device"):
        import_answers(folder, Path("/dev/zero"))


def test_a_survey_that_names_no_runs_is_read(tmp_path: Path) -> None:
    folder, survey = build_small_survey(tmp_path)
    content = json.loads((folder / "survey.json").read_text())
    del content["runs"]
    (folder / "survey.json").write_text(json.dumps(content))
    assert Survey.load(folder) == replace(survey, runs=())
