"""What servers ask Ray's autoscaler for, it starts nodes for (fake nodes on this machine)."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from scheduler.types import WorkerRole
from tests.cluster import TinyCheckpoint
from tests.e2e.autoscaled_cluster import autoscaled_cluster, num_nodes
from tests.e2e.server import serving, wait_until
from tests.e2e.traffic import SMALL, saved_tiny, traffic

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
NODE_BYTES = 1 << 30  # a worker books its memory too
NEEDS_NODES = """
import sys, time, ray
from engine.node_requests import SharedNodeRequests
from scheduler.room import Room
ray.init(sys.argv[1], namespace=sys.argv[2], logging_level="ERROR")
requests = SharedNodeRequests()
while True:
    requests.tell([Room(resources=(("CPU", 1.0),))] * int(sys.argv[3]))
    time.sleep(1)
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster with two nodes for workers, and an autoscaler that may start three more."""
    node = {"resources": {"CPU": 1, "memory": NODE_BYTES}, "node_config": {}, "min_workers": 2, "max_workers": 5}
    with autoscaled_cluster(node) as ray_address:
        yield ray_address


def test_a_pool_that_misses_its_target_gets_a_node(address: str, tmp_path: Path) -> None:
    tiny: TinyCheckpoint = saved_tiny(tmp_path)
    flags = ("--address", address, "--max-decode-workers", "2", "--tpot-target-ms", "0.001")
    with serving(str(tiny.path), *flags, *SMALL, expected_workers=2) as server:
        with traffic(server, tiny):
            wait_until("a second decode worker", lambda: len(server.workers(WorkerRole.DECODE)) == 2, 150)
        server.num_workers = 3
        assert len({psutil.Process(each.info.process_id).ppid() for each in server.cluster().workers}) == 3, "its node"


@contextlib.contextmanager
def needing(address: str, server: str, count: int) -> Iterator[None]:
    """A process that asks as a server does."""
    process = subprocess.Popen([sys.executable, "-c", NEEDS_NODES, address, server, str(count)])
    try:
        yield
        assert process.poll() is None, "it has failed"
    finally:
        process.kill()
        process.wait()


def test_servers_of_one_cluster_get_what_they_need_together(address: str) -> None:
    """Also when the one that asks Ray for all of them is killed."""
    with needing(address, "b", 3):
        with needing(address, "a", 1):
            wait_until("nodes for both", lambda: num_nodes(address) >= 1 + 4, 90)
        with needing(address, "c", 2):
            wait_until("nodes for both", lambda: num_nodes(address) >= 1 + 5, 90)
    assert num_nodes(address) == 1 + 5, "more than anybody needs"
