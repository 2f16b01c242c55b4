"""One schema for flags, environment variables and YAML keys; a flag wins, then the environment, then the file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from engine.api_key import check_api_key
from engine.cluster_options import NODE_OPTIONS
from engine.kv_options import KVOptions
from engine.option import option
from engine.pool_options import PoolOptions
from kvcache.errors import ConfigError
from scheduler.admission import AdmissionOptions
from scheduler.batching import STEPS_PER_FIRST_TOKEN, BatchLimits
from scheduler.placement import DEFAULT_POLICY, TPOT_TARGET_S, TTFT_TARGET_S, PlacementOptions
from scheduler.policies import POLICIES
from workers.model.checkpoint import DEFAULT_MODEL

ENVIRONMENT_PREFIX = "TWINPOOL_"
OTHER_VARIABLES = frozenset({"TWINPOOL_CACHE"})

MAX_NUM_SEQS = 64
MAX_NUM_BATCHED_TOKENS = 512

# Given several times as a flag, and separated by commas in the environment.
LIST_OPTIONS = ("api_key", *NODE_OPTIONS)
GROUPS = ("Model", "Pools", "Cluster", "KV cache and batching", "Placement", "Server")  # of the help, in order


class ServeConfig(PoolOptions, KVOptions, BaseSettings):
    """Everything that `twinpool serve` can be told."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, extra="forbid", validate_default=False, allow_inf_nan=False
    )

    model: str = option(DEFAULT_MODEL, "Model", "checkpoint folder, GGUF file, hub id, or the default model", "MODEL")
    served_model_name: str | None = option(None, "Model", "name clients use (default: MODEL)", "NAME", min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Model", "dtype of the model; auto is float32 on a CPU", "DTYPE"
    )
    quantization: Literal["none", "int8", "int4"] = option(
        "none", "Model", "weights of linear layers in 8 or 4 bits, their inputs in 8 (CPU)", "METHOD"
    )
    max_model_len: int | None = option(None, "Model", "context length in tokens (default: the model's)", ge=2)

    max_num_seqs: int | None = option(
        None,
        "KV cache and batching",
        f"sequences in a worker's batch (default: {MAX_NUM_SEQS}, or --max-num-batched-tokens where that is less)",
        ge=1,
        le=4096,
    )
    max_num_batched_tokens: int | None = option(
        None,
        "KV cache and batching",
        "tokens a worker computes in one step, one for each sequence at least"
        f" (default: {MAX_NUM_BATCHED_TOKENS}, or --max-num-seqs where that is more)",
        ge=1,
        le=1 << 20,
    )
    placement_policy: str = option(
        DEFAULT_POLICY, "Placement", f"which workers a request gets: {', '.join(POLICIES)}", "POLICY"
    )
    ttft_target_ms: float = option(
        1000 * TTFT_TARGET_S, "Placement", "time to the first token that the policy cost tries to keep", "MS", gt=0
    )
    tpot_target_ms: float = option(
        1000 * TPOT_TARGET_S,
        "Placement",
        "time per later token that the policy cost tries to keep, and lets nobody beside it miss",
        "MS",
        gt=0,
    )
    refuse_late: bool = option(
        False, "Placement", "answer 429 at once where the first token cannot come within --ttft-target-ms"
    )
    max_queued_requests: int = option(
        1024, "Placement", "requests that may wait for a worker; beyond, somebody is refused", ge=1, le=1 << 20
    )

    host: str = option("127.0.0.1", "Server", "address to listen on", "HOST", min_length=1)
    port: int = option(8000, "Server", "port to listen on", "PORT", ge=1, le=65535)
    api_key: Annotated[tuple[str, ...], NoDecode] = option(
        (), "Server", "key that requests must carry; may be repeated (environment: separated by commas)", "KEY"
    )
    grpc_tls: bool = option(
        False, "Server", "mutual TLS between gateway and workers, with certificates made for this run"
    )
    grpc_tls_dir: Path | None = option(
        None, "Server", "the same with certificates of yours: a folder with ca.pem, cert.pem and key.pem", "DIR"
    )
    admin_key: str | None = option(
        None, "Server", "key of drain, role and scale (default: made anew, and found by this user's commands)", "KEY"
    )
    tenants: Path | None = option(None, "Server", "YAML file with tenants, their keys and limits", "FILE")
    shutdown_timeout: float = option(
        10.0, "Server", "seconds that running requests get to end after Ctrl-C", "SECONDS", ge=0, le=3600
    )
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "Server", "how much is logged", "LEVEL")

    @model_validator(mode="before")
    @classmethod
    def _split_lists(cls, values: Any) -> Any:
        for name in LIST_OPTIONS if isinstance(values, dict) else ():
            if isinstance(values.get(name), str):
                values[name] = tuple(item.strip() for item in values[name].split(","))
        return values

    @field_validator("api_key")
    @classmethod
    def _check_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for key in keys:
            check_api_key(key)
        return keys

    @field_validator("admin_key")
    @classmethod
    def _check_admin_key(cls, key: str | None) -> str | None:
        if key is not None:
            check_api_key(key)
        return key

    @model_validator(mode="after")
    def _check_separate_keys(self) -> Self:
        if self.admin_key in self.api_key:
            raise ValueError("admin_key is one of the api_keys: whoever may ask could drain and scale too")
        return self

    @field_validator("placement_policy")
    @classmethod
    def _check_policy(cls, name: str) -> str:
        if name not in POLICIES:
            raise ValueError(f"there is no such policy; there are {', '.join(POLICIES)}")
        return name

    @model_validator(mode="after")
    def _check_transfers(self) -> Self:
        if self.kv_transfer_dtype != "native" and not self.num_prefill_workers:
            raise ValueError(f"kv_transfer_dtype is {self.kv_transfer_dtype}, and colocated workers hand nothing over")
        return self

    @model_validator(mode="after")
    def _check_offers(self) -> Self:
        if self.kv_offer_rate and not self.enable_prefix_caching:
            raise ValueError("kv_offer_rate sends KV into prefix caches, and enable_prefix_caching is off")
        if self.kv_offer_rate and not self.num_prefill_workers:
            raise ValueError("kv_offer_rate is for two pools: colocated workers keep what they computed")
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if self.grpc_tls and self.grpc_tls_dir is None and self.address is not None:
            raise ValueError(
                "grpc_tls makes certificates on this machine only; in a cluster that is joined, set grpc_tls_dir too,"
                " a folder that every node has"
            )
        if self.kv_transfer_port.startswith("rdma") and (self.grpc_tls or self.grpc_tls_dir is not None):
            raise ValueError(
                f"kv_transfer_port is {self.kv_transfer_port}, which moves KV past TLS: the RDMA library has none"
            )
        return self

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if seqs is not None and tokens is not None and seqs > tokens:
            raise ValueError(
                f"max_num_seqs is {seqs} and max_num_batched_tokens {tokens}: a step has no token for each sequence of"
                " the batch, and some would wait for others to end"
            )
        return self

    @model_validator(mode="after")
    def _check_memory(self) -> Self:
        if self.kv_cache_memory_bytes is not None and self.gpu_memory_utilization is not None:
            raise ValueError("kv_cache_memory_bytes and gpu_memory_utilization both set the size of the KV cache")
        return self

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or self.model

    @property
    def placement(self) -> PlacementOptions:
        return PlacementOptions(
            self.placement_policy,
            self.ttft_target_ms / 1000,
            self.tpot_target_ms / 1000,
            roles_follow_load=self.roles == "auto",
            move_after_s=self.drain_timeout,
        )

    def admission(self, tenant_weights: tuple[tuple[str, float], ...]) -> AdmissionOptions:
        """What the scheduler goes by, and the gateway while it is away."""
        targets = self.placement
        return AdmissionOptions(
            self.max_queued_requests, targets.ttft_target_s, targets.tpot_target_s, self.refuse_late, tenant_weights
        )

    @property
    def batch_limits(self) -> BatchLimits:
        """A first token waits for the step that runs when its prompt arrives, for those before it, and its own."""
        num_seqs, num_tokens = self.max_num_seqs, self.max_num_batched_tokens
        return BatchLimits(
            num_seqs or min(MAX_NUM_SEQS, num_tokens or MAX_NUM_SEQS),
            num_tokens or max(MAX_NUM_BATCHED_TOKENS, num_seqs or 1),
            max_step_s=self.ttft_target_ms / 1000 / STEPS_PER_FIRST_TOKEN,
            max_pause_s=self.tpot_target_ms / 1000,
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, InitSettingsSource(settings_cls, cls._file_values())

    @classmethod
    def _file_values(cls) -> dict[str, Any]:
        return {}


def load_config(flags: Mapping[str, Any], file: Path | None = None) -> ServeConfig:
    """Merges flags, environment and file.

    Args:
        flags: only those that were given, by field name.

    Raises:
        ConfigError: one sentence that names the flag, variable or key, and where it stands.
    """
    for name in sorted(os.environ):
        field = name.removeprefix(ENVIRONMENT_PREFIX).lower()
        if (
            name.startswith(ENVIRONMENT_PREFIX)
            and name not in OTHER_VARIABLES
            and field not in ServeConfig.model_fields
        ):
            raise ConfigError(f"The environment variable {name} names no option of Twinpool.")
    values = _read_file(file) if file is not None else {}

    class FromFile(ServeConfig):
        @classmethod
        def _file_values(cls) -> dict[str, Any]:
            return values

    try:
        return FromFile(**flags)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, flags, values, file)) from None


def _read_file(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The configuration file {file} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {file} is not valid YAML: {' '.join(str(error).split())}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"The configuration file {file} must hold keys and values.")
    values = {key.replace("-", "_"): value for key, value in content.items()}
    for key in values:
        if key not in ServeConfig.model_fields:
            raise ConfigError(f"The key {key!r} in {file} names no option of Twinpool.")
    return values


def _first_problem(
    error: ValidationError, flags: Mapping[str, Any], values: Mapping[str, Any], file: Path | None
) -> str:
    problem = error.errors(include_url=False)[0]
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return f"The configuration is contradictory: {message}."
    field = str(problem["loc"][0])
    if field in flags:
        where = flag_of(field)
    elif ENVIRONMENT_PREFIX + field.upper() in os.environ:
        where = f"the environment variable {ENVIRONMENT_PREFIX}{field.upper()}"
    elif field in values:
        where = f"{field} in {file}"
    else:
        where = field
    given = (
        "" if field in ("api_key", "admin_key") else f" is {problem['input']!r}"
    )  # a key stays out of terminals and logs
    return f"{where}{given}: {message[0].lower()}{message[1:]}."


def flag_of(field: str) -> str:
    return "MODEL" if field == "model" else f"--{field.replace('_', '-')}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per field, in the groups of the schema. Values stay text; the schema checks them."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML file with the same options as keys")
    groups: dict[str, Any] = {title: parser.add_argument_group(title) for title in GROUPS}
    for name, field in ServeConfig.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict), "every option says its group"
        short = [str(extra["short"])] if extra["short"] else []
        _add_argument(groups[str(extra["group"])], name, field, str(extra["metavar"]), short)


def _add_argument(group: Any, name: str, field: FieldInfo, metavar: str, short: list[str]) -> None:
    help_text = field.description or ""
    if field.default not in (None, (), 0) and "default" not in help_text:
        help_text += f" (default: {field.default})"
    common: dict[str, Any] = {"help": help_text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if field.annotation is bool:
        group.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, **common)
        return
    common["metavar"] = metavar
    if name == "model":
        group.add_argument("model", nargs="?", **common)
    elif name in LIST_OPTIONS:
        group.add_argument(flag_of(name), action="append", **common)
    else:
        group.add_argument(*short, flag_of(name), **common)
