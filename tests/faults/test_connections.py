"""F-37: which connection goes when there are too many."""

import pytest

from keel.server.connections import ConnectionLimits


class Caller:
    def __init__(self, address: str, is_idle: bool = True) -> None:
        self.address, self.is_idle, self.is_dropped = address, is_idle, False

    def drop(self) -> None:
        self.is_dropped = True


def test_an_address_has_half_and_its_oldest_idle_one_goes() -> None:
    connections = ConnectionLimits(8)
    busy = Caller("a", is_idle=False)
    callers = [busy, *(Caller("a") for _ in range(5))]
    for caller in callers:
        connections.add(caller)
    assert [caller.is_dropped for caller in callers] == [False, True, True, False, False, False]
    other = Caller("b")
    connections.add(other)
    assert not other.is_dropped


def test_who_is_not_signed_in_leaves_places_for_who_is() -> None:
    connections = ConnectionLimits(8)
    signed_in = [Caller(f"r{i}") for i in range(2)]
    for caller in signed_in:
        connections.add(caller)
        connections.promote(caller)
    strangers = [Caller(f"s{i}") for i in range(20)]
    for caller in strangers:
        connections.add(caller)
    assert not any(caller.is_dropped for caller in signed_in)
    assert sum(not caller.is_dropped for caller in strangers) == 6  # of 8


@pytest.mark.parametrize("signs_in", [True, False])
def test_who_is_gone_takes_no_place(signs_in: bool) -> None:
    connections = ConnectionLimits(8)
    for _ in range(20):
        caller = Caller("a")
        connections.add(caller)
        if signs_in:
            connections.promote(caller)
        connections.remove(caller)
        assert not caller.is_dropped


def test_where_nobody_is_idle_the_new_one_goes() -> None:
    connections = ConnectionLimits(4)
    callers = [Caller("a", is_idle=False) for _ in range(3)]
    for caller in callers:
        connections.add(caller)
    assert [caller.is_dropped for caller in callers] == [False, False, True]
