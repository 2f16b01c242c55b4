"""The real default model, from the user's cache: offline once prepared, whole, and able to answer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from workers.model.checkpoint import DEFAULT_MODEL, describe_checkpoint, prepare_checkpoint
from workers.model.smollm2 import SOURCE

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder() -> Path:
    return prepare_checkpoint(DEFAULT_MODEL, show_progress=False)


def test_a_second_call_starts_no_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a prepared model must not be fetched again")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert prepare_checkpoint(DEFAULT_MODEL) == folder


def test_the_source_hash_is_recorded(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source_sha256"] == SOURCE.sha256
    assert manifest["file_bytes"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "text",
    [
        "It's 12,345.67 o'clock.\n\n  Two  spaces, and a tab\t.",
        "你好\uff0c世界。今天天气很好\uff01",
        "def square(x):\n    return x ** 2  # comment\n",
        "🎉 👩‍👩‍👧‍👦 🇫🇷 🤷🏽‍♀️",
        "<|im_start|>user\nhello<|im_end|>\n",
    ],
)
def test_the_tokenizer_round_trips(folder: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_no_begin_token_is_added_and_control_tokens_keep_their_ids(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("<|im_end|>").ids == [2]
    assert 1 not in tokenizer.encode("Hello").ids


def test_the_description_is_the_published_architecture(folder: Path) -> None:
    info = describe_checkpoint(folder, device="cpu")
    assert (info.architecture, info.num_layers, info.num_attention_heads, info.num_kv_heads) == (
        "LlamaForCausalLM",
        30,
        9,
        3,
    )
    assert (info.head_size, info.hidden_size, info.vocab_size, info.max_position_embeddings) == (64, 576, 49152, 8192)
    assert info.eos_token_ids == (2,)
    assert (info.num_parameters, info.dtype) == (134_515_008, "float32")


def test_the_greedy_answer_is_sensible(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokens[-1] == 2
    assert "Paris" in tokenizer.decode(tokens)
