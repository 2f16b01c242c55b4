"""Which worker gets which phase under each policy, through the controller."""

from __future__ import annotations

from collections import Counter

import pytest

from kvcache.errors import ConfigError
from kvcache.prefix import HashChain
from scheduler.cache_index import hashes_of_prompt, pack_names
from scheduler.controller import ClusterController
from scheduler.events import (
    Command,
    DrainWorker,
    PlaceRequest,
    RefuseRequest,
    RequestArrived,
    RequestEnded,
    WorkerLeft,
    WorkerRegistered,
    WorkerReported,
)
from scheduler.placement import PlacementOptions
from scheduler.policies import POLICIES, can_place
from scheduler.types import CacheDelta, Phase, WorkerInfo, WorkerLoad, WorkerRole
from tests.builders import BLOCK_SIZE, make_spec, make_worker

PREFILL, DECODE, COLOCATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
PROMPT = tuple(range(1, 41))
EVERY_POLICY = pytest.mark.parametrize("policy", sorted(POLICIES))


class Placing:
    """A controller with a policy."""

    def __init__(self, policy: str, *workers: WorkerInfo, seed: int = 0) -> None:
        self.controller = ClusterController(options=PlacementOptions(policy, seed=seed))
        self._num_requests = 0
        for worker in workers:
            assert self.controller.handle(WorkerRegistered(worker), 0.0) == []

    def place(self, num_prompt_tokens: int = 10, max_tokens: int = 5, avoid: tuple[str, ...] = ()) -> str:
        """Returns "prefill worker > decode worker", or the one worker of both."""
        return self.place_request(RequestArrived(self._next_id(), num_prompt_tokens, max_tokens, avoid))

    def place_prompt(self, prompt: tuple[int, ...], block_size: int = BLOCK_SIZE) -> str:
        hashes = (hashes_of_prompt(b"", block_size, prompt),)
        return self.place_request(RequestArrived(self._next_id(), len(prompt), 5, prefixes=hashes))

    def place_request(self, request: RequestArrived) -> str:
        (command,) = self.controller.handle(request, 0.0)
        assert isinstance(command, PlaceRequest)
        placement = command.placement
        assert placement.request_id == request.request_id
        prefill = f"{placement.prefill.worker_id} > " if placement.prefill else ""
        return prefill + placement.decode.worker_id

    def end(self, number: int) -> None:
        self.controller.handle(RequestEnded(f"r{number}"), 0.0)

    def publish(self, worker_id: str, prompt: tuple[int, ...], sequence: int = 0) -> list[Command]:
        """The worker says that it has all full blocks of a prompt."""
        names = HashChain(b"", BLOCK_SIZE).hashes(prompt)
        delta = CacheDelta(sequence, pack_names(names))
        return self.controller.handle(WorkerReported(worker_id, 1, WorkerLoad(), cache=delta), 0.0)

    def _next_id(self) -> str:
        self._num_requests += 1
        return f"r{self._num_requests - 1}"


@pytest.mark.parametrize(
    ("role", "phases"),
    [(PREFILL, {Phase.PREFILL}), (DECODE, {Phase.DECODE}), (COLOCATED, {Phase.PREFILL, Phase.DECODE})],
)
def test_a_role_says_which_phases_a_worker_takes(role: WorkerRole, phases: set[Phase]) -> None:
    assert {phase for phase in Phase if role.takes(phase)} == phases


def test_an_unknown_policy_is_refused_with_the_list_of_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'fastest'.*cost, cache_aware, least_loaded, power_of_two, random, round_r"):
        ClusterController(options=PlacementOptions("fastest"))


# What holds for every policy


@EVERY_POLICY
def test_each_phase_goes_to_a_worker_of_its_role(policy: str) -> None:
    """A long prompt on a slow device: in place it would hold up everybody."""
    placing = Placing(policy, make_worker("p", PREFILL), make_worker("d", DECODE, gemm_gflop_s=0.001))
    assert placing.place(200) == "p > d"


@EVERY_POLICY
def test_a_worker_of_both_roles_prefills_in_place(policy: str) -> None:
    assert Placing(policy, make_worker("c")).place() == "c"


@EVERY_POLICY
def test_without_a_decode_worker_a_request_is_refused(policy: str) -> None:
    for workers in ((), (make_worker("p", PREFILL),)):
        (command,) = Placing(policy, *workers).controller.handle(RequestArrived("r", 10, 5), 0.0)
        assert command == RefuseRequest("r", "No decode worker is available.")


@EVERY_POLICY
def test_without_a_prefill_worker_a_request_is_refused_or_prefilled_in_place(policy: str) -> None:
    (command,) = Placing(policy, make_worker("d", DECODE)).controller.handle(RequestArrived("r", 10, 5), 0.0)
    if policy == "cost":
        assert isinstance(command, PlaceRequest)
    else:
        assert command == RefuseRequest("r", "No prefill worker is available.")


@EVERY_POLICY
@pytest.mark.parametrize("is_draining", [False, True])
@pytest.mark.parametrize("roles", [(), *((role,) for role in WorkerRole), (PREFILL, DECODE), (PREFILL, COLOCATED)])
def test_a_snapshot_tells_whether_a_request_can_be_placed(
    policy: str, is_draining: bool, roles: tuple[WorkerRole, ...]
) -> None:
    placing = Placing(policy, *(make_worker(f"w{index}", role) for index, role in enumerate(roles)))
    if is_draining and roles:
        placing.controller.handle(DrainWorker(f"w{len(roles) - 1}", force=True), 0.0)
    can = can_place(placing.controller.snapshot(), PlacementOptions(policy))
    (command,) = placing.controller.handle(RequestArrived("r", 10, 5), 0.0)
    assert isinstance(command, PlaceRequest) is can


@EVERY_POLICY
def test_an_avoided_worker_is_taken_only_where_there_is_no_other(policy: str) -> None:
    placing = Placing(policy, *(make_worker(name) for name in "abc"))
    assert {placing.place(avoid=("a", "c")) for _ in range(20)} == {"b"}
    assert placing.place(avoid=("a", "b", "c")) in {"a", "b", "c"}


@EVERY_POLICY
def test_the_same_events_give_the_same_placements(policy: str) -> None:
    def placements() -> list[str]:
        placing = Placing(
            policy, *(make_worker(name, role) for name, role in zip("abcdef", [PREFILL, DECODE] * 3, strict=True))
        )
        return [placing.place(10 + 37 * number % 200) for number in range(50)]

    assert placements() == placements()


@EVERY_POLICY
def test_a_request_stays_where_part_of_its_kv_is_as_long_as_that_worker_lives(policy: str) -> None:
    placing = Placing(policy, *(make_worker(name) for name in "abc"))
    for number in range(10):
        assert placing.place_request(RequestArrived(f"bound{number}", 10, 5, stay_on="b")) == "b"
    assert placing.place_request(RequestArrived("free", 10, 5, stay_on="gone")) in {"a", "b", "c"}


@EVERY_POLICY
def test_a_colocated_worker_of_another_cache_prefills_for_nobody_else(policy: str) -> None:
    other = make_worker("c", COLOCATED, spec=make_spec(num_layers=3))
    placing = Placing(policy, make_worker("p", PREFILL), make_worker("d", DECODE), other)
    assert {placing.place() for _ in range(20)} <= {"p > d", "d", "c"}


# Each policy's own promise


def test_round_robin_goes_round() -> None:
    placing = Placing("round_robin", *(make_worker(name) for name in "abc"))
    assert [placing.place() for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]


def test_random_reaches_everybody_and_depends_on_the_seed() -> None:
    def placements(seed: int) -> list[str]:
        placing = Placing("random", *(make_worker(name) for name in "abcd"), seed=seed)
        return [placing.place() for _ in range(400)]

    counts = Counter(placements(1))
    assert set(counts) == set("abcd")
    assert min(counts.values()) > 60
    assert placements(1) != placements(2)


def test_power_of_two_balances_better_than_random() -> None:
    def most(policy: str) -> int:
        placing = Placing(policy, *(make_worker(f"w{index}") for index in range(50)))
        return max(Counter(placing.place() for _ in range(1000)).values())

    assert most("power_of_two") < most("random")


def test_least_loaded_weighs_decode_by_the_memory_rate() -> None:
    placing = Placing("least_loaded", *(make_worker(name, read_gb_s=rate) for name, rate in (("a", 10.0), ("b", 40.0))))
    assert Counter(placing.place() for _ in range(50)) == {"a": 10, "b": 40}


def test_least_loaded_weighs_prefill_by_the_arithmetic_rate() -> None:
    slow = make_worker("slow", PREFILL, gemm_gflop_s=100.0, read_gb_s=90.0)
    fast = make_worker("fast", PREFILL, gemm_gflop_s=400.0, read_gb_s=1.0)
    placing = Placing("least_loaded", slow, fast, make_worker("d", DECODE))
    assert Counter(placing.place() for _ in range(50)) == {"slow > d": 10, "fast > d": 40}


def test_least_loaded_takes_turns_among_idle_workers() -> None:
    placing = Placing("least_loaded", *(make_worker(name) for name in "abc"))
    chosen = []
    for number in range(6):
        chosen.append(placing.place())
        placing.end(number)
    assert chosen == ["a", "b", "c", "a", "b", "c"]


def test_a_decode_worker_may_get_its_prompt_from_a_worker_of_both_roles() -> None:
    placing = Placing("least_loaded", make_worker("c"))
    assert placing.place(100) == "c"
    assert placing.controller.handle(WorkerRegistered(make_worker("d", DECODE)), 0.0) == []
    assert placing.place() == "c > d"


@pytest.mark.parametrize("policy", ["cache_aware", "cost"])
def test_a_cached_prefix_draws_requests_until_its_worker_has_too_much_to_do(policy: str) -> None:
    placing = Placing(policy, *(make_worker(name, gemm_gflop_s=0.01) for name in "abcd"))
    placing.publish("c", PROMPT)
    assert placing.place_prompt(PROMPT) == "c"
    assert len({placing.place_prompt(PROMPT) for _ in range(20)}) > 1


@pytest.mark.parametrize("policy", ["cache_aware", "cost"])
def test_each_phase_looks_at_the_cache_of_its_own_workers(policy: str) -> None:
    slow = 0.01
    prefills = [make_worker(f"p{index}", PREFILL, gemm_gflop_s=slow) for index in range(3)]
    decodes = [make_worker(f"d{index}", DECODE, gemm_gflop_s=slow / 1000) for index in range(3)]
    placing = Placing(policy, *prefills, *decodes)
    placing.publish("p1", PROMPT[:20])
    placing.publish("d2", PROMPT[:20])
    assert placing.place_prompt(PROMPT) == "p1 > d2"


@pytest.mark.parametrize("policy", ["cache_aware", "cost"])
def test_workers_of_other_block_sizes_are_found_by_hashes_of_their_own(policy: str) -> None:
    workers = [make_worker(name, gemm_gflop_s=0.01, spec=make_spec(block_size=8)) for name in "abc"]
    placing = Placing(policy, *workers)
    names = HashChain(b"", 8).hashes(PROMPT)
    placing.controller.handle(WorkerReported("b", 1, WorkerLoad(), cache=CacheDelta(0, pack_names(names))), 0.0)
    assert placing.place_prompt(PROMPT, block_size=8) == "b"


@EVERY_POLICY
def test_a_sequence_stays_where_part_of_its_kv_is_as_long_as_that_worker_lives(policy: str) -> None:
    cluster = Placing(policy, *(make_worker(name, DECODE) for name in "abc"), make_worker("p", PREFILL))
    for number in range(4):
        request = RequestArrived(f"kept{number}", 10, 5, avoid=("p",), stay_on="b")
        assert cluster.place_request(request).split(" > ")[-1] == "b"
    cluster.controller.handle(WorkerLeft("b", 1), 0.0)
    assert cluster.place_request(RequestArrived("last", 10, 5, stay_on="b")).split(" > ")[-1] != "b"
