"""The two trace formats, from tiny files written here, and the spreading of clock ticks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.traces import TraceRow, load_trace, spread_ticks
from kvcache.errors import ConfigError

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.2299600,3180,8"
)
AZURE_ROWS = [TraceRow(0.0, 4808, 10), TraceRow(0.25, 3180, 8)]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def write_mooncake(path: Path, timestamps_ms: list[int]) -> None:
    rows = (
        {"timestamp": stamp, "input_length": 700 + number, "output_length": 5, "hash_ids": [0, number]}
        for number, stamp in enumerate(timestamps_ms)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_azure_csv_is_read_with_times_relative_to_its_first_row(tmp_path: Path) -> None:
    path = tmp_path / "conv.csv"
    path.write_bytes(AZURE.encode())
    assert load_trace(path, rng()) == AZURE_ROWS


def test_a_gzip_trace_reads_like_the_plain_one(tmp_path: Path) -> None:
    path = tmp_path / "conv.csv.gz"
    path.write_bytes(gzip.compress(AZURE.encode()))
    assert load_trace(path, rng()) == AZURE_ROWS


def test_azure_rows_with_a_time_zone_are_read(tmp_path: Path) -> None:
    path = tmp_path / "week.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.500000+00:00,1,2\n"
        "2024-05-10 00:00:02+00:00,3,4\n",
        encoding="utf-8",
    )
    assert load_trace(path, rng()) == [TraceRow(0.0, 1, 2), TraceRow(1.5, 3, 4)]


def test_mooncake_jsonl_is_read_in_milliseconds_with_its_prefix_blocks(tmp_path: Path) -> None:
    path = tmp_path / "synthetic.jsonl"
    write_mooncake(path, [0, 40, 277])
    assert load_trace(path, rng()) == [
        TraceRow(0.0, 700, 5, (0, 0)),
        TraceRow(0.04, 701, 5, (0, 1)),
        TraceRow(0.277, 702, 5, (0, 2)),
    ]


def test_a_quantised_trace_is_spread_inside_its_ticks_and_keeps_its_order(tmp_path: Path) -> None:
    path = tmp_path / "conversation.jsonl"
    write_mooncake(path, [0] * 10 + [3000] * 10 + [9000] * 10)
    rows = load_trace(path, rng())
    assert [row.input_tokens for row in rows] == list(range(700, 730))
    times = np.array([row.arrival_s for row in rows])
    assert (np.diff(times) > 0).all()
    # Rows stay in their own tick; the tick is the median distance, (3 + 6) / 2 s, capped by the next stamp.
    assert (times[:10] < 3.0).all()
    assert ((times[10:20] >= 3.0) & (times[10:20] < 7.5)).all()
    assert ((times[20:] >= 9.0) & (times[20:] < 13.5)).all()
    assert load_trace(path, rng()) == rows


def test_spread_arrivals_are_uniform_inside_the_tick() -> None:
    stamps = np.repeat(np.arange(100) * 3.0, 50)
    offsets = spread_ticks(stamps, rng()) - stamps
    deciles = np.histogram(offsets, bins=10, range=(0.0, 3.0))[0]
    assert deciles.sum() == 5000
    # Each decile is binomial with mean 500 and standard deviation 21.
    assert (abs(deciles - 500) < 5 * 21).all()


@pytest.mark.parametrize("times", [[0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.7, 0.9]])
def test_a_trace_without_ticks_is_left_alone(times: list[float]) -> None:
    assert spread_ticks(np.array(times), rng()).tolist() == times


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.txt", b"", "neither .csv"),
        ("t.csv", b"", "lacks the Azure columns"),
        ("t.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n", "no rows"),
        ("t.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,x,1\n", "line 2"),
        ("t.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1\n", "line 2"),
        ("t.jsonl", b'{"timestamp": 0}\n', "line 1: no field 'input_length'"),
        ("t.jsonl", b'{"timestamp": 0, "input_length": 0, "output_length": 1}\n', "line 1: token counts"),
        ("t.jsonl", b"[]\n", "line 1"),
        ("t.jsonl", b"\xff\xfe\n", "cannot read"),
        ("t.csv.gz", b"this is not gzip", "cannot read"),
        ("t.csv.gz", gzip.compress(AZURE.encode())[:-12], "cannot read"),
    ],
)
def test_an_unreadable_trace_is_refused_with_its_name(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_trace(path, rng())
    assert name in str(caught.value)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read trace none\.csv"):
        load_trace(tmp_path / "none.csv", rng())
