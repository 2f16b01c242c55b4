"""While workers load, what is known to be wrong by then ends the start."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from engine import launch
from engine.fleet import Fleet
from engine.start_progress import StartProgress
from kvcache.errors import ModelError
from tests.builders import make_options
from workers.worker_options import WorkerOptions

NOBODY: Any = None


class LoadingProcess:
    """Loads for ever."""

    def __init__(self, _options: WorkerOptions, _incarnation: int) -> None: ...

    def progress(self) -> None: ...

    def join(self) -> None: ...

    def has_ended(self) -> bool:
        return False

    def has_room(self) -> bool:
        return True

    def stop(self) -> None: ...

    def close(self) -> None: ...


class QuietScheduler:
    def tell(self, *events: object) -> None: ...

    def poll(self) -> None: ...


def test_a_damaged_tokenizer_is_told_before_the_workers_have_loaded() -> None:
    fleet = Fleet([make_options()], LoadingProcess, QuietScheduler())
    preparing: Future[Any] = Future()
    preparing.set_exception(ModelError("The checkpoint has no fast tokenizer."))
    with pytest.raises(ModelError, match="no fast tokenizer"):
        launch._await_workers(NOBODY, fleet, StartProgress(on_terminal=False), preparing)
