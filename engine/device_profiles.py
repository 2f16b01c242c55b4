"""Device profiles from files: what a GPU can do, for who plans with one, or trusts its data sheet more than a probe.

A file is YAML or JSON, as `twinpool probe --json` writes it for one device. Its keys are ``DeviceProfile``'s, with
peaks and the part of them that is reached::

    name: H100-SXM5-80GB
    gemm_gflop_s: 989000
    gemm_efficiency: 0.80
    gemm_efficiency_by_rows: {128: 0.36, 512: 0.83}
    read_gb_s: 3350
    read_efficiency: 0.88
    memory_bytes: 80GB
    sources: {gemm_gflop_s: data sheet, gemm_efficiency: our own benchmark}
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from kvcache.errors import ConfigError
from scheduler.types import DeviceProfile, GemmRate

SHIPPED_FILE = Path(__file__).with_name("device_profiles.yaml")
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Part = Annotated[float, Field(gt=0, le=1)]
Rows = Annotated[int, Field(ge=1)]


class _Rate(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rows: Rows
    gflop_s: Rate


def _as_mapping(sources: Any) -> Any:
    """`twinpool probe --json` writes pairs."""
    return {pair[0]: pair[1] for pair in sources} if isinstance(sources, list | tuple) else sources


class _ProfileFile(BaseModel):
    """Efficiencies are parts of the rates that are given: what is reached where a peak was measured."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(min_length=1)]
    gemm_gflop_s: Rate
    gemm_efficiency: Part = 1.0
    gemm_rates: tuple[_Rate, ...] = ()
    gemm_efficiency_by_rows: dict[Rows, Part] = {}  # parts of gemm_gflop_s; instead of gemm_rates
    prompt_attention_efficiency: Part | None = None  # of gemm_gflop_s, by the attention of prompts
    prompt_attention_gflop_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    layer_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    read_gb_s: Rate
    read_efficiency: Part = 1.0
    attention_efficiency: Part | None = None  # of read_gb_s, by the attention of decoding sequences
    attention_gb_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    memory_bytes: Annotated[ByteSize, Field(gt=0)]
    link_gb_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    price_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    num_threads: Annotated[int, Field(ge=1)] = 1
    sources: Annotated[dict[str, str], BeforeValidator(_as_mapping)] = {}

    @field_validator("gemm_efficiency_by_rows")
    @classmethod
    def _is_the_only_way(cls, parts: dict[int, float], others: ValidationInfo) -> dict[int, float]:
        if others.data.get("gemm_rates"):
            raise ValueError("gemm_rates says the same")
        return parts

    def profile(self, source: str) -> DeviceProfile:
        """``source``: where numbers are from that name no source of their own."""
        attention_gb_s = self.attention_gb_s
        if self.attention_efficiency is not None:
            attention_gb_s = self.read_gb_s * self.attention_efficiency
        prompt_attention_gflop_s = self.prompt_attention_gflop_s
        if self.prompt_attention_efficiency is not None:
            prompt_attention_gflop_s = self.gemm_gflop_s * self.prompt_attention_efficiency
        named = {field: self.sources.get(field, source) for field in self.model_fields_set - {"name", "sources"}}
        return DeviceProfile(
            name=self.name,
            gemm_gflop_s=self.gemm_gflop_s * self.gemm_efficiency,
            read_gb_s=self.read_gb_s * self.read_efficiency,
            memory_bytes=int(self.memory_bytes),
            num_threads=self.num_threads,
            price_per_hour=self.price_per_hour,
            gemm_rates=self._gemm_rates(),
            attention_gb_s=attention_gb_s,
            link_gb_s=self.link_gb_s,
            sources=tuple(sorted(named.items())),
            prompt_attention_gflop_s=prompt_attention_gflop_s,
            layer_s=self.layer_s,
        )

    def _gemm_rates(self) -> tuple[GemmRate, ...]:
        """By growing rows."""
        rates = [GemmRate(rate.rows, rate.gflop_s * self.gemm_efficiency) for rate in self.gemm_rates]
        rates += [GemmRate(rows, self.gemm_gflop_s * part) for rows, part in self.gemm_efficiency_by_rows.items()]
        return tuple(sorted(rates, key=lambda rate: rate.rows))


def shipped_names() -> tuple[str, ...]:
    return tuple(_shipped())


@functools.cache
def _shipped() -> Mapping[str, Any]:
    return _read(SHIPPED_FILE)


def load_profile(name_or_file: str, option: str = "--device-profile") -> DeviceProfile:
    """A shipped profile by its name, or one from a file. A file that exists wins.

    Raises:
        ConfigError: one sentence that names the option, the file and the key.
    """
    file = Path(name_or_file).expanduser()
    shipped = _shipped()
    if file.is_file():
        return _checked(_read(file), f"{option} {name_or_file}", str(file))
    if name_or_file.lower() in shipped:
        return _checked(shipped[name_or_file.lower()], f"{option} {name_or_file}", "the shipped profiles")
    raise ConfigError(f"{option} is {name_or_file!r}: no file, and no shipped profile; there are {', '.join(shipped)}.")


def _read(file: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML
    except OSError as error:
        raise ConfigError(f"The device profile {file} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The device profile {file} is no YAML or JSON: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"The device profile {file} must hold keys and values.")
    return content


def _checked(content: Any, what: str, source: str) -> DeviceProfile:
    try:
        return _ProfileFile.model_validate(content).profile(source)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "its content"
        given = "" if problem["type"] == "missing" else f", which is {problem['input']!r}"
        raise ConfigError(f"{what}: {where}{given}: {problem['msg'][0].lower()}{problem['msg'][1:]}.") from None
