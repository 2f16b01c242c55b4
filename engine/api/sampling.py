"""The parameters of sampling, from a body's names to ours."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from engine.api.protocol import GenerationRequest
from engine.outputs import ServedModel
from engine.tokenizer import Tokenizer
from kvcache.errors import RequestError
from scheduler.request import SamplingParams

_INT64 = 1 << 64


def make_sampling(body: GenerationRequest, model: ServedModel, tokenizer: Tokenizer) -> SamplingParams:
    """What all choices share; their ``max_tokens`` and ``seed`` are the caller's to set.

    Raises:
        RequestError: a bad word has no tokens.
    """
    end_tokens = () if body.ignore_eos else model.eos_token_ids
    return SamplingParams(
        max_tokens=1,
        temperature=_or_default(body.temperature, 1.0),
        top_p=_or_default(body.top_p, 1.0),
        top_k=max(0, body.top_k or 0),
        stop_token_ids=tuple(dict.fromkeys((*end_tokens, *(body.stop_token_ids or ())))),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_or_default(body.repetition_penalty, 1.0),
        logit_bias=tuple((body.logit_bias or {}).items()),
        bad_words=bad_word_tokens(body.bad_words or (), tokenizer),
        allowed_token_ids=tuple(dict.fromkeys(body.allowed_token_ids or ())),
        min_tokens=body.min_tokens or 0,
        logprobs=body.num_logprobs,
        prompt_logprobs=body.num_prompt_logprobs,
    )


def bad_word_tokens(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it is tokenized at the beginning of a text and inside of one, after a space.

    Raises:
        RequestError: there is nothing but space in one.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for position, word in enumerate(words):
        bare = word.lstrip()
        if not bare:
            raise RequestError("a bad word needs more than space", f"bad_words[{position}]")
        for text in (bare, " " + bare):
            sequences[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    return tuple(sequences)


def seed_of(body: GenerationRequest, choice: int) -> int:
    """Wraps around at the top, so that the largest seed can have neighbours."""
    if body.seed is None:
        return secrets.randbits(63)
    return (body.seed + choice + _INT64 // 2) % _INT64 - _INT64 // 2


def _or_default(value: float | None, default: float) -> float:
    return default if value is None else value
