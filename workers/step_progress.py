"""How far the running step is, told from the step's thread to the event loop, layer by layer."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections.abc import Callable


class StepProgress:
    """The number of layers whose KV is complete in the running step.

    The step's thread counts and then writes a byte into a pipe, which wakes the event loop; native code does the
    same with ``counter_address`` and ``wake_fd`` and needs no interpreter lock for it. What the loop reads is the
    counter, so a byte that arrives late tells the truth about the step that runs then.
    """

    def __init__(self, on_layers: Callable[[int], None]) -> None:
        """``on_layers`` is called on the event loop with the number of layers, never twice with the same."""
        self._on_layers = on_layers
        self._counter = ctypes.c_int64(0)
        self._told = 0
        self._read_fd, self.wake_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        os.set_blocking(self.wake_fd, False)  # a full pipe wakes the loop as well as one byte does
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def counter_address(self) -> int:
        return ctypes.addressof(self._counter)

    def begin(self) -> None:
        """A new step; called on the event loop before the step's thread starts with it."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._read_fd, self._woken)
        self._counter.value = self._told = 0

    def layer_done(self, layer: int) -> None:
        """Called in the step's thread when all KV of ``layer`` that this step computes is in the cache."""
        self._counter.value = layer + 1
        with contextlib.suppress(BlockingIOError):
            os.write(self.wake_fd, b"\x01")

    def close(self) -> None:
        """Call once the step's thread has ended."""
        if self._loop is not None:
            self._loop.remove_reader(self._read_fd)
        os.close(self._read_fd)
        os.close(self.wake_fd)

    def _woken(self) -> None:
        os.read(self._read_fd, 4096)
        num_layers = self._counter.value
        if num_layers > self._told:
            self._told = num_layers
            self._on_layers(num_layers)
