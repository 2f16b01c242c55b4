"""The engine bench: costs against numbers worked out by hand, pieces of a step, keys of the result, flags."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from benchmarks import engine_limits
from benchmarks.engine import main
from benchmarks.engine_limits import (
    GEMM_SIZES,
    READ_BYTES,
    READ_ROWS,
    MachineLimits,
    ModelCosts,
    measure_limits,
    read_costs,
    ways_to_read,
)
from benchmarks.engine_options import DecodeCase, Options, check_lengths, parse_options
from benchmarks.engine_profile import ModelSplit, mean_split, part_of
from benchmarks.engine_ready import FreshProcess, high_water_mark
from benchmarks.engine_report import Measurements, build_result, profile_tables, result_table
from benchmarks.engine_work import (
    PIECES,
    EngineSettings,
    StepClock,
    StepTimes,
    fractions_of_step,
    num_blocks_needed,
    split_step,
    wrapped,
)
from kvcache.errors import ConfigError, ModelError
from workers.model.checkpoint import CheckpointInfo, describe_checkpoint
from workers.native.library import chosen_build, load_library, missing_instructions

TINY: dict[str, Any] = {
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
}
COSTS = ModelCosts(
    layer_weights=100, head_weights=40, attention_width=6, weight_bytes=2, head_bytes=2, kv_token_bytes=8
)
STEP = StepTimes(scheduling=2.5, build_inputs=2.0, model=14.0, sampling=1.5)


def save(folder: Path, model: Any) -> CheckpointInfo:
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return describe_checkpoint(folder, dtype="float32", device="cpu")


def measured(options: Options, split: ModelSplit | None = None) -> Measurements:
    """20 s per step: two steps of each prompt, four of each decode case, in each run."""
    return Measurements(
        step_model="fused",
        limits=MachineLimits(1e-9, 1e-8, peak_gflops=4e-9),  # 1 FLOP/s, 10 bytes/s, at most 4 FLOP/s
        prefill={length: [[STEP] * 2] * options.runs for length in options.prefill_tokens},
        decode={case: [[STEP] * 4] * options.runs for case in options.decode_cases},
        split=split,
    )


def test_a_prompt_costs_every_layer_weight_per_token_the_head_once_and_causal_attention() -> None:
    # 3 tokens: 2 * 100 * 3 for the layers, 2 * 40 for one row of logits, 4 * 6 for each of 1 + 2 + 3 pairs.
    assert COSTS.prefill_flops(3) == 600 + 80 + 144


def test_a_decode_step_costs_all_weights_per_sequence_and_reads_them_once_beside_every_sequence_s_kv() -> None:
    assert COSTS.decode_flops(2, 5) == 2 * (2 * 140 + 4 * 6 * 5)
    assert COSTS.decode_bytes(2, 5) == 140 * 2 + 2 * 5 * 8


@pytest.mark.parametrize("tied", [False, True])
def test_costs_come_from_the_shapes_in_the_checkpoint(tmp_path: Path, tied: bool) -> None:
    checkpoint = save(tmp_path, LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=tied)))
    # Per layer: query and output 8 x 8, key and value 4 x 8, gate, up and down 8 x 12.
    assert read_costs(checkpoint, EngineSettings(checkpoint, 1, "auto").spec, checkpoint.dtype) == ModelCosts(
        layer_weights=2 * (2 * 64 + 2 * 32 + 3 * 96),
        head_weights=10 * 8,
        attention_width=2 * 2 * 4,
        weight_bytes=4,
        head_bytes=4,
        kv_token_bytes=2 * 2 * 4 * 4,
    )


def test_a_mixture_of_experts_is_refused_and_not_measured_against_a_wrong_limit(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=2)))
    with pytest.raises(ModelError, match="mixture of experts"):
        read_costs(checkpoint, EngineSettings(checkpoint, 1, "auto").spec, checkpoint.dtype)


def test_the_read_limit_is_the_best_of_ways_that_each_read_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.ones(4 * READ_ROWS)
    ways = ways_to_read(values)
    assert [float(read().sum()) for read in ways] == [values.numel()] * len(ways)
    seconds = iter([1.0] * len(GEMM_SIZES) + [4.0, 3.0, 0.5, 2.0, 2.0][: len(ways)] + [1.0])
    monkeypatch.setattr(engine_limits, "_best_seconds", lambda _work: next(seconds))
    assert measure_limits().read_gb_s == READ_BYTES / 0.5 / 1e9


@pytest.mark.skipif(load_library() is None, reason="no native build for this processor")
def test_the_peak_counts_every_number_that_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rounded number is as many products per vector as it is narrower than a float, or as many as a float."""
    monkeypatch.setattr(engine_limits, "MULTIPLY_ROUNDS", 16)
    monkeypatch.setattr(engine_limits, "_best_seconds", lambda _work: 1.0)
    peaks = {dtype: measure_limits(dtype).peak_gflops or 0.0 for dtype in ("float32", "bfloat16", "int8")}
    products = 16 * 12 * 16 if "avx512" in (chosen_build() or "") else 16 * 6 * 8
    assert peaks["float32"] * 1e9 == pytest.approx(2 * products * torch.get_num_threads())
    widened = {dtype: missing_instructions(dtype) is not None for dtype in ("bfloat16", "int8")}
    assert peaks["bfloat16"] / peaks["float32"] == pytest.approx(1 if widened["bfloat16"] else 2)
    assert peaks["int8"] / peaks["float32"] == pytest.approx(1 if widened["int8"] else 4)


def test_the_better_of_two_limits_is_the_larger_of_each() -> None:
    assert MachineLimits(1.0, 4.0, 2.0).better_of(MachineLimits(3.0, 2.0, 1.0)) == MachineLimits(3.0, 4.0, 2.0)
    assert MachineLimits(1.0, 1.0).better_of(MachineLimits(1.0, 1.0)).peak_gflops is None


def test_the_pieces_of_a_step_add_up_to_it() -> None:
    spent = {"execute": 17.5, "logits": 16.0, "model": 14.0}
    assert split_step(spent, total=20.0) == STEP
    assert STEP.total == 20.0
    assert sum(fractions_of_step([STEP, STEP]).values()) == pytest.approx(1.0)
    assert fractions_of_step([STEP, STEP])["model"] == pytest.approx(0.7)


def test_a_step_begins_where_the_one_before_ends() -> None:
    clock = StepClock()
    clock.start()
    for _ in range(2):
        with clock.piece("execute"), clock.piece("logits"), clock.piece("model"):
            pass
        clock.end_step()
    assert len(clock.steps) == 2 and all(min(step.scheduling, step.model) > 0 for step in clock.steps)
    clock.start()
    assert clock.steps == []


def test_a_wrapped_call_is_put_back_as_it_was() -> None:
    owner = SimpleNamespace(own=abs)
    entered = []

    @contextmanager
    def around() -> Iterator[None]:
        entered.append(True)
        yield

    module = torch.nn.Identity()
    with wrapped(owner, "own", around), wrapped(module, "forward", around):
        assert (owner.own(-3), module(5)) == (3, 5)
    assert len(entered) == 2
    assert owner.own is abs and "forward" not in vars(module)


def test_blocks_suffice_for_the_largest_case() -> None:
    longest = DecodeCase(batch=3, context=40).longest
    assert 3 * longest <= 16 * num_blocks_needed([10], batches=[1, 3], contexts=[32, 40]) < 3 * (longest + 16)
    assert num_blocks_needed([2048], batches=[1], contexts=[32]) == 129


def test_a_timed_step_attends_to_the_mean_of_the_first_and_the_last() -> None:
    case = DecodeCase(batch=1, context=100)
    assert case.mean_attended == (100 + 2 + 1 + (case.longest - 1)) / 2


def test_peak_memory_is_the_high_water_mark_in_bytes() -> None:
    assert high_water_mark("VmPeak:\t  9000 kB\nVmHWM:\t    300 kB\nVmRSS:\t    200 kB\n") == 300 * 1024


def test_modules_are_known_by_their_kind() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    layer = model.model.layers[0]
    known = (model.model.embed_tokens, layer.mlp.up_proj, layer.input_layernorm, layer.self_attn, layer)
    assert [part_of(module) for module in known] == ["embedding", "linears", "norms", None, None]


def test_what_is_no_known_part_of_the_model_is_other() -> None:
    step = {"model": 10.0, "linears": 4.0, "attention": 3.0, "norms": 1.0, "embedding": 0.5}
    assert mean_split([step, step]) == {
        "embedding": 0.5,
        "attention": 3.0,
        "linears": 4.0,
        "norms": 1.0,
        "head": 0.0,
        "other": 1.5,
    }


def test_rates_are_tokens_over_all_of_the_time_and_fractions_are_needs_over_limits() -> None:
    options = parse_options(["--prefill-tokens", "80", "--batches", "32", "1", "--runs", "3"])
    result = build_result(options, COSTS, measured(options), [FreshProcess(3.0, 5), FreshProcess(4.0, 7)])
    assert result.prefill_tok_s == {"80": 80 / 40}
    assert result.decode_tok_s == {"32": 32 * 4 / 80, "1": 4 / 80}
    assert (result.ready_s, result.peak_memory_bytes) == (3.5, 7)
    assert result.python_fraction_batch_32 == pytest.approx(0.3)
    fractions = result.fraction_of_limit
    assert fractions.prefill_of_gemm["80"] == pytest.approx(COSTS.prefill_flops(80) / 40 / 1.0)
    assert fractions.prefill_of_peak is not None and fractions.decode_of_peak is not None
    assert fractions.prefill_of_peak["80"] == pytest.approx(COSTS.prefill_flops(80) / 40 / 4.0)
    attended = DecodeCase(32, 32).mean_attended
    assert fractions.decode_of_read["32"] == pytest.approx(COSTS.decode_bytes(32, attended) / 20 / 10)
    assert fractions.decode_of_gemm["32"] == pytest.approx(COSTS.decode_flops(32, attended) / 20 / 1.0)
    assert fractions.decode_of_peak["32"] == pytest.approx(COSTS.decode_flops(32, attended) / 20 / 4.0)
    assert result.sampled_batch_32 is not None and result.sampled_batch_32.tok_s == 32 * 4 / 80


def test_the_json_has_the_agreed_keys_and_no_path(tmp_path: Path) -> None:
    options = parse_options(["--model", str(tmp_path)])
    result = build_result(options, COSTS, measured(options), [FreshProcess(3.0, 5)])
    written = orjson.loads(orjson.dumps(result))
    assert set(written) >= {"model", "dtype", "threads", "step_model", "runs", "machine", "versions", "date"}
    assert set(written["prefill_tok_s"]) == {"512", "2048"}
    assert set(written["decode_tok_s"]) == set(written["decode_tok_s_context_1024"]) == {"1", "8", "32"}
    assert set(written["limits"]) == {"gemm_gflops", "read_gb_s", "peak_gflops"}
    assert set(written["step_fractions_batch_32"]) == set(PIECES)
    assert set(written["fraction_of_limit"]) >= {"prefill_of_gemm", "decode_of_read"}
    assert written["ready_s"] == 3.0 and written["peak_memory_bytes"] == 5
    assert written["model"] == tmp_path.name and str(tmp_path) not in str(written)


def test_without_batch_32_its_fractions_are_null_and_not_those_of_another_batch() -> None:
    options = parse_options(["--batches", "8"])
    result = build_result(options, COSTS, measured(options), [FreshProcess(3.0, 5)])
    assert result.python_fraction_batch_32 is None and result.step_fractions_batch_32 is None


def test_tables_show_every_case_and_the_parts_of_the_model_when_asked() -> None:
    options = parse_options(["--batches", "8", "--prefill-tokens", "512"])
    result = build_result(options, COSTS, measured(options), [FreshProcess(3.0, 5)])
    names = [str(cell) for cell in result_table(result).columns[0].cells]
    assert names[:3] == ["prefill 512", "decode 8, context 32", "decode 8, context 1024"]
    (pieces,) = profile_tables(measured(options))
    assert [str(cell) for cell in pieces.columns[0].cells] == [*names[1:3], "first step of prefill 512"]
    assert [column.header for column in pieces.columns][1:] == ["ms", *(piece.replace("_", " ") for piece in PIECES)]
    parts = mean_split([{"model": 10.0, "linears": 4.0}])
    split = ModelSplit(dict.fromkeys(options.decode_cases, parts), parts, slowed_by_profiler=False)
    _, inside = profile_tables(measured(options, split))
    assert [column.header for column in inside.columns][2:] == [*parts]
    assert all(str(cell) == "40.0%" for cell in inside.columns[4].cells)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--threads 0", "--threads: '0' is not a positive whole number"),
        ("--threads 100000", "--threads 100000: this process may use"),
        ("--dtype int3", "--dtype: invalid choice: 'int3'"),
        ("--step-model eager", "--step-model: invalid choice"),
        ("--runs -1", "--runs"),
        ("--prefill-tokens", "--prefill-tokens: expected at least one"),
        ("--batches 1 513", "--batches: one step takes at most 512 sequences, not 513"),
        ("--context x", "--context: 'x' is not"),
        ("--json no-such-folder/r.json", "--json: there is no folder no-such-folder"),
        ("--json .", "--json: . is a folder"),
        ("--no-such-flag", "--no-such-flag"),
    ],
)
def test_a_wrong_flag_is_one_sentence_and_status_2(
    flags: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError):
        parse_options(flags.split())
    assert main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1


def test_lengths_beyond_the_model_s_context_are_refused(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, LlamaForCausalLM(LlamaConfig(**TINY)))
    check_lengths(parse_options(["--prefill-tokens", "2047"]), checkpoint)
    with pytest.raises(ConfigError, match="the context of this model is 2048"):
        check_lengths(parse_options(["--prefill-tokens", "2048"]), checkpoint)
    with pytest.raises(ConfigError, match="the context of this model is 2048"):
        check_lengths(parse_options(["--prefill-tokens", "8", "--context", "2040"]), checkpoint)


def test_repeated_lengths_and_contexts_are_measured_once() -> None:
    options = parse_options(["--prefill-tokens", "8", "8", "--batches", "2", "2", "1", "--context", "1024"])
    assert options.prefill_tokens == (8,)
    assert options.decode_cases == (DecodeCase(2, 1024), DecodeCase(1, 1024))
