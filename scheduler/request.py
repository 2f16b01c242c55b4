"""One sequence on one worker: what is asked for, how far it is, and which status may follow which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from kvcache.errors import InvariantError, RequestError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens of one sequence are chosen. Validated at the edge, trusted inside.

    ``seed`` is always set: the gateway draws one when the client gives none. The random draw of the token
    at position p depends on (seed, p) alone, so neither the batch around a sequence nor a move to another
    worker changes its tokens.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 means greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 means every token
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # the model's end tokens are in here unless ignore_eos


MAX_STOP_TOKENS = 1024


def check_sequence(
    prompt_token_ids: Sequence[int], sampling: SamplingParams, *, max_model_len: int, vocab_size: int
) -> None:
    """The limits of one sequence, the same at the HTTP edge and at the gRPC edge.

    Raises:
        RequestError: names the field and both numbers.
    """
    num_prompt_tokens = len(prompt_token_ids)
    if num_prompt_tokens == 0:
        raise RequestError("The prompt is empty; it needs at least one token.", "prompt")
    if num_prompt_tokens >= max_model_len:
        raise RequestError(
            f"The prompt has {num_prompt_tokens} tokens; the model's context of {max_model_len} leaves no room"
            " for an answer.",
            "prompt",
        )
    if not 1 <= sampling.max_tokens <= max_model_len - num_prompt_tokens:
        raise RequestError(
            f"max_tokens is {sampling.max_tokens}; with a prompt of {num_prompt_tokens} tokens it must be between 1"
            f" and {max_model_len - num_prompt_tokens}, for the model's context is {max_model_len} tokens.",
            "max_tokens",
        )
    if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < vocab_size:
        raise RequestError(f"Token ids of the prompt must be between 0 and {vocab_size - 1}.", "prompt")
    if len(sampling.stop_token_ids) > MAX_STOP_TOKENS:
        raise RequestError(f"There are more than {MAX_STOP_TOKENS} stop tokens.", "stop_token_ids")
    _check_range("temperature", sampling.temperature, 0.0, 2.0)
    _check_range("top_p", sampling.top_p, 0.0, 1.0)
    _check_range("top_k", sampling.top_k, 0, vocab_size)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # false for NaN too
        raise RequestError(f"{name} is {value}; it must be between {low:g} and {high:g}.", name)


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
    arrival: int = 0  # order of arrival on this worker; the oldest is preempted last
    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

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
