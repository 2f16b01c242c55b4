"""``/v1/completions``: what is asked of the engine, and how its pieces become an answer."""

from __future__ import annotations

from typing import Any

import pytest

from kvcache.errors import InvariantError, OverloadedError, RequestError, TransferError, TransferFault, UnavailableError
from scheduler.request import FinishReason
from tests.fakes import FakeEngine, Script, deltas_of
from tests.unit.engine.calls import CHAT, COMPLETIONS, HELLO, assert_openai_error, call, frames_of


def test_an_answer_has_openai_s_shape() -> None:
    engine = FakeEngine()
    reply = call(engine, COMPLETIONS, {"model": "org/tiny", "prompt": "hello", "max_tokens": 5}).json()
    prompt_tokens = len(engine.tokenizer.encode("hello"))
    assert reply.pop("id").startswith("cmpl-")
    assert reply.pop("created") > 1_700_000_000
    assert reply == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "text": "hello world",
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
                "logprobs": None,
                "prompt_logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 2,
            "total_tokens": prompt_tokens + 2,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert engine.open == 0


def test_defaults_are_openai_s() -> None:
    engine = FakeEngine()
    call(engine, COMPLETIONS, {"prompt": "hello"})
    sampling = engine.calls[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (16, 1.0, 1.0, 0)
    assert sampling.stop_token_ids == (0,)


def test_every_honoured_option_reaches_the_engine() -> None:
    engine = FakeEngine()
    body = {
        "prompt": [3, 4, 5],
        "max_tokens": 7.0,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 9,
        "seed": -4,
        "stop": ["a", "b"],
        "stop_token_ids": [8, 0],
        "user": "me",
    }
    assert call(engine, COMPLETIONS, body).status_code == 200
    (made,) = engine.calls
    sampling = made.sampling
    assert made.prompt_token_ids == (3, 4, 5)
    assert made.stop == ("a", "b")
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (
        7,
        0,
        0.5,
        9,
        -4,
    )
    assert sampling.stop_token_ids == (0, 8)


def test_ignoring_the_end_token_leaves_the_request_s_own_stop_tokens() -> None:
    engine = FakeEngine()
    call(engine, COMPLETIONS, {"prompt": "hello", "ignore_eos": True, "stop_token_ids": [8], "top_k": -1})
    assert engine.calls[0].sampling.stop_token_ids == (8,)
    assert engine.calls[0].sampling.top_k == 0


@pytest.mark.parametrize("neutral", [{"cache_salt": None}, {"response_format": {"type": "text"}}, {"best_of": 1}])
def test_a_neutral_value_of_an_option_not_honoured_is_accepted(neutral: dict[str, Any]) -> None:
    assert call(FakeEngine(), COMPLETIONS, {"prompt": "hello"} | neutral).status_code == 200


def test_a_null_option_counts_as_left_out() -> None:
    fields = (
        "model",
        "max_tokens",
        "n",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "logprobs",
    )
    assert call(FakeEngine(), COMPLETIONS, {"prompt": "hello"} | dict.fromkeys(fields)).status_code == 200


def test_prompts_and_choices_are_indexed_prompt_by_prompt() -> None:
    scripts = [Script(deltas_of(text)) for text in ("a0", "a1", "b0", "b1")]
    engine = FakeEngine(*scripts)
    reply = call(engine, COMPLETIONS, {"prompt": [[1, 2], [3]], "n": 2, "seed": 10}).json()
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [
        (0, "a0"), (1, "a1"), (2, "b0"), (3, "b1"),
    ]  # fmt: skip
    assert [made.prompt_token_ids for made in engine.calls] == [(1, 2), (1, 2), (3,), (3,)]
    assert [made.sampling.seed for made in engine.calls] == [10, 11, 10, 11]
    assert reply["usage"]["prompt_tokens"] == 3  # each prompt once
    assert reply["usage"]["completion_tokens"] == 4


def test_the_largest_seed_has_neighbours() -> None:
    engine = FakeEngine()
    call(engine, COMPLETIONS, {"prompt": "hello", "n": 2, "seed": 2**63 - 1})
    assert [made.sampling.seed for made in engine.calls] == [2**63 - 1, -(2**63)]


def test_without_a_seed_every_choice_draws_its_own() -> None:
    engine = FakeEngine()
    call(engine, COMPLETIONS, {"prompt": "hello", "n": 8})
    assert len({made.sampling.seed for made in engine.calls}) == 8


def test_a_stream_is_data_frames_and_ends_with_done() -> None:
    engine = FakeEngine(Script(deltas_of("he", "", "llo", reason=FinishReason.LENGTH)))
    *chunks, done = frames_of(call(engine, COMPLETIONS, {"prompt": "hello", "stream": True}))
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["he", "", "llo"]  # one per token, to time them by
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_token_ids_are_told_on_request(path: str) -> None:
    body = {"prompt": "hello"} if path == COMPLETIONS else {"messages": HELLO}
    script = Script(deltas_of("a", "b", "c"))
    whole = call(FakeEngine(script), path, body | {"return_token_ids": True}).json()
    assert whole["choices"][0]["token_ids"] == [100, 101, 102]
    *chunks, _ = frames_of(call(FakeEngine(script), path, body | {"return_token_ids": True, "stream": True}))
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks if chunk["choices"][0]["token_ids"]] == [
        [100],
        [101],
        [102],
    ]


def test_the_usage_chunk_comes_last_and_only_when_asked_for() -> None:
    body = {"prompt": [1, 2, 3], "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = frames_of(call(FakeEngine(), COMPLETIONS, body))
    assert (len(chunks), done) == (2, "[DONE]")
    assert usage["choices"] == []
    assert (usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"]) == (3, 2)


def test_continuous_usage_counts_the_tokens_so_far() -> None:
    body = {"prompt": [1, 2, 3], "stream": True, "stream_options": {"continuous_usage_stats": True}}
    chunks = frames_of(call(FakeEngine(), COMPLETIONS, body))[:-1]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("does not fit the KV cache", "max_tokens"), 400, "invalid_value"),
        (OverloadedError("queues are full", 2.2), 503, "overloaded"),
        (UnavailableError("no decode worker", 0.1), 503, "unavailable"),
        (TransferError(TransferFault.EXPIRED, "lease"), 503, "unavailable"),
        (InvariantError("blocks"), 500, "internal_error"),
        (ZeroDivisionError("secret"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_error_before_the_first_byte_is_a_status(
    error: Exception, status: int, code: str, stream: bool
) -> None:
    engine = FakeEngine(Script(error=error))
    response = call(engine, COMPLETIONS, {"prompt": "hello", "stream": stream})
    told = assert_openai_error(response, status, getattr(error, "param", None))
    assert told["code"] == code
    assert ("retry-after" in response.headers) == (status == 503)
    assert response.headers.get("x-should-retry") == ("false" if status == 500 else None)
    assert "secret" not in response.text
    assert engine.open == 0


def test_retry_after_is_whole_seconds_and_at_least_one() -> None:
    for given, header in ((2.2, "3"), (0.01, "1")):
        engine = FakeEngine(Script(error=OverloadedError("full", given)))
        assert call(engine, COMPLETIONS, {"prompt": "hello"}).headers["retry-after"] == header


@pytest.mark.parametrize("n", [1, 3])
def test_an_error_after_the_first_byte_is_a_frame_and_no_done(n: int) -> None:
    failing = Script(deltas_of("he", "never")[:1], UnavailableError("the worker was lost"))
    engine = FakeEngine(failing, Script(hangs=True))
    frames = frames_of(call(engine, COMPLETIONS, {"prompt": "hello", "stream": True, "n": n}))
    assert frames[-1]["error"]["message"] == "the worker was lost"
    assert "[DONE]" not in frames
    assert (engine.open, engine.aborted) == (0, n - 1)


def test_a_sequence_that_ends_without_a_reason_is_an_error_and_no_success() -> None:
    engine = FakeEngine(Script(deltas_of("he", "never")[:1]))
    assert_openai_error(call(engine, COMPLETIONS, {"prompt": "hello"}), 500)
    frames = frames_of(call(engine, COMPLETIONS, {"prompt": "hello", "stream": True}))
    assert frames[-1]["error"]["code"] == "internal_error"


def test_when_one_choice_fails_the_others_are_aborted() -> None:
    engine = FakeEngine(Script(hangs=True), Script(error=OverloadedError("full")), Script(hangs=True))
    assert_openai_error(call(engine, COMPLETIONS, {"prompt": "hello", "n": 3}), 503)
    assert (len(engine.calls), engine.aborted, engine.open) == (3, 2, 0)
