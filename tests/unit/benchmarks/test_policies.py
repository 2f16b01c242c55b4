"""The comparison of policies: seeded loads, and numbers that follow from what happened."""

from __future__ import annotations

from benchmarks.policies import (
    DOCUMENT_TOKENS,
    PolicyResult,
    ask_about_documents,
    fleet,
    simulate,
    summarize,
    table,
)
from scheduler.placement import PlacementOptions
from scheduler.sim.simulator import Simulator
from scheduler.sim.workers import SimulatedRequest


def test_the_same_seed_asks_the_same_and_another_does_not() -> None:
    assert ask_about_documents(50, 10.0, 1) == ask_about_documents(50, 10.0, 1)
    assert ask_about_documents(50, 10.0, 1) != ask_about_documents(50, 10.0, 2)


def test_placing_by_cost_beats_round_robin_on_unlike_devices() -> None:
    rows = ask_about_documents(150, 18.0, 0)
    cost, other = (simulate(rows, PlacementOptions(policy)) for policy in ("cost", "round_robin"))
    assert cost.goodput >= other.goodput
    assert cost.usd_per_million_tokens < other.usd_per_million_tokens
    assert cost.cache_hit_rate > 0


def test_numbers_follow_from_the_requests() -> None:
    simulator = Simulator(fleet(), PlacementOptions(), 512, 100)
    requests = [
        SimulatedRequest("good", 0.0, 100, 11, first_token_s=1.0, finished_s=1.5, num_cached_tokens=50),
        SimulatedRequest("late", 0.0, 100, 11, first_token_s=3.0, finished_s=3.5),
        SimulatedRequest("slow", 0.0, 200, 11, first_token_s=1.0, finished_s=9.0, num_cached_tokens=50),
    ]
    result = summarize(requests, simulator, PlacementOptions())
    assert (result.ttft_p50_ms, result.tpot_p50_ms) == (1000.0, 50.0)
    assert (result.goodput, result.cache_hit_rate) == (0.3333, 0.25)


def test_the_table_has_a_row_for_each_policy() -> None:
    result = PolicyResult(1.0, 2.0, 3.0, 4.0, 0.5, 0.25, 0.0, 0.1)
    assert table({"a": result, "b": result}).count("\n") == 3


def test_a_document_is_a_prefix_of_whole_blocks() -> None:
    assert all(len(row.prefix_block_ids) * 512 == DOCUMENT_TOKENS for row in ask_about_documents(5, 1.0, 0))
