"""What the routes answer, as frozen dataclasses that orjson writes as they stand.

They are not pydantic models: a chunk is made for every token, and nothing in them needs checking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import orjson
from fastapi import Response

from scheduler.request import FinishReason


@dataclass(frozen=True, slots=True)
class ErrorDetail:
    message: str
    type: str
    param: str | None
    code: str | None


@dataclass(frozen=True, slots=True)
class ErrorReply:
    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class PromptTokensDetails:
    cached_tokens: int  # their KV was in the cache of the worker that prefilled


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of token ids, never estimates. A prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


@dataclass(frozen=True, slots=True)
class CompletionLogprobs:
    """OpenAI's shape for completions: four lists of one length, an entry per token of the text."""

    text_offset: list[int]
    token_logprobs: list[float | None]  # null: the first token of a prompt follows nothing
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


@dataclass(frozen=True, slots=True)
class ChatTopLogprob:
    token: str
    logprob: float
    bytes: list[int]


@dataclass(frozen=True, slots=True)
class ChatTokenLogprob:
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]


@dataclass(frozen=True, slots=True)
class ChatLogprobs:
    content: list[ChatTokenLogprob]
    refusal: None = None


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """vLLM's shape: one of the tokens that could have stood at a place of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""By token id, as a string; the token of the prompt itself is the first. Null for the prompt's first token."""


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    index: int
    text: str
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: tuple[int, ...] | None  # with return_token_ids: those that this text was made from
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(frozen=True, slots=True)
class CompletionReply:
    """A whole answer, or one chunk of a stream: OpenAI gives both the same shape."""

    id: str
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage | None
    object: Literal["text_completion"] = "text_completion"


@dataclass(frozen=True, slots=True)
class ChatText:
    role: Literal["assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class ChatDelta:
    content: str


@dataclass(frozen=True, slots=True)
class ChatChoice:
    index: int
    message: ChatText
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: tuple[int, ...] | None  # with return_token_ids: those that this text was made from
    logprobs: ChatLogprobs | None = None


@dataclass(frozen=True, slots=True)
class ChatChunkChoice:
    index: int
    delta: ChatText | ChatDelta  # the first of a choice has the role
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: tuple[int, ...] | None  # with return_token_ids: those that this text was made from
    logprobs: ChatLogprobs | None = None


@dataclass(frozen=True, slots=True)
class ChatReply:
    id: str
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    object: Literal["chat.completion"] = "chat.completion"


@dataclass(frozen=True, slots=True)
class ChatChunk:
    id: str
    created: int
    model: str
    choices: tuple[ChatChunkChoice, ...]
    usage: Usage | None
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


@dataclass(frozen=True, slots=True)
class QueueReply:
    """Where a request stands: its first sequence in line, where it has several."""

    id: str
    status: Literal["waiting", "running"]
    position: int | None  # how many sequences are before it, those of others too; null: it has a worker
    object: Literal["queue.place"] = "queue.place"


@dataclass(frozen=True, slots=True)
class ModelCard:
    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "twinpool"


@dataclass(frozen=True, slots=True)
class ModelList:
    data: tuple[ModelCard, ...]
    object: Literal["list"] = "list"


@dataclass(frozen=True, slots=True)
class TokenizeReply:
    count: int
    max_model_len: int
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class DetokenizeReply:
    prompt: str


@dataclass(frozen=True, slots=True)
class StatusReply:
    status: str


def to_json(reply: Any) -> bytes:
    """A reply dataclass as JSON. Text with lone surrogates, which JSON cannot carry, cannot come from a decoder."""
    return orjson.dumps(reply)


class JsonReply(Response):
    """A reply dataclass, written by orjson."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)
