"""Request bodies of the OpenAI routes. What comes back is in ``engine.api.replies``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from engine.api.fields import (
    MAX_STOP_TOKEN_IDS,
    BadWords,
    CacheSalt,
    ChoiceCount,
    CountOrZero,
    LogitBias,
    Name,
    NumLogprobs,
    OptionalBool,
    Penalty,
    PositiveCount,
    Priority,
    Probability,
    Prompt,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    Text,
    TokenId,
    TokenIds,
    TopK,
    TopP,
    text_or,
)
from engine.api.unsupported import (
    CHAT_NEUTRAL,
    COMPLETION_NEUTRAL,
    MESSAGE_NEUTRAL,
    Neutral,
    UnknownFieldLog,
    refuse_unsupported,
    unsupported_schema,
)
from kvcache.errors import RequestError

DEFAULT_COMPLETION_TOKENS = 16


def _documented(table: dict[str, Neutral]) -> ConfigDict:
    """Fields beyond the declared ones are kept, so that they can be refused or logged."""

    def add(schema: dict[str, Any]) -> None:
        schema.setdefault("properties", {}).update(unsupported_schema(table))

    return ConfigDict(extra="allow", json_schema_extra=add, protected_namespaces=())


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: OptionalBool = None  # one last chunk with the usage and no choices
    continuous_usage_stats: OptionalBool = None  # the usage so far in every chunk


class GenerationRequest(BaseModel):
    """What completions and chat share. A field that is null counts as left out."""

    model_config = ConfigDict(extra="allow")

    model: Name | None = None  # None: the one model that is served
    max_tokens: PositiveCount | None = None
    n: ChoiceCount | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: OptionalBool = None
    seed: Seed | None = None
    stream: OptionalBool = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    bad_words: BadWords | None = None
    allowed_token_ids: TokenIds | None = None
    min_tokens: CountOrZero | None = None
    prompt_logprobs: NumLogprobs | None = None  # as in vLLM
    return_token_ids: OptionalBool = None  # as in vLLM: each choice has the token_ids of its text
    cache_salt: CacheSalt | None = None  # as in vLLM: cached KV is shared with requests of the same salt only
    priority: Priority | None = None  # as in vLLM: lower first, among the tenant's own of the same class
    service_tier: Literal["auto", "default", "flex"] | None = None  # as OpenAI's: flex is batch work
    user: Name | None = None  # accepted for the clients that send it; nothing depends on it

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to tell beside each generated one; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the tokens of the prompt."""
        return self.prompt_logprobs

    def check_options(self, neutral: dict[str, Neutral], unknown: UnknownFieldLog) -> None:
        """Refuses what is not honoured and logs what is not known.

        Raises:
            RequestError: names the field.
        """
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream: true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs come in whole answers only, not with stream: true", "prompt_logprobs")
        extras = self.model_extra or {}
        refuse_unsupported(extras, neutral)
        unknown.note(extras, neutral)
        if self.stream_options is not None:
            unknown.note(self.stream_options.model_extra or {}, {}, "stream_options.")


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    model_config = _documented(COMPLETION_NEUTRAL)

    prompt: Prompt
    max_tokens: CountOrZero | None = None  # 0, with echo: the prompt's log-probabilities alone
    echo: OptionalBool = None
    logprobs: NumLogprobs | None = None
    best_of: ChoiceCount | None = None  # only what n says: nothing ranks the samples yet

    def check(self, unknown: UnknownFieldLog) -> None:
        """All that the types alone do not say; see ``check_options``."""
        self.check_options(COMPLETION_NEUTRAL, unknown)
        if self.best_of not in (None, self.num_choices):
            raise RequestError("best_of other than n is not supported yet", "best_of")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens is 0; without echo it must be at least 1", "max_tokens")

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        if not self.echo or self.logprobs is None:
            return self.prompt_logprobs
        return max(self.logprobs, self.prompt_logprobs or 0)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, in order."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["text"]
    text: Text


Content = Annotated[
    Annotated[Text, Tag("as:text")] | Annotated[list[TextPart], Field(max_length=1024), Tag("as:parts")],
    text_or("as:parts"),
]


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = _documented(MESSAGE_NEUTRAL)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(default=None, validate_default=True)
    name: Name | None = None
    tool_call_id: Name | None = None

    @field_validator("content")
    @classmethod
    def _only_an_assistant_may_be_silent(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("content_missing", "Only an assistant message may go without content")
        return content

    def for_template(self) -> dict[str, str]:
        """What a chat template sees: text parts joined by line ends, ``developer`` as ``system``."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content or ())
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def check_messages(messages: Sequence[ChatMessage], unknown: UnknownFieldLog) -> None:
    """As ``GenerationRequest.check_options``, for the fields of each message."""
    for position, message in enumerate(messages):
        extras = message.model_extra or {}
        refuse_unsupported(extras, MESSAGE_NEUTRAL, f"messages[{position}].")
        unknown.note(extras, MESSAGE_NEUTRAL, "messages[].")


class ChatRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    model_config = _documented(CHAT_NEUTRAL)

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: PositiveCount | None = None  # OpenAI's newer name of max_tokens
    logprobs: OptionalBool = None
    top_logprobs: NumLogprobs | None = None

    def check(self, unknown: UnknownFieldLog) -> None:
        """All that the types alone do not say; see ``check_options``."""
        self.check_options(CHAT_NEUTRAL, unknown)
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_tokens and max_completion_tokens contradict each other", "max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs: true", "top_logprobs")
        check_messages(self.messages, unknown)

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(BaseModel):
    """Body of ``POST /tokenize``: a text or a conversation. What it does not know is refused."""

    model_config = ConfigDict(extra="forbid")

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: StrictBool = True  # of a prompt; a chat template writes its own


class DetokenizeRequest(BaseModel):
    """Body of ``POST /detokenize``."""

    model: Name | None = None
    tokens: TokenIds
