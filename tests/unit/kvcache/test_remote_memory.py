"""The RDMA library is asked for by name only; what it lacks is said in a sentence, and what it hides is looked for."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from kvcache.errors import ConfigError, ResourceError
from kvcache.transfer import port_choice, ports
from kvcache.transfer.remote_memory import MooncakeMemory, Network, has_device

NO_DEVICE = '{"cpu:0": [[], []]}'
ONE_DEVICE = '{"cpu:0": [[], ["mlx5_0"]]}'


class FakeLibraryEngine:
    """As much of the library's engine as is used."""

    topology = NO_DEVICE
    code = 0  # what every call returns; 0: well

    def initialize(self, host: str, metadata: str, network: str, devices: str) -> int:
        assert (host, metadata, devices) == ("10.0.0.1", "P2PHANDSHAKE", "")
        return self.code

    def get_local_topology(self) -> str:
        return self.topology

    def get_rpc_port(self) -> int:
        return 12345

    def transfer_sync_read(self, session: str, address: int, remote_address: int, num_bytes: int) -> int:
        assert (session, address, remote_address, num_bytes) == ("there:1", 200, 100, 8)
        return self.code

    def register_memory(self, address: int, num_bytes: int) -> int:
        return self.code


def install(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    engine = type("Engine", (FakeLibraryEngine,), attributes)
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(TransferEngine=engine))
    for name in ("MC_TRANSFER_TIMEOUT", "MC_LOG_LEVEL", "MC_FORCE_TCP"):
        monkeypatch.setenv(name, "")  # restored at the end


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ModuleNotFoundError("No module named 'mooncake'"), r"pip install -e '.\[rdma\]'"),
        (ImportError("libibverbs.so.1: cannot open shared object file"), r"libibverbs.so.1.*libibverbs1"),
    ],
)
@pytest.mark.parametrize("name", ["rdma", "rdma-tcp"])
def test_what_is_not_installed_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, error: ImportError, sentence: str, name: port_choice.PortName
) -> None:
    def missing(_name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=sentence):
        port_choice.check_port(name)
    with pytest.raises(ConfigError, match=sentence):
        ports.open_memory(name, "127.0.0.1")


@pytest.mark.parametrize("name", ["auto", "grpc", "shm"])
def test_the_other_ports_do_not_look_for_the_library(
    monkeypatch: pytest.MonkeyPatch, name: port_choice.PortName
) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} is imported"))
    port_choice.check_port(name)
    assert ports.open_memory(name, "127.0.0.1") is None


@pytest.mark.parametrize(("topology", "expected"), [(NO_DEVICE, False), (ONE_DEVICE, True), ("", False), ("{}", False)])
def test_devices_are_found_in_the_librarys_topology(topology: str, expected: bool) -> None:
    assert has_device(topology) is expected


def test_rdma_without_a_device_is_refused_although_the_library_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(ResourceError, match="no RDMA device"):
        MooncakeMemory("10.0.0.1", "rdma")
    assert MooncakeMemory("10.0.0.1", "tcp").session == "10.0.0.1:12345"


@pytest.mark.parametrize("network", ["rdma", "tcp"])
def test_a_library_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    install(monkeypatch, topology=ONE_DEVICE, code=-1)
    with pytest.raises(ResourceError, match="does not start"):
        MooncakeMemory("10.0.0.1", network)


@pytest.mark.parametrize(("code", "expected"), [(0, True), (-1, False), (1, False)])
def test_a_read_is_well_when_the_library_says_nought(
    monkeypatch: pytest.MonkeyPatch, code: int, expected: bool
) -> None:
    install(monkeypatch, topology=ONE_DEVICE)
    memory = MooncakeMemory("10.0.0.1", "rdma")
    memory._engine.code = code
    assert memory.read("there:1", 100, 200, 8) is expected


def test_memory_that_cannot_be_registered_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    memory = MooncakeMemory("10.0.0.1", "tcp")
    memory._engine.code = -1
    with pytest.raises(ResourceError, match="4096 bytes"):
        memory.register(1, 4096)
