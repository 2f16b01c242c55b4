"""Which port a worker uses, by the name that ``--kv-transfer-port`` gives it."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from kvcache.transfer.grpc_port import GrpcPort
from kvcache.transfer.port import KVPort, Outlet
from kvcache.transfer.port_choice import PortName, network_of
from kvcache.transfer.rdma_port import RdmaPort
from kvcache.transfer.registered_memory import RegisteredMemory
from kvcache.transfer.remote_memory import MooncakeMemory
from kvcache.transfer.sender import OutgoingTransfer
from kvcache.transfer.shm_port import ShmPort


class AutoPort:
    """Shared memory to workers of this user on this host, gRPC to all others; chosen for each handoff."""

    def __init__(self, near: ShmPort, far: GrpcPort) -> None:
        self._near = near
        self._far = far

    async def open(self, transfer: OutgoingTransfer, on_end: Callable[[], None]) -> Outlet:
        """See ``KVPort``."""
        near = self._near.try_open(transfer, on_end)
        return near if near is not None else await self._far.open(transfer, on_end)


def open_memory(name: PortName, host: str) -> RegisteredMemory | None:
    """What both sides of a port that uses the RDMA library need; None: this one does not.

    Args:
        host: by which other workers reach this one.

    Raises:
        ConfigError, ResourceError: there is no such library or network here.
    """
    network = network_of(name)
    return None if network is None else RegisteredMemory(MooncakeMemory(host, network))


def make_port(
    name: PortName, channel_to: Callable[[str], grpc.aio.Channel], memory: RegisteredMemory | None = None
) -> KVPort:
    """``memory``: of ``open_memory``."""
    if memory is not None:
        return RdmaPort(memory, channel_to)
    match name:
        case "grpc":
            return GrpcPort(channel_to)
        case "shm":
            return ShmPort()
        case _:
            return AutoPort(ShmPort(), GrpcPort(channel_to))
