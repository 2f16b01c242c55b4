"""Tests that need a CUDA GPU. `make test-gpu` runs them; without a GPU each is skipped and says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.e2e.conftest import checkpoint, reference

__all__ = ["checkpoint", "reference"]  # fixtures


@pytest.fixture(scope="session", autouse=True)
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and torch finds none here")
    return "cuda"


@pytest.fixture(scope="session")
def flashinfer(gpu: str) -> Any:
    return pytest.importorskip("flashinfer", reason="flashinfer is not installed; the extra twinpool[gpu] brings it")
