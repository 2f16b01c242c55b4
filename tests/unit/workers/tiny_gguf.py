"""A Llama GGUF of a few kilobytes, with the source values it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

NUM_LAYERS = 2
HIDDEN_SIZE = 32
INTERMEDIATE_SIZE = 64
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_SIZE = HIDDEN_SIZE // NUM_HEADS
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "Ġ w"]
CHAT_TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"


def byte_letters() -> list[str]:
    """The 256 letters in which byte-level BPE writes bytes, as GPT-2 defined them: printable bytes are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def tiny_tokens() -> list[str]:
    return [*SPECIAL_TOKENS, *byte_letters(), *(merge.replace(" ", "") for merge in MERGES)]


@dataclass(frozen=True, slots=True)
class TinyTensor:
    """One tensor as stored. ``raw`` is what the file holds, in ``kind``."""

    kind: GGMLQuantizationType
    raw: np.ndarray


def tiny_tensors(rng: np.random.Generator) -> dict[str, TinyTensor]:
    """Projections in Q4_1, the embedding in Q8_0, norms in float32: the kinds of the default model."""
    tensors = {
        "token_embd.weight": _stored(rng, (len(tiny_tokens()), HIDDEN_SIZE), GGMLQuantizationType.Q8_0),
        "output_norm.weight": _stored(rng, (HIDDEN_SIZE,), GGMLQuantizationType.F32),
    }
    shapes = {
        "attn_q": (NUM_HEADS * HEAD_SIZE, HIDDEN_SIZE),
        "attn_k": (NUM_KV_HEADS * HEAD_SIZE, HIDDEN_SIZE),
        "attn_v": (NUM_KV_HEADS * HEAD_SIZE, HIDDEN_SIZE),
        "attn_output": (HIDDEN_SIZE, NUM_HEADS * HEAD_SIZE),
        "ffn_gate": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
        "ffn_up": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
        "ffn_down": (HIDDEN_SIZE, INTERMEDIATE_SIZE),
    }
    for layer in range(NUM_LAYERS):
        for name, shape in shapes.items():
            tensors[f"blk.{layer}.{name}.weight"] = _stored(rng, shape, GGMLQuantizationType.Q4_1)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = _stored(rng, (HIDDEN_SIZE,), GGMLQuantizationType.F32)
    return tensors


def _stored(rng: np.random.Generator, shape: tuple[int, ...], kind: GGMLQuantizationType) -> TinyTensor:
    return TinyTensor(kind, quantize(rng.standard_normal(shape, dtype=np.float32), kind))


def write_tiny_gguf(
    file: Path,
    tensors: dict[str, TinyTensor],
    *,
    architecture: str = "llama",
    pre_tokenizer: str = "smollm",
    rotary_size: int = HEAD_SIZE,
    split: tuple[int, int] | None = None,
) -> None:
    """``split``: which part of how many this file is."""
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(NUM_LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN_SIZE)
    writer.add_feed_forward_length(INTERMEDIATE_SIZE)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(rotary_size)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = tiny_tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.raw, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
