"""A Ray cluster of several nodes on this machine, for a server to join."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 80 << 20


class Nodes:
    """The cluster's head, which has no CPU for workers, and the nodes that a test adds."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def head(self) -> Any:
        """Where a server that joins has its launcher."""
        return self._cluster.head_node

    def add(self, num_cpus: int = 1, *, resources: dict[str, float] | None = None, **labels: str) -> Any:
        """A node with these labels."""
        return self._cluster.add_node(
            num_cpus=num_cpus, resources=resources or {}, labels=labels, object_store_memory=OBJECT_STORE_BYTES
        )

    def kill(self, node: Any) -> None:
        """All of its processes end, as of a machine that lost its power."""
        self._cluster.remove_node(node, allow_graceful=False)


@contextlib.contextmanager
def ray_nodes() -> Iterator[Nodes]:
    folder = tempfile.mkdtemp(prefix="nodes-")
    before = dict(os.environ)
    os.environ |= {"RAY_TMPDIR": folder}
    (Path(folder) / "ray").mkdir()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES},
    )
    try:
        yield Nodes(cluster)
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.clear()
        os.environ |= before
