"""Memory that other hosts read: what is needed of an RDMA library for that, and the library itself.

The library is Mooncake's transfer engine, an optional extra, which finds its peers by itself (``P2PHANDSHAKE``). Seen
of 0.3.13: it takes any name of a network for good and falls back to TCP without a word; it listens on all addresses of
the host, whatever it is told; and a read from a process that is stopped may not return before that goes on. So devices
are looked for here, and reads are made in threads that nobody waits for.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from typing import Any, Literal, Protocol

from kvcache.errors import ConfigError, ResourceError

Network = Literal["rdma", "tcp"]

INSTALL = "pip install -e '.[rdma]'"
SYSTEM_LIBRARY = "libibverbs"
_ENVIRONMENT = {"MC_TRANSFER_TIMEOUT": "10", "MC_LOG_LEVEL": "WARNING"}  # seconds that a read may take; what it prints
logger = logging.getLogger(__name__)


class RemoteMemory(Protocol):
    """Used by any thread. Addresses are of the process that they are said of."""

    session: str  # the name by which others reach this process's memory

    def register(self, address: int, num_bytes: int) -> None:
        """Others may read these bytes from now on.

        Raises:
            ResourceError: the memory cannot be registered.
        """
        ...

    def unregister(self, address: int) -> None:
        """Nobody can begin to read them any more."""
        ...

    def read(self, session: str, remote_address: int, address: int, num_bytes: int) -> bool:
        """Copies another process's bytes into registered memory of this one; waits for them.

        False: it failed. Some of the bytes may be there, and others may still come.
        """
        ...


def load_library() -> Any:
    """The module of the transfer engine.

    Raises:
        ConfigError: it is not installed, or lacks a library of the system; says what to install.
    """
    try:
        return importlib.import_module("mooncake.engine")
    except ModuleNotFoundError:
        raise ConfigError(f"--kv-transfer-port rdma and rdma-tcp need an RDMA library: {INSTALL}.") from None
    except ImportError as error:
        raise ConfigError(
            f"--kv-transfer-port rdma and rdma-tcp need a library of the system that is not here ({error});"
            f" {SYSTEM_LIBRARY} is libibverbs1 on Debian and Ubuntu, libibverbs on Fedora."
        ) from None


class MooncakeMemory:
    """A ``RemoteMemory`` through Mooncake's transfer engine."""

    def __init__(self, host: str, network: Network) -> None:
        """``host``: by which other workers reach this one.

        Raises:
            ConfigError: the library cannot be loaded.
            ResourceError: it does not start, or there is no device for the network.
        """
        for name, value in _ENVIRONMENT.items():  # read when the library is loaded
            os.environ.setdefault(name, value)
        library = load_library()
        if network == "tcp":
            os.environ["MC_FORCE_TCP"] = "1"  # or it takes RDMA where it finds a device
        self._engine = library.TransferEngine()
        if self._engine.initialize(host, "P2PHANDSHAKE", network, "") != 0:
            raise ResourceError(f"The RDMA library does not start on {host}.")
        if network == "rdma" and not has_device(self._engine.get_local_topology()):
            raise ResourceError(
                "--kv-transfer-port rdma finds no RDMA device on this host; rdma-tcp is the same over TCP, to try it."
            )
        self.session = f"{host}:{self._engine.get_rpc_port()}"
        logger.warning(
            "The RDMA library listens on all addresses of this host and asks nobody who they are:"
            " keep its ports, %s among them, away from networks that you do not trust.",
            self.session,
        )

    def register(self, address: int, num_bytes: int) -> None:
        if self._engine.register_memory(address, num_bytes) != 0:
            raise ResourceError(f"The RDMA library cannot register {num_bytes} bytes.")

    def unregister(self, address: int) -> None:
        if self._engine.unregister_memory(address) != 0:
            logger.warning("The RDMA library does not let go of registered memory.")

    def read(self, session: str, remote_address: int, address: int, num_bytes: int) -> bool:
        return bool(self._engine.transfer_sync_read(session, address, remote_address, num_bytes) == 0)


def has_device(topology: str) -> bool:
    """``topology``: JSON of the library: memory's location → [names of preferred devices, names of others]."""
    return any(names for devices in json.loads(topology or "{}").values() for names in devices)
