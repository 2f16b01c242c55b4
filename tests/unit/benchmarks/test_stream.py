"""What counts as content, as an end and as a failure in a streamed answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.measurements import Failure, RequestOutcome
from benchmarks.stream import LineBuffer, StreamRecorder
from benchmarks.workload import PlannedRequest

USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}


def text(content: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": content, "finish_reason": finish_reason}]}


def delta(finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields, "finish_reason": finish_reason}]}


def record(*events: dict[str, Any] | str) -> RequestOutcome:
    """The outcome when event number n (from 1) arrives at second n, sent at 0.5 s."""
    recorder = StreamRecorder(PlannedRequest(index=0, arrival_s=0.25, input_tokens=9, output_tokens=5))
    recorder.sent(0.5)
    for second, event in enumerate(events, start=1):
        payload = event if isinstance(event, str) else json.dumps(event)
        recorder.feed(f"data: {payload}\n\n".encode(), float(second))
    return recorder.outcome()


def test_a_complete_stream_has_the_times_of_its_content_and_the_tokens_of_its_usage() -> None:
    outcome = record(text("a"), text("b"), text("c", "length"), USAGE, "[DONE]")
    assert outcome.failure is None
    assert outcome.content_times_s == (1.0, 2.0, 3.0)
    assert (outcome.ttft_s, outcome.e2el_s, outcome.tpot_s) == (0.5, 2.5, 0.5)
    assert (outcome.input_tokens, outcome.output_tokens) == (7, 5)


def test_without_usage_tokens_are_counted_from_events_and_the_plan() -> None:
    outcome = record(text("a"), text("b", "stop"), "[DONE]")
    assert (outcome.input_tokens, outcome.output_tokens) == (9, 2)


@pytest.mark.parametrize("end", [(), ("[DONE]",), (USAGE, "[DONE]")])
def test_a_stream_without_finish_reason_failed(end: tuple[dict[str, Any] | str, ...]) -> None:
    assert record(text("a"), text("b"), *end).failure == Failure.NO_FINISH_REASON


def test_an_error_frame_fails_the_request_with_the_servers_message() -> None:
    outcome = record(text("a"), {"error": {"message": "worker lost"}})
    assert outcome.failure == Failure.ERROR_FRAME
    assert "worker lost" in outcome.detail


def test_an_error_frame_after_finish_reason_still_fails_the_request() -> None:
    assert record(text("a", "stop"), {"error": {"message": "late"}}).failure == Failure.ERROR_FRAME


def test_a_finish_reason_of_abort_is_a_failure() -> None:
    assert record(text("a"), text("", "abort")).failure == Failure.ABORTED


@pytest.mark.parametrize("payload", ["{", "[]", "3", '{"choices": 1}', '{"usage": {"prompt_tokens": "many"}}'])
def test_a_frame_that_is_no_event_fails_the_request(payload: str) -> None:
    assert record(text("a"), payload, text("", "stop")).failure == Failure.BAD_FRAME


def test_an_answer_without_tokens_failed() -> None:
    assert record(text("", "stop")).failure == Failure.EMPTY


def test_the_role_event_and_the_empty_closing_event_of_a_chat_are_no_content() -> None:
    outcome = record(delta(role="assistant", content=""), delta(content="a"), delta(content="b"), delta("stop"))
    assert outcome.failure is None
    assert outcome.content_times_s == (2.0, 3.0)
    assert outcome.e2el_s == 3.5


def test_reasoning_and_tool_calls_are_content() -> None:
    outcome = record(delta(reasoning_content="hm"), delta(tool_calls=[{"index": 0}]), delta("tool_calls"))
    assert outcome.content_times_s == (1.0, 2.0)


def test_a_token_whose_text_is_held_back_is_content() -> None:
    assert record(text(""), text("é"), text("", "stop")).content_times_s == (1.0, 2.0)


def test_one_token_without_text_is_timed_by_the_closing_event() -> None:
    outcome = record(text("", "length"), {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 1}})
    assert outcome.failure is None
    assert outcome.content_times_s == (1.0,)


def test_lines_come_in_any_pieces() -> None:
    stream = b': comment\r\nevent: x\r\ndata: {"a": 1}\r\n\r\ndata:[DONE]\n\ndata: unfinished'
    for size in range(1, len(stream)):
        lines = LineBuffer()
        pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert [payload for piece in pieces for payload in lines.feed(piece)] == [b'{"a": 1}', b"[DONE]"]
