"""How many sequences will decode beside one: hand-computed, and against slow sums over all of them."""

from __future__ import annotations

import pytest

from scheduler.types import WorkerLoad, WorkerRole
from scheduler.worker_state import ARRIVALS_MEMORY_S, WorkerState, Workload, _mean_overlap
from tests.builders import make_worker

WORK = Workload(num_prompt_tokens=100, max_tokens=20, num_output_tokens=20, prefill_s=1.0)


def worker_with(decoding_until_s: tuple[float, ...] = (), num_awaited: int = 0, arrivals: float = 0.0) -> WorkerState:
    worker = WorkerState(make_worker("d", WorkerRole.DECODE), WorkerLoad(), 0.0)
    for _ in range(len(decoding_until_s) + num_awaited):
        worker.begin_decode(WORK, 0.0)
    for end_s in decoding_until_s:
        worker.first_token(WORK, end_s)
    worker.arrivals = arrivals
    return worker


def test_the_example_of_the_document() -> None:
    """Two stay until 0.9 s, three have their prompts before it, and one comes each second."""
    worker = worker_with((0.8, 1.0), num_awaited=3, arrivals=ARRIVALS_MEMORY_S)
    others = worker.others_beside(0.0, 0.5, 1.0)
    assert others == pytest.approx(2 * 0.4 + 3 * (1 - 0.25 / 2) + 1 / 2)
    assert others == pytest.approx(3.925)


def test_those_that_end_before_it_begins_are_not_there_and_those_that_end_later_all_the_time() -> None:
    assert worker_with((1.0, 1.5)).others_beside(0.0, 2.0, 1.0) == 0.0
    assert worker_with((4.0, 4.0)).others_beside(0.0, 2.0, 1.0) == 2.0


def test_a_sequence_that_ended_or_never_began_is_forgotten() -> None:
    worker = worker_with((2.0, 5.0), num_awaited=1)
    worker.end_decode(WORK, 5.0)
    worker.first_token(WORK, 1.0)
    worker.end_decode(WORK, 1.0)
    worker.arrivals = 0.0
    assert worker.others_beside(0.0, 1.0, 2.0) == pytest.approx(0.5)
    worker.end_decode(WORK, 2.0)
    assert (worker.ends_s, worker.others_beside(0.0, 1.0, 2.0)) == (0.0, 0.0)


def test_sequences_of_others_are_there_all_the_time() -> None:
    worker = worker_with()
    worker.hear(WorkerLoad(running=3), 0.0)
    assert worker.others_beside(0.0, 1.0, 2.0) == 3.0


@pytest.mark.parametrize("spread_s", [0.0, 0.3, 1.0, 2.5])
def test_what_began_evenly_before_is_shared_as_a_sum_over_each_says(spread_s: float) -> None:
    steps = 10_000
    slow = sum(max(0.0, 1.0 - spread_s * (step + 0.5) / steps) for step in range(steps)) / steps
    assert _mean_overlap(spread_s, 1.0) == pytest.approx(slow, abs=1e-5)


def test_arrivals_fade_and_a_steady_stream_is_known_by_its_rate() -> None:
    worker = worker_with()
    for number in range(1000):
        worker.begin_decode(WORK, number / 4)
    per_second = worker.arrivals_at(250.0) / ARRIVALS_MEMORY_S
    assert per_second == pytest.approx(4.0, rel=0.01)
    assert worker.arrivals_at(250.0 + ARRIVALS_MEMORY_S) == pytest.approx(worker.arrivals_at(250.0) / 2.718281828)
