"""Blocks between a device's memory and bytes, beside what the device computes.

``read``:  blocks ─gather─► device buffer ─copy─► pinned buffer ─► bytes       ``write`` goes the other way

All of it is queued on a stream of its own, and only that stream is waited for: a running step goes on. That is right
because nobody else touches these blocks meanwhile: a step has ended on the device before its blocks are sent, and
blocks that are received are read by no step before the commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch


class CopyStream(Protocol):
    """What of CUDA is used here."""

    def active(self) -> AbstractContextManager[object]:
        """Inside, device work is queued on this stream."""
        ...

    def synchronize(self) -> None:
        """Waits for this stream only."""
        ...

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """uint8 in host memory that the device copies to and from by itself."""
        ...


class CudaCopyStream:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))  # the cache's first zeros

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class StagedCopies:
    """Moves blocks of one storage. One thread at a time."""

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream
        self._buffer = stream.host_buffer(0)

    def read(self, layer: torch.Tensor, block_ids: Sequence[int], out: memoryview | None = None) -> memoryview:
        """A copy of the blocks' bytes, in ``out`` if it is given."""
        with self._stream.active():
            blocks = layer.index_select(0, _index(block_ids, layer)).view(torch.uint8).flatten()
            staged = self._staged(blocks.numel())
            staged.copy_(blocks, non_blocking=True)
            self._stream.synchronize()
        if out is None:
            return memoryview(staged.numpy().tobytes())
        np.frombuffer(out, np.uint8)[:] = staged.numpy()
        return out

    def write(self, layer: torch.Tensor, block_ids: Sequence[int], payload: bytes | memoryview) -> None:
        """Returns when the blocks hold the payload."""
        staged = self._staged(len(payload))
        staged.numpy()[:] = np.frombuffer(payload, dtype=np.uint8)
        with self._stream.active():
            blocks = staged.to(layer.device, non_blocking=True).view(layer.dtype)
            layer.index_copy_(0, _index(block_ids, layer), blocks.view(len(block_ids), *layer.shape[1:]))
            self._stream.synchronize()

    def _staged(self, num_bytes: int) -> torch.Tensor:
        if self._buffer.numel() < num_bytes:
            self._buffer = self._stream.host_buffer(num_bytes)  # a chunk of the wire at most: it grows a few times
        return self._buffer[:num_bytes]


def _index(block_ids: Sequence[int], layer: torch.Tensor) -> torch.Tensor:
    return torch.tensor(block_ids, dtype=torch.long, device=layer.device)
