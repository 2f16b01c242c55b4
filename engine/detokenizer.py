"""Tokens to text while they come, so that the joined pieces are what decoding all of them gives.

``tokenizers.decoders.DecodeStream`` was tried and does not hold this: it loses what stands after an incomplete
character, so for random tokens every second text came out short.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable

import tokenizers
from tokenizers import decoders

MAX_HELD_TOKENS = 64
"""A run of byte tokens is shown after this many, at the end of a character, so that a stream never falls silent."""

_LONGEST_CHARACTER = 4  # bytes of UTF-8; what is incomplete after as many more is broken
_REPLACEMENT = "\ufffd"


class IncrementalDetokenizer(ABC):
    """The text of one sequence, piece by piece. Special tokens are left out."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """The text that is now certain; empty while a character is incomplete."""

    @abstractmethod
    def flush(self) -> str:
        """The rest, once no more tokens come; an incomplete character is rendered as U+FFFD."""


def make_detokenizer(backend: tokenizers.Tokenizer) -> Callable[[], IncrementalDetokenizer]:
    """Chooses by the tokenizer's decoder. What is costly is done here, once, and shared by all sequences."""
    special_ids = frozenset(token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special)
    if isinstance(backend.decoder, decoders.ByteLevel):
        token_bytes = _TokenBytes(backend, special_ids)
        return lambda: _ByteLevelDetokenizer(token_bytes)
    return lambda: _WindowDetokenizer(backend, special_ids)


class _TokenBytes:
    """The bytes of each token of a byte-level vocabulary, worked out at first use."""

    def __init__(self, backend: tokenizers.Tokenizer, special_ids: frozenset[int]) -> None:
        self._backend = backend
        self._known: dict[int, bytes] = dict.fromkeys(special_ids, b"")  # grows to the vocabulary at most

    def of(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id)
            if token is None:
                return b""  # not in the vocabulary: decoding skips it as well
            known = self._known[token_id] = bytes_of(token)
        return known


def bytes_of(token: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary.

    An added token may hold characters outside the alphabet; it then stands for itself, as in the decoder.
    """
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's mapping of visible characters to bytes: printable ones stand for themselves, the rest from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(shifted)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


class _ByteLevelDetokenizer(IncrementalDetokenizer):
    """For byte-level vocabularies (GPT-2, Llama 3, Qwen, SmolLM2 ...): each token is a fixed string of bytes."""

    def __init__(self, token_bytes: _TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes.of(token_id))

    def flush(self) -> str:
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class _WindowDetokenizer(IncrementalDetokenizer):
    """For every other decoder (SentencePiece with byte fallback, WordPiece ...): decodes a window that slides.

    ::

        tokens   ... shown ... | context | held |
                                └── window ─────┘

    Both context alone and the whole window are decoded; the difference is new text. The context gives the
    decoder what stood before, for it treats the first token of a text differently (leading space).

    A run of byte tokens (``<0x..>``) is held until it ends, because a decoder with byte fallback renders a run
    that turns out not to be UTF-8 as U+FFFD throughout, its good characters included. A run longer than
    ``MAX_HELD_TOKENS`` is shown in parts; only where such a run breaks later does the text differ from the
    decoder's.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_ids: frozenset[int]) -> None:
        self._backend = backend
        self._special_ids = special_ids
        self._window: list[int] = []
        self._context_length = 0
        self._context_text = ""

    def push(self, token_id: int) -> str:
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return ""
        self._window.append(token_id)
        held = len(self._window) - self._context_length
        in_byte_run = len(token) == 6 and token.startswith("<0x")
        if in_byte_run and held < MAX_HELD_TOKENS:
            return ""
        text = self._decode(self._window)
        incomplete = text.endswith(_REPLACEMENT) and held < MAX_HELD_TOKENS + _LONGEST_CHARACTER
        return "" if incomplete else self._show(text)

    def flush(self) -> str:
        return self._show(self._decode(self._window)) if len(self._window) > self._context_length else ""

    def _show(self, text: str) -> str:
        """Everything in the window is now shown; its newest part becomes the context."""
        piece = text[len(self._context_text) :]
        self._window = self._window[self._context_length :]
        self._context_length = len(self._window)
        self._context_text = self._decode(self._window)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)
