"""Device profiles by name and from files; what is wrong in one is said in a sentence."""

from __future__ import annotations

import csv
from pathlib import Path

import orjson
import pytest
import yaml

from engine.config import load_config
from engine.device_profiles import SHIPPED_FILE, load_profile, shipped_names
from engine.startup import _device_profile
from kvcache.errors import ConfigError
from scheduler.types import DeviceProfile, GemmRate, WorkerRole

PEAKS = Path(__file__).with_name("gpu_peaks.csv")  # says where they are from
GOOD = """
name: ours
gemm_gflop_s: 1000
gemm_efficiency: 0.5
read_gb_s: 100
read_efficiency: 0.8
attention_efficiency: 0.6
memory_bytes: 2GiB
price_per_hour: 1.5
gemm_rates: [{rows: 64, gflop_s: 900}, {rows: 1, gflop_s: 40}]
sources: {price_per_hour: our invoice}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "profile.yaml"


def test_a_file_says_peaks_and_the_part_of_them_that_is_reached(file: Path) -> None:
    file.write_text(GOOD)
    profile = load_profile(str(file))
    assert (profile.gemm_gflop_s, profile.read_gb_s, profile.attention_gb_s) == (500.0, 80.0, 60.0)
    assert profile.gemm_rates == (GemmRate(1, 20.0), GemmRate(64, 450.0))
    assert (profile.memory_bytes, profile.price_per_hour) == (2 << 30, 1.5)
    sources = dict(profile.sources)
    assert sources["price_per_hour"] == "our invoice" and sources["read_gb_s"] == str(file)


def test_parts_of_the_peak_may_be_said_by_rows_and_of_the_attention_of_prompts(file: Path) -> None:
    without_rates = GOOD.replace("gemm_rates", "gemm_efficiency_by_rows").replace("[{rows: 64, gflop_s: 900}, ", "")
    by_rows = without_rates.replace("{rows: 1, gflop_s: 40}]", "{512: 0.5, 64: 0.25}")
    file.write_text(by_rows + "prompt_attention_efficiency: 0.3\nlayer_s: 2.0e-5\n")
    profile = load_profile(str(file))
    assert profile.gemm_rates == (GemmRate(64, 250.0), GemmRate(512, 500.0))
    assert (profile.prompt_attention_gflop_s, profile.layer_s) == (300.0, 2e-5)


def test_what_a_probe_writes_can_be_read(file: Path) -> None:
    measured = DeviceProfile("cpu", 100.5, 20.5, 1 << 33, 2, 0.0, (GemmRate(1, 10.0),), 15.0, 0.0, ())
    file.write_bytes(orjson.dumps(measured))
    read = load_profile(str(file))
    assert read.gemm_rates == measured.gemm_rates
    assert (read.gemm_gflop_s, read.attention_gb_s, read.num_threads) == (100.5, 15.0, 2)


def test_every_shipped_profile_can_be_read_and_names_the_source_of_each_number() -> None:
    for name in shipped_names():
        profile = load_profile(name)
        known = {key for key in ("gemm_gflop_s", "read_gb_s", "memory_bytes") if getattr(profile, key)}
        known |= {key for key in ("link_gb_s", "price_per_hour") if getattr(profile, key)}
        sources = dict(profile.sources)
        assert known <= set(sources) and "the shipped profiles" not in sources.values(), name


def peaks() -> list[dict[str, str]]:
    with PEAKS.open(encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


@pytest.mark.parametrize("row", peaks(), ids=lambda row: row["profile"])
def test_a_shipped_profile_holds_the_peaks_of_its_data_sheet(row: dict[str, str]) -> None:
    profile, peak = load_profile(row["profile"]), yaml.safe_load(SHIPPED_FILE.read_text())[row["profile"]]
    assert profile.name == row["gpu"]
    assert float(peak["gemm_gflop_s"]) == pytest.approx(1000 * float(row["bf16_tflop_s"]))
    assert float(peak["read_gb_s"]) == float(row["memory_gb_s"])
    assert profile.memory_bytes == int(row["memory_gb"]) * 10**9
    assert profile.link_gb_s == float(row["nic_gbit_s"] or 0) / 8
    assert profile.price_per_hour == float(row["price_per_hour"] or 0)
    assert profile.gemm_gflop_s < float(peak["gemm_gflop_s"]) and profile.read_gb_s < float(peak["read_gb_s"])


def test_every_shipped_profile_has_a_data_sheet() -> None:
    assert [row["profile"] for row in peaks()] == list(shipped_names())


def test_shipped_profiles_hold_what_was_measured() -> None:
    """H100 sustains 0.80 of 989 TFLOP/s in large products and, once kernels run, 0.92 of 3,350 GB/s in attention."""
    h100 = load_profile("H100-SXM")
    assert h100.gemm_gflop_s == pytest.approx(0.80 * 989_000) and h100.attention_gb_s == pytest.approx(0.92 * 3350)
    assert h100.gemm_rates[0] == GemmRate(64, pytest.approx(0.18 * 989_000)) and h100.layer_s == 26e-6
    assert load_profile("h20").price_per_hour == 0  # nobody names one


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: [", "is no YAML or JSON"),
        ("- 1", "must hold keys and values"),
        (GOOD.replace("gemm_gflop_s: 1000", ""), "gemm_gflop_s: field required"),
        (
            GOOD.replace("read_gb_s: 100", "read_gb_s: fast"),
            "read_gb_s, which is 'fast': input should be a valid number",
        ),
        (GOOD.replace("read_gb_s: 100", "read_gb_s: 0"), "read_gb_s, which is 0: input should be greater than 0"),
        (GOOD.replace("read_gb_s: 100", "read_gb_s: .inf"), "read_gb_s, which is inf: input should be a finite number"),
        (GOOD.replace("0.5", "1.5"), "gemm_efficiency, which is 1.5: input should be less than or equal to 1"),
        (GOOD.replace("rows: 64", "rows: 0"), "gemm_rates.0.rows, which is 0"),
        (GOOD + "gemm_efficiency_by_rows: {8: 0.5}\n", "gemm_rates says the same"),
        (GOOD + "tflops: 3\n", "tflops, which is 3: extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_profile(str(file))
    assert message in str(caught.value) and str(file) in str(caught.value)


def test_a_name_that_is_neither_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"--device-profile is 'h1000': no file, and no shipped profile; .*h100-sxm"):
        load_profile("h1000")


def test_a_pool_may_have_its_own_profile() -> None:
    config = load_config({"device_profile": "a100-sxm", "prefill_device_profile": "h100-sxm"})
    prefill, decode = (_device_profile(config, role) for role in (WorkerRole.PREFILL, WorkerRole.DECODE))
    assert prefill == load_profile("h100-sxm") and decode == load_profile("a100-sxm")
    assert _device_profile(load_config({}), WorkerRole.PREFILL) is None
    with pytest.raises(ConfigError, match="--decode-device-profile is 'nothing'"):
        _device_profile(load_config({"decode_device_profile": "nothing"}), WorkerRole.DECODE)


def test_a_pool_profile_without_pools_is_refused() -> None:
    with pytest.raises(ConfigError, match="colocated has one"):
        load_config({"colocated": "1", "prefill_device_profile": "h100-sxm"})
