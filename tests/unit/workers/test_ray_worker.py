"""A worker process says how far it is while it loads, and why it cannot go on. Ray and the model are fakes here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvcache.errors import ModelError
from tests.builders import make_options
from workers import ray_worker
from workers.device import Device
from workers.ray_worker import WorkerActor
from workers.worker_options import WorkerOptions

OPTIONS = make_options()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], WorkerActor]:
    def start_with(build: Callable[..., Any]) -> WorkerActor:
        monkeypatch.setattr(ray_worker.signal, "signal", lambda *_: None)
        monkeypatch.setattr(ray_worker, "find_scheduler", lambda: None)
        monkeypatch.setattr(ray_worker, "_import_build_worker", lambda: build)
        return WorkerActor(OPTIONS, 1)

    return start_with


def end_of_loading() -> None:
    for thread in threading.enumerate():
        if thread.name == "load":
            thread.join(10)


def test_progress_answers_while_the_model_loads(start: Callable[[Callable[..., Any]], WorkerActor]) -> None:
    halfway, go_on = threading.Event(), threading.Event()

    def build(_options: WorkerOptions, _followers: object, report: Callable[[float], None]) -> None:
        report(0.5)
        halfway.set()
        go_on.wait(10)
        raise ModelError("no")

    worker = start(build)
    assert halfway.wait(10)
    assert (worker.progress().part, worker.progress().is_ready) == (0.5, False)
    worker.stop()  # there is nothing to stop yet
    go_on.set()
    end_of_loading()


@pytest.mark.parametrize("error", [ModelError("The model is damaged."), RuntimeError("a bug")])
def test_progress_raises_why_a_worker_cannot_be_loaded(
    start: Callable[[Callable[..., Any]], WorkerActor], error: Exception
) -> None:
    def build(_options: WorkerOptions, _followers: object, _report: object) -> None:
        raise error

    worker = start(build)
    end_of_loading()
    with pytest.raises(type(error), match=str(error)):
        worker.progress()


@pytest.mark.parametrize(("device", "num_gpus"), [("cpu", 0), ("cuda", 1)])
def test_every_rank_is_placed_in_its_part_of_the_worker_s_room_with_a_gpu_of_its_own(
    device: Device, num_gpus: int
) -> None:
    group: Any = object()
    options = replace(OPTIONS, device=device, tensor_parallel_size=3)
    for rank in range(3):
        place = ray_worker._place_of(rank, group, options)
        strategy = place["scheduling_strategy"]
        assert (place["num_cpus"], place["num_gpus"]) == (0, num_gpus)
        assert (strategy.placement_group, strategy.placement_group_bundle_index) == (group, rank)
