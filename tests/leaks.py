"""The no-leak check: once nothing is at work, every block is free and nobody is remembered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from workers.worker import Worker

POLL_INTERVAL_S = 0.002


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Returns as soon as ``condition`` holds; fails with ``what`` when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        await asyncio.sleep(POLL_INTERVAL_S)


def traces_of(worker: Worker) -> list[str]:
    """Everything that a worker still keeps of requests, in words; empty when it is idle."""
    loop, decode = worker.step_loop, worker._decode
    kept = {
        "sequences": 0 if loop.batcher.is_idle else loop.batcher.num_running + loop.batcher.num_waiting,
        "leases": len(worker.manager.leases),
        "streams": len(loop._streams),
        "handoffs": len(decode._handoffs),
        "prefill addresses": len(decode._prefill_addresses),
        "offers": worker.offers._waiting.qsize() + len(worker.offers_taken._takings),
    }
    return [f"{worker.options.worker_id} has {count} {name}" for name, count in kept.items() if count]


async def check_no_leaks(workers: Iterable[Worker], timeout_s: float = 5.0) -> None:
    """Waits until the workers have nothing to do, then counts their blocks.

    Raises:
        AssertionError: one of them keeps a sequence, a lease, a stream or a handoff.
        InvariantError: one of them has lost a block.
    """
    workers = tuple(workers)
    deadline = time.monotonic() + timeout_s
    while traces := [trace for worker in workers for trace in traces_of(worker)]:
        if time.monotonic() > deadline:
            raise AssertionError(f"not idle after {timeout_s:g} s: {', '.join(traces)}")
        await asyncio.sleep(POLL_INTERVAL_S)
    for worker in workers:
        worker.manager.check_idle()
        assert worker.load().blocks_free == worker.options.num_blocks
