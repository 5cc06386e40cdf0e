"""The survey in a real browser, under load, and killed while serving: from the command to the votes in the file."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from fake_survey import build_small_survey

pytest.importorskip("uvicorn", reason="needs the extra: pip install 'dvar[survey]'")

from dvar.survey.survey import VOTES_FILE, Survey
from dvar.survey.vote_store import VoteStore

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed on this machine")
TIMEOUT = 120.0


@contextmanager
def serve_survey(folder: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Serve a survey in a process of its own; yield the process and its port."""
    program = f"from dvar.cli.main import main; main(['survey', 'serve', {str(folder)!r}, '--port', '{port}'])"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.match(r"survey    http://127\.0\.0\.1:(\d+)/$", line)
        assert match, line
        yield process, int(match[1])
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT)


class Visitor:
    """A client that keeps its cookie and presses buttons."""

    def __init__(self, port: int) -> None:
        self.port, self.cookie = port, ""

    def ask(self, method: str, path: str, body: dict[str, str] | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        headers = {"cookie": self.cookie, "content-type": "application/x-www-form-urlencoded"}
        try:
            connection.request(method, path, urlencode(body) if body else None, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        if cookie := answer.getheader("set-cookie"):
            self.cookie = cookie.partition(";")[0]
        return answer.status, text

    def page(self, path: str) -> tuple[dict[str, str], str]:
        status, text = self.ask("GET", path)
        assert status == 200, text
        first_form = text.partition("</form>")[0]
        hidden = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', first_form)
        return {name: unescape(value) for name, value in hidden}, text

    def begin(self) -> None:
        hidden, _ = self.page("/")
        assert self.ask("POST", "/join", {**hidden, "name": ""})[0] == 303

    def press(self, answer: str) -> int | None:
        """Answer the open task and return its number, None when all is done."""
        hidden, text = self.page("/task")
        if "Thank you" in text:
            return None
        status, text = self.ask("POST", "/vote", {**hidden, "answer": answer})
        assert status == 303, text
        return int(hidden["task"])


def press_in_turn(visitor: Visitor, presses: int) -> list[int]:
    """Press all three buttons in turn, so that training is passed; return the numbers of the acknowledged tasks."""
    numbers = []
    for turn in range(presses):
        number = visitor.press(("left", "right", "equal")[turn % 3])
        if number is None:
            break
        numbers.append(number)
    return numbers


def count_presses(store: VoteStore) -> Counter[int]:
    """Return the number of presses in the file for each assignment."""
    rows = store._connection.execute("select id, answer, misses from assignment").fetchall()
    return +Counter({row["id"]: row["misses"] + (row["answer"] is not None) for row in rows})


def test_fifty_raters_at_once_lose_and_duplicate_no_vote(tmp_path: Path) -> None:
    folder, survey = build_small_survey(tmp_path, overlap=100)
    faults: list[BaseException] = []
    acknowledged: list[int] = []

    with serve_survey(folder) as (_, port):

        def work() -> None:
            try:
                visitor = Visitor(port)
                visitor.begin()
                acknowledged.extend(press_in_turn(visitor, 8))
            except BaseException as error:
                faults.append(error)

        people = [threading.Thread(target=work) for _ in range(50)]
        for person in people:
            person.start()
        for person in people:
            person.join(TIMEOUT)
        assert not any(person.is_alive() for person in people)
    assert faults == []
    store = VoteStore(folder / VOTES_FILE, survey)
    votes = store.load_votes()
    assert len({vote.rater for vote in votes}) == 50
    assert max(Counter((vote.rater, vote.task.id) for vote in votes).values()) == 1
    assert Counter(acknowledged) == count_presses(store), "each acknowledged press once: a vote, or a miss in training"


def test_a_killed_server_has_stored_every_acknowledged_vote(tmp_path: Path) -> None:
    folder, survey = build_small_survey(tmp_path, overlap=100)
    visitors: list[Visitor] = []
    acknowledged: list[list[int]] = [[] for _ in range(4)]
    enough = threading.Event()

    with serve_survey(folder) as (process, port):

        def work(place: int) -> None:
            visitor = visitors[place]
            try:
                visitor.begin()
                for turn in range(1000):
                    number = visitor.press(("left", "right", "equal")[turn % 3])
                    if number is None:
                        break
                    acknowledged[place].append(number)
                    if len(acknowledged[place]) == 6:
                        enough.set()
            except (OSError, http.client.HTTPException):
                return  # the server has been killed

        visitors += [Visitor(port) for _ in range(4)]
        people = [threading.Thread(target=work, args=(place,)) for place in range(4)]
        for person in people:
            person.start()
        assert enough.wait(TIMEOUT)
        process.send_signal(signal.SIGKILL)
        for person in people:
            person.join(TIMEOUT)
    store = VoteStore(folder / VOTES_FILE, survey)
    presses = count_presses(store)
    for numbers in acknowledged:
        for number, times in Counter(numbers).items():
            assert presses[number] >= times, "every acknowledged press is in the file"
    assert store._connection.execute("pragma integrity_check").fetchone()[0] == "ok"
    with serve_survey(folder) as (_, port):
        returning = visitors[0]
        returning.port = port
        _, text = returning.page("/task")
        assert "recorded" in text or "of at most" in text, "the same cookie continues"


# In a browser


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        opened.new_context = _extend_timeout(opened.new_context)
        yield opened
        opened.close()


def _extend_timeout(new_context: Any) -> Any:
    def new_patient_context(**options: Any) -> Any:
        context = new_context(**options)
        context.set_default_timeout(500 * TIMEOUT)
        return context

    return new_patient_context


def find_right_key(page: Any, survey: Survey) -> str | None:
    """Return the key of the right answer, if the page shows a training or control task."""
    sources = [page.get_attribute(f"img[alt='{side} image']", "src") for side in ("Left", "Right")]
    left, right = (str(source).removeprefix("/pictures/").removesuffix(".png") for source in sources)
    for task in survey.tasks:
        if task.role != "pair" and {left, right} == {task.first, task.second}:
            return "0" if left == right else "1" if left == task.first else "2"
    return None


@needs_browser
@pytest.mark.parametrize("scripts", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["keys", "no scripts"])
def test_a_rater_completes_the_survey_in_a_browser(tmp_path: Path, browser: Any, scripts: bool) -> None:
    folder, survey = build_small_survey(tmp_path)
    buttons = {"1": "Left is better", "2": "Right is better", "0": "Equal"}
    with serve_survey(folder) as (_, port):
        context = browser.new_context(java_script_enabled=scripts, viewport={"width": 360, "height": 740})
        page = context.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_label("Your name").fill("Grace <b>")
        with page.expect_navigation():
            page.get_by_role("button", name="Begin").click()
        count = 0

        def answer(key: str) -> None:
            with page.expect_navigation():  # a click returns, and a key is lost, before the next page has loaded
                if scripts:
                    page.keyboard.press(key)
                else:
                    page.get_by_role("button", name=buttons[key]).click()

        while page.get_by_role("heading", name="Thank you").count() == 0:
            right = find_right_key(page, survey)
            if count == 0:
                answer(next(key for key in "120" if key != right))
                assert "Not quite" in str(page.get_by_role("status").text_content())
            if count == 2:
                open_task = page.get_attribute("input[name=task]", "value")
                page.go_back()
                page.reload()
                assert page.get_attribute("input[name=task]", "value") == open_task
            if count == 3:
                wide = "document.documentElement.scrollWidth"
                if scripts:
                    assert page.evaluate(wide) <= 360, "nothing overflows on a phone"
                store = page.get_by_role("button", name="Left is better").bounding_box()
                assert store["height"] >= 44, "large enough for a finger"
            answer(find_right_key(page, survey) or "1")
            count += 1
            assert count < 50
        context.close()
    assert problems == []
    votes = VoteStore(folder / VOTES_FILE, survey).load_votes()
    assert len(votes) == count
    assert {vote.rater for vote in votes} == {"1 Grace <b>"}
    assert all(vote.answer == vote.task.expected or vote.task.role == "pair" for vote in votes)
    assert all(vote.answer == vote.left_side for vote in votes if vote.task.role == "pair")
