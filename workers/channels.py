"""Connections to other workers, one per address, made when first needed."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from kvcache.transfer.grpc_port import CHANNEL_OPTIONS
from workers import worker_pb2_grpc as pb_grpc

KEEPALIVE_OPTIONS = (
    # A peer that vanished without a word (a cut link, a stopped process) is noticed after ten seconds.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
SERVER_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 4_000),
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another worker.

    Its stub is made with the channel and never later: gRPC frees a channel's memory when it is closed, and a stub
    that is made then reads it, which ends the process. A call on a closed channel is a plain ``grpc.aio.UsageError``.
    """

    channel: grpc.aio.Channel
    worker: pb_grpc.WorkerStub


class ChannelPool:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._peers: dict[str, Peer] = {}

    def __call__(self, address: str) -> Peer:
        peer = self._peers.get(address)
        if peer is None:
            channel = grpc.aio.insecure_channel(address, options=(*CHANNEL_OPTIONS, *KEEPALIVE_OPTIONS))
            peer = Peer(channel, pb_grpc.WorkerStub(channel))
            self._peers[address] = peer
        return peer

    async def close(self) -> None:
        for peer in self._peers.values():
            await peer.channel.close()
        self._peers.clear()
