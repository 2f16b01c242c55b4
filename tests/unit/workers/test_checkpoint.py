"""What can be served is described from headers alone; what cannot is refused in one sentence that names it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.numpy import save_file

from kvcache.errors import ConfigError, ModelError
from workers.model.checkpoint import DEFAULT_MODEL, cache_dir, describe_checkpoint, prepare_checkpoint

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
MAMBA = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}
T5 = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True}
BERT = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": 100}
DEEPSEEK = {
    **LLAMA,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def make_checkpoint(
    folder: Path, config: dict[str, Any], names: tuple[str, ...] = ("model.embed_tokens.weight",)
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    save_file({name: np.zeros((100, 64), dtype=np.float16) for name in names}, folder / "model.safetensors")
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        describe_checkpoint(folder, device="cpu")
    return str(caught.value)


def test_llama_is_described_from_config_and_headers(tmp_path: Path) -> None:
    info = describe_checkpoint(make_checkpoint(tmp_path, LLAMA), device="cpu")
    assert (info.architecture, info.model_type, info.path) == ("LlamaForCausalLM", "llama", tmp_path)
    assert (info.num_layers, info.num_attention_heads, info.num_kv_heads, info.head_size) == (2, 4, 2, 16)
    assert (info.hidden_size, info.vocab_size, info.max_position_embeddings) == (64, 100, 256)
    assert (info.num_parameters, info.dtype, info.weight_bytes) == (6400, "float32", 25600)


def test_auto_dtype_is_the_checkpoints_own_on_a_gpu(tmp_path: Path) -> None:
    info = describe_checkpoint(make_checkpoint(tmp_path, LLAMA), device="cuda")
    assert (info.dtype, info.weight_bytes) == ("float16", 12800)


def test_a_named_dtype_is_taken(tmp_path: Path) -> None:
    assert describe_checkpoint(make_checkpoint(tmp_path, LLAMA), dtype="bfloat16").dtype == "bfloat16"


def test_unknown_dtype_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'int4'"):
        describe_checkpoint(make_checkpoint(tmp_path, LLAMA), dtype="int4")


def test_a_repeated_tied_head_is_counted_once(tmp_path: Path) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    tied = describe_checkpoint(make_checkpoint(tmp_path, {**LLAMA, "tie_word_embeddings": True}, names), device="cpu")
    own = describe_checkpoint(make_checkpoint(tmp_path, {**LLAMA, "tie_word_embeddings": False}, names), device="cpu")
    assert (tied.num_parameters, own.num_parameters) == (6400, 12800)


def test_eos_of_config_is_used_alone(tmp_path: Path) -> None:
    assert describe_checkpoint(make_checkpoint(tmp_path, LLAMA), device="cpu").eos_token_ids == (2,)


def test_end_tokens_beyond_the_vocabulary_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_checkpoint(tmp_path, LLAMA | {"eos_token_id": [2, LLAMA["vocab_size"]]})
    assert describe_checkpoint(folder, device="cpu").eos_token_ids == (2,)
    assert str(LLAMA["vocab_size"]) in caplog.text


def test_eos_of_generation_config_wins(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path, LLAMA) / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert describe_checkpoint(tmp_path, device="cpu").eos_token_ids == (7, 9)


def test_sharded_weights_are_counted_over_all_files(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").unlink()
    for name in ("a", "b"):
        save_file({name: np.zeros((10, 10), dtype=np.float32)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert describe_checkpoint(tmp_path, device="cpu").num_parameters == 200


def test_missing_shard_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00002.safetensors"}}
    (make_checkpoint(tmp_path, LLAMA) / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names model-00002.safetensors, which is not in" in refusal(tmp_path)


def shard(folder: Path, tensors_of: dict[str, tuple[str, ...]], weight_map: dict[str, str]) -> Path:
    """A checkpoint whose files hold these tensors, and whose index says ``weight_map``."""
    (make_checkpoint(folder, LLAMA) / "model.safetensors").unlink()
    for name, tensors in tensors_of.items():
        save_file({tensor: np.zeros((10, 10), dtype=np.float32) for tensor in tensors}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    files = {"1.safetensors": ("a", "b"), "2.safetensors": ("b", "c")}
    index = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    assert "the tensor b twice, in 1.safetensors and 2.safetensors" in refusal(shard(tmp_path, files, index))


@pytest.mark.parametrize("place", ["1.safetensors", "2.safetensors"])
def test_an_index_that_contradicts_its_shards_is_named(tmp_path: Path, place: str) -> None:
    files: dict[str, tuple[str, ...]] = {"1.safetensors": ("a",), "2.safetensors": ("b",)}
    index = {"a": "1.safetensors", "b": "2.safetensors", "missing": place}
    assert f"says that missing is in {place}, where it is not" in refusal(shard(tmp_path, files, index))


def test_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../other.safetensors"}}
    (make_checkpoint(tmp_path, LLAMA) / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'../other.safetensors', which is not a safetensors file beside it" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5, "encoder-decoder"),
        (BERT, "it is an encoder"),
        ({**BERT, "is_decoder": True}, "saved as BertForMaskedLM"),
        (MAMBA, "MambaForCausalLM keeps a recurrent state"),
        (DEEPSEEK, "multi-head latent attention"),
        ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, "saved as LlamaForSequenceClassification"),
        ({**LLAMA, "quantization_config": {"quant_method": "awq"}}, r"quantized (awq)"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, r"quantized (gptq)"),
        ({**LLAMA, "quantization_config": {"quant_method": "bitsandbytes"}}, r"quantized (bitsandbytes)"),
        ({**LLAMA, "model_type": "no_such_model"}, "no_such_model"),
        ({**LLAMA, "num_hidden_layers": "two"}, "num_hidden_layers"),
    ],
)
def test_what_cannot_run_is_refused_with_its_reason(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    sentence = refusal(make_checkpoint(tmp_path, config))
    assert reason in sentence
    assert str(tmp_path) in sentence
    assert "\n" not in sentence


def test_attention_sinks_are_found_in_the_weights(tmp_path: Path) -> None:
    assert "attention sinks" in refusal(make_checkpoint(tmp_path, LLAMA, ("model.layers.0.self_attn.sinks",)))


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    config = {"model_type": "own_model", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (make_checkpoint(tmp_path, config) / "evil.py").write_text("raise SystemExit('the checkpoint ran its code')")
    assert "config.json" in refusal(tmp_path)


def test_garbage_config_is_named(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path, LLAMA) / "config.json").write_text("{nonsense")
    assert "config.json is not readable JSON" in refusal(tmp_path)


def test_config_that_is_no_object_is_named(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path, LLAMA) / "config.json").write_text("[]")
    assert "config.json holds a JSON list" in refusal(tmp_path)


def test_truncated_weights_are_found_from_the_header(tmp_path: Path) -> None:
    weights = make_checkpoint(tmp_path, LLAMA) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors is damaged" in refusal(tmp_path)


def test_garbage_weights_are_named(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path, LLAMA) / "model.safetensors").write_bytes(b"\xff" * 32)
    assert "model.safetensors is not a safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize(
    "table",
    [
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, Infinity]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}',
        '{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}',
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
    ids=["endless offset", "huge offset", "huge size", "deeply nested"],
)
def test_a_header_that_makes_no_sense_is_named(tmp_path: Path, table: str) -> None:
    content = struct.pack("<Q", len(table)) + table.encode() + bytes(4)
    (make_checkpoint(tmp_path, LLAMA) / "model.safetensors").write_bytes(content)
    assert "model.safetensors is not a safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_deeply_nested_json_is_named(tmp_path: Path, name: str) -> None:
    (make_checkpoint(tmp_path, LLAMA) / name).write_text("[" * 100_000 + "]" * 100_000)
    assert f"{name} is not" in refusal(tmp_path)


def test_weights_in_a_dtype_we_do_not_compute_in_are_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(8, dtype=np.int8)}, make_checkpoint(tmp_path, LLAMA) / "model.safetensors")
    assert "stores its weights as I8" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (make_checkpoint(tmp_path, LLAMA) / name).unlink()
    with pytest.raises(ModelError, match=f"has no .*{name}|neither {name}"):
        prepare_checkpoint(str(tmp_path))


def test_pickle_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path, LLAMA) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle files \(pytorch_model\.bin\), which can run code"):
        prepare_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickle_file_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=rf"{name} is a pickle file, which can run code"):
        prepare_checkpoint(str(tmp_path / name))


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.onnx is no GGUF file"):
        prepare_checkpoint(str(tmp_path / "model.onnx"))


def test_a_gguf_file_is_found_by_itself_or_alone_in_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    assert prepare_checkpoint(str(file)) == prepare_checkpoint(str(tmp_path)) == file


def test_of_a_gguf_in_parts_the_first_is_found(tmp_path: Path) -> None:
    for part in (2, 1, 3):
        (tmp_path / f"model-0000{part}-of-00003.gguf").write_bytes(b"")
    assert prepare_checkpoint(str(tmp_path)).name == "model-00001-of-00003.gguf"


def test_several_gguf_files_are_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=r"several models in GGUF \(a\.gguf, b\.gguf\)"):
        prepare_checkpoint(str(tmp_path))


def test_safetensors_beside_a_gguf_are_used(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path, LLAMA) / "model.gguf").write_bytes(b"")
    assert prepare_checkpoint(str(tmp_path)) == tmp_path


def test_a_local_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    assert prepare_checkpoint(str(make_checkpoint(tmp_path, LLAMA))) == tmp_path


@pytest.mark.parametrize("model", ["nothing-here", "/no/such/folder", "../x/y/z", ""])
def test_what_is_neither_folder_nor_hub_id_is_named(model: str) -> None:
    with pytest.raises(ModelError) as caught:
        prepare_checkpoint(model)
    assert str(caught.value).startswith(f"{model!r} is neither")


def test_a_hub_id_without_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection to the hub\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError) as caught:
        prepare_checkpoint("some-org/some-model")
    sentence = "some-org/some-model is not in the local hub cache and could not be fetched from it: no connection"
    assert str(caught.value).startswith(sentence)
    assert "second line" not in str(caught.value)


def test_a_connection_lost_in_the_download_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, **__: object) -> str:
        raise httpx.ReadTimeout("the read timed out")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lost)
    with pytest.raises(ModelError, match="could not be fetched from it: the read timed out"):
        prepare_checkpoint("some-org/some-model")


def test_a_cached_hub_model_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cached_only(*_: object, local_files_only: bool, **__: object) -> str:
        assert local_files_only
        return str(tmp_path)

    make_checkpoint(tmp_path, LLAMA)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached_only)
    assert prepare_checkpoint("some-org/some-model") == tmp_path


def test_an_incomplete_hub_cache_is_completed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[bool] = []

    def partial_then_whole(*_: object, local_files_only: bool, **__: object) -> str:
        calls.append(local_files_only)
        if not local_files_only:
            make_checkpoint(tmp_path, LLAMA)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", partial_then_whole)
    assert prepare_checkpoint("some-org/some-model", show_progress=False) == tmp_path
    assert calls == [True, False]


def test_hub_downloads_ask_for_no_pickle_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def check_patterns(*_: object, allow_patterns: list[str], ignore_patterns: list[str], **__: object) -> str:
        repository = ["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.json", "model.pt", "run.py"]
        kept = filter_repo_objects(repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        assert list(kept) == ["config.json", "model.safetensors"]
        return str(make_checkpoint(tmp_path, LLAMA))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", check_patterns)
    assert prepare_checkpoint("some-org/some-model") == tmp_path


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINPOOL_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_dir() == Path("/one")
    monkeypatch.delenv("TWINPOOL_CACHE")
    assert cache_dir() == Path("/two/twinpool")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "twinpool"


def test_importing_the_module_imports_nothing_heavy() -> None:
    script = (
        "import sys, workers.model.checkpoint; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_default_model_has_a_name_that_is_no_hub_id() -> None:
    assert "/" not in DEFAULT_MODEL
