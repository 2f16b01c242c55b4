"""The ports by name, as ``--kv-transfer-port`` has them. Imports nothing heavy: the command checks it too."""

from __future__ import annotations

import os
import socket
from typing import Literal

from kvcache.errors import ConfigError
from kvcache.transfer.remote_memory import Network, load_library

PortName = Literal["auto", "grpc", "shm", "rdma", "rdma-tcp"]
HAS_SHM = hasattr(os, "memfd_create") and hasattr(socket, "SO_PEERCRED")  # Linux


def takes_shm(name: PortName) -> bool:
    """Whether a worker with this port takes in KV through shared memory."""
    return HAS_SHM and name in ("auto", "shm")


def network_of(name: PortName) -> Network | None:
    """Of the RDMA library; None: the port does not use it."""
    match name:
        case "rdma":
            return "rdma"
        case "rdma-tcp":
            return "tcp"
        case _:
            return None


def check_port(name: PortName) -> None:
    """
    Raises:
        ConfigError: this system does not have it.
    """
    if name == "shm" and not HAS_SHM:
        raise ConfigError("--kv-transfer-port shm needs Linux, for memory without a name and sockets that tell users.")
    if network_of(name) is not None:
        load_library()
