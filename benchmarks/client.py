"""HTTP to an OpenAI-compatible endpoint: which model is served, and one streamed request.

aiohttp and not httpx: with many concurrent streams its parser, written in C, costs a fraction of the time
per event, and a load generator's own delay is part of every latency it reports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any

import aiohttp
import orjson

from benchmarks.measurements import Failure, RequestOutcome
from benchmarks.stream import StreamRecorder
from benchmarks.workload import PlannedRequest, PromptMaker
from kvcache.errors import StartupError

# Shorter than the 5 s after which common servers (uvicorn, Node) close an idle connection: one that is
# reused at the very moment the server drops it would look like a failed request.
KEEPALIVE_TIMEOUT_S = 3.0
MODELS_TIMEOUT_S = 10.0


class Endpoint(StrEnum):
    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self is Endpoint.CHAT else "/v1/completions"


@dataclass(frozen=True, slots=True)
class RequestStyle:
    """What is equal in all request bodies of a run."""

    endpoint: Endpoint
    model: str
    temperature: float
    ignore_eos: bool

    def body(self, request: PlannedRequest, prompts: PromptMaker) -> bytes:
        """The JSON body of one request, encoded."""
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            fields["ignore_eos"] = True  # not of OpenAI: sent only when asked for, since some servers refuse it
        if self.endpoint is Endpoint.CHAT:
            fields["messages"] = [{"role": "user", "content": prompts.words(request)}]
        else:
            fields["prompt"] = prompts.token_ids(request)
        return orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)


class ServingClient:
    """An async context manager around one HTTP session; ``timeout_s`` limits each whole request."""

    def __init__(self, base_url: str, api_key: str | None, timeout_s: float) -> None:
        self._base_url = base_url
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ServingClient:
        # No limit on connections: a queue inside the client would close the open loop. No proxy from the
        # environment: it would be measured too.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_TIMEOUT_S)
        self._session = aiohttp.ClientSession(
            connector=connector, headers=self._headers, timeout=self._timeout, trust_env=False
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._open_session().close()

    async def first_model(self) -> str:
        """The id of the first model that the server lists. Raises StartupError if there is none."""
        url = f"{self._base_url}/v1/models"
        timeout = aiohttp.ClientTimeout(total=MODELS_TIMEOUT_S)
        try:
            async with self._open_session().get(url, timeout=timeout) as response:
                status, answer = response.status, await response.read()
        except TimeoutError as error:
            raise StartupError(f"no answer from {url} within {MODELS_TIMEOUT_S:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise StartupError(f"cannot reach the server at {self._base_url}: {error}") from error
        if status != 200:
            raise StartupError(f"{url} answered HTTP {status}, so the model is not known; name it with --model")
        try:
            return str(orjson.loads(answer)["data"][0]["id"])
        except (orjson.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            raise StartupError(f"{url} lists no model; name one with --model") from error

    async def stream(
        self, endpoint: Endpoint, request: PlannedRequest, body: bytes, clock: Callable[[], float]
    ) -> RequestOutcome:
        """Send one request and read its stream to the end; every way to fail becomes an outcome.

        ``clock`` returns seconds since the start of the run.
        """
        recorder = StreamRecorder(request)
        recorder.sent(clock())
        try:
            async with self._open_session().post(self._base_url + endpoint.path, data=body) as response:
                if response.status != 200:
                    recorder.fail(f"http_{response.status}", await response.text(errors="replace"))
                else:
                    async for data in response.content.iter_any():
                        recorder.feed(data, clock())
        except TimeoutError:
            recorder.fail(Failure.TIMEOUT, f"not finished after {self._timeout.total:g} s")
        except (aiohttp.ClientError, OSError) as error:
            recorder.fail(Failure.CONNECTION, f"{type(error).__name__}: {error}")
        return recorder.outcome()

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("ServingClient is used outside of its async with block")
        return self._session
