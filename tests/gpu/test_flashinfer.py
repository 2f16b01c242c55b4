"""The real FlashInfer against the stand-in that the unit tests use, and against portable attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcache.spec import KVCacheSpec
from kvcache.storage import TORCH_DTYPES
from scheduler.step_plan import ScheduledChunk, StepPlan
from tests.builders import make_scheduled
from tests.fake_flashinfer import DecodeWrapper, FakeFlashInfer, PrefillWrapper
from tests.tiny_model import tiny_llama, tiny_spec
from workers.model.attention.flashinfer_backend import FlashInferAttention
from workers.model.attention_layers import LayerAttention
from workers.model.comparison import compared_logits, find_difference
from workers.model.cuda_model import choose_cuda_model
from workers.model.transformers_model import TransformersModel

# The warnings and the minutes are those of FlashInfer and its compilers.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(1200)]

NUM_BLOCKS = 64
SCALE = 0.1
SPANS = [(0, 37), (99, 1), (60, 5), (21, 1), (0, 2), (0, 1), (13, 140)]
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3}


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (FakeFlashInfer.append_paged_kv_cache, "append_paged_kv_cache"),
        (DecodeWrapper.__init__, "BatchDecodeWithPagedKVCacheWrapper.__init__"),
        (DecodeWrapper.plan, "BatchDecodeWithPagedKVCacheWrapper.plan"),
        (DecodeWrapper.run, "BatchDecodeWithPagedKVCacheWrapper.run"),
        (PrefillWrapper.__init__, "BatchPrefillWithPagedKVCacheWrapper.__init__"),
        (PrefillWrapper.plan, "BatchPrefillWithPagedKVCacheWrapper.plan"),
        (PrefillWrapper.run, "BatchPrefillWithPagedKVCacheWrapper.run"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_stand_in_has_flashinfers_parameters(flashinfer: Any, ours: Callable[..., Any], theirs: str) -> None:
    owner, _, method = theirs.rpartition(".")
    holder = getattr(flashinfer, owner) if owner else flashinfer
    real = parameters(getattr(holder, method))
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in real.values()):
        real |= parameters(holder._plan_impl)  # where plan() hands its keywords on
    fake = {name: parameter for name, parameter in parameters(ours).items() if name not in ("self", "library")}
    assert not set(fake) - set(real)
    positional = [name for name, parameter in fake.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [name for name in real if name != "self"][: len(positional)]


def make_step() -> StepPlan:
    order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
    chunks: list[ScheduledChunk] = []
    for sequence, (start, length) in enumerate(SPANS):
        count = -(-(start + length) // 16)
        table, order = order[:count], order[count:]
        chunks.append(make_scheduled(str(sequence), range(length), start, table))
    return StepPlan(tuple(chunks))


@pytest.mark.parametrize(
    ("dtype", "head_size", "num_heads", "num_kv_heads", "layer"),
    [
        ("bfloat16", 64, 9, 3, LayerAttention()),
        ("bfloat16", 64, 8, 1, LayerAttention()),
        ("bfloat16", 64, 9, 3, LayerAttention(window=20)),
        ("bfloat16", 64, 4, 4, LayerAttention(softcap=3.0)),
        ("float16", 128, 8, 2, LayerAttention()),
    ],
    ids=["three heads per KV head", "eight", "window", "softcap", "float16"],
)
def test_attention_equals_the_stand_ins(
    flashinfer: Any, dtype: str, head_size: int, num_heads: int, num_kv_heads: int, layer: LayerAttention
) -> None:
    """Few cases: each dtype, head size, window and cap is compiled anew the first time, in up to a minute."""
    spec = KVCacheSpec(1, num_kv_heads, head_size, 16, dtype)
    step = make_step()
    num_rows = sum(length for _, length in SPANS)
    generator = torch.Generator().manual_seed(2)
    shape = (NUM_BLOCKS, 2, num_kv_heads, 16, head_size)
    cache = torch.randn(shape, generator=generator).to(TORCH_DTYPES[dtype])
    rows = [
        torch.randn(num_rows, count, head_size, generator=generator).to(TORCH_DTYPES[dtype])
        for count in (num_heads, num_kv_heads, num_kv_heads)
    ]
    on_gpu = cache.cuda()
    expected = FlashInferAttention(FakeFlashInfer(), "cpu").plan(step, spec).attend(cache, *rows, layer, SCALE)
    planned = FlashInferAttention(flashinfer, "cuda").plan(step, spec)
    found = planned.attend(on_gpu, *(row.cuda() for row in rows), layer, SCALE)
    torch.testing.assert_close(found.cpu(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(on_gpu.cpu(), cache)


def test_a_model_gives_its_own_logits_through_flashinfer(flashinfer: Any, tmp_path: Path) -> None:
    spec = tiny_spec(64, "bfloat16")
    model = tiny_llama(tmp_path, spec, "cuda")
    fast = TransformersModel(model, "cuda", attention=FlashInferAttention(flashinfer, "cuda"))
    assert find_difference(model, fast, compared_logits(model), spec) is None


def test_a_worker_chooses_flashinfer(flashinfer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = tiny_spec(64, "bfloat16")
    chosen = choose_cuda_model(tiny_llama(tmp_path, spec, "cuda"), spec, 256, "cuda")
    assert isinstance(chosen.attention, FlashInferAttention) and not caplog.records
