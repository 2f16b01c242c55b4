"""The digest by which workers on several machines are compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from workers.model.identity import NUM_SAMPLES, SAMPLE_BYTES, checkpoint_digest

WEIGHT_BYTES = 3 * NUM_SAMPLES * SAMPLE_BYTES


def saved(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "tokenizer.json").write_text('{"b": 2}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * (WEIGHT_BYTES // 256))
    return folder


def test_a_copy_elsewhere_is_the_same_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    copy = shutil.copytree(folder, tmp_path / "snapshot")
    (copy / "README.md").write_text("of somebody who fetched it")
    assert checkpoint_digest(copy) == checkpoint_digest(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_another_configuration_or_vocabulary_is_another_checkpoint(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "model")
    before = checkpoint_digest(folder)
    (folder / name).write_text('{"a": 3}')
    assert checkpoint_digest(folder) != before


@pytest.mark.parametrize("part", [0.0, 0.33, 0.5, 0.9])
def test_weights_that_differ_from_some_layer_on_are_another_checkpoint(tmp_path: Path, part: float) -> None:
    folder = saved(tmp_path / "model")
    before = checkpoint_digest(folder)
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(int(part * WEIGHT_BYTES))
        stream.write(b"x" * (WEIGHT_BYTES // 16))
    assert checkpoint_digest(folder) != before


def test_a_gguf_file_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    file, renamed, other = (tmp_path / f"{name}.gguf" for name in "abc")
    file.write_bytes(b"GGUF" + b"1" * SAMPLE_BYTES)
    renamed.write_bytes(file.read_bytes())
    other.write_bytes(b"GGUF" + b"2" * SAMPLE_BYTES)
    assert checkpoint_digest(file) == checkpoint_digest(renamed) != checkpoint_digest(other)
