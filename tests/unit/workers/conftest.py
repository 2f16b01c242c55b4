"""What all tests of the workers need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import pytest
import torch

from tests.unit.workers.native_builds import BUILDS
from workers.native import library


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: on a busy machine threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def choose_library_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Collection[str]], None]]:
    """Call it with the names of the only native builds that there shall be."""

    def choose(names: Collection[str]) -> None:
        monkeypatch.setattr(library, "BUILDS", tuple(entry for entry in library.BUILDS if entry[0] in names))
        library.load_library.cache_clear()

    yield choose
    library.load_library.cache_clear()


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest, choose_library_again: Callable[[Collection[str]], None]) -> str:
    """Makes one of the builds the only one there is."""
    choose_library_again([request.param])
    return str(request.param)
