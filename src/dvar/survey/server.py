"""The survey as a web application: plain pages and forms, no script needed, nothing taken on trust.

A person's cookie is signed and holds their number and a nonce.  Every form carries a ticket, signed for that nonce, for
one purpose and for one task, so that a form of another site, of another person or of another task is refused.  A link
alone never changes whose answers are given or kept: that takes a button.  Pictures are served from the plan's list, and
a body of more than `BODY` bytes is not read.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from math import ceil
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import uvicorn
from itsdangerous import BadSignature, URLSafeSerializer
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dvar.errors import RefusedInput
from dvar.survey.config import LOOPBACK, SurveyScoreConfig, SurveyServeConfig
from dvar.survey.questions import SOMETHING, THE_OBJECT, WORDING
from dvar.survey.rate_limit import RateLimiter
from dvar.survey.result_page import named
from dvar.survey.scoring import Score, score
from dvar.survey.survey import PICTURES, SECRET, VOTES, Survey
from dvar.survey.vote_store import VoteStore

BODY = 4096
SECRET_LENGTH = 32
NAME_LENGTH = 60
COOKIE_DAYS = 60
HEADERS = {
    "content-security-policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-robots-tag": "noindex",
}

Handler = Callable[[Request], Awaitable[Response]]


def serve(folder: str | Path, config: SurveyServeConfig, say: Callable[[str], None] = print) -> None:
    """Serve a survey until interrupted; ``say`` is told the addresses once it listens.

    Raises: RefusedInput when the folder holds no survey or the secret is missing or short.
    """
    folder = Path(folder)
    survey = Survey.open(folder)
    secret = read_secret(folder, config.secret_file)
    door = RateLimiter(config.joins_per_hour) if config.public_url else None
    app = application(folder, survey, secret, config.public_url, None if config.host in LOOPBACK else config.host, door)
    settings = uvicorn.Config(app, host=config.host, port=config.port, log_level="warning", access_log=False)
    server = uvicorn.Server(settings)
    listening = settings.bind_socket()
    listening.listen(settings.backlog)  # whoever reads the address below is not turned away
    port = listening.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    base = (config.public_url or f"http://{host}:{port}").rstrip("/")
    say(f"survey    {base}/")
    say(f"progress  {base}/admin")
    say(f"token     {admin_token(secret)}")
    server.run(sockets=[listening])


def read_secret(folder: Path, path: str | None = None) -> str:
    """Return the secret in a file; without a path that of the survey's folder, made at the first call.

    Raises: RefusedInput when the folder holds no survey, or the named file cannot be read or is too short.
    """
    kept = Path(path) if path else folder / SECRET
    if not path and not kept.exists():
        Survey.open(folder)
        kept.touch(mode=0o600)
        kept.write_text(secrets.token_urlsafe(SECRET_LENGTH) + "\n", encoding="utf-8")
    try:
        secret = kept.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedInput([f"secret_file {kept} cannot be read ({error}): check --secret_file"]) from error
    if len(secret) < SECRET_LENGTH:
        said = f"a secret has at least {SECRET_LENGTH} characters, {kept} has {len(secret)}"
        raise RefusedInput([f"{said}: write a longer one, such as openssl rand -hex 32 prints"])
    return secret


def admin_token(secret: str) -> str:
    """The token of the page about progress: it follows from the secret and does not tell it."""
    return hmac.new(secret.encode(), b"admin", sha256).hexdigest()[:32]


def application(
    folder: Path,
    survey: Survey,
    secret: str,
    public_url: str | None = None,
    host: str | None = None,
    door: RateLimiter | None = None,
) -> Starlette:
    """Return the application of a survey; only this machine's own names and ``public_url``'s reach it.

    Without a ``door`` nothing limits how many people one address sends.
    """
    public = urlsplit(public_url or "")
    pages = SurveyPages(folder, survey, secret, public.netloc, door)
    hosts = [*LOOPBACK[:2], "[::1]", *filter(None, (public.hostname, host))]
    https = public.scheme == "https"
    return Starlette(
        routes=[
            Route("/", pages.welcome),
            Route("/join", pages.join, methods=["POST"]),
            Route("/task", pages.task),
            Route("/vote", pages.vote, methods=["POST"]),
            Route("/resume/{token}", pages.resume, methods=["GET", "POST"]),
            Route("/forget", pages.forget, methods=["GET", "POST"]),
            Route("/keys", pages.keys, methods=["POST"]),
            Route("/pictures/{name}.png", pages.picture),
            Route("/admin", pages.admin, methods=["GET", "POST"]),
            Mount("/static", StaticFiles(packages=[("dvar.survey", "static")])),
        ],
        middleware=[
            Middleware(SecurityHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
            Middleware(
                SessionMiddleware,
                secret_key=secret,
                session_cookie="__Host-survey" if https else "survey",  # the prefix keeps neighbours from setting it
                max_age=COOKIE_DAYS * 86400,
                same_site="lax",
                https_only=https,
            ),
        ],
        exception_handlers={HTTPException: pages.refused},
    )


class SecurityHeaders:
    """Puts the protecting headers on every answer, and lets nothing be cached that is not said to be."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name.lower() for name, _ in message["headers"]}
                extra = {**HEADERS, "cache-control": "no-store"}
                message["headers"] += [
                    (name.encode(), value.encode()) for name, value in extra.items() if name.encode() not in there
                ]
            await send(message)

        await self.app(scope, receive, guarded)


class SurveyPages:
    """The pages of one survey."""

    def __init__(
        self, folder: Path, survey: Survey, secret: str, site: str = "", door: RateLimiter | None = None
    ) -> None:
        self.survey, self.secret, self.site, self.door = survey, secret, site, door
        self.ballots = VoteStore(folder / VOTES, survey, secret=secret)
        self.pictures = {name: folder / PICTURES / f"{name}.png" for name in survey.pictures}
        self.environment = Environment(
            loader=PackageLoader("dvar.survey"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        asked = [WORDING[question] for question in WORDING if survey.longest(question)]
        self.environment.globals |= {
            "wording": WORDING,
            "named": named,
            "asked": asked,
            "something": SOMETHING,
            "the_object": THE_OBJECT,
            "minutes": max(2, round(sum(survey.longest(question) for question in WORDING) / 6)),
        }

    async def welcome(self, request: Request) -> Response:
        """What the survey is, and the form that begins it; who has begun goes on."""
        worker = await self.worker(request)
        forgotten = request.session.pop("forgotten", None)
        ticket = self.ticket(request, "join")
        return self.page("welcome.html", joined=worker is not None, forgotten=forgotten, ticket=ticket)

    async def join(self, request: Request) -> Response:
        """Take a person in; one who is in already goes on."""
        given = await form(request)
        self.checked(request, given, "join")
        if await self.worker(request) is None:
            if wait := self.door.wait(request.client.host if request.client else "") if self.door else 0:
                said = "Too many people have joined from your address: come back within the hour."
                raise HTTPException(429, said, {"retry-after": str(ceil(wait))})
            name = "".join(sign for sign in " ".join(given.get("name", "").split()) if sign.isprintable())[:NAME_LENGTH]
            request.session["worker"] = await run_in_threadpool(self.ballots.join, name)
        return see("/task")

    async def resume(self, request: Request) -> Response:
        """Ask whether to go on as the person whose link this is, and do so."""
        try:
            worker = int(self.signer("worker").loads(request.path_params["token"]))
        except (BadSignature, ValueError, TypeError) as error:
            raise HTTPException(403, "This link is not one of ours: it may have been cut off.") from error
        name = await run_in_threadpool(self.ballots.name, worker)
        if name is None:
            raise HTTPException(410, "Whoever had this link has deleted their answers.")
        if request.method == "POST":
            self.checked(request, await form(request), f"resume {worker}")
            request.session["worker"] = worker
        if request.session.get("worker") == worker:
            return see("/task")
        done, _ = await run_in_threadpool(self.ballots.progress, worker)
        return self.page("resume.html", name=name, done=done, ticket=self.ticket(request, f"resume {worker}"))

    async def forget(self, request: Request) -> Response:
        """Ask whether to delete all that a person has answered, and do so."""
        worker = await self.worker(request)
        if request.method == "POST":
            self.checked(request, await form(request), f"forget {worker}")
        if worker is None:
            return see("/")
        if request.method == "POST":
            gone = await run_in_threadpool(self.ballots.forget, worker)
            request.session.clear()
            request.session["forgotten"] = gone or 0
            return see("/")
        done, _ = await run_in_threadpool(self.ballots.progress, worker)
        return self.page("forget.html", done=done, ticket=self.ticket(request, f"forget {worker}"))

    async def keys(self, request: Request) -> Response:
        """Turn the keys off or on again, for this browser."""
        self.checked(request, await form(request), "keys")
        request.session["keys"] = not request.session.get("keys", True)
        return see("/task")

    async def task(self, request: Request) -> Response:
        """The task to answer now, or thanks when all is done."""
        worker = await self.worker(request)
        if worker is None:
            return see("/")
        shown = await run_in_threadpool(self.ballots.current, worker)
        done, most = await run_in_threadpool(self.ballots.progress, worker)
        resume = self.signer("worker").dumps(worker)
        if shown is None:
            return self.page("done.html", done=done, resume=resume)
        return self.page(
            "task.html",
            shown=shown,
            done=done,
            most=most,
            resume=resume,
            told=request.session.pop("told", None),
            ticket=self.ticket(request, f"vote {shown.id}"),
            keys=request.session.get("keys", True),
            keys_ticket=self.ticket(request, "keys"),
        )

    async def vote(self, request: Request) -> Response:
        """Record an answer."""
        given = await form(request)
        worker = await self.worker(request)
        number = given.get("task", "")
        if worker is None or not (number.isascii() and number.isdigit() and len(number) < 16):
            raise HTTPException(403, "This answer belongs to nobody who takes part.")
        self.checked(request, given, f"vote {number}")
        outcome, task = await run_in_threadpool(self.ballots.vote, worker, int(number), given.get("answer", ""))
        if outcome == "refused" or task is None:
            raise HTTPException(409, "This answer is not counted: the first one to a task stands.")
        request.session["told"] = [outcome, task.lesson]
        return see("/task")

    async def picture(self, request: Request) -> Response:
        """A picture of the survey, by its id."""
        path = self.pictures.get(request.path_params["name"])
        if path is None:
            raise HTTPException(404, "There is no such picture.")
        # Bytes alone: a file's date would tell in which order the pictures were written.
        content = await run_in_threadpool(path.read_bytes)
        return Response(content, media_type="image/png", headers={"cache-control": "private, max-age=86400, immutable"})

    async def admin(self, request: Request) -> Response:
        """Progress, agreement and people who fail the controls, for who has the token."""
        if request.method == "POST":
            given = await form(request)
            self.checked(request, given, "admin")
            if not hmac.compare_digest(given.get("token", "").strip().encode(), admin_token(self.secret).encode()):
                raise HTTPException(403, "This token is not the one that dvar survey serve printed.")
            request.session["admin"] = True
            return see("/admin")
        if not request.session.get("admin"):
            return self.page("token.html", 403, ticket=self.ticket(request, "admin"))
        return self.page("admin.html", score=await run_in_threadpool(self.scored))

    def scored(self) -> Score:
        """The votes so far, read as `dvar survey score` reads them."""
        return score(self.survey, self.ballots.votes(), SurveyScoreConfig(resamples=200))

    async def refused(self, request: Request, error: Exception) -> Response:
        """Say what was wrong, and where to go on."""
        status = getattr(error, "status_code", 500)
        said = getattr(error, "detail", "")
        said = "There is no such page." if said in ("Not Found", "Method Not Allowed") else said
        answer = self.page("refused.html", status, said=said)
        answer.headers.update(getattr(error, "headers", None) or {})
        return answer

    def page(self, name: str, status: int = 200, /, **known: object) -> HTMLResponse:
        return HTMLResponse(self.environment.get_template(name).render(known), status)

    async def worker(self, request: Request) -> int | None:
        """The number of the person whose signed cookie this is, if the survey knows them."""
        worker = request.session.get("worker")
        if isinstance(worker, int) and await run_in_threadpool(self.ballots.name, worker) is not None:
            return worker
        return None

    def signer(self, purpose: str) -> URLSafeSerializer:
        return URLSafeSerializer(self.secret, salt=f"dvar survey {purpose}")

    def ticket(self, request: Request, purpose: str) -> str:
        """A signed word that lets this visitor, and nobody else, send one form."""
        nonce = request.session.setdefault("nonce", secrets.token_urlsafe(12))
        return str(self.signer("ticket").dumps([nonce, purpose]))

    def checked(self, request: Request, given: Mapping[str, str], purpose: str) -> None:
        """Raises: HTTPException unless the form is of our own page, for this visitor and this purpose."""
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc not in (request.headers.get("host"), self.site or None):
            raise HTTPException(403, "This form was sent from another site.")
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise HTTPException(403, "This form was sent from another site.")
        try:
            ticket = self.signer("ticket").loads(given.get("ticket", ""))
        except BadSignature as error:
            raise HTTPException(403, "This form is not one of ours.") from error
        if ticket != [request.session.get("nonce"), purpose]:
            raise HTTPException(403, "This form was made for someone else, or for another task.")


async def form(request: Request) -> dict[str, str]:
    """The fields of a small form; of a field given twice the first.

    Raises: HTTPException for a body that is too large or is no form.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(415, "Only plain forms are taken.")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY:
            raise HTTPException(413, "This form is too large.", {"connection": "close"})
    try:
        fields = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=16, errors="strict")
    except ValueError as error:
        raise HTTPException(400, "This form cannot be read.") from error
    return dict(reversed(fields))


def see(where: str) -> RedirectResponse:
    """Go to a page of our own by a plain request."""
    return RedirectResponse(where, 303)
