"""Weights that are rounded, natively: two pools give what one worker gives with them."""

from __future__ import annotations

import asyncio
from copy import copy
from dataclasses import replace

import pytest

from tests.cluster import TinyCheckpoint, greedily, local_cluster
from workers.model.fused_decoder import FusedDecoder
from workers.native.library import load_library

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(load_library() is None, reason="no native build for this processor"),
]

LENGTHS = (1, 15, 16, 17, 33, 200)
NUM_TOKENS = 12
WEIGHTS = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_two_pools_give_what_one_worker_gives(checkpoint: TinyCheckpoint, weights: str) -> None:
    rounded = copy(checkpoint)
    rounded.spec = replace(checkpoint.spec, dtype=WEIGHTS[weights].get("dtype", checkpoint.spec.dtype))
    prompts = [checkpoint.prompt(length, seed) for seed, length in enumerate(LENGTHS)]

    async def answers(**pools: int) -> list[tuple[int, ...]]:
        async with local_cluster(rounded, **pools, **WEIGHTS[weights]) as cluster:
            for runner in cluster.runners.values():
                assert isinstance(runner.model, FusedDecoder)
                assert runner.model.weight_format.name.lower() == weights
            completions = await asyncio.gather(*(cluster.complete(prompt, greedily(NUM_TOKENS)) for prompt in prompts))
            if "decode" in pools:
                assert cluster.load("decode-0").transfers == len(prompts)
                assert cluster.load("decode-0").prompt_tokens_computed == 0
            return [completion.token_ids for completion in completions]

    alone = asyncio.run(answers(colocated=1))
    assert asyncio.run(answers(prefill=1, decode=1)) == alone
    assert all(len(token_ids) == NUM_TOKENS for token_ids in alone)
    if weights == "int4":  # so it is not float32 that answers
        assert alone != [checkpoint.greedy(prompt, NUM_TOKENS) for prompt in prompts]
