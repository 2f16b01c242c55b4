"""The worked example in docs/placement.md: every number in its table is what the code says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.policies import A100, H100, L40S, SHAPE
from scheduler.events import RequestArrived
from scheduler.placement import Choice
from scheduler.types import WorkerRole
from tests.builders import make_spec, make_worker
from tests.unit.scheduler.test_cost_placement import NUM_OUTPUT, Fleet, judged, predicted

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "placement.md"
PROMPT_TOKENS = 4000
TTFT_S, TPOT_S = 1.0, 0.05


def example() -> Fleet:
    """Two prefill and two decode workers: one of each kind is dear and busy, the other cheap and idle."""
    places = (
        ("prefill-0", WorkerRole.PREFILL, H100),
        ("prefill-1", WorkerRole.PREFILL, L40S),
        ("decode-0", WorkerRole.DECODE, A100),
        ("decode-1", WorkerRole.DECODE, L40S),
    )
    infos = [
        replace(
            make_worker(name, role, spec=make_spec(block_size=16)),
            device=device, shape=SHAPE, num_blocks=12_000, max_num_batched_tokens=2048,
        )
        for name, role, device in places
    ]  # fmt: skip
    fleet = Fleet(*infos, ttft_s=TTFT_S, tpot_s=TPOT_S)
    fleet.burden("prefill-0", prefill_s=0.3)
    fleet.burden("decode-0", decodes=32, context=2000)
    return fleet


def rows(fleet: Fleet) -> list[str]:
    """The table, as it stands in the document."""
    request = RequestArrived("r", PROMPT_TOKENS, 500)
    lines = []
    for decode in ("decode-0", "decode-1"):
        for prefill in (None, "prefill-0", "prefill-1"):
            choice = Choice(fleet.worker(decode), fleet.worker(prefill) if prefill else None)
            outcome = predicted(fleet, request, choice)
            level = ("yes", "no: TTFT", "no: pace")[judged(fleet, outcome)[0]]
            lines.append(
                f"| {prefill or 'in place'} | {decode} | {1000 * outcome.ttft_s:.0f} | {outcome.finish_s:.2f}"
                f" | {100 * outcome.cost / 3600:.4f} | {level} |"
            )
    return lines


def test_the_table_of_the_worked_example_is_what_the_code_computes() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    fleet = example()
    missing = [row for row in rows(fleet) if row not in text]
    assert not missing, "\n".join(missing)
    choice = fleet.choose(RequestArrived("r", PROMPT_TOKENS, 500))
    assert choice.prefill is not None
    assert f"chosen: **{choice.prefill.worker_id} → {choice.decode.worker_id}**" in text
    assert f"{NUM_OUTPUT} tokens" in text
