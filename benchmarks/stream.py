"""From the bytes of a streamed answer to the outcome of a request. Pure: the caller reads the clock.

Follows the event streams of OpenAI-compatible servers: one JSON object per ``data:`` line, ``data: [DONE]``
at the end. Event names, comments and blank lines carry nothing that is needed here.
"""

from __future__ import annotations

from typing import Any

import orjson

from benchmarks.measurements import Failure, RequestOutcome
from benchmarks.workload import PlannedRequest

DATA_PREFIX = b"data:"
DONE = b"[DONE]"
BAD_FINISH_REASONS = frozenset({"abort", "error"})
MAX_DETAIL_CHARS = 300


class LineBuffer:
    """Cuts a byte stream into ``data:`` payloads; a line may arrive in any number of pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads of the lines that ``data`` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line[len(DATA_PREFIX) :].strip() for line in lines if line.startswith(DATA_PREFIX)]


class StreamRecorder:
    """Follows one request: ``sent`` once, then ``feed`` per read or ``fail``, then ``outcome``.

    All times are seconds on the caller's clock. The first failure stays.

    A content event is one that shows a token to the user: text, or in a plain completion an empty text
    without ``finish_reason`` (a token that is held back, such as half of a character). The role event that
    opens a chat and an empty closing event are none: counting them would measure the server's framing.
    """

    def __init__(self, request: PlannedRequest) -> None:
        self._request = request
        self._lines = LineBuffer()
        self._sent_s = request.arrival_s
        self._content_times_s: list[float] = []
        self._finished_s: float | None = None
        self._usage: dict[str, Any] = {}
        self._failure: str | None = None
        self._detail = ""

    def sent(self, now_s: float) -> None:
        self._sent_s = now_s

    def fail(self, reason: str, detail: str) -> None:
        if self._failure is None:
            self._failure = reason
            self._detail = " ".join(detail.split())[:MAX_DETAIL_CHARS]

    def feed(self, data: bytes, now_s: float) -> None:
        """Take what one read returned. Never raises for what a server sent: it fails the request instead."""
        for payload in self._lines.feed(data):
            if payload == DONE:
                continue
            try:
                event = orjson.loads(payload)
                self._take_event(event, now_s)
            except (ValueError, AttributeError, TypeError, KeyError) as error:
                self.fail(Failure.BAD_FRAME, f"{type(error).__name__}: {error}")

    def outcome(self) -> RequestOutcome:
        """The result, once the stream has ended or failed."""
        times_s = tuple(self._content_times_s)
        output_tokens = int(self._usage.get("completion_tokens", len(times_s)))
        if self._failure is None and self._finished_s is None:
            self.fail(Failure.NO_FINISH_REASON, "the stream ended without finish_reason")
        if self._failure is None and output_tokens == 0:
            self.fail(Failure.EMPTY, "the answer has no tokens")
        if not times_s and self._finished_s is not None:
            # All text was withheld, say a single special token: the closing event is the first sign of it.
            times_s = (self._finished_s,)
        return RequestOutcome(
            scheduled_s=self._request.arrival_s,
            sent_s=self._sent_s,
            content_times_s=times_s,
            finished_s=self._sent_s if self._finished_s is None else self._finished_s,
            input_tokens=int(self._usage.get("prompt_tokens", self._request.input_tokens)),
            output_tokens=output_tokens,
            requested_output_tokens=self._request.output_tokens,
            failure=self._failure,
            detail=self._detail,
        )

    def _take_event(self, event: dict[str, Any], now_s: float) -> None:
        if event.get("error") or event.get("object") == "error":
            self.fail(Failure.ERROR_FRAME, orjson.dumps(event.get("error") or event).decode())
            return
        usage = event.get("usage")
        if usage:
            self._usage = {key: int(usage[key]) for key in ("prompt_tokens", "completion_tokens")}
        for choice in event.get("choices") or ():
            self._take_choice(choice, now_s)

    def _take_choice(self, choice: dict[str, Any], now_s: float) -> None:
        finish_reason = choice.get("finish_reason")
        if _is_content(choice, closing=finish_reason is not None):
            self._content_times_s.append(now_s)
        if finish_reason is None:
            return
        self._finished_s = now_s
        if finish_reason in BAD_FINISH_REASONS:
            self.fail(Failure.ABORTED, f"finish_reason is {finish_reason}")


def _is_content(choice: dict[str, Any], *, closing: bool) -> bool:
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text")) or not closing
    shown = any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls", "refusal"))
    return shown or not (closing or "role" in delta)
