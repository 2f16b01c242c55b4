"""What cannot be served ends with one sentence and a non-zero status, before a worker was started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cluster import TinyCheckpoint
from tests.e2e.server import free_port, interrupt, session_folders

pytestmark = pytest.mark.e2e


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end; also checks that it left no session folder: nothing of Ray stays behind."""
    before = session_folders()
    done = subprocess.run(
        [sys.executable, "-m", "engine.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
        check=False,
    )
    assert session_folders() <= before
    return done


def assert_one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode in (1, 2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("twinpool: ")
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in done.stdout + done.stderr


BAD_FLAGS = {
    "unknown flag": (["--prefil-workers", "2"], ["--prefil-workers"]),
    "not a number": (["--port", "eighty"], ["--port", "eighty"]),
    "out of range": (["--block-size", "0"], ["--block-size", "greater than or equal to 1"]),
    "unknown dtype": (["--dtype", "float8"], ["--dtype", "float8"]),
    "half a cluster": (["--prefill-workers", "2", "--decode-workers", "0"], ["prefill_workers", "decode_workers"]),
    "nobody at work": (["--prefill-workers", "0", "--decode-workers", "0"], ["no workers"]),
    "context beyond the model": (["--max-model-len", "9000"], ["--max-model-len", "9000", "8192"]),
    "cache too small": (["--kv-cache-memory-bytes", "1MiB"], ["KV cache", "360 MiB", "1 MiB"]),
    "memory too small": (["--kv-cache-memory-bytes", "20TiB"], ["Too little memory", "2 workers"]),
    "no such folder": (["./no/such/folder/here"], ["./no/such/folder/here"]),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_named(checkpoint: Path, name: str) -> None:
    flags, words = BAD_FLAGS[name]
    assert_one_sentence(run("serve", *flags), *words)


def test_a_bad_yaml_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("decode-workers: 2\nprefill_wrokers: 1\n")
    assert_one_sentence(run("serve", "--config", str(file)), "prefill_wrokers", "cluster.yaml")


def test_a_bad_yaml_value_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("decode-workers: many\n")
    assert_one_sentence(run("serve", "--config", str(file)), "decode_workers", "many", "cluster.yaml")


def test_a_misspelt_environment_variable_is_named() -> None:
    assert_one_sentence(run("serve", TWINPOOL_DECODE_WORKER="2"), "TWINPOOL_DECODE_WORKER")


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_one_sentence(run("serve", "--port", str(port)), str(port), "in use")


def test_an_address_without_a_cluster_is_named_at_once(checkpoint: Path) -> None:
    """Ray itself would try for minutes."""
    address = f"127.0.0.1:{free_port()}"
    assert_one_sentence(run("serve", "--address", address), f"--address {address}", "refused")


def test_an_architecture_that_cannot_run_is_named(tmp_path: Path, checkpoint: Path) -> None:
    sizes = {"hidden_size": 64, "n_layer": 1, "n_head": 2, "vocab_size": 128}
    config = {"architectures": ["BloomForCausalLM"], "model_type": "bloom", **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    save_file({"model.embed_tokens.weight": torch.zeros(128, 64)}, tmp_path / "model.safetensors")
    assert_one_sentence(run("serve", str(tmp_path)), "ALiBi")


def lose_a_tensor(state: dict[str, torch.Tensor]) -> None:
    del state["model.layers.1.mlp.up_proj.weight"]


def spoil_a_tensor(state: dict[str, torch.Tensor]) -> None:
    state["model.norm.weight"][3] = torch.nan


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_a_tensor, ["lacks 1 of the model's weights", "model.layers.1.mlp.up_proj.weight"]),
        (spoil_a_tensor, ["model.norm.weight", "not finite", "damaged"]),
    ],
)
def test_weights_that_a_worker_cannot_load_are_named(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], words: list[str]
) -> None:
    """Found by the worker: the command says it in its last line, and ends."""
    folder = tmp_path / "damaged-llama"
    folder.mkdir()
    TinyCheckpoint(folder).save_tokenizer()
    state = load_file(folder / "model.safetensors")
    damage(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    done = run("serve", str(folder), "--device", "cpu", "--colocated", "1", "--port", str(free_port()))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("twinpool: ")
    assert all(word in last for word in ["damaged-llama", *words])
    assert "Traceback" not in done.stdout + done.stderr


def test_status_without_a_server_says_so() -> None:
    assert_one_sentence(run("status", "--url", "http://127.0.0.1:9"), "Nobody answers", "127.0.0.1:9")


def test_ctrl_c_while_workers_load_leaves_nothing() -> None:
    before = session_folders()
    process = psutil.Popen(
        [sys.executable, "-m", "engine.cli", "serve", "--port", str(free_port())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stderr:
        if "Starting workers" in line:
            break
    assert len(process.children(recursive=True)) > 2, "Ray is not running yet"
    left = interrupt(process)
    process.stderr.close()
    assert left == []
    assert process.returncode == 130
    assert session_folders() <= before
