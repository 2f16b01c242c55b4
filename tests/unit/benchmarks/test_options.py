"""Flags: defaults, and one clear sentence for what does not fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.measurements import GoodputLimits
from benchmarks.options import DEFAULT_NUM_PROMPTS, parse_options
from benchmarks.workload import LengthRange
from kvcache.errors import ConfigError


def test_defaults_send_a_fixed_number_at_once_to_the_first_model() -> None:
    options = parse_options([])
    assert options.model is None
    assert math.isinf(options.request_rate)
    assert options.num_prompts == DEFAULT_NUM_PROMPTS
    assert options.ignore_eos is True


def test_flags_become_typed_values() -> None:
    flags = (
        "--base-url http://h:1/v1/ --model m --request-rate 2.5 --duration 9 --input-tokens uniform:3:4"
        " --no-ignore-eos --goodput ttft:1500 tpot:120"
    )
    options = parse_options(flags.split())
    assert (options.base_url, options.model, options.request_rate) == ("http://h:1", "m", 2.5)
    assert (options.num_prompts, options.duration_s) == (None, 9.0)
    assert options.input_lengths == LengthRange(3, 4)
    assert options.ignore_eos is False
    assert options.goodput == GoodputLimits(ttft_ms=1500.0, tpot_ms=120.0)


def test_a_trace_without_limits_is_replayed_whole() -> None:
    assert parse_options(["--trace", "t.csv"]).num_prompts is None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--request-rate 0", "--request-rate: '0' is not a positive number"),
        ("--burstiness x", "--burstiness: 'x' is not"),
        ("--num-prompts 0", "--num-prompts: '0' is not"),
        ("--seed -1", "--seed: '-1' is not"),
        ("--temperature nan", "--temperature"),
        ("--input-tokens uniform:9:3", "--input-tokens: 'uniform:9:3' is not"),
        ("--token-ids 9:3", "--token-ids: '9:3' is not"),
        ("--endpoint embeddings", "--endpoint"),
        ("--no-such-flag", "--no-such-flag"),
        ("--duration 5", "--duration needs"),
        ("--trace-scale 2", "--trace-scale needs --trace"),
        ("--trace t.csv --request-rate 2", "--request-rate cannot be used with --trace"),
        ("--trace t.csv --input-tokens 2", "--input-tokens cannot be used with --trace"),
        ("--goodput ttft", "--goodput 'ttft'"),
        ("--goodput ttft:1 ttft:2", "each once"),
        ("--goodput latency:5", "--goodput takes"),
        ("--base-url 127.0.0.1:8000", "--base-url must look like"),
        ("--base-url http://host:port", "--base-url must look like"),
        ("--base-url http://user:word@host", "--base-url must look like"),
    ],
)
def test_flags_that_do_not_fit_are_refused_by_name(flags: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options(flags.split())
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_result_file_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "result.json"):
        with pytest.raises(ConfigError, match="--json"):
            parse_options(["--json", str(path)])
