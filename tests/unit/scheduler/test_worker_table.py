"""The heaps against a scan of all workers, and who has been silent for how long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.types import Duty, DutyState, Phase, WorkerLoad, WorkerRole
from scheduler.worker_state import WorkerState
from scheduler.worker_table import Rank, WorkerTable
from tests.builders import make_worker, repeatable

NAMES = [f"w{index}" for index in range(12)]
ROLES = list(WorkerRole)
DUTIES = (Duty(), Duty(DutyState.DRAINING), Duty(DutyState.DRAINING, WorkerRole.DECODE))


def rank(_phase: Phase, worker: WorkerState) -> Rank:
    return (worker.tokens_in_flight, worker.worker_id)


def group(worker: WorkerState) -> object:
    """Of what never changes, and of something that is learned."""
    return worker.info.device.read_gb_s, worker.requests_placed


def scanned(table: WorkerTable, phase: Phase, avoid: tuple[str, ...]) -> set[str]:
    """The best of each group, by looking at everybody."""
    able = [worker for worker in table if worker.takes(phase)]
    able = [worker for worker in able if worker.worker_id not in avoid] or able
    groups = {group(worker) for worker in able}
    return {
        min((worker for worker in able if group(worker) == each), key=lambda worker: rank(phase, worker)).worker_id
        for each in groups
    }


operations = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "change", "learn", "ask"]), st.sampled_from(NAMES), st.integers(0, 20)),
    max_size=120,
)


@given(operations)
@repeatable(150)
def test_what_the_table_knows_is_what_a_scan_finds(drawn: list[tuple[str, str, int]]) -> None:
    table = WorkerTable(rank, group)
    for operation, name, number in drawn:
        worker = table.get(name)
        if operation == "add" and worker is None:
            info = make_worker(name, ROLES[number % 3], read_gb_s=1.0 + number % 2)
            table.add(WorkerState(info, WorkerLoad(), 0.0, DUTIES[number // 7]))
        elif operation == "remove" and worker is not None:
            table.remove(worker)
        elif operation == "change" and worker is not None:
            worker.tokens_in_flight = number
            table.changed(worker)
        elif operation == "learn" and worker is not None:
            worker.requests_placed = number % 3
            table.learned(worker)
        elif operation == "ask":
            avoid = tuple(NAMES[: number % 5])
            for phase in Phase:
                assert {each.worker_id for each in table.best(phase, avoid)} == scanned(table, phase, avoid)
                assert {each.worker_id for each in table.taking(phase)} == {
                    each.worker_id for each in table if each.takes(phase)
                }
            for role in WorkerRole:
                assert {each.worker_id for each in table.of_role(role)} == {
                    each.worker_id for each in table if each.is_active and each.role is role
                }
            assert table.num_changing == sum(each.duty.next_role is not None for each in table)


def test_a_thousand_changes_leave_no_thousand_entries_behind() -> None:
    table = WorkerTable(rank)
    worker = WorkerState(make_worker("a"), WorkerLoad(), 0.0)
    table.add(worker)
    for number in range(1000):
        worker.tokens_in_flight = number
        table.changed(worker)
    assert all(len(heap.entries) < 100 for heaps in table._heaps.values() for heap in heaps.values())
    assert table.best(Phase.DECODE) == [worker]


def test_the_silent_ones_are_found_in_the_order_of_their_silence() -> None:
    table = WorkerTable()
    workers = [WorkerState(make_worker(name), WorkerLoad(), float(index)) for index, name in enumerate("abcd")]
    for worker in workers:
        table.add(worker)
    workers[0].hear(WorkerLoad(), 10.0)
    table.heard(workers[0])
    assert [worker.worker_id for worker in table.silent_since(3.0)] == ["b", "c"]
    assert [worker.worker_id for worker in table.silent_since(11.0)] == ["b", "c", "d", "a"]
