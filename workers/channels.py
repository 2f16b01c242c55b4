"""Connections to other workers, one per address, made when first needed."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from kvcache.transfer.grpc_port import CHANNEL_OPTIONS
from workers import worker_pb2_grpc as pb_grpc
from workers.tls import TLS_NAME, TlsFolder

KEEPALIVE_OPTIONS = (
    # A peer that vanished without a word (a cut link, a stopped process) is noticed after ten seconds.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # else a minute, and the line above counts for nothing
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

    def __init__(self, tls: TlsFolder | None = None) -> None:
        self._credentials = None if tls is None else tls.channel_credentials()
        self._peers: dict[str, Peer] = {}

    def __call__(self, address: str) -> Peer:
        peer = self._peers.get(address)
        if peer is None:
            channel = self._connect(address)
            peer = Peer(channel, pb_grpc.WorkerStub(channel))
            self._peers[address] = peer
        return peer

    def _connect(self, address: str) -> grpc.aio.Channel:
        options = (*CHANNEL_OPTIONS, *KEEPALIVE_OPTIONS)
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        named = (*options, ("grpc.ssl_target_name_override", TLS_NAME))
        return grpc.aio.secure_channel(address, self._credentials, options=named)

    async def close(self) -> None:
        for peer in self._peers.values():
            await peer.channel.close()
        self._peers.clear()
