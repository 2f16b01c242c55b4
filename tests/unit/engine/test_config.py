"""Flags, environment and file: who wins, and what is refused by name."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from engine.config import ServeConfig, add_arguments, load_config
from engine.machine_limits import available_memory_bytes, usable_cores
from kvcache.errors import ConfigError
from scheduler.types import WorkerRole


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("port: 1111\nblock-size: 8\nmax_num_seqs: 3\n")
    monkeypatch.setenv("TWINPOOL_PORT", "2222")
    monkeypatch.setenv("TWINPOOL_BLOCK_SIZE", "32")
    config = load_config({"port": "3333"}, file)
    assert (config.port, config.block_size, config.max_num_seqs) == (3333, 32, 3)


def test_the_pools_follow_from_what_is_given() -> None:
    def pools(**flags: str) -> tuple[int, int, int]:
        config = load_config(flags)
        return config.num_prefill_workers, config.num_decode_workers, config.colocated

    assert pools() == (1, 1, 0)
    assert pools(prefill_workers="3") == (3, 1, 0)
    assert pools(colocated="2") == (0, 0, 2)
    assert pools(colocated="1", prefill_workers="1", decode_workers="2") == (1, 2, 1)


def test_each_pool_may_have_its_own_degree_of_tensor_parallelism() -> None:
    def sizes(**flags: str) -> tuple[int, ...]:
        config = load_config(flags)
        return (*(config.tensor_parallel_size_of(role) for role in WorkerRole), config.num_ranks)

    assert sizes() == (1, 1, 1, 2)
    assert sizes(tensor_parallel_size="2") == (2, 2, 2, 4)
    assert sizes(tensor_parallel_size="2", prefill_tensor_parallel_size="1", decode_workers="3") == (1, 2, 2, 7)
    mixed = sizes(tensor_parallel_size="2", colocated="2", prefill_workers="1", decode_workers="1")
    assert mixed == (2, 2, 2, 8)


@pytest.mark.parametrize("flag", ["-tp", "--tensor-parallel-size"])
def test_the_degree_has_a_short_flag(flag: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args([flag, "4"]).tensor_parallel_size == "4"


def test_the_option_that_decided_a_degree_is_named() -> None:
    config = load_config({"tensor_parallel_size": "2", "decode_tensor_parallel_size": "4"})
    options = {role: config.option_of(role, "tensor_parallel_size") for role in WorkerRole}
    assert options == {
        WorkerRole.PREFILL: "tensor_parallel_size",
        WorkerRole.DECODE: "decode_tensor_parallel_size",
        WorkerRole.COLOCATED: "tensor_parallel_size",
    }


def test_each_pool_may_have_its_own_blocks_and_kv_dtype() -> None:
    config = load_config({"block_size": "32", "decode_block_size": "64", "prefill_kv_cache_dtype": "int8"})
    assert [config.block_size_of(role) for role in (WorkerRole.PREFILL, WorkerRole.DECODE)] == [32, 64]
    assert [config.kv_cache_dtype_of(role) for role in (WorkerRole.PREFILL, WorkerRole.DECODE)] == ["int8", "auto"]


@pytest.mark.parametrize("name", ["decode_block_size", "prefill_block_size"])
def test_without_two_pools_there_is_nothing_that_could_differ(name: str) -> None:
    with pytest.raises(ConfigError, match="block_size could differ"):
        load_config({"colocated": "1", name: "32"})


def test_a_step_has_a_token_for_each_sequence_of_the_batch() -> None:
    """Of the two limits, the one that was not given follows the other where its default would not do."""

    def limits(**flags: str) -> tuple[int, int]:
        batch = load_config(flags).batch_limits
        return batch.max_num_seqs, batch.max_num_batched_tokens

    assert limits() == (64, 512)
    assert limits(max_num_seqs="128") == (128, 512)
    assert limits(max_num_seqs="1024") == (1024, 1024)
    assert limits(max_num_batched_tokens="2048") == (64, 2048)
    assert limits(max_num_batched_tokens="16") == (16, 16)
    assert limits(max_num_seqs="8", max_num_batched_tokens="8") == (8, 8)


def test_sizes_are_written_as_people_write_them() -> None:
    assert load_config({"kv_cache_memory_bytes": "1.5GiB"}).kv_cache_memory_bytes == 3 << 29


def test_the_prefix_cache_can_be_turned_off_in_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*arguments: str) -> bool:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        flags = {name: value for name, value in vars(parser.parse_args(arguments)).items() if name != "config"}
        return load_config(flags).enable_prefix_caching

    assert parse() is True
    assert parse("--enable-prefix-caching") is True
    assert parse("--no-enable-prefix-caching") is False
    file = tmp_path / "cluster.yaml"
    file.write_text("enable-prefix-caching: false\n")
    assert load_config({}, file).enable_prefix_caching is False
    monkeypatch.setenv("TWINPOOL_ENABLE_PREFIX_CACHING", "false")
    assert parse() is False
    assert parse("--enable-prefix-caching") is True


def test_keys_come_from_repeated_flags_or_from_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config({"api_key": ["a", "b"]}).api_key == ("a", "b")
    monkeypatch.setenv("TWINPOOL_API_KEY", "c, d")
    assert load_config({}).api_key == ("c", "d")


@pytest.mark.parametrize("keys", ["", " ", "a,,b", "schlüssel", "a\tb"])
def test_a_key_that_cannot_work_is_refused_and_not_repeated(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty secret must not turn the lock off."""
    monkeypatch.setenv("TWINPOOL_API_KEY", keys)
    with pytest.raises(ConfigError, match="TWINPOOL_API_KEY: a key must be") as caught:
        load_config({})
    assert "schlüssel" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": "x"}, "--port is 'x'"),
        ({"decode_workers": "0"}, "prefill_workers is 1 and decode_workers 0"),
        ({"prefill_workers": "0", "decode_workers": "0"}, "no workers"),
        ({"colocated": "1", "decode_tensor_parallel_size": "2"}, "no two pools whose tensor_parallel_size"),
        (
            {"tensor_parallel_size": "2", "threads_per_worker": "3"},
            "threads_per_worker is 3 and a prefill worker",
        ),
        ({"decode_tensor_parallel_size": "4", "threads_per_worker": "2"}, "a decode worker has 4 ranks"),
        ({"tensor_parallel_size": "0"}, "--tensor-parallel-size is '0'"),
        ({"dtype": "int3"}, "--dtype is 'int3'"),
        ({"kv_cache_dtype": "fp4"}, "--kv-cache-dtype is 'fp4'"),
        ({"kv_transfer_dtype": "int8", "colocated": "1"}, "colocated workers hand nothing over"),
        ({"kv_host_cache_bytes": "many"}, "--kv-host-cache-bytes is 'many'"),
        ({"kv_file_cache_dir": "/tmp/kv"}, "kv_file_cache_dir and kv_file_cache_bytes need each other"),
        ({"kv_file_cache_bytes": "1GiB"}, "kv_file_cache_dir and kv_file_cache_bytes need each other"),
        ({"kv_host_cache_bytes": "1GiB", "enable_prefix_caching": "0"}, "enable_prefix_caching is off"),
        ({"kv_offer_rate": "1MiB", "enable_prefix_caching": "0"}, "enable_prefix_caching is off"),
        ({"kv_offer_rate": "1MiB", "colocated": "1"}, "kv_offer_rate is for two pools"),
        ({"ttft_target_ms": "inf"}, "--ttft-target-ms is 'inf'"),
        ({"ttft_target_ms": "nan"}, "--ttft-target-ms is 'nan'"),
        ({"tpot_target_ms": "inf"}, "--tpot-target-ms is 'inf'"),
        ({"drain_timeout": "nan"}, "--drain-timeout is 'nan'"),
        ({"shutdown_timeout": "nan"}, "--shutdown-timeout is 'nan'"),
        ({"gpu_memory_utilization": "nan"}, "--gpu-memory-utilization is 'nan'"),
        (
            {"max_num_seqs": "6", "max_num_batched_tokens": "2"},
            "max_num_seqs is 6 and max_num_batched_tokens 2: a step has no token for each sequence",
        ),
    ],
)
def test_a_bad_value_is_named(flags: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(flags)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1\n", "'prot'.*names no option"),
        ("port: many\n", "port in .*cluster.yaml is 'many'"),
        ("- 1\n", "must hold keys and values"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config({}, file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        load_config({}, tmp_path / "nowhere.yaml")


def test_an_environment_variable_that_names_no_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINPOOL_PROT", "1")
    with pytest.raises(ConfigError, match="TWINPOOL_PROT"):
        load_config({})


def test_every_option_has_a_description() -> None:
    assert all(field.description for field in ServeConfig.model_fields.values())


def test_a_container_s_limits_count(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path) > 0
    assert usable_cores(tmp_path) >= 1
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert available_memory_bytes(tmp_path) == 2_000_000
    assert usable_cores(tmp_path) == 1
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert available_memory_bytes(tmp_path) > 2_000_000


def test_certificates_made_here_are_refused_for_other_machines() -> None:
    """A flag that could not be honoured: the other nodes would not find them."""
    with pytest.raises(ConfigError, match="grpc_tls_dir"):
        load_config({"grpc_tls": True, "address": "auto"})
    assert load_config({"grpc_tls": True}).grpc_tls
    assert load_config({"grpc_tls_dir": "certificates", "address": "auto"}).grpc_tls_dir == Path("certificates")


def test_a_port_of_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="--kv-transfer-port is 'nixl'"):
        load_config({"kv_transfer_port": "nixl"})
    assert load_config({}).kv_transfer_port == "auto"


@pytest.mark.parametrize("tls", [{"grpc_tls": True}, {"grpc_tls_dir": "certificates"}])
def test_kv_over_rdma_and_tls_are_refused_together(tls: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="past TLS"):
        load_config({"kv_transfer_port": "rdma", **tls})
    assert load_config({"kv_transfer_port": "rdma"}).kv_transfer_port == "rdma"


# The cluster


def test_a_pool_may_have_nodes_and_resources_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {
        "address": "auto",
        "node_label": ["zone=a", "tier=b"],
        "decode_node_label": ["tier=c"],
        "decode_resource": ["bandwidth_heavy=0.5"],
    }
    config = load_config(flags)
    assert config.node_labels_of(WorkerRole.PREFILL) == (("zone", "a"), ("tier", "b"))
    assert config.node_labels_of(WorkerRole.DECODE) == (("tier", "c"),)
    assert config.resources_of(WorkerRole.DECODE) == (("bandwidth_heavy", 0.5),)
    assert config.resources_of(WorkerRole.PREFILL) == ()
    monkeypatch.setenv("TWINPOOL_NODE_LABEL", "zone=a, tier=b")
    assert load_config({"address": "auto"}).node_labels_of(WorkerRole.PREFILL) == (("zone", "a"), ("tier", "b"))


BAD_CLUSTERS = {
    "no address": ({"node_label": ["a=b"]}, "node_label chooses among the nodes of a running Ray cluster: set address"),
    "no port": ({"address": "head"}, "--address is 'head': it must be auto, or HOST:PORT"),
    "a port that is none": (
        {"address": "localhost:99999"},
        "--address is 'localhost:99999': the port must be from 1 to 65535",
    ),
    "port 0": ({"address": "head:0"}, "--address is 'head:0': the port must be from 1 to 65535"),
    "two amounts": (
        {"address": "auto", "resource": ["bw=1", "bw=2"]},
        "--resource is ['bw=1', 'bw=2']: bw is given more than once",
    ),
    "two values": ({"address": "auto", "decode_node_label": ["t=a", "t=b"]}, "t is given more than once"),
    "no value": ({"address": "auto", "node_label": ["a"]}, "'a' is not KEY=VALUE"),
    "no amount": ({"address": "auto", "resource": ["a=x"]}, "'a=x' is not NAME=AMOUNT"),
    "an amount of nothing": ({"address": "auto", "resource": ["a=0"]}, "with an amount above 0"),
    "a resource of ours": (
        {"address": "auto", "decode_resource": ["CPU=2"]},
        "the amount of CPU is worked out from other options",
    ),
    "an address that nobody reaches": ({"worker_host": "0.0.0.0"}, "it must be one that others can reach"),
    "roles of no kind": ({"roles": "some"}, "--roles is 'some'"),
    "roles that nobody could change": ({"roles": "auto", "colocated": "2"}, "colocated workers have no other role"),
    "pools that are none": (
        {"address": "auto", "colocated": "1", "decode_node_label": ["a=b"]},
        "no two pools whose node_label could differ",
    ),
    "a key for both": ({"api_key": ["k"], "admin_key": "k"}, "admin_key is one of the api_keys"),
}


@pytest.mark.parametrize("case", BAD_CLUSTERS)
def test_a_cluster_that_contradicts_itself_is_refused_by_name(case: str) -> None:
    flags, words = BAD_CLUSTERS[case]
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(flags)


def test_an_admin_key_that_cannot_work_is_not_repeated() -> None:
    with pytest.raises(ConfigError, match="--admin-key: a key must be") as caught:
        load_config({"admin_key": "schlüssel"})
    assert "schlüssel" not in str(caught.value)
