"""A GGUF file is read as it was written; a damaged one ends in one sentence, whatever is wrong with it."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.errors import ModelError
from tests.unit.workers import tiny_gguf
from workers.model.gguf_checkpoint import open_gguf
from workers.model.gguf_file import read_gguf
from workers.model.gguf_tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("source") / "tiny.gguf"
    tiny_gguf.write_tiny_gguf(file, tiny_gguf.tiny_tensors(np.random.default_rng(5)))
    return file


def test_metadata_are_those_that_the_gguf_package_reads(source: Path) -> None:
    expected = {name: field.contents() for name, field in GGUFReader(source).fields.items()}
    found = read_gguf(source).metadata
    for key, value in found.items():
        plain = value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, tuple) else value
        assert plain == expected[key], key
    assert set(expected) - set(found) == {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}


def test_tensors_are_those_that_the_gguf_package_reads(source: Path) -> None:
    expected = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    found = read_gguf(source).tensors
    assert len(found) == len(expected)
    for tensor in found:
        other = expected[tensor.name]
        assert tensor.shape == tuple(reversed([int(size) for size in other.shape]))
        assert tensor.kind.name == other.tensor_type.name
        assert tensor.data.tobytes() == other.data.tobytes()


def test_every_kind_of_number_is_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "n.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -30_000)
    writer.add_int32("i32", -(1 << 31))
    writer.add_uint64("u64", 1 << 63)
    writer.add_int64("i64", -(1 << 62))
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "n.gguf").metadata
    assert [found[key] for key in ("u8", "i8", "u16", "i16", "i32", "u64", "i64", "f64", "yes")] == [
        200,
        -100,
        60_000,
        -30_000,
        -(1 << 31),
        1 << 63,
        -(1 << 62),
        0.1,
        True,
    ]


def header_size(file: Path) -> int:
    return min(int(tensor.data_offset) for tensor in GGUFReader(file).tensors)


def refusal(file: Path) -> str:
    """Why the file is refused; nothing if it is not."""
    try:
        build_tokenizer(open_gguf(file).tokenizer)
    except ModelError as error:
        return str(error)
    return ""


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_one_sentence(source: Path, data: st.DataObject) -> None:
    """Bytes of the header are replaced, and the file may end early: nothing but ModelError comes out."""
    content = bytearray(source.read_bytes())
    end = header_size(source)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, end - 8))
        size = data.draw(st.sampled_from([1, 4, 8]))
        content[position : position + size] = data.draw(st.binary(min_size=size, max_size=size))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    damaged = source.with_name("damaged.gguf")
    damaged.write_bytes(content)
    assert "\n" not in refusal(damaged)


@pytest.mark.parametrize("number", [b"GGUF", b"GGUE"])
@pytest.mark.parametrize("count", [1 << 40, (1 << 64) - 1])
def test_huge_counts_are_refused_before_anything_is_taken(tmp_path: Path, number: bytes, count: int) -> None:
    for counts in ((count, 0), (0, count)):
        (tmp_path / "x.gguf").write_bytes(number + struct.pack("<IQQ", 3, *counts) + bytes(64))
        with pytest.raises(ModelError, match="cannot be read as GGUF"):
            read_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read as GGUF"),
        (b"x" * 64, "does not begin with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "its version is 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "no metadata general.architecture"),
    ],
)
def test_what_is_not_a_model_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=reason):
        open_gguf(tmp_path / "x.gguf")


def test_a_type_that_is_not_read_is_named_with_its_tensor(tmp_path: Path) -> None:
    tensors = tiny_gguf.tiny_tensors(np.random.default_rng(5))
    raw = np.zeros((tiny_gguf.HIDDEN_SIZE, 2 * 22), dtype=np.uint8)
    tensors["blk.1.ffn_down.weight"] = tiny_gguf.TinyTensor(gguf.GGMLQuantizationType.Q5_0, raw)
    tiny_gguf.write_tiny_gguf(tmp_path / "x.gguf", tensors)
    with pytest.raises(ModelError, match=r"stores blk\.1\.ffn_down\.weight as Q5_0"):
        open_gguf(tmp_path / "x.gguf")


def write_split(folder: Path, count: int) -> list[Path]:
    """The tiny model in parts: metadata in the first, tensors dealt out."""
    whole = tiny_gguf.tiny_tensors(np.random.default_rng(5))
    parts = [folder / f"tiny-{index + 1:05}-of-{count:05}.gguf" for index in range(count)]
    for index, part in enumerate(parts):
        chosen = {name: whole[name] for name in list(whole)[index::count]}
        tiny_gguf.write_tiny_gguf(part, chosen, split=(index, count))
    return parts


def test_a_model_in_parts_is_the_whole_model(tmp_path: Path, source: Path) -> None:
    parts = write_split(tmp_path, 3)
    found = {weight.name: weight.tensor.data.tobytes() for weight in open_gguf(parts[0]).weights}
    assert found == {weight.name: weight.tensor.data.tobytes() for weight in open_gguf(source).weights}


def test_a_part_that_is_not_the_first_says_which_to_give(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"one of 2 parts .* give the first, whose name ends in -00001-of-00002\.gguf"):
        open_gguf(write_split(tmp_path, 2)[1])


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = write_split(tmp_path, 3)
    parts[2].unlink()
    with pytest.raises(ModelError, match=r"needs tiny-00003-of-00003\.gguf"):
        open_gguf(parts[0])


def test_a_tensor_in_two_parts_is_named(tmp_path: Path) -> None:
    parts = write_split(tmp_path, 2)
    tiny_gguf.write_tiny_gguf(parts[1], tiny_gguf.tiny_tensors(np.random.default_rng(5)), split=(1, 2))
    with pytest.raises(ModelError, match="twice"):
        open_gguf(parts[0])
