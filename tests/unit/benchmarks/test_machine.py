"""A published result names the machine's kind and not the machine."""

from __future__ import annotations

import json
import platform

from benchmarks.machine import describe_machine, describe_versions


def test_the_machine_is_described_without_its_name_or_paths() -> None:
    machine = describe_machine()
    assert machine["cpu_model"]
    assert isinstance(machine["usable_cores"], int) and machine["usable_cores"] >= 1
    assert isinstance(machine["memory_bytes"], int) and machine["memory_bytes"] > 2**20
    written = json.dumps(machine).lower()
    assert "/" not in written.replace(str(machine["cpu_model"]).lower(), "")
    assert set(machine) == {"cpu_model", "cores", "usable_cores", "memory_bytes", "system"}


def test_versions_name_python_and_say_when_a_distribution_is_absent() -> None:
    versions = describe_versions("numpy", "no-such-distribution-of-ours")
    assert versions["python"] == platform.python_version()
    assert versions["numpy"][0].isdigit()
    assert versions["no-such-distribution-of-ours"] == "not installed"
