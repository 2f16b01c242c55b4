"""A port that this system does not have is an error before anything starts, and one that may be left out is."""

from __future__ import annotations

import pytest

from kvcache.errors import ConfigError
from kvcache.transfer import port_choice


def test_shared_memory_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_choice, "HAS_SHM", False)
    with pytest.raises(ConfigError, match="--kv-transfer-port shm"):
        port_choice.check_port("shm")


@pytest.mark.parametrize("name", ["auto", "grpc"])
def test_the_other_ports_are_everywhere(monkeypatch: pytest.MonkeyPatch, name: port_choice.PortName) -> None:
    monkeypatch.setattr(port_choice, "HAS_SHM", False)
    port_choice.check_port(name)
    assert name in port_choice.PortName.__args__
