"""Which way handoffs took: a test that means a port says so, and shows it."""

from __future__ import annotations

import pytest

from kvcache.transfer.grpc_port import GrpcPort, KVTransferService
from kvcache.transfer.port_choice import HAS_SHM, PortName
from kvcache.transfer.shm_port import ShmPort
from kvcache.transfer.shm_service import ShmService

BOTH_PORTS = ["grpc", pytest.param("shm", marks=pytest.mark.skipif(not HAS_SHM, reason="Linux only"))]


class Opened:
    """Counts the ways that prefill workers of this process open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.grpc = self.shm = 0
        open_grpc, open_shm = GrpcPort.open, ShmPort.try_open

        async def counted_grpc(*args: object) -> object:
            self.grpc += 1
            return await open_grpc(*args)  # type: ignore[arg-type]

        def counted_shm(*args: object) -> object:
            outlet = open_shm(*args)  # type: ignore[arg-type]
            self.shm += outlet is not None
            return outlet

        monkeypatch.setattr(GrpcPort, "open", counted_grpc)
        monkeypatch.setattr(ShmPort, "try_open", counted_shm)


class Came:
    """Counts the ways by which handoffs come to decode workers of this process, wherever they come from.

    Made before the workers are.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._grpc = self._shm = 0
        serve_grpc, serve_shm = KVTransferService._send, ShmService._serve

        async def counted_grpc(*args: object) -> object:
            self._grpc += 1
            return await serve_grpc(*args)  # type: ignore[arg-type]

        async def counted_shm(*args: object) -> None:
            self._shm += 1
            await serve_shm(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(KVTransferService, "_send", counted_grpc)
        monkeypatch.setattr(ShmService, "_serve", counted_shm)

    def check_only(self, port: PortName) -> None:
        """At least one has come, and none by the other port."""
        assert port in ("grpc", "shm")
        came, others = (self._grpc, self._shm) if port == "grpc" else (self._shm, self._grpc)
        assert came > 0
        assert others == 0
