"""Connections to a survey on the public internet: requests have deadlines, and no address can hold all connections."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from contextlib import suppress
from ipaddress import ip_address, ip_network
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dvar.survey.rate_limit import network_of

REQUEST_SECONDS = 15.0
"""Time for a whole request to arrive, from the connection or the first byte of the request on."""
ANSWER_SECONDS = 60.0
"""Time for an answer to be made, and for the visitor to take it."""
MOST_FROM_ADDRESS = 20
"""Connections from one address, or from one network of IPv6, at a time; a browser opens six."""
MOST_CONNECTIONS = 500
"""Connections of all addresses at a time."""
PROXIES = ("127.0.0.1", "::1")
"""Addresses whose connections are those of many visitors, beside those in FORWARDED_ALLOW_IPS, which uvicorn trusts to
say whose a request is: a proxy on this machine, which limits its visitors itself."""


class GuardedConnection(H11Protocol):
    """A connection of uvicorn that is closed without an answer where it exceeds a limit.

    uvicorn itself limits neither how slowly a request may arrive nor how many connections an address may hold, so that
    a few hundred silent connections would shut everybody else out.
    """

    _held: ClassVar[Counter[str]] = Counter()
    """Open connections by address, of IPv6 by network."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or close it where there are too many."""
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        address = self.client[0] if self.client else ""
        self._network = network_of(address)
        self._held[self._network] += 1
        from_one = self._held[self._network] > MOST_FROM_ADDRESS and not is_proxy(address)
        if from_one or sum(self._held.values()) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self._set_deadline(REQUEST_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection that has ended."""
        self._set_deadline(None)
        self._held[self._network] -= 1
        if not self._held[self._network]:
            del self._held[self._network]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request, which must be whole by its deadline."""
        if self._deadline is None:
            self._set_deadline(REQUEST_SECONDS)
        super().data_received(data)
        if self.conn.their_state is h11.DONE:
            self._set_deadline(ANSWER_SECONDS)

    def on_response_complete(self) -> None:
        """Wait for the next request, once the visitor has taken this answer, or go on with one that has begun."""
        super().on_response_complete()
        if not self.cycle.response_complete:  # a request that was sent before this answer, whole or in part
            self._set_deadline(ANSWER_SECONDS if self.conn.their_state is h11.DONE else REQUEST_SECONDS)
        elif not self.transport.get_write_buffer_size():
            self._set_deadline(None)  # from here on uvicorn closes a connection that stays idle

    def _set_deadline(self, seconds: float | None) -> None:
        """Close the connection after so many seconds from now, in the place of an earlier deadline; None for never."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        self.transport.abort()


def is_proxy(address: str) -> bool:
    """Return whether connections from an address are those of many visitors."""
    trusted = [*PROXIES, *(part.strip() for part in os.environ.get("FORWARDED_ALLOW_IPS", "").split(","))]
    for name in filter(None, trusted):
        if name in ("*", address):
            return True
        with suppress(ValueError):  # a name that is no network
            if ip_address(address) in ip_network(name):
                return True
    return False


def connection_options() -> dict[str, Any]:
    """Return the options of `uvicorn.Config` under which a survey is served: no version in the answers, no sockets."""
    return {
        "http": GuardedConnection,
        "ws": "none",
        "lifespan": "off",
        "server_header": False,
        "timeout_keep_alive": 5,
        "timeout_graceful_shutdown": 10,
        "h11_max_incomplete_event_size": 16_384,
    }
