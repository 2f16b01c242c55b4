"""The budget of what goes back after turns."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import pytest

from kvcache.prefix import HashChain
from kvcache.storage import PagedStorage
from kvcache.transfer.inproc_port import InProcessPort
from scheduler.request import Request
from tests.builders import make_manager, make_sampling
from workers.offers import BURST_S, ByteBudget, OfferMaker


def test_a_budget_can_be_saved_up_to_its_burst() -> None:
    budget = ByteBudget(100, now=0.0)
    burst = int(100 * BURST_S)
    assert budget.take(burst, now=0.0)
    assert not budget.take(1, now=0.0)
    assert budget.take(burst, now=1000.0)
    assert not budget.take(1, now=1000.0)


def test_a_budget_comes_back_with_time_and_a_refusal_takes_nothing() -> None:
    budget = ByteBudget(100, now=0.0)
    assert budget.take(int(100 * BURST_S), now=0.0)
    assert not budget.take(51, now=0.5)
    assert budget.take(50, now=0.5)


def test_an_offer_that_fails_in_a_way_nobody_thought_of_is_logged_and_the_next_is_made(
    caplog: pytest.LogCaptureFixture,
) -> None:
    manager = make_manager(num_blocks=8)
    asked: list[str] = []

    def peer_at(address: str) -> NoReturn:
        asked.append(address)
        raise RuntimeError("a bug of ours")

    async def scenario() -> None:
        storage = PagedStorage(manager.spec, 8)
        offers = OfferMaker(manager, storage, lambda: 0.0, peer_at, InProcessPort({}), 1 << 20, stall_timeout_s=1.0)
        prompt = tuple(range(1, 9))
        manager.extend("a", len(prompt))
        manager.cache("a", list(HashChain(b"", manager.spec.block_size).hashes(prompt)))
        request = Request("a", prompt, make_sampling(), num_computed_tokens=len(prompt))
        running = asyncio.create_task(offers.run())
        for address in ("first:1", "second:1"):
            offers.offer(request, address)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert not running.done()
        running.cancel()
        assert asked == ["first:1", "second:1"]
        assert offers.num_dropped == 2
        assert "a bug of ours" in caplog.text
        manager.free("a")

    asyncio.run(scenario())
