"""Stop strings, against a search in the whole text."""

import random

import pytest

from engine.stop_strings import StopCheck, StopStrings
from kvcache.errors import InvariantError


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The stop string that ends first, and of those the longest; read off the whole text."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def streamed(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    checker = StopStrings(stops)
    shown = ""
    for piece in pieces:
        check = checker.push(piece)
        shown += check.text
        if check.stop is not None:
            return shown, check.stop
    return shown + checker.flush(), None


def test_any_cut_of_a_text_gives_what_a_search_in_the_whole_gives() -> None:
    rng = random.Random(1)
    stopped = 0
    for _ in range(3000):
        text = "".join(rng.choices("abc", k=rng.randrange(30)))
        stops = ["".join(rng.choices("abc", k=rng.randrange(1, 6))) for _ in range(rng.randrange(4))]
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(8)))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert streamed(pieces, stops) == expected(text, stops)
        stopped += expected(text, stops)[1] is not None
    assert 500 < stopped < 2500  # both outcomes were tried


def test_only_the_end_that_may_begin_a_stop_string_is_held() -> None:
    checker = StopStrings(["\n\nUser:", "END"])
    assert checker.push("one\n") == StopCheck("one")
    assert checker.push("\ntwo E") == StopCheck("\n\ntwo ")
    assert checker.push("N") == StopCheck("")
    assert checker.push("Dmore") == StopCheck("", "END")
    assert checker.flush() == ""


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopStrings([]).push("text") == StopCheck("text")


def test_text_after_a_stop_string_is_a_bug() -> None:
    checker = StopStrings(["a"])
    checker.push("a")
    with pytest.raises(InvariantError):
        checker.push("b")
