"""One line every five seconds of what the cluster does; silence when it does nothing."""

from __future__ import annotations

import asyncio
import logging

from engine.outputs import TextEngine
from scheduler.types import ClusterSnapshot, Phase

INTERVAL_S = 5.0
logger = logging.getLogger(__name__)


async def log_activity(engine: TextEngine, interval_s: float = INTERVAL_S) -> None:
    """Runs until cancelled."""
    before = engine.cluster
    while True:
        await asyncio.sleep(interval_s)
        now = engine.cluster
        for news in membership_news(before, now):
            logger.warning("%s", news)
        line = activity_line(before, now, interval_s)
        if line is not None:
            logger.info("%s", line)
        before = now


def membership_news(before: ClusterSnapshot, now: ClusterSnapshot) -> list[str]:
    """Who has gone and who has come since."""
    earlier = {worker.info.worker_id: worker.info.incarnation for worker in before.workers}
    later = {worker.info.worker_id: worker.info.incarnation for worker in now.workers}
    lost = [worker_id for worker_id, incarnation in earlier.items() if later.get(worker_id) != incarnation]
    joined = [worker_id for worker_id, incarnation in later.items() if earlier.get(worker_id) != incarnation]
    return [f"{worker_id} was lost" for worker_id in lost] + [f"{worker_id} has joined" for worker_id in joined]


def activity_line(before: ClusterSnapshot, now: ClusterSnapshot, interval_s: float) -> str | None:
    """The line for two views of the cluster, or None when nothing happened between them."""
    loads = [worker.load for worker in now.workers]
    running = sum(load.running for load in loads)
    waiting = sum(load.waiting for load in loads) + now.queued_interactive + now.queued_batch
    prompt_tokens = _growth(before, now, "prompt_tokens_computed")
    generated = _growth(before, now, "generation_tokens")
    if not (running or waiting or prompt_tokens or generated):
        return None
    used = [
        f"{worker.info.worker_id} {1 - worker.load.blocks_free / worker.info.num_blocks:.1%}"
        for worker in now.workers
        if worker.load.blocks_free < worker.info.num_blocks
    ]
    return (
        f"running {running}, waiting {waiting}, prompt {prompt_tokens / interval_s:.0f} tok/s,"
        f" generation {generated / interval_s:.0f} tok/s{_hit_rate(before, now)},"
        f" KV in use: {', '.join(used) or 'none'}"
    )


def _hit_rate(before: ClusterSnapshot, now: ClusterSnapshot) -> str:
    """Of the prompts that began on workers that prefill; empty when none began."""
    prefilling = ClusterSnapshot(tuple(each for each in now.workers if each.info.role.takes(Phase.PREFILL)))
    queries = _growth(before, prefilling, "prefix_cache_queries")
    hits = _growth(before, prefilling, "prefix_cache_hits")
    return f", prefix hit rate {hits / queries:.1%}" if queries else ""


def _growth(before: ClusterSnapshot, now: ClusterSnapshot, counter: str) -> int:
    """Sum of a counter's growth over workers; a restarted worker counts from zero."""
    earlier = {(worker.info.worker_id, worker.info.incarnation): worker.load for worker in before.workers}
    growth = 0
    for worker in now.workers:
        old = earlier.get((worker.info.worker_id, worker.info.incarnation))
        growth += getattr(worker.load, counter) - (getattr(old, counter) if old is not None else 0)
    return growth
