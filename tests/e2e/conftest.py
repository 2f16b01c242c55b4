"""The default model and its reference are made once for all end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.reference import ReferenceCase, make_reference
from workers.model.checkpoint import DEFAULT_MODEL, prepare_checkpoint


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return prepare_checkpoint(DEFAULT_MODEL, show_progress=False)


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> list[ReferenceCase]:
    return make_reference(checkpoint)
