"""Log-probabilities in the shapes of OpenAI and of vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from engine.api.replies import (
    ChatLogprobs,
    ChatTokenLogprob,
    ChatTopLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
)
from engine.outputs import OutputLogprobs
from engine.tokenizer import Tokenizer
from scheduler.request import TokenLogprobs

LOWEST = -9999.0  # JSON has no -inf; the number is vLLM's


def completion_logprobs(
    tokenizer: Tokenizer, outputs: Sequence[OutputLogprobs], count: int, first_offset: int
) -> CompletionLogprobs:
    """Of generated tokens whose text begins ``first_offset`` characters into the choice's text."""
    told = CompletionLogprobs([], [], [], [])
    for output in outputs:
        told.text_offset.append(first_offset + output.text_offset)
        told.tokens.append(tokenizer.token_text(output.token_id))
        told.token_logprobs.append(_finite(output.logprobs.logprob))
        told.top_logprobs.append(_by_text(tokenizer, output.token_id, output.logprobs, count))
    return told


def echoed_logprobs(
    tokenizer: Tokenizer, prompt_token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], count: int
) -> CompletionLogprobs:
    """Of a prompt that begins the choice's text; its first token has none."""
    told = CompletionLogprobs(_offsets(tokenizer, prompt_token_ids), [None], [], [None])
    told.tokens.extend(map(tokenizer.token_text, prompt_token_ids))
    for token_id, each in zip(prompt_token_ids[1:], logprobs, strict=True):
        told.token_logprobs.append(_finite(each.logprob))
        told.top_logprobs.append(_by_text(tokenizer, token_id, each, count))
    return told


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """The entries of both, in order."""
    return CompletionLogprobs(
        first.text_offset + second.text_offset,
        first.token_logprobs + second.token_logprobs,
        first.tokens + second.tokens,
        first.top_logprobs + second.top_logprobs,
    )


def chat_logprobs(tokenizer: Tokenizer, outputs: Sequence[OutputLogprobs]) -> ChatLogprobs:
    """Of generated tokens."""
    return ChatLogprobs([_chat_token(tokenizer, output) for output in outputs])


def prompt_logprobs(
    tokenizer: Tokenizer, prompt_token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], count: int
) -> PromptLogprobs:
    """vLLM's field of that name."""
    told: PromptLogprobs = [None]
    for token_id, each in zip(prompt_token_ids[1:], logprobs, strict=True):
        place = {str(token_id): PromptLogprob(_finite(each.logprob), each.rank, tokenizer.token_text(token_id))}
        for rank, (top_id, logprob) in enumerate(_top(each, count), 1):
            place.setdefault(str(top_id), PromptLogprob(_finite(logprob), rank, tokenizer.token_text(top_id)))
        told.append(place)
    return told


def _offsets(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    detokenizer = tokenizer.detokenizer()
    offsets, length = [], 0
    for token_id in token_ids:
        offsets.append(length)
        length += len(detokenizer.push(token_id))
    return offsets


def _by_text(tokenizer: Tokenizer, token_id: int, logprobs: TokenLogprobs, count: int) -> dict[str, float]:
    """The likeliest, and the token itself if it is none of them. Of two tokens of one text the likelier is told."""
    by_text: dict[str, float] = {}
    for top_id, logprob in (*_top(logprobs, count), (token_id, logprobs.logprob)):
        by_text.setdefault(tokenizer.token_text(top_id), _finite(logprob))
    return by_text


def _chat_token(tokenizer: Tokenizer, output: OutputLogprobs) -> ChatTokenLogprob:
    top = [
        ChatTopLogprob(tokenizer.token_text(token_id), _finite(logprob), list(tokenizer.token_bytes(token_id)))
        for token_id, logprob in _top(output.logprobs, len(output.logprobs.top_token_ids))
    ]
    text, data = tokenizer.token_text(output.token_id), tokenizer.token_bytes(output.token_id)
    return ChatTokenLogprob(text, _finite(output.logprobs.logprob), list(data), top)


def _top(logprobs: TokenLogprobs, count: int) -> list[tuple[int, float]]:
    return list(zip(logprobs.top_token_ids[:count], logprobs.top_logprobs[:count], strict=True))


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
