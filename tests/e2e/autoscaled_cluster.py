"""A Ray cluster on this machine whose nodes Ray's own autoscaler starts and ends.

Not ``ray.cluster_utils.AutoscalingCluster``: that begins with ``ray stop --force``, which ends every Ray here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.ray_cluster import OBJECT_STORE_BYTES
from tests.e2e.server import START_TIMEOUT_S, free_port, wait_until

HEAD_NODE_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # as Ray's provider of fake nodes calls it
STOP_TIMEOUT_S = 10.0
ROOT = Path(__file__).resolve().parents[2]


def _config(address: str, node_type: dict[str, Any]) -> dict[str, Any]:
    """Nodes that are processes here, each with the resources of ``node_type``."""
    empty_lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    more_lists = ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")
    provider = {
        "type": "external",  # Ray's own name for it wants a file that Ray's package does not have
        "module": "tests.e2e.fake_nodes.NodesWithMemory",
        "gcs_address": address,
        "head_node_id": HEAD_NODE_ID,
        "launch_multiple": True,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "fake",
        "max_workers": node_type["max_workers"],
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 10,
        "provider": provider,
        "head_node_type": "ray.head.default",
        "available_node_types": {"ray.head.default": head, "worker": node_type},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in (*empty_lists, *more_lists)},
    }


@contextlib.contextmanager
def autoscaled_cluster(node_type: dict[str, Any]) -> Iterator[str]:
    """Its address. ``node_type``: resources, min_workers and max_workers of its nodes beside the head."""
    folder = Path(tempfile.mkdtemp(prefix="scaling-"))
    port = free_port()
    address = f"127.0.0.1:{port}"
    config = folder / "config.json"
    config.write_text(json.dumps(_config(address, node_type)))
    command = (
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--include-dashboard=false"),
        *(f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=0", "--disable-usage-stats"),
        *(f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={folder / 'ray'}"),
        *(f"--autoscaling-config={config}",),
    )
    of_fake_nodes = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_SCHEDULER_EVENTS": "0",  # else every driver prints them
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE_ID,
        "PYTHONPATH": str(ROOT),  # of the autoscaler, which loads our provider
    }
    before = dict(os.environ)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # for all who join
    with (folder / "output.txt").open("wb") as sink:
        head = psutil.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=os.environ | of_fake_nodes)
    try:
        expected = 1 + node_type["min_workers"]
        wait_until("the first nodes", lambda: _is_listening(port) and num_nodes(address) == expected, START_TIMEOUT_S)
        yield address
    except BaseException:
        print((folder / "output.txt").read_text(errors="replace")[-3000:])
        raise
    finally:
        _end(head)
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.clear()
        os.environ |= before


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def num_nodes(address: str) -> int:
    """Asked by another process, for Ray joins one cluster in the life of one."""
    asking = "import ray, sys; ray.init(sys.argv[1]); print('nodes:', sum(node['Alive'] for node in ray.nodes()))"
    done = subprocess.run([sys.executable, "-c", asking, address], capture_output=True, text=True, check=False)
    found = re.search(r"^nodes: (\d+)$", done.stdout, re.MULTILINE)  # among lines that Ray writes
    return int(found[1]) if found else 0


def _end(head: psutil.Popen) -> None:
    """With all nodes: those beside the head are processes that its autoscaler has started."""
    family = [head, *head.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)
