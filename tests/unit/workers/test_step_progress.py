"""Layers of a running step reach the event loop, from Python and from native code."""

from __future__ import annotations

import asyncio
import ctypes
import os

import pytest

from workers.step_progress import StepProgress


def native_tells(progress: StepProgress, num_layers: int) -> None:
    """What decoder.cpp does."""
    ctypes.c_int64.from_address(progress.counter_address).value = num_layers
    os.write(progress.wake_fd, b"\x01")


async def until_told(told: list[int], num_layers: int) -> None:
    while told[-1:] != [num_layers]:  # noqa: ASYNC110  the pipe tells the loop, and the loop tells the list
        await asyncio.sleep(0)


@pytest.mark.parametrize("tell", [lambda progress, layers: progress.layer_done(layers - 1), native_tells])
def test_each_layer_is_told_once_and_in_order(tell) -> None:  # type: ignore[no-untyped-def]
    told: list[int] = []

    async def scenario() -> None:
        progress = StepProgress(told.append)
        progress.begin()
        for num_layers in (1, 2, 3):
            await asyncio.to_thread(tell, progress, num_layers)
        await until_told(told, 3)
        progress.close()

    asyncio.run(asyncio.wait_for(scenario(), 5))
    assert told == sorted(set(told))


def test_a_late_byte_of_an_earlier_step_tells_nothing_of_the_next() -> None:
    told: list[int] = []

    async def scenario() -> None:
        progress = StepProgress(told.append)
        progress.begin()
        progress.layer_done(7)
        progress.begin()  # before the loop has read the byte
        for _ in range(5):
            await asyncio.sleep(0)
        progress.close()

    asyncio.run(scenario())
    assert told == []


def test_a_full_pipe_stops_nobody() -> None:
    told: list[int] = []

    async def scenario() -> None:
        progress = StepProgress(told.append)
        progress.begin()
        for layer in range(100_000):
            progress.layer_done(layer)
        await until_told(told, 100_000)
        progress.close()

    asyncio.run(asyncio.wait_for(scenario(), 10))
    assert told == [100_000]
