"""Connections as hostile networks make them: silent, slow, many, cut off, of two lengths."""

from __future__ import annotations

import asyncio
import logging
import stat
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
from fake_survey import build_small_survey

pytest.importorskip("starlette", reason="needs the extra: pip install 'dvar[survey]'")
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from dvar.survey import connections
from dvar.survey.connections import GuardedConnection, connection_options, is_proxy
from dvar.survey.server import create_app
from dvar.survey.survey import VOTES_FILE

KEY = "k" * 40
HALF_A_FORM = (
    b"POST /join HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/x-www-form-urlencoded\r\n"
    b"content-length: 100\r\n\r\nname="
)
Talk = Callable[[int], Awaitable[bytes]]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> ASGIApp:
    folder, survey = build_small_survey(tmp_path_factory.mktemp("connections"))
    return create_app(folder, survey, KEY)


def talk_to(app: ASGIApp, talk: Talk) -> bytes:
    """Serve an app on a free port, and return what came out of a conversation with it."""

    async def run() -> bytes:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", **connection_options()))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        listening = await asyncio.start_server(lambda *_: None, "0.0.0.0", 0)
        port = listening.sockets[0].getsockname()[1]
        listening.close()
        await listening.wait_closed()
        server.config.host, server.config.port = "0.0.0.0", port
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0)
        try:
            return await asyncio.wait_for(talk(port), 20)
        finally:
            server.should_exit = True
            await task

    assert threading.current_thread() is threading.main_thread()
    return asyncio.run(run())


async def open_from(address: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))


async def fetch(
    port: int, address: str = "127.0.0.1", text: bytes = b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
) -> bytes:
    """Return the first line and the headers of an answer; empty where the connection is closed without one."""
    reader, writer = await open_from(address, port)
    try:
        writer.write(text)
        return await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    "start",
    [b"", b"POST /join HT", HALF_A_FORM],
    ids=["silent", "half a line", "half a body"],
)
def test_a_request_that_does_not_arrive_in_time_is_closed(
    app: ASGIApp, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.2)

    async def wait(port: int) -> bytes:
        reader, writer = await open_from("127.0.0.1", port)
        writer.write(start)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(1)
        writer.close()
        return await fetch(port)

    assert talk_to(app, wait).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("second", [HALF_A_FORM, b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\n"], ids=["body", "headers"])
def test_half_a_request_behind_a_whole_one_is_closed(
    app: ASGIApp, monkeypatch: pytest.MonkeyPatch, second: bytes
) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.2)

    async def wait(port: int) -> bytes:
        reader, writer = await open_from("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" + second)
        answer = await reader.read()  # until it is closed
        writer.close()
        return answer

    assert talk_to(app, wait).startswith(b"HTTP/1.1 200")


def test_answers_that_nobody_takes_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "ANSWER_SECONDS", 0.2)

    async def answer_at_length(scope: Scope, _: Receive, send: Send) -> None:
        size = 1 if scope["path"] == "/short" else 64 * 2**20  # more than the buffers between two sockets
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * size})

    async def wait(port: int) -> bytes:
        _, writer = await open_from("127.0.0.1", port)
        writer.write(b"".join(b"GET %s HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" % path for path in (b"/short", b"/long")))
        while GuardedConnection._held.total() < 1:
            await asyncio.sleep(0)
        while GuardedConnection._held.total():
            await asyncio.sleep(0.01)
        writer.transport.abort()
        return b"closed"

    assert talk_to(answer_at_length, wait) == b"closed"


def test_a_network_of_ipv6_counts_as_one_address(app: ASGIApp) -> None:
    def connect(address: str) -> tuple[GuardedConnection, Mock]:
        config = uvicorn.Config(app, **connection_options())
        config.load()
        connection = GuardedConnection(config, ServerState(), {}, loop)
        transport = Mock()
        transport.get_extra_info("socket").getpeername.return_value = (address, 1, 0, 0)
        connection.connection_made(transport)
        return connection, transport

    loop = asyncio.new_event_loop()
    held = [connect(f"2001:db8::{number:x}") for number in range(1, 2 + connections.MOST_FROM_ADDRESS)]
    other, transport = connect("2001:db8:0:1::1")
    assert [bool(transport.abort.called) for _, transport in held] == [False] * (len(held) - 1) + [True]
    assert not transport.abort.called
    for connection in (other, *(connection for connection, _ in held)):
        connection.connection_lost(None)
    loop.close()
    assert not GuardedConnection._held


def test_bytes_that_trickle_in_do_not_move_the_deadline(app: ASGIApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.3)

    async def trickle(port: int) -> bytes:
        reader, writer = await open_from("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n")
        try:
            for _ in range(200):
                writer.write(b"x: y\r\n")
                await writer.drain()
                with suppress(TimeoutError):
                    if await asyncio.wait_for(reader.read(1), 0.05) == b"":
                        return b"closed"
        except ConnectionError:
            return b"closed"
        finally:
            writer.transport.abort()
        return b"open"

    assert talk_to(app, trickle) == b"closed"


@pytest.mark.skipif(sys.platform != "linux", reason="needs more than one address of this machine")
def test_one_address_cannot_hold_all_connections(app: ASGIApp) -> None:
    async def hold(port: int) -> bytes:
        held = [await open_from("127.0.0.2", port) for _ in range(connections.MOST_FROM_ADDRESS)]
        assert await fetch(port, "127.0.0.2") == b"", "one too many"
        answer = await fetch(port, "127.0.0.3")
        for _, writer in held:
            writer.close()
        return answer

    assert talk_to(app, hold).startswith(b"HTTP/1.1 200")
    assert not GuardedConnection._held


@pytest.mark.parametrize(
    ("trusted", "address", "expected"),
    [
        ("", "127.0.0.1", True),
        ("", "::1", True),
        ("", "10.0.0.7", False),
        ("10.0.0.7, 10.1.0.0/16", "10.0.0.7", True),
        ("10.0.0.7, 10.1.0.0/16", "10.1.2.3", True),
        ("proxy.example", "10.1.2.3", False),
        ("*", "10.1.2.3", True),
        ("10.0.0.0/8", "a socket", False),
    ],
)
def test_a_trusted_proxy_may_hold_the_connections_of_its_visitors(
    trusted: str, address: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", trusted)
    assert is_proxy(address) is expected


@pytest.mark.skipif(sys.platform != "linux", reason="needs more than one address of this machine")
def test_two_hundred_held_connections_shut_nobody_out(app: ASGIApp) -> None:
    async def hold(port: int) -> bytes:
        held = [await open_from(f"127.0.1.{1 + number % 100}", port) for number in range(200)]
        answer = await fetch(port, "127.0.0.2")
        for _, writer in held:
            writer.close()
        return answer

    assert talk_to(app, hold).startswith(b"HTTP/1.1 200")


def test_a_request_of_two_lengths_is_refused_and_closed(app: ASGIApp) -> None:
    smuggled = (
        b"POST /join HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    )

    async def send(port: int) -> bytes:
        return await fetch(port, text=smuggled)

    answer = talk_to(app, send)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"connection: close" in answer.lower()


def test_answers_name_no_server(app: ASGIApp) -> None:
    assert b"server:" not in talk_to(app, fetch).lower()


def test_a_post_that_is_cut_off_is_no_error_in_the_log(app: ASGIApp, caplog: pytest.LogCaptureFixture) -> None:
    async def cut(port: int) -> bytes:
        _, writer = await open_from("127.0.0.1", port)
        writer.write(HALF_A_FORM)
        await writer.drain()
        await fetch(port)  # by now the server has begun to read the form
        writer.transport.abort()
        return await fetch(port)

    uvicorn_log = logging.getLogger("uvicorn")
    with caplog.at_level(logging.WARNING):
        uvicorn_log.propagate = True
        try:
            assert talk_to(app, cut).startswith(b"HTTP/1.1 200")
        finally:
            uvicorn_log.propagate = False
    assert not caplog.records


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of Windows are others")
def test_the_votes_are_for_their_owner_alone(tmp_path: Path) -> None:
    folder, survey = build_small_survey(tmp_path)
    (folder / VOTES_FILE).touch(mode=0o644)
    create_app(folder, survey, KEY)
    assert stat.S_IMODE((folder / VOTES_FILE).stat().st_mode) == 0o600
