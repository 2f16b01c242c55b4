"""What the engine gives to the HTTP surface, and the port between the two."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from engine.tokenizer import Tokenizer
from scheduler.request import FinishReason, SamplingParams, TokenLogprobs
from scheduler.tenants import DEFAULT_TENANT
from scheduler.types import ClusterSnapshot
from scheduler.urgency import ORDINARY, Urgency


@dataclass(frozen=True, slots=True)
class OutputLogprobs:
    """One generated token, where its text begins in the sequence's text, and its log-probabilities."""

    token_id: int
    text_offset: int  # characters; the text's length for a token that has none
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of one sequence. The last one, and only it, has a ``finish_reason``."""

    text: str  # may be empty: part of a character, or held back for a stop string
    token_ids: tuple[int, ...]  # the tokens generated since the last piece
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token that ended it
    # Where asked for: of tokens whose text was shown, so that a stop string cuts text and these alike.
    logprobs: tuple[OutputLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # with the first piece: of the prompt's tokens but the first
    num_cached_tokens: int | None = None  # of the prompt, on the first piece: their KV was not computed anew


@dataclass(frozen=True, slots=True)
class ServedModel:
    names: tuple[str, ...]  # the first is the one reported; all are accepted
    max_model_len: int
    created: int  # unix seconds
    eos_token_ids: tuple[int, ...]
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose sequence it is, how urgent, and under which name its place in line can be asked for."""

    tenant: str = DEFAULT_TENANT
    urgency: Urgency = ORDINARY
    ticket: str | None = None  # None: under no name


SOMEBODY = Origin()


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """Where a request stands that has not ended."""

    position: int | None  # how many sequences are before it; None: it does not wait any more


class Interruption(StrEnum):
    """Why a sequence goes on elsewhere. The value is the metric label."""

    WORKER_LOST = "worker_lost"
    HANDOFF = "handoff"  # it broke, or was refused
    MOVED = "moved"  # its worker drains


class TextEngine(Protocol):
    """What the HTTP surface needs; ``engine.gateway.AsyncEngine`` is the real one, tests have a fake."""

    @property
    def model(self) -> ServedModel: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def ready(self) -> bool:
        """Whether there are workers that a request can be placed on."""
        ...

    @property
    def cluster(self) -> ClusterSnapshot:
        """The newest view of the workers, at most about a second old."""
        ...

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        stop: Sequence[str] = (),
        cache_salt: bytes = b"",
        origin: Origin = SOMEBODY,
        on_placed: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[TextDelta, None]:
        """Streams one sequence. Closing the generator (or cancelling its task) aborts it on every worker.

        ``on_placed`` hears when it has its workers, and so when its prompt costs something; again if it gets others.
        ``cache_salt``: from ``engine.cache_salt``. Cached KV is shared among sequences of the same salt only.

        Raises:
            RequestError: prompt + max_tokens do not fit the model or the KV cache of the workers.
            OverloadedError: no room now.
            RateLimitError: it cannot begin in time.
            UnavailableError: no worker for a phase, or the one at work was lost.
        """
        ...

    def queue_place(self, tenant: str, ticket: str) -> QueuePlace | None:
        """Of the first in line of the tenant's sequences with this ticket; None where there is none."""
        ...
