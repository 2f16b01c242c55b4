"""Several sequences of the engine, read as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from engine.metrics import Metrics
from engine.outputs import SOMEBODY, Origin, TextDelta, TextEngine
from kvcache.errors import InvariantError
from scheduler.request import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to generate."""

    index: int  # of the choice in the answer
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...]
    cache_salt: bytes = b""
    scores_only: bool = False  # the prompt's log-probabilities are wanted, and nothing that is generated
    origin: Origin = SOMEBODY


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """The next piece of one choice."""

    index: int
    delta: TextDelta


@dataclass(frozen=True, slots=True)
class Fanout:
    """Runs the jobs of one request. ``started_s`` is when it came in, by the clock of ``metrics``.

    ``on_placed`` hears of every choice, by its index, that has its workers.
    """

    engine: TextEngine
    metrics: Metrics
    started_s: float
    on_placed: Callable[[int], None]

    async def run(self, jobs: Sequence[Job]) -> AsyncGenerator[ChoiceDelta, None]:
        """Pieces of all jobs as they come, each job's in order; every job ends with a ``finish_reason``.

        When one fails, the others are aborted and its error is raised. Whoever stops reading early closes this
        generator (``aclosing``), and everything still running is aborted before that returns.
        """
        if len(jobs) == 1:
            async with aclosing(self._run_one(jobs[0])) as pieces:
                async for piece in pieces:
                    yield piece
            return
        # Bounded: a slow client holds the sequences back instead of filling memory.
        queue: asyncio.Queue[ChoiceDelta | Exception] = asyncio.Queue(maxsize=len(jobs))
        tasks = [asyncio.create_task(self._pump(job, queue)) for job in jobs]
        try:
            unfinished = len(jobs)
            while unfinished:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                unfinished -= item.delta.finish_reason is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, job: Job, queue: asyncio.Queue[ChoiceDelta | Exception]) -> None:
        try:
            async with aclosing(self._run_one(job)) as pieces:
                async for piece in pieces:
                    await queue.put(piece)
        except Exception as error:  # noqa: BLE001 - handed over: the reader of the queue raises it
            await queue.put(error)

    async def _run_one(self, job: Job) -> AsyncGenerator[ChoiceDelta, None]:
        on_placed = partial(self.on_placed, job.index)
        stream = self.engine.generate(
            job.prompt_token_ids, job.sampling, job.stop, job.cache_salt, job.origin, on_placed
        )
        with self.metrics.recorder(len(job.prompt_token_ids), self.started_s) as recorder:
            async with aclosing(stream) as deltas:
                async for told in deltas:
                    delta = _only_scores(told) if job.scores_only else told
                    recorder.on_delta(len(told.token_ids), delta.finish_reason)  # what was computed
                    yield ChoiceDelta(job.index, delta)
                    if delta.finish_reason is not None:
                        return
            raise InvariantError("the engine ended a sequence without a finish reason")


def _only_scores(delta: TextDelta) -> TextDelta:
    """Without what was generated; the limit of no tokens is what ends it."""
    reason = None if delta.finish_reason is None else FinishReason.LENGTH
    return TextDelta("", (), reason, prompt_logprobs=delta.prompt_logprobs)
