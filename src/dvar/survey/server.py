"""The survey as a web application: plain pages and forms that need no script."""

from __future__ import annotations

import hmac
import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from math import ceil
from pathlib import Path
from socket import AF_INET, AF_INET6, create_server
from socket import socket as Socket
from urllib.parse import parse_qsl, urlsplit

import uvicorn
from itsdangerous import BadSignature, URLSafeSerializer
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dvar.errors import RefusedInput, first_line
from dvar.html.templates import render
from dvar.survey.config import LOOPBACK, SurveyScoreConfig, SurveyServeConfig
from dvar.survey.connections import connection_options
from dvar.survey.questions import QUESTION_TEXTS, SOMETHING, THE_OBJECT
from dvar.survey.rate_limit import RateLimiter
from dvar.survey.result_page import PROGRESS_COLUMNS, RATER_COLUMNS
from dvar.survey.scoring import Score, score_votes
from dvar.survey.secret import read_or_create_secret
from dvar.survey.survey import IMAGE_FOLDER, VOTES_FILE, Survey
from dvar.survey.vote_store import VoteStore

MAX_BODY = 4096  # bytes of a form
MAX_NAME_LENGTH = 60
COOKIE_DAYS = 60
TASKS_PER_MINUTE = 6
ADMIN_ATTEMPTS_PER_HOUR = 10  # wrong tokens from one address
ADMIN_SECONDS = 12 * 3600.0  # that the progress page stays open
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-robots-tag": "noindex",
}


def serve_survey(folder: str | Path, config: SurveyServeConfig, notify: Callable[[str], None] = print) -> None:
    """Serve a survey until interrupted.

    Args:
        folder: Folder of the survey.
        config: Address, port and secret.
        notify: Called with a line for each address and for the token, once the server listens.

    Raises:
        RefusedInput: The folder holds no survey, the secret is missing or short, or the port is taken.
    """
    folder = Path(folder)
    survey = Survey.load(folder)
    with _listen(config.host, config.port) as socket:  # before anything is written; from here on, nobody is turned away
        secret = read_or_create_secret(folder, config.secret_file)
        limiter = RateLimiter(config.joins_per_hour) if config.public_url else None
        own_host = None if config.host in LOOPBACK else config.host
        app = create_app(folder, survey, secret, config.public_url, own_host, limiter)
        # Without a log_config it leaves the process's own logging as it is, and closes no handler of others.
        settings = uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, **connection_options())
        port = socket.getsockname()[1]
        host = f"[{config.host}]" if ":" in config.host else config.host
        base = (config.public_url or f"http://{host}:{port}").rstrip("/")
        notify(f"survey    {base}/")
        notify(f"progress  {base}/admin")
        notify(f"token     {admin_token(secret)}")
        uvicorn.Server(settings).run(sockets=[socket])


def _listen(host: str, port: int) -> Socket:
    """Return a socket that listens.

    Raises:
        RefusedInput: The port is taken, or the host is not one of this machine.
    """
    try:
        return create_server((host, port), family=AF_INET6 if ":" in host else AF_INET, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RefusedInput([f"{host}, port {port} cannot be listened on ({reason}): choose another --port"]) from error


def admin_token(secret: str) -> str:
    """Return the token of the progress page, which depends on the secret and does not reveal it."""
    return hmac.new(secret.encode(), b"admin", sha256).hexdigest()[:32]


def create_app(
    folder: Path,
    survey: Survey,
    secret: str,
    public_url: str | None = None,
    host: str | None = None,
    limiter: RateLimiter | None = None,
) -> Starlette:
    """Return the web application of a survey.

    Args:
        folder: Folder of the survey.
        survey: The survey.
        secret: Signs cookies, links and forms.
        public_url: Address that raters open.
        host: Another host name that requests may carry, besides those of this machine and of ``public_url``.
        limiter: Limits the arrivals from one address; without one nothing does.
    """
    public = urlsplit(public_url or "")
    origin = f"{public.scheme}://{public.netloc}" if public_url else ""
    pages = SurveyPages(folder, survey, secret, origin, limiter)
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
            Route("/pictures/{name}.png", pages.image),
            Route("/admin", pages.admin, methods=["GET", "POST"]),
            Route("/admin/close", pages.close_admin, methods=["POST"]),
            Mount("/static", StaticFiles(packages=[("dvar.survey", "static")])),
        ],
        middleware=[
            Middleware(SecurityHeaders),
            Middleware(OneLength),
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
        exception_handlers={HTTPException: pages.error, OSError: pages.failure, sqlite3.Error: pages.failure},
    )


class SecurityHeaders:
    """Middleware that adds the security headers to every response, and lets nothing be cached by default."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                headers = {**SECURITY_HEADERS, "cache-control": "no-store"}
                message["headers"] += [
                    (name.encode(), value.encode()) for name, value in headers.items() if name.encode() not in present
                ]
            await send(message)

        await self.app(scope, receive, send_with_headers)


class OneLength:
    """Middleware that refuses a request with two lengths: a proxy before it may take it for two requests."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = [name.lower() for name, _ in scope.get("headers", ())]
        if b"transfer-encoding" in names and b"content-length" in names:
            refusal = PlainTextResponse("A request has one length.", 400, {"connection": "close"})
            return await refusal(scope, receive, send)
        return await self.app(scope, receive, send)


class SurveyPages:
    """The pages of one survey.

    A rater's cookie is signed and holds their number and a nonce. Every form carries a ticket, signed for that nonce,
    one purpose and one task, so that a form of another site, another rater or another task is refused. Following a
    link never changes whose answers are given or deleted; that takes a button. The nonce changes whenever a visitor
    becomes someone else, so that nothing signed before counts after. Images are served from the survey's list, and a
    body of more than `MAX_BODY` bytes is not read. Who has opened the progress page is known to this process alone, so
    that closing it, or ending the server, ends every copy of the cookie.

    Args:
        folder: Folder of the survey.
        survey: The survey.
        secret: Signs cookies, links and forms.
        site: Origin of the public address, such as https://survey.example.org.
        limiter: Limits the arrivals from one address.
    """

    def __init__(
        self, folder: Path, survey: Survey, secret: str, site: str = "", limiter: RateLimiter | None = None
    ) -> None:
        self.survey, self.secret, self.site, self.limiter = survey, secret, site, limiter
        self.store = VoteStore(folder / VOTES_FILE, survey, secret=secret)
        self.attempts = RateLimiter(ADMIN_ATTEMPTS_PER_HOUR)
        self.admins: dict[str, float] = {}
        self.images = {name: folder / IMAGE_FOLDER / f"{name}.png" for name in survey.image_ids}

    async def welcome(self, request: Request) -> Response:
        """Show what the survey is, with a form to begin or to go on."""
        rater = await self.current_rater(request)
        tasks = sum(self.survey.max_tasks(question) for question in QUESTION_TEXTS)
        return self.page(
            "welcome.html",
            joined=rater is not None,
            deleted=request.session.pop("forgotten", None),
            texts=[text for question, text in QUESTION_TEXTS.items() if self.survey.max_tasks(question)],
            minutes=max(2, round(tasks / TASKS_PER_MINUTE)),
            ticket=self.sign_ticket(request, "join"),
        )

    async def join(self, request: Request) -> Response:
        """Add a rater, unless this visitor is one already."""
        fields = await read_form(request)
        self.validate_form(request, fields, "join")
        if await self.current_rater(request) is None:
            self.limit_arrivals(request)
            words = " ".join(fields.get("name", "").split())
            name = "".join(letter for letter in words if letter.isprintable())[:MAX_NAME_LENGTH]
            request.session["worker"] = await run_in_threadpool(self.store.add_rater, name)
            request.session.pop("nonce", None)
        return redirect_to("/task")

    async def resume(self, request: Request) -> Response:
        """Ask whether to go on as the rater whose link this is, and do so."""
        try:
            rater = int(self.signer("worker").loads(request.path_params["token"]))
        except (BadSignature, ValueError, TypeError) as error:
            raise HTTPException(403, "This link is not valid. It may have been cut off.") from error
        name = await run_in_threadpool(self.store.rater_name, rater)
        if name is None:
            raise HTTPException(410, "The answers that belong to this link have been deleted.")
        if request.method == "POST":
            self.validate_form(request, await read_form(request), f"resume {rater}")
            request.session["worker"] = rater
            request.session.pop("nonce", None)
        if request.session.get("worker") == rater:
            return redirect_to("/task")
        done, _ = await run_in_threadpool(self.store.progress, rater)
        return self.page("resume.html", name=name, done=done, ticket=self.sign_ticket(request, f"resume {rater}"))

    async def forget(self, request: Request) -> Response:
        """Ask whether to delete everything that a rater has answered, and do so."""
        rater = await self.current_rater(request)
        if request.method == "POST":
            self.validate_form(request, await read_form(request), f"forget {rater}")
        if rater is None:
            return redirect_to("/")
        if request.method == "POST":
            count = await run_in_threadpool(self.store.delete_rater, rater)
            request.session.clear()
            request.session["forgotten"] = count or 0
            return redirect_to("/")
        done, _ = await run_in_threadpool(self.store.progress, rater)
        return self.page("forget.html", done=done, ticket=self.sign_ticket(request, f"forget {rater}"))

    async def keys(self, request: Request) -> Response:
        """Turn the keys on or off for this browser."""
        self.validate_form(request, await read_form(request), "keys")
        request.session["keys"] = not request.session.get("keys", True)
        return redirect_to("/task")

    async def task(self, request: Request) -> Response:
        """Show the task to answer now, or thanks when all is done."""
        rater = await self.current_rater(request)
        if rater is None:
            return redirect_to("/")
        assignment = await run_in_threadpool(self.store.current_assignment, rater)
        done, total = await run_in_threadpool(self.store.progress, rater)
        resume = self.signer("worker").dumps(rater)
        if assignment is None:
            return self.page("done.html", done=done, resume=resume)
        outcome, lesson = request.session.pop("told", None) or ("", "")
        return self.page(
            "task.html",
            assignment=assignment,
            text=QUESTION_TEXTS[assignment.task.question],
            something=SOMETHING,
            the_object=THE_OBJECT,
            done=done,
            total=total,
            resume=resume,
            outcome=outcome,
            lesson=lesson,
            ticket=self.sign_ticket(request, f"vote {assignment.id}"),
            keys=request.session.get("keys", True),
            keys_ticket=self.sign_ticket(request, "keys"),
        )

    async def vote(self, request: Request) -> Response:
        """Record an answer."""
        fields = await read_form(request)
        rater = await self.current_rater(request)
        number = fields.get("task", "")
        if rater is None or not (number.isascii() and number.isdigit() and len(number) < 16):
            raise HTTPException(403, "This answer belongs to nobody who takes part.")
        self.validate_form(request, fields, f"vote {number}")
        button = fields.get("answer", "")
        outcome, task = await run_in_threadpool(self.store.record_vote, rater, int(number), button)
        if outcome == "refused" or task is None:
            raise HTTPException(409, "This answer does not count: only the first answer to a task does.")
        request.session["told"] = [outcome, task.lesson]
        return redirect_to("/task")

    async def image(self, request: Request) -> Response:
        """Return an image of the survey."""
        path = self.images.get(request.path_params["name"])
        if path is None:
            raise HTTPException(404, "There is no such image.")
        # Bytes only: the date of a file would reveal the order in which the images were written.
        content = await run_in_threadpool(path.read_bytes)
        return Response(content, media_type="image/png", headers={"cache-control": "private, max-age=86400, immutable"})

    async def admin(self, request: Request) -> Response:
        """Show progress, agreement, and who fails the controls, to those who have the token."""
        if request.method == "POST":
            fields = await read_form(request)
            self.validate_form(request, fields, "admin")
            if self.attempts.is_exhausted(_address_of(request)):
                raise HTTPException(429, "Too many wrong tokens came from your network. Please come back in an hour.")
            token = fields.get("token", "").strip()
            if not hmac.compare_digest(token.encode(), admin_token(self.secret).encode()):
                self.attempts.admit(_address_of(request))
                raise HTTPException(403, "This token is not the one that dvar survey serve printed.")
            request.session.pop("nonce", None)
            request.session["admin"] = secrets.token_urlsafe(16)
            self.admins[request.session["admin"]] = time.monotonic() + ADMIN_SECONDS
            return redirect_to("/admin")
        if self.admins.get(request.session.get("admin", ""), 0) < time.monotonic():
            return self.page("token.html", 403, ticket=self.sign_ticket(request, "admin"))
        score = await run_in_threadpool(self.score_so_far)
        ticket, columns = self.sign_ticket(request, "close"), PROGRESS_COLUMNS
        return self.page("admin.html", score=score, columns=columns, rater_columns=RATER_COLUMNS, ticket=ticket)

    async def close_admin(self, request: Request) -> Response:
        """Close the progress page in every browser that has this cookie."""
        self.validate_form(request, await read_form(request), "close")
        self.admins.pop(request.session.pop("admin", ""), None)
        request.session.pop("nonce", None)
        return redirect_to("/admin")

    async def error(self, request: Request, error: Exception) -> Response:
        """Show what was wrong, and where to go on."""
        status = getattr(error, "status_code", 500)
        message = getattr(error, "detail", "")
        message = "There is no such page." if message in ("Not Found", "Method Not Allowed") else message
        response = self.page("refused.html", status, message=message)
        response.headers.update(getattr(error, "headers", None) or {})
        return response

    async def failure(self, request: Request, error: Exception) -> Response:
        """Say that the survey cannot go on now, as on a full disk, and leave a line in the log."""
        logging.getLogger("uvicorn.error").error("%s %s: %s", request.method, request.url.path, first_line(error))
        message = (
            "The survey cannot save answers at the moment. The task stays open: please try again in a few minutes."
        )
        return self.page("refused.html", 503, message=message)

    def score_so_far(self) -> Score:
        """Return the score of the votes so far, with few resamples."""
        return score_votes(self.survey, self.store.load_votes(), SurveyScoreConfig(resamples=200))

    def page(self, template: str, status: int = 200, /, **context: object) -> HTMLResponse:
        """Return a page from a template."""
        return HTMLResponse(render("dvar.survey", template, **context), status)

    async def current_rater(self, request: Request) -> int | None:
        """Return the number in the visitor's signed cookie, None when the survey has no such rater."""
        rater = request.session.get("worker")
        if isinstance(rater, int) and await run_in_threadpool(self.store.rater_name, rater) is not None:
            return rater
        return None

    def limit_arrivals(self, request: Request) -> None:
        """Raise HTTPException when the visitor's address has sent too many raters."""
        wait = self.limiter.admit(_address_of(request)) if self.limiter else 0
        if wait:
            message = "Too many people have joined from your network. Please come back in an hour."
            raise HTTPException(429, message, {"retry-after": str(ceil(wait))})

    def signer(self, purpose: str) -> URLSafeSerializer:
        """Return what signs values for one purpose."""
        return URLSafeSerializer(self.secret, salt=f"dvar survey {purpose}")

    def sign_ticket(self, request: Request, purpose: str) -> str:
        """Return a signed ticket with which this visitor, and nobody else, can send one form."""
        nonce = request.session.setdefault("nonce", secrets.token_urlsafe(12))
        return str(self.signer("ticket").dumps([nonce, purpose]))

    def validate_form(self, request: Request, fields: Mapping[str, str], purpose: str) -> None:
        """Raise HTTPException unless the form comes from our own page, for this visitor and this purpose."""
        own = self.site or f"{request.url.scheme}://{request.headers.get('host')}"
        local = f"http://{request.headers.get('host')}"  # of the organiser, who opens the address that is listened on
        if request.headers.get("origin", own) not in (own, local if urlsplit(local).hostname in LOOPBACK else own):
            raise HTTPException(403, "This form was sent from another site.")
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise HTTPException(403, "This form was sent from another site.")
        try:
            ticket = self.signer("ticket").loads(fields.get("ticket", ""))
        except BadSignature as error:
            raise HTTPException(403, "This form does not belong to this survey.") from error
        if ticket != [request.session.get("nonce"), purpose]:
            raise HTTPException(403, "This form belongs to someone else, or to another task.")


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a small form; of a field that is there twice, the first.

    Raises:
        HTTPException: The body is too large or not a form.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/x-www-form-urlencoded":
        raise HTTPException(415, "Only plain forms are accepted.")
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise HTTPException(413, "This form is too large.", {"connection": "close"})
    except ClientDisconnect as error:  # nobody reads the answer
        raise HTTPException(400, "This form did not arrive as a whole.") from error
    try:
        fields = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=16, errors="strict")
    except ValueError as error:
        raise HTTPException(400, "This form cannot be read.") from error
    return dict(reversed(fields))


def _address_of(request: Request) -> str:
    return request.client.host if request.client else ""


def redirect_to(path: str) -> RedirectResponse:
    """Return a redirection to one of our pages, by a GET request."""
    return RedirectResponse(path, 303)
