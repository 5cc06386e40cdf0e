"""The survey's pages: a person's way through them without scripts, and a table of attacks that are all refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_survey import small_survey

pytest.importorskip("starlette", reason="needs the extra: pip install 'dvar[survey]'")
from starlette.testclient import TestClient

from dvar.errors import RefusedInput
from dvar.survey import server
from dvar.survey.config import SurveyServeConfig, survey_problems
from dvar.survey.rate_limit import RateLimiter
from dvar.survey.scoring import Score, score
from dvar.survey.server import BODY, admin_token, application, read_secret, serve
from dvar.survey.survey import PICTURES, SECRET, VOTES, Survey
from dvar.survey.vote_store import VoteStore

KEY = "k" * 40
HOME = "http://127.0.0.1:8000"
NASTY = "<script>alert(1)</script>\"'>&lt;"


@dataclass
class Page(HTMLParser):
    """What a page holds: its text, elements and hidden fields."""

    source: str
    text: str = ""
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    forms: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.append((tag, given))
        if tag == "form":
            self.forms[given.get("action") or ""] = {}
        elif tag == "input" and given.get("type") == "hidden":
            next(reversed(self.forms.values()))[str(given["name"])] = str(given["value"])

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag]

    @property
    def hidden(self) -> dict[str, str]:
        """The hidden fields of the page's first form."""
        return next(iter(self.forms.values()))


class Someone:
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
        """Press the button of the page's form that goes to a path."""
        return self.http.post(path, data={**page.forms[path], **fields}, follow_redirects=False)

    def progress(self) -> Page:
        """The page of progress, opened with its token."""
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
    def ballots(self) -> VoteStore:
        return VoteStore(self.folder / VOTES, self.survey)

    @property
    def votes(self) -> tuple[Any, ...]:
        return self.ballots.votes()

    @property
    def scored(self) -> Score:
        return score(self.survey, self.votes)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    folder, survey = small_survey(tmp_path)
    return Place(folder, survey, application(folder, survey, KEY))


def own_link(page: Page) -> str:
    return next(str(f["href"]) for f in page.of("a") if str(f["href"]).startswith("/resume/"))


def kept(place: Place) -> bytes:
    """All bytes on the disk of what people answered."""
    return b"".join(path.read_bytes() for path in sorted(place.folder.glob(f"{VOTES}*")))


def expected(place: Place, page: Page) -> str | None:
    """The right button of a training or control task, as its pictures tell."""
    left = next(str(f["src"]) for f in page.of("img") if f.get("alt") == "Left picture")
    right = next(str(f["src"]) for f in page.of("img") if f.get("alt") == "Right picture")
    for task in place.survey.tasks:
        if task.role != "pair" and {left, right} == {f"/pictures/{task.first}.png", f"/pictures/{task.second}.png"}:
            if task.first == task.second:
                return "equal"
            return "left" if left == f"/pictures/{task.first}.png" else "right"
    return None


def test_a_person_goes_from_the_first_page_to_thanks_without_scripts(place: Place) -> None:
    someone = Someone(place.app)
    page, seen = someone.begin(), 0
    while "Thank you" not in page.text:
        answer = expected(place, page) or "left"
        if seen == 0:
            wrong = next(word for word in ("left", "right", "equal") if word != answer)
            assert someone.press(page, wrong).status_code == 303
            page = someone.page()
            assert re.search("<title>Not quite. 1 of at most ", page.source)
            assert "Please answer again." in page.text
        told = someone.press(page, answer)
        assert (told.status_code, told.headers["location"]) == (303, "/task")
        page, seen = someone.page(), seen + 1
        if "Thank you" not in page.text:
            assert [f["value"] for f in page.of("progress")] == [f"{seen}"]
        assert seen < 50
    assert (
        seen
        == len(place.votes)
        == sum(place.survey.longest(question) for question in ("reconstruction", "customization"))
    )
    assert f"Your {seen} answers are recorded" in page.text
    assert {vote.worker for vote in place.votes} == {"1 Ada"}


def test_reload_back_and_another_tab_show_the_task_that_is_open(place: Place) -> None:
    someone = Someone(place.app)
    first = someone.begin()
    assert someone.page().hidden["task"] == first.hidden["task"] == someone.page().hidden["task"]
    assert "Go on" in someone.page("/").text
    assert someone.press(first, expected(place, first) or "left").status_code == 303
    assert someone.press(first, expected(place, first) or "left").status_code == 303, "pressed twice: no harm"
    assert len(place.votes) == 1
    assert someone.page().hidden["task"] != first.hidden["task"]


def test_the_own_link_goes_on_in_another_browser(place: Place) -> None:
    someone = Someone(place.app)
    page = someone.begin()
    link = own_link(page)
    elsewhere = Someone(place.app)
    asked = elsewhere.page(link)
    assert "Go on as Ada?" in asked.text
    assert elsewhere.http.get("/task").url.path == "/", "a link alone makes nobody of anyone"
    answer = elsewhere.http.post(link, data=asked.hidden)
    assert Page(answer.text).hidden["task"] == page.hidden["task"]
    assert someone.http.get(link).url.path == "/task", "who it is goes on at once"


def test_a_link_of_someone_else_takes_nothing_from_who_opens_it(place: Place) -> None:
    someone, other = Someone(place.app), Someone(place.app)
    link, page = own_link(someone.begin()), other.begin("Eve")
    asked = other.page(link)
    assert other.page().hidden["task"] == page.hidden["task"]
    assert other.http.post(link, data={"ticket": page.hidden["ticket"]}).status_code == 403
    assert other.http.post(link, data=asked.hidden, headers={"origin": "https://evil.example"}).status_code == 403
    assert other.page().hidden["task"] == page.hidden["task"]


def test_who_wants_is_forgotten_and_nobody_else(place: Place) -> None:
    someone, other = Someone(place.app), Someone(place.app)
    page = someone.begin("Zerubbabel")
    other_page = other.begin("Other")
    for visitor, shown in ((someone, page), (other, other_page)):
        assert visitor.press(shown, expected(place, shown) or "left").status_code == 303
    old_page, old_form, link = someone.page(), someone.page("/").hidden, own_link(page)
    old_cookies = dict(someone.http.cookies)
    asked = someone.page("/forget")
    assert "your 1 answer will be deleted" in asked.text
    assert len(place.votes) == 2, "asking deletes nothing"
    assert b"Zerubbabel" in kept(place)
    told = someone.http.post("/forget", data=asked.hidden)
    assert "Your name and your 1 answer are deleted." in Page(told.text).text
    assert "deleted" not in someone.page("/").text.partition("A name")[0], "said once"
    assert {vote.worker for vote in place.votes} == {"2 Other"}
    assert b"Zerubbabel" not in kept(place)
    # Neither the link nor an old cookie with an old form is anyone's now, and nobody gets the number.
    assert someone.http.get(link).status_code == 410
    assert someone.http.post("/join", data=old_form).status_code == 403, "nothing of the old cookie is left"
    new = someone.begin("New")
    ghost = Someone(place.app)
    ghost.http.cookies.update(old_cookies)
    assert ghost.press(old_page, "left").status_code == 403
    assert ghost.http.get("/task").url.path == "/"
    assert someone.http.get(link).status_code == 410
    assert int(new.hidden["task"]) > int(old_page.hidden["task"])
    assert Someone(place.app).http.get("/forget").url.path == "/", "who is nobody has nothing to delete"


def test_the_secret_decides_who_is_shown_what(place: Place) -> None:
    def roles(secret: str, folder: Path) -> list[list[str]]:
        box = server.SurveyPages(folder, place.survey, secret).ballots
        found = []
        for worker in [box.join() for _ in range(6)]:
            found.append([])
            while shown := box.current(worker):
                found[-1].append(shown.task.role)
                for word in ("left", "right", "equal"):
                    box.vote(worker, shown.id, word)
        return found

    folders = [place.folder.parent / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    one, same, other = (roles(secret, folder) for secret, folder in zip((KEY, KEY, "o" * 40), folders, strict=True))
    assert one == same != other


def test_what_is_signed_for_one_purpose_is_signed_for_no_other(place: Place) -> None:
    pages = server.SurveyPages(place.folder, place.survey, KEY)
    signed = {pages.signer(purpose).dumps(1) for purpose in ("worker", "ticket")}
    assert len(signed) == 2


def test_keys_can_be_turned_off_and_on(place: Place) -> None:
    someone = Someone(place.app)
    page = someone.begin()
    for keys in (False, True):
        assert someone.send("/keys", page).status_code == 303
        page = someone.page()
        assert len(page.of("script")) == len(page.of("kbd")) / 3 == keys
        assert ("Turn the keys off" in page.text) == keys


def test_one_address_sends_only_so_many_people_and_who_is_in_goes_on(place: Place) -> None:
    app = application(place.folder, place.survey, KEY, door=RateLimiter(2))
    first, second, third = (Someone(app) for _ in range(3))
    first.begin()
    second.begin()
    refused = third.send("/join", third.page("/"), name="Eve")
    assert refused.status_code == 429
    assert 3590 < int(refused.headers["retry-after"]) <= 3600
    assert "come back within the hour" in refused.text
    assert first.send("/join", first.page("/")).status_code == 303
    assert first.page().hidden
    assert third.http.get("/task").url.path == "/"
    unlimited = application(place.folder, place.survey, KEY)
    assert all(Someone(unlimited).begin().hidden for _ in range(3))


@pytest.mark.parametrize(("public_url", "most"), [(None, None), ("https://survey.example.org", 7)])
def test_a_public_survey_has_a_door(place: Place, monkeypatch: pytest.MonkeyPatch, public_url: Any, most: Any) -> None:
    given: list[Any] = []
    monkeypatch.setattr(server, "application", lambda *parts: given.append(parts[-1]))
    monkeypatch.setattr(server.uvicorn.Server, "run", lambda *_, **__: None)
    said: list[str] = []
    serve(place.folder, SurveyServeConfig(port=0, public_url=public_url, joins_per_hour=7), said.append)
    assert [door and door.most for door in given] == [most]
    token = admin_token(read_secret(place.folder))
    assert said[-1] == f"token     {token}"
    assert not any(token in line for line in said[:-1]), "in no address"


def test_a_name_has_no_signs_that_cannot_be_seen(place: Place) -> None:
    Someone(place.app).begin("A\u202eda\x1b[31m  B\n\u0000" + "x" * 100)
    (name,) = place.ballots.known("web")
    assert name == ("Ada[31m B " + "x" * 100)[:60]


def test_a_restarted_server_knows_everyone(place: Place) -> None:
    someone = Someone(place.app)
    page = someone.begin()
    someone.http.app = application(place.folder, place.survey, KEY)  # type: ignore[assignment]
    again = Someone(someone.http.app)
    again.http.cookies = someone.http.cookies
    assert again.page().hidden["task"] == page.hidden["task"]


def test_pages_have_what_a_screen_reader_and_a_keyboard_need(place: Place) -> None:
    someone = Someone(place.app)
    pages = [someone.page("/"), Page(someone.http.get("/admin").text), someone.begin(), someone.page("/forget")]
    pages += [Someone(place.app).page(own_link(pages[2]))]
    for page in pages:
        assert page.of("html")[0]["lang"] == "en"
        assert len(page.of("h1")) == 1
        assert len(page.of("main")) == 1
        assert all(found.get("alt") for found in page.of("img"))
        named = {found["for"] for found in page.of("label")}
        fields = [f for f in [*page.of("input"), *page.of("progress")] if f.get("type") != "hidden"]
        assert {found["id"] for found in fields} <= named
    titles = [re.findall("<title>(.*)</title>", page.source)[0] for page in pages]
    assert len(set(titles)) == len(titles), "every page says at once which it is"
    buttons = pages[2].of("button")[:3]
    assert [(found["value"], found["data-key"]) for found in buttons] == [("left", "1"), ("right", "2"), ("equal", "0")]


def test_the_instructions_decide_in_the_order_of_appendix_g(place: Place) -> None:
    someone, told = Someone(place.app), dict[str, str]()
    page = someone.begin()
    while "Thank you" not in page.text:
        told[re.findall("<h1[^>]*>(.*)</h1>", page.source)[0]] = page.text.partition("How to decide")[2]
        someone.press(page, expected(place, page) or "left")
        page = someone.page()
    orders = {
        "Which picture looks more like the reference object?": ["kind of thing", "shape", "colours", "patterns, parts"],
        "Which picture fits the description better?": ["“something”", "Forget the references", "this object", "equal"],
    }
    for asks, words in orders.items():
        places = [told[asks].index(word) for word in words]
        assert places == sorted(places)


def test_pages_name_no_method_no_rival_and_no_path(place: Place) -> None:
    someone = Someone(place.app)
    page = someone.begin()
    words = {"textual", "inversion", "stopped", "full", "dvar", "baseline", "control", str(place.folder), "mug"}
    for _ in range(8):
        low = page.source.lower()
        assert not [word for word in words if word.lower() in low]
        someone.press(page, expected(place, page) or "right")
        page = someone.page()
    picture = someone.http.get(str(page.of("img")[0]["src"]))
    assert picture.headers["content-type"] == "image/png"
    assert not {"last-modified", "etag"} & set(picture.headers)


def test_what_people_and_prompts_say_is_shown_and_never_carried_out(place: Place) -> None:
    someone, shown = Someone(place.app), ""
    page = someone.begin(NASTY)
    while "Thank you" not in page.text:
        shown += page.source
        assert [f.get("src") for f in page.of("script")] == ["/static/keys.js"]
        someone.press(page, expected(place, page) or "left")
        page = someone.page()
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in shown, "a scene of the survey"
    admin = someone.progress()
    assert not admin.of("script")
    assert NASTY in admin.text


def test_the_page_of_progress_needs_its_token_and_tells_who_fails(place: Place) -> None:
    someone = Someone(place.app)
    page = someone.begin("Careless")
    while "Thank you" not in page.text:
        right = expected(place, page)
        someone.press(page, "equal")
        if right not in (None, "equal"):
            someone.press(page, str(right))  # of training; a control's second answer is refused
        page = someone.page()
    assert someone.http.get("/admin").status_code == 403
    other = Someone(place.app)
    page = other.begin("Careful")
    while "Thank you" not in page.text:
        other.press(page, expected(place, page) or "left")
        page = other.page()
    admin = someone.progress()
    assert "Careless (left out)" in admin.text
    assert "Careful (left out)" not in admin.text
    assert "2 people, 16 answers to pairs of 80 wanted" in admin.text
    for row in place.scored.before:
        assert row.alpha is not None
        assert f"<td>{row.alpha:.2f}</td></tr>".replace("-", "−") in admin.source, "the agreement of each question"
    assert admin_token(KEY) not in admin.source


# Attacks


def forged(place: Place, someone: Someone, page: Page) -> Any:
    fields = {**page.hidden, "answer": "left"}
    head, signature = fields["ticket"].rsplit(".", 1)
    return someone.http.post("/vote", data={**fields, "ticket": f"{head}.{signature[::-1]}"})


def other_key(place: Place, someone: Someone, page: Page) -> Any:
    evil = Someone(application(place.folder, place.survey, "e" * 40))
    return someone.http.post("/vote", data={**evil.begin().hidden, "task": page.hidden["task"], "answer": "left"})


def other_person(place: Place, someone: Someone, page: Page) -> Any:
    thief = Someone(place.app)
    thief.begin("Thief")
    return thief.http.post("/vote", data={**page.hidden, "answer": "left"})


def other_task(place: Place, someone: Someone, page: Page) -> Any:
    return someone.http.post("/vote", data={**page.hidden, "task": str(int(page.hidden["task"]) + 1), "answer": "left"})


def other_purpose(place: Place, someone: Someone, page: Page) -> Any:
    ticket = someone.page("/").hidden["ticket"]
    return someone.http.post("/vote", data={**page.hidden, "ticket": ticket, "answer": "left"})


def forged_cookie(place: Place, someone: Someone, page: Page) -> Any:
    thief = Someone(place.app)
    thief.http.cookies.set("survey", "eyJ3b3JrZXIiOiAxfQ==.aaaaaa.bbbbbbbbbbbbbbbbbbbbbbbbbbb")
    return thief.http.post("/vote", data={**page.hidden, "answer": "left"})


def replayed(place: Place, someone: Someone, page: Page) -> Any:
    right = expected(place, page) or "left"
    assert someone.press(page, right).status_code == 303
    return someone.press(page, "right" if right == "left" else "left")


def wrong_token(token: str) -> Callable[[Place, Someone, Page], Any]:
    def attack(place: Place, someone: Someone, page: Page) -> Any:
        return someone.send("/admin", Page(someone.http.get("/admin").text), token=token)

    return attack


def no_button(place: Place, someone: Someone, page: Page) -> Any:
    return someone.press(page, "first")


def posted(path: str = "/vote", **request: Any) -> Callable[[Place, Someone, Page], Any]:
    def attack(place: Place, someone: Someone, page: Page) -> Any:
        given = {"data": {**page.hidden, "answer": "left"}, **request}
        return someone.http.post(path, **given)

    return attack


def fetched(path: str, **headers: str) -> Callable[[Place, Someone, Page], Any]:
    return lambda place, someone, page: someone.http.get(path, headers=headers)


def endless(place: Place, someone: Someone, page: Page) -> Any:
    def parts() -> Any:
        for _ in range(100):
            yield b"x" * BODY

    return someone.http.post("/vote", content=parts(), headers={"content-type": "application/x-www-form-urlencoded"})


FORM = {"content-type": "application/x-www-form-urlencoded"}
ATTACKS: dict[str, tuple[Callable[[Place, Someone, Page], Any], set[int]]] = {
    "a forged ticket": (forged, {403}),
    "no ticket": (posted(data={"task": "1", "answer": "left"}), {403}),
    "a ticket of another secret": (other_key, {403}),
    "another person's ticket": (other_person, {403}),
    "a ticket of another task": (other_task, {403}),
    "a ticket of another purpose": (other_purpose, {403}),
    "a forged cookie": (forged_cookie, {403}),
    "an answer replayed with another word": (replayed, {409}),
    "a post from another site": (posted(headers={"origin": "https://evil.example"}), {403}),
    "a post from a page without a site": (posted(headers={"origin": "null"}), {403}),
    "a post that the browser calls cross-site": (posted(headers={"sec-fetch-site": "cross-site"}), {403}),
    "joining from another site": (posted("/join", headers={"origin": "https://evil.example"}), {403}),
    "joining without a ticket": (posted("/join", data={"name": "Eve"}), {403}),
    "an answer that is no button": (no_button, {409}),
    "an empty form": (posted(data={}, headers=FORM), {403}),
    "a body that is too large": (posted(content=b"a=" + b"x" * BODY, data=None, headers=FORM), {413}),
    "a body without end": (endless, {413}),
    "a thousand fields": (posted(content=b"a=1&" * 900, data=None, headers=FORM), {400}),
    "bytes that are no text": (posted(content=b"\xff\xfe=%ff", data=None, headers=FORM), {400}),
    "another kind of body": (posted(json={"answer": "left"}, data=None), {415}),
    "a number that is none": (posted(data={"task": "1e9", "answer": "left"}), {403}),
    "a number beyond all": (posted(data={"task": "9" * 400, "answer": "left"}), {403}),
    "voting by a link": (fetched("/vote?answer=left"), {405}),
    "a path out of the pictures": (fetched("/pictures/..%2f..%2fsurvey.json"), {404}),
    "a path out, encoded twice": (fetched("/pictures/%252e%252e%252fsecret.png"), {404}),
    "the plan": (fetched("/pictures/../survey.json"), {404}),
    "the secret": (fetched("/static/..%2f..%2f..%2fsecret"), {404}),
    "the source": (fetched("/static/..%2fserver.py"), {404}),
    "the votes": (fetched("/votes.sqlite"), {404}),
    "a zero byte": (fetched("/pictures/a%00.png"), {404}),
    "a forged link of one's own": (fetched("/resume/MQ.AAAA"), {403}),
    "progress without a token": (fetched("/admin"), {403}),
    "progress with a token in an address": (fetched(f"/admin?token={admin_token(KEY)}"), {403}),
    "progress with a wrong token": (wrong_token("0" * 32), {403}),
    "progress with no token": (wrong_token(""), {403}),
    "progress with a token that is no ASCII": (wrong_token("é"), {403}),
    "progress from another site": (posted("/admin", data={"token": admin_token(KEY)}), {403}),
    "forgetting someone from another site": (posted("/forget", data={}, headers=FORM), {403}),
    "forgetting someone with the ticket of a vote": (posted("/forget"), {403}),
    "turning keys off from another site": (posted("/keys", data={}, headers=FORM), {403}),
    "a link with another number": (fetched("/resume/Mg.sN6GYKedNg0_wlLLJBeQt1OcWQI"), {403}),
    "another host's name": (fetched("/task", host="evil.example"), {400}),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_and_changes_nothing(place: Place, name: str) -> None:
    attack, statuses = ATTACKS[name]
    someone = Someone(place.app)
    page = someone.begin()
    answer = attack(place, someone, page)
    assert answer.status_code in statuses, answer.text
    allowed = 1 if name.startswith("an answer replayed") else 0
    assert len(place.votes) == allowed
    for word in ("Traceback", str(place.folder), KEY):
        assert word not in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_every_page_has_the_headers_and_the_cookie_is_out_of_reach(place: Place) -> None:
    someone = Someone(place.app)
    policy = {
        "default-src": "'none'",
        **dict.fromkeys(("img-src", "style-src", "script-src", "form-action"), "'self'"),
        **dict.fromkeys(("base-uri", "frame-ancestors"), "'none'"),
    }
    picture = f"/pictures/{place.survey.pictures[0]}.png"
    for path in ("/", "/static/survey.css", "/static/keys.js", picture, "/nothing"):
        answer = someone.http.get(path)
        assert answer.status_code == (404 if path == "/nothing" else 200)
        given = (part.strip().partition(" ") for part in answer.headers["content-security-policy"].split(";"))
        assert {name: value for name, _, value in given} == policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-robots-tag"] == "noindex"
        assert answer.headers["cache-control"] == (
            "private, max-age=86400, immutable" if path == picture else "no-store"
        )
        for name in ("referrer-policy", "cross-origin-opener-policy", "cross-origin-resource-policy"):
            assert answer.headers[name] == "same-origin"
    cookie = Someone(place.app).http.get("/").headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    https = Someone(application(place.folder, place.survey, KEY, "https://survey.example.org"))
    https.http.headers["host"] = "survey.example.org"
    cookie = https.http.get("/").headers["set-cookie"].lower()
    assert "secure" in cookie
    assert cookie.startswith("__host-survey=")
    assert "path=/;" in cookie
    assert "domain" not in cookie


def test_a_proxy_may_call_the_server_by_another_name(place: Place) -> None:
    someone = Someone(application(place.folder, place.survey, KEY, "http://survey.example.org"))
    page = someone.page("/")
    for origin, status in (("http://survey.example.org", 303), ("http://survey.example", 403)):
        given = {"data": page.hidden, "headers": {"origin": origin}, "follow_redirects": False}
        assert someone.http.post("/join", **given).status_code == status  # type: ignore[arg-type]


def test_a_body_that_is_too_large_ends_the_connection(place: Place) -> None:
    answer = Someone(place.app).http.post("/join", content=b"a=" + b"x" * BODY, headers=FORM)
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")


def test_the_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    folder, _ = small_survey(tmp_path)
    secret = read_secret(folder)
    assert len(secret) >= 32
    assert read_secret(folder) == secret
    assert (folder / SECRET).stat().st_mode & 0o077 == 0
    assert secret not in admin_token(secret)
    (tmp_path / "short").write_text("abc")
    for name in ("short", "missing"):
        with pytest.raises(RefusedInput, match=name):
            read_secret(tmp_path, str(tmp_path / name))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, []),
        ({"host": "::1"}, []),
        ({"host": "0.0.0.0"}, ["public_url", "secret_file"]),
        ({"host": "0.0.0.0", "public_url": "https://a.example"}, ["secret_file"]),
        ({"host": "0.0.0.0", "public_url": "https://a.example", "secret_file": "s"}, []),
        ({"public_url": "a.example"}, ["public_url"]),
        ({"public_url": "javascript:alert(1)"}, ["public_url"]),
        ({"public_url": "https://a.example/path"}, ["public_url"]),
        ({"port": 70000}, ["port"]),
        ({"joins_per_hour": -1}, ["joins_per_hour"]),
    ],
)
def test_others_reach_it_only_when_asked_for(given: dict[str, Any], said: list[str]) -> None:
    assert [problem.split()[0] for problem in survey_problems(SurveyServeConfig(**given))] == said


def test_a_folder_without_a_survey_is_refused_before_anything_listens(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match=r"survey\.json"):
        serve(tmp_path, SurveyServeConfig())
    assert not (tmp_path / PICTURES).exists()
