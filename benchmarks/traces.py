"""Loader for public traces of serving traffic: Azure CSV and Mooncake JSONL, plain or gzip-compressed.

The user gives the path; no trace comes with the project. The formats::

    Azure     TIMESTAMP,ContextTokens,GeneratedTokens      2023-11-16 18:17:03.9799600,4808,10
    Mooncake  {"timestamp": 3000 (ms), "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, ...]}

Azure: Patel et al., "Splitwise", ISCA 2024. Mooncake: Qin et al., "Mooncake", FAST 2025; one hash id names
one block of ``MOONCAKE_BLOCK_TOKENS`` prompt tokens, and equal leading ids mean an equal prompt prefix.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TextIO

import numpy as np
import orjson
from numpy.typing import NDArray

from kvcache.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace. ``arrival_s`` counts from the start of the trace."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    prefix_block_ids: tuple[int, ...] = ()


def load_trace(path: Path, rng: np.random.Generator) -> list[TraceRow]:
    """All rows in the order of arrival. ``rng`` is drawn from only when arrivals must be spread inside ticks.

    The format follows from the name (``.csv``, ``.jsonl``, each with or without ``.gz``). Raises ConfigError,
    in one sentence with file name and line, for anything that cannot be read.
    """
    parse = _parser_for(path)
    rows: list[TraceRow] = []
    try:
        with _open_text(path) as text:
            rows.extend(parse(text, path.name))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot read trace {path.name}: {reason}") from error
    if not rows:
        raise ConfigError(f"trace {path.name} has no rows")
    rows.sort(key=lambda row: row.arrival_s)
    times = spread_ticks(np.array([row.arrival_s for row in rows]), rng)
    return [
        TraceRow(float(time), row.input_tokens, row.output_tokens, row.prefix_block_ids)
        for time, row in zip(times, rows, strict=True)
    ]


def spread_ticks(times_s: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Undo a logger's clock ticks: spread the arrivals of one tick uniformly over that tick.

    ``times_s`` is sorted; so is the result, and rows keep their order. A trace counts as quantised when more
    than half of its gaps are zero, its tick is then the median distance of distinct stamps; any other trace
    comes back unchanged. Without this, the conversation trace of Mooncake (ticks of 3 s, 90 % of the gaps
    zero) sends its requests in volleys, and the tail of TTFT measures the logger.
    """
    gaps = np.diff(times_s)
    if gaps.size == 0 or np.mean(gaps == 0) <= 0.5 or not gaps.any():
        return times_s
    tick_s = float(np.median(gaps[gaps > 0]))
    stamps, members = np.unique(times_s, return_inverse=True)
    # A tick ends where the next stamp begins, so that jittering ticks do not overlap.
    widths = np.minimum(np.append(np.diff(stamps), tick_s), tick_s)
    return np.sort(times_s + rng.random(times_s.size) * widths[members])


def _parser_for(path: Path) -> Callable[[TextIO, str], Iterator[TraceRow]]:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".csv"):
        return _parse_azure
    if name.endswith((".jsonl", ".json")):
        return _parse_mooncake
    raise ConfigError(f"trace {path.name} is neither .csv (Azure) nor .jsonl (Mooncake), with or without .gz")


def _open_text(path: Path) -> TextIO:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open("r", encoding="utf-8", newline="")


def _parse_azure(text: TextIO, name: str) -> Iterator[TraceRow]:
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    reader = csv.DictReader(text)
    if not set(columns) <= set(reader.fieldnames or ()):
        raise ConfigError(f"trace {name} lacks the Azure columns {', '.join(columns)}")
    start: datetime | None = None
    for record in reader:
        try:
            stamp, input_tokens, output_tokens = (record[column] for column in columns)
            moment = datetime.fromisoformat(stamp)
            start = start or moment
            yield _row((moment - start).total_seconds(), int(input_tokens), int(output_tokens), ())
        except (TypeError, ValueError) as error:
            raise ConfigError(f"trace {name}, line {reader.line_num}: {error}") from error


def _parse_mooncake(text: TextIO, name: str) -> Iterator[TraceRow]:
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        try:
            record = orjson.loads(line)
            arrival_s = float(record["timestamp"]) / 1000.0
            block_ids = tuple(int(block_id) for block_id in record.get("hash_ids", ()))
            yield _row(arrival_s, int(record["input_length"]), int(record["output_length"]), block_ids)
        except KeyError as error:
            raise ConfigError(f"trace {name}, line {number}: no field {error}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"trace {name}, line {number}: {error}") from error


def _row(arrival_s: float, input_tokens: int, output_tokens: int, block_ids: tuple[int, ...]) -> TraceRow:
    if input_tokens < 1 or output_tokens < 1:
        raise ValueError("token counts must be positive")
    return TraceRow(arrival_s, input_tokens, output_tokens, block_ids)
