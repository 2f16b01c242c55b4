"""One sequence on one worker: what is asked for, how far it is, and which status may follow which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from kvcache.errors import InvariantError, RequestError
from scheduler.urgency import ORDINARY, Urgency


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens of one sequence are chosen. Validated at the edge, trusted inside.

    ``seed`` is always set: the gateway draws one when the client gives none. The random draw of the token
    at position p depends on (seed, p) alone, so neither the batch around a sequence nor a move to another
    worker changes its tokens. What each field does to the logits, and in which order, is said in
    ``workers.model.sampler``.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 means greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 means every token
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # the model's end tokens are in here unless ignore_eos
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that the output may not hold
    allowed_token_ids: tuple[int, ...] = ()  # empty means every token
    min_tokens: int = 0  # output tokens before a stop token may come
    logprobs: int | None = None  # likeliest tokens told for each output token, beside the token itself
    prompt_logprobs: int | None = None  # the same for each prompt token but the first

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def alters_logits(self) -> bool:
        """Whether the choice needs more than this step's logits and the numbers of the draw."""
        return bool(
            self.has_penalties or self.logit_bias or self.bad_words or self.allowed_token_ids or self.min_tokens
        )


MAX_STOP_TOKENS = 1024
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 512  # one word, whose text may be anything


def check_sequence(
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    max_model_len: int,
    vocab_size: int,
    num_delivered_tokens: int = 0,
) -> None:
    """The limits of one sequence, the same at the HTTP edge and at the gRPC edge.

    Raises:
        RequestError: names the field and both numbers.
    """
    num_prompt_tokens = len(prompt_token_ids)
    room = room_for_answer(num_prompt_tokens, max_model_len)
    if not 1 <= sampling.max_tokens <= room:
        raise RequestError(
            f"max_tokens is {sampling.max_tokens}; with a prompt of {num_prompt_tokens} tokens it must be between 1"
            f" and {room}, for the model's context is {max_model_len} tokens.",
            "max_tokens",
        )
    if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < vocab_size:
        raise RequestError(f"Token ids of the prompt must be between 0 and {vocab_size - 1}.", "prompt")
    if not 0 <= num_delivered_tokens < num_prompt_tokens:
        raise RequestError(f"{num_delivered_tokens} of {num_prompt_tokens} tokens cannot be output.", "prompt")
    check_sampling(sampling, vocab_size=vocab_size, num_delivered_tokens=num_delivered_tokens)


def room_for_answer(num_prompt_tokens: int, max_model_len: int, param: str = "prompt") -> int:
    """How many tokens the model's context leaves for an answer, at least one.

    Raises:
        RequestError: none, or there is no prompt; names ``param``.
    """
    if num_prompt_tokens == 0:
        raise RequestError(f"{param} is empty; it needs at least one token", param)
    if num_prompt_tokens >= max_model_len:
        raise RequestError(
            f"{param} has {num_prompt_tokens} tokens; the model's context is {max_model_len} tokens, the answer"
            " included",
            param,
        )
    return max_model_len - num_prompt_tokens


def check_sampling(sampling: SamplingParams, *, vocab_size: int, num_delivered_tokens: int = 0) -> None:
    """The limits of the parameters by themselves; part of ``check_sequence``.

    Raises:
        RequestError: names the field.
    """
    _check_count("stop_token_ids", len(sampling.stop_token_ids), MAX_STOP_TOKENS)
    for token_id in sampling.stop_token_ids:
        _check_token_id("stop_token_ids", token_id, vocab_size)
    _check_range("temperature", sampling.temperature, 0.0, 2.0)
    _check_range("top_p", sampling.top_p, 0.0, 1.0)
    _check_range("top_k", sampling.top_k, 0, vocab_size)
    _check_range("min_p", sampling.min_p, 0.0, 1.0)
    _check_range("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _check_range("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    _check_range("repetition_penalty", sampling.repetition_penalty, 0.01, 100.0)
    _check_range("min_tokens", sampling.min_tokens, 0, sampling.max_tokens + num_delivered_tokens)
    for name, number in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        _check_range(name, number or 0, 0, MAX_LOGPROBS)
    _check_count("logit_bias", len(sampling.logit_bias), MAX_LOGIT_BIAS)
    for token_id, bias in sampling.logit_bias:
        _check_token_id("logit_bias", token_id, vocab_size)
        _check_range("logit_bias", bias, -100.0, 100.0)
    _check_count("bad_words", len(sampling.bad_words), MAX_BAD_WORDS)
    for word in sampling.bad_words:
        if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
            raise RequestError(f"A bad word has {len(word)} tokens, not 1 to {MAX_BAD_WORD_TOKENS}.", "bad_words")
        _check_token_id("bad_words", min(word), vocab_size)
        _check_token_id("bad_words", max(word), vocab_size)
    _check_count("allowed_token_ids", len(sampling.allowed_token_ids), vocab_size)
    if sampling.allowed_token_ids:
        _check_token_id("allowed_token_ids", min(sampling.allowed_token_ids), vocab_size)
        _check_token_id("allowed_token_ids", max(sampling.allowed_token_ids), vocab_size)
        _check_something_is_allowed(sampling)


def _check_something_is_allowed(sampling: SamplingParams) -> None:
    left = set(sampling.allowed_token_ids) - {word[0] for word in sampling.bad_words if len(word) == 1}
    if sampling.min_tokens > 0:
        left -= set(sampling.stop_token_ids)
    if not left:
        raise RequestError(
            "Every token of allowed_token_ids is a bad word, or a stop token that min_tokens forbids.",
            "allowed_token_ids",
        )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # false for NaN too
        raise RequestError(f"{name} is {value}; it must be between {low:g} and {high:g}.", name)


def _check_count(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise RequestError(f"{name} has {count} entries; there may be {limit}.", name)


def _check_token_id(name: str, token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise RequestError(f"{name} holds token id {token_id}; ids are between 0 and {vocab_size - 1}.", name)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token under the model's own distribution: the log-softmax of its unprocessed logits."""

    logprob: float
    rank: int  # 1 for the likeliest
    top_token_ids: tuple[int, ...]  # likeliest first; the token itself may be among them
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TokenHistory:
    """The tokens before the one to choose: the first ``num_tokens`` of a list that only grows at its end.

    So it stays true while the sequence goes on, and nothing is copied. Made only for sequences whose choice
    depends on it.
    """

    token_ids: Sequence[int]
    num_tokens: int
    num_prompt_tokens: int  # of the client's prompt; all after them is output, on whichever worker it was made

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class RequestStatus(StrEnum):
    """Where a sequence is on this worker."""

    WAITING = "waiting"  # holds no blocks, or blocks of a prefix only
    WAITING_FOR_KV = "waiting_for_kv"  # decode side: blocks reserved, the handoff under way
    RUNNING = "running"  # in the batch: prefill chunks first, then decode
    HANDING_OVER = "handing_over"  # prefill side: computed, blocks held until the other side has acknowledged
    FINISHED = "finished"  # holds nothing


LEGAL_TRANSITIONS: dict[RequestStatus, frozenset[RequestStatus]] = {
    RequestStatus.WAITING: frozenset({RequestStatus.WAITING_FOR_KV, RequestStatus.RUNNING, RequestStatus.FINISHED}),
    RequestStatus.WAITING_FOR_KV: frozenset({RequestStatus.RUNNING, RequestStatus.WAITING, RequestStatus.FINISHED}),
    RequestStatus.RUNNING: frozenset({RequestStatus.WAITING, RequestStatus.HANDING_OVER, RequestStatus.FINISHED}),
    RequestStatus.HANDING_OVER: frozenset({RequestStatus.FINISHED}),
    RequestStatus.FINISHED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Request:
    """A sequence being computed on one worker. Owned by that worker's ``Batcher``; nobody else changes it.

    ``token_ids`` is the prompt followed by every sampled token. The KV of the first
    ``num_computed_tokens`` of them is in the cache. ``num_cached_tokens`` of the prompt were not computed for
    this sequence, by whoever prefilled it.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    prefill_only: bool = False  # stop after the first sampled token and keep the blocks for the handoff
    remote_prefill: bool = False  # another worker computes the prompt and hands its KV over
    cache_salt: bytes = b""  # sequences share cached blocks only with those of the same salt
    num_delivered_tokens: int = 0  # the last so many of the prompt are output of a worker that was lost
    urgency: Urgency = ORDINARY
    arrival: int = 0  # order of arrival on this worker
    turn: int = 0  # see ``scheduler.batching``; 0 once its answer has begun
    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of prompt tokens 1, 2, ... as computed so far

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Sorts who is served first to first, and who is preempted first to last."""
        return *self.urgency.key, self.turn, self.arrival

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose KV is still missing: the rest of the prompt, or 1 while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def history(self) -> TokenHistory | None:
        """What choosing the next token needs of the tokens so far; None where it needs nothing."""
        if not self.sampling.alters_logits:
            return None
        return TokenHistory(self.token_ids, len(self.token_ids), self.num_prompt_tokens - self.num_delivered_tokens)

    def wanted_prompt_logits(self, start: int, end: int) -> int:
        """How many of the tokens at positions ``start`` to ``end`` need logits for the prompt's logprobs.

        The logits after position p speak of token p + 1. What is known is not computed again after a preemption.
        """
        if self.sampling.prompt_logprobs is None or self.num_output_tokens > 0:
            return 0
        return max(0, min(end, self.num_prompt_tokens - 1) - max(start, len(self.prompt_logprobs)))

    @property
    def num_known_prompt_logits(self) -> int:
        """Prompt tokens whose logits are needed no more: what they say of the next token is known, or was told."""
        return self.num_prompt_tokens if self.num_output_tokens > 0 else len(self.prompt_logprobs)

    def move_to(self, status: RequestStatus) -> None:
        """Changes the status; the only place that does.

        Raises:
            InvariantError: the table does not allow this step.
        """
        if status not in LEGAL_TRANSITIONS[self.status]:
            raise InvariantError(f"request {self.request_id} cannot go from {self.status.value} to {status.value}")
        self.status = status

    def append_token(self, token_id: int) -> FinishReason | None:
        """Adds one sampled token and says whether it ends the sequence."""
        self.token_ids.append(token_id)
        if token_id in self.sampling.stop_token_ids:
            return FinishReason.STOP
        if self.num_output_tokens >= self.sampling.max_tokens:
            return FinishReason.LENGTH
        return None
