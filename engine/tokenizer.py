"""Text to tokens and back, and the chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import transformers  # lazy: its submodules, and torch with them, load when a checkpoint is opened
from jinja2.exceptions import TemplateError
from tokenizers import decoders

from engine.detokenizer import IncrementalDetokenizer, bytes_of, make_detokenizer
from kvcache.errors import ModelError, RequestError
from workers.model.gguf_checkpoint import open_gguf
from workers.model.gguf_names import SUFFIX
from workers.model.gguf_tokenizer import build_tokenizer, special_token_texts

ChatRenderer = Callable[[Sequence[dict[str, str]]], str]
"""Messages to prompt text, ending where the assistant's answer begins. Raises whatever a template raises."""

# What a template of a checkpoint can raise on messages it was not written for.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


class Tokenizer:
    """The tokenizer of one checkpoint. Immutable and safe to share between threads.

    It goes to the Rust tokenizer directly: the calls of ``transformers`` change the tokenizer's padding and
    truncation on every use, which fails ("Already borrowed") as soon as two threads meet.
    """

    def __init__(self, backend: tokenizers.Tokenizer, render: ChatRenderer | None = None) -> None:
        """Takes ``backend`` over: nobody else may change it. Without ``render``, chat is refused."""
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._render = render
        self._make_detokenizer = make_detokenizer(backend)
        self._added = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
        self._token_bytes: dict[int, bytes] = {}  # grows to the vocabulary at most

    @classmethod
    def from_checkpoint(cls, path: Path) -> Tokenizer:
        """Reads a checkpoint folder or a GGUF file. No code of the checkpoint runs, nothing is fetched.

        Raises:
            ModelError: there is no tokenizer in it, or no fast one.
        """
        loaded = _from_gguf(path) if path.suffix == SUFFIX else _from_folder(path)
        backend = getattr(loaded, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise ModelError(f"The checkpoint in {path} has no fast tokenizer (tokenizer.json).")

        def render(messages: Sequence[dict[str, str]]) -> str:
            # transformers renders in an immutable, sandboxed Jinja environment
            return str(loaded.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

        return cls(backend, render if loaded.chat_template is not None else None)

    @property
    def vocab_size(self) -> int:
        """Ids are below this, added tokens included. The model's own vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; with ``add_special_tokens``, those that the checkpoint puts around a prompt."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``. Bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for in the middle of a text; a special token for its own name."""
        known = self._token_bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id)
            if token is None:
                return b""  # the model's vocabulary may be padded beyond the tokenizer's
            known = self._token_bytes[token_id] = self._bytes_of(token_id, token)
        return known

    def token_text(self, token_id: int) -> str:
        r"""The same as text; a part of a character is written as OpenAI does, ``bytes:\xe2\x82``."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes_of(self, token_id: int, token: str) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        if isinstance(self._backend.decoder, decoders.ByteLevel):
            return bytes_of(token)
        if len(token) == 6 and token.startswith("<0x"):  # byte fallback
            return bytes([int(token[3:5], 16)])
        # A decoder may treat the first token of a text differently (leading space), so the second is looked at.
        return self.decode([token_id, token_id])[len(self.decode([token_id])) :].encode()

    def render_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Raises:
            RequestError: the checkpoint has no chat template, or the template refuses the messages.
        """
        if self._render is None:
            raise RequestError("this model has no chat template; use /v1/completions", "messages")
        try:
            text = self._render(messages)
        except _TEMPLATE_ERRORS as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}", "messages") from error
        return self.encode(text, add_special_tokens=False)  # the template has written them

    def detokenizer(self) -> IncrementalDetokenizer:
        """A fresh one, for one sequence."""
        return self._make_detokenizer()


def _from_folder(folder: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the library raises whatever its files' damage leads to, Exception itself too
        raise ModelError(f"The tokenizer in {folder} cannot be read: {error}") from error


def _from_gguf(file: Path) -> Any:
    metadata = open_gguf(file).tokenizer
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(metadata),
        chat_template=metadata.chat_template or None,
        clean_up_tokenization_spaces=False,
        **special_token_texts(metadata),
    )
