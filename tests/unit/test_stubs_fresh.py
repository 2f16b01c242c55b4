"""The checked-in protobuf stubs are what the checked-in .proto files compile to."""

from pathlib import Path

import pytest

from kvcache.transfer.generate import STUB_PATTERNS, find_in_packages, generate

ROOT = Path(__file__).resolve().parents[2]
PROTO = 'syntax = "proto3";\npackage sample;\nmessage Ping { uint64 id = 1; }\n'


def differing_stubs(root: Path, fresh: Path) -> list[str]:
    """Stubs under ``root`` that are missing, left over, or other than those under ``fresh``."""
    names = {*find_in_packages(root, *STUB_PATTERNS), *find_in_packages(fresh, *STUB_PATTERNS)}
    return sorted(str(name) for name in names if read(root / name) != read(fresh / name))


def read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A root that holds one .proto and its stubs."""
    root = tmp_path / "root"
    (root / "kvcache").mkdir(parents=True)
    (root / "kvcache" / "sample.proto").write_text(PROTO)
    generate(root, root)
    return root


def fresh_stubs(root: Path, tmp_path: Path) -> Path:
    out = tmp_path / "fresh"
    out.mkdir()
    generate(root, out)
    return out


def test_checked_in_stubs_are_fresh(tmp_path: Path) -> None:
    assert differing_stubs(ROOT, fresh_stubs(ROOT, tmp_path)) == [], "run `make proto`"


def test_unchanged_proto_has_fresh_stubs(sample: Path, tmp_path: Path) -> None:
    assert differing_stubs(sample, fresh_stubs(sample, tmp_path)) == []


def test_changed_proto_makes_its_stubs_stale(sample: Path, tmp_path: Path) -> None:
    (sample / "kvcache" / "sample.proto").write_text(PROTO.replace("uint64", "uint32"))

    assert "kvcache/sample_pb2.py" in differing_stubs(sample, fresh_stubs(sample, tmp_path))


def test_stub_without_a_proto_is_reported(sample: Path, tmp_path: Path) -> None:
    (sample / "kvcache" / "gone_pb2.py").write_text("")

    assert differing_stubs(sample, fresh_stubs(sample, tmp_path)) == ["kvcache/gone_pb2.py"]


def test_missing_stub_is_reported(sample: Path, tmp_path: Path) -> None:
    (sample / "kvcache" / "sample_pb2_grpc.py").unlink()

    assert differing_stubs(sample, fresh_stubs(sample, tmp_path)) == ["kvcache/sample_pb2_grpc.py"]


def test_root_without_a_proto_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \.proto"):
        generate(tmp_path, tmp_path)


def test_broken_proto_is_refused(tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "broken.proto").write_text("message {")

    with pytest.raises(ValueError, match=r"workers/broken\.proto"):
        generate(tmp_path, tmp_path)
