"""Which machine and which versions produced a result. Every result file carries this.

No host names, user names or paths: a result is meant to be published.
"""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TypedDict

DISTRIBUTION = "twinpool"


class RunDescription(TypedDict):
    """When, where and with what: what every result file carries."""

    date: str
    machine: dict[str, str | int]
    versions: dict[str, str]


def describe_run(*distributions: str) -> RunDescription:
    """Of this moment. ``distributions``: as for ``describe_versions``."""
    return RunDescription(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        versions=describe_versions(*distributions),
    )


def describe_machine() -> dict[str, str | int]:
    """CPU model, logical cores (present and usable by this process), memory in bytes, operating system."""
    usable_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu_model": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "usable_cores": usable_cores,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_versions(*distributions: str) -> dict[str, str]:
    """Versions of Python, of Twinpool and of the named distributions; "not installed" where there is none.

    In a checkout Twinpool's commit too, "-dirty" where files differ from it.
    """
    versions = {"python": platform.python_version()}
    commit = _commit()
    if commit is not None:
        versions["commit"] = commit
    for name in (DISTRIBUTION, *distributions):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _cpu_model() -> str:
    """The marketing name from /proc/cpuinfo; where that has none (ARM, other systems), the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
