"""The file of `--tenants`: who there is, by which API keys, and what each may ask for.

::

    search:                        # the name that metrics and logs show
      api_keys: [KEY, ...]
      requests_per_minute: 600     # every limit may be left out
      tokens_per_minute: 200000    # of prompts and answers
      running_requests: 32         # at once, whatever their n: how much each may be, tokens_per_minute says
      weight: 2                    # its share where tenants take turns; 1 when left out
      highest_class: interactive   # or batch: all its requests are batch work

Callers of `--api-key`, and all where no key is asked for, are the tenant ``default``, which may be in the file too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, field_validator

from engine.api_key import check_api_key
from kvcache.errors import ConfigError
from scheduler.tenants import DEFAULT_TENANT, Tenant
from scheduler.urgency import ServiceClass

MAX_TENANTS = 1000  # each has metrics of its own
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Count = Annotated[StrictInt, Field(ge=1, le=1 << 53)]


@dataclass(frozen=True, slots=True)
class TenantKey:
    key: str
    tenant: str


@dataclass(frozen=True, slots=True)
class Tenants:
    """All tenants, ``default`` among them."""

    tenants: tuple[Tenant, ...] = (Tenant(DEFAULT_TENANT),)
    keys: tuple[TenantKey, ...] = ()

    @property
    def weights(self) -> tuple[tuple[str, float], ...]:
        """Of those that somebody can be: without keys there is the default tenant alone."""
        return tuple((tenant.name, tenant.weight) for tenant in self.tenants)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    api_keys: list[str] = []
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    running_requests: Count | None = None
    weight: Annotated[float, Field(ge=0.001, le=1000, strict=True)] = 1.0
    highest_class: ServiceClass = ServiceClass.INTERACTIVE

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, keys: list[str]) -> list[str]:
        for key in keys:
            check_api_key(key)
        return keys

    def tenant(self, name: str) -> Tenant:
        return Tenant(name, **self.model_dump(exclude={"api_keys"}))


def load_tenants(file: Path | None, other_keys: tuple[str, ...] = ()) -> Tenants:
    """
    Args:
        other_keys: those of `--api-key` and `--admin-key`, which may not be in the file as well.

    Raises:
        ConfigError: one sentence that names file, tenant and field, and no key.
    """
    if file is None:
        return Tenants()
    tenants: dict[str, Tenant] = {}
    keys: dict[str, str] = {}
    for name, values in _read(file).items():
        entry = _entry(name, values, file)
        tenants[name] = entry.tenant(name)
        if not entry.api_keys and name != DEFAULT_TENANT:
            raise ConfigError(f"The tenant {name!r} in {file} has no api_keys, so nobody could be it.")
        for key in entry.api_keys:
            if key in keys or key in other_keys:
                owner = f"tenant {keys[key]!r}" if key in keys else "--api-key or --admin-key"
                raise ConfigError(f"A key in api_keys of the tenant {name!r} in {file} is also one of {owner}.")
            keys[key] = name
    tenants.setdefault(DEFAULT_TENANT, Tenant(DEFAULT_TENANT))
    return Tenants(tuple(tenants.values()), tuple(TenantKey(key, name) for key, name in keys.items()))


def check_fits(tenants: Tenants, file: Path | None, max_model_len: int) -> None:
    """
    Raises:
        ConfigError: a tenant could never send a request as long as the model's context.
    """
    for tenant in tenants.tenants:
        limit = tenant.tokens_per_minute
        if limit is not None and limit < max_model_len:
            raise ConfigError(
                f"tokens_per_minute of the tenant {tenant.name!r} in {file} is {limit}: one request may come to"
                f" {max_model_len} tokens, so raise it or lower --max-model-len."
            )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"The tenants' file {file} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"The tenants' file {file} is not UTF-8 text.") from None
    except yaml.MarkedYAMLError as error:  # without the line itself, which may hold a key
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ConfigError(f"The tenants' file {file} is not valid YAML{line}: {error.problem}.") from None
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"The tenants' file {file} must hold names of tenants, and what each may do.")
    if len(content) > MAX_TENANTS:
        raise ConfigError(f"The tenants' file {file} has {len(content)} tenants; there may be {MAX_TENANTS}.")
    return content


def _entry(name: str, values: Any, file: Path) -> _Entry:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"The tenant {name[:80]!r} in {file} must be called by 1 to 64 letters, digits or any of . _ -, which"
            " begin with a letter or a digit."
        )
    if not isinstance(values, dict):
        raise ConfigError(f"The tenant {name!r} in {file} must hold fields, such as api_keys.")
    try:
        return _Entry.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = str(problem["loc"][0])
        message = problem["msg"].removeprefix("Value error, ")
        given = "" if field == "api_keys" else f" is {problem['input']!r}"
        if problem["type"] == "extra_forbidden":
            raise ConfigError(f"The tenant {name!r} in {file} has a field {field!r}, which there is not.") from None
        raise ConfigError(
            f"{field} of the tenant {name!r} in {file}{given}: {message[0].lower()}{message[1:]}."
        ) from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a key stand twice and the last one win: here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for position, name in enumerate(names):
            if name in names[:position]:
                mark = node.value[position][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} stands there twice", mark)
        return super().construct_mapping(node, deep)
