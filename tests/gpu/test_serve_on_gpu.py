"""The real command on a GPU, with the real model: greedy tokens, and one GPU for each worker."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
import torch

from tests.e2e.client import complete_all, expected
from tests.e2e.reference import ReferenceCase
from tests.e2e.server import serving

pytestmark = [pytest.mark.gpu, pytest.mark.e2e]


def test_greedy_tokens_are_those_of_transformers_on_a_cpu(reference: list[ReferenceCase]) -> None:
    """float32, so portable attention; equal to rounding, and these prompts have no ties that close."""
    with serving("--device", "cuda", "--colocated", "1", "--dtype", "float32", expected_workers=1) as server:
        assert asyncio.run(complete_all(server.url, reference, at_once=16)) == expected(reference)
        assert server.cluster().workers[0].info.device.name == torch.cuda.get_device_name()


def test_a_chat_in_bfloat16_is_answered(checkpoint: Path) -> None:
    """With FlashInfer and graphs where it is installed."""
    with serving("--device", "cuda", "--colocated", "1", "--dtype", "bfloat16", expected_workers=1) as server:
        body = {
            "model": "smollm2-135m-instruct",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "max_tokens": 32,
        }
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)
        assert response.status_code == 200, response.text
        assert "Paris" in response.json()["choices"][0]["message"]["content"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_pools_on_two_gpus_give_the_same_tokens(reference: list[ReferenceCase]) -> None:
    with serving("--device", "cuda", "--dtype", "float32", expected_workers=2) as server:
        assert asyncio.run(complete_all(server.url, reference, at_once=16)) == expected(reference)
