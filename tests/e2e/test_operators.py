"""Drain, role, scale and a rolling restart with the real commands, under load that may not fail."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from scheduler.types import DutyState, WorkerLoad, WorkerRole
from tests.cluster import TinyCheckpoint
from tests.e2e.server import RunningServer, serving, wait_until
from tests.e2e.traffic import SMALL, saved_tiny, traffic

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return saved_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the server leaves its admin key and the commands look for it."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TWINPOOL_CACHE"] = str(folder)
    yield folder
    del os.environ["TWINPOOL_CACHE"]


@pytest.fixture(scope="module")
def server(tiny: TinyCheckpoint, cache: Path) -> Iterator[RunningServer]:
    with serving(str(tiny.path), "--prefill-workers", "2", *SMALL, expected_workers=3) as running:
        yield running
    assert not list(cache.rglob("*.key")), "the admin key was left behind"


def twinpool(server: RunningServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs one command against the server."""
    return subprocess.run(
        [sys.executable, "-m", "engine.cli", *arguments, "--url", server.url],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def states(server: RunningServer) -> dict[str, tuple[str, str]]:
    return {each.info.worker_id: (each.info.role.value, each.duty.state.value) for each in server.cluster().workers}


def test_a_drained_worker_is_empty_and_comes_back(server: RunningServer, tiny: TinyCheckpoint) -> None:
    with traffic(server, tiny):
        drained = twinpool(server, "drain", "prefill-0")
        assert (drained.returncode, drained.stdout.splitlines()[-1]) == (0, "prefill-0 is drained"), drained.stderr
        (worker,) = [each for each in server.cluster().workers if each.info.worker_id == "prefill-0"]
        assert worker.duty.state is DutyState.DRAINED
        assert (worker.load.running, worker.load.blocks_leased) == (0, 0)
    assert twinpool(server, "undrain", "prefill-0").returncode == 0
    wait_until("it is active", lambda: states(server)["prefill-0"] == ("prefill", "active"), 20)


def test_a_worker_changes_its_role_under_load(server: RunningServer, tiny: TinyCheckpoint) -> None:
    with traffic(server, tiny):
        for role, before in (("decode", "prefill"), ("prefill", "decode")):
            incarnation = next(each for each in server.cluster().workers if each.info.worker_id == "prefill-1").info
            changed = twinpool(server, "role", "prefill-1", role)
            assert changed.returncode == 0, changed.stderr
            assert states(server)["prefill-1"] == (role, "active"), before
            after = next(each for each in server.cluster().workers if each.info.worker_id == "prefill-1").info
            assert after.process_id == incarnation.process_id, "it was started again"


def test_a_pool_grows_and_shrinks_under_load(server: RunningServer, tiny: TinyCheckpoint) -> None:
    with traffic(server, tiny):
        grown = twinpool(server, "scale", "--decode", "2")
        assert grown.returncode == 0, grown.stdout + grown.stderr
        assert states(server)["decode-1"] == ("decode", "active")
        check_moves(server, "decode-1")
        shrunk = twinpool(server, "scale", "--decode", "1")
        assert shrunk.returncode == 0, shrunk.stdout + shrunk.stderr
        assert [role for role, _ in states(server).values()].count("decode") == 1
    assert server.cluster().missing == ()


def check_moves(server: RunningServer, worker_id: str) -> None:
    """A drain that does not wait: what decodes on the worker goes on elsewhere, and ``traffic`` compares its tokens."""
    wait_until("it decodes", lambda: _load(server, worker_id).running > 0, 30)
    for _ in range(20):  # a sequence may have ended just before
        drained = twinpool(server, "drain", worker_id, "--move-after", "0")
        assert drained.returncode == 0, drained.stderr
        assert twinpool(server, "undrain", worker_id).returncode == 0
        if num_moved(server) > 0:
            return
    raise AssertionError("nothing was moved")


def num_moved(server: RunningServer) -> float:
    metrics = httpx.get(f"{server.url}/metrics", timeout=10).text
    found = re.search(r'^twinpool_migrations_total\{.*reason="moved".*\} (\S+)$', metrics, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _load(server: RunningServer, worker_id: str) -> WorkerLoad:
    return next(each.load for each in server.cluster().workers if each.info.worker_id == worker_id)


def test_sigterm_of_a_worker_under_load_is_a_drain_and_a_restart(server: RunningServer, tiny: TinyCheckpoint) -> None:
    with traffic(server, tiny):
        info = next(each for each in server.cluster().workers if each.info.worker_id == "prefill-0").info
        os.kill(info.process_id, signal.SIGTERM)
        wait_until("the old process has ended", lambda: not psutil.pid_exists(info.process_id), 60)

        def is_back() -> bool:
            found = [each.info for each in server.cluster().workers if each.info.worker_id == "prefill-0"]
            return bool(found) and found[0].incarnation == info.incarnation + 1

        wait_until("a new process has registered", is_back, 60)
    assert states(server)["prefill-0"] == ("prefill", "active")


REFUSED = {
    "the last of its phase": (["drain", "DECODE"], "is the only active worker for decode"),
    "unknown worker": (["drain", "prefill-7"], "there is no worker prefill-7"),
    "no numbers": (["scale"], "Say how many"),
    "half a cluster": (["scale", "--decode", "0"], "two pools need at least one of each"),
    "more than the memory": (["scale", "--decode", "250"], "MiB of memory"),
    "a wrong key": (["scale", "--decode", "2", "--admin-key", "guessed"], "--admin-key"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_sentence_and_a_status(server: RunningServer, case: str) -> None:
    arguments, words = REFUSED[case]
    decode = next(worker.info.worker_id for worker in server.workers(WorkerRole.DECODE))
    done = twinpool(server, *(decode if argument == "DECODE" else argument for argument in arguments))
    assert done.returncode in (1, 2)
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert all(state == "active" for _, state in states(server).values())
