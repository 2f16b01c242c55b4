"""Recorded decode steps against the same steps as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcache.storage import PagedStorage
from scheduler.batching import BatchLimits
from scheduler.step_plan import StepPlan
from tests.tiny_model import make_plan, tiny_llama, tiny_spec
from workers.model.attention.flashinfer_backend import FlashInferAttention
from workers.model.comparison import MAX_RELATIVE_DIFFERENCE
from workers.model.cuda_graphs import GraphedModel
from workers.model.cuda_model import record_decode
from workers.model.runner import ModelRunner
from workers.model.transformers_model import TransformersModel

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(1200)]

SPEC = tiny_spec(64, "bfloat16")
NUM_BLOCKS = 64
MAX_MODEL_LEN = 64
BLOCKS = [list(range(16 * sequence, 16 * (sequence + 1))) for sequence in range(4)]
PROMPTS = ((0, 0, 10), (1, 0, 3), (2, 0, 30), (3, 0, 5))


@pytest.fixture
def runners(flashinfer: Any, tmp_path: Path) -> tuple[ModelRunner, ModelRunner]:
    """With graphs and without, each with a storage of its own."""
    model = tiny_llama(tmp_path, SPEC, "cuda")
    fast = TransformersModel(model, "cuda", attention=FlashInferAttention(flashinfer, "cuda"))
    storage = PagedStorage(SPEC, NUM_BLOCKS, "cuda", with_scratch_block=True)
    graphed = record_decode(fast, storage, BatchLimits(max_num_seqs=4), MAX_MODEL_LEN)
    assert isinstance(graphed, GraphedModel), "recording failed; the log says why"
    eager = TransformersModel(model, "cuda", attention=FlashInferAttention(flashinfer, "cuda"))
    return ModelRunner(graphed, storage), ModelRunner(eager, PagedStorage(SPEC, NUM_BLOCKS, "cuda"))


def check_logits(runners: tuple[ModelRunner, ModelRunner], plan: StepPlan) -> None:
    found, expected = (runner._model.logits(plan, runner._storage).float() for runner in runners)
    assert float((found - expected).abs().max() / expected.abs().max()) < MAX_RELATIVE_DIFFERENCE["bfloat16"]


def test_replayed_steps_give_the_logits_of_plain_ones(runners: tuple[ModelRunner, ModelRunner]) -> None:
    """Batches of one to four, over block edges, so that every graph and its padding are met."""
    for size in (4, 3, 2, 1):
        for runner in runners:
            runner.execute(make_plan(*PROMPTS[:size], blocks=BLOCKS))
        for step in range(6):
            chunks = [(sequence, end + step, end + step + 1) for sequence, _, end in PROMPTS[:size]]
            plan = make_plan(*chunks, blocks=BLOCKS)
            check_logits(runners, plan)


def test_a_replay_after_a_prompt_sees_what_the_prompt_wrote(runners: tuple[ModelRunner, ModelRunner]) -> None:
    """Mixed steps run as they come, between replays, on the same cache."""
    plans = [
        make_plan((0, 0, 10), blocks=BLOCKS),
        make_plan((0, 10, 11), blocks=BLOCKS),
        make_plan((0, 11, 12), (1, 0, 9), blocks=BLOCKS),
        make_plan((0, 12, 13), (1, 9, 10), blocks=BLOCKS),
    ]
    for plan in plans:
        check_logits(runners, plan)
