"""Who shares cached KV with whom, and what a client is told of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from fastapi import FastAPI

from engine.cache_salt import ANYBODY, identity_of_key, make_cache_salt
from kvcache.prefix import MAX_SALT_BYTES
from tests.fakes import FakeEngine, Script, deltas_of
from tests.unit.engine.calls import CHAT, COMPLETIONS, HELLO, app_of, call, frames_of

PROMPTS: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": [1, 2, 3]}, CHAT: {"messages": HELLO}}
PATHS = pytest.mark.parametrize("path", PROMPTS)


def salts_of(app: FastAPI, engine: FakeEngine, path: str, *requests: tuple[str, str | None]) -> list[bytes]:
    """The salts of requests, each with a key and a ``cache_salt``."""
    for key, cache_salt in requests:
        body = PROMPTS[path] | ({} if cache_salt is None else {"cache_salt": cache_salt})
        headers: dict[str, str | bytes] = {"authorization": f"Bearer {key}"}
        assert call(app, path, body, headers=headers).status_code == 200
    return [made.cache_salt for made in engine.calls]


@PATHS
def test_callers_with_different_keys_or_salts_do_not_share_and_the_same_do(path: str) -> None:
    engine = FakeEngine()
    app = app_of(engine, api_keys=("first", "second"))
    callers = list(product(("first", "second"), (None, "a", "b")))
    salts = salts_of(app, engine, path, *callers, *callers)
    assert len(set(salts)) == len(callers)
    assert salts[: len(callers)] == salts[len(callers) :]


@PATHS
def test_without_keys_all_share_but_for_their_own_salts(path: str) -> None:
    engine = FakeEngine()
    salts = salts_of(app_of(engine), engine, path, ("any", None), ("other", None), ("any", "a"), ("other", "a"))
    assert salts[:2] == [b"", b""]
    assert salts[2] == salts[3] != b""


def test_every_choice_of_a_request_has_its_salt() -> None:
    engine = FakeEngine()
    call(engine, COMPLETIONS, {"prompt": [[1], [2]], "n": 2, "cache_salt": "a"})
    assert len({made.cache_salt for made in engine.calls}) == 1
    assert len(engine.calls) == 4


def test_a_salt_says_nothing_of_the_key_and_has_the_size_that_workers_take() -> None:
    salt = make_cache_salt(identity_of_key("secret"), "secret" * 40)
    assert len(salt) <= MAX_SALT_BYTES
    assert b"secret" not in salt
    assert "secret" not in identity_of_key("secret")


def test_a_client_cannot_spell_the_salt_of_another() -> None:
    """Neither by moving the border between the two parts, nor by naming an identity."""
    identity = identity_of_key("key")
    others = [(ANYBODY, identity), (identity[:-1], identity[-1]), (ANYBODY, ""), (identity, "")]
    salts = {make_cache_salt(*other) for other in others} | {make_cache_salt(identity, "x"), b""}
    assert len(salts) == len(others) + 2


# What the client is told


def cached_script(num_cached_tokens: int) -> Script:
    first, *rest = deltas_of("hello", " world")
    return Script((replace(first, num_cached_tokens=num_cached_tokens), *rest))


def cached_in(usage: dict[str, Any]) -> int:
    cached: int = usage["prompt_tokens_details"]["cached_tokens"]
    return cached


@PATHS
def test_the_usage_says_how_much_of_the_prompt_was_cached(path: str) -> None:
    answer = call(FakeEngine(cached_script(2)), path, PROMPTS[path]).json()
    assert cached_in(answer["usage"]) == 2


@PATHS
def test_a_stream_says_it_from_the_first_piece_on(path: str) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    frames = frames_of(call(FakeEngine(cached_script(2)), path, PROMPTS[path] | options))
    usages = [frame["usage"] for frame in frames if frame != "[DONE]" and frame["usage"]]
    assert [cached_in(usage) for usage in usages] == [2, 2, 2]


def test_a_prompt_with_several_choices_counts_what_none_of_them_computed() -> None:
    engine = FakeEngine(*(cached_script(count) for count in (3, 1, 2, 2)))
    answer = call(engine, COMPLETIONS, {"prompt": [[1, 2, 3, 4], [5, 6, 7]], "n": 2}).json()
    by_prompt = {4: [], 3: []}  # type: dict[int, list[int]]
    for made, count in zip(engine.calls, (3, 1, 2, 2), strict=True):
        by_prompt[len(made.prompt_token_ids)].append(count)
    assert cached_in(answer["usage"]) == sum(map(min, by_prompt.values()))
