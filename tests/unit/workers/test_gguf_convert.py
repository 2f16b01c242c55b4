"""A GGUF becomes the same numbers in transformers' names and row order, and the same tokens."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from kvcache.errors import ModelError
from tests.unit.workers import tiny_gguf
from workers.model.gguf_convert import convert_gguf
from workers.model.gguf_weights import restore_row_order
from workers.model.progress import Progress

SILENT = Progress(enabled=False)


@pytest.fixture(scope="module")
def tensors() -> dict[str, tiny_gguf.TinyTensor]:
    return tiny_gguf.tiny_tensors(np.random.default_rng(7))


@pytest.fixture(scope="module")
def converted(tensors: dict[str, tiny_gguf.TinyTensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    source = tmp_path_factory.mktemp("source") / "tiny.gguf"
    tiny_gguf.write_tiny_gguf(source, tensors)
    convert_gguf(source, folder, SILENT)
    return folder


def slow_q4_1(raw: np.ndarray) -> np.ndarray:
    """Q4_1 by its definition: 32 values are a scale, a minimum (float16) and 16 bytes, low nibbles first."""
    rows = []
    for row in raw:
        values: list[np.float32] = []
        data = row.tobytes()
        for start in range(0, len(data), 20):
            scale, minimum = struct.unpack("<ee", data[start : start + 4])
            nibbles = data[start + 4 : start + 20]
            values += [np.float32(byte & 15) * np.float32(scale) + np.float32(minimum) for byte in nibbles]
            values += [np.float32(byte >> 4) * np.float32(scale) + np.float32(minimum) for byte in nibbles]
        rows.append(values)
    return np.array(rows, dtype=np.float32)


def slow_q8_0(raw: np.ndarray) -> np.ndarray:
    """Q8_0 by its definition: 32 values are a scale (float16) and 32 signed bytes."""
    rows = []
    for row in raw:
        values: list[np.float32] = []
        data = row.tobytes()
        for start in range(0, len(data), 34):
            scale, *quants = struct.unpack("<e32b", data[start : start + 34])
            values += [np.float32(quant) * np.float32(scale) for quant in quants]
        rows.append(values)
    return np.array(rows, dtype=np.float32)


def slow_value(tensor: tiny_gguf.TinyTensor) -> np.ndarray:
    if tensor.kind == GGMLQuantizationType.Q4_1:
        return slow_q4_1(tensor.raw)
    return slow_q8_0(tensor.raw) if tensor.kind == GGMLQuantizationType.Q8_0 else tensor.raw


def slow_row_order(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Row by row: GGUF row 2i of a head is transformers row i, GGUF row 2i + 1 is row i + half."""
    head_size = len(weight) // num_heads
    restored = np.zeros_like(weight)
    for head in range(num_heads):
        for pair in range(head_size // 2):
            first = head * head_size
            restored[first + pair] = weight[first + 2 * pair]
            restored[first + pair + head_size // 2] = weight[first + 2 * pair + 1]
    return restored


def test_restored_rows_follow_the_definition_row_by_row() -> None:
    weight = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)
    assert np.array_equal(restore_row_order(torch.from_numpy(weight), 3).numpy(), slow_row_order(weight, 3))


def test_every_weight_has_its_source_value(converted: Path, tensors: dict[str, tiny_gguf.TinyTensor]) -> None:
    found = load_file(converted / "model.safetensors")
    assert len(found) == len(tensors)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, tiny_gguf.NUM_LAYERS)
    for transformers_name, weight in found.items():
        name = names.get_name(transformers_name, try_suffixes=(".weight",))
        assert name is not None
        tensor = tensors[name]
        expected = slow_value(tensor)
        if "attn_q" in name:
            expected = slow_row_order(expected, tiny_gguf.NUM_HEADS)
        if "attn_k" in name:
            expected = slow_row_order(expected, tiny_gguf.NUM_KV_HEADS)
        assert weight.dtype == np.float32
        assert np.array_equal(weight, expected), name


def test_names_are_those_of_the_transformers_class(converted: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(converted, output_loading_info=True)
    _, loading = loaded
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_config_states_the_metadata(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["num_key_value_heads"] == tiny_gguf.NUM_KV_HEADS
    assert config["head_dim"] == tiny_gguf.HEAD_SIZE
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100_000.0}
    assert config["tie_word_embeddings"] is True
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_tokenizer_merges_splits_digits_and_keeps_control_tokens_whole(converted: Path) -> None:
    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>hell w12").tokens == ["<|im_start|>", "hell", "Ġw", "1", "2"]


@pytest.mark.parametrize("text", ["hello, world 42\n", "你好", "def f():\n\treturn 1", "🎉👩‍👩‍👧"])
def test_tokenizer_round_trips(converted: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_chat_template_is_carried_over(converted: Path) -> None:
    assert (converted / "chat_template.jinja").read_text() == tiny_gguf.CHAT_TEMPLATE


def test_unknown_tensor_is_refused_by_name(tmp_path: Path, tensors: dict[str, tiny_gguf.TinyTensor]) -> None:
    extra = {**tensors, "blk.0.attn_q_norm.weight": tensors["blk.0.attn_norm.weight"]}
    tiny_gguf.write_tiny_gguf(tmp_path / "tiny.gguf", extra)
    with pytest.raises(ModelError, match=r"blk\.0\.attn_q_norm\.weight"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path, SILENT)


def test_missing_tensor_is_refused_by_name(tmp_path: Path, tensors: dict[str, tiny_gguf.TinyTensor]) -> None:
    fewer = {name: tensor for name, tensor in tensors.items() if name != "blk.1.ffn_up.weight"}
    tiny_gguf.write_tiny_gguf(tmp_path / "tiny.gguf", fewer)
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path, SILENT)


def test_other_architecture_is_refused_by_name(tmp_path: Path, tensors: dict[str, tiny_gguf.TinyTensor]) -> None:
    tiny_gguf.write_tiny_gguf(tmp_path / "tiny.gguf", tensors, architecture="gemma")
    with pytest.raises(ModelError, match="'gemma'"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path, SILENT)


def test_unknown_pre_tokenizer_is_refused_by_name(tmp_path: Path, tensors: dict[str, tiny_gguf.TinyTensor]) -> None:
    tiny_gguf.write_tiny_gguf(tmp_path / "tiny.gguf", tensors, pre_tokenizer="martian")
    with pytest.raises(ModelError, match="'martian'"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path, SILENT)


def test_partial_rotary_is_refused(tmp_path: Path, tensors: dict[str, tiny_gguf.TinyTensor]) -> None:
    tiny_gguf.write_tiny_gguf(tmp_path / "tiny.gguf", tensors, rotary_size=4)
    with pytest.raises(ModelError, match="rotates 4 of 8"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path, SILENT)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "not.gguf").write_bytes(b"x" * 64)
    with pytest.raises(ModelError, match=r"not\.gguf cannot be read as GGUF"):
        convert_gguf(tmp_path / "not.gguf", tmp_path, SILENT)
