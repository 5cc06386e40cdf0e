"""The pages of the survey: a rater's way through them without scripts, and a table of attacks that are all refused."""

from __future__ import annotations

import logging
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from socket import create_server
from typing import Any

import pytest
from fake_survey import build_small_survey

pytest.importorskip("starlette", reason="needs the extra: pip install 'dvar[survey]'")
import uvicorn
from starlette.testclient import TestClient

from dvar.errors import RefusedInput
from dvar.survey import server
from dvar.survey.config import SurveyExportConfig, SurveyServeConfig, problems
from dvar.survey.rate_limit import RateLimiter
from dvar.survey.scoring import Score, score_votes
from dvar.survey.secret import read_or_create_secret, read_secret
from dvar.survey.server import MAX_BODY, admin_token, create_app, serve_survey
from dvar.survey.survey import IMAGE_FOLDER, SECRET_FILE, VOTES_FILE, Survey
from dvar.survey.vote_store import Vote, VoteStore

KEY = "k" * 40
HOME = "http://127.0.0.1:8000"
NASTY = "<script>alert(1)</script>\"'>&lt;"


@dataclass
class Page(HTMLParser):
    """The text, elements and hidden fields of a page."""

    source: str
    text: str = ""
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    forms: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "form":
            self.forms[attributes.get("action") or ""] = {}
        elif tag == "input" and attributes.get("type") == "hidden":
            next(reversed(self.forms.values()))[str(attributes["name"])] = str(attributes["value"])

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def hidden(self) -> dict[str, str]:
        """The hidden fields of the page's first form."""
        return next(iter(self.forms.values()))


class Visitor:
    """A browser without scripts."""

    def __init__(self, app: Any) -> None:
        self.http = TestClient(app, base_url=HOME)

    def page(self, path: str = "/task") -> Page:
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return Page(answer.text)

    def begin(self, name: str = "Ada") -> Page:
        answer = self.http.post("/join", data={**self.page("/").hidden, "name": name})
        assert answer.status_code == 200
        return Page(answer.text)

    def send(self, path: str, page: Page, **fields: str) -> Any:
        """Press the button of the form that goes to a path."""
        return self.http.post(path, data={**page.forms[path], **fields}, follow_redirects=False)

    def progress(self) -> Page:
        """Open the progress page with its token."""
        page = Page(self.http.get("/admin").text)
        assert self.send("/admin", page, token=f" {admin_token(KEY)}").headers["location"] == "/admin"
        return self.page("/admin")

    def press(self, page: Page, answer: str) -> Any:
        return self.http.post("/vote", data={**page.hidden, "answer": answer}, follow_redirects=False)


@dataclass
class Place:
    folder: Path
    survey: Survey
    app: Any

    @property
    def store(self) -> VoteStore:
        return VoteStore(self.folder / VOTES_FILE, self.survey)

    @property
    def votes(self) -> tuple[Vote, ...]:
        return self.store.load_votes()

    @property
    def score(self) -> Score:
        return score_votes(self.survey, self.votes)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    folder, survey = build_small_survey(tmp_path)
    return Place(folder, survey, create_app(folder, survey, KEY))


def find_personal_link(page: Page) -> str:
    return next(str(f["href"]) for f in page.all("a") if str(f["href"]).startswith("/resume/"))


def read_stored_bytes(place: Place) -> bytes:
    """Return everything on disk about raters and answers."""
    return b"".join(path.read_bytes() for path in sorted(place.folder.glob(f"{VOTES_FILE}*")))


def find_right_button(place: Place, page: Page) -> str | None:
    """Return the right button of a training or control task, found by its images."""
    left = next(str(f["src"]) for f in page.all("img") if f.get("alt") == "Left image")
    right = next(str(f["src"]) for f in page.all("img") if f.get("alt") == "Right image")
    for task in place.survey.tasks:
        if task.role != "pair" and {left, right} == {f"/pictures/{task.first}.png", f"/pictures/{task.second}.png"}:
            if task.first == task.second:
                return "equal"
            return "left" if left == f"/pictures/{task.first}.png" else "right"
    return None


def test_a_rater_goes_from_the_first_page_to_the_last_without_scripts(place: Place) -> None:
    visitor = Visitor(place.app)
    page, seen = visitor.begin(), 0
    while "Thank you" not in page.text:
        answer = find_right_button(place, page) or "left"
        if seen == 0:
            wrong = next(word for word in ("left", "right", "equal") if word != answer)
            assert visitor.press(page, wrong).status_code == 303
            page = visitor.page()
            assert re.search("<title>Not quite. 1 of at most ", page.source)
            assert "Please answer again." in page.text
        response = visitor.press(page, answer)
        assert (response.status_code, response.headers["location"]) == (303, "/task")
        page, seen = visitor.page(), seen + 1
        if "Thank you" not in page.text:
            assert [f["value"] for f in page.all("progress")] == [f"{seen}"]
        assert seen < 50
    assert (
        seen
        == len(place.votes)
        == sum(place.survey.max_tasks(question) for question in ("reconstruction", "customization"))
    )
    assert f"Your {seen} answers are recorded" in page.text
    assert {vote.rater for vote in place.votes} == {"1 Ada"}


@pytest.mark.parametrize("error", [sqlite3.OperationalError("database or disk is full"), OSError(28, "No space left")])
def test_an_answer_that_cannot_be_saved_is_asked_for_again(
    place: Place, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = Visitor(place.app)
    page = visitor.begin()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(VoteStore, "record_vote", fail)
        answer = visitor.press(page, "left")
    assert answer.status_code == 503
    assert "The task stays open" in Page(answer.text).text
    (line,) = [record.getMessage() for record in caplog.records if record.name == "uvicorn.error"]
    assert line == f"POST /vote: {error}"
    assert not place.votes
    assert visitor.page().forms == page.forms


def test_reloading_going_back_and_another_tab_show_the_open_task(place: Place) -> None:
    visitor = Visitor(place.app)
    first = visitor.begin()
    assert visitor.page().hidden["task"] == first.hidden["task"] == visitor.page().hidden["task"]
    assert "Continue" in visitor.page("/").text
    assert visitor.press(first, find_right_button(place, first) or "left").status_code == 303
    assert visitor.press(first, find_right_button(place, first) or "left").status_code == 303, (
        "pressed twice, without harm"
    )
    assert len(place.votes) == 1
    assert visitor.page().hidden["task"] != first.hidden["task"]


def test_the_personal_link_continues_in_another_browser(place: Place) -> None:
    visitor = Visitor(place.app)
    page = visitor.begin()
    link = find_personal_link(page)
    elsewhere = Visitor(place.app)
    confirmation = elsewhere.page(link)
    assert "Continue as Ada?" in confirmation.text
    assert elsewhere.http.get("/task").url.path == "/", "following a link alone changes nothing"
    answer = elsewhere.http.post(link, data=confirmation.hidden)
    assert Page(answer.text).hidden["task"] == page.hidden["task"]
    assert visitor.http.get(link).url.path == "/task", "the rater continues at once"


def test_a_link_of_someone_else_does_not_change_the_visitor(place: Place) -> None:
    visitor, other = Visitor(place.app), Visitor(place.app)
    link, page = find_personal_link(visitor.begin()), other.begin("Eve")
    confirmation = other.page(link)
    assert other.page().hidden["task"] == page.hidden["task"]
    assert other.http.post(link, data={"ticket": page.hidden["ticket"]}).status_code == 403
    assert (
        other.http.post(link, data=confirmation.hidden, headers={"origin": "https://evil.example"}).status_code == 403
    )
    assert other.page().hidden["task"] == page.hidden["task"]


def test_a_rater_who_asks_for_it_is_deleted_and_nobody_else(place: Place) -> None:
    visitor, other = Visitor(place.app), Visitor(place.app)
    page = visitor.begin("Zerubbabel")
    other_page = other.begin("Other")
    for rater, task_page in ((visitor, page), (other, other_page)):
        assert rater.press(task_page, find_right_button(place, task_page) or "left").status_code == 303
    old_page, old_form, link = visitor.page(), visitor.page("/").hidden, find_personal_link(page)
    old_cookies = dict(visitor.http.cookies)
    confirmation = visitor.page("/forget")
    assert "your 1 answer will be deleted" in confirmation.text
    assert len(place.votes) == 2, "asking deletes nothing"
    assert b"Zerubbabel" in read_stored_bytes(place)
    response = visitor.http.post("/forget", data=confirmation.hidden)
    assert "Your name and your 1 answer have been deleted." in Page(response.text).text
    assert "deleted" not in visitor.page("/").text.partition("Your name (optional)")[0], "shown once"
    assert {vote.rater for vote in place.votes} == {"2 Other"}
    assert b"Zerubbabel" not in read_stored_bytes(place)
    # Neither the link nor an old cookie with an old form works now, and the number is not used again.
    assert visitor.http.get(link).status_code == 410
    assert visitor.http.post("/join", data=old_form).status_code == 403, "the old cookie is gone"
    new = visitor.begin("New")
    ghost = Visitor(place.app)
    ghost.http.cookies.update(old_cookies)
    assert ghost.press(old_page, "left").status_code == 403
    assert ghost.http.get("/task").url.path == "/"
    assert visitor.http.get(link).status_code == 410
    assert int(new.hidden["task"]) > int(old_page.hidden["task"])
    assert Visitor(place.app).http.get("/forget").url.path == "/", "a visitor who has not joined has nothing to delete"


def test_the_secret_decides_the_order_of_tasks(place: Place) -> None:
    def roles_shown(secret: str, folder: Path) -> list[list[str]]:
        store = server.SurveyPages(folder, place.survey, secret).store
        roles = list[list[str]]()
        for rater in [store.add_rater() for _ in range(6)]:
            roles.append([])
            while assignment := store.current_assignment(rater):
                roles[-1].append(assignment.task.role)
                for button in ("left", "right", "equal"):
                    store.record_vote(rater, assignment.id, button)
        return roles

    folders = [place.folder.parent / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    first, same, other = (
        roles_shown(secret, folder) for secret, folder in zip((KEY, KEY, "o" * 40), folders, strict=True)
    )
    assert first == same != other


def test_a_signature_is_for_one_purpose_only(place: Place) -> None:
    pages = server.SurveyPages(place.folder, place.survey, KEY)
    signed = {pages.signer(purpose).dumps(1) for purpose in ("worker", "ticket")}
    assert len(signed) == 2


def test_keys_can_be_turned_off_and_on(place: Place) -> None:
    visitor = Visitor(place.app)
    page = visitor.begin()
    for keys in (False, True):
        assert visitor.send("/keys", page).status_code == 303
        page = visitor.page()
        assert len(page.all("script")) == len(page.all("kbd")) / 3 == keys
        assert ("Turn the keys off" in page.text) == keys


def test_arrivals_from_one_address_are_limited_and_raters_continue(place: Place) -> None:
    app = create_app(place.folder, place.survey, KEY, limiter=RateLimiter(2))
    first, second, third = (Visitor(app) for _ in range(3))
    first.begin()
    second.begin()
    refused = third.send("/join", third.page("/"), name="Eve")
    assert refused.status_code == 429
    assert 3590 < int(refused.headers["retry-after"]) <= 3600
    assert "Please come back in an hour." in refused.text
    assert first.send("/join", first.page("/")).status_code == 303
    assert first.page().hidden
    assert third.http.get("/task").url.path == "/"
    unlimited = create_app(place.folder, place.survey, KEY)
    assert all(Visitor(unlimited).begin().hidden for _ in range(3))


def test_the_logging_of_the_process_stays_as_it_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    closed: list[str] = []
    handler = logging.NullHandler()
    monkeypatch.setattr(handler, "close", lambda: closed.append("closed"))
    serve_survey(place.folder, SurveyServeConfig(port=0), lambda _: None)
    assert not closed


@pytest.mark.parametrize(("public_url", "limit"), [(None, None), ("https://survey.example.org", 7)])
def test_a_public_survey_limits_arrivals(
    place: Place, monkeypatch: pytest.MonkeyPatch, public_url: Any, limit: Any
) -> None:
    limiters: list[Any] = []
    monkeypatch.setattr(server, "create_app", lambda *arguments: limiters.append(arguments[-1]))
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    lines: list[str] = []
    serve_survey(place.folder, SurveyServeConfig(port=0, public_url=public_url, joins_per_hour=7), lines.append)
    assert [limiter and limiter.limit for limiter in limiters] == [limit]
    token = admin_token(read_or_create_secret(place.folder))
    assert lines[-1] == f"token     {token}"
    assert not any(token in line for line in lines[:-1]), "in no address"


def test_a_name_keeps_printable_characters_only(place: Place) -> None:
    Visitor(place.app).begin("A\u202eda\x1b[31m  B\n\u0000" + "x" * 100)
    (name,) = place.store.raters_from("web")
    assert name == ("Ada[31m B " + "x" * 100)[:60]


def test_a_restarted_server_knows_every_rater(place: Place) -> None:
    visitor = Visitor(place.app)
    page = visitor.begin()
    visitor.http.app = create_app(place.folder, place.survey, KEY)
    again = Visitor(visitor.http.app)
    again.http.cookies = visitor.http.cookies
    assert again.page().hidden["task"] == page.hidden["task"]


def test_pages_can_be_used_with_a_screen_reader_and_a_keyboard(place: Place) -> None:
    visitor = Visitor(place.app)
    pages = [visitor.page("/"), Page(visitor.http.get("/admin").text), visitor.begin(), visitor.page("/forget")]
    pages += [Visitor(place.app).page(find_personal_link(pages[2]))]
    for page in pages:
        assert page.all("html")[0]["lang"] == "en"
        assert len(page.all("h1")) == 1
        assert len(page.all("main")) == 1
        assert all(image.get("alt") for image in page.all("img"))
        labelled = {label["for"] for label in page.all("label")}
        fields = [f for f in [*page.all("input"), *page.all("progress")] if f.get("type") != "hidden"]
        assert {item["id"] for item in fields} <= labelled
    titles = [re.findall("<title>(.*)</title>", page.source)[0] for page in pages]
    assert len(set(titles)) == len(titles), "every page has a title of its own"
    buttons = pages[2].all("button")[:3]
    assert [(button["value"], button["data-key"]) for button in buttons] == [
        ("left", "1"),
        ("right", "2"),
        ("equal", "0"),
    ]


def test_the_instructions_follow_the_order_of_appendix_g(place: Place) -> None:
    visitor, instructions = Visitor(place.app), dict[str, str]()
    page = visitor.begin()
    while "Thank you" not in page.text:
        instructions[re.findall("<h1[^>]*>(.*)</h1>", page.source)[0]] = page.text.partition("How to decide")[2]
        visitor.press(page, find_right_button(place, page) or "left")
        page = visitor.page()
    orders = {
        "Which image looks more like the reference object?": ["kind of thing", "shape", "colours", "patterns, parts"],
        "Which image fits the description better?": ["“something”", "Ignore the references", "this object", "equal"],
    }
    for question, words in orders.items():
        places = [instructions[question].index(word) for word in words]
        assert places == sorted(places)


def test_pages_name_no_method_no_run_and_no_path(place: Place) -> None:
    visitor = Visitor(place.app)
    page = visitor.begin()
    words = {"textual", "inversion", "stopped", "full", "dvar", "baseline", "control", str(place.folder), "mug"}
    for _ in range(8):
        # Signatures are random letters, which may spell a short word.
        tokens = [fields["ticket"] for fields in page.forms.values()] + [find_personal_link(page)]
        text = page.source.lower()
        for token in tokens:
            assert token.lower() in text
            text = text.replace(token.lower(), "")
        assert not [word for word in words if word.lower() in text]
        visitor.press(page, find_right_button(place, page) or "right")
        page = visitor.page()
    response = visitor.http.get(str(page.all("img")[0]["src"]))
    assert response.headers["content-type"] == "image/png"
    assert not {"last-modified", "etag"} & set(response.headers)


def test_names_and_prompts_are_shown_as_text_and_never_executed(place: Place) -> None:
    visitor, source = Visitor(place.app), ""
    page = visitor.begin(NASTY)
    while "Thank you" not in page.text:
        source += page.source
        assert [f.get("src") for f in page.all("script")] == ["/static/keys.js"]
        visitor.press(page, find_right_button(place, page) or "left")
        page = visitor.page()
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in source, "a scene of the survey"
    admin = visitor.progress()
    assert not admin.all("script")
    assert NASTY in admin.text


def test_the_progress_page_needs_its_token_and_shows_who_fails(place: Place) -> None:
    visitor = Visitor(place.app)
    page = visitor.begin("Careless")
    while "Thank you" not in page.text:
        right = find_right_button(place, page)
        visitor.press(page, "equal")
        if right not in (None, "equal"):
            visitor.press(page, str(right))  # of training; a control's second answer is refused
        page = visitor.page()
    assert visitor.http.get("/admin").status_code == 403
    other = Visitor(place.app)
    page = other.begin("Careful")
    while "Thank you" not in page.text:
        other.press(page, find_right_button(place, page) or "left")
        page = other.page()
    admin = visitor.progress()
    assert "Careless (excluded)" in admin.text
    assert "Careful (excluded)" not in admin.text
    assert "2 people, 16 of 80 answers to pairs" in admin.text
    for row in place.score.all_results:
        assert row.alpha is not None
        assert f"<td>{row.alpha:.2f}</td></tr>".replace("-", "−") in admin.source, "the agreement of each question"
    assert admin_token(KEY) not in admin.source


def test_the_progress_page_can_be_closed_in_every_browser_that_has_its_cookie(place: Place) -> None:
    visitor, copy = Visitor(place.app), Visitor(place.app)
    page = visitor.progress()
    for name, value in visitor.http.cookies.items():
        copy.http.cookies.set(name, value)
    assert copy.http.get("/admin").status_code == 200
    assert visitor.send("/admin/close", page).headers["location"] == "/admin"
    assert [browser.http.get("/admin").status_code for browser in (visitor, copy)] == [403, 403]


def test_the_progress_page_closes_by_itself_and_with_the_server(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    visitor = Visitor(place.app)
    visitor.progress()
    restarted = Visitor(create_app(place.folder, place.survey, KEY))
    restarted.http.cookies = visitor.http.cookies
    assert [browser.http.get("/admin").status_code for browser in (visitor, restarted)] == [200, 403]
    monkeypatch.setattr(server, "ADMIN_SECONDS", -1.0)
    late = Visitor(place.app)
    page = Page(late.http.get("/admin").text)
    assert late.send("/admin", page, token=admin_token(KEY)).status_code == 303
    assert late.http.get("/admin").status_code == 403


def test_wrong_tokens_are_limited_and_right_ones_wait_too(place: Place) -> None:
    visitor, statuses = Visitor(place.app), []
    for token in ["0" * 32] * (server.ADMIN_ATTEMPTS_PER_HOUR + 1) + [admin_token(KEY)]:
        page = Page(visitor.http.get("/admin").text)
        statuses.append(visitor.send("/admin", page, token=token).status_code)
    assert statuses == [403] * server.ADMIN_ATTEMPTS_PER_HOUR + [429, 429]


def test_forms_from_before_a_visitor_joined_do_not_count_after(place: Place) -> None:
    visitor = Visitor(place.app)
    before = visitor.page("/").hidden["ticket"]
    visitor.begin()
    assert visitor.page("/").hidden["ticket"] != before
    assert visitor.http.post("/join", data={"ticket": before, "name": "Eve"}).status_code == 403


def test_http_and_https_are_two_origins(place: Place) -> None:
    visitor = Visitor(create_app(place.folder, place.survey, KEY, "https://survey.example.org"))
    visitor.http.base_url = "https://survey.example.org"
    page = Page(visitor.http.get("/").text)
    for origin, status in (("http://survey.example.org", 403), ("https://survey.example.org", 303)):
        response = visitor.http.post("/join", data=page.hidden, headers={"origin": origin}, follow_redirects=False)
        assert response.status_code == status


def test_a_port_that_is_taken_is_refused_in_a_line(place: Place) -> None:
    with create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            RefusedInput, match=rf"^127.0.0.1, port {port} cannot be listened on \(.*\): choose another"
        ):
            serve_survey(place.folder, SurveyServeConfig(port=port))


# Attacks


def forge_ticket(place: Place, visitor: Visitor, page: Page) -> Any:
    fields = {**page.hidden, "answer": "left"}
    head, signature = fields["ticket"].rsplit(".", 1)
    return visitor.http.post("/vote", data={**fields, "ticket": f"{head}.{signature[::-1]}"})


def sign_with_another_key(place: Place, visitor: Visitor, page: Page) -> Any:
    evil = Visitor(create_app(place.folder, place.survey, "e" * 40))
    return visitor.http.post("/vote", data={**evil.begin().hidden, "task": page.hidden["task"], "answer": "left"})


def use_ticket_of_another(place: Place, visitor: Visitor, page: Page) -> Any:
    thief = Visitor(place.app)
    thief.begin("Thief")
    return thief.http.post("/vote", data={**page.hidden, "answer": "left"})


def use_ticket_for_another_task(place: Place, visitor: Visitor, page: Page) -> Any:
    return visitor.http.post("/vote", data={**page.hidden, "task": str(int(page.hidden["task"]) + 1), "answer": "left"})


def use_ticket_for_another_purpose(place: Place, visitor: Visitor, page: Page) -> Any:
    ticket = visitor.page("/").hidden["ticket"]
    return visitor.http.post("/vote", data={**page.hidden, "ticket": ticket, "answer": "left"})


def forge_cookie(place: Place, visitor: Visitor, page: Page) -> Any:
    thief = Visitor(place.app)
    thief.http.cookies.set("survey", "eyJ3b3JrZXIiOiAxfQ==.aaaaaa.bbbbbbbbbbbbbbbbbbbbbbbbbbb")
    return thief.http.post("/vote", data={**page.hidden, "answer": "left"})


def replay_vote(place: Place, visitor: Visitor, page: Page) -> Any:
    right = find_right_button(place, page) or "left"
    assert visitor.press(page, right).status_code == 303
    return visitor.press(page, "right" if right == "left" else "left")


def send_token(token: str) -> Callable[[Place, Visitor, Page], Any]:
    def attack(place: Place, visitor: Visitor, page: Page) -> Any:
        return visitor.send("/admin", Page(visitor.http.get("/admin").text), token=token)

    return attack


def press_unknown_button(place: Place, visitor: Visitor, page: Page) -> Any:
    return visitor.press(page, "first")


def post_request(path: str = "/vote", **request: Any) -> Callable[[Place, Visitor, Page], Any]:
    def attack(place: Place, visitor: Visitor, page: Page) -> Any:
        return visitor.http.post(path, **{"data": {**page.hidden, "answer": "left"}, **request})

    return attack


def fetch_page(path: str, **headers: str) -> Callable[[Place, Visitor, Page], Any]:
    return lambda place, visitor, page: visitor.http.get(path, headers=headers)


def send_endless_body(place: Place, visitor: Visitor, page: Page) -> Any:
    def parts() -> Any:
        for _ in range(100):
            yield b"x" * MAX_BODY

    return visitor.http.post("/vote", content=parts(), headers={"content-type": "application/x-www-form-urlencoded"})


FORM = {"content-type": "application/x-www-form-urlencoded"}
ATTACKS: dict[str, tuple[Callable[[Place, Visitor, Page], Any], set[int]]] = {
    "a forged ticket": (forge_ticket, {403}),
    "no ticket": (post_request(data={"task": "1", "answer": "left"}), {403}),
    "a ticket of another secret": (sign_with_another_key, {403}),
    "another person's ticket": (use_ticket_of_another, {403}),
    "a ticket of another task": (use_ticket_for_another_task, {403}),
    "a ticket of another purpose": (use_ticket_for_another_purpose, {403}),
    "a forged cookie": (forge_cookie, {403}),
    "an answer replayed with another button": (replay_vote, {409}),
    "a post from another site": (post_request(headers={"origin": "https://evil.example"}), {403}),
    "a post from a page without a site": (post_request(headers={"origin": "null"}), {403}),
    "a post that the browser calls cross-site": (post_request(headers={"sec-fetch-site": "cross-site"}), {403}),
    "joining from another site": (post_request("/join", headers={"origin": "https://evil.example"}), {403}),
    "joining without a ticket": (post_request("/join", data={"name": "Eve"}), {403}),
    "an answer that is not a button": (press_unknown_button, {409}),
    "an empty form": (post_request(data={}, headers=FORM), {403}),
    "a body that is too large": (post_request(content=b"a=" + b"x" * MAX_BODY, data=None, headers=FORM), {413}),
    "a body without end": (send_endless_body, {413}),
    "a thousand fields": (post_request(content=b"a=1&" * 900, data=None, headers=FORM), {400}),
    "bytes that are no text": (post_request(content=b"\xff\xfe=%ff", data=None, headers=FORM), {400}),
    "another kind of body": (post_request(json={"answer": "left"}, data=None), {415}),
    "a number that is none": (post_request(data={"task": "1e9", "answer": "left"}), {403}),
    "a number beyond all": (post_request(data={"task": "9" * 400, "answer": "left"}), {403}),
    "voting by a link": (fetch_page("/vote?answer=left"), {405}),
    "a path out of the pictures": (fetch_page("/pictures/..%2f..%2fsurvey.json"), {404}),
    "a path out, encoded twice": (fetch_page("/pictures/%252e%252e%252fsecret.png"), {404}),
    "the plan": (fetch_page("/pictures/../survey.json"), {404}),
    "the secret": (fetch_page("/static/..%2f..%2f..%2fsecret"), {404}),
    "the source": (fetch_page("/static/..%2fserver.py"), {404}),
    "the votes": (fetch_page("/votes.sqlite"), {404}),
    "a zero byte": (fetch_page("/pictures/a%00.png"), {404}),
    "a forged link of one's own": (fetch_page("/resume/MQ.AAAA"), {403}),
    "progress without a token": (fetch_page("/admin"), {403}),
    "progress with a token in an address": (fetch_page(f"/admin?token={admin_token(KEY)}"), {403}),
    "progress with a wrong token": (send_token("0" * 32), {403}),
    "progress with no token": (send_token(""), {403}),
    "progress with a token that is no ASCII": (send_token("é"), {403}),
    "progress from another site": (post_request("/admin", data={"token": admin_token(KEY)}), {403}),
    "deleting a rater from another site": (post_request("/forget", data={}, headers=FORM), {403}),
    "deleting a rater with the ticket of a vote": (post_request("/forget"), {403}),
    "turning keys off from another site": (post_request("/keys", data={}, headers=FORM), {403}),
    "a link with another number": (fetch_page("/resume/Mg.sN6GYKedNg0_wlLLJBeQt1OcWQI"), {403}),
    "another host's name": (fetch_page("/task", host="evil.example"), {400}),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_and_changes_nothing(place: Place, name: str) -> None:
    attack, statuses = ATTACKS[name]
    visitor = Visitor(place.app)
    page = visitor.begin()
    answer = attack(place, visitor, page)
    assert answer.status_code in statuses, answer.text
    allowed = 1 if name.startswith("an answer replayed") else 0
    assert len(place.votes) == allowed
    for word in ("Traceback", str(place.folder), KEY):
        assert word not in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_every_page_has_the_security_headers_and_a_protected_cookie(place: Place) -> None:
    visitor = Visitor(place.app)
    policy = {
        "default-src": "'none'",
        **dict.fromkeys(("img-src", "style-src", "script-src", "form-action"), "'self'"),
        **dict.fromkeys(("base-uri", "frame-ancestors"), "'none'"),
    }
    image = f"/pictures/{place.survey.image_ids[0]}.png"
    for path in ("/", "/static/survey.css", "/static/keys.js", image, "/nothing"):
        answer = visitor.http.get(path)
        assert answer.status_code == (404 if path == "/nothing" else 200)
        directives = (part.strip().partition(" ") for part in answer.headers["content-security-policy"].split(";"))
        assert {name: value for name, _, value in directives} == policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-robots-tag"] == "noindex"
        assert answer.headers["cache-control"] == ("private, max-age=86400, immutable" if path == image else "no-store")
        for name in ("referrer-policy", "cross-origin-opener-policy", "cross-origin-resource-policy"):
            assert answer.headers[name] == "same-origin"
    cookie = Visitor(place.app).http.get("/").headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    https = Visitor(create_app(place.folder, place.survey, KEY, "https://survey.example.org"))
    https.http.headers["host"] = "survey.example.org"
    cookie = https.http.get("/").headers["set-cookie"].lower()
    assert "secure" in cookie
    assert cookie.startswith("__host-survey=")
    assert "path=/;" in cookie
    assert "domain" not in cookie


def test_a_proxy_may_use_another_host_name(place: Place) -> None:
    visitor = Visitor(create_app(place.folder, place.survey, KEY, "http://survey.example.org"))
    page = visitor.page("/")
    for origin, status in (("http://survey.example.org", 303), ("http://survey.example", 403)):
        response = visitor.http.post("/join", data=page.hidden, headers={"origin": origin}, follow_redirects=False)
        assert response.status_code == status


def test_a_body_that_is_too_large_closes_the_connection(place: Place) -> None:
    answer = Visitor(place.app).http.post("/join", content=b"a=" + b"x" * MAX_BODY, headers=FORM)
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")


def test_the_secret_is_created_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    folder, _ = build_small_survey(tmp_path)
    with pytest.raises(RefusedInput, match="secret"):
        read_secret(folder)
    assert not (folder / SECRET_FILE).exists()
    secret = read_or_create_secret(folder)
    assert len(secret) >= 32
    assert read_or_create_secret(folder) == read_secret(folder) == secret
    assert (folder / SECRET_FILE).stat().st_mode & 0o077 == 0
    assert secret not in admin_token(secret)
    (tmp_path / "short").write_text("abc")
    for name in ("short", "missing"):
        with pytest.raises(RefusedInput, match=name):
            read_secret(tmp_path, str(tmp_path / name))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, []),
        ({"host": "::1"}, []),
        ({"host": "0.0.0.0"}, ["public_url", "secret_file"]),
        ({"host": "0.0.0.0", "public_url": "https://a.example"}, ["secret_file"]),
        ({"host": "0.0.0.0", "public_url": "https://a.example", "secret_file": "s"}, []),
        ({"public_url": "a.example"}, ["public_url"]),
        ({"public_url": "javascript:alert(1)"}, ["public_url"]),
        ({"public_url": "https://a.example/path"}, ["public_url"]),
        ({"public_url": "https://ann:secret@a.example"}, ["public_url"]),
        ({"public_url": "https://a.example:99999"}, ["public_url"]),
        ({"public_url": "https://a.example:port"}, ["public_url"]),
        ({"public_url": "https://[a.example"}, ["public_url"]),
        ({"port": 70000}, ["port"]),
        ({"joins_per_hour": -1}, ["joins_per_hour"]),
    ],
)
def test_other_machines_reach_the_survey_only_when_asked_for(settings: dict[str, Any], names: list[str]) -> None:
    assert [problem.split()[0] for problem in problems(SurveyServeConfig(**settings))] == names


def test_a_folder_without_a_survey_is_refused_before_the_server_listens(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match=r"survey\.json"):
        serve_survey(tmp_path, SurveyServeConfig())
    assert not (tmp_path / IMAGE_FOLDER).exists()


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "file:///x", "a.example", "https://ann:secret@a.example/p", "https://a.example/p?q"]
)
def test_images_are_loaded_from_an_address_of_the_web(url: str, tmp_path: Path) -> None:
    config = SurveyExportConfig(question="customization", images_url=url, output=str(tmp_path / "tasks.csv"))
    (problem,) = problems(config)
    assert problem.startswith(f"images_url must look like https://survey.example.org/pictures, got {url!r}: ")
