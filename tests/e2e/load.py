"""Requests that come when they come, whether or not earlier ones have ended, and what became of each."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.cluster import TinyCheckpoint

MAX_CONNECTIONS = 1000
RETRY_S = 0.5
KEEPALIVE_S = 2.0  # below the server's five: a connection that both sides use up and close at once is an error


@dataclass(slots=True)
class Outcome:
    """One request as its client saw it. Times in seconds of one clock."""

    sent_s: float
    status: int = 0
    retry_after: str | None = None
    limit: str | None = None  # that a 429 names
    token_ids: tuple[int, ...] = ()
    first_s: float = 0.0  # when the first token came; of streams
    ended_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s


@dataclass(slots=True)
class Load:
    """Completions of one kind, each with a cached prefix of its own. Answers are compared with the reference."""

    url: str
    tiny: TinyCheckpoint
    prompt_tokens: int
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    key: str | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def ask(self, client: httpx.AsyncClient) -> Outcome:
        """Sends one now."""
        body, expected = self._next()
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        outcome = Outcome(time.monotonic())
        self.outcomes.append(outcome)
        answer = await client.post(f"{self.url}/v1/completions", json=body, headers=headers)
        outcome.ended_s = time.monotonic()
        outcome.status = answer.status_code
        outcome.retry_after = answer.headers.get("Retry-After")
        if answer.status_code == 200:
            told = answer.json()
            outcome.token_ids = tuple(told["choices"][0]["token_ids"])
            assert outcome.token_ids == expected
            assert told["usage"]["completion_tokens"] == len(expected)
        else:
            outcome.limit = answer.json()["error"]["type"]
        return outcome

    async def stream(self, client: httpx.AsyncClient) -> Outcome:
        """As ``ask``, for an answer that must come, token by token."""
        body, expected = self._next()
        outcome = Outcome(time.monotonic())
        self.outcomes.append(outcome)
        asking = client.stream("POST", f"{self.url}/v1/completions", json=body | {"stream": True})
        async with asking as answer:
            outcome.status = answer.status_code
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    outcome.first_s = outcome.first_s or time.monotonic()
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    outcome.token_ids += tuple(choice.get("token_ids") or ())
        outcome.ended_s = time.monotonic()
        assert outcome.token_ids == expected
        return outcome

    def _next(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        """The body of one more request, and the tokens of its answer."""
        number = next(self._numbers)
        prompt = self.tiny.prompt(self.prompt_tokens, number % 4)
        body = {"prompt": list(prompt), "max_tokens": self.max_tokens, "temperature": 0, "return_token_ids": True}
        body |= {"cache_salt": f"{id(self)}-{number}"} | self.options
        return body, self.tiny.greedy(prompt, self.max_tokens)

    async def closed(
        self, client: httpx.AsyncClient, num_clients: int, until_s: float, *, streams: bool = False
    ) -> None:
        """So many clients, each of which asks again as soon as it is answered, or a little after it was refused."""
        ask = self.stream if streams else self.ask

        async def ask_on() -> None:
            while time.monotonic() < until_s:
                if (await ask(client)).status != 200:
                    await asyncio.sleep(RETRY_S)

        await asyncio.gather(*(ask_on() for _ in range(num_clients)))

    async def open(self, client: httpx.AsyncClient, per_s: float, until_s: float) -> None:
        """At an even pace; returns when all are answered."""
        began_s, asking = time.monotonic(), []
        for number in itertools.count():
            await asyncio.sleep(max(0.0, began_s + number / per_s - time.monotonic()))
            if time.monotonic() >= until_s:
                break
            asking.append(asyncio.create_task(self.ask(client)))
        await asyncio.gather(*asking)

    def know_answers(self) -> None:
        """Computes the reference beforehand, so that comparing takes no time."""
        for seed in range(4):
            self.tiny.greedy(self.tiny.prompt(self.prompt_tokens, seed), self.max_tokens)


def make_client() -> httpx.AsyncClient:
    return httpx.AsyncClient(
        timeout=120, limits=httpx.Limits(max_connections=MAX_CONNECTIONS, keepalive_expiry=KEEPALIVE_S)
    )


def percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]
