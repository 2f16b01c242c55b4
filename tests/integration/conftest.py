"""One tiny checkpoint for all tests here."""

from __future__ import annotations

import pytest

from tests.cluster import TinyCheckpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return TinyCheckpoint(tmp_path_factory.mktemp("tiny-llama"))
