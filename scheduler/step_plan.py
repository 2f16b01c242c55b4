"""A step of one worker as the batcher plans it, and what comes out of it: all that batcher and model runner share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, chain

from scheduler.request import FinishReason, Request, SamplingParams, TokenHistory, TokenLogprobs

UNKNOWN_TOKEN = -1  # in a step that is planned ahead: the one before it will sample it


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens of one sequence to compute in this step; their KV goes to ``block_table``."""

    request_id: str
    token_ids: tuple[int, ...]
    start: int  # position of the first of them
    num_prompt_tokens: int  # how many of them belong to the prompt
    block_table: tuple[int, ...]
    sampling: SamplingParams | None  # None: a prompt chunk that is not the last; nothing is sampled
    history: TokenHistory | None = None  # with ``sampling`` that depends on the tokens so far
    prompt_targets: tuple[int, ...] = ()  # the prompt tokens whose logprobs are asked for, see ``num_logits``
    num_prompt_logprobs: int = 0  # likeliest tokens told for each of them

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def num_logits(self) -> int:
        """After so many of its last tokens logits are needed: first those for ``prompt_targets``, then to sample."""
        return len(self.prompt_targets) + (self.sampling is not None)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything the model runner needs to know of one step. Decoding sequences come first."""

    chunks: tuple[ScheduledChunk, ...]

    @property
    def logit_rows(self) -> list[int]:
        """The tokens after which logits are needed, counted over the chunks in order."""
        ends = accumulate(len(chunk.token_ids) for chunk in self.chunks)
        ranges = (range(end - chunk.num_logits, end) for end, chunk in zip(ends, self.chunks, strict=True))
        return list(chain.from_iterable(ranges))


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What the runner made of one plan, by request id."""

    tokens: Mapping[str, int] = field(default_factory=dict)  # of every chunk with ``sampling``
    logprobs: Mapping[str, TokenLogprobs] = field(default_factory=dict)  # of those of them that ask
    prompt_logprobs: Mapping[str, tuple[TokenLogprobs, ...]] = field(default_factory=dict)  # one per prompt target


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One new token of one sequence, in the order they were sampled."""

    request: Request
    token_id: int
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # with the first token, where they were asked for
