"""Every family through two pools: its answers are those of transformers, over prompts longer than any window."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from tests.cluster import DEVICE, Completion, LocalCluster, TinyCheckpoint, greedily, local_cluster
from tests.families import FAMILIES, gemma2, mistral
from tests.logprobs import check_all_logprobs

pytestmark = pytest.mark.integration

LENGTHS = (1, 15, 40, 150)  # the last in three chunks
NUM_TOKENS = 24  # over the edge of every window
SAMPLING = replace(greedily(NUM_TOKENS), logprobs=3, prompt_logprobs=3)
# Of the largest logit: bfloat16 has 8 bits, and rounding after every operation of four layers comes to half of this.
BFLOAT16_TOLERANCE = 5e-2
# One that runs natively where there is a build, and two that do not; each beside one that differs in structure only.
IN_BFLOAT16 = {
    "llama": FAMILIES["llama, linear rope"],
    "mistral, window 22": mistral(None),
    "gemma2": gemma2(attn_logit_softcapping=None),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_and_log_probabilities_through_two_pools_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    checkpoint = TinyCheckpoint(tmp_path, FAMILIES[name])

    async def check(cluster: LocalCluster, prompt: tuple[int, ...]) -> None:
        done = await cluster.complete(prompt, SAMPLING)
        assert done.token_ids == checkpoint.greedy(prompt, NUM_TOKENS)
        check_all_logprobs(checkpoint, prompt, done, SAMPLING)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            await asyncio.gather(*(check(cluster, checkpoint.prompt(length)) for length in LENGTHS))

    asyncio.run(scenario())


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_in_bfloat16_two_pools_are_as_far_from_float32_as_rounding_is(tmp_path: Path, name: str) -> None:
    """Log-probabilities of prompts and answers, and how near the tokens that were chosen are to the likeliest."""
    checkpoint = _checkpoint(tmp_path / "own", FAMILIES[name])
    other = _checkpoint(tmp_path / "other", IN_BFLOAT16[name])
    prompts = [checkpoint.prompt(length) for length in LENGTHS]

    async def scenario() -> list[Completion]:
        async with local_cluster(checkpoint, prefill=1, decode=1, dtype="bfloat16") as cluster:
            assert {worker.info(1, DEVICE).spec.dtype for worker in cluster.workers.values()} == {"bfloat16"}
            completions = await asyncio.gather(*(cluster.complete(prompt, SAMPLING) for prompt in prompts))
            assert cluster.load("decode-0").transfers == len(prompts)
            return completions

    completions = asyncio.run(scenario())
    differences = [_difference(checkpoint, *pair) for pair in zip(prompts, completions, strict=True)]
    assert 0 < max(differences) <= BFLOAT16_TOLERANCE
    assert max(_difference(other, *pair) for pair in zip(prompts, completions, strict=True)) > 2 * BFLOAT16_TOLERANCE


def _checkpoint(folder: Path, make_config: Callable[[int], PreTrainedConfig]) -> TinyCheckpoint:
    folder.mkdir()
    return TinyCheckpoint(folder, make_config, "bfloat16")


def _difference(checkpoint: TinyCheckpoint, prompt: tuple[int, ...], done: Completion) -> float:
    """The largest, of what was told and chosen, from float32 with the same weights; over float32's largest logit."""
    logits = checkpoint.logits([*prompt, *done.token_ids])[:-1]
    expected = torch.log_softmax(logits.double(), dim=-1)
    token_ids = torch.tensor([*prompt[1:], *done.token_ids]).unsqueeze(1)
    told = torch.tensor([each.logprob for each in (*done.prompt_logprobs, *done.logprobs)], dtype=torch.float64)
    own = expected.gather(1, token_ids)[:, 0]
    missed = (expected.amax(-1) - own)[len(prompt) - 1 :]
    return float(torch.cat([(told - own).abs(), missed]).max() / logits.abs().max())
