"""Promises about whole loads, in virtual time: classes, overload, fairness."""

from __future__ import annotations

import random
from collections.abc import Sequence

from scheduler.admission import AdmissionOptions
from scheduler.urgency import ORDINARY, ServiceClass, Urgency
from tests.unit.scheduler.cluster_sim import ClusterSim, Outcome

BATCH = Urgency(ServiceClass.BATCH)
TTFT_S, TPOT_S = 1.5, 0.15
TARGETS = AdmissionOptions(ttft_target_s=TTFT_S, tpot_target_s=TPOT_S)
CHAT = (16, 8)  # tokens of prompt and answer
LONG_JOB = (64, 64)


def percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def chats(sim: ClusterSim, per_s: float, from_s: float, until_s: float, tenant: str = "a") -> list[str]:
    """Poisson arrivals, the same in every run."""
    rng, at_s, names = random.Random(7), from_s, []
    while (at_s := at_s + rng.expovariate(per_s)) < until_s:
        names.append(sim.arrive(at_s, *CHAT, tenant=tenant))
    return names


def generated(outcomes: Sequence[Outcome], from_s: float, until_s: float) -> int:
    return sum(from_s <= at_s < until_s for outcome in outcomes for at_s in outcome.token_times_s)


def mixed_run(urgency_of_jobs: Urgency, *, with_chats: bool = True) -> tuple[list[Outcome], int]:
    """A minute of chats beside more long jobs than can be done. Returns the chats, and the jobs' tokens."""
    sim = ClusterSim(TARGETS)
    names = chats(sim, 0.8, 5.0, 60.0) if with_chats else []
    jobs = [sim.arrive(0.0, *LONG_JOB, urgency=urgency_of_jobs) for _ in range(120)]
    sim.run(until_s=70.0)
    return [sim.outcomes[name] for name in names], generated([sim.outcomes[job] for job in jobs], 5.0, 60.0)


def test_chats_keep_their_targets_while_batch_work_fills_the_rest() -> None:
    """And would miss them if the long jobs were of the same class."""
    with_classes, filled = mixed_run(BATCH)
    without_classes, _ = mixed_run(ORDINARY)
    _, alone = mixed_run(BATCH, with_chats=False)
    assert all(chat.ended_s is not None for chat in with_classes)
    assert percentile([chat.ttft_s for chat in with_classes], 0.99) <= TTFT_S
    assert percentile([gap_s for chat in with_classes for gap_s in chat.gaps_s], 0.99) <= TPOT_S
    served = [chat for chat in without_classes if chat.token_times_s]
    assert len(served) < len(with_classes) or percentile([chat.ttft_s for chat in served], 0.99) > TTFT_S
    assert filled >= 0.85 * alone  # chats are a fifteenth of the capacity here


def test_batch_work_alone_has_the_whole_cluster() -> None:
    sims = {}
    for urgency in (BATCH, ORDINARY):
        sim = sims[urgency] = ClusterSim(TARGETS)
        for _ in range(40):
            sim.arrive(0.0, *LONG_JOB, urgency=urgency)
        sim.run()
    assert sims[BATCH].now <= 1.1 * sims[ORDINARY].now


OVERLOADED = AdmissionOptions(max_queued_requests=1000, ttft_target_s=TTFT_S, tpot_target_s=TPOT_S, refuses_late=True)


def capacity_per_s() -> float:
    """Chats per second that one worker can do."""
    sim = ClusterSim(AdmissionOptions())
    for _ in range(200):
        sim.arrive(0.0, *CHAT)
    sim.run()
    return 200 / sim.now


def test_twice_the_capacity_for_a_minute_is_shed_at_once_and_the_rest_is_served_in_time() -> None:
    """Fault F16 in virtual time."""
    capacity = capacity_per_s()
    sim = ClusterSim(OVERLOADED)
    names = chats(sim, 2 * capacity, 0.0, 60.0)
    sim.run()
    outcomes = [sim.outcomes[name] for name in names]
    refused = [outcome for outcome in outcomes if outcome.refused_s is not None]
    served = [outcome for outcome in outcomes if outcome.ended_s is not None]
    assert len(refused) + len(served) == len(outcomes)
    at_once = [outcome for outcome in refused if outcome.refused_s == outcome.arrived_s]
    assert len(at_once) >= 0.9 * len(refused)
    assert all(outcome.retry_after_s > 0 for outcome in at_once)
    in_time = [outcome for outcome in served if outcome.ttft_s <= TTFT_S]
    assert len(in_time) >= 0.9 * capacity * 60
    assert sim.longest_queue <= 2 * capacity * TTFT_S + 10


def test_after_an_overload_everything_is_as_before_within_ten_seconds() -> None:
    capacity = capacity_per_s()
    sim = ClusterSim(OVERLOADED)
    chats(sim, 2 * capacity, 0.0, 30.0)
    late = chats(sim, 0.5 * capacity, 40.0, 60.0)
    sim.run()
    alone = ClusterSim(OVERLOADED)
    undisturbed = chats(alone, 0.5 * capacity, 40.0, 60.0)
    alone.run()
    assert [sim.outcomes[name].ttft_s for name in late] == [alone.outcomes[name].ttft_s for name in undisturbed]


def test_without_refusing_everybody_waits_and_the_queue_is_bounded() -> None:
    sim = ClusterSim(AdmissionOptions(max_queued_requests=20))
    for _ in range(50):
        sim.arrive(0.0, *CHAT)
    sim.run()
    refused = [outcome for outcome in sim.outcomes.values() if outcome.refused_s is not None]
    assert len(refused) == 50 - 20 - 8
    assert sim.longest_queue == 20


def test_a_tenant_that_floods_the_cluster_does_not_slow_another_down() -> None:
    """Tenant b sends a chat now and then; a sends everything at once."""
    shares = (("a", 1.0), ("b", 1.0))

    def waits(weights: tuple[tuple[str, float], ...]) -> list[float]:
        sim = ClusterSim(AdmissionOptions(max_queued_requests=10_000, tenant_weights=weights))
        for _ in range(300):
            sim.arrive(0.0, *CHAT, tenant="a")
        names = [sim.arrive(1.0 + index, *CHAT, tenant="b") for index in range(10)]
        sim.run()
        return [sim.outcomes[name].ttft_s for name in names]

    assert max(waits(shares)) <= 2.5
    assert max(waits(())) <= 2.5  # one that the configuration does not name has a line of its own as well


def test_backlogged_tenants_get_service_by_weight() -> None:
    sim = ClusterSim(AdmissionOptions(max_queued_requests=10_000, tenant_weights=(("a", 1.0), ("b", 3.0))))
    names = [sim.arrive(0.0, *CHAT, tenant=tenant) for _ in range(200) for tenant in "ab"]
    sim.run(until_s=15.0)  # both still wait
    served = {
        tenant: sum(len(sim.outcomes[name].token_times_s) for name in names if sim.outcomes[name].tenant == tenant)
        for tenant in "ab"
    }
    assert 2.5 <= served["b"] / served["a"] <= 3.5
