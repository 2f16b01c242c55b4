"""What the processors of one sequence's logits know: its masks, and how often it has used which token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from scheduler.request import SamplingParams, TokenHistory


class TokenCounts:
    """The distinct tokens of a sequence and how often each is in its output, kept while it grows."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._token_ids = np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        self._num_counted = 0

    @property
    def token_ids(self) -> np.ndarray:
        """int64, each once, in the order in which they came."""
        return self._token_ids[: len(self._place)]

    @property
    def output_counts(self) -> np.ndarray:
        """float32, for each of ``token_ids``; 0 for one that is in the prompt only."""
        return self._counts[: len(self._place)]

    def advance(self, history: TokenHistory) -> None:
        """Counts the tokens that came since the last call; for the same history again it changes nothing."""
        for position in range(self._num_counted, history.num_tokens):
            place = self._place_of(history.token_ids[position])
            self._counts[place] += position >= history.num_prompt_tokens
        self._num_counted = history.num_tokens

    def _place_of(self, token_id: int) -> int:
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._token_ids[place] = token_id
        return place


class SequenceState:
    """One sequence with parameters that alter its logits. Belongs to the model's thread."""

    def __init__(self, sampling: SamplingParams, history: TokenHistory) -> None:
        self.sampling = sampling
        self.counts = TokenCounts()
        self.allowed = torch.tensor(sampling.allowed_token_ids) if sampling.allowed_token_ids else None
        self._source: Sequence[int] = history.token_ids
        self._always_forbidden = [word[0] for word in sampling.bad_words if len(word) == 1]
        self._phrases = [word for word in sampling.bad_words if len(word) > 1]
        self._history = history

    def is_of(self, history: TokenHistory) -> bool:
        """False for another sequence under the same name."""
        return self._source is history.token_ids

    def advance(self, history: TokenHistory) -> None:
        """The sequence has come to ``history``."""
        self._history = history
        if self.sampling.has_penalties:
            self.counts.advance(history)

    def forbidden(self) -> list[int]:
        """Tokens that may not come next: ends of bad words, and stop tokens before ``min_tokens``."""
        token_ids = self._always_forbidden + [phrase[-1] for phrase in self._phrases if self._output_ends_with(phrase)]
        if self._history.num_output_tokens < self.sampling.min_tokens:
            token_ids += self.sampling.stop_token_ids
        return token_ids

    def _output_ends_with(self, phrase: tuple[int, ...]) -> bool:
        """Whether the output ends with all of ``phrase`` but its last token."""
        history, length = self._history, len(phrase) - 1
        if length > history.num_output_tokens or history.token_ids[history.num_tokens - 1] != phrase[-2]:
            return False
        return tuple(history.token_ids[history.num_tokens - length : history.num_tokens]) == phrase[:-1]
