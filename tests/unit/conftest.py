"""For unit tests: no Ray and no sockets. Who needs them stands in tests/integration or tests/e2e."""

import socket
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

FORBIDDEN = {"ray": ("init",), "grpc": ("server",), "grpc.aio": ("server",)}


def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
    pytest.fail("a unit test starts no Ray and opens no socket")


@pytest.fixture(autouse=True)
def no_ray_and_no_sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Patches Ray and gRPC only where they are loaded: importing them here would slow every run down."""
    for name in ("bind", "connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for module, names in FORBIDDEN.items():
        for name in names if module in sys.modules else ():
            monkeypatch.setattr(sys.modules[module], name, refuse)
    yield
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized(), "the test left Ray running"
