"""Asks a running server for tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx

from tests.e2e.reference import MAX_TOKENS, ReferenceCase


async def complete(client: httpx.AsyncClient, prompt_token_ids: Sequence[int], **options: object) -> tuple[int, ...]:
    """The token ids of one greedy completion."""
    body = {"prompt": list(prompt_token_ids), "max_tokens": MAX_TOKENS, "temperature": 0, "return_token_ids": True}
    response = await client.post("/v1/completions", json=body | options)
    assert response.status_code == 200, response.text
    answer = response.json()
    token_ids = tuple(answer["choices"][0]["token_ids"])
    assert answer["usage"]["completion_tokens"] == len(token_ids)
    assert answer["usage"]["prompt_tokens"] == len(prompt_token_ids)
    return token_ids


async def complete_all(
    url: str, cases: Sequence[ReferenceCase], at_once: int, *, apart: bool = False
) -> dict[str, tuple[int, ...]]:
    """Greedy completions of all cases, ``at_once`` of them at any time; ``apart``: they share no cached prefix."""
    places = asyncio.Semaphore(at_once)

    async def one(client: httpx.AsyncClient, case: ReferenceCase) -> tuple[int, ...]:
        async with places:
            options = {"cache_salt": case.name} if apart else {}
            return await complete(client, case.prompt_token_ids, **options)

    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        outputs = await asyncio.gather(*(one(client, case) for case in cases))
    return {case.name: output for case, output in zip(cases, outputs, strict=True)}


def expected(cases: Sequence[ReferenceCase]) -> dict[str, tuple[int, ...]]:
    return {case.name: case.output_token_ids for case in cases}
