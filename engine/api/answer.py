"""One way from the engine's pieces to an answer, whole or streamed, for completions and chat alike."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request, Response

from engine.api.fanout import ChoiceDelta, Fanout, Job
from engine.api.protocol import GenerationRequest, StreamOptions
from engine.api.replies import JsonReply, PromptTokensDetails, Usage
from engine.api.serving import Serving
from engine.api.sse import ClientGoneError, EventStreamReply, frame, while_connected
from engine.outputs import OutputLogprobs
from kvcache.errors import TwinpoolError
from scheduler.request import FinishReason, TokenLogprobs

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; access logs do


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What all parts of one answer carry."""

    id: str
    created: int  # unix seconds
    model: str

    @classmethod
    def make(cls, prefix: str, model: str) -> AnswerHead:
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model)


@dataclass(slots=True)
class ChoiceText:
    """One choice, as far as it has come."""

    index: int
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[OutputLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class AnswerFormat(Protocol):
    """How a route words its answers. Every method returns something that orjson can write."""

    def opening(self, num_choices: int) -> Iterable[Any]:
        """Chunks before the first text."""
        ...

    def chunk(self, piece: ChoiceDelta, usage: Usage | None) -> Any:
        """One piece of a stream."""
        ...

    def usage_chunk(self, usage: Usage) -> Any:
        """The last chunk of a stream, with no choices."""
        ...

    def whole(self, choices: Sequence[ChoiceText], usage: Usage) -> Any:
        """The answer to a request that does not stream."""
        ...


class Tally:
    """Counts the tokens of one request, exactly: from token ids.

    A prompt counts from when it is placed, for then it is computed whether or not its client stays; it does not where
    the request fails before anything of it came.
    """

    def __init__(self, jobs: Sequence[Job], num_choices: int) -> None:
        self._num_choices = num_choices
        self._prompts = [len(job.prompt_token_ids) for job in jobs[::num_choices]]
        self._placed: set[int] = set()  # prompts
        self._answered: set[int] = set()  # those of them of which something came
        self._max_tokens = sum(job.sampling.max_tokens for job in jobs)
        self._completion_tokens = 0
        self._cached_tokens: dict[int, int] = {}  # by prompt: what none of its choices had to compute

    def place(self, index: int) -> None:
        """A choice has its workers."""
        self._placed.add(index // self._num_choices)

    def fail(self) -> None:
        """The request was refused, or has failed."""
        self._placed.clear()

    def add(self, piece: ChoiceDelta) -> None:
        prompt = piece.index // self._num_choices
        self._answered.add(prompt)
        self._completion_tokens += len(piece.delta.token_ids)
        if piece.delta.num_cached_tokens is not None:
            known = self._cached_tokens.get(prompt, piece.delta.num_cached_tokens)
            self._cached_tokens[prompt] = min(known, piece.delta.num_cached_tokens)

    @property
    def most_tokens(self) -> int:
        """What the request may come to, when every choice is as long as it may be."""
        return sum(self._prompts) + self._max_tokens

    @property
    def prompt_tokens(self) -> int:
        """Of the prompts that count."""
        return sum(self._prompts[prompt] for prompt in self._placed | self._answered)

    @property
    def completion_tokens(self) -> int:
        return self._completion_tokens

    @property
    def usage(self) -> Usage:
        prompt_tokens = sum(self._prompts)
        total = prompt_tokens + self._completion_tokens
        details = PromptTokensDetails(sum(self._cached_tokens.values()))
        return Usage(prompt_tokens, self._completion_tokens, total, details)


async def answer(
    serving: Serving,
    body: GenerationRequest,
    jobs: Sequence[Job],
    style: AnswerFormat,
    request: Request,
    started_s: float,
) -> Response:
    """Runs ``jobs`` and replies as ``body`` asks, and stops at once when the client leaves.

    Raises:
        TwinpoolError: whatever the engine raises before the first byte.
    """
    tally = Tally(jobs, body.num_choices)
    fanout = Fanout(serving.engine, serving.metrics, started_s, tally.place)
    pieces = _pieces(serving, fanout, jobs, tally)
    if body.stream:
        return EventStreamReply(_frames(pieces, jobs, style, tally, body.stream_options or StreamOptions()))
    try:
        choices = await while_connected(_collect(pieces, jobs), request.receive)
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JsonReply(style.whole(choices, tally.usage))


async def _pieces(
    serving: Serving, fanout: Fanout, jobs: Sequence[Job], tally: Tally
) -> AsyncGenerator[ChoiceDelta, None]:
    """All pieces of the answer, counted, under the limits of the tenant whose request it is."""
    with serving.desk.visit(jobs[0].origin.tenant, tally):
        try:
            async with aclosing(fanout.run(jobs)) as pieces:
                async for piece in pieces:
                    tally.add(piece)
                    yield piece
        except TwinpoolError:
            tally.fail()
            raise


async def _collect(counted: AsyncGenerator[ChoiceDelta, None], jobs: Sequence[Job]) -> list[ChoiceText]:
    choices = [ChoiceText(job.index) for job in jobs]
    async with aclosing(counted) as pieces:
        async for piece in pieces:
            choice = choices[piece.index]
            choice.pieces.append(piece.delta.text)
            choice.token_ids += piece.delta.token_ids
            choice.logprobs += piece.delta.logprobs
            choice.prompt_logprobs += piece.delta.prompt_logprobs
            choice.finish_reason = piece.delta.finish_reason
            choice.stop_reason = piece.delta.stop_reason
    return choices


async def _frames(
    counted: AsyncGenerator[ChoiceDelta, None],
    jobs: Sequence[Job],
    style: AnswerFormat,
    tally: Tally,
    options: StreamOptions,
) -> AsyncGenerator[bytes, None]:
    """The events of a stream: one per piece, also where its text is held back, so that clients can time tokens."""
    opened = False
    async with aclosing(counted) as pieces:
        async for piece in pieces:
            if not opened:
                opened = True
                for chunk in style.opening(len(jobs)):
                    yield frame(chunk)
            yield frame(style.chunk(piece, tally.usage if options.continuous_usage_stats else None))
    if options.include_usage:
        yield frame(style.usage_chunk(tally.usage))
