"""The door of a public survey: one address sends only so many people an hour.  Nothing of it is written down."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

HOUR = 3600.0
NETWORK = 64  # bits of an IPv6 address that name a network; who has one address there has them all


class RateLimiter:
    """Lets at most ``most`` people of one address in within any hour, and forgets an address an hour after its last."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self.clock = most, clock
        self.came: dict[str, deque[float]] = {}

    def wait(self, address: str) -> float:
        """Let someone of an address in and return 0, or return the seconds until the next of it may come."""
        now = self.clock()
        for place, times in list(self.came.items()):
            while times and times[0] <= now - HOUR:
                times.popleft()
            if not times:
                del self.came[place]
        times = self.came.get(place := _place(address), deque())
        if len(times) >= self.most:
            return times[0] + HOUR - now if times else HOUR
        self.came.setdefault(place, times).append(now)
        return 0.0


def _place(address: str) -> str:
    """What is limited together: an address, or the network of one that has very many."""
    try:
        found = ip_address(address)
    except ValueError:
        return address
    if isinstance(found, IPv6Address):
        return str(found.ipv4_mapped or int(found) >> 128 - NETWORK)
    return str(found)
