"""One cluster of three kinds of devices, as files of profiles say: which gets which phase of which request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from scheduler.controller import ClusterController
from scheduler.events import PlaceRequest, RequestArrived
from scheduler.placement import PlacementOptions
from scheduler.types import ClusterSnapshot
from tests.cluster import TinyCheckpoint
from tests.e2e.server import RunningServer, serving
from tests.e2e.traffic import SMALL, saved_tiny

pytestmark = pytest.mark.e2e

TTFT_MS, TPOT_MS = 200, 50
# Rates so low that the tiny model takes as long on them as a large one on real devices.
DEVICES = {
    "compute": "{name: compute-heavy, gemm_gflop_s: 50, read_gb_s: 0.2, memory_bytes: 1GB, price_per_hour: 4}",
    "bandwidth": "{name: bandwidth-heavy, gemm_gflop_s: 1, read_gb_s: 5, memory_bytes: 1GB, price_per_hour: 2}",
    "cheap": "{name: slow and cheap, gemm_gflop_s: 0.5, read_gb_s: 0.5, memory_bytes: 1GB, price_per_hour: 0.2}",
}
LONG, SHORT = (400, 60), (20, 5)  # tokens of prompt and answer


def where_the_cost_model_says(cluster: ClusterSnapshot, sizes: tuple[int, int]) -> list[str]:
    """Asked beside the server, of a controller that knows its workers and has seen none of their steps."""
    targets = PlacementOptions("cost", TTFT_MS / 1000, TPOT_MS / 1000)
    controller = ClusterController.from_snapshot(cluster, (), targets, 0.0)
    (command,) = controller.handle(RequestArrived("r", *sizes), 0.0)
    assert isinstance(command, PlaceRequest)
    placement = command.placement
    return [each.worker_id for each in (placement.prefill, placement.decode) if each is not None]


def ask(server: RunningServer, tiny: TinyCheckpoint, sizes: tuple[int, int]) -> list[str]:
    """The workers that one request was placed on; its tokens are compared with the reference."""
    before = placed(server)
    prompt = tiny.prompt(sizes[0])
    body = {"prompt": list(prompt), "max_tokens": sizes[1], "temperature": 0, "return_token_ids": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert tuple(answer["choices"][0]["token_ids"]) == tiny.greedy(prompt, sizes[1])
    server.wait_until_idle()
    return sorted((placed(server) - before).elements(), reverse=True)


def placed(server: RunningServer) -> Counter[str]:
    return Counter({each.info.worker_id: each.requests_placed for each in server.cluster().workers})


def profile_flags(folder: Path, pools: Sequence[tuple[str, str]]) -> list[str]:
    flags = []
    for flag, device in pools:
        file = folder / f"{device}.yaml"
        file.write_text(DEVICES[device])
        flags += [flag, str(file)]
    return flags


def test_each_phase_is_placed_where_the_cost_model_says(tmp_path: Path) -> None:
    """Long prompts: by the compute-heavy device, and decoded by the bandwidth-heavy. Short ones: by the cheap one."""
    tiny = saved_tiny(tmp_path)
    pools = (
        ("--prefill-device-profile", "compute"),
        ("--decode-device-profile", "bandwidth"),
        ("--device-profile", "cheap"),
    )
    flags = (
        *("--prefill-workers", "1", "--decode-workers", "1", "--colocated", "1", "--placement-policy", "cost"),
        *("--ttft-target-ms", str(TTFT_MS), "--tpot-target-ms", str(TPOT_MS), *profile_flags(tmp_path, pools)),
    )
    with serving(str(tiny.path), *flags, *SMALL, expected_workers=3) as server:
        cluster = server.cluster()
        assert {each.info.device.name for each in cluster.workers} == {
            "compute-heavy",
            "bandwidth-heavy",
            "slow and cheap",
        }
        said = {sizes: where_the_cost_model_says(cluster, sizes) for sizes in (LONG, SHORT)}
        assert said == {LONG: ["prefill-0", "decode-0"], SHORT: ["colocated-0"]}
        assert {sizes: ask(server, tiny, sizes) for sizes in said} == said
