"""What the commands of operators wait for, and what they say meanwhile."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from engine import cluster_commands
from engine.cluster_commands import Target, drain, scale
from kvcache.errors import TwinpoolError
from scheduler.types import ClusterSnapshot, Duty, DutyState, WorkerLoad, WorkerRole, WorkerSnapshot
from tests.builders import make_worker

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE
HERE = Target("http://here", "key", 60.0)


def seen(
    name: str, role: WorkerRole, state: DutyState = DutyState.ACTIVE, in_flight: int = 0, leased: int = 0
) -> WorkerSnapshot:
    load = WorkerLoad(blocks_leased=leased)
    return WorkerSnapshot(make_worker(name, role), load, in_flight, 0, 0, 0.0, duty=Duty(state))


class Server:
    """Shows one view after the other, the last one from then on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *views: ClusterSnapshot) -> None:
        self.posted: list[tuple[str, Any]] = []
        self._views = list(views)
        monkeypatch.setattr(cluster_commands, "call_server", self._call)
        monkeypatch.setattr(cluster_commands, "POLL_INTERVAL_S", 0.0)

    def _call(self, address: str, key: str | None, body: bytes | None = None) -> bytes:
        assert key == "key"
        if body is not None:
            self.posted.append((address, orjson.loads(body)))
            return b"{}"
        view = self._views.pop(0) if len(self._views) > 1 else self._views[0]
        return orjson.dumps(view)


def test_a_drain_waits_until_kv_is_delivered_and_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(
        monkeypatch,
        ClusterSnapshot((seen("prefill-0", PREFILL),)),
        ClusterSnapshot((seen("prefill-0", PREFILL, DutyState.DRAINING, in_flight=3, leased=12),)),
        ClusterSnapshot((seen("prefill-0", PREFILL, DutyState.DRAINING, leased=4),)),
        ClusterSnapshot((seen("prefill-0", PREFILL, DutyState.DRAINED),)),
    )
    drain(HERE, "prefill-0", force=True, move_after_s=30.0)
    assert server.posted == [("http://here/admin/workers/prefill-0/drain", {"force": True, "move_after_s": 30.0})]
    assert capsys.readouterr().out.splitlines() == [
        "prefill-0: waiting for the scheduler",
        "prefill-0: 3 requests left, 12 KV blocks in handoffs",
        "prefill-0: 0 requests left, 4 KV blocks in handoffs",
        "prefill-0 is drained",
    ]


def test_a_worker_that_is_lost_while_it_drains_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    Server(monkeypatch, ClusterSnapshot((seen("a", DECODE, DutyState.DRAINING, 1),)), ClusterSnapshot())
    with pytest.raises(TwinpoolError, match="a is not there"):
        drain(HERE, "a", force=False)


def test_a_wait_ends_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    Server(monkeypatch, ClusterSnapshot((seen("a", DECODE, DutyState.DRAINING, 1),)))
    with pytest.raises(TwinpoolError, match=r"Not done after 0.01 s: a: 1 requests left. It goes on"):
        drain(Target("http://here", "key", 0.01), "a", force=False)


def test_without_a_timeout_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(monkeypatch, ClusterSnapshot())
    drain(Target("http://here", "key", 0.0), "a", force=False)
    assert len(server.posted) == 1


def test_scaling_waits_for_those_that_come_and_those_that_go(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    p0, d0, d1 = seen("p0", PREFILL), seen("d0", DECODE), seen("d1", DECODE)
    server = Server(
        monkeypatch,
        ClusterSnapshot((p0, d0, d1), missing=("p1",)),
        ClusterSnapshot((p0, d0, seen("d1", DECODE, DutyState.DRAINING, in_flight=2)), missing=("p1",)),
        ClusterSnapshot((p0, d0, seen("d1", DECODE, DutyState.DRAINED)), missing=("p1",)),
        ClusterSnapshot((p0, d0), missing=("p1",)),
        ClusterSnapshot((p0, d0, seen("p1", PREFILL))),
    )
    scale(HERE, {PREFILL: 2, DECODE: 1})
    assert server.posted == [("http://here/admin/scale", {"prefill": 2, "decode": 1})]
    assert capsys.readouterr().out.splitlines() == [
        "prefill 1 of 2, decode 2 of 1, p1 starts",
        "prefill 1 of 2, decode 1 of 1, d1: 2 requests left, p1 starts",
        "prefill 1 of 2, decode 1 of 1, d1: ends, p1 starts",
        "prefill 1 of 2, decode 1 of 1, p1 starts",
        "prefill 2 of 2, decode 1 of 1",
    ]
