"""A cache whose books are checked when the test is over, and a handoff between two of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvcache.manager import KVCacheManager
from tests.builders import make_manager
from tests.unit.kvcache.handoff import Handoff


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Copying a few blocks on many threads is mostly waiting for the threads."""
    torch.set_num_threads(1)


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    """Eight blocks of four tokens; the test gives back what it takes."""
    manager = make_manager(num_blocks=8, lease_ttl_s=10.0)
    yield manager
    manager.check_idle()


@pytest.fixture
def handoff() -> Iterator[Handoff]:
    """A prompt on the prefill side and blocks reserved for it on the decode side."""
    yield from ended_handoff(Handoff())


@pytest.fixture
def partial_handoff() -> Iterator[Handoff]:
    """The same, where the decode side holds the first of the three blocks already."""
    yield from ended_handoff(Handoff(num_held=1))


def ended_handoff(handoff: Handoff) -> Iterator[Handoff]:
    yield handoff
    handoff.end()
    handoff.source.manager.check_idle()
    handoff.target.manager.check_idle()
