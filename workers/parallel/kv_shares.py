"""How the leader reaches the KV of every rank of its group, to hand whole blocks over.

::

    CPU   all ranks' KV lies in one memory that every process maps: reading another rank's is reading memory
    GPU   each rank's KV lies on its own GPU: the leader asks for blocks over a socket, and a thread beside the
          follower's steps copies them, as ``kvcache.staging`` does for the leader's own
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from kvcache.errors import InvariantError
from kvcache.heads import Shard
from kvcache.spec import KVCacheSpec
from kvcache.storage import BlockStorage, PagedStorage
from workers.parallel import group_pb2 as pb
from workers.parallel.channel import Channel
from workers.parallel.rank import RankLostError
from workers.parallel.shared_memory import create_shared_memory, map_shared_memory, whole_pages
from workers.worker_options import WorkerOptions


class KVShares(Protocol):
    """The leader's side."""

    channels: Sequence[Channel]  # one end of each is a follower's: it closes with it
    own: PagedStorage | None  # the leader's, where it is there before its model; else it comes with the model

    def descriptor_of(self, rank: int) -> int:
        """What a follower is given to make its KV reachable."""
        ...

    def close_descriptors(self) -> None:
        """Once the followers have them."""
        ...

    def all_of(self, own: PagedStorage) -> list[BlockStorage]:
        """The storages of all ranks, by rank. ``own`` is the leader's; all have as many blocks."""
        ...


class MappedShares:
    """On CPUs. The memory has no name and is gone with the last process."""

    def __init__(self, options: WorkerOptions) -> None:
        """
        Raises:
            ResourceError: there is no memory to share.
        """
        size = options.tensor_parallel_size
        self._descriptor = create_shared_memory("twinpool-kv", _rank_bytes(options) * size)
        self._others = [map_rank_storage(options, rank, self._descriptor) for rank in range(1, size)]
        self.own: PagedStorage | None = map_rank_storage(options, 0, self._descriptor)
        self.channels: Sequence[Channel] = ()

    def descriptor_of(self, rank: int) -> int:
        """See ``KVShares``: the memory of all ranks."""
        return self._descriptor

    def close_descriptors(self) -> None:
        """See ``KVShares``."""
        os.close(self._descriptor)

    def all_of(self, own: PagedStorage) -> list[BlockStorage]:
        """See ``KVShares``."""
        return [own, *self._others]


def map_rank_storage(options: WorkerOptions, rank: int, descriptor: int) -> PagedStorage:
    """One rank's KV in the memory of a ``MappedShares``."""
    spec = Shard(rank, options.tensor_parallel_size).of_spec(options.spec)
    num_bytes = PagedStorage.bytes_of(spec, options.given_num_blocks)
    memory = map_shared_memory(descriptor, num_bytes, rank * _rank_bytes(options))
    return PagedStorage(spec, options.given_num_blocks, memory=memory)


def _rank_bytes(options: WorkerOptions) -> int:
    """Of one rank, in whole pages."""
    spec = Shard(0, options.tensor_parallel_size).of_spec(options.spec)
    return whole_pages(PagedStorage.bytes_of(spec, options.given_num_blocks))


class ServedShares:
    """On GPUs."""

    def __init__(self, options: WorkerOptions, timeout_s: float, on_lost: Callable[[str], None]) -> None:
        """``on_lost`` is called with the reason when a follower did not answer as it should."""
        self._spec = Shard(0, options.tensor_parallel_size).of_spec(options.spec)
        self._on_lost = on_lost
        pairs = [socket.socketpair() for _ in range(1, options.tensor_parallel_size)]
        self._theirs = [theirs for _, theirs in pairs]
        self.own: PagedStorage | None = None
        self.channels: Sequence[Channel] = [Channel(ours) for ours, _ in pairs]
        for channel in self.channels:
            channel.set_timeout(timeout_s)

    def descriptor_of(self, rank: int) -> int:
        """See ``KVShares``: the follower's end of a socket, for ``serve_blocks``."""
        return self._theirs[rank - 1].fileno()

    def close_descriptors(self) -> None:
        """See ``KVShares``."""
        for theirs in self._theirs:
            theirs.close()

    def all_of(self, own: PagedStorage) -> list[BlockStorage]:
        """See ``KVShares``."""
        others = [RemoteShard(channel, self._spec, own.num_blocks, self._on_lost) for channel in self.channels]
        return [own, *others]


class RemoteShard:
    """The ``BlockStorage`` of a rank that answers by ``serve_blocks``."""

    def __init__(self, channel: Channel, spec: KVCacheSpec, num_blocks: int, on_lost: Callable[[str], None]) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self._channel = channel
        self._on_lost = on_lost
        self._lock = threading.Lock()  # an answer belongs to the question before it

    def read_blocks(self, layer: int, block_ids: Sequence[int], out: memoryview | None = None) -> memoryview:
        """See ``BlockStorage``.

        Raises:
            RankLostError: the rank is gone or silent, and ``on_lost`` was told.
        """
        blocks = memoryview(self._ask(pb.Blocks(layer=layer, block_ids=block_ids)))
        if out is None:
            return blocks
        out[:] = blocks
        return out

    def write_blocks(self, layer: int, block_ids: Sequence[int], payload: bytes | memoryview) -> None:
        """See ``BlockStorage``. Returns when the rank has them.

        Raises:
            RankLostError: as ``read_blocks``.
        """
        if len(payload) != len(block_ids) * self.spec.layer_block_bytes:
            raise InvariantError(f"{len(payload)} bytes do not fill {len(block_ids)} blocks of one layer")
        self._ask(pb.Blocks(layer=layer, block_ids=block_ids, are_written=True), payload)

    def _ask(self, request: pb.Blocks, payload: bytes | memoryview | None = None) -> bytearray:
        with self._lock:
            try:
                self._channel.send(request.SerializeToString())
                if payload is not None:
                    self._channel.send(payload)
                return self._channel.receive()
            except RankLostError as error:  # a late answer would be taken for that to the next question
                self._on_lost(f"the KV of a rank cannot be reached: {error}")
                raise


def serve_blocks(channel: Channel, storage: BlockStorage) -> None:
    """Answers a ``RemoteShard`` until its process has ended. However this ends, the leader sees the channel closed."""
    try:
        while True:
            request = pb.Blocks.FromString(bytes(channel.receive()))
            block_ids = list(request.block_ids)
            if request.are_written:
                storage.write_blocks(request.layer, block_ids, memoryview(channel.receive()))
                channel.send(b"")
            else:
                channel.send(storage.read_blocks(request.layer, block_ids))
    except RankLostError:
        return
    finally:
        channel.close()
