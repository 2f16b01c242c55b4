"""The tokenizers built from GGUF metadata cut text as the tokenizers that the metadata come from."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from kvcache.errors import ModelError
from workers.model.gguf_metadata import Metadata
from workers.model.gguf_tokenizer import (
    BYTE_TOKEN,
    CONTROL_TOKEN,
    NORMAL_TOKEN,
    SPACE,
    USER_DEFINED_TOKEN,
    TokenizerMetadata,
    build_tokenizer,
    end_token_ids,
    read_tokenizer_metadata,
)

TEXTS = (
    "It's 12,345.67 o'clock.\n\n  Two  spaces, WE'LL see\t.",
    "hello hello world, the quick brown fox jumps 1234567 times",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "def square(x):\n    return x ** 2  # comment\r\n\r\n",
    "caf\u0065\u0301 na\u00efve \u00dcber",
    "\U0001f389 \U0001f469\u200d\U0001f469\u200d\U0001f467",
    " leading",
    "",
)
# As the models' own tokenizer.json files give them.
PUBLISHED = {
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def trained(rule: str) -> tokenizers.Tokenizer:
    """A byte-level BPE with this rule, as its authors would have published it."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=rule != "qwen2"))
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PUBLISHED[rule]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def metadata_of(backend: tokenizers.Tokenizer, rule: str) -> TokenizerMetadata:
    model = json.loads(backend.to_str())["model"]
    tokens = tuple(sorted(model["vocab"], key=model["vocab"].__getitem__))
    return TokenizerMetadata(
        model="gpt2",
        pre_tokenizer=rule,
        tokens=tokens,
        token_types=tuple(CONTROL_TOKEN if token == "<|end|>" else NORMAL_TOKEN for token in tokens),
        merges=tuple(" ".join(pair) for pair in model["merges"]),
        scores=(),
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        unknown_token_id=None,
        adds_bos=False,
        adds_eos=False,
        adds_space_prefix=False,
        chat_template="",
    )


@pytest.mark.parametrize("rule", PUBLISHED)
def test_a_byte_level_tokenizer_cuts_as_its_source(rule: str) -> None:
    source = trained(rule)
    built = build_tokenizer(metadata_of(source, rule))
    for text in (*TEXTS, "ab<|end|>cd"):
        assert built.encode(text).ids == source.encode(text).ids
        assert built.decode(built.encode(text).ids) == source.decode(source.encode(text).ids)


SPM_TOKENS: dict[str, tuple[float, int]] = {
    "<unk>": (0.0, 2),
    "<s>": (0.0, CONTROL_TOKEN),
    "</s>": (0.0, CONTROL_TOKEN),
    **{f"<0x{byte:02X}>": (0.0, BYTE_TOKEN) for byte in range(256)},
    f"{SPACE}t": (-1.0, NORMAL_TOKEN),
    "he": (-2.0, NORMAL_TOKEN),
    f"{SPACE}the": (-3.0, NORMAL_TOKEN),
    "er": (-4.0, NORMAL_TOKEN),
    "her": (-5.0, NORMAL_TOKEN),
    f"{SPACE}{SPACE}": (-6.0, NORMAL_TOKEN),
    "th": (-7.0, NORMAL_TOKEN),
    f"{SPACE}ther": (-8.0, NORMAL_TOKEN),
    **{letter: (-20.0 - index, NORMAL_TOKEN) for index, letter in enumerate(f"{SPACE}ehrtxyz")},
    "<tool>": (0.0, USER_DEFINED_TOKEN),
}


def spm_metadata(**changes: Any) -> TokenizerMetadata:
    base = TokenizerMetadata(
        model="llama",
        pre_tokenizer="default",
        tokens=tuple(SPM_TOKENS),
        token_types=tuple(kind for _, kind in SPM_TOKENS.values()),
        merges=(),
        scores=tuple(score for score, _ in SPM_TOKENS.values()),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        unknown_token_id=0,
        adds_bos=True,
        adds_eos=False,
        adds_space_prefix=True,
        chat_template="",
    )
    return replace(base, **changes)


def slow_pieces(text: str) -> list[str]:
    """SentencePiece's BPE by its definition: of all neighbours that make a token, the best score first, leftmost."""
    pieces = list(text.replace(" ", SPACE))
    while True:
        found = [
            (-SPM_TOKENS[left + right][0], index)
            for index, (left, right) in enumerate(itertools.pairwise(pieces))
            if left + right in SPM_TOKENS
        ]
        if not found:
            break
        _, index = min(found)
        pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]
    return [
        token
        for piece in pieces
        for token in ([piece] if piece in SPM_TOKENS else [f"<0x{byte:02X}>" for byte in piece.encode()])
    ]


@pytest.mark.parametrize(
    "text", ["the other", "ther  the her", "hex Q\u00e9 \u4f60 er", "xyz", "  t", "ththere therth"]
)
def test_a_sentence_piece_tokenizer_merges_by_score(text: str) -> None:
    built = build_tokenizer(spm_metadata())
    assert built.encode(text).tokens == ["<s>", *slow_pieces(" " + text)]
    assert built.decode(built.encode(text).ids) == text


def test_no_space_is_put_in_front_where_the_file_says_so() -> None:
    built = build_tokenizer(spm_metadata(adds_space_prefix=False, adds_bos=False, adds_eos=True))
    assert built.encode("the").tokens == [*slow_pieces("the"), "</s>"]
    assert built.decode(built.encode(" the").ids) == " the"


def test_tokens_of_users_stay_whole() -> None:
    built = build_tokenizer(spm_metadata(adds_bos=False, adds_space_prefix=False))
    assert built.encode("the<tool>the").tokens == [*slow_pieces("the"), "<tool>", *slow_pieces("the")]


def test_ends_of_turns_are_found_by_their_text() -> None:
    tokens = ("a", "<|eot_id|>", "</s>", "<|im_end|>")
    metadata = spm_metadata(tokens=tokens, token_types=(1, CONTROL_TOKEN, CONTROL_TOKEN, NORMAL_TOKEN))
    assert end_token_ids(Metadata(Path("x.gguf"), {"tokenizer.ggml.eom_token_id": 0}), metadata) == (2, 0, 1)


def values(**changes: Any) -> Metadata:
    base: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ("a", "b"),
        "tokenizer.ggml.token_type": np.array([1, 1]),
        "tokenizer.ggml.merges": (),
    }
    return Metadata(Path("x.gguf"), base | {f"tokenizer.ggml.{key}": value for key, value in changes.items()})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "bert"}, "of the kind 'bert'"),
        ({"model": "t5"}, "of the kind 't5'"),
        ({"pre": "martian"}, "by the rule 'martian'"),
        ({"tokens": ("a",)}, "1 tokens and 2 values of token_type"),
        ({"eos_token_id": 2}, "names token 2 of only 2 as eos"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"add_bos_token": 1}, "true or false"),
        ({"model": "llama"}, "tokenizer.ggml.scores"),
    ],
)
def test_what_is_not_built_is_named(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        read_tokenizer_metadata(values(**changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": ("a", "a")}, "same token twice"),
        ({"merges": ("a c",)}, "contradicts itself"),
        ({"add_bos_token": True}, "begin token that it does not name"),
    ],
)
def test_a_tokenizer_that_contradicts_itself_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        build_tokenizer(read_tokenizer_metadata(values(**changes)))


@pytest.mark.parametrize(("pre", "adds"), [("llama-bpe", True), ("llama3", True), ("qwen2", False), ("gpt-2", False)])
def test_the_begin_token_follows_the_rule_where_the_file_is_silent(pre: str, adds: bool) -> None:
    assert read_tokenizer_metadata(values(pre=pre)).adds_bos is adds
