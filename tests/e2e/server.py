"""Runs the real `twinpool serve` as a process and checks that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from pydantic import TypeAdapter

from scheduler.types import ClusterSnapshot, WorkerRole, WorkerSnapshot
from scheduler.worker_state import HEARTBEAT_INTERVAL_S

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
CLUSTER = TypeAdapter(ClusterSnapshot)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(what: str, condition: Callable[[], bool], timeout_s: float) -> None:
    """Polls; fails with ``what`` when the time is over."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


@dataclass(slots=True)
class RunningServer:
    url: str
    process: psutil.Process
    output: Path
    num_workers: int
    api_key: str = ""  # that it asks for
    has_ended: bool = False  # set by a test that ends it itself

    def cluster(self) -> ClusterSnapshot:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return CLUSTER.validate_json(httpx.get(f"{self.url}/cluster", headers=headers, timeout=10).content)

    def workers(self, role: WorkerRole) -> list[WorkerSnapshot]:
        return [worker for worker in self.cluster().workers if worker.info.role is role]

    def wait_until_idle(self, timeout_s: float = 20.0) -> ClusterSnapshot:
        """The no-leak check: every block of every worker is free, nothing is leased, nothing unaccounted for.

        All workers must be there, and must have said so in a heartbeat sent after this call began.
        """
        asked_at_s = {worker.info.worker_id: worker.last_heard_s for worker in self.cluster().workers}

        def is_idle() -> bool:
            cluster = self.cluster()
            fresh = all(
                worker.last_heard_s > asked_at_s.get(worker.info.worker_id, 0.0) + 2 * HEARTBEAT_INTERVAL_S
                for worker in cluster.workers
            )
            return fresh and len(cluster.workers) == self.num_workers and not cluster.missing and _is_idle(cluster)

        wait_until("every block free on every worker", is_idle, timeout_s)
        return self.cluster()


def _is_idle(cluster: ClusterSnapshot) -> bool:
    loads = [worker.load for worker in cluster.workers]
    totals = [worker.info.num_blocks for worker in cluster.workers]
    return (
        [load.blocks_free for load in loads] == totals
        and not any(load.running or load.waiting or load.blocks_leased or load.blocks_unaccounted for load in loads)
        and not any(worker.requests_in_flight or worker.tokens_in_flight for worker in cluster.workers)
    )


@contextlib.contextmanager
def serving(*arguments: str, expected_workers: int, api_key: str = "") -> Iterator[RunningServer]:
    """A server with these arguments, ready; ended with Ctrl-C, after which nothing of it may be left.

    It hands every prompt over, unless ``--placement-policy`` says otherwise: by cost many would be computed in place.
    """
    port = free_port()
    shared_memory = set(os.listdir("/dev/shm"))
    folders = session_folders()
    output = Path(tempfile.mkdtemp()) / "output.txt"
    with output.open("wb") as sink:
        process = psutil.Popen(
            [sys.executable, "-m", "engine.cli", "serve", "--port", str(port), *arguments],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {"PYTHONUNBUFFERED": "1", "TWINPOOL_DEVICE": "cpu", "TWINPOOL_PLACEMENT_POLICY": "least_loaded"},
            start_new_session=True,  # the test run's own Ctrl-C is not the server's
        )
    server = RunningServer(f"http://127.0.0.1:{port}", process, output, expected_workers, api_key)
    try:
        _wait_until_ready(server, expected_workers)
        yield server
        if not server.has_ended:
            server.wait_until_idle()
    except BaseException:
        print(output.read_text(errors="replace")[-5000:])
        raise
    finally:
        alive = interrupt(process) if not server.has_ended else []
    assert not alive, f"left running after Ctrl-C: {alive}\n{output.read_text(errors='replace')[-5000:]}"
    assert process.returncode == 0, f"status {process.returncode}\n{output.read_text(errors='replace')[-5000:]}"
    assert set(os.listdir("/dev/shm")) <= shared_memory
    assert session_folders() <= folders
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))  # raises when somebody still listens


def interrupt(process: psutil.Popen) -> list[psutil.Process]:
    """Ctrl-C as a terminal sends it, to the whole process group. Returns what is left, after killing it."""
    family = [process, *process.children(recursive=True)] if process.is_running() else [process]
    os.killpg(process.pid, signal.SIGINT)
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    for leftover in alive:
        leftover.kill()
    return list(alive)


def session_folders() -> set[str]:
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("twinpool-")}


def _wait_until_ready(server: RunningServer, expected_workers: int) -> None:
    def is_ready() -> bool:
        assert server.process.is_running(), "the server has ended"
        assert server.process.status() != psutil.STATUS_ZOMBIE, "the server has ended"
        try:
            return httpx.get(f"{server.url}/ready", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    wait_until("the server is ready", is_ready, START_TIMEOUT_S)
    assert len(server.cluster().workers) == expected_workers
