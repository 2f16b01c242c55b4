"""Log-probabilities in the shapes of OpenAI, read by its client, and what is asked of the engine for them."""

from __future__ import annotations

from typing import Any, cast

import openai
import pytest

from engine.outputs import OutputLogprobs, TextDelta
from scheduler.request import FinishReason, TokenLogprobs
from tests.fakes import FakeEngine, Script, deltas_of
from tests.unit.engine.calls import CHAT, COMPLETIONS, HELLO, call, frames_of
from tests.unit.engine.test_api_openai_client import with_client

TOKENIZER = FakeEngine().tokenizer
HELLO_ID, SPACE_ID, H_ID = (TOKENIZER.encode(text)[0] for text in ("hello", " ", "h"))
EURO_PART = TOKENIZER.encode("€")[0]  # a byte that is no character
LOW = -float("inf")
PROMPT = [HELLO_ID, H_ID, SPACE_ID]
OF_PROMPT = (
    TokenLogprobs(-2.5, 3, (HELLO_ID, SPACE_ID), (-0.25, -1.5)),
    TokenLogprobs(-0.5, 1, (SPACE_ID, H_ID), (-0.5, -1.0)),
)


def script(with_prompt: bool = False) -> Script:
    """Three tokens, "hello", a byte and the end: the first by far not the likeliest, the last held beside it."""
    tokens = (
        (HELLO_ID, "hello", TokenLogprobs(-3.5, 9, (H_ID, SPACE_ID), (-0.125, -2.0))),
        (EURO_PART, "", TokenLogprobs(-0.75, 1, (EURO_PART, H_ID), (-0.75, LOW))),
        (0, "", TokenLogprobs(LOW, 40, (H_ID, SPACE_ID), (0.0, -20.0))),
    )
    offsets = (0, 5, 5)
    return Script(
        tuple(
            TextDelta(
                text,
                (token_id,),
                FinishReason.STOP if token_id == 0 else None,
                logprobs=(OutputLogprobs(token_id, offset, logprobs),),
                prompt_logprobs=OF_PROMPT if with_prompt and offset == 0 else (),
            )
            for (token_id, text, logprobs), offset in zip(tokens, offsets, strict=True)
        )
    )


EXPECTED = {
    "tokens": ["hello", "bytes:\\xe2", "<|end|>"],
    "token_logprobs": [-3.5, -0.75, -9999.0],
    "text_offset": [0, 5, 5],
    "top_logprobs": [
        {"h": -0.125, " ": -2.0, "hello": -3.5},  # the token itself beside the likeliest
        {"bytes:\\xe2": -0.75, "h": -9999.0},
        {"h": 0.0, " ": -20.0, "<|end|>": -9999.0},
    ],
}


def complete(engine: FakeEngine, **body: Any) -> Any:
    async def use(client: openai.AsyncOpenAI) -> Any:
        return await client.completions.create(model="tiny", **({"prompt": PROMPT} | body))

    return with_client(engine, use)


def test_completions_tell_tokens_offsets_and_the_likeliest() -> None:
    engine = FakeEngine(script())
    choice = complete(engine, logprobs=2).choices[0]
    assert choice.logprobs.model_dump() == EXPECTED
    assert engine.calls[0].sampling.logprobs == 2


def test_none_are_told_unless_asked_for() -> None:
    engine = FakeEngine()
    assert complete(engine).choices[0].logprobs is None
    sampling = engine.calls[0].sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (None, None)


def test_zero_likeliest_leave_the_token_itself() -> None:
    engine = FakeEngine(script())
    logprobs = complete(engine, logprobs=0).choices[0].logprobs
    assert logprobs.top_logprobs == [{"hello": -3.5}, {"bytes:\\xe2": -0.75}, {"<|end|>": -9999.0}]
    assert engine.calls[0].sampling.logprobs == 0


def test_a_stream_tells_the_same_in_parts() -> None:
    frames = frames_of(call(FakeEngine(script()), COMPLETIONS, {"prompt": PROMPT, "logprobs": 2, "stream": True}))
    parts = [frame["choices"][0]["logprobs"] for frame in frames[:-1]]
    for name, values in EXPECTED.items():
        assert [value for part in parts for value in part[name]] == values


def test_echo_begins_with_the_prompt_whose_first_token_has_none() -> None:
    engine = FakeEngine(script(with_prompt=True))
    choice = complete(engine, logprobs=1, echo=True).choices[0]
    assert choice.text == "helloh hello"
    logprobs = choice.logprobs
    assert logprobs.tokens == ["hello", "h", " ", *EXPECTED["tokens"]]
    assert logprobs.token_logprobs == [None, -2.5, -0.5, -3.5, -0.75, -9999.0]
    assert logprobs.text_offset == [0, 5, 6, 7, 12, 12]
    assert logprobs.top_logprobs[:3] == [None, {"hello": -0.25, "h": -2.5}, {" ": -0.5}]
    assert engine.calls[0].sampling.prompt_logprobs == 1


def test_echo_of_a_text_gives_that_text_with_or_without_log_probabilities() -> None:
    choice = complete(FakeEngine(), prompt="hello fox", echo=True).choices[0]
    assert (choice.text, choice.logprobs) == ("hello foxhello world", None)


def test_a_stream_echoes_once() -> None:
    engine = FakeEngine(script(with_prompt=True))
    frames = frames_of(call(engine, COMPLETIONS, {"prompt": PROMPT, "logprobs": 1, "echo": True, "stream": True}))
    choices = [frame["choices"][0] for frame in frames[:-1]]
    assert [choice["text"] for choice in choices] == ["helloh hello", "", ""]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [4, 1, 1]
    assert [choice["logprobs"]["text_offset"][0] for choice in choices] == [0, 12, 12]


def test_echo_without_new_tokens_scores_the_prompt_alone() -> None:
    engine = FakeEngine(script(with_prompt=True))
    reply = complete(engine, logprobs=1, echo=True, max_tokens=0)
    choice = reply.choices[0]
    assert (choice.text, choice.finish_reason) == ("helloh ", "length")
    assert choice.logprobs.token_logprobs == [None, -2.5, -0.5]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 0)
    assert engine.calls[0].sampling.max_tokens == 1


def test_every_choice_and_prompt_has_its_own() -> None:
    engine = FakeEngine(script(with_prompt=True))
    reply = complete(engine, prompt=[PROMPT, PROMPT], n=2, logprobs=1, echo=True)
    assert [choice.logprobs.token_logprobs[:3] for choice in reply.choices] == [[None, -2.5, -0.5]] * 4


def test_chat_tells_bytes_and_the_likeliest() -> None:
    async def use(client: openai.AsyncOpenAI) -> Any:
        return await client.chat.completions.create(
            model="tiny", messages=cast(Any, HELLO), logprobs=True, top_logprobs=2
        )

    engine = FakeEngine(script())
    told = with_client(engine, use).choices[0].logprobs
    assert told.refusal is None
    assert [entry.token for entry in told.content] == EXPECTED["tokens"]
    assert [entry.logprob for entry in told.content] == EXPECTED["token_logprobs"]
    assert [entry.bytes for entry in told.content] == [list(b"hello"), [0xE2], list(b"<|end|>")]
    first = [(top.token, top.logprob, bytes(top.bytes or ())) for top in told.content[0].top_logprobs]
    assert first == [("h", -0.125, b"h"), (" ", -2.0, b" ")]
    assert engine.calls[0].sampling.logprobs == 2


@pytest.mark.parametrize("top", [{}, {"top_logprobs": 0}])
def test_chat_without_a_number_tells_the_tokens_alone(top: dict[str, int]) -> None:
    engine = FakeEngine()
    assert call(engine, CHAT, {"messages": HELLO, "logprobs": True} | top).status_code == 200
    assert engine.calls[0].sampling.logprobs == 0


def test_a_chat_stream_tells_each_token_with_its_chunk() -> None:
    engine = FakeEngine(script())
    frames = frames_of(call(engine, CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "stream": True}))
    told = [frame["choices"][0]["logprobs"] for frame in frames[:-1]]
    assert told[0] is None  # who speaks
    assert [[entry["token"] for entry in each["content"]] for each in told[1:]] == [
        [text] for text in EXPECTED["tokens"]
    ]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_prompt_logprobs_are_by_token_id_as_in_vllm(path: str) -> None:
    prompt = TOKENIZER.render_chat(HELLO) if path == CHAT else PROMPT
    of_prompt = OF_PROMPT[:1] * (len(prompt) - 1)
    first, last = deltas_of("x", "y")
    engine = FakeEngine(Script((TextDelta(first.text, first.token_ids, prompt_logprobs=of_prompt), last)))
    body = {"messages": HELLO} if path == CHAT else {"prompt": PROMPT}
    reply = call(engine, path, body | {"prompt_logprobs": 1}).json()
    told = reply["prompt_logprobs"] if path == CHAT else reply["choices"][0]["prompt_logprobs"]
    assert told[0] is None
    assert len(told) == len(prompt)
    assert told[1] == {
        str(prompt[1]): {"logprob": -2.5, "rank": 3, "decoded_token": TOKENIZER.token_text(prompt[1])},
        str(HELLO_ID): {"logprob": -0.25, "rank": 1, "decoded_token": "hello"},
    }
    assert engine.calls[0].sampling.prompt_logprobs == 1


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, {"prompt": "hello"}), (CHAT, {"messages": HELLO})])
def test_every_parameter_of_sampling_reaches_the_engine(path: str, body: dict[str, Any]) -> None:
    engine = FakeEngine()
    asked = {
        "max_tokens": 9,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": 1, "6": -100},
        "allowed_token_ids": [5, 6, 5],
        "min_tokens": 2.0,
    }
    assert call(engine, path, body | asked).status_code == 200
    sampling = engine.calls[0].sampling
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 0.5, -0.5)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.2, ((5, 1.0), (6, -100.0)))
    assert (sampling.allowed_token_ids, sampling.min_tokens) == ((5, 6), 2)


def test_a_bad_word_is_one_at_the_beginning_and_one_after_a_space() -> None:
    engine = FakeEngine()
    assert call(engine, COMPLETIONS, {"prompt": "hello", "bad_words": ["fox", " fox"]}).status_code == 200
    expected = {tuple(TOKENIZER.encode("fox")), tuple(TOKENIZER.encode(" fox"))}
    assert len(expected) == 2
    assert set(engine.calls[0].sampling.bad_words) == expected
    assert len(engine.calls[0].sampling.bad_words) == 2
