"""Clients that never stop asking a server of a tiny model, and compare every answer with the reference."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.cluster import TinyCheckpoint
from tests.e2e.server import RunningServer

NUM_TOKENS = 200
SMALL = ("--kv-cache-memory-bytes", "8MiB", "--max-model-len", "512", "--threads-per-worker", "1")


def saved_tiny(folder: Path) -> TinyCheckpoint:
    """One that the real command can serve."""
    checkpoint = TinyCheckpoint(folder)
    checkpoint.save_tokenizer()
    return checkpoint


def ask(server: RunningServer, tiny: TinyCheckpoint, seed: int, num_tokens: int = NUM_TOKENS) -> None:
    """One completion, compared with the reference."""
    prompt = tiny.prompt(40, seed)
    body = {"prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0, "return_token_ids": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert tuple(told["choices"][0]["token_ids"]) == tiny.greedy(prompt, num_tokens)
    assert (told["usage"]["prompt_tokens"], told["usage"]["completion_tokens"]) == (len(prompt), num_tokens)


@contextlib.contextmanager
def traffic(server: RunningServer, tiny: TinyCheckpoint, num_clients: int = 3) -> Iterator[None]:
    """Clients that ask one request after the other, each of which must end well."""
    stop = threading.Event()

    def ask_on(client: int) -> None:
        for number in itertools.count():
            ask(server, tiny, seed=10 * client + number % 4)
            if stop.is_set():
                return

    with ThreadPoolExecutor(num_clients) as clients:
        asking = [clients.submit(ask_on, client) for client in range(num_clients)]
        try:
            yield
        finally:
            stop.set()
        for client in asking:
            client.result()
