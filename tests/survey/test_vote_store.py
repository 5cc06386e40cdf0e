"""The vote store: balanced sides, a different order for each rater, one vote each, nothing lost."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from dvar.survey.config import SurveyBuildConfig
from dvar.survey.simulated_votes import imagine_survey
from dvar.survey.survey import QUESTIONS, Survey
from dvar.survey.vote_store import IDLE_SECONDS, Assignment, VoteStore

SURVEY = imagine_survey(["method"], concepts=2, prompts=3, config=SurveyBuildConfig(overlap=3, control_every=3))


class Clock:
    """A clock that moves when it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def open_store(survey: Survey = SURVEY, clock: Clock | None = None) -> VoteStore:
    return VoteStore(":memory:", survey, clock or Clock())


def find_button(assignment: Assignment, answer: str | None) -> str:
    return next(button for button in ("left", "right", "equal") if assignment.answer_for(button) == answer)


def answer_all(store: VoteStore, rater: int, answer: str = "first") -> list[Assignment]:
    """Answer tasks correctly and pairs with `answer` until nothing is left; return the assignments."""
    assignments = []
    while (assignment := store.current_assignment(rater)) is not None:
        assignments.append(assignment)
        assert len(assignments) < 100
        outcome, _ = store.record_vote(
            rater, assignment.id, find_button(assignment, assignment.task.expected or answer)
        )
        assert outcome == "counted"
    return assignments


def test_for_each_question_a_rater_meets_training_then_every_pair_with_controls_among_them() -> None:
    store = open_store()
    rater = store.add_rater("Ada")
    assert store.progress(rater) == (0, sum(SURVEY.max_tasks(question) for question in QUESTIONS))
    seen = answer_all(store, rater)
    assert len({assignment.task.id for assignment in seen}) == len(seen)
    half = len(seen) // 2
    assert len({assignment.task.question for assignment in seen[:half]}) == 1, "one question after the other"
    for question in QUESTIONS:
        roles = [assignment.task.role for assignment in seen if assignment.task.question == question]
        assert Counter(roles) == {"training": 1, "pair": 6, "control": 3}
        assert roles[0] == "training"
    assert store.progress(rater) == (len(seen), len(seen))
    assert len(store.load_votes()) == len(seen)


def test_questions_and_orders_differ_between_raters() -> None:
    store = open_store()
    first, second = (answer_all(store, store.add_rater()) for _ in range(2))
    assert first[0].task.question != second[0].task.question
    pairs = [
        [s.task.id for s in seen if s.task.role == "pair" and s.task.question == "reconstruction"]
        for seen in (first, second)
    ]
    assert set(pairs[0]) == set(pairs[1])
    assert pairs[0] != pairs[1]


def test_orders_follow_from_the_seed_and_the_secret_together() -> None:
    survey = imagine_survey(["method"], concepts=4, prompts=5, config=SurveyBuildConfig(overlap=9, control_every=6))

    def roles(secret: str, seed: int = 0) -> list[list[str]]:
        store = VoteStore(":memory:", replace(survey, seed=seed), Clock(), secret)
        return [[assignment.task.role for assignment in answer_all(store, store.add_rater())] for _ in range(3)]

    assert roles("a") == roles("a")
    assert roles("a") != roles("b"), "who knows the seed does not know where the controls are"
    assert roles("a") != roles("a", seed=1)


def test_a_task_stays_until_it_is_answered() -> None:
    store = open_store()
    rater = store.add_rater()
    assert store.current_assignment(rater) == store.current_assignment(rater)


def test_every_pair_gets_its_overlap_and_no_more_with_sides_in_balance() -> None:
    store = open_store()
    for _ in range(5):
        answer_all(store, store.add_rater())
    votes = [vote for vote in store.load_votes() if vote.task.role == "pair"]
    assert set(Counter(vote.task.id for vote in votes).values()) == {SURVEY.overlap}
    sides = Counter((vote.task.id, vote.left_side) for vote in votes)
    for task in {vote.task.id for vote in votes}:
        assert abs(sides[task, "first"] - sides[task, "second"]) == 1, "three raters cannot be split more evenly"


def test_sides_stay_balanced_when_raters_are_deleted_and_no_number_is_used_again() -> None:
    store = open_store(replace(SURVEY, overlap=6))
    for number in range(1, 6):
        assert store.add_rater() == number
        answer_all(store, number)
    # Of five, two or three see an image on the left. Delete those of the rarer side: the next raters must see it.
    task = SURVEY.select("customization", "pair")[0].id
    sides = {int(vote.rater): vote.left_side for vote in store.load_votes() if vote.task.id == task}
    fewer = min(set(sides.values()), key=list(sides.values()).count)
    deleted = [rater for rater, side in sides.items() if side == fewer]
    for rater in deleted:
        assert store.delete_rater(rater) == sum(SURVEY.max_tasks(question) for question in QUESTIONS)
        assert store.rater_name(rater) is None
    assert store.delete_rater(deleted[0]) is None
    assert store.delete_rater(99) is None
    for number in (6, 7):
        assert store.add_rater() == number
        answer_all(store, number)
    after = Counter(vote.left_side for vote in store.load_votes() if vote.task.id == task)
    assert after[fewer] >= 2, after
    assert sum(after.values()) == 5
    assert store.delete_rater(7)
    assert store.add_rater() == 8, "the last number is not used again, either"
    assignment = store.current_assignment(8)
    assert assignment is not None
    assert store.delete_rater(8) == 0
    again = store.current_assignment(store.add_rater())
    assert again is not None
    assert again.id > assignment.id


def test_a_rater_who_comes_when_everything_is_answered_is_done_at_once() -> None:
    store = open_store()
    for _ in range(3):
        answer_all(store, store.add_rater())
    assert store.current_assignment(store.add_rater()) is None


def test_no_rater_is_asked_more_pairs_than_the_maximum() -> None:
    survey = replace(SURVEY, per_person=2)
    store = open_store(survey)
    seen = [
        assignment for assignment in answer_all(store, store.add_rater()) if assignment.task.question == "customization"
    ]
    assert Counter(assignment.task.role for assignment in seen) == {"training": 1, "pair": 2, "control": 1}


def test_the_pairs_with_the_fewest_answers_come_first() -> None:
    survey = replace(SURVEY, per_person=2)
    store = open_store(survey)
    for _ in range(3):
        answer_all(store, store.add_rater())
    raters_by_pair = Counter(vote.task.id for vote in store.load_votes() if vote.task.role == "pair")
    assert set(raters_by_pair.values()) == {1}, "three raters with two pairs of each question see all six of each"
    assert len(raters_by_pair) == 12


def test_the_seconds_of_an_answer_count_from_the_last_showing() -> None:
    clock = Clock()
    store = open_store(clock=clock)
    rater = store.add_rater()
    store.current_assignment(rater)
    clock.now += 3000
    assignment = store.current_assignment(rater)
    assert assignment is not None
    clock.now += 2
    store.record_vote(rater, assignment.id, find_button(assignment, assignment.task.expected))
    assert [vote.seconds for vote in store.load_votes()] == [2]


def test_a_transaction_that_fails_changes_nothing() -> None:
    store = open_store()
    rater = store.add_rater("Ada")

    def fail() -> None:
        with store._transaction() as db:
            db.execute("delete from worker")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert store.rater_name(rater) == "Ada"
    assert store.current_assignment(rater), "and the next transaction can write"


def test_a_task_left_open_is_offered_to_others_after_a_while_and_a_late_answer_still_counts() -> None:
    clock = Clock()
    survey = replace(SURVEY, overlap=1, per_person=1, tasks=tuple(t for t in SURVEY.tasks if t.role == "pair")[:1])
    store = open_store(survey, clock)
    slow, quick = store.add_rater(), store.add_rater()
    assignment = store.current_assignment(slow)
    assert assignment is not None
    assert store.current_assignment(quick) is None, "another rater has it open"
    clock.now += IDLE_SECONDS + 1
    other = store.current_assignment(quick)
    assert other is not None
    assert other.left_side != assignment.left_side
    assert store.record_vote(quick, other.id, "left")[0] == "counted"
    assert store.record_vote(slow, assignment.id, "left")[0] == "counted"
    assert {vote.seconds for vote in store.load_votes()} == {0.0, IDLE_SECONDS + 1}


def test_training_is_asked_again_until_it_is_right_and_the_misses_are_counted() -> None:
    store = open_store()
    rater = store.add_rater()
    assignment = store.current_assignment(rater)
    assert assignment is not None
    wrong = next(word for word in ("left", "right", "equal") if assignment.answer_for(word) != assignment.task.expected)
    assert (
        store.record_vote(rater, assignment.id, wrong)[0]
        == store.record_vote(rater, assignment.id, wrong)[0]
        == "again"
    )
    again = store.current_assignment(rater)
    assert again == replace(assignment, misses=2)
    assert store.record_vote(rater, assignment.id, find_button(assignment, assignment.task.expected))[0] == "counted"
    assert [vote.misses for vote in store.load_votes()] == [2]


def test_only_the_first_answer_counts() -> None:
    store = open_store(replace(SURVEY, tasks=SURVEY.select("customization", "pair")))
    rater = store.add_rater()
    assignment = store.current_assignment(rater)
    assert assignment is not None
    assert [store.record_vote(rater, assignment.id, word)[0] for word in ("left", "left", "right", "equal")] == [
        "counted",
        "repeated",
        "refused",
        "refused",
    ]
    assert [vote.answer for vote in store.load_votes()] == [assignment.left_side]


@pytest.mark.parametrize("button", ["", "first", "LEFT", "1", "'; drop table worker; --"])
def test_an_unknown_button_is_refused(button: str) -> None:
    store = open_store()
    rater = store.add_rater()
    assignment = store.current_assignment(rater)
    assert assignment is not None
    assert store.record_vote(rater, assignment.id, button)[0] == "refused"
    assert store.record_vote(rater + 1, assignment.id, "left") == ("refused", None), "and so is another rater's task"
    assert store.load_votes() == ()


def test_left_and_right_follow_the_sides_that_were_shown() -> None:
    task = SURVEY.select("customization", "pair")[0]
    first, second = Assignment(1, 1, task, "first", 0), Assignment(2, 2, task, "second", 0)
    assert first.image_ids == (task.first, task.second)
    assert second.image_ids == (task.second, task.first)
    assert [first.answer_for(button) for button in ("left", "right", "equal")] == ["first", "second", "equal"]
    assert [second.answer_for(button) for button in ("left", "right", "equal")] == ["second", "first", "equal"]


def test_raters_of_the_same_name_are_different_raters_and_a_name_is_only_text() -> None:
    store = open_store()
    for name in ("Ada", "Ada", "Robert'); drop table worker; --"):
        answer_all(store, store.add_rater(name), "equal")
    assert len({vote.rater for vote in store.load_votes()}) == 3


def test_the_file_has_one_row_for_a_rater_and_a_task_and_writes_through(tmp_path: Path) -> None:
    store = VoteStore(tmp_path / "votes.sqlite", SURVEY)
    store.current_assignment(store.add_rater())
    names = "worker, task, question, role, left_side, given"
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        store._connection.execute(f"insert into assignment ({names}) select {names} from assignment")
    settings = {
        name: store._connection.execute(f"pragma {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
    }
    assert settings == {"journal_mode": "wal", "synchronous": 2}, "2: a commit waits until it is on the disk"


def test_a_reader_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    store = VoteStore(tmp_path / "votes.sqlite", SURVEY)
    answer_all(store, store.add_rater())
    before = store.load_votes()
    with store._transaction() as db:
        db.execute("delete from worker")
        assert VoteStore(store.path, SURVEY).load_votes() == before


def test_many_threads_neither_lose_nor_duplicate_a_vote(tmp_path: Path) -> None:
    survey = replace(SURVEY, overlap=4)
    store = VoteStore(tmp_path / "votes.sqlite", survey)
    faults: list[BaseException] = []

    def work() -> None:
        try:
            answer_all(store, store.add_rater())
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    counts = Counter(vote.task.id for vote in store.load_votes() if vote.task.role == "pair")
    assert set(counts.values()) == {4}
    assert len(counts) == 12
    sides = Counter((vote.task.id, vote.left_side) for vote in store.load_votes() if vote.task.role == "pair")
    assert set(sides.values()) == {2}, "two on each side, whatever the order of arrival"
