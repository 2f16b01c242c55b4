"""What the queue before the controller promises of single requests."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from kvcache.prefix import HashChain
from scheduler.admission import AdmissionControl, AdmissionOptions
from scheduler.cache_index import hashes_of_prompt, pack_names
from scheduler.controller import ClusterController
from scheduler.delivery import Delivery
from scheduler.events import (
    Command,
    PlaceRequest,
    PrefillDone,
    Refusal,
    RefuseRequest,
    RequestArrived,
    RequestEnded,
    RequestPlaced,
    RequestQueued,
    Tick,
    WorkerLeft,
    WorkerRegistered,
    WorkerReported,
)
from scheduler.pace import Pace
from scheduler.placement import PlacementOptions
from scheduler.queue import FairQueue
from scheduler.types import CacheDelta, Placement, WorkerAddress, WorkerRole
from scheduler.urgency import ORDINARY, ServiceClass, Urgency
from tests.builders import make_worker
from tests.unit.scheduler.cluster_sim import slow_worker

BATCH = Urgency(ServiceClass.BATCH)
LATE = AdmissionOptions(ttft_target_s=1.0, refuses_late=True)
PATIENT = AdmissionOptions()
LEAST_LOADED = PlacementOptions("least_loaded")


def make_admission(num_places: int = 1, options: AdmissionOptions = PATIENT, *, quick: bool = True) -> AdmissionControl:
    """With one worker, which decodes so many sequences at once."""
    admission = AdmissionControl(ClusterController(options=LEAST_LOADED, heartbeat_timeout_s=1e9), options)
    info = make_worker("w") if quick else slow_worker()
    assert admission.handle(WorkerRegistered(replace(info, worker_id="w", max_num_seqs=num_places)), 0.0) == []
    return admission


def arrival(name: str, urgency: Urgency = ORDINARY, prompt: int = 16, *, is_continued: bool = False) -> RequestArrived:
    return RequestArrived(name, prompt, 8, urgency=urgency, is_continued=is_continued)


def told(commands: list[Command]) -> list[str]:
    """In short."""
    words = []
    for command in commands:
        match command:
            case PlaceRequest():
                words.append(f"{command.placement.request_id} placed")
            case RequestQueued():
                words.append(f"{command.request_id} at {command.position}")
            case RefuseRequest():
                words.append(f"{command.request_id} {command.reason.value}")
    return words


def test_who_finds_no_place_waits_and_is_placed_by_the_end_of_another() -> None:
    admission = make_admission()
    assert told(admission.handle(arrival("a"), 0.0)) == ["a placed"]
    assert told(admission.handle(arrival("b"), 0.0)) == ["b at 0"]
    assert told(admission.handle(arrival("c"), 0.0)) == ["c at 1"]
    assert told(admission.handle(PrefillDone("a"), 0.1)) == []
    assert told(admission.handle(RequestEnded("a", 8, 8), 0.5)) == ["b placed"]
    assert told(admission.handle(RequestEnded("b", 8, 8), 1.0)) == ["c placed"]
    assert admission.snapshot().queued_interactive == 0


def test_asking_again_tells_the_place_or_the_placement_again() -> None:
    admission = make_admission()
    first = admission.handle(arrival("a"), 0.0)
    assert admission.handle(arrival("a"), 0.1) == first
    for name in "bc":
        admission.handle(arrival(name), 0.1)
    assert told(admission.handle(arrival("c"), 0.2)) == ["c at 1"]
    assert told(admission.handle(RequestEnded("b"), 0.3)) == []
    assert told(admission.handle(arrival("c"), 0.4)) == ["c at 0"]
    assert admission.snapshot().queued_interactive == 1
    assert admission.snapshot().workers[0].requests_in_flight == 1


def test_a_newcomer_is_put_in_line_without_a_walk_over_all_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a thousand that come at once take no longer for each than ten."""
    admission = make_admission()
    monkeypatch.setattr(FairQueue, "order", None)
    names = ["runs", *(f"r{number}" for number in range(9))]
    words = [told(admission.handle(arrival(name), 0.0))[0] for name in names]
    assert words == ["runs placed", *(f"r{number} at {number}" for number in range(9))]


def test_a_client_that_is_gone_leaves_the_queue() -> None:
    admission = make_admission()
    for name in "abc":
        admission.handle(arrival(name), 0.0)
    assert told(admission.handle(RequestEnded("b"), 0.1)) == []
    assert told(admission.handle(RequestEnded("a"), 0.2)) == ["c placed"]
    assert told(admission.handle(RequestEnded("c"), 0.3)) == []
    assert admission.snapshot().workers[0].requests_in_flight == 0


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    admission = make_admission(options=AdmissionOptions(max_queued_requests=1))
    admission.handle(arrival("a"), 0.0)
    admission.handle(arrival("b", BATCH), 0.0)
    assert told(admission.handle(arrival("c"), 0.0)) == ["b queue_full", "c at 0"]
    assert told(admission.handle(arrival("d"), 0.0)) == ["d queue_full"]


def test_a_sequence_whose_worker_was_lost_does_not_wait_again() -> None:
    admission = make_admission(options=LATE)
    admission.handle(arrival("a"), 0.0)
    admission.handle(arrival("b"), 0.0)
    assert told(admission.handle(arrival("c", is_continued=True), 0.0)) == ["c placed"]


def test_batch_sequences_hold_no_place_against_interactive_ones() -> None:
    admission = make_admission(num_places=2)
    for name in "ab":
        assert told(admission.handle(arrival(name, BATCH), 0.0)) == [f"{name} placed"]
    assert told(admission.handle(arrival("c", BATCH), 0.0)) == ["c at 0"]
    assert told(admission.handle(arrival("d"), 0.0)) == ["d placed"]
    assert told(admission.handle(RequestEnded("a"), 0.0)) == []
    assert told(admission.handle(RequestEnded("b"), 0.0)) == ["c placed"]


def placed_before_a_restart(name: str, tenant: str = "default", urgency: Urgency = ORDINARY) -> RequestPlaced:
    placement = Placement(name, WorkerAddress("w", "w.test:1"), None)
    return RequestPlaced(placement, 16, 8, is_prefilled=True, tenant=tenant, urgency=urgency)


def test_batch_sequences_that_a_restarted_scheduler_is_told_of_hold_no_place_against_interactive_ones() -> None:
    admission = make_admission(num_places=2)
    for name in "ab":
        admission.handle(placed_before_a_restart(name, urgency=BATCH), 0.0)
    assert told(admission.handle(arrival("c", BATCH), 0.0)) == ["c at 0"]
    assert told(admission.handle(arrival("d"), 0.0)) == ["d placed"]


def test_what_is_told_to_run_already_waits_no_longer() -> None:
    """A gateway may have placed what waits here: it must not be placed a second time."""
    admission = make_admission(num_places=2)
    for name in "ab":
        admission.handle(arrival(name), 0.0)
    assert told(admission.handle(arrival("c"), 0.0)) == ["c at 0"]
    admission.handle(placed_before_a_restart("c"), 0.1)
    for name in "abc":
        assert told(admission.handle(RequestEnded(name), 0.2)) == []
    assert admission.snapshot().workers[0].requests_in_flight == 0


def test_what_runs_already_when_a_scheduler_begins_is_charged_to_its_own_tenant() -> None:
    """One that was told of waits on: the other tenant, which has had less, is next."""
    admission = make_admission(num_places=1)
    admission.handle(placed_before_a_restart("old", tenant="greedy"), 0.0)
    for name, tenant in (("g", "greedy"), ("m", "modest")):
        assert told(admission.handle(replace(arrival(name), tenant=tenant), 0.0))[0].startswith(f"{name} at")
    assert told(admission.handle(RequestEnded("old", 5000, 5000), 1.0)) == ["m placed"]


def test_batch_requests_wait_while_interactive_ones_do() -> None:
    admission = make_admission()
    admission.handle(arrival("a"), 0.0)
    assert told(admission.handle(arrival("batch", BATCH), 0.0)) == ["batch at 0"]
    assert told(admission.handle(arrival("b"), 0.0)) == ["b at 0"]
    assert told(admission.handle(RequestEnded("a"), 0.0)) == ["b placed"]
    assert told(admission.handle(RequestEnded("b"), 0.0)) == ["batch placed"]


def test_batch_work_keeps_out_where_chats_would_miss_their_pace() -> None:
    """A step with a chunk of the prompt would take about 0.1 s."""
    for target_s, expected in ((0.05, "batch at 0"), (0.5, "batch placed")):
        admission = make_admission(8, AdmissionOptions(tpot_target_s=target_s), quick=False)
        admission.handle(arrival("chat"), 0.0)
        admission.handle(PrefillDone("chat"), 5.0)
        assert told(admission.handle(arrival("batch", BATCH), 5.0)) == [expected]
        assert told(admission.handle(RequestEnded("chat"), 9.0)) == ["batch placed"][: expected != "batch placed"]


def decode_workers_only(options: AdmissionOptions) -> AdmissionControl:
    """Two, after all prefill workers have died: they prefill in place."""
    admission = AdmissionControl(ClusterController(options=PlacementOptions("cost")), options)
    for name in ("d0", "d1"):
        slow = replace(slow_worker(), worker_id=name, role=WorkerRole.DECODE, max_num_seqs=64, address=f"{name}.test:1")
        admission.handle(WorkerRegistered(slow), 0.0)
    return admission


def test_batch_prompts_are_handed_on_a_few_at_a_time_where_decode_workers_prefill() -> None:
    """One takes about 0.13 s; half a second of them on each of both."""
    admission = decode_workers_only(PATIENT)
    words = [told(admission.handle(arrival(f"b{index}", BATCH, prompt=64), 0.0))[0] for index in range(30)]
    assert 4 <= sum(word.endswith("placed") for word in words) <= 12


def test_what_would_be_late_is_refused_where_decode_workers_prefill() -> None:
    admission = decode_workers_only(LATE)
    words = [told(admission.handle(arrival(f"r{index}", prompt=256), 0.0))[0] for index in range(30)]
    assert words[0] == "r0 placed" and words[-1] == f"r29 {Refusal.TTFT_TARGET.value}"


def test_prompts_in_place_keep_batch_work_out_where_chats_would_miss_their_pace() -> None:
    for target_s, expected in ((0.05, "batch at 0"), (0.5, "batch placed")):
        admission = decode_workers_only(AdmissionOptions(tpot_target_s=target_s))
        admission.handle(arrival("chat"), 0.0)
        admission.handle(PrefillDone("chat"), 5.0)
        assert told(admission.handle(arrival("batch", BATCH), 5.0)) == [expected]


def test_batch_prompts_are_handed_on_a_few_at_a_time() -> None:
    """One takes about 0.13 s; half a second of them is enough to keep a worker at work."""
    admission = make_admission(64, quick=False)
    words = [told(admission.handle(arrival(f"b{index}", BATCH, prompt=64), 0.0))[0] for index in range(10)]
    num_placed = sum(word.endswith("placed") for word in words)
    assert 2 <= num_placed <= 6
    assert told(admission.handle(Tick(), 0.5)) != []


def test_what_would_be_late_is_refused_at_once() -> None:
    """The worker has told its pace: 0.4 s for each sequence, one at a time."""
    admission = make_admission(options=LATE)
    for index in range(5):
        admission.handle(arrival(f"r{index}"), 0.4 * index)
        admission.handle(PrefillDone(f"r{index}"), 0.4 * index + 0.1)
        admission.handle(RequestEnded(f"r{index}", 8, 8), 0.4 * index + 0.4)
    words = []
    for name in "abcdef":
        words += told(admission.handle(arrival(name), 2.0))
    assert words == ["a placed", "b at 0", "c at 1", "d ttft_target", "e ttft_target", "f ttft_target"]
    (refusal,) = admission.handle(arrival("g"), 2.0)
    assert isinstance(refusal, RefuseRequest)
    assert refusal.retry_after_s == pytest.approx(0.2, abs=0.05)


def test_what_is_late_after_all_is_refused_then() -> None:
    admission = make_admission(options=LATE)
    admission.handle(arrival("a"), 0.0)
    assert told(admission.handle(arrival("b"), 0.0)) == ["b at 0"]
    assert told(admission.handle(arrival("batch", BATCH), 0.0)) == ["batch at 1"]
    assert told(admission.handle(Tick(), 0.9)) == []
    assert told(admission.handle(Tick(), 1.01)) == ["b ttft_target"]
    assert told(admission.handle(Tick(), 100.0)) == []
    assert told(admission.handle(RequestEnded("a"), 100.0)) == ["batch placed"]


def test_a_prompt_that_alone_takes_longer_than_the_target_is_refused_and_told_how_long() -> None:
    """A thousand tokens of 1.9e8 FLOP, at 100 GFLOP per second."""
    admission = make_admission(8, LATE, quick=False)
    (refusal,) = admission.handle(arrival("long", prompt=1000), 0.0)
    assert isinstance(refusal, RefuseRequest) and refusal.reason is Refusal.TTFT_TARGET
    assert re.search(r"target of 1 s: .* prompt of 1000 tokens takes 1\.9 s", refusal.message)
    assert refusal.retry_after_s == 60
    assert told(admission.handle(arrival("short", prompt=100), 0.0)) == ["short placed"]
    patient = make_admission(8, quick=False)
    assert told(patient.handle(arrival("long", prompt=1000), 0.0)) == ["long placed"]


def test_a_prompt_of_which_enough_is_cached_is_in_time() -> None:
    admission = make_admission(8, LATE, quick=False)
    prompt = list(range(1000))
    (worker,) = admission.snapshot().workers
    prefix = hashes_of_prompt(b"", worker.info.spec.block_size, prompt)
    names = HashChain(b"", worker.info.spec.block_size).hashes(prompt)
    held = CacheDelta(0, added=pack_names(names[: len(names) * 3 // 4]))
    admission.handle(WorkerReported("w", worker.info.incarnation, worker.load, cache=held), 0.0)
    assert told(admission.handle(replace(arrival("known", prompt=1000), prefixes=(prefix,)), 0.0)) == ["known placed"]
    assert told(admission.handle(arrival("unknown", prompt=1000), 1.0)) == ["unknown ttft_target"]


def test_the_prompts_before_it_and_its_own_count_together() -> None:
    """Each takes 0.4 s: two of them within a second, and the third when the first is nearly done."""
    admission = make_admission(8, LATE, quick=False)
    words = [told(admission.handle(arrival(name, prompt=200), 0.0))[0] for name in "abc"]
    assert words == ["a placed", "b placed", "c ttft_target"]
    (refusal,) = admission.handle(arrival("d", prompt=200), 0.0)
    assert isinstance(refusal, RefuseRequest) and 0 < refusal.retry_after_s < 0.4
    now = refusal.retry_after_s + 0.001
    assert told(admission.handle(arrival("e", prompt=200), now)) == ["e at 0"]
    assert told(admission.handle(Tick(), now + 0.2)) == ["e placed"]


def test_the_handoff_counts() -> None:
    """Some 0.2 s of computing, and KV that goes over a link of a kilobyte per second."""
    for link_gb_s, expected in ((1.0, "r placed"), (1e-6, "r ttft_target")):
        admission = AdmissionControl(ClusterController(options=LEAST_LOADED), LATE)
        for role in (WorkerRole.PREFILL, WorkerRole.DECODE):
            info = slow_worker()
            device = replace(info.device, link_gb_s=link_gb_s)
            slow = replace(info, worker_id=role.value, role=role, address=f"{role.value}.test:1", device=device)
            admission.handle(WorkerRegistered(slow), 0.0)
        assert told(admission.handle(arrival("r", prompt=100), 0.0)) == [expected]


def test_what_finds_a_place_too_late_is_refused_and_not_placed() -> None:
    """Its own 0.4 s would do, but not behind those of one that lost its worker meanwhile."""
    admission = make_admission(2, LATE, quick=False)
    for name in "ab":
        admission.handle(arrival(name), 0.0)
        admission.handle(PrefillDone(name), 0.1)
    assert told(admission.handle(arrival("late", prompt=200), 0.1)) == ["late at 0"]
    assert told(admission.handle(arrival("lost", prompt=200, is_continued=True), 0.6)) == ["lost placed"]
    assert told(admission.handle(RequestEnded("a"), 0.61)) == []
    assert told(admission.handle(RequestEnded("b"), 0.62)) == ["late ttft_target"]


def test_when_the_last_worker_is_gone_nobody_waits() -> None:
    admission = make_admission()
    for name in "abc":
        admission.handle(arrival(name), 0.0)
    words = told(admission.handle(WorkerLeft("w", 1), 1.0))
    assert words == [f"b {Refusal.UNAVAILABLE.value}", f"c {Refusal.UNAVAILABLE.value}"]
    assert told(admission.handle(arrival("d"), 1.0)) == ["d unavailable"]


def test_a_worker_that_comes_brings_its_places() -> None:
    admission = make_admission()
    for name in "abc":
        admission.handle(arrival(name), 0.0)
    words = told(admission.handle(WorkerRegistered(replace(make_worker("w2"), max_num_seqs=1)), 1.0))
    assert words == ["b placed"]


def test_pace_counts_busy_time_only() -> None:
    pace = Pace()
    assert pace.seconds_for(10) == 0
    pace.begin(0.0)
    pace.done(10, 1.0, is_over=True)
    pace.begin(100.0)
    pace.done(10, 101.0, is_over=True)
    assert pace.seconds_for(10) == pytest.approx(1.0, rel=0.05)


# Who hears of it


def test_answers_come_to_whoever_asked_whosever_event_brought_them() -> None:
    delivery = Delivery(make_admission())
    assert [told(each) for each in delivery.handle([arrival("a")], "one", 0.0)] == [["a placed"], []]
    assert [told(each) for each in delivery.handle([arrival("b"), arrival("c")], "two", 0.0)] == [
        ["b at 0"],
        ["c at 1"],
        [],
    ]
    assert [told(each) for each in delivery.handle([RequestEnded("a")], "one", 0.1)] == [[], []]
    assert [told(each) for each in delivery.handle([], "one", 0.2)] == [[]]
    assert [told(each) for each in delivery.handle([], "two", 0.2)] == [["b placed"]]
    assert [told(each) for each in delivery.handle([], "two", 0.3)] == [[]]


def test_the_end_of_one_places_another_of_the_same_gateway_in_the_same_call() -> None:
    delivery = Delivery(make_admission())
    delivery.handle([arrival("a"), arrival("b")], "one", 0.0)
    assert [told(each) for each in delivery.handle([RequestEnded("a")], "one", 0.1)] == [[], ["b placed"]]
    assert [told(each) for each in delivery.handle([RequestEnded("b")], "one", 0.1)] == [[], []]


def test_what_was_decided_of_one_that_has_ended_since_is_not_delivered() -> None:
    """Its gateway may ask for it anew, and would take it for the answer."""
    delivery = Delivery(make_admission())
    delivery.handle([arrival("a")], "one", 0.0)
    delivery.handle([arrival("b"), arrival("c")], "two", 0.0)
    delivery.handle([RequestEnded("a")], "one", 0.1)
    answers = delivery.handle([RequestEnded("b"), arrival("b")], "two", 0.2)
    assert [told(each) for each in answers] == [[], ["b at 0"], ["c placed"]]
