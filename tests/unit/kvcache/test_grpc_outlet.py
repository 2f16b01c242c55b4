"""One handoff's way over gRPC, with a call that only writes down what it was given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kvcache.transfer import grpc_port
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.sender import PrefillOutcome
from kvcache.transfer.turns import Turns
from kvcache.transfer.wire import Chunk, decode_message
from tests.builders import CountedPatience
from tests.unit.kvcache.handoff import FIRST_TOKEN_ID, Handoff
from tests.unit.kvcache.test_sender import make_transfer


class FakeCall:
    """Takes every message at once."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def done(self) -> bool:
        return False

    def cancel(self) -> None: ...

    def add_done_callback(self, callback: Callable[[object], None]) -> None: ...

    async def write(self, data: bytes) -> None:
        self.written.append(data)


def make_outlet(transfer: object, turns: Turns) -> tuple[grpc_port._GrpcOutlet, FakeCall]:
    call: Any = FakeCall()
    return grpc_port._GrpcOutlet(call, transfer, turns, lambda: None), call  # type: ignore[arg-type]


@pytest.mark.parametrize("num_blocks", [1, 5, 32, 85])
def test_chunks_that_fill_no_slot_are_gathered_into_their_messages_too(
    num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One copy out of the cache, whatever the prompt's length; only a header of another length costs one more."""
    made: list[int] = []

    def counted(num_bytes: int) -> tuple[bytes, memoryview]:
        data, view = original(num_bytes)
        made.append(id(data))
        return data, view

    original = grpc_port.bytes_to_fill
    monkeypatch.setattr(grpc_port, "bytes_to_fill", counted)

    async def scenario() -> None:
        transfer = make_transfer(30, num_blocks, max_chunk_bytes=1 << 20)
        transfer.complete(PrefillOutcome(FIRST_TOKEN_ID))
        outlet, call = make_outlet(transfer, Turns(1))
        patience = CountedPatience()
        while not transfer.is_finished:
            message = transfer.next_message(await outlet.slot(patience))
            assert message is not None
            await outlet.put(message)
        chunks = [each for each in call.written if isinstance(decode_message(each), Chunk)]
        copied = [each for each in chunks if id(each) not in made]
        header_lengths = [len(each) - len(_payload(each)) for each in chunks]
        changes = sum(before != after for before, after in zip([0, *header_lengths], header_lengths, strict=False))
        assert len(copied) == changes <= 4
        assert patience.num_suspended == 0

    asyncio.run(scenario())


def _payload(data: bytes) -> bytes | memoryview:
    message = decode_message(data)
    assert isinstance(message, Chunk)
    return message.payload


def test_a_wait_behind_other_handoffs_is_not_the_receivers_fault(handoff: Handoff) -> None:
    async def scenario() -> None:
        turns = Turns(1)
        first, _ = make_outlet(handoff.outgoing(), turns)
        second, _ = make_outlet(handoff.outgoing(), turns)
        await first.slot(CountedPatience())
        patience = CountedPatience()
        waiting = asyncio.create_task(second.slot(patience))
        await asyncio.sleep(0)
        assert patience.is_suspended
        await first.put(pb.TransferCommit())
        await waiting
        assert not patience.is_suspended

    asyncio.run(scenario())
