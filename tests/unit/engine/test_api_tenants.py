"""Tenants, classes, priorities and places in line, as clients and operators see them."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine.api.app import create_app
from engine.api.rate_limits import duration
from engine.cache_salt import identity_of_tenant, make_cache_salt
from engine.metrics import Metrics
from engine.outputs import Origin, QueuePlace
from engine.tenants import TenantKey, Tenants
from kvcache.errors import OverloadedError, RateLimitError, UnavailableError
from scheduler.tenants import Tenant
from scheduler.urgency import ServiceClass, Urgency
from tests.fakes import FakeEngine, ManualClock, Script, deltas_of
from tests.unit.engine.calls import CHAT, COMPLETIONS, HELLO, RawClient, assert_openai_error, call, frames_of

KEYS = (TenantKey("key-a", "a"), TenantKey("key-a2", "a"), TenantKey("key-b", "b"))
BODY = {"prompt": "hello", "max_tokens": 10}
BATCH = ServiceClass.BATCH


class Server:
    """An application with tenants ``a``, as given, and ``b``, which does batch work."""

    def __init__(self, *scripts: Script, **limits: Any) -> None:
        self.clock = ManualClock()
        self.engine = FakeEngine(*scripts)
        self.metrics = Metrics("tiny", lambda: self.engine.cluster, self.clock)
        tenants = (Tenant("a", **limits), Tenant("b", highest_class=BATCH), Tenant("default"))
        self.app: FastAPI = create_app(
            self.engine, api_keys=("key-0",), tenants=Tenants(tenants, KEYS), metrics=self.metrics
        )

    def post(self, key: str = "key-a", path: str = COMPLETIONS, body: Any = None, **headers: str) -> httpx.Response:
        sent = {"authorization": f"Bearer {key}"} | {name.replace("_", "-"): text for name, text in headers.items()}
        return call(self.app, path, body or BODY, headers=dict(sent))

    def get(self, path: str, key: str) -> httpx.Response:
        return call(self.app, path, headers={"authorization": f"Bearer {key}"})

    def metric(self, name: str) -> float:
        """Of one sample, by its name and labels but for the model's."""
        text = self.metrics.exposition().decode().replace('model_name="tiny",', "")
        found = re.search(rf"^twinpool_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, text
        return float(found[1])


@pytest.mark.parametrize(("key", "tenant"), [("key-a", "a"), ("key-a2", "a"), ("key-b", "b"), ("key-0", "default")])
def test_a_key_says_whose_request_it_is(key: str, tenant: str) -> None:
    server = Server()
    assert server.post(key).status_code == 200
    assert server.engine.calls[0].origin.tenant == tenant


def test_keys_of_one_tenant_share_cached_kv_and_tenants_do_not() -> None:
    server = Server()
    for key in ("key-a", "key-a2", "key-b", "key-0"):
        server.post(key)
    of_a, of_a2, of_b, of_default = (each.cache_salt for each in server.engine.calls)
    assert of_a == of_a2 == make_cache_salt(identity_of_tenant("a"), None)
    assert len({of_a, of_b, of_default}) == 3


def test_a_wrong_key_is_nobody() -> None:
    assert_openai_error(Server().post("key-c"), 401)


@pytest.mark.parametrize(
    ("key", "body", "expected"),
    [
        ("key-a", {}, Urgency()),
        ("key-a", {"priority": -3}, Urgency(priority=-3)),
        ("key-a", {"service_tier": "auto"}, Urgency()),
        ("key-a", {"service_tier": "default"}, Urgency()),
        ("key-a", {"service_tier": "flex", "priority": 7}, Urgency(BATCH, 7)),
        ("key-b", {}, Urgency(BATCH)),
        ("key-b", {"service_tier": "auto"}, Urgency(BATCH)),
        ("key-b", {"service_tier": "flex"}, Urgency(BATCH)),
    ],
)
def test_class_and_priority_come_from_body_and_tenant(key: str, body: dict[str, Any], expected: Urgency) -> None:
    server = Server()
    assert server.post(key, body=BODY | body).status_code == 200
    assert server.post(key, CHAT, {"messages": HELLO} | body).status_code == 200
    assert [each.origin.urgency for each in server.engine.calls] == [expected, expected]


def test_a_class_above_the_tenants_is_refused() -> None:
    assert_openai_error(Server().post("key-b", body=BODY | {"service_tier": "default"}), 400, "service_tier")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_over_a_limit_is_a_429_that_names_it(stream: bool) -> None:
    server = Server(requests_per_minute=2)
    body = BODY | {"stream": stream}
    assert [server.post(body=body).status_code for _ in range(2)] == [200, 200]
    refused = server.post(body=body)
    error = assert_openai_error(refused, 429)
    assert (error["type"], error["code"]) == ("requests_per_minute", "rate_limit_exceeded")
    assert refused.headers["Retry-After"] == "30"
    assert server.post("key-b").status_code == 200
    server.clock.now_s = 30.0
    assert server.post(body=body).status_code == 200
    assert server.metric('tenant_limit_hits_total{limit="requests_per_minute",tenant="a"}') == 1
    assert server.metric('requests_refused_total{reason="requests_per_minute"}') == 1


def test_tokens_are_charged_as_they_came() -> None:
    """Each request may come to 11 tokens and comes to 3: 1 of prompt and 2 of answer."""
    server = Server(tokens_per_minute=20)
    assert [server.post().status_code for _ in range(4)] == [200] * 4
    error = assert_openai_error(server.post(), 429)
    assert error["type"] == "tokens_per_minute"
    assert server.metric('tenant_tokens_total{kind="prompt",tenant="a"}') == 4
    assert server.metric('tenant_tokens_total{kind="generation",tenant="a"}') == 8


def test_what_may_come_to_more_than_a_minute_has_is_a_400() -> None:
    assert_openai_error(Server(tokens_per_minute=10).post(), 400, "max_tokens")


@pytest.mark.parametrize("error", [UnavailableError("gone"), OverloadedError("full")])
def test_a_request_that_failed_gives_everything_back_but_its_count(error: Exception) -> None:
    server = Server(Script(error=error), Script(deltas_of("a")), tokens_per_minute=11, running_requests=1)
    assert server.post().status_code == 503
    assert server.metric('tenant_requests_running{tenant="a"}') == 0
    assert server.post().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("script", "charged"), [(Script(hangs=True), 2), (Script(waits=True), 0)], ids=["placed", "not"]
)
def test_who_leaves_before_the_first_token_pays_for_the_prompts_that_were_placed(
    script: Script, charged: int, stream: bool
) -> None:
    server = Server(*[script] * 4, Script(deltas_of("hello", " world")), tokens_per_minute=60)
    body = BODY | {"prompt": ["hello", "hello"], "n": 2, "stream": stream}

    async def leave() -> None:
        gone = asyncio.Event()
        client = RawClient(server.app, COMPLETIONS, body, "key-a")
        request = asyncio.create_task(client.run(gone, [], asyncio.Event()))
        await server.engine.started.wait()
        await asyncio.sleep(0)  # the other sequences too
        gone.set()
        await asyncio.wait_for(request, timeout=1)

    asyncio.run(leave())
    assert len(server.engine.calls) == 4
    assert server.metric('tenant_tokens_total{kind="prompt",tenant="a"}') == charged
    assert limits_of(server.post("key-a", body=BODY))["x-ratelimit-remaining-tokens"] == str(60 - charged - 3)


def test_every_choice_counts_its_answer_and_a_prompt_counts_once() -> None:
    server = Server(tokens_per_minute=31)
    assert server.post(body=BODY | {"n": 3}).status_code == 200
    assert server.metric('tenant_tokens_total{kind="prompt",tenant="a"}') == 1
    assert server.metric('tenant_tokens_total{kind="generation",tenant="a"}') == 6


def test_a_refusal_of_the_scheduler_is_told_before_the_stream_begins() -> None:
    server = Server(Script(error=RateLimitError("too late", 3.2, "ttft_target")))
    refused = server.post(body=BODY | {"stream": True})
    assert assert_openai_error(refused, 429)["type"] == "ttft_target"
    assert refused.headers["Retry-After"] == "4"
    assert server.metric('requests_refused_total{reason="ttft_target"}') == 1


def test_a_stream_is_counted_when_it_is_over() -> None:
    server = Server()
    assert frames_of(server.post(body=BODY | {"stream": True}))[-1] == "[DONE]"
    assert server.metric('tenant_tokens_total{kind="generation",tenant="a"}') == 2


# What is left, on every answer


def limits_of(answer: httpx.Response) -> dict[str, str]:
    return {name: text for name, text in answer.headers.items() if name.startswith("x-ratelimit-")}


def test_answers_say_what_is_left_of_a_tenant_s_limits() -> None:
    """Each request may come to 11 tokens and comes to 3: of a stream the former are held when it begins."""
    server = Server(requests_per_minute=2, tokens_per_minute=60)
    assert limits_of(server.post()) == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "30s",
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "57",
        "x-ratelimit-reset-tokens": "3s",
    }
    streamed = limits_of(server.post(path=CHAT, body={"messages": HELLO, "max_tokens": 10, "stream": True}))
    assert streamed["x-ratelimit-remaining-requests"] == "0"
    assert int(streamed["x-ratelimit-remaining-tokens"]) <= 57 - 11
    server.clock.now_s = 29.5
    refused = server.post()
    assert refused.status_code == 429
    assert limits_of(refused)["x-ratelimit-remaining-requests"] == "0"
    assert limits_of(refused)["x-ratelimit-reset-requests"] == "31s"


def test_only_limits_that_there_are_are_told_and_only_where_they_count() -> None:
    server = Server(tokens_per_minute=60)
    assert {name.split("-")[-1] for name in limits_of(server.post())} == {"tokens"}
    assert limits_of(server.post("key-b")) == {}
    assert limits_of(server.get("/v1/models", "key-a")) == {}
    assert limits_of(server.post("key-c")) == {}  # nobody's


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0ms"), (0.35, "350ms"), (0.9999, "1s"), (7.2, "8s"), (59.01, "1m0s"), (61, "1m1s")]
)
def test_times_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_keys_are_in_no_metric() -> None:
    server = Server()
    server.post()
    assert "key-a" not in server.metrics.exposition().decode()


# The place in line


def test_a_request_carries_the_name_that_its_client_gave_it() -> None:
    server = Server()
    server.post(x_request_id="job-7")
    assert server.engine.calls[0].origin == Origin("a", ticket="job-7")


@pytest.mark.parametrize("name", ["", "two words", "x" * 129, "a/b"])
def test_a_bad_name_is_refused(name: str) -> None:
    assert_openai_error(Server().post(x_request_id=name), 400, "X-Request-Id")


def test_a_tenant_sees_the_places_of_its_own_requests_only() -> None:
    server = Server()
    server.engine.queue_places = {("a", "job"): QueuePlace(3), ("a", "other"): QueuePlace(None)}
    expected = {"id": "job", "status": "waiting", "position": 3, "object": "queue.place"}
    assert server.get("/v1/queue/job", "key-a2").json() == expected
    assert server.get("/v1/queue/other", "key-a").json()["status"] == "running"
    assert_openai_error(server.get("/v1/queue/job", "key-b"), 404)
    assert_openai_error(server.get("/v1/queue/job", "key-0"), 404)
