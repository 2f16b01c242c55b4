"""The ports by name, as ``--kv-transfer-port`` has them. Imports nothing heavy: the command checks it too."""

from __future__ import annotations

import os
import socket
from typing import Literal

from kvcache.errors import ConfigError

PortName = Literal["auto", "grpc", "shm"]
HAS_SHM = hasattr(os, "memfd_create") and hasattr(socket, "SO_PEERCRED")  # Linux


def check_port(name: PortName) -> None:
    """
    Raises:
        ConfigError: this system does not have it.
    """
    if name == "shm" and not HAS_SHM:
        raise ConfigError("--kv-transfer-port shm needs Linux, for memory without a name and sockets that tell users.")
