"""``/v1/chat/completions``: messages in, message out."""

from __future__ import annotations

from typing import Any

from tests.fakes import FakeEngine, Script, deltas_of
from tests.unit.engine.calls import CHAT, HELLO, assert_openai_error, call, frames_of


def prompt_of(engine: FakeEngine) -> str:
    return engine.tokenizer.decode(engine.calls[0].prompt_token_ids)


def test_an_answer_has_openai_s_shape() -> None:
    engine = FakeEngine()
    reply = call(engine, CHAT, {"model": "tiny", "messages": HELLO}).json()
    assert reply["id"].startswith("chatcmpl-")
    assert reply["object"] == "chat.completion"
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hello world"}
    assert choice["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == 2
    assert prompt_of(engine) == "user: hello\nassistant:"


def test_without_a_limit_the_rest_of_the_context_is_free() -> None:
    engine = FakeEngine(max_model_len=100)
    call(engine, CHAT, {"messages": HELLO})
    (made,) = engine.calls
    assert made.sampling.max_tokens == 100 - len(made.prompt_token_ids)


def test_both_names_of_the_limit_are_understood() -> None:
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}):
        engine = FakeEngine()
        call(engine, CHAT, {"messages": HELLO} | limit)
        assert engine.calls[0].sampling.max_tokens == 3


def test_limits_that_contradict_each_other_are_refused() -> None:
    body = {"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4}
    assert_openai_error(call(FakeEngine(), CHAT, body), 400, "max_completion_tokens")


def test_a_limit_over_the_context_is_refused_under_the_name_that_was_used() -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        error = assert_openai_error(call(FakeEngine(), CHAT, {"messages": HELLO, name: 5000}), 400, name)
        assert "5000" in error["message"]
        assert "100" in error["message"]


def test_all_roles_and_kinds_of_content_are_accepted() -> None:
    engine = FakeEngine(max_model_len=1000)
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant"},
        {"role": "tool", "content": "42", "tool_call_id": "x"},
        {"role": "system", "content": ""},
    ]
    assert call(engine, CHAT, {"messages": messages}).status_code == 200
    assert prompt_of(engine) == (
        "system: be brief\nuser: one\ntwo\nassistant: \nassistant: \ntool: 42\nsystem: \nassistant:"
    )


def test_a_refusal_of_the_template_names_the_messages() -> None:
    error = assert_openai_error(
        call(FakeEngine(), CHAT, {"messages": [{"role": "tool", "content": "x"}]}), 400, "messages"
    )
    assert "cannot begin with a tool" in error["message"]


def test_each_streamed_choice_begins_with_the_role_and_ends_with_a_reason() -> None:
    engine = FakeEngine(Script(deltas_of("a", "b")), Script(deltas_of("c")))
    *chunks, usage, done = frames_of(
        call(engine, CHAT, {"messages": HELLO, "n": 2, "stream": True, "stream_options": {"include_usage": True}})
    )
    assert done == "[DONE]"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 3)
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert [chunk["choices"][0]["index"] for chunk in chunks[:2]] == [0, 1]
    for index, text in ((0, "ab"), (1, "c")):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"]["content"] for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
