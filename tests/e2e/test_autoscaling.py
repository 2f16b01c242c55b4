"""A pool that misses its target gets a node that Ray's autoscaler starts for it (fake nodes on this machine)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import AutoscalingCluster

from scheduler.types import WorkerRole
from tests.cluster import TinyCheckpoint
from tests.e2e.server import serving, wait_until
from tests.e2e.traffic import SMALL, saved_tiny, traffic

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture
def address() -> Iterator[str]:
    """Of a cluster with two nodes for workers, and an autoscaler that may start two more."""
    folder = tempfile.mkdtemp(prefix="scaling-")
    before = dict(os.environ)
    os.environ |= {"RAY_TMPDIR": folder}
    (Path(folder) / "ray").mkdir()
    node = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 2, "max_workers": 4}
    cluster = AutoscalingCluster(head_resources={"CPU": 0}, worker_node_types={"worker": node}, idle_timeout_minutes=10)
    cluster.start()
    try:
        yield "auto"
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.clear()
        os.environ |= before


def test_a_pool_that_misses_its_target_gets_a_node(address: str, tmp_path: Path) -> None:
    tiny: TinyCheckpoint = saved_tiny(tmp_path)
    flags = ("--address", address, "--max-decode-workers", "2", "--tpot-target-ms", "0.001")
    with serving(str(tiny.path), *flags, *SMALL, expected_workers=2) as server:
        with traffic(server, tiny):
            wait_until("a second decode worker", lambda: len(server.workers(WorkerRole.DECODE)) == 2, 150)
        server.num_workers = 3
        assert len({psutil.Process(each.info.process_id).ppid() for each in server.cluster().workers}) == 3, "its node"
