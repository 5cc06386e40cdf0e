"""The limit on arrivals: no address exceeds it within any hour, others are not delayed, and no address is stored."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from dvar.survey.rate_limit import HOUR, RateLimiter


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


arrivals = st.lists(st.tuples(st.sampled_from(["192.0.2.1", "192.0.2.2"]), st.integers(0, 2000)), max_size=60)


@given(arrivals, st.integers(1, 4))
def test_an_address_is_admitted_up_to_the_limit_and_again_after_the_wait_that_it_was_given(
    attempts: list[tuple[str, int]], limit: int
) -> None:
    clock = Clock()
    limiter = RateLimiter(limit, clock)
    admitted = defaultdict[str, list[float]](list)
    for address, later in attempts:
        clock.now += later
        recent = [time for time in admitted[address] if time > clock.now - HOUR]
        wait = limiter.admit(address)
        if len(recent) < limit:
            assert wait == 0
            admitted[address].append(clock.now)
        else:
            assert wait == recent[0] + HOUR - clock.now
    wait = limiter.admit("192.0.2.1")
    clock.now += wait
    assert wait == 0 or limiter.admit("192.0.2.1") == 0


def test_a_limit_of_zero_admits_nobody() -> None:
    assert RateLimiter(0).admit("192.0.2.1") == HOUR


def test_an_ipv6_network_counts_as_one_address_and_a_mapped_ipv4_address_as_itself() -> None:
    limiter = RateLimiter(1)
    assert limiter.admit("2001:db8:0:1::1") == 0
    assert limiter.admit("2001:db8:0:1:ffff::2") > 0
    assert limiter.admit("2001:db8:0:2::1") == 0
    assert limiter.admit("192.0.2.1") == 0
    assert limiter.admit("::ffff:192.0.2.1") > 0
    assert limiter.admit("::ffff:192.0.2.2") == 0
    assert limiter.admit("unix socket") == 0
    assert limiter.admit("unix socket") > 0


def test_an_address_is_forgotten_after_an_hour_and_a_refused_one_is_not_stored() -> None:
    clock = Clock()
    limiter = RateLimiter(1, clock)
    for number in range(100):
        limiter.admit(f"192.0.2.{number}")
    assert len(limiter.arrivals) == 100
    clock.now += HOUR
    limiter.admit("192.0.2.200")
    assert list(limiter.arrivals) == ["192.0.2.200"]
    refusing = RateLimiter(0, clock)
    refusing.admit("192.0.2.1")
    assert not refusing.arrivals
