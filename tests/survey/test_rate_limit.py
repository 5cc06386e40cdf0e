"""The door: no address sends more than agreed within any hour, others are not held up, and nobody is remembered."""

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
def test_as_many_as_agreed_come_in_within_any_hour_and_who_waits_as_told_comes_in(
    came: list[tuple[str, int]], most: int
) -> None:
    clock = Clock()
    door = RateLimiter(most, clock)
    let_in = defaultdict[str, list[float]](list)
    for address, later in came:
        clock.now += later
        recent = [time for time in let_in[address] if time > clock.now - HOUR]
        wait = door.wait(address)
        if len(recent) < most:
            assert wait == 0
            let_in[address].append(clock.now)
        else:
            assert wait == recent[0] + HOUR - clock.now
    wait = door.wait("192.0.2.1")
    clock.now += wait
    assert wait == 0 or door.wait("192.0.2.1") == 0


def test_a_closed_door_lets_nobody_in() -> None:
    assert RateLimiter(0).wait("192.0.2.1") == HOUR


def test_a_network_is_one_address_and_an_address_is_the_same_in_both_writings() -> None:
    door = RateLimiter(1)
    assert door.wait("2001:db8:0:1::1") == 0
    assert door.wait("2001:db8:0:1:ffff::2") > 0
    assert door.wait("2001:db8:0:2::1") == 0
    assert door.wait("192.0.2.1") == 0
    assert door.wait("::ffff:192.0.2.1") > 0
    assert door.wait("::ffff:192.0.2.2") == 0
    assert door.wait("unix socket") == 0
    assert door.wait("unix socket") > 0


def test_an_address_is_forgotten_after_an_hour_and_one_that_is_turned_away_is_not_kept() -> None:
    clock = Clock()
    door = RateLimiter(1, clock)
    for number in range(100):
        door.wait(f"192.0.2.{number}")
    assert len(door.came) == 100
    clock.now += HOUR
    door.wait("192.0.2.200")
    assert list(door.came) == ["192.0.2.200"]
    closed = RateLimiter(0, clock)
    closed.wait("192.0.2.1")
    assert not closed.came
