"""A server in a Ray cluster of several nodes (raylets on this machine): where its workers land, and what moves them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from scheduler.types import WorkerRole
from tests.cluster import TinyCheckpoint
from tests.e2e.ray_cluster import Nodes, ray_nodes
from tests.e2e.server import RunningServer, free_port, serving, wait_until
from tests.e2e.traffic import SMALL, ask, saved_tiny, traffic

pytestmark = pytest.mark.e2e
MOST_LEARNED_S = 10.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return saved_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with ray_nodes() as running:
        yield running


def node_of(worker_process_id: int) -> int:
    """The raylet that a worker's process belongs to."""
    return psutil.Process(worker_process_id).ppid()


def raylet_of(node: object) -> int:
    (raylet,) = node.all_processes["raylet"]  # type: ignore[attr-defined]
    return int(raylet.process.pid)


def test_workers_land_on_their_nodes_and_move_with_them(
    nodes: Nodes, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By label and by resource; a node that leaves loses its worker while streams go on; one that joins gets it.

    The cluster is the one that Ray finds: ``auto`` is RAY_ADDRESS where that is set, as in a pod of KubeRay. Without it
    Ray would take any that runs on this machine.
    """
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    compute = nodes.add(tier="compute")
    bandwidth = [nodes.add(resources={"bandwidth_heavy": 1}) for _ in range(2)]
    flags = ("--prefill-node-label", "tier=compute", "--decode-resource", "bandwidth_heavy=1", "--decode-workers", "2")
    with serving(str(tiny.path), "--address", "auto", *flags, *SMALL, expected_workers=3) as server:
        (prefill,) = server.workers(WorkerRole.PREFILL)
        decodes = server.workers(WorkerRole.DECODE)
        assert node_of(prefill.info.process_id) == raylet_of(compute)
        assert {node_of(each.info.process_id) for each in decodes} == {raylet_of(each) for each in bandwidth}
        assert [each.ppid() for each in _schedulers()] == [raylet_of(nodes.head)], "it would leave with another node"

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


@pytest.mark.slow
def test_two_servers_share_a_cluster_and_learn_their_state_back(nodes: Nodes, tiny: TinyCheckpoint) -> None:
    """The ranks of a worker are on one node. Both schedulers are killed: streams go on, and workers register again."""
    for _ in range(2):
        nodes.add(num_cpus=2, zone="ranks")
    flags = ("--address", nodes.address, "--node-label", "zone=ranks", "--colocated", "1", *SMALL)
    ranks = ("-tp", "2", "--threads-per-worker", "2")  # the later one of two flags counts
    with (
        serving(str(tiny.path), *flags, *ranks, expected_workers=1) as first,
        serving(str(tiny.path), *flags, expected_workers=1) as second,
    ):
        (leader,) = first.workers(WorkerRole.COLOCATED)
        raylet = psutil.Process(node_of(leader.info.process_id))
        followers = [each for each in raylet.children() if "FollowerActor" in " ".join(each.cmdline())]
        assert len(followers) == 1, "a rank is on another node than its leader"

        epochs = [server.cluster().epoch for server in (first, second)]
        with traffic(first, tiny), traffic(second, tiny):
            for scheduler in _schedulers():
                scheduler.kill()
            with ThreadPoolExecutor() as watchers:  # or the second would be looked at once the first is done
                learned_s = list(watchers.map(_relearned_s, (first, second), epochs))
        print(f"learned again {learned_s} s after the new schedulers began")
        assert max(learned_s) <= MOST_LEARNED_S
        assert leader.info == first.workers(WorkerRole.COLOCATED)[0].info


def _relearned_s(server: RunningServer, epoch: int) -> float:
    """Seconds from the start of the new scheduler, whose epoch is that moment, until its workers are known again."""

    def is_relearned() -> bool:
        cluster = server.cluster()
        return cluster.epoch != epoch and len(cluster.workers) == 1 and not cluster.missing

    wait_until("the workers are known again", is_relearned, 60)
    return time.monotonic() - server.cluster().epoch / 1e9


def _schedulers() -> list[psutil.Process]:
    return [each for each in psutil.process_iter() if _is_ours(each) and "SchedulerActor" in " ".join(each.cmdline())]


def _is_ours(process: psutil.Process) -> bool:
    """The test's own descendants: other tests may run on this machine."""
    me = psutil.Process()
    try:
        return any(parent == me for parent in process.parents())
    except psutil.Error:
        return False


def test_a_label_that_no_node_has_is_refused_by_name(nodes: Nodes, tiny: TinyCheckpoint) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "engine.cli", "serve", str(tiny.path), "--port", str(free_port())),
            *("--address", nodes.address, "--decode-node-label", "tier=moon", *SMALL),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("twinpool: ")]
    assert done.returncode == 1
    assert "no node has the label tier=moon" in sentence and "--decode-node-label" in sentence
