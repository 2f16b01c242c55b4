"""A server in a Ray cluster of several nodes (raylets on this machine): where its workers land, and what moves them."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from scheduler.types import WorkerRole
from tests.cluster import TinyCheckpoint
from tests.e2e.ray_cluster import Nodes, ray_nodes
from tests.e2e.server import RunningServer, serving, wait_until

pytestmark = pytest.mark.e2e

NUM_TOKENS = 200
SMALL = ("--kv-cache-memory-bytes", "8MiB", "--max-model-len", "512", "--threads-per-worker", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    checkpoint = TinyCheckpoint(tmp_path_factory.mktemp("tiny"))
    checkpoint.save_tokenizer()
    return checkpoint


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with ray_nodes() as running:
        yield running


def ask(server: RunningServer, tiny: TinyCheckpoint, seed: int, num_tokens: int = NUM_TOKENS) -> None:
    """One completion, compared with the reference."""
    prompt = tiny.prompt(40, seed)
    body = {"prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0, "return_token_ids": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert tuple(answer.json()["choices"][0]["token_ids"]) == tiny.greedy(prompt, num_tokens)


@contextlib.contextmanager
def traffic(server: RunningServer, tiny: TinyCheckpoint, num_clients: int = 3) -> Iterator[None]:
    """Clients that ask one request after the other, each of which must end well."""
    stop = threading.Event()

    def ask_on(client: int) -> None:
        for number in itertools.count():
            ask(server, tiny, seed=10 * client + number % 4)
            if stop.is_set():
                return

    with ThreadPoolExecutor(num_clients) as clients:
        asking = [clients.submit(ask_on, client) for client in range(num_clients)]
        try:
            yield
        finally:
            stop.set()
        for client in asking:
            client.result()


def node_of(worker_process_id: int) -> int:
    """The raylet that a worker's process belongs to."""
    return psutil.Process(worker_process_id).ppid()


def raylet_of(node: object) -> int:
    (raylet,) = node.all_processes["raylet"]  # type: ignore[attr-defined]
    return int(raylet.process.pid)


def test_workers_land_on_their_nodes_and_move_with_them(nodes: Nodes, tiny: TinyCheckpoint) -> None:
    """By label and by resource; a node that leaves loses its worker while streams go on; one that joins gets it."""
    compute = nodes.add(tier="compute")
    bandwidth = [nodes.add(resources={"bandwidth_heavy": 1}) for _ in range(2)]
    flags = ("--prefill-node-label", "tier=compute", "--decode-resource", "bandwidth_heavy=1", "--decode-workers", "2")
    with serving(str(tiny.path), "--address", nodes.address, *flags, *SMALL, expected_workers=3) as server:
        (prefill,) = server.workers(WorkerRole.PREFILL)
        decodes = server.workers(WorkerRole.DECODE)
        assert node_of(prefill.info.process_id) == raylet_of(compute)
        assert {node_of(each.info.process_id) for each in decodes} == {raylet_of(each) for each in bandwidth}

        lost = next(each for each in decodes if node_of(each.info.process_id) == raylet_of(bandwidth[0]))
        with traffic(server, tiny):
            wait_until("the worker is at work", lambda: _generated(server, lost.info.worker_id) > 0, 20)
            nodes.kill(bandwidth[0])
            wait_until("the worker is missed", lambda: server.cluster().missing == (lost.info.worker_id,), 20)

        joined = nodes.add(resources={"bandwidth_heavy": 1})
        wait_until("a worker on the new node", lambda: not server.cluster().missing, 60)
        back = next(each for each in server.workers(WorkerRole.DECODE) if each.info.worker_id == lost.info.worker_id)
        assert node_of(back.info.process_id) == raylet_of(joined)
        assert back.info.incarnation > lost.info.incarnation
        ask(server, tiny, seed=9, num_tokens=5)
    assert psutil.pid_exists(raylet_of(compute)), "the server ended a cluster that was not its own"


def _generated(server: RunningServer, worker_id: str) -> int:
    return sum(each.load.generation_tokens for each in server.cluster().workers if each.info.worker_id == worker_id)
