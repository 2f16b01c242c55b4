"""How fast the controller itself places: one process, no Ray, virtual time."""

from __future__ import annotations

import gc
import heapq
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvcache.spec import KVCacheSpec
from scheduler.admission import AdmissionControl, AdmissionOptions
from scheduler.cache_index import MAX_HASHES
from scheduler.controller import ClusterController
from scheduler.events import (
    BeatEvery,
    Event,
    PlaceRequest,
    PrefillDone,
    RequestArrived,
    RequestEnded,
    Tick,
    WorkerRegistered,
    WorkerReported,
)
from scheduler.placement import TPOT_TARGET_S, TTFT_TARGET_S, PlacementOptions
from scheduler.types import CacheDelta, DeviceProfile, ModelShape, PrefixHashes, WorkerInfo, WorkerLoad, WorkerRole
from scheduler.worker_state import HEARTBEAT_INTERVAL_S

BLOCK_TOKENS = 16
PROMPT_TOKENS = 1024
OUTPUT_TOKENS = 128
NUM_CONVERSATIONS = 2000
HOLDERS_PER_CONVERSATION = 3
REQUESTS_PER_S = 20_000.0  # of virtual time
PREFILLING = 200  # requests whose first token is still to come
TICK_S = 0.5

# 8 B parameters in 16 bits; three kinds of devices at about what they reach.
SHAPE = ModelShape(32, 14e9, 1e9, 14e9, 1e9, 4 * 32 * 4096.0, 131_072)
SPEC = KVCacheSpec(32, 8, 128, BLOCK_TOKENS, "bfloat16")
DEVICES = (
    DeviceProfile("compute", 600_000.0, 2_600.0, 80 << 30, price_per_hour=3.0, link_gb_s=25.0),
    DeviceProfile("bandwidth", 230_000.0, 1_600.0, 80 << 30, price_per_hour=1.6, link_gb_s=25.0),
    DeviceProfile("cheap", 200_000.0, 700.0, 48 << 30, price_per_hour=0.8, link_gb_s=12.0),
)


@dataclass(frozen=True, slots=True)
class CoreResult:
    """``placements_per_s`` counts the time of placements, ``requests_per_s`` that of everything that a request brings:
    its first token, its end, heartbeats.

    Events are made beforehand, for they come from other processes.
    """

    num_workers: int
    num_in_flight: int
    num_placements: int
    placements_per_s: float
    requests_per_s: float
    mean_us: float  # of a placement, as are the next three
    p50_us: float
    p99_us: float
    max_us: float


def measure_core(
    num_workers: int,
    num_in_flight: int,
    num_placements: int,
    policy: str = "cost",
    seed: int = 0,
    *,
    with_admission: bool = False,
) -> CoreResult:
    """Fills a cluster, then keeps it full: for every request that comes one gets its first token and one ends.

    ``with_admission``: events go through it, as in the scheduler; else the controller has them at once.
    """
    controller = ClusterController(options=PlacementOptions(policy))
    rng = np.random.default_rng(seed)
    for info in workers(num_workers, num_in_flight):
        controller.handle(WorkerRegistered(info), 0.0)
    conversations, reports = publish(num_workers, rng)
    for report in reports:
        controller.handle(report, 0.0)
    picks = rng.integers(NUM_CONVERSATIONS, size=num_in_flight + num_placements).tolist()
    options = AdmissionOptions(num_in_flight, TTFT_TARGET_S, TPOT_TARGET_S)
    handler = AdmissionControl(controller, options) if with_admission else controller
    load = _Load(handler, [conversations[pick] for pick in picks], num_workers)
    for _ in range(num_in_flight):
        load.arrive()
    load.seconds.clear()
    gc.collect()
    gc.freeze()
    started = time.perf_counter()
    for _ in range(num_placements):
        load.end_oldest()
        load.arrive()
    elapsed = time.perf_counter() - started
    gc.unfreeze()
    microseconds = np.array(load.seconds) * 1e6
    return CoreResult(
        num_workers,
        num_in_flight,
        num_placements,
        1e6 / float(microseconds.mean()),
        num_placements / elapsed,
        float(microseconds.mean()),
        *(float(np.percentile(microseconds, share)) for share in (50, 99, 100)),
    )


class _Load:
    """Requests as they come and go, and the workers' heartbeats between them, as often as the controller orders."""

    def __init__(
        self, handler: ClusterController | AdmissionControl, prefixes: Sequence[PrefixHashes], num_workers: int
    ) -> None:
        self.seconds: list[float] = []  # of each placement
        self._handler = handler
        self._now = 0.0
        ids = [f"r{number}" for number in range(len(prefixes))]
        self._arrivals = [
            RequestArrived(request_id, PROMPT_TOKENS, OUTPUT_TOKENS, prefixes=(prefix,))
            for request_id, prefix in zip(ids, prefixes, strict=True)
        ]
        self._first_tokens = [PrefillDone(request_id) for request_id in ids]
        self._ends = [RequestEnded(request_id, OUTPUT_TOKENS) for request_id in ids]
        self._num_arrived = self._num_ended = 0
        self._reports = [WorkerReported(f"w{number}", 1, WorkerLoad()) for number in range(num_workers)]
        self._intervals_s = [HEARTBEAT_INTERVAL_S] * num_workers
        spread_s = HEARTBEAT_INTERVAL_S / num_workers
        self._due = [(number * spread_s, number) for number in range(num_workers)]  # a heap: whose heartbeat is next
        self._tick_s = 0.0

    def arrive(self) -> None:
        request = self._arrivals[self._num_arrived]
        self._num_arrived += 1
        self._now += 1 / REQUESTS_PER_S
        started = time.perf_counter()
        (command,) = self._handler.handle(request, self._now)
        self.seconds.append(time.perf_counter() - started)
        assert isinstance(command, PlaceRequest), "there is room for everybody"
        if self._num_arrived > PREFILLING:
            self._handle(self._first_tokens[self._num_arrived - PREFILLING - 1])
        self._send_heartbeats()

    def end_oldest(self) -> None:
        self._handle(self._ends[self._num_ended])
        self._num_ended += 1

    def _send_heartbeats(self) -> None:
        """Those that are due; and the tick that looks for silent workers."""
        while self._due[0][0] <= self._now:
            due_s, number = self._due[0]
            for command in self._handler.handle(self._reports[number], self._now):
                assert isinstance(command, BeatEvery), "nothing else is asked of workers"
                self._intervals_s[number] = command.interval_s
            heapq.heapreplace(self._due, (due_s + self._intervals_s[number], number))
        if self._tick_s <= self._now:
            self._handle(Tick())
            self._tick_s += TICK_S

    def _handle(self, event: Event) -> None:
        self._handler.handle(event, self._now)


def workers(num_workers: int, num_in_flight: int) -> Iterator[WorkerInfo]:
    """Half of them prefill, half decode; three kinds of devices in each pool; room for all requests."""
    places = 4 * -(-num_in_flight // num_workers) + 64
    for number in range(num_workers):
        yield WorkerInfo(
            f"w{number}",
            1,
            WorkerRole.PREFILL if number % 2 else WorkerRole.DECODE,
            f"w{number}:1",
            1,
            DEVICES[number // 2 % len(DEVICES)],
            "model",
            8192,
            SPEC,
            num_blocks=places * (PROMPT_TOKENS + OUTPUT_TOKENS) // BLOCK_TOKENS,
            shape=SHAPE,
            max_num_seqs=places,
            max_num_batched_tokens=2048,
        )


def publish(num_workers: int, rng: np.random.Generator) -> tuple[list[PrefixHashes], list[WorkerReported]]:
    """Conversations over four system prompts that all workers have; of each some workers have a part or all.

    Returns the names of their blocks, and the heartbeats that tell who has what.
    """
    num_blocks = PROMPT_TOKENS // BLOCK_TOKENS
    shared = rng.integers(1 << 62, size=(4, num_blocks // 8))
    own = rng.integers(1 << 62, size=(NUM_CONVERSATIONS, num_blocks - num_blocks // 8))
    chains = np.concatenate([shared[np.arange(NUM_CONVERSATIONS) % 4], own], axis=1).astype("<u8")
    held = [[shared.astype("<u8").ravel()] for _ in range(num_workers)]
    for chain in chains:
        for worker in rng.integers(num_workers, size=HOLDERS_PER_CONVERSATION):
            held[worker].append(chain[: rng.integers(1, num_blocks)])
    reports = [
        WorkerReported(f"w{number}", 1, WorkerLoad(), cache=CacheDelta(0, np.concatenate(names).tobytes()))
        for number, names in enumerate(held)
    ]
    every = -(-num_blocks // MAX_HASHES)  # as the gateway sends them
    sampled = (tuple(chain[every - 1 :: every][::-1].tolist()) for chain in chains)
    return [PrefixHashes(BLOCK_TOKENS, every * BLOCK_TOKENS, hashes) for hashes in sampled], reports
