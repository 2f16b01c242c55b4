"""Places that transfers take in turns."""

from __future__ import annotations

from kvcache.transfer.turns import Turns


class Holders:
    """Whoever has been given a place, in order."""

    def __init__(self) -> None:
        self.got: list[tuple[str, int]] = []

    def ask(self, turns: Turns, name: str) -> None:
        turns.ask(lambda place: self.got.append((name, place)))


def test_places_go_to_those_that_wait_in_order() -> None:
    turns, holders = Turns(1), Holders()
    for name in "abc":
        holders.ask(turns, name)
    assert holders.got == [("a", 0)]
    turns.give_back(0)
    turns.give_back(0)
    assert holders.got == [("a", 0), ("b", 0), ("c", 0)]


def test_a_place_that_was_asked_for_no_more_is_not_given() -> None:
    turns, holders = Turns(1), Holders()
    holders.ask(turns, "a")
    given = holders.got.append
    late = lambda place: given(("late", place))  # noqa: E731  to be forgotten by its identity
    turns.ask(late)
    holders.ask(turns, "b")
    turns.forget(late)
    turns.give_back(0)
    assert holders.got == [("a", 0), ("b", 0)]


def test_a_stuck_place_is_replaced_once_and_becomes_the_spare_one() -> None:
    turns, holders = Turns(1, num_spare=1), Holders()
    for name in "abc":
        holders.ask(turns, name)
    turns.get_stuck(0)
    turns.get_stuck(0)
    assert holders.got == [("a", 0), ("b", 1)]
    turns.give_back(0)  # c goes on waiting: one at a time
    assert len(holders.got) == 2
    turns.give_back(1)
    assert holders.got[2:] == [("c", 1)]
    turns.get_stuck(1)
    holders.ask(turns, "d")
    assert holders.got[3:] == [("d", 0)]


def test_without_a_spare_place_a_stuck_one_is_waited_for() -> None:
    turns, holders = Turns(1), Holders()
    for name in "ab":
        holders.ask(turns, name)
    turns.get_stuck(0)
    assert holders.got == [("a", 0)]
    turns.give_back(0)
    assert holders.got == [("a", 0), ("b", 0)]
