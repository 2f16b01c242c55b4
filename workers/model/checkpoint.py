"""From what the operator calls a model to a checked folder or GGUF file, and what that holds.

``prepare_checkpoint`` may use disk and network; ``describe_checkpoint`` only reads. Neither loads weights,
runs code from a checkpoint, or reads pickle files. Importing this module imports no heavy library.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcache.errors import ConfigError, ModelError
from kvcache.spec import DTYPE_BYTES
from workers.model.gguf_names import SUFFIX, find_gguf
from workers.model.safetensors_file import (
    INDEX_FILE,
    PICKLE_SUFFIXES,
    SINGLE_FILE,
    TensorHeader,
    read_checked_headers,
    weight_files,
)
from workers.model.shape import LayerWeights, count_layer_weights
from workers.model.smollm2 import DEFAULT_MODEL as DEFAULT_MODEL
from workers.model.smollm2 import prepare_default_model

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_ALLOW = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
# Subfolders and "consolidated" files repeat the same weights in other formats.
HUB_IGNORE = ["*/*", "consolidated*"]

# safetensors' names of the dtypes that we compute in.
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a checkpoint is and what it costs to hold, known before any weight is loaded.

    ``dtype`` is the resolved compute dtype and ``weight_bytes`` the weights' size in it. ``num_parameters``
    counts a tied output head once. ``eos_token_ids`` is empty when the checkpoint names none.
    """

    path: Path
    architecture: str
    model_type: str
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    dtype: str
    weight_bytes: int
    layer_weights: LayerWeights
    cutting_problem: str | None = None  # why tensor parallelism cannot share this model out


def cache_dir() -> Path:
    """Where Twinpool keeps what it downloads: TWINPOOL_CACHE, else the user's cache folder. Not created here."""
    if chosen := os.environ.get("TWINPOOL_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "twinpool"


def prepare_checkpoint(model: str, *, show_progress: bool = True) -> Path:
    """The checkpoint that ``model`` names, a folder with safetensors or a GGUF file; downloads where needed.

    ``model`` is ``DEFAULT_MODEL``, a local folder or GGUF file, or a hub id ``organisation/name``; what exists here
    wins over a hub id. What is cached is used without a network. Raises ModelError with one sentence.
    """
    if model == DEFAULT_MODEL:
        return prepare_default_model(cache_dir(), show_progress=show_progress)
    path = Path(model).expanduser()
    # An empty name would mean the current folder.
    if model and path.is_dir():
        return _from_folder(path.resolve())
    if path.is_file():
        return _from_file(path.resolve())
    if HUB_ID.fullmatch(model):
        return _from_hub(model, show_progress)
    raise ModelError(
        f"{model!r} is neither {DEFAULT_MODEL}, nor a folder or GGUF file that exists, nor a hub id organisation/name."
    )


def _from_folder(folder: Path) -> Path:
    """The folder, or the one GGUF file in it where there are no safetensors."""
    if not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)) and (model := find_gguf(folder)):
        return model
    check_folder(folder)
    return folder


def _from_file(file: Path) -> Path:
    if file.suffix == SUFFIX:
        return file
    if file.suffix in PICKLE_SUFFIXES:
        raise ModelError(f"{file} is a pickle file, which can run code when read: Twinpool loads safetensors and GGUF.")
    raise ModelError(f"{file} is no GGUF file: give one, or a folder with config.json, tokenizer.json and safetensors.")


def check_folder(folder: Path) -> None:
    """Raises ModelError, naming it, if ``folder`` lacks a file that serving needs."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a checkpoint: it has no config.json.")
    weight_files(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder} has no tokenizer.json: Twinpool needs the fast tokenizer format.")


def _from_hub(model: str, show_progress: bool) -> Path:
    """The hub's own cache first, and its network only when that has no complete copy."""
    cached = _hub_snapshot(model, local_files_only=True, show_progress=False)
    if isinstance(cached, Path) and _is_whole(cached):
        return cached
    fetched = _hub_snapshot(model, local_files_only=False, show_progress=show_progress)
    if isinstance(fetched, Exception):
        reason = next(iter(str(fetched).strip().splitlines()), type(fetched).__name__).rstrip(".")
        raise ModelError(f"{model} is not in the local hub cache and could not be fetched from it: {reason}.")
    check_folder(fetched)
    return fetched


def _is_whole(folder: Path) -> bool:
    try:
        check_folder(folder)
    except ModelError:
        return False
    return True


def _hub_snapshot(model: str, *, local_files_only: bool, show_progress: bool) -> Path | Exception:
    """The snapshot's folder, or why there is none: the hub's own errors are OSErrors, a bad name a ValueError."""
    # Only needed for hub ids; the default model and local folders work without them.
    import httpx
    from huggingface_hub import snapshot_download

    with _hub_progress(show_progress):
        try:
            folder = snapshot_download(
                model, allow_patterns=HUB_ALLOW, ignore_patterns=HUB_IGNORE, local_files_only=local_files_only
            )
        except (OSError, ValueError, httpx.HTTPError) as error:
            return error
    return Path(str(folder))


@contextmanager
def _hub_progress(shown: bool) -> Iterator[None]:
    """Keeps the hub's progress bars off for one call; its switch is global, so it is put back."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def describe_checkpoint(path: str | Path, *, dtype: str = "auto", device: str = "auto") -> CheckpointInfo:
    """Reads the configuration and the weight files' headers; refuses what Twinpool cannot run.

    ``dtype`` is "auto", "float32", "bfloat16" or "float16" (ConfigError otherwise). "auto" is the
    checkpoint's own dtype on a GPU and float32 on a CPU, where torch computes bfloat16 slower. ``device``
    is where the model will run: "cpu", "cuda", or "auto" for a GPU if this machine has one. Raises
    ModelError with the reason. Imports ``transformers``, about 2 s in a fresh process.
    """
    if dtype != "auto" and dtype not in DTYPE_BYTES:
        raise ConfigError(f"The model dtype must be auto or one of {', '.join(DTYPE_BYTES)}, not {dtype!r}.")
    file = Path(path)
    found = _read_gguf(file) if file.suffix == SUFFIX else _read_folder(file)
    # transformers brings torch with it: imported after the cheap checks, and never by importing this module.
    from workers.model import architecture
    from workers.parallel.modules import find_plan_problem

    config = found.config
    class_name = architecture.check_architecture(file, config, found.headers)
    sizes = architecture.read_sizes(file, config)
    resolved = _resolve_dtype(dtype, found.stored_dtype, device)
    num_parameters = count_parameters(found.headers, bool(getattr(config, "tie_word_embeddings", False)))
    return CheckpointInfo(
        path=file,
        architecture=class_name,
        model_type=config.model_type,
        num_layers=sizes.num_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_size=sizes.head_size,
        hidden_size=sizes.hidden_size,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=sizes.max_position_embeddings,
        eos_token_ids=_within(sizes.vocab_size, found.eos_token_ids, file),
        num_parameters=num_parameters,
        dtype=resolved,
        weight_bytes=num_parameters * DTYPE_BYTES[resolved],
        layer_weights=count_layer_weights(found.headers, config),
        cutting_problem=find_plan_problem(config.base_model_tp_plan),
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """What the two formats say in their own ways. ``config`` is that of ``transformers``."""

    config: Any
    headers: list[TensorHeader]
    stored_dtype: str
    eos_token_ids: tuple[int, ...]


def _read_folder(folder: Path) -> _Found:
    check_folder(folder)
    raw = read_json(folder / "config.json")
    headers = read_checked_headers(folder)
    from workers.model import architecture  # see describe_checkpoint

    architecture.refuse_raw_config(folder, raw)
    config = architecture.load_config(folder)
    eos_token_ids = read_eos_token_ids(folder, raw, getattr(config, "eos_token_id", None))
    return _Found(config, headers, stored_dtype(folder, headers), eos_token_ids)


def read_tensor_headers(path: Path) -> list[TensorHeader]:
    """Every tensor of a checkpoint folder or a GGUF file, by its name in ``transformers``. Raises ModelError."""
    if path.suffix != SUFFIX:
        return read_checked_headers(path)
    from workers.model.gguf_checkpoint import open_gguf  # numpy and tokenizers, for these files only

    return open_gguf(path).headers()


def _read_gguf(file: Path) -> _Found:
    from workers.model.gguf_checkpoint import open_gguf  # numpy and tokenizers, for these files only

    checkpoint = open_gguf(file)
    from workers.model.gguf_weights import gguf_config  # see describe_checkpoint

    headers = checkpoint.headers()
    plain = [header for header in headers if header.dtype in STORED_DTYPES]
    is_plain = sum(header.num_bytes for header in plain) * 2 > sum(header.num_bytes for header in headers)
    # Values of four or eight bits fit into any dtype; bfloat16 is the one whose range no activation leaves.
    own_dtype = stored_dtype(file, plain) if is_plain else "bfloat16"
    return _Found(gguf_config(checkpoint), headers, own_dtype, checkpoint.eos_token_ids)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint; anything else is a ModelError that names the file."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds a JSON {type(content).__name__} where an object belongs.")
    return content


def read_eos_token_ids(folder: Path, raw: dict[str, Any], default: int | list[int] | None) -> tuple[int, ...]:
    """Tokens that end an answer: generation_config.json wins, then config.json, then the model type's default."""
    file = folder / "generation_config.json"
    named = read_json(file).get("eos_token_id") if file.is_file() else None
    if named is None:
        named = raw.get("eos_token_id", default)
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
        raise ModelError(f"{folder} names eos_token_id {named!r}, which is not a token id or a list of them.")
    return tuple(ids)


def _within(vocab_size: int, eos_token_ids: tuple[int, ...], file: Path) -> tuple[int, ...]:
    """End tokens that the model can give; what no answer can hold ends none."""
    beyond = [token_id for token_id in eos_token_ids if token_id >= vocab_size]
    if beyond:
        logger.warning("%s names end tokens %s; its vocabulary has %d tokens.", file, beyond, vocab_size)
    return tuple(token_id for token_id in eos_token_ids if token_id < vocab_size)


def stored_dtype(folder: Path, headers: list[TensorHeader]) -> str:
    """The dtype that most of the weight bytes are stored in; ModelError when we do not compute in it."""
    bytes_of: dict[str, int] = {}
    for header in headers:
        bytes_of[header.dtype] = bytes_of.get(header.dtype, 0) + header.num_bytes
    if not bytes_of:
        raise ModelError(f"{folder} has weight files without a single tensor.")
    most = max(bytes_of, key=lambda name: bytes_of[name])
    if most not in STORED_DTYPES:
        raise ModelError(f"{folder} stores its weights as {most}; only {', '.join(STORED_DTYPES)} can be loaded.")
    return STORED_DTYPES[most]


def count_parameters(headers: list[TensorHeader], tied_head: bool) -> int:
    """Elements of all tensors; a tied output head that the file repeats is not counted again."""
    return sum(header.num_elements for header in headers if not (tied_head and header.name == "lm_head.weight"))


def _resolve_dtype(dtype: str, own_dtype: str, device: str) -> str:
    if dtype != "auto":
        return dtype
    if device == "auto":
        # torch is loaded by now (transformers needs it); only "auto" has to ask for a GPU.
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return "float32" if device.startswith("cpu") else own_dtype
