"""Finds stop strings in text that arrives in pieces, without ever showing a part of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcache.errors import InvariantError


@dataclass(frozen=True, slots=True)
class StopCheck:
    """What one piece of text led to."""

    text: str  # may be shown now; never holds a stop string or the beginning of one
    stop: str | None = None  # the stop string that was completed; the sequence ends here


class StopStrings:
    """The stop strings of one sequence. Owned by whoever reads that sequence's text.

    The stop string that *ends* first wins, of two that end together the longer one. So the outcome depends on
    the text alone and not on how it was cut into pieces. The stop string itself is never in the output.

    Each character costs a few steps per stop string (Knuth, Morris, Pratt 1977), however long the strings are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """``stops`` are not empty strings: the request's validation sees to that."""
        self._patterns = [_Pattern(stop) for stop in stops]
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> StopCheck:
        """Takes the next piece; holds back the longest end of it that could still begin a stop string.

        Raises:
            InvariantError: a stop string was already found.
        """
        if self._stopped:
            raise InvariantError("text was pushed after its stop string")
        buffer = self._held + text
        for position in range(len(self._held), len(buffer)):
            stop = self._advance(buffer[position])
            if stop is not None:
                self._held, self._stopped = "", True
                return StopCheck(buffer[: position + 1 - len(stop)], stop)
        kept = max((pattern.matched for pattern in self._patterns), default=0)
        shown = len(buffer) - kept
        self._held = buffer[shown:]
        return StopCheck(buffer[:shown])

    def flush(self) -> str:
        """The text still held back, once no more will come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Moves every pattern on by one character; the longest one completed by it, if any."""
        found: str | None = None
        for pattern in self._patterns:
            if pattern.advance(character) and (found is None or len(pattern.text) > len(found)):
                found = pattern.text
        return found


class _Pattern:
    """One stop string and how many of its first characters the text so far ends with."""

    __slots__ = ("_fallback", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._fallback = _fallback_lengths(text)

    def advance(self, character: str) -> bool:
        """True when ``character`` completes the string."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._fallback[self.matched]
        if self.text[self.matched] == character:
            self.matched += 1
        return self.matched == len(self.text)


def _fallback_lengths(text: str) -> list[int]:
    """For each n: the longest proper prefix of ``text`` that is also an end of its first n characters."""
    lengths = [0, 0]
    for end in range(1, len(text)):
        length = lengths[end]
        while length and text[length] != text[end]:
            length = lengths[length]
        lengths.append(length + 1 if text[length] == text[end] else 0)
    return lengths
