"""What this process may use of the machine: less than the machine has, in a container."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def available_memory_bytes(cgroup: Path = CGROUP) -> int:
    """Free memory of the machine, or what the control group (version 2) leaves, whichever is less."""
    available = psutil.virtual_memory().available
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    return available if limit is None else min(available, max(0, limit - (used or 0)))


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may run on, cut to the control group's quota."""
    cores = len(psutil.Process().cpu_affinity() or [0])
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` can be reached from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _number(file: Path) -> int | None:
    """The file's number; None when there is none or it says ``max``."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
