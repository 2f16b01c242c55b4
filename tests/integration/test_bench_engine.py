"""The engine bench on a tiny model: everything is measured and positive, in both ways to run the model."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import engine as bench
from benchmarks.engine import main
from benchmarks.engine_limits import MachineLimits
from benchmarks.engine_options import DecodeCase
from benchmarks.engine_ready import main as fresh_process
from benchmarks.engine_ready import measure_fresh_process
from benchmarks.engine_work import Engine, EngineSettings, StepTimes, num_blocks_needed, open_engine
from kvcache.errors import ResourceError
from workers.model.checkpoint import describe_checkpoint
from workers.model.fused_decoder import FusedDecoder
from workers.native.library import load_library

pytestmark = pytest.mark.integration

MAX_MODEL_LEN = 2048


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_MODEL_LEN,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def settings_for(folder: Path, step_model: str) -> EngineSettings:
    return EngineSettings(describe_checkpoint(folder, dtype="float32", device="cpu"), 1, step_model)


def numbers_in(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for inner in value.values() for number in numbers_in(inner)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("step_model", ["auto", "transformers"])
def test_one_run_writes_every_figure_and_shows_where_the_time_goes(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], step_model: str
) -> None:
    json_path = tmp_path / "r.json"
    flags = ["--model", str(tiny_llama), "--json", str(json_path), "--runs", "1", "--context", "5", "--profile"]
    flags += ["--step-model", step_model, "--prefill-tokens", "9", "520", "--batches", "1", "32"]
    assert main(flags) == 0
    result = json.loads(json_path.read_bytes())
    assert (result["model"], result["dtype"], result["threads"]) == ("tiny-llama", "float32", 1)
    assert result["runs"] == 1
    assert result["step_model"] == ("fused" if step_model == "auto" and load_library() else "transformers")
    assert set(result["prefill_tok_s"]) == {"9", "520"}
    assert set(result["decode_tok_s"]) == set(result["decode_tok_s_context_1024"]) == {"1", "32"}
    assert 0 < result["python_fraction_batch_32"] < 1
    assert set(result["limits"]) == {"gemm_gflops", "read_gb_s", "peak_gflops"}
    assert {"ready_s", "peak_memory_bytes", "fraction_of_limit", "machine", "versions", "date"} <= set(result)
    assert all(sum(parts.values()) == pytest.approx(1.0) for parts in result.pop("model_fractions").values())
    numbers = numbers_in(result)
    assert all(0 < number < math.inf for number in numbers)
    assert str(tmp_path.parent) not in json.dumps(result)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("prefill 520", "decode 32", "linears", "attention", "sampling"))


# Bytes of a weight, scales included, and the dtype of the KV.
WEIGHTS = {"bfloat16": (2.0, "bfloat16"), "int8": (1 + 2 / 64, "float32")}


@pytest.mark.skipif(load_library() is None, reason="no native build for this processor")
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_rounded_weights_are_what_is_measured_and_what_the_limits_are_of(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    weight_bytes, kv_dtype = WEIGHTS[dtype]
    opened: list[Engine] = []

    @asynccontextmanager
    async def watched(settings: EngineSettings, num_blocks: int, max_seqs: int) -> AsyncIterator[Engine]:
        async with open_engine(settings, num_blocks, max_seqs) as engine:
            opened.append(engine)
            yield engine

    monkeypatch.setattr(bench, "open_engine", watched)
    monkeypatch.setattr(bench, "measure_limits", lambda _dtype: MachineLimits(gemm_gflops=1.0, read_gb_s=1.0))
    json_path = tmp_path / "r.json"
    flags = ["--model", str(tiny_llama), "--json", str(json_path), "--runs", "1", "--context", "5", "--dtype", dtype]
    assert main([*flags, "--prefill-tokens", "9", "--batches", "2"]) == 0
    (engine,) = opened
    assert isinstance(engine.step_model, FusedDecoder)
    assert engine.step_model.weight_format.name.lower() == dtype
    assert engine.storage.spec.dtype == kv_dtype
    result = json.loads(json_path.read_bytes())
    assert (result["model"], result["dtype"], result["kv_cache_dtype"]) == ("tiny-llama", dtype, "auto")
    assert result["step_model"] == "fused"
    assert set(result["prefill_tok_s"]) == {"9"} and set(result["decode_tok_s"]) == {"2"}
    assert all(0 < number < math.inf for number in numbers_in(result))
    # Query and output 32 x 32, key and value 16 x 32, gate, up and down 32 x 32; the head 64 x 32.
    weights = 2 * 1024 + 2 * 512 + 3 * 1024 + 2048
    token_bytes = 2 * 16 * engine.storage.layers[0].element_size()
    needed = weights * weight_bytes + 2 * DecodeCase(2, 5).mean_attended * token_bytes
    told = result["fraction_of_limit"]["decode_of_read"]["2"] * 1e9 / (result["decode_tok_s"]["2"] / 2)
    assert told == pytest.approx(needed)


@pytest.mark.parametrize("step_model", ["auto", "transformers"])
def test_prompts_come_in_chunks_and_only_decode_steps_after_the_warm_up_count(
    tiny_llama: Path, step_model: str
) -> None:
    async def run() -> tuple[list[StepTimes], list[StepTimes]]:
        blocks = num_blocks_needed([1030], batches=[3], contexts=[20])
        async with open_engine(settings_for(tiny_llama, step_model), blocks, max_seqs=3) as engine:
            await asyncio.sleep(0)  # the loop has found nothing to do and waits
            decode = await engine.decode(batch=3, context=20, num_steps=4)
            return await engine.prefill(1030), decode

    prefill, decode = asyncio.run(run())
    assert (len(prefill), len(decode)) == (3, 4)
    assert all(step.model > 0 and step.total > step.model for step in prefill + decode)


def test_a_fresh_process_says_in_one_line_why_it_cannot_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert fresh_process([str(tmp_path), "float32", "1", "auto", "auto", "8"]) == 1
    captured = capsys.readouterr()
    assert "no weights" in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_a_fresh_process_that_dies_is_an_error_and_no_figure(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho ready\necho one >&2\necho two >&2\nexit 3\n", encoding="utf-8")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    with pytest.raises(ResourceError, match=r"^A fresh process ended with status 3: two$"):
        measure_fresh_process(settings_for(tiny_llama, "auto"), num_tokens=8)


def test_a_model_that_is_not_there_is_one_sentence_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
