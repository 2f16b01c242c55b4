"""Connections to other workers, one per address, made when first needed."""

from __future__ import annotations

import grpc

from kvcache.transfer.grpc_port import CHANNEL_OPTIONS

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


class ChannelPool:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def __call__(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            channel = grpc.aio.insecure_channel(address, options=(*CHANNEL_OPTIONS, *KEEPALIVE_OPTIONS))
            self._channels[address] = channel
        return channel

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
