"""Blocks outside the cache: records that prove what they are, and tiers that keep to their limits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.errors import ResourceError, TransferError
from kvcache.storage import PagedStorage
from kvcache.tiers.file_tier import FileTier
from kvcache.tiers.host_tier import HostTier, Record
from kvcache.tiers.record import decode_block, encode_block
from tests.builders import fill_with_noise, make_spec, repeatable

SPEC = make_spec()
NAME, OTHER = bytes(range(32)), bytes(range(1, 33))


@pytest.fixture(scope="module")
def layers() -> list[bytes]:
    storage = PagedStorage(SPEC, 2)
    fill_with_noise(storage, seed=1)
    return [bytes(storage.read_blocks(layer, [1])) for layer in range(SPEC.num_layers)]


def name(index: int) -> bytes:
    return index.to_bytes(32, "big")


def test_a_block_comes_back_as_it_was(layers: list[bytes]) -> None:
    assert [bytes(layer) for layer in decode_block(NAME, SPEC, encode_block(NAME, layers))] == layers


Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, Damage] = {
    "first bit": lambda record: bytes((record[0] ^ 1,)) + record[1:],
    "a bit in the middle": lambda record: record[:200] + bytes((record[200] ^ 16,)) + record[201:],
    "last bit": lambda record: record[:-1] + bytes((record[-1] ^ 128,)),
    "cut off": lambda record: record[:-1],
    "cut at a layer": lambda record: record[: len(record) // 2],
    "longer": lambda record: record + b"\x00",
    "twice": lambda record: record * 2,
    "empty": lambda record: b"",
    "zeros": lambda record: bytes(len(record)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_record_is_refused(layers: list[bytes], damage: Damage) -> None:
    with pytest.raises(TransferError):
        decode_block(NAME, SPEC, damage(encode_block(NAME, layers)))


def test_a_record_of_another_block_or_another_cache_is_refused(layers: list[bytes]) -> None:
    record = encode_block(NAME, layers)
    for block_name, spec in ((OTHER, SPEC), (NAME, make_spec(num_layers=1)), (NAME, make_spec(block_size=8))):
        with pytest.raises(TransferError):
            decode_block(block_name, spec, record)


@given(steps=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60), st.booleans()), max_size=40))
@repeatable(100)
def test_memory_holds_what_was_used_last_under_its_limit(steps: list[tuple[int, int, bool]]) -> None:
    tier = HostTier(limit_bytes=100)
    expected: list[tuple[bytes, int]] = []  # oldest first
    for index, size, is_read in steps:
        known = next((pair for pair in expected if pair[0] == name(index)), None)
        if is_read:
            assert (tier.get(name(index)) is not None) is (known is not None)
        if known is not None:
            expected.remove(known)
        if not is_read or known is not None:
            expected.append((name(index), size if not is_read else known[1] if known else 0))
        if not is_read:
            evicted = tier.put(Record(name(index), bytes(size)))
            gone = []
            while sum(each for _, each in expected) > 100:
                gone.append(expected.pop(0)[0])
            assert [record.name for record in evicted] == gone
        assert tier.num_bytes == sum(each for _, each in expected) <= 100
        assert all(each in tier for each, _ in expected)


def test_memory_without_room_hands_everything_on() -> None:
    record = Record(NAME, b"x")
    assert HostTier(0).put(record) == [record]


def test_files_hold_what_was_used_last_under_their_limit(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, limit_bytes=30)
    for index in range(3):
        tier.write(Record(name(index), bytes(10)))
    assert tier.read(name(0)) == bytes(10)
    tier.write(Record(name(3), bytes(10)))
    assert [name(index) in tier for index in range(4)] == [True, False, True, True]
    assert (tier.num_bytes, tier.evictions) == (30, 1)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.kv")) == 30


def test_files_survive_a_restart_in_the_order_of_their_use(tmp_path: Path) -> None:
    first = FileTier(tmp_path, limit_bytes=30)
    for index in range(3):
        first.write(Record(name(index), bytes((index,)) * 10))
        os.utime(first._path(name(index)), ns=(index, index))
    assert first.read(name(0)) is not None
    second = FileTier(tmp_path, limit_bytes=20)  # less than there is
    assert [name(index) in second for index in range(3)] == [True, False, True]
    assert second.read(name(2)) == b"\x02" * 10


def test_what_is_no_record_of_ours_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    for file in ("note.txt", "short.kv", "z" * 64 + ".kv"):
        (tmp_path / "ab" / file).write_bytes(b"x")
    half_written = tmp_path / "ab" / ("ab" * 32 + ".tmp")
    half_written.write_bytes(b"x")
    assert FileTier(tmp_path, limit_bytes=30).num_bytes == 0
    assert not half_written.exists()
    assert (tmp_path / "ab" / "note.txt").exists()


def test_a_file_that_is_gone_is_a_miss(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, limit_bytes=30)
    tier.write(Record(NAME, b"x"))
    tier._path(NAME).unlink()
    assert tier.read(NAME) is None
    assert (NAME in tier, tier.num_bytes) == (False, 0)


def test_other_users_cannot_read_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    FileTier(folder, limit_bytes=30)
    assert folder.stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError, match="file/kv"):
        FileTier(tmp_path / "file" / "kv", limit_bytes=30)


def in_memory(*indices: int) -> HostTier:
    """The last was used last."""
    host = HostTier(1 << 20)
    for index in indices:
        assert host.put(Record(name(index), bytes((index,)) * 10)) == []
    return host


def test_what_was_in_memory_survives_in_files_in_the_order_of_its_use(tmp_path: Path) -> None:
    files = FileTier(tmp_path, limit_bytes=50)
    for index in (0, 1):
        files.write(Record(name(index), bytes((index,)) * 10))
        os.utime(files._path(name(index)), ns=(index, index))
    assert files.write_newest(in_memory(2, 3, 4).newest_first(), lambda: True) == 3
    times = [files._path(name(index)).stat().st_mtime_ns for index in range(5)]
    assert times == sorted(times)
    again = FileTier(tmp_path, limit_bytes=50)
    assert [again.read(name(index)) for index in range(5)] == [bytes((index,)) * 10 for index in range(5)]


def test_what_has_no_room_in_files_is_what_was_not_used_for_longest(tmp_path: Path) -> None:
    files = FileTier(tmp_path, limit_bytes=30)
    for index in (0, 3):  # 3 is in memory too, and would be the next but one to go
        files.write(Record(name(index), bytes((index,)) * 10))
    assert files.write_newest(in_memory(1, 2, 3, 4).newest_first(), lambda: True) == 3
    assert [name(index) in files for index in range(5)] == [False, False, True, True, True]
    assert files.num_bytes == 30


def test_when_time_runs_out_the_most_recently_used_are_in_files(tmp_path: Path) -> None:
    files = FileTier(tmp_path, limit_bytes=1000)
    answers = iter((True, True, False))
    assert files.write_newest(in_memory(1, 2, 3, 4).newest_first(), lambda: next(answers)) == 2
    assert [name(index) in files for index in range(1, 5)] == [False, False, True, True]


def test_a_disk_that_is_full_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = FileTier(tmp_path, limit_bytes=1000)
    write_bytes = Path.write_bytes

    def fills_up(path: Path, data: bytes) -> int:
        if data[0] == 3:
            raise OSError("No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", fills_up)
    with pytest.raises(OSError, match="No space"):
        files.write_newest(in_memory(2, 3, 4).newest_first(), lambda: True)
    assert [name(index) in files for index in (2, 3, 4)] == [False, False, True]
