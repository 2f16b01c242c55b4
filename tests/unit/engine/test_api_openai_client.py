"""The official client, as users have it, against the application in process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import httpx
import openai
import pytest

from kvcache.errors import UnavailableError
from tests.fakes import FakeEngine, Script, deltas_of
from tests.unit.engine.calls import app_of

Result = TypeVar("Result")


def with_client(engine: FakeEngine, use: Callable[[openai.AsyncOpenAI], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        transport = httpx.ASGITransport(app_of(engine, ["secret"]))
        async with (
            httpx.AsyncClient(transport=transport) as http,
            openai.AsyncOpenAI(
                api_key="secret", base_url="http://test/v1", http_client=cast(Any, http), max_retries=0
            ) as client,
        ):
            return await use(client)

    return asyncio.run(run())


def test_chat_streams_and_reports_usage() -> None:
    async def use(client: openai.AsyncOpenAI) -> tuple[str, list[Any], int]:
        text, total = "", 0
        reasons: list[Any] = []
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reasons.append(choice.finish_reason)
            total = chunk.usage.total_tokens if chunk.usage else total
        return text, reasons, total

    engine = FakeEngine()
    text, reasons, total = with_client(engine, use)
    assert text == "hello world"
    assert reasons == [None, None, "stop"]
    assert total == len(engine.calls[0].prompt_token_ids) + 2


def test_completions_with_several_prompts_and_choices() -> None:
    async def use(client: openai.AsyncOpenAI) -> list[str]:
        reply = await client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=4, seed=1)
        return [choice.text for choice in reply.choices]

    assert with_client(FakeEngine(), use) == ["hello world"] * 4


def test_models_can_be_listed() -> None:
    async def use(client: openai.AsyncOpenAI) -> list[str]:
        return [model.id async for model in await client.models.list()]

    assert with_client(FakeEngine(), use) == ["tiny", "org/tiny"]


def test_errors_arrive_as_the_client_s_own_types() -> None:
    async def unknown(client: openai.AsyncOpenAI) -> None:
        await client.completions.create(model="other", prompt="a")

    async def invalid(client: openai.AsyncOpenAI) -> None:
        await client.completions.create(model="tiny", prompt="a", temperature=9)

    with pytest.raises(openai.NotFoundError) as not_found:
        with_client(FakeEngine(), unknown)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        with_client(FakeEngine(), invalid)
    assert bad.value.param == "temperature"


def test_an_error_within_a_stream_raises_in_the_client() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        async for _ in await client.completions.create(model="tiny", prompt="a", stream=True):
            pass

    engine = FakeEngine(Script(deltas_of("a", "b")[:1], UnavailableError("the worker was lost")))
    with pytest.raises(openai.APIError, match="the worker was lost"):
        with_client(engine, use)
