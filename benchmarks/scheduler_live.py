"""How fast placements come through the real Ray actor, and what they add to the time to the first token."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from itertools import count

import numpy as np

from benchmarks.scheduler_core import OUTPUT_TOKENS, PROMPT_TOKENS, publish, workers
from engine.scheduler_client import SchedulerClient, SchedulerPort
from engine.startup import prepare_ray
from scheduler.admission import AdmissionOptions
from scheduler.controller import HEARTBEATS_PER_S
from scheduler.events import Event, PrefillDone, RequestArrived, RequestEnded, WorkerRegistered, WorkerReported
from scheduler.garbage import collect_rarely
from scheduler.placement import PlacementOptions
from scheduler.types import PrefixHashes, WorkerLoad

NUM_WORKERS = 1000
AT_ONCE = 512  # requests that wait for a placement, where the rate is measured
GENTLE_RATE = 200.0  # requests per second, where the delay is measured


@dataclass(frozen=True, slots=True)
class LiveResult:
    placements_per_s: float  # as many at once as come in a tick, each with its other two events
    delay_p50_ms: float  # of one placement at ``GENTLE_RATE``
    delay_p99_ms: float


def measure_live(num_placements: int, seconds: float, policy: str = "cost") -> LiveResult:
    """Starts Ray and the actor, and asks through the gateway's own client.

    Raises:
        ResourceError: Ray cannot start.
    """
    prepare_ray(joins=False)
    # Here, because ray reads its environment when it is imported.
    from engine.ray_session import ray_session
    from scheduler.ray_actor import RayScheduler, start_scheduler

    with ray_session(1):
        options = PlacementOptions(policy)
        actor = start_scheduler([], options, AdmissionOptions())
        return asyncio.run(
            _measure(SchedulerClient(RayScheduler(actor), options), RayScheduler(actor), num_placements, seconds)
        )


async def _measure(
    client: SchedulerClient, scheduler: SchedulerPort, num_placements: int, seconds: float
) -> LiveResult:
    rng = np.random.default_rng(0)
    infos = list(workers(NUM_WORKERS, AT_ONCE))
    conversations, reports = publish(NUM_WORKERS, rng)
    events: list[Event] = [*map(WorkerRegistered, infos), *reports]
    await scheduler.handle(events)
    await client.start()
    collect_rarely()  # as the gateway
    beating = asyncio.create_task(_beat(scheduler))
    try:
        picks = rng.integers(len(conversations), size=num_placements + 10_000).tolist()
        asking = _Asking(client, [conversations[pick] for pick in picks])
        await asking.ask(200)  # warm-up
        started = time.perf_counter()
        await asyncio.gather(*(asking.ask(num_placements // AT_ONCE) for _ in range(AT_ONCE)))
        rate = num_placements // AT_ONCE * AT_ONCE / (time.perf_counter() - started)
        asking.delays_s.clear()
        await asking.ask_gently(seconds, rng)
        delays_ms = np.array(asking.delays_s) * 1000
    finally:
        beating.cancel()
        await client.stop()
    return LiveResult(rate, *(float(np.percentile(delays_ms, share)) for share in (50, 99)))


async def _beat(scheduler: SchedulerPort) -> None:
    """A call for each worker, as often as the scheduler wants them of so many."""
    for number in count():
        await scheduler.handle([WorkerReported(f"w{number % NUM_WORKERS}", 1, WorkerLoad())])
        await asyncio.sleep(1 / HEARTBEATS_PER_S)


class _Asking:
    """Requests that are placed, and end as soon as they are."""

    def __init__(self, client: SchedulerClient, conversations: list[PrefixHashes]) -> None:
        self.delays_s: list[float] = []
        self._client = client
        self._conversations = conversations
        self._num_asked = 0

    async def ask(self, count: int) -> None:
        for _ in range(count):
            self._num_asked += 1
            request_id = f"r{self._num_asked}"
            prefix = self._conversations[self._num_asked % len(self._conversations)]
            started = time.perf_counter()
            await self._client.place(RequestArrived(request_id, PROMPT_TOKENS, OUTPUT_TOKENS, prefixes=(prefix,)))
            self.delays_s.append(time.perf_counter() - started)
            self._client.tell(PrefillDone(request_id))
            self._client.tell(RequestEnded(request_id, OUTPUT_TOKENS))

    async def ask_gently(self, seconds: float, rng: np.random.Generator) -> None:
        """An open loop of Poisson arrivals."""
        tasks = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            await asyncio.sleep(rng.exponential(1 / GENTLE_RATE))
            tasks.append(asyncio.create_task(self.ask(1)))
        await asyncio.gather(*tasks)
