"""The tokenizer inside a GGUF file, built with the ``tokenizers`` library.

Two kinds are built. ``gpt2`` is byte-level BPE: merges in order, and the name of a rule that cuts the text into words
first. ``llama`` is SentencePiece's BPE: no merges but a score for each token; of all pairs of neighbours that make a
token, the one with the highest score is merged first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from kvcache.errors import ModelError
from workers.model.gguf_metadata import Metadata

# llama.cpp's token types (its enum llama_token_type).
NORMAL_TOKEN = 1
CONTROL_TOKEN = 3
USER_DEFINED_TOKEN = 4
BYTE_TOKEN = 6

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space

# Files name one end token; models that chat end their turns with another, known by its text.
END_OF_TURN = frozenset({"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"})

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PREFIX = r"[^\r\n\p{L}\p{N}]?"

# GGUF names the rule instead of describing it. These are cut by one expression ...
WORDS = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_PREFIX}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_PREFIX}\p{{L}}+|\p{{N}}|{_REST}",
    "tekken": rf"{_PREFIX}{_UPPER}*{_LOWER}+|{_PREFIX}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# ... these by GPT-2's own, the latter with every digit apart ...
GPT2_RULES = frozenset({"gpt-2", "default", "phi-2", "olmo", "mpt"})
DIGIT_RULES = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell"})
# ... and these are other names of the same rule.
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}

# Rules whose vocabularies have whole words that no sequence of merges reaches.
_WHOLE_WORDS = frozenset({"llama-bpe", "tekken"})
_ADDS_BOS = frozenset({"llama-bpe", "tekken"})


@dataclass(frozen=True, slots=True)
class TokenizerMetadata:
    """What a GGUF file says about its tokenizer. Token ids are indices into ``tokens``.

    ``merges`` are there for ``gpt2``, ``scores`` for ``llama``.
    """

    model: str
    pre_tokenizer: str
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unknown_token_id: int | None
    adds_bos: bool
    adds_eos: bool
    adds_space_prefix: bool
    chat_template: str


def read_tokenizer_metadata(metadata: Metadata) -> TokenizerMetadata:
    """Checked for kind and sizes. Raises ModelError for a kind that is not built here."""
    model = metadata.text("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ModelError(
            f"{metadata.path} has a tokenizer of the kind {model!r}; what is built from GGUF are gpt2 (BPE) and"
            " llama (SentencePiece)."
        )
    tokens = metadata.texts("tokenizer.ggml.tokens")
    name = metadata.text("tokenizer.ggml.pre", "default")
    rule = ALIASES.get(name, name)
    if model == "gpt2" and rule not in WORDS and rule not in GPT2_RULES | DIGIT_RULES:
        raise ModelError(f"{metadata.path} cuts words by the rule {name!r}, which is not known here.")
    is_bpe = model == "gpt2"
    return TokenizerMetadata(
        model=model,
        pre_tokenizer=rule,
        tokens=tokens,
        token_types=tuple(int(kind) for kind in _per_token(metadata, "token_type", len(tokens))),
        merges=metadata.texts("tokenizer.ggml.merges") if is_bpe else (),
        scores=() if is_bpe else tuple(_per_token(metadata, "scores", len(tokens))),
        bos_token_id=_token_id(metadata, "bos", tokens),
        eos_token_id=_token_id(metadata, "eos", tokens),
        pad_token_id=_token_id(metadata, "padding", tokens),
        unknown_token_id=_token_id(metadata, "unknown", tokens),
        adds_bos=metadata.flag("tokenizer.ggml.add_bos_token", not is_bpe or rule in _ADDS_BOS),
        adds_eos=metadata.flag("tokenizer.ggml.add_eos_token", False),
        adds_space_prefix=metadata.flag("tokenizer.ggml.add_space_prefix", not is_bpe),
        chat_template=metadata.text("tokenizer.chat_template", ""),
    )


def _per_token(metadata: Metadata, name: str, num_tokens: int) -> list[int] | list[float]:
    values = metadata.numbers(f"tokenizer.ggml.{name}")
    if len(values) != num_tokens:
        raise ModelError(f"{metadata.path} has {num_tokens} tokens and {len(values)} values of {name}.")
    if not np.isfinite(values).all():
        raise ModelError(f"{metadata.path} has {name} that are not numbers.")
    found: list[int] | list[float] = values.tolist()
    return found


def _token_id(metadata: Metadata, name: str, tokens: tuple[str, ...]) -> int | None:
    token_id = metadata.optional_integer(f"tokenizer.ggml.{name}_token_id")
    if token_id is not None and token_id >= len(tokens):
        raise ModelError(f"{metadata.path} names token {token_id} of only {len(tokens)} as {name}.")
    return token_id


def end_token_ids(metadata: Metadata, tokenizer: TokenizerMetadata) -> tuple[int, ...]:
    """Tokens that end an answer: the file's own, and those that end a turn by their text."""
    named = [tokenizer.eos_token_id]
    named += [_token_id(metadata, name, tokenizer.tokens) for name in ("eot", "eom")]
    known = [
        token_id
        for token_id, (token, kind) in enumerate(zip(tokenizer.tokens, tokenizer.token_types, strict=True))
        if token in END_OF_TURN and kind in (CONTROL_TOKEN, USER_DEFINED_TOKEN)
    ]
    return tuple(dict.fromkeys(token_id for token_id in (*named, *known) if token_id is not None))


def build_tokenizer(metadata: TokenizerMetadata) -> Tokenizer:
    """The tokenizer in memory. ModelError for tokens or merges that contradict each other."""
    vocabulary = {token: token_id for token_id, token in enumerate(metadata.tokens)}
    if len(vocabulary) != len(metadata.tokens):
        raise ModelError("The GGUF tokenizer lists the same token twice.")
    tokenizer = _byte_level(metadata, vocabulary) if metadata.model == "gpt2" else _sentence_piece(metadata, vocabulary)
    _add_special_tokens(tokenizer, metadata)
    _add_ends(tokenizer, metadata)
    return tokenizer


def _byte_level(metadata: TokenizerMetadata, vocabulary: dict[str, int]) -> Tokenizer:
    rule = metadata.pre_tokenizer
    # A merge is "left right"; neither half can hold a plain space, since bytes are written as letters.
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in metadata.merges)]
    tokenizer = Tokenizer(_bpe(vocabulary, merges, ignore_merges=rule in _WHOLE_WORDS))
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _words(rule)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _words(rule: str) -> pre_tokenizers.PreTokenizer:
    if rule in WORDS:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS[rule]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule in DIGIT_RULES:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _sentence_piece(metadata: TokenizerMetadata, vocabulary: dict[str, int]) -> Tokenizer:
    unknown = metadata.tokens[metadata.unknown_token_id] if metadata.unknown_token_id is not None else None
    merges = _merges_of_scores(metadata, vocabulary)
    tokenizer = Tokenizer(_bpe(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    decoding: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.adds_space_prefix:
        spaces.insert(0, normalizers.Prepend(SPACE))
        decoding.append(decoders.Strip(" ", left=1, right=0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _merges_of_scores(metadata: TokenizerMetadata, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best token first; of one token's, the earlier halves first."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, token_id in vocabulary.items():
        if metadata.token_types[token_id] != NORMAL_TOKEN:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-metadata.scores[token_id], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: bool | str | None) -> BPE:
    try:
        return BPE(vocab=vocabulary, merges=merges, **{name: value for name, value in options.items() if value})
    except Exception as error:
        raise ModelError(f"The GGUF tokenizer contradicts itself: {error}.") from error


def _add_special_tokens(tokenizer: Tokenizer, metadata: TokenizerMetadata) -> None:
    """Tokens that stand outside the BPE. All of a kind in one call: each call walks over all tokens added so far."""
    kinds = list(zip(metadata.tokens, metadata.token_types, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == CONTROL_TOKEN]
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token, kind in kinds if kind == USER_DEFINED_TOKEN]
    )


def _add_ends(tokenizer: Tokenizer, metadata: TokenizerMetadata) -> None:
    """The tokens that the model wants around a prompt."""
    before, after = metadata.adds_bos, metadata.adds_eos
    begin = _text_of(metadata, metadata.bos_token_id, "begin") if before else None
    end = _text_of(metadata, metadata.eos_token_id, "end") if after else None
    pieces = [(begin, metadata.bos_token_id), (end, metadata.eos_token_id)]
    special = [(token, token_id) for token, token_id in pieces if token is not None and token_id is not None]
    if special:
        template = [token for token in (begin, "$A", end) if token is not None]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)


def _text_of(metadata: TokenizerMetadata, token_id: int | None, what: str) -> str:
    if token_id is None:
        raise ModelError(f"The GGUF tokenizer adds an {what} token that it does not name.")
    return metadata.tokens[token_id]


def special_token_texts(metadata: TokenizerMetadata) -> dict[str, str]:
    """What tokenizer_config.json calls the special tokens, for those that the file names. Templates use them."""
    special_ids = {
        "bos_token": metadata.bos_token_id,
        "eos_token": metadata.eos_token_id,
        "pad_token": metadata.pad_token_id,
        "unk_token": metadata.unknown_token_id,
    }
    return {name: metadata.tokens[token_id] for name, token_id in special_ids.items() if token_id is not None}


def write_tokenizer(metadata: TokenizerMetadata, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, when there is one, chat_template.jinja into ``folder``."""
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {
        # Not GPT2Tokenizer: that class puts its own pre-tokenizer in place of the file's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **special_token_texts(metadata),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if metadata.chat_template:
        (folder / "chat_template.jinja").write_text(metadata.chat_template, encoding="utf-8")
