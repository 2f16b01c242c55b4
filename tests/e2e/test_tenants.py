"""`--tenants` with the real command: limits, what is told of them, and turns between tenants that wait."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster import TinyCheckpoint
from tests.e2e.load import Load, make_client
from tests.e2e.server import RunningServer, serving
from tests.e2e.traffic import SMALL, saved_tiny

pytestmark = pytest.mark.e2e

TENANTS = """
few: {api_keys: [key-few], requests_per_minute: 2}
short: {api_keys: [key-short], tokens_per_minute: 520}
single: {api_keys: [key-single], running_requests: 1}
crowd: {api_keys: [key-crowd]}
guest: {api_keys: [key-guest]}
"""
BODY = {"prompt": [5, 6, 7, 8], "max_tokens": 6, "temperature": 0}
NARROW = ("--max-num-seqs", "2", "--max-num-batched-tokens", "16")  # so little room that a few requests wait in line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return saved_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    file: Path = tmp_path_factory.mktemp("tenants") / "tenants.yaml"
    file.write_text(TENANTS)
    flags = ("--tenants", str(file), "--colocated", "1", "--placement-policy", "cost", *NARROW)
    with serving(str(tiny.path), *flags, *SMALL, api_key="key-guest", expected_workers=1) as running:
        yield running


def post(server: RunningServer, tenant: str, **fields: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer key-{tenant}"}
    return httpx.post(f"{server.url}/v1/completions", json=BODY | fields, headers=headers, timeout=60)


def check_refused(answer: httpx.Response, limit: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (429, limit, "rate_limit_exceeded")
    assert 1 <= int(answer.headers["Retry-After"]) <= 60


def test_requests_per_minute_are_counted_down_and_then_refused(server: RunningServer) -> None:
    answers = [post(server, "few") for _ in range(3)]
    assert [answer.status_code for answer in answers[:2]] == [200, 200]
    check_refused(answers[2], "requests_per_minute")
    assert [answer.headers["x-ratelimit-limit-requests"] for answer in answers] == ["2"] * 3
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert "x-ratelimit-limit-tokens" not in answers[0].headers
    assert post(server, "guest").status_code == 200, "another tenant's limit"


def test_tokens_per_minute_are_charged_as_they_came(server: RunningServer) -> None:
    """What a request may come to is held while it runs, and what it did not come to is given back."""
    (stop,) = post(server, "guest", max_tokens=1, return_token_ids=True).json()["choices"][0]["token_ids"]
    early = post(server, "short", max_tokens=500, stop_token_ids=[stop])
    assert early.json()["usage"]["completion_tokens"] == 1
    assert int(early.headers["x-ratelimit-remaining-tokens"]) >= 510
    whole = post(server, "short", max_tokens=500, ignore_eos=True)
    assert whole.json()["usage"]["completion_tokens"] == 500
    check_refused(post(server, "short", max_tokens=500), "tokens_per_minute")


def test_requests_that_run_are_counted_until_they_end(server: RunningServer) -> None:
    body = BODY | {"max_tokens": 400, "stream": True, "ignore_eos": True}
    headers = {"Authorization": "Bearer key-single"}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        check_refused(post(server, "single"), "running_requests")
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert post(server, "single").status_code == 200


def test_a_crowd_of_one_tenant_does_not_hold_up_another(server: RunningServer, tiny: TinyCheckpoint) -> None:
    crowd, guest = (Load(server.url, tiny, 10, 60, key=key) for key in ("key-crowd", "key-guest"))
    crowd.know_answers()

    async def scenario() -> int:
        async with make_client() as client:
            waiting = [asyncio.create_task(crowd.ask(client)) for _ in range(24)]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(*(guest.ask(client) for _ in range(3)))
            ahead = sum(each.done() for each in waiting)
            await asyncio.gather(*waiting)
        return ahead

    assert asyncio.run(scenario()) <= 12, "the guest waited for more than half of the crowd"
    assert {outcome.status for outcome in (*crowd.outcomes, *guest.outcomes)} == {200}
