"""Who is shown what: sides in balance, everyone's order their own, one vote each, nothing lost on the way."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from dataclasses import replace

import pytest

from dvar.paper.simulated_votes import imagined
from dvar.survey.config import SurveyBuildConfig
from dvar.survey.survey import QUESTIONS, Survey
from dvar.survey.vote_store import IDLE, Assignment, VoteStore

SURVEY = imagined(["way"], concepts=2, prompts=3, config=SurveyBuildConfig(overlap=3, control_every=3))


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def ballots(survey: Survey = SURVEY, clock: Clock | None = None) -> VoteStore:
    return VoteStore(":memory:", survey, clock or Clock())


def press(shown: Assignment, answer: str) -> str:
    return next(word for word in ("left", "right", "equal") if shown.answer(word) == answer)


def through(box: VoteStore, worker: int, answer: str = "first") -> list[Assignment]:
    """Everything that a person is shown; they answer what has an answer rightly, and pairs with `answer`."""
    seen = []
    while (shown := box.current(worker)) is not None:
        seen.append(shown)
        assert len(seen) < 100
        outcome, _ = box.vote(worker, shown.id, press(shown, shown.task.expected or answer))
        assert outcome == "counted"
    return seen


def test_a_person_meets_training_then_every_pair_with_controls_among_them_under_each_question() -> None:
    box = ballots()
    worker = box.join("Ada")
    assert box.progress(worker) == (0, sum(SURVEY.longest(question) for question in QUESTIONS))
    seen = through(box, worker)
    assert len({shown.task.id for shown in seen}) == len(seen)
    half = len(seen) // 2
    assert len({shown.task.question for shown in seen[:half]}) == 1, "one question after the other"
    for question in QUESTIONS:
        roles = [shown.task.role for shown in seen if shown.task.question == question]
        assert Counter(roles) == {"training": 1, "pair": 6, "control": 3}
        assert roles[0] == "training"
    assert box.progress(worker) == (len(seen), len(seen))
    assert len(box.votes()) == len(seen)


def test_questions_and_orders_differ_between_people() -> None:
    box = ballots()
    first, second = (through(box, box.join()) for _ in range(2))
    assert first[0].task.question != second[0].task.question
    pairs = [
        [s.task.id for s in seen if s.task.role == "pair" and s.task.question == "reconstruction"]
        for seen in (first, second)
    ]
    assert set(pairs[0]) == set(pairs[1])
    assert pairs[0] != pairs[1]


def test_orders_follow_from_the_seed_and_the_secret_together() -> None:
    survey = imagined(["way"], concepts=4, prompts=5, config=SurveyBuildConfig(overlap=9, control_every=6))

    def roles(secret: str, **change: int) -> list[list[str]]:
        box = VoteStore(":memory:", replace(survey, **change), Clock(), secret)
        return [[shown.task.role for shown in through(box, box.join())] for _ in range(3)]

    assert roles("a") == roles("a")
    assert roles("a") != roles("b"), "who knows the seed does not know where the controls are"
    assert roles("a") != roles("a", seed=1)


def test_a_task_stays_until_it_is_answered() -> None:
    box = ballots()
    worker = box.join()
    assert box.current(worker) == box.current(worker)


def test_every_pair_gets_its_overlap_and_no_more_with_sides_in_balance() -> None:
    box = ballots()
    for _ in range(5):
        through(box, box.join())
    votes = [vote for vote in box.votes() if vote.task.role == "pair"]
    assert set(Counter(vote.task.id for vote in votes).values()) == {SURVEY.overlap}
    sides = Counter((vote.task.id, vote.left_side) for vote in votes)
    for task in {vote.task.id for vote in votes}:
        assert abs(sides[task, "first"] - sides[task, "second"]) == 1, "three people cannot be halved better"


def test_sides_stay_in_balance_when_someone_is_forgotten_and_no_number_is_given_again() -> None:
    box = ballots(replace(SURVEY, overlap=6))
    for number in range(1, 6):
        assert box.join() == number
        through(box, number)
    # Of five, two or three stand on a side. Take two of one side from some task: the next two must stand there.
    task = SURVEY.of("customization", "pair")[0].id
    sides = {int(vote.worker): vote.left_side for vote in box.votes() if vote.task.id == task}
    fewer = min(set(sides.values()), key=list(sides.values()).count)
    gone = [worker for worker, side in sides.items() if side == fewer]
    for worker in gone:
        assert box.forget(worker) == sum(SURVEY.longest(question) for question in QUESTIONS)
        assert box.name(worker) is None
    assert box.forget(gone[0]) is None
    assert box.forget(99) is None
    for number in (6, 7):
        assert box.join() == number
        through(box, number)
    after = Counter(vote.left_side for vote in box.votes() if vote.task.id == task)
    assert after[fewer] >= 2, after
    assert sum(after.values()) == 5
    assert box.forget(7)
    assert box.join() == 8, "the last number is not free again, either"
    shown = box.current(8)
    assert shown is not None
    assert box.forget(8) == 0
    again = box.current(box.join())
    assert again is not None
    assert again.id > shown.id


def test_who_comes_when_all_is_answered_is_done_at_once() -> None:
    box = ballots()
    for _ in range(3):
        through(box, box.join())
    assert box.current(box.join()) is None


def test_nobody_is_asked_more_pairs_than_agreed() -> None:
    survey = replace(SURVEY, per_person=2)
    box = ballots(survey)
    seen = [shown for shown in through(box, box.join()) if shown.task.question == "customization"]
    assert Counter(shown.task.role for shown in seen) == {"training": 1, "pair": 2, "control": 1}


def test_the_pairs_that_were_answered_least_come_first() -> None:
    survey = replace(SURVEY, per_person=2)
    box = ballots(survey)
    for _ in range(3):
        through(box, box.join())
    asked = Counter(vote.task.id for vote in box.votes() if vote.task.role == "pair")
    assert set(asked.values()) == {1}, "three people with two pairs of each question see all six of each"
    assert len(asked) == 12


def test_an_answer_takes_as_long_as_its_last_showing() -> None:
    clock = Clock()
    box = ballots(clock=clock)
    worker = box.join()
    for wait in (3000, 2):
        shown = box.current(worker)
        assert shown is not None
        clock.now += wait
    box.vote(worker, shown.id, press(shown, str(shown.task.expected)))
    assert [vote.seconds for vote in box.votes()] == [2]


def test_what_fails_on_the_way_changes_nothing() -> None:
    box = ballots()
    worker = box.join("Ada")

    def fail() -> None:
        with box._change() as db:
            db.execute("delete from worker")
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert box.name(worker) == "Ada"
    assert box.current(worker), "and the next may write"


def test_a_task_left_open_is_offered_to_others_after_a_while_and_a_late_answer_still_counts() -> None:
    clock = Clock()
    survey = replace(SURVEY, overlap=1, per_person=1, tasks=tuple(t for t in SURVEY.tasks if t.role == "pair")[:1])
    box = ballots(survey, clock)
    slow, quick = box.join(), box.join()
    shown = box.current(slow)
    assert shown is not None
    assert box.current(quick) is None, "someone is at it"
    clock.now += IDLE + 1
    other = box.current(quick)
    assert other is not None
    assert other.left_side != shown.left_side
    assert box.vote(quick, other.id, "left")[0] == "counted"
    assert box.vote(slow, shown.id, "left")[0] == "counted"
    assert {vote.seconds for vote in box.votes()} == {0.0, IDLE + 1}


def test_training_is_asked_again_until_it_is_right_and_the_misses_are_kept() -> None:
    box = ballots()
    worker = box.join()
    shown = box.current(worker)
    assert shown is not None
    wrong = next(word for word in ("left", "right", "equal") if shown.answer(word) != shown.task.expected)
    assert box.vote(worker, shown.id, wrong)[0] == box.vote(worker, shown.id, wrong)[0] == "again"
    again = box.current(worker)
    assert again == replace(shown, misses=2)
    assert box.vote(worker, shown.id, press(shown, str(shown.task.expected)))[0] == "counted"
    assert [vote.misses for vote in box.votes()] == [2]


def test_the_first_answer_counts() -> None:
    box = ballots(replace(SURVEY, tasks=SURVEY.of("customization", "pair")))
    worker = box.join()
    shown = box.current(worker)
    assert shown is not None
    assert [box.vote(worker, shown.id, word)[0] for word in ("left", "left", "right", "equal")] == [
        "counted",
        "repeated",
        "refused",
        "refused",
    ]
    assert [vote.answer for vote in box.votes()] == [shown.left_side]


@pytest.mark.parametrize("pressed", ["", "first", "LEFT", "1", "'; drop table worker; --"])
def test_a_word_that_is_no_button_is_refused(pressed: str) -> None:
    box = ballots()
    worker = box.join()
    shown = box.current(worker)
    assert shown is not None
    assert box.vote(worker, shown.id, pressed)[0] == "refused"
    assert box.vote(worker + 1, shown.id, "left") == ("refused", None), "and so is another person's task"
    assert box.votes() == ()


def test_left_and_right_are_what_was_shown() -> None:
    task = SURVEY.of("customization", "pair")[0]
    one, two = Assignment(1, 1, task, "first", 0), Assignment(2, 2, task, "second", 0)
    assert one.pictures == (task.first, task.second)
    assert two.pictures == (task.second, task.first)
    assert [one.answer(word) for word in ("left", "right", "equal")] == ["first", "second", "equal"]
    assert [two.answer(word) for word in ("left", "right", "equal")] == ["second", "first", "equal"]


def test_people_of_one_name_are_two_people_and_a_name_is_only_a_text() -> None:
    box = ballots()
    for name in ("Ada", "Ada", "Robert'); drop table worker; --"):
        through(box, box.join(name), "equal")
    assert len({vote.worker for vote in box.votes()}) == 3


def test_the_file_itself_has_one_place_for_a_person_and_a_task_and_writes_through(tmp_path) -> None:  # type: ignore[no-untyped-def]
    box = VoteStore(tmp_path / "votes.sqlite", SURVEY)
    box.current(box.join())
    names = "worker, task, question, role, left_side, given"
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        box._db.execute(f"insert into assignment ({names}) select {names} from assignment")
    settings = {name: box._db.execute(f"pragma {name}").fetchone()[0] for name in ("journal_mode", "synchronous")}
    assert settings == {"journal_mode": "wal", "synchronous": 2}, "2: a commit waits until it is on the disk"


def test_who_reads_waits_for_no_writer(tmp_path) -> None:  # type: ignore[no-untyped-def]
    box = VoteStore(tmp_path / "votes.sqlite", SURVEY)
    through(box, box.join())
    before = box.votes()
    with box._change() as db:
        db.execute("delete from worker")
        assert VoteStore(box.path, SURVEY).votes() == before


def test_many_threads_lose_and_double_nothing(tmp_path) -> None:  # type: ignore[no-untyped-def]
    survey = replace(SURVEY, overlap=4)
    box = VoteStore(tmp_path / "votes.sqlite", survey)
    faults: list[BaseException] = []

    def work() -> None:
        try:
            through(box, box.join())
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    counts = Counter(vote.task.id for vote in box.votes() if vote.task.role == "pair")
    assert set(counts.values()) == {4}
    assert len(counts) == 12
    sides = Counter((vote.task.id, vote.left_side) for vote in box.votes() if vote.task.role == "pair")
    assert set(sides.values()) == {2}, "two on each side, whoever came when"
