"""A client that goes away leaves nothing behind and disturbs nobody (F10)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

import pytest

from scheduler.batching import BatchLimits
from scheduler.request import Request, RequestStatus
from scheduler.step_plan import StepPlan
from scheduler.types import Placement
from tests.cluster import LocalCluster, TinyCheckpoint, greedily, local_cluster
from tests.leaks import until

pytestmark = pytest.mark.integration

GIVEN_BACK_WITHIN_S = 8.0  # far above what it takes, far below the lease: it is not what gives the blocks back
OTHERS = range(4)
VICTIM_TOKENS = 300
ONE_AT_A_TIME = BatchLimits(max_num_seqs=1, max_num_batched_tokens=64)


class Victim:
    """A sequence whose client will go away."""

    def __init__(self, cluster: LocalCluster, prompt: tuple[int, ...]) -> None:
        self.num_tokens = 0
        self._cluster = cluster
        self._first_placement = len(cluster.scheduler.placements)
        self._task = asyncio.create_task(self._read(prompt))

    async def _read(self, prompt: tuple[int, ...]) -> None:
        async with aclosing(self._cluster.engine.generate(prompt, greedily(VICTIM_TOKENS))) as stream:
            async for delta in stream:
                self.num_tokens += len(delta.token_ids)

    async def placement(self) -> Placement:
        placements = self._cluster.scheduler.placements
        await until(lambda: len(placements) > self._first_placement, "the victim to be placed")
        return placements[self._first_placement]

    async def request_on(self, worker_id: str, has_come_so_far: Callable[[Request], bool]) -> Request:
        """The victim on a worker, as soon as it ``has_come_so_far`` there."""
        request_id = (await self.placement()).request_id
        batcher = self._cluster.workers[worker_id].step_loop.batcher

        def found() -> bool:
            request = batcher.find(request_id)
            return request is not None and has_come_so_far(request)

        await until(found, f"the victim on {worker_id}")
        request = batcher.find(request_id)
        assert request is not None
        return request

    async def go_away(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        assert self._task.cancelled()
        assert self.num_tokens < VICTIM_TOKENS

    async def check_gone(self, within_s: float = GIVEN_BACK_WITHIN_S) -> None:
        request_id = (await self.placement()).request_id
        await until(lambda: not self._cluster.keeps(request_id), "the victim's blocks are back", within_s)
        await until(lambda: is_forgotten(self._cluster, request_id), "its streams are closed", within_s)


def is_forgotten(cluster: LocalCluster, request_id: str) -> bool:
    return not any(request_id in worker.step_loop._streams for worker in cluster.workers.values())


def others_in(cluster: LocalCluster, num_tokens: int = 20) -> asyncio.Future[list[None]]:
    """Sequences that nobody gives up; awaiting compares each with the reference."""
    prompts = (cluster.checkpoint.prompt(17 + index, seed=index) for index in OTHERS)
    return asyncio.gather(*(cluster.check_greedy(prompt, num_tokens) for prompt in prompts))


def is_(status: RequestStatus) -> Callable[[Request], bool]:
    return lambda request: request.status is status


def computes(num_tokens: int) -> Callable[[StepPlan], bool]:
    """Matches the step in which a sequence reaches beyond ``num_tokens`` tokens."""
    return lambda plan: any(chunk.end > num_tokens for chunk in plan.chunks)


def test_gone_while_it_waits_for_a_place_on_the_decode_worker(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, limits=ONE_AT_A_TIME) as cluster:
            gate = cluster.hold_steps("decode-0", lambda plan: True)
            first = asyncio.ensure_future(cluster.check_greedy(checkpoint.prompt(17), 20))
            await gate.holding()
            victim = Victim(cluster, checkpoint.prompt(30))
            await victim.request_on("decode-0", is_(RequestStatus.WAITING))
            await victim.go_away()
            await victim.check_gone()  # while the first still holds the only place
            gate.open()
            await first
            await others_in(cluster)

    asyncio.run(scenario())


def test_gone_while_it_waits_for_its_prefill(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            gate = cluster.hold_steps("prefill-0", lambda plan: True)
            others = others_in(cluster)
            await gate.holding()
            victim = Victim(cluster, checkpoint.prompt(30))
            await victim.request_on("prefill-0", is_(RequestStatus.WAITING))
            await victim.request_on("decode-0", is_(RequestStatus.WAITING_FOR_KV))
            await victim.go_away()
            await victim.check_gone()  # while the prefill worker still computes for the others
            gate.open()
            await others

    asyncio.run(scenario())


def test_gone_between_two_chunks_of_its_prefill(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            gate = cluster.hold_steps("prefill-0", computes(100))
            victim = Victim(cluster, checkpoint.prompt(200))
            others = others_in(cluster)
            await gate.holding()
            request = await victim.request_on("prefill-0", is_(RequestStatus.RUNNING))
            assert 0 < request.num_computed_tokens < request.num_prompt_tokens
            await victim.go_away()
            await until(lambda: is_forgotten(cluster, request.request_id), "every worker has heard of it")
            gate.open()
            await victim.check_gone()
            assert request.num_output_tokens == 0  # its prompt was not computed to the end
            await others

    asyncio.run(scenario())


def test_gone_while_its_kv_is_sent(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            gate = cluster.hold_transfers("decode-0", after_chunks=1)
            victim = Victim(cluster, checkpoint.prompt(200))
            await gate.holding()
            await victim.request_on("prefill-0", is_(RequestStatus.HANDING_OVER))
            assert all(len(worker.manager.leases) == 1 for worker in cluster.workers.values())
            await victim.go_away()
            await victim.check_gone()  # the gate is still closed
            assert cluster.load("decode-0").transfers == 0
            gate.open()
            await others_in(cluster)

    asyncio.run(scenario())


def test_gone_while_it_decodes(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            others = others_in(cluster, 40)
            victim = Victim(cluster, checkpoint.prompt(30))
            await until(lambda: victim.num_tokens > 5, "the victim to decode")
            await victim.go_away()
            await victim.check_gone()
            await others

    asyncio.run(scenario())


def test_closing_the_iterator_ends_the_sequence_on_the_workers(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            others = others_in(cluster, 40)
            stream = cluster.engine.generate(checkpoint.prompt(30), greedily(VICTIM_TOKENS))
            async with aclosing(stream):
                delta = await anext(stream)
                assert delta.finish_reason is None
                request_id = cluster.scheduler.placements[-1].request_id
                assert cluster.keeps(request_id)
            await until(lambda: not cluster.keeps(request_id), "its blocks are back", GIVEN_BACK_WITHIN_S)
            await others

    asyncio.run(scenario())


def test_gone_before_the_scheduler_has_answered_is_taken_off_its_books(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            cluster.scheduler.answers.clear()
            victim = Victim(cluster, checkpoint.prompt(30))
            await victim.placement()
            await victim.go_away()
            assert cluster.scheduler.requests_in_flight == 2  # one on each worker, as the controller thinks
            cluster.scheduler.answers.set()
            await until(lambda: cluster.scheduler.requests_in_flight == 0, "the controller to hear of it")
            await others_in(cluster)

    asyncio.run(scenario())


def test_many_clients_that_go_away_at_any_moment(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=2, decode=2, num_blocks=64) as cluster:
            others = others_in(cluster, 60)
            victims = [Victim(cluster, checkpoint.prompt(1 + 12 * index, seed=index)) for index in range(16)]
            for index, victim in enumerate(victims):
                await until(lambda v=victim, n=index % 4: v.num_tokens >= n, "the victim's tokens")  # type: ignore[misc]
                await victim.go_away()
            for victim in victims:
                await victim.check_gone()
            await others

    asyncio.run(scenario())
