"""Ranks as threads: cut models compute together what the whole one computes alone."""

from __future__ import annotations

import copy
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from kvcache.errors import ModelError
from kvcache.heads import Shard
from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.request import SamplingParams
from scheduler.step_plan import StepPlan
from tests.builders import make_scheduled
from workers.model.attention_layers import LayerAttention
from workers.model.fused_decoder import FusedDecoder, WeightFormat, find_misfit
from workers.model.step_model import StepModel
from workers.model.transformers_model import ATTENTION_NAME, TransformersModel
from workers.native.library import Group, load_library
from workers.parallel import group_pb2 as pb
from workers.parallel.messages import step_from_wire, step_to_wire
from workers.parallel.modules import cut_modules, find_plan_problem
from workers.parallel.rank import RankLostError, end_waits, reduce_bytes

SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama, tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama, all biases": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen2, biases": lambda: Qwen2Config(**SHAPE),
    "qwen3, q and k norms": lambda: Qwen3Config(**SHAPE),
    "mixtral, experts": lambda: MixtralConfig(
        **SHAPE | {"intermediate_size": 96}, num_local_experts=3, num_experts_per_tok=2
    ),
}
NUM_BLOCKS = 24
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def make_model(config: PreTrainedConfig) -> Any:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # ones and zeros would hide that they are used
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def spec_of(config: Any) -> KVCacheSpec:
    return KVCacheSpec(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, 8, "float32")


def steps() -> list[StepPlan]:
    """A prompt in two chunks, another beside it, decoding alone and mixed."""

    def chunk(which: int, start: int, end: int, sampled: bool = True) -> Any:
        table = [8 * which + block for block in reversed(range(8))]
        token_ids = [(7 * which + 13 * position + position * position) % 131 for position in range(start, end)]
        return make_scheduled(str(which), token_ids, start, table, GREEDY if sampled else None)

    return [
        StepPlan((chunk(0, 0, 19, sampled=False),)),
        StepPlan((chunk(0, 19, 30), chunk(1, 0, 9))),
        StepPlan((chunk(1, 9, 10), chunk(0, 30, 31), chunk(2, 0, 1))),
        StepPlan((chunk(0, 31, 32), chunk(2, 1, 40))),
    ]


class ThreadSums:
    """All-reduce for ranks that are threads."""

    def __init__(self, size: int) -> None:
        self._arriving = threading.Barrier(size, timeout=20)
        self._leaving = threading.Barrier(size, timeout=20)
        self._partials: list[Any] = [None] * size

    def of(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def all_reduce(partial: torch.Tensor) -> torch.Tensor:
            self._partials[rank] = partial
            self._arriving.wait()
            total = torch.stack(self._partials).sum(dim=0)
            self._leaving.wait()
            return total

        return all_reduce


def in_threads(work: Callable[[int], list[torch.Tensor]], size: int) -> list[list[torch.Tensor]]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, range(size)))


def check_same_logits(expected: list[torch.Tensor], parts: list[list[torch.Tensor]]) -> None:
    for step, whole in enumerate(expected):
        found = torch.cat([part[step] for part in parts], dim=1)
        torch.testing.assert_close(found, whole, rtol=0, atol=2e-5 * float(whole.abs().max()) if len(whole) else 0)


def run(model: StepModel, spec: KVCacheSpec) -> list[torch.Tensor]:
    storage = PagedStorage(spec, NUM_BLOCKS)
    return [model.logits(plan, storage).clone() for plan in steps()]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_of_a_cut_transformers_model_give_the_parts_of_its_logits(name: str, size: int) -> None:
    """Four ranks hold each of the two KV heads twice."""
    whole = make_model(CONFIGS[name]())
    spec, sums = spec_of(whole.config), ThreadSums(size)
    models = [copy.deepcopy(whole) for _ in range(size)]

    def work(rank: int) -> list[torch.Tensor]:
        cut_modules(models[rank], Shard(rank, size), sums.of(rank))
        return run(TransformersModel(models[rank]), Shard(rank, size).of_spec(spec))

    check_same_logits(run(TransformersModel(whole), spec), in_threads(work, size))


@pytest.mark.skipif(load_library() is None, reason="no native build for this processor")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", [name for name in CONFIGS if "all" not in name and "experts" not in name])
def test_ranks_of_the_native_decoder_give_the_parts_of_its_logits(name: str, size: int) -> None:
    whole = make_model(CONFIGS[name]())
    spec = spec_of(whole.config)
    check_same_logits(run(TransformersModel(whole), spec), run_natively_cut(whole, spec, size))


def run_natively_cut(
    whole: Any, spec: KVCacheSpec, size: int, weight_format: WeightFormat | None = None
) -> list[list[torch.Tensor]]:
    """Of each rank its part of every step's logits."""
    models = [copy.deepcopy(whole) for _ in range(size)]
    memory = torch.zeros(reduce_bytes(size), dtype=torch.uint8)

    def work(rank: int) -> list[torch.Tensor]:
        shard = Shard(rank, size)
        cut_modules(models[rank], shard, lambda partial: partial)
        local = shard.of_spec(spec)
        assert find_misfit(models[rank], local, [LayerAttention()] * local.num_layers) is None
        group = Group(rank, size, 0, 20_000, memory.data_ptr())
        rank_stub: Any = SimpleNamespace(shard=shard, native_group=group)
        return run(FusedDecoder(models[rank], local, 128, 1, weight_format, rank_stub), local)

    return in_threads(work, size)


@pytest.mark.skipif(load_library() is None, reason="no native build for this processor")
@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("weight_format", [WeightFormat.BFLOAT16, WeightFormat.INT8, WeightFormat.INT4])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_lose_no_more_to_rounding_than_one(size: int, weight_format: WeightFormat, kv_dtype: str) -> None:
    """A rank's groups of weights begin at other places where inputs are cut, so roundings differ and add up to as much.

    Two roundings of one model that have nothing to do with each other are the root of two apart of what each costs.
    """
    whole = make_model(LlamaConfig(**SHAPE | {"initializer_range": 0.05}))
    exact_spec = spec_of(whole.config)
    spec = replace(exact_spec, dtype=kv_dtype)
    exact = torch.cat(run(TransformersModel(whole), exact_spec))
    alone = torch.cat(run(FusedDecoder(whole, spec, 128, 1, weight_format), spec))
    parts = run_natively_cut(whole, spec, size, weight_format)
    cut = torch.cat([torch.cat(part) for part in parts], dim=1)
    cost = float((alone - exact).norm())
    assert 0.5 * cost < float((cut - exact).norm()) < 1.25 * cost
    assert float((cut - alone).norm()) < 1.5 * cost


@pytest.mark.skipif(load_library() is None, reason="no native build for this processor")
@pytest.mark.parametrize("ends", [True, False], ids=["when told", "after its timeout"])
def test_a_rank_that_waits_for_a_lost_one_gives_up(ends: bool) -> None:
    model = make_model(CONFIGS["llama, tied"]())
    shard, spec = Shard(0, 2), spec_of(model.config)
    cut_modules(model, shard, lambda partial: partial)
    memory = torch.zeros(reduce_bytes(2), dtype=torch.uint8)
    group = Group(0, 2, 0, 20_000 if ends else 40, memory.data_ptr())
    rank_stub: Any = SimpleNamespace(shard=shard, native_group=group)
    decoder = FusedDecoder(model, shard.of_spec(spec), 128, 1, rank=rank_stub)
    if ends:
        end_waits(memory)
    with pytest.raises(RankLostError):
        run(decoder, shard.of_spec(spec))
    assert ctypes.c_uint32.from_address(memory.data_ptr()).value == int(ends)


@pytest.mark.skipif(load_library() is None, reason="no native build for this processor")
@pytest.mark.parametrize("num_sums", [1, 2, 3, 4])
def test_the_native_decoder_tells_a_layer_when_every_rank_has_written_it(num_sums: int) -> None:
    """The other rank is this test, which arrives at so many sums: the embedding's, then two in each layer."""
    model = make_model(CONFIGS["llama, tied"]())
    shard, spec = Shard(0, 2), spec_of(model.config)
    cut_modules(model, shard, lambda partial: partial)
    memory = torch.zeros(reduce_bytes(2), dtype=torch.uint8)
    ctypes.c_uint32.from_address(memory.data_ptr() + 2 * 64).value = num_sums
    rank_stub: Any = SimpleNamespace(shard=shard, native_group=Group(0, 2, 0, 40, memory.data_ptr()))
    decoder = FusedDecoder(model, shard.of_spec(spec), 128, 1, rank=rank_stub)
    told = ctypes.c_int64(0)
    progress: Any = SimpleNamespace(counter_address=ctypes.addressof(told), wake_fd=-1)
    with pytest.raises(RankLostError):
        decoder.logits(steps()[0], PagedStorage(shard.of_spec(spec), NUM_BLOCKS), progress)
    assert told.value == num_sums // 2


def test_a_cut_transformers_model_tells_a_layer_when_every_rank_has_written_it() -> None:
    whole = make_model(CONFIGS["llama, tied"]())
    sums, spec = ThreadSums(2), Shard(0, 2).of_spec(spec_of(whole.config))
    models = [copy.deepcopy(whole) for _ in range(2)]
    storages = [PagedStorage(spec, NUM_BLOCKS) for _ in range(2)]
    told: dict[int, bool] = {}

    def work(rank: int) -> list[torch.Tensor]:
        cut_modules(models[rank], Shard(rank, 2), sums.of(rank))
        listener: Any = SimpleNamespace(
            layer_done=lambda layer: told.update({layer: bool(storages[1].layers[layer].any())})
        )
        model = TransformersModel(models[rank], is_cut=True)
        return [model.logits(steps()[0], storages[rank], listener if rank == 0 else None)]

    in_threads(work, 2)
    assert told == {0: True}, "the last of two layers is known with the end of the step only"


def test_a_model_without_a_plan_that_we_can_follow_is_refused_by_name() -> None:
    assert "no tensor-parallel plan" in str(find_plan_problem(GPT2Config().base_model_tp_plan))
    assert "qkv_proj" in str(find_plan_problem(Phi3Config().base_model_tp_plan))
    assert "q_proj" in str(find_plan_problem({"layers.*.self_attn.o_proj": "rowwise"}))
    with pytest.raises(ModelError, match="cannot be cut"):
        cut_modules(make_model(GPT2Config(n_layer=1, n_embd=32, n_head=2)), Shard(0, 2), lambda partial: partial)


def test_a_step_crosses_to_a_follower_whole() -> None:
    for plan in steps():
        command = pb.Command.FromString(step_to_wire(plan).SerializeToString())
        found = step_from_wire(command.step)
        for ours, theirs in zip(found.chunks, plan.chunks, strict=True):
            assert (ours.token_ids, ours.start, ours.block_table) == (
                theirs.token_ids,
                theirs.start,
                theirs.block_table,
            )
            assert (ours.sampling is None) == (theirs.sampling is None)
        assert len({chunk.request_id for chunk in found.chunks}) == len(plan.chunks)
