"""Admin calls: a key of their own, what they ask for, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine.admin_key import admin_key, find_key, key_file
from engine.api.app import AdminAccess, create_app
from engine.metrics import Metrics
from kvcache.errors import RequestError
from scheduler.types import ClusterSnapshot, WorkerRole
from tests.fakes import FakeEngine
from tests.unit.engine.calls import assert_openai_error, call

KEY = "admin-key"
GIVEN: dict[str, str | bytes] = {"authorization": f"Bearer {KEY}"}


class FakeAdmin:
    """Notes what it is asked for; refuses a worker called "none"."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.cluster = ClusterSnapshot(missing=("decode-1",))

    async def drain(self, worker_id: str, *, force: bool, move_after_s: float | None) -> None:
        if worker_id == "none":
            raise RequestError("there is no worker none")
        self.asked.append(("drain", worker_id, force, move_after_s))

    async def activate(self, worker_id: str) -> None:
        self.asked.append(("activate", worker_id))

    async def change_role(self, worker_id: str, role: WorkerRole, move_after_s: float | None) -> None:
        self.asked.append(("role", worker_id, role, move_after_s))

    async def scale(self, counts: dict[WorkerRole, int]) -> None:
        self.asked.append(("scale", counts))


def app_of(admin: FakeAdmin, *api_keys: str) -> FastAPI:
    engine = FakeEngine()
    metrics = Metrics("tiny", lambda: engine.cluster)
    return create_app(engine, api_keys=api_keys, metrics=metrics, admin=AdminAccess(admin, KEY))


CALLS = {
    "drain": ("workers/decode-0/drain", {}, ("drain", "decode-0", False, None)),
    "drain by force": ("workers/decode-0/drain", {"force": True}, ("drain", "decode-0", True, None)),
    "drain with a limit": ("workers/decode-0/drain", {"move_after_s": 30}, ("drain", "decode-0", False, 30.0)),
    "activate": ("workers/decode-0/activate", {}, ("activate", "decode-0")),
    "role": ("workers/decode-0/role", {"role": "prefill"}, ("role", "decode-0", WorkerRole.PREFILL, None)),
    "scale": ("scale", {"prefill": 2}, ("scale", {WorkerRole.PREFILL: 2})),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_asked_for_arrives_and_the_cluster_is_answered(name: str) -> None:
    path, body, asked = CALLS[name]
    admin = FakeAdmin()
    answer = call(app_of(admin), f"/admin/{path}", body, headers=GIVEN)
    assert (answer.status_code, answer.json()["missing"]) == (200, ["decode-1"]), answer.text
    assert admin.asked == [asked]


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer api-key"}, {"authorization": f"Basic {KEY}"}])
@pytest.mark.parametrize("path", ["cluster", "scale", "workers/decode-0/drain"])
def test_nobody_gets_in_without_the_admin_key(path: str, headers: dict[str, str | bytes]) -> None:
    """Not even with an API key, and whether or not there are any."""
    admin = FakeAdmin()
    for app in (app_of(admin), app_of(admin, "api-key")):
        body = None if path == "cluster" else {}
        assert_openai_error(call(app, f"/admin/{path}", body, headers=headers), 401)
    assert admin.asked == []


def test_the_admin_key_opens_admin_calls_only() -> None:
    app = app_of(FakeAdmin(), "api-key")
    assert call(app, "/admin/cluster", headers=GIVEN).status_code == 200
    assert call(app, "/v1/models", headers=GIVEN).status_code == 401
    assert call(app, "/v1/models", headers={"authorization": "Bearer api-key"}).status_code == 200
    assert call(app, "/health").status_code == 200


BAD = {
    "an unknown field": ("scale", {"prefil": 2}, "prefil"),
    "a negative number": ("scale", {"prefill": -1}, "prefill"),
    "a number as text": ("scale", {"prefill": "2"}, "prefill"),
    "too many": ("scale", {"decode": 257}, "decode"),
    "a role that cannot be taken": ("workers/decode-0/role", {"role": "colocated"}, "role"),
    "a limit below 0": ("workers/decode-0/drain", {"move_after_s": -1}, "move_after_s"),
    "no role": ("workers/decode-0/role", {}, "role"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_are_refused_by_the_name_of_the_field(name: str) -> None:
    path, body, param = BAD[name]
    admin = FakeAdmin()
    assert_openai_error(call(app_of(admin), f"/admin/{path}", body, headers=GIVEN), 400, param)
    assert admin.asked == []


def test_a_refusal_says_why() -> None:
    answer = call(app_of(FakeAdmin()), "/admin/workers/none/drain", {}, headers=GIVEN)
    assert assert_openai_error(answer, 400)["message"] == "there is no worker none"


def test_without_an_operator_there_are_no_admin_routes() -> None:
    engine = FakeEngine()
    app = create_app(engine, metrics=Metrics("tiny", lambda: engine.cluster))
    answer: httpx.Response = call(app, "/admin/cluster", headers=GIVEN)
    assert answer.status_code == 404


# The key


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TWINPOOL_CACHE", str(tmp_path))
    return tmp_path


def test_a_key_that_was_not_given_is_made_kept_for_this_user_and_taken_away(cache: Path) -> None:
    with admin_key(None, 8123) as key:
        assert len(key) == 64
        assert find_key("http://127.0.0.1:8123") == key
        assert find_key("http://localhost:8123/") == key
        assert key_file(8123).stat().st_mode & 0o777 == 0o600
    assert find_key("http://127.0.0.1:8123") is None
    with admin_key(None, 8123) as other:
        assert other != key


def test_the_key_of_this_machine_is_told_to_no_other(cache: Path) -> None:
    with admin_key(None, 8123):
        for url in ("http://10.0.0.7:8123", "http://example.com:8123", "http://127.0.0.1:9", "http://127.0.0.1"):
            assert find_key(url) is None


def test_a_given_key_is_not_written_down(cache: Path) -> None:
    with admin_key("given", 8123) as key:
        assert key == "given"
        assert not list(cache.rglob("*.key"))
