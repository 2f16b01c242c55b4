"""The routes around generation, the key, and what OpenAPI says."""

from __future__ import annotations

import logging

import pytest
from fastapi import FastAPI

from kvcache.spec import KVCacheSpec
from scheduler.types import ClusterSnapshot, DeviceProfile, WorkerInfo, WorkerLoad, WorkerRole, WorkerSnapshot
from tests.builders import make_shape
from tests.fakes import FakeEngine, Script
from tests.unit.engine.calls import CHAT, COMPLETIONS, HELLO, app_of, assert_openai_error, call

OPEN = ("/health", "/live", "/ready")
CLOSED = ("/v1/models", "/v1/models/tiny", "/metrics", "/cluster", "/openapi.json", "/nowhere", COMPLETIONS)
KEYS = ("first-key", "second-key")


def test_models_are_listed_under_every_name() -> None:
    listing = call(FakeEngine(), "/v1/models").json()
    assert [card["id"] for card in listing["data"]] == ["tiny", "org/tiny"]
    assert listing["data"][0]["max_model_len"] == 100
    assert call(FakeEngine(), "/v1/models/org/tiny").json()["id"] == "org/tiny"
    assert_openai_error(call(FakeEngine(), "/v1/models/other"), 404, "model")


def test_readiness_follows_the_workers_and_liveness_does_not() -> None:
    engine = FakeEngine()
    assert call(engine, "/ready").status_code == 200
    engine.ready = False
    response = call(engine, "/ready")
    assert_openai_error(response, 503)
    assert "retry-after" in response.headers
    assert call(engine, "/live").status_code == call(engine, "/health").status_code == 200


@pytest.fixture(scope="module")
def locked() -> FastAPI:
    return app_of(FakeEngine(), KEYS)


@pytest.mark.parametrize("path", OPEN)
def test_probes_need_no_key(locked: FastAPI, path: str) -> None:
    assert call(locked, path).status_code == 200


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "first-key", "Basic first-key", "Bearer first-key\u00e9"]
)
def test_everything_else_is_closed_without_the_right_key(locked: FastAPI, path: str, header: str | None) -> None:
    headers: dict[str, str | bytes] = {} if header is None else {"authorization": header.encode("latin-1")}
    response = call(locked, path, headers=headers)
    assert assert_openai_error(response, 401)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", KEYS)
def test_every_key_opens(locked: FastAPI, key: str) -> None:
    response = call(locked, "/v1/models", headers={"authorization": f"Bearer {key}"})
    assert response.status_code == 200


def test_a_bug_is_logged_with_its_traceback_and_the_server_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(Script(error=KeyError("internals")))
    with caplog.at_level(logging.ERROR):
        response = call(engine, COMPLETIONS, {"prompt": "hello"})
    assert_openai_error(response, 500)
    assert "internals" not in response.text
    assert any(record.exc_info and "internals" in str(record.exc_info[1]) for record in caplog.records)


def test_a_bug_outside_the_routes_is_a_500_as_well() -> None:
    class BrokenEngine(FakeEngine):
        @property
        def cluster(self) -> ClusterSnapshot:
            raise KeyError("internals")

        @cluster.setter
        def cluster(self, _value: ClusterSnapshot) -> None: ...

    assert_openai_error(call(BrokenEngine(), "/cluster"), 500)
    assert_openai_error(call(BrokenEngine(), "/metrics"), 500)


def test_the_cluster_is_told_in_full() -> None:
    engine = FakeEngine()
    info = WorkerInfo(
        worker_id="decode-0",
        incarnation=2,
        role=WorkerRole.DECODE,
        address="127.0.0.1:1",
        process_id=7,
        device=DeviceProfile("cpu", 100.0, 10.0, 1 << 30),
        model="tiny",
        max_model_len=100,
        spec=KVCacheSpec(2, 1, 8, 16, "float32"),
        num_blocks=4,
        shape=make_shape(),
    )
    engine.cluster = ClusterSnapshot((WorkerSnapshot(info, WorkerLoad(running=3), 1, 20, 9, 5.0),), ("prefill-0",))
    told = call(engine, "/cluster").json()
    assert told["missing"] == ["prefill-0"]
    (worker,) = told["workers"]
    assert (worker["info"]["role"], worker["info"]["spec"]["dtype"], worker["load"]["running"]) == (
        "decode",
        "float32",
        3,
    )


def test_metrics_answer_get_and_head() -> None:
    response = call(FakeEngine(), "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "vllm:prompt_tokens_total" in response.text
    assert call(FakeEngine(), "/metrics", method="HEAD").status_code == 200


def test_text_becomes_tokens_and_text_again() -> None:
    engine = FakeEngine()
    tokens = call(engine, "/tokenize", {"prompt": "hello world"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert call(engine, "/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "hello world"}
    chat = call(engine, "/tokenize", {"messages": HELLO}).json()
    assert call(engine, "/detokenize", {"tokens": chat["tokens"]}).json() == {"prompt": "user: hello\nassistant:"}


def test_tokenize_wants_one_of_text_and_messages() -> None:
    assert_openai_error(call(FakeEngine(), "/tokenize", {}), 400, "prompt")
    assert_openai_error(call(FakeEngine(), "/detokenize", {"tokens": [10**6]}), 400, "tokens")


def test_openapi_declares_errors_streams_and_the_key() -> None:
    schema = call(FakeEngine(), "/openapi.json").json()
    for path in (COMPLETIONS, CHAT):
        operation = schema["paths"][path]["post"]
        assert operation["security"]
        responses = operation["responses"]
        assert "422" not in responses
        for status in ("400", "401", "404", "413", "429", "500", "503"):
            reference = responses[status]["content"]["application/json"]["schema"]["$ref"]
            assert reference.endswith("/ErrorReply")
        assert responses["200"]["content"]["text/event-stream"]["schema"]["properties"]["data"] == {"type": "string"}
    fields = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["best_of"]["anyOf"][0] == {"maximum": 16, "minimum": 1, "type": "integer"}
    assert fields["length_penalty"]["enum"] == [None, 1]
    assert "security" not in schema["paths"]["/health"]["get"]
