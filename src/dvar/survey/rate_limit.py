"""A limit on how many raters one network address may send to a public survey."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

HOUR = 3600.0
PREFIX_BITS = 64  # bits of an IPv6 address that name its network; who has one address of a network has them all


class RateLimiter:
    """A limit on arrivals per address within any hour, kept in memory only.

    An address is forgotten one hour after its last arrival.

    Args:
        limit: Maximum number of arrivals from one address within an hour.
        clock: Returns the time in seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.clock = limit, clock
        self.arrivals: dict[str, deque[float]] = {}

    def admit(self, address: str) -> float:
        """Count an arrival and return 0, or return the seconds until the address may send the next one."""
        now = self.clock()
        self._forget_before(now - HOUR)
        network = network_of(address)
        times = self.arrivals.get(network, deque())
        if len(times) >= self.limit:
            return times[0] + HOUR - now if times else HOUR
        self.arrivals.setdefault(network, times).append(now)
        return 0.0

    def is_exhausted(self, address: str) -> bool:
        """Return whether the address has had all its arrivals of this hour; nothing is counted."""
        self._forget_before(self.clock() - HOUR)
        return len(self.arrivals.get(network_of(address), ())) >= self.limit

    def _forget_before(self, time: float) -> None:
        for network, times in list(self.arrivals.items()):
            while times and times[0] <= time:
                times.popleft()
            if not times:
                del self.arrivals[network]


def network_of(address: str) -> str:
    """Return what is limited as one: an IPv4 address, or the network of an IPv6 address."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address):
        return str(parsed.ipv4_mapped or int(parsed) >> 128 - PREFIX_BITS)
    return str(parsed)
