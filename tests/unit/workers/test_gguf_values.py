"""Every stored value is the one that the format defines, bit for bit; the gguf package is the reference."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from workers.model import gguf_values
from workers.model.gguf_file import GGUFTensor
from workers.model.gguf_types import READABLE_TYPES, TensorType, tensor_type, type_name
from workers.model.gguf_values import read_values

# Where the float16 numbers of a block stand; random bytes there could be infinite.
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}
ROWS, COLUMNS = 24, 512


def random_tensor(kind: TensorType) -> GGUFTensor:
    """Every other byte of the blocks is random, so that every bit of the layout is used."""
    rng = np.random.default_rng(11)
    if kind.is_plain:
        bits = torch.from_numpy(rng.standard_normal((ROWS, COLUMNS), dtype=np.float32))
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind.name]
        return GGUFTensor("t", (ROWS, COLUMNS), kind, bits.to(dtype).view(torch.uint8).numpy().reshape(-1))
    num_blocks = ROWS * COLUMNS // kind.block_values
    blocks = rng.integers(0, 256, (num_blocks, kind.block_bytes), dtype=np.uint8)
    for start in HALVES[kind.name]:
        halves = rng.standard_normal(num_blocks).astype(np.float16)
        blocks[:, start : start + 2] = halves.view(np.uint8).reshape(-1, 2)
    return GGUFTensor("t", (ROWS, COLUMNS), kind, blocks.reshape(-1))


def reference(tensor: GGUFTensor) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[tensor.kind.name]
    rows = tensor.data.reshape(ROWS, -1)
    if tensor.kind.name in ("F32", "F16"):
        rows = rows.view(np.float32 if tensor.kind.name == "F32" else np.float16)
    values: np.ndarray = dequantize(rows, kind)
    return values


@pytest.mark.parametrize("kind", READABLE_TYPES, ids=lambda kind: kind.name)
def test_float32_values_are_those_of_the_reference(kind: TensorType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_values, "CHUNK_VALUES", 5 * 256)  # several chunks, and a shorter last one
    tensor = random_tensor(kind)
    assert np.array_equal(read_values(tensor, torch.float32).numpy(), reference(tensor))


@pytest.mark.parametrize("kind", READABLE_TYPES, ids=lambda kind: kind.name)
def test_other_dtypes_are_rounded_once(kind: TensorType) -> None:
    tensor = random_tensor(kind)
    expected = torch.from_numpy(reference(tensor)).to(torch.bfloat16)
    assert torch.equal(read_values(tensor, torch.bfloat16), expected)


def test_sizes_of_blocks_and_names_are_those_of_the_format() -> None:
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        known = tensor_type(int(kind))
        assert known is None or (known.block_values, known.block_bytes) == sizes
        assert type_name(int(kind)) in (kind.name, f"type {int(kind)}")
    assert {kind for kind in map(tensor_type, range(64)) if kind is not None} == set(READABLE_TYPES)
