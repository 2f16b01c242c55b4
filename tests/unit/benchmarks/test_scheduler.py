"""The scheduler's bench: its command line, a small run of its first part, and its servers."""

from __future__ import annotations

import sys
from pathlib import Path

import orjson
import pytest

from benchmarks import scheduler, scheduler_mixed
from benchmarks.scheduler import Settings, run
from benchmarks.scheduler_core import CoreResult, measure_core
from benchmarks.scheduler_live import LiveResult
from benchmarks.scheduler_mixed import (
    MixedLoad,
    Target,
    measure_capacity,
    measure_mixed,
    medians,
    run_load,
    running,
    stage_times,
    targets,
)
from engine.metrics import Metrics
from kvcache.errors import ConfigError, ResourceError
from scheduler.types import ClusterSnapshot
from workers.stages import Stage

PROMISED = {
    "placements_per_s",
    "p99_us",
    "growth_10_to_10000",
    "live_placements_per_s",
    "ttft_added_ms",
    "cost_model_error",
    "mixed",
}
LOAD = MixedLoad(Path("load.py"), 1.0, 0.7, 0.12, 1500.0, 120.0)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--parts", "core,speed"], "core, live, cost, mixed"),
        (["--parts", ""], "core, live, cost, mixed"),
        (["--policy", "best"], "round_robin"),
        (["--placements", "5"], "at least 1000"),
        (["--parts", "mixed"], "--mixed-load"),
        (["--own", "three_pools"], "two_pools, colocated"),
        (["--peer", "vllm"], "NAME=URL"),
        (["--peer", "vllm=serve --model x"], "does not say"),
        (["--parts", "capacity"], "need --mixed-load"),
        (["--chat-rates", "0.5,0.2"], "growing numbers"),
        (["--json", "nowhere/result.json"], "there is no folder nowhere"),
        (["--chat-rates", "fast"], "growing numbers"),
        (["--peer", "two_pools=http://there:1"], "same name"),
    ],
)
def test_a_wrong_flag_is_told_in_a_sentence(arguments: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Settings(arguments)


def test_all_parts_are_measured_that_nothing_more_is_needed_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert Settings([]).parts == ["core", "live", "cost"]
    told = capsys.readouterr().err
    assert told == "mixed is left out: it needs --mixed-load, the script that makes the load\n"
    assert Settings(["--mixed-load", "load.py"]).parts == ["core", "live", "cost", "mixed"]
    assert Settings(["--parts", "core"]).parts == ["core"]
    assert capsys.readouterr().err == ""


def test_the_file_has_the_keys_of_all_parts_and_those_measured_when_a_later_one_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_args: object) -> object:
        raise ResourceError("no cluster")

    core = CoreResult(6, 50, 5, 900.0, 1000.0, 5.0, 4.0, 9.0, 10.0)
    monkeypatch.setattr(scheduler, "measure_core", lambda *_args, **_kwargs: core)
    monkeypatch.setattr(scheduler, "measure_live", lambda *_args, **_more: LiveResult(800.0, 2.0, 9.0))
    monkeypatch.setattr(scheduler, "_cost_model_error", lambda: {"tpot_median": 0.1, "ttft_median": 0.2, "more": 1.0})
    monkeypatch.setattr(scheduler, "measure_mixed", lambda *_args: [{"two_pools": {"median": {}}}])
    file = tmp_path / "result.json"
    assert run(["--mixed-load", "load.py", "--json", str(file)]) == 0
    result = orjson.loads(file.read_bytes())
    assert set(result) >= PROMISED
    assert set(result["ttft_added_ms"]) == {"p50", "p99"}
    assert set(result["cost_model_error"]) == {"tpot_median", "ttft_median"}
    monkeypatch.setattr(scheduler, "_cost_model_error", fails)
    with pytest.raises(ResourceError, match="no cluster"):
        run(["--json", str(file)])
    assert set(orjson.loads(file.read_bytes())) == set(result) - {"cost_model_error", "mixed"}


def test_a_peer_is_a_command_with_a_port_or_a_url() -> None:
    found = targets(["colocated"], ["a=serve --port {port}", "b=https://there:1/"], 8123)
    assert [(target.name, target.url) for target in found] == [
        ("colocated", "http://127.0.0.1:8123"),
        ("a", "http://127.0.0.1:8123"),
        ("b", "https://there:1"),
    ]
    assert [bool(target.command) for target in found] == [True, True, False]
    assert found[1].command == "serve --port 8123"


def test_rates_grow_until_a_server_cannot_keep_up(monkeypatch: pytest.MonkeyPatch) -> None:
    goodput = {0.5: 1.0, 1.0: 0.93, 1.5: 0.7, 2.0: 1.0}
    monkeypatch.setattr(
        scheduler_mixed, "run_load", lambda _url, load, seed: {"goodput": goodput[load.chat_rate], "seed": seed}
    )
    found = measure_capacity([Target("a", "http://there:1")], LOAD, [0.5, 1.0, 1.5, 2.0])
    assert found["a"]["highest_chat_rate"] == 1.0
    assert list(found["a"]["runs"]) == ["0.5", "1.0", "1.5"]  # type: ignore[call-overload]


def test_the_mixed_load_is_told_after_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_mixed, "run_load", lambda _url, _load, seed: {"itl_p50": 10.0 * seed})
    monkeypatch.setattr(scheduler_mixed, "_page", lambda _url: "")
    told = measure_mixed([Target("a", "http://there:1"), Target("b", "http://here:1")], LOAD, rounds=3)
    medians_of = [{name: numbers["median"] for name, numbers in so_far.items()} for so_far in told]
    assert medians_of == [{name: {"itl_p50": median} for name in "ab"} for median in (0.0, 5.0, 10.0)]


def test_our_servers_are_told_the_targets_of_the_load() -> None:
    [found] = targets(["two_pools"], [], 8123, ttft_ms=1500.0, tpot_ms=62.5)
    assert found.command.count("{") == 0
    assert "--ttft-target-ms 1500 --tpot-target-ms 62.5" in found.command


@pytest.mark.parametrize("with_admission", [False, True])
def test_a_small_cluster_places_and_its_numbers_agree(with_admission: bool) -> None:
    result = measure_core(num_workers=6, num_in_flight=250, num_placements=50, with_admission=with_admission)
    assert (result.num_workers, result.num_placements) == (6, 50)
    assert 0 < result.p50_us <= result.p99_us <= result.max_us
    assert result.requests_per_s <= result.placements_per_s == pytest.approx(1e6 / result.mean_us)


def test_the_median_is_over_the_rounds_that_have_the_number() -> None:
    runs: list[dict[str, float | None]] = [{"a": 1.0, "b": None}, {"a": 5.0, "b": 2.0}, {"a": 3.0, "c": None}]
    assert medians(runs) == {"a": 3.0, "b": 2.0, "c": None}


def test_a_script_that_prints_no_numbers_is_an_error_with_its_words(tmp_path: Path) -> None:
    script = tmp_path / "load.py"
    script.write_text("import sys; sys.exit('no such server')")
    load = MixedLoad(script, 1.0, 0.7, 0.12, 1500.0, 120.0)
    with pytest.raises(ResourceError, match="no such server"):
        run_load("http://127.0.0.1:1", load, seed=0)


def test_a_server_that_ends_at_once_is_an_error_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_mixed, "_answers", lambda _url: False)
    command = f"{sys.executable} -c \"raise SystemExit('no memory')\""
    with pytest.raises(ResourceError, match="no memory"), running(Target("x", "http://127.0.0.1:1", command)):
        pass


def test_stage_times_are_quantiles_of_the_servers_histograms() -> None:
    metrics = Metrics("tiny", ClusterSnapshot)
    for seconds in (0.03, 0.03, 0.03, 0.09):
        metrics.observe_stages({Stage.TRANSFER: seconds})
    told = stage_times(metrics.exposition().decode())
    # Of four, the second lies two thirds into 20 to 40 ms, which holds three; 95 % are four fifths into 80 to 100 ms.
    assert told == {"stage_transfer_p50": pytest.approx(33.3), "stage_transfer_p95": pytest.approx(96.0)}


def test_a_server_that_tells_no_stages_has_none() -> None:
    assert stage_times("vllm:num_requests_running 1.0\n") == stage_times("") == {}
