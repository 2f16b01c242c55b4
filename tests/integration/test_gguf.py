"""A model in GGUF is served as the same weights in safetensors are."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from engine.tokenizer import Tokenizer
from scheduler.request import FinishReason
from tests.cluster import TinyCheckpoint, greedily, local_cluster
from tests.unit.workers.gguf_models import write_model

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def in_gguf(checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """The same model, and another tokenizer of as many tokens; its references stay those of the safetensors."""
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tokens = ["<end>", "a", "b", "ab", *(f"token-{index}" for index in range(checkpoint.vocab_size - 4))]
    write_model(file, LlamaForCausalLM.from_pretrained(checkpoint.path), "llama", tokens)
    changed = copy.copy(checkpoint)
    changed.path = file
    changed.tokenizer = Tokenizer.from_checkpoint(file)
    return changed


def test_prefill_and_decode_from_gguf_give_the_tokens_of_the_same_weights(in_gguf: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(in_gguf, prefill=1, decode=1) as cluster:
            prompts = [in_gguf.prompt(length) for length in (1, 16, 17, 200)]
            await asyncio.gather(*(cluster.check_greedy(prompt, 12) for prompt in prompts))

    asyncio.run(scenario())


def test_text_goes_through_the_tokenizer_of_the_file(in_gguf: TinyCheckpoint) -> None:
    prompt = tuple(in_gguf.tokenizer.encode("abba"))
    assert [in_gguf.tokenizer.decode([token]) for token in prompt] == ["ab", "b", "a"]

    async def scenario() -> None:
        async with local_cluster(in_gguf, colocated=1) as cluster:
            completion = await cluster.complete(prompt, greedily(5))
            assert completion.token_ids == in_gguf.greedy(prompt, 5)
            assert completion.finish_reason is FinishReason.LENGTH

    asyncio.run(scenario())


def test_the_file_is_not_copied(in_gguf: TinyCheckpoint) -> None:
    assert [path.name for path in Path(in_gguf.path).parent.iterdir()] == ["model.gguf"]
