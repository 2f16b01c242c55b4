"""Transfers that fail at random (F9): every request completes, with the tokens of a run without faults."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from kvcache.errors import TransferError, TransferFault
from kvcache.transfer import kv_transfer_pb2 as kv_pb
from kvcache.transfer.port_choice import HAS_SHM, PortName
from kvcache.transfer.sender import OutgoingTransfer
from kvcache.transfer.wire import Chunk, Message
from scheduler.batching import BatchLimits
from tests.cluster import TinyCheckpoint, greedily, local_cluster
from tests.integration.ports import Came

pytestmark = pytest.mark.integration

NUM_REQUESTS = 200
IN_FLIGHT = 64
FAILURE_RATE = 0.05
SEED = 20_261_122
NUM_TOKENS = 3
# A rest of at most so many tokens would be computed in place: most of what breaks here has to be sent anew.
LIMITS = BatchLimits(max_num_seqs=64, max_num_batched_tokens=16)


class RandomFailures:
    """Of all transfers, in the order in which they begin, a seeded choice breaks: a flipped bit, or a lost commit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.injected: Counter[str] = Counter()
        self._rng = random.Random(SEED)
        self._fault_of: dict[str, str | None] = {}
        next_message = OutgoingTransfer.next_message

        def failing(transfer: OutgoingTransfer, slot: memoryview | None = None) -> Message | None:
            message = next_message(transfer, slot)
            if message is not None and not isinstance(message, kv_pb.TransferOpen):
                self._strike(transfer.target.transfer_id, message)
            return message

        monkeypatch.setattr(OutgoingTransfer, "next_message", failing)

    def _strike(self, transfer_id: str, message: Message) -> None:
        if transfer_id not in self._fault_of:
            self._fault_of[transfer_id] = self._draw()
        fault = self._fault_of[transfer_id]
        if fault == "loss" and not isinstance(message, kv_pb.TransferCommit):
            fault = None  # all is there by then but the word that it is
        if fault is None or (fault == "bit" and not isinstance(message, Chunk)):
            return
        self._fault_of[transfer_id] = None
        self.injected[fault] += 1
        if fault == "loss":
            raise TransferError(TransferFault.PEER_LOST, "the test cut the link")
        assert isinstance(message, Chunk)
        assert isinstance(message.payload, memoryview)
        message.payload[self._rng.randrange(len(message.payload))] ^= 1  # in place: shared memory is read there

    def _draw(self) -> str | None:
        return self._rng.choice(("bit", "loss")) if self._rng.random() < FAILURE_RATE else None


def test_two_hundred_requests_complete_although_transfers_fail_at_random(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = random.Random(SEED)
    prompts = [checkpoint.prompt(lengths.randrange(5, 90), seed=index) for index in range(NUM_REQUESTS)]
    num_placements = 0
    ports: list[PortName] = ["grpc", "shm"] if HAS_SHM else ["grpc"]

    async def answers(cluster_failures: list[dict[str, int]], port: PortName) -> list[tuple[int, ...]]:
        nonlocal num_placements
        slots = asyncio.Semaphore(IN_FLIGHT)
        async with local_cluster(
            checkpoint, prefill=2, decode=2, num_blocks=1024, limits=LIMITS, kv_transfer_port=port
        ) as cluster:

            async def complete(prompt: tuple[int, ...]) -> tuple[int, ...]:
                async with slots:
                    return (await cluster.complete(prompt, greedily(NUM_TOKENS))).token_ids

            found = await asyncio.gather(*map(complete, prompts))
            num_placements = len(cluster.scheduler.placements)
            cluster_failures += [cluster.failures(f"decode-{index}") for index in range(2)]
            return found

    undisturbed = asyncio.run(answers([], "auto"))
    for port in ports:
        with monkeypatch.context() as patches:
            faults, came = RandomFailures(patches), Came(patches)
            failures: list[dict[str, int]] = []
            assert asyncio.run(answers(failures, port)) == undisturbed
        came.check_only(port)
        assert num_placements > NUM_REQUESTS  # some were sent anew
        assert min(faults.injected["bit"], faults.injected["loss"]) >= 1
        assert sum(each.get(TransferFault.BAD_CHECKSUM.value, 0) for each in failures) == faults.injected["bit"]
    for index in (0, 99, 199):
        assert undisturbed[index] == checkpoint.greedy(prompts[index], NUM_TOKENS)
