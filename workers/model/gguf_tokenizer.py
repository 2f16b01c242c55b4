"""The byte-level BPE tokenizer inside a GGUF file, written as the files that ``transformers`` reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from kvcache.errors import ModelError

# llama.cpp's token types (its enum llama_token_type): only these two stand outside the BPE.
CONTROL_TOKEN = 3
USER_DEFINED_TOKEN = 4


@dataclass(frozen=True, slots=True)
class TokenizerMetadata:
    """What a GGUF file says about its tokenizer. Token ids are indices into ``tokens``."""

    model: str
    pre_tokenizer: str
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...]
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unknown_token_id: int | None
    adds_bos: bool
    adds_eos: bool
    chat_template: str


def build_tokenizer(metadata: TokenizerMetadata) -> Tokenizer:
    """The tokenizer in memory. ModelError for a kind that is not built here."""
    if metadata.model != "gpt2":
        raise ModelError(f"The GGUF tokenizer model {metadata.model!r} is not built here; only 'gpt2' (BPE) is.")
    if metadata.adds_bos or metadata.adds_eos:
        raise ModelError("The GGUF tokenizer adds begin or end tokens by itself, which is not built here.")
    if len(metadata.token_types) != len(metadata.tokens):
        raise ModelError(f"The GGUF tokenizer has {len(metadata.tokens)} tokens and {len(metadata.token_types)} types.")
    vocabulary = {token: token_id for token_id, token in enumerate(metadata.tokens)}
    if len(vocabulary) != len(metadata.tokens):
        raise ModelError("The GGUF tokenizer lists the same token twice.")
    # A merge is "left right"; neither half can hold a plain space, since bytes are written as letters.
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in metadata.merges)]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(metadata.pre_tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    _add_special_tokens(tokenizer, metadata)
    return tokenizer


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """GGUF names a pre-tokenizer instead of describing it; this is what each known name stands for."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("gpt-2", "default"):
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    raise ModelError(f"The GGUF pre-tokenizer {name!r} is not known here.")


def _add_special_tokens(tokenizer: Tokenizer, metadata: TokenizerMetadata) -> None:
    for token, token_type in zip(metadata.tokens, metadata.token_types, strict=True):
        if token_type == CONTROL_TOKEN:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == USER_DEFINED_TOKEN:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def write_tokenizer(metadata: TokenizerMetadata, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, when there is one, chat_template.jinja into ``folder``."""
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    special_ids = {
        "bos_token": metadata.bos_token_id,
        "eos_token": metadata.eos_token_id,
        "pad_token": metadata.pad_token_id,
        "unk_token": metadata.unknown_token_id,
    }
    config: dict[str, object] = {
        # Not GPT2Tokenizer: that class puts its own pre-tokenizer in place of the file's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **{name: _token(metadata, token_id) for name, token_id in special_ids.items() if token_id is not None},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if metadata.chat_template:
        (folder / "chat_template.jinja").write_text(metadata.chat_template, encoding="utf-8")


def _token(metadata: TokenizerMetadata, token_id: int) -> str:
    if not 0 <= token_id < len(metadata.tokens):
        raise ModelError(f"The GGUF tokenizer names token {token_id} of only {len(metadata.tokens)}.")
    return metadata.tokens[token_id]
