"""The studio as an application: its pages, and the headers that keep the browser from any other host."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

# Gradio reads these when it is imported, or when the pages are mounted: no statistics about the use of the studio leave
# the machine, and no history of its calls is kept, whose routes would use the machine's token of the hub.
os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dvar.html.templates import read_stylesheet
from dvar.studio.compare_page import add_compare_page
from dvar.studio.library_page import add_library_page
from dvar.studio.new_run_page import add_new_run_page
from dvar.studio.pages import Studio
from dvar.studio.replay_page import add_replay_page
from dvar.studio.run_page import add_run_page
from dvar.survey.rate_limit import RateLimiter

LIBRARY = "Runs"
USER = "dvar"
MAX_UPLOAD = "100mb"
LOGINS_PER_HOUR = 20
PAGES = (
    ("New run", "new", add_new_run_page, True),
    ("Compare", "compare", add_compare_page, True),
    ("Replay a log", "replay", add_replay_page, True),
    ("Run", "run", add_run_page, False),
)
"""The pages beside the library: the name and the path of each, what adds it, and whether the bar lists it."""
OPEN = {"", "/login", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"} | {f"/{row[1]}" for row in PAGES}
"""Paths that need no login: each page, which shows the login in its place, and what that loads."""
OPEN_FOLDERS = ("/assets/", "/static/", "/svelte/")
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; font-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-robots-tag": "noindex",
}


def build_app(studio: Studio, hosts: tuple[str, ...], password: str | None = None) -> ASGIApp:
    """Return the application.

    Args:
        studio: The library and the base models.
        hosts: The host names under which it may be addressed; any if empty.
        password: What the user `USER` must enter; nothing is asked for without one.
    """
    app = Starlette()
    with _quiet():
        gr.mount_gradio_app(
            app,
            _build_pages(studio),
            path="/",
            auth=(USER, password) if password else None,
            auth_message="The password is in the file that the studio was started with; the user is dvar.",
            allowed_paths=[],
            max_file_size=MAX_UPLOAD,
            show_error=False,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            theme=_build_theme(),
            head=f"<style>{_read_styles()}</style>",
        )
    return Guard(app, hosts, _read_logins(app) if password else None)


def _read_logins(app: Starlette) -> Callable[[HTTPConnection], bool]:
    """Return what tells whether a request is of somebody who has logged in to the mounted pages."""
    pages: Any = next(route.app for route in app.routes if isinstance(route, Mount))

    def is_logged_in(request: HTTPConnection) -> bool:
        names = (f"access-token-{pages.cookie_id}", f"access-token-unsecure-{pages.cookie_id}")
        return any(request.cookies.get(name) in pages.tokens for name in names)

    return is_logged_in


def _build_pages(studio: Studio) -> gr.Blocks:
    pages = gr.Blocks(title="dvar studio", analytics_enabled=False)
    with pages:
        gr.Navbar(main_page_name=LIBRARY)
        add_library_page(studio, pages)
    for name, path, add, is_listed in PAGES:
        with pages.route(name, path, show_in_navbar=is_listed) as page:
            gr.Navbar(main_page_name=LIBRARY)
            add(studio, page)
    pages.queue(api_open=False)
    return pages


def _build_theme() -> Any:
    """Return a theme in the colours of the reports, whose fonts are those of the machine."""
    paper, dark = "#fdfcfa", "#181716"
    accent = gr.themes.Color(*["#fdf1ee", "#f9dbd3", "#f2b8a9", "#ea937d", "#d8694e", "#b8452a"], *["#9a3620"] * 5)
    return gr.themes.Base(
        primary_hue=accent,
        neutral_hue=gr.themes.colors.stone,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    ).set(
        body_background_fill=paper,
        body_background_fill_dark=dark,
        block_background_fill=paper,
        block_background_fill_dark="#1f1e1c",
        button_primary_background_fill="#b8452a",
        button_primary_background_fill_hover="#9a3620",
        button_primary_background_fill_dark="#b8452a",
        button_primary_background_fill_hover_dark="#9a3620",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        block_info_text_color="#6a6761",
        block_info_text_color_dark="#a09c94",
        block_label_text_color="#57534e",
        input_placeholder_color="#6a6761",
        input_placeholder_color_dark="#a09c94",
    )


def _read_styles() -> str:
    """Return the styles of the charts, for what is of class dvar alone, and those of the studio."""
    charts = str(read_stylesheet(("charts.css",))).replace(":root", "&")
    own = files("dvar.studio").joinpath("static", "studio.css").read_text(encoding="utf-8")
    return f".gradio-container.gradio-container {{ .dvar {{ {charts} }}\n{own} }}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Gradio warns of when pages are mounted: it renders them in the browser, as it is asked to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Guard:
    """Middleware that lets only the studio's own pages talk to it, and sends the security headers.

    A request under another host name, as of a page whose address was made to point here, is refused, and so is one that
    another site's page sends. Where a password is asked for, an address may try it a few times an hour, and nothing but
    what the login needs is answered before: Gradio asks for no login at some of its routes.

    Args:
        app: The application.
        hosts: The host names under which it may be addressed; any if empty.
        is_logged_in: Tells whether a request is of somebody who has logged in; nobody needs to without one.
    """

    def __init__(
        self, app: ASGIApp, hosts: tuple[str, ...], is_logged_in: Callable[[HTTPConnection], bool] | None = None
    ) -> None:
        self.app, self.hosts, self.is_logged_in = app, hosts, is_logged_in
        self.logins = RateLimiter(LOGINS_PER_HOUR)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        if refusal := self._refuse(scope):
            return await refusal(scope, receive, send_with_headers)
        return await self.app(scope, receive, send_with_headers)

    def _refuse(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.hosts and urlsplit(f"//{host}").hostname not in self.hosts:
            return PlainTextResponse("The studio is not at this address.", 400)
        if (origin := headers.get("origin")) and urlsplit(origin).netloc != host:
            return PlainTextResponse("This request comes from another site.", 403)
        if headers.get("sec-fetch-site") == "cross-site" and scope["method"] != "GET":
            return PlainTextResponse("This request comes from another site.", 403)
        path = scope["path"].rstrip("/")
        is_open = path in OPEN or scope["path"].startswith(OPEN_FOLDERS)
        if self.is_logged_in and not is_open and not self.is_logged_in(HTTPConnection(scope)):
            return PlainTextResponse("The studio asks for its password: log in on its first page.", 401)
        if scope["method"] == "POST" and path == "/login" and self.logins.admit((scope.get("client") or ("",))[0]):
            return PlainTextResponse("Too many passwords were tried: wait an hour.", 429)
        return None
