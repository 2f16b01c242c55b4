"""Tokens of one sequence in, text out: characters kept whole, stop strings cut off, log-probabilities beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.outputs import OutputLogprobs, TextDelta
from engine.stop_strings import StopCheck, StopStrings
from engine.tokenizer import Tokenizer
from scheduler.request import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The next tokens of one sequence, at least one, as they came from a worker."""

    first_index: int  # output position of the first of them on that worker
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token, where asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0  # of the prompt, with the first tokens: they were not computed for this sequence


class TextAssembler:
    """One sequence. Stop strings count from the token after the first ``min_tokens`` on, as in vLLM."""

    def __init__(self, tokenizer: Tokenizer, end_tokens: Sequence[int], stop: Sequence[str], min_tokens: int) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._stop = StopStrings(stop)
        self._holds_back = bool(stop)
        self._end_tokens = frozenset(end_tokens)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._length = 0  # characters of text that are known
        self._shown = 0  # and of those that were given out
        self._held: list[OutputLogprobs] = []  # of tokens whose text a stop string may still cut off

    def push(self, batch: TokenBatch) -> TextDelta:
        """The next piece; the last one where the batch or a stop string ends the sequence."""
        reason = batch.finish_reason
        stop_token = batch.token_ids[-1] if reason is FinishReason.STOP else None
        shown = ""
        for index, token_id in enumerate(batch.token_ids):
            if batch.logprobs:
                self._held.append(OutputLogprobs(token_id, self._length, batch.logprobs[index]))
            is_last = index == len(batch.token_ids) - 1
            # A stop token is no part of the text.
            text = "" if is_last and stop_token is not None else self._detokenizer.push(token_id)
            if is_last and reason is not None:
                text += self._detokenizer.flush()
            cut = self._check(text)
            shown += cut.text
            if cut.stop is not None:
                return self._delta(batch, shown, FinishReason.STOP, cut.stop)
        if reason is None:
            return self._delta(batch, shown, None, None)
        stop_reason = stop_token if stop_token not in self._end_tokens else None  # as vLLM reports it
        return self._delta(batch, shown + self._stop.flush(), reason, stop_reason)

    def _check(self, text: str) -> StopCheck:
        self._num_tokens += 1
        self._length += len(text)
        return self._stop.push(text) if self._num_tokens > self._min_tokens else StopCheck(text)

    def _delta(
        self, batch: TokenBatch, text: str, reason: FinishReason | None, stop_reason: str | int | None
    ) -> TextDelta:
        self._shown += len(text)
        was_cut = isinstance(stop_reason, str)
        certain = len(self._held) if not was_cut and (reason is not None or not self._holds_back) else 0
        while certain < len(self._held) and self._held[certain].text_offset < self._shown:
            certain += 1
        told, self._held = tuple(self._held[:certain]), self._held[certain:]
        return TextDelta(text, batch.token_ids, reason, stop_reason, told, batch.prompt_logprobs)
