"""Options of a Ray cluster that is joined: where it is, and which of its nodes the workers go to."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import BaseModel, field_validator, model_validator
from pydantic_settings import NoDecode

from engine.option import option

ADDRESS = re.compile(r"(\[[0-9A-Fa-f:]+\]|[^\s:/\[\]]+):([0-9]{1,5})")
AMOUNT = re.compile(r"[0-9]+(\.[0-9]{1,4})?")  # Ray counts in steps of 0.0001
RESERVED_RESOURCES = frozenset({"CPU", "GPU", "memory", "object_store_memory"})
LABELS = ("node_label", "prefill_node_label", "decode_node_label")
RESOURCES = ("resource", "prefill_resource", "decode_resource")
NODE_OPTIONS = (*LABELS, *RESOURCES)


class ClusterOptions(BaseModel):
    """Part of ``engine.config.ServeConfig``."""

    address: str | None = option(
        None, "Cluster", "running Ray cluster to join: auto, or HOST:PORT (default: one of its own)", "ADDRESS"
    )
    worker_host: str | None = option(
        None,
        "Cluster",
        "address that workers listen on (default: 127.0.0.1; in a cluster that was joined, their node's)",
        "HOST",
        min_length=1,
    )
    node_label: Annotated[tuple[str, ...], NoDecode] = option(
        (), "Cluster", "label that the nodes of workers must have; may be repeated", "KEY=VALUE"
    )
    prefill_node_label: Annotated[tuple[str, ...] | None, NoDecode] = option(
        None, "Cluster", "the same for prefill workers alone (default: --node-label)", "KEY=VALUE"
    )
    decode_node_label: Annotated[tuple[str, ...] | None, NoDecode] = option(
        None, "Cluster", "the same for decode workers alone (default: --node-label)", "KEY=VALUE"
    )
    resource: Annotated[tuple[str, ...], NoDecode] = option(
        (), "Cluster", "how much of one of Ray's custom resources each rank takes; may be repeated", "NAME=AMOUNT"
    )
    prefill_resource: Annotated[tuple[str, ...] | None, NoDecode] = option(
        None, "Cluster", "the same for prefill workers alone (default: --resource)", "NAME=AMOUNT"
    )
    decode_resource: Annotated[tuple[str, ...] | None, NoDecode] = option(
        None, "Cluster", "the same for decode workers alone (default: --resource)", "NAME=AMOUNT"
    )

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str | None) -> str | None:
        if address is None or address == "auto":
            return address
        parts = ADDRESS.fullmatch(address)
        if parts is None:
            raise ValueError("it must be auto, or HOST:PORT of the cluster's head")
        if not 1 <= int(parts[2]) <= 65535:
            raise ValueError("the port must be from 1 to 65535")
        return address

    @field_validator("worker_host")
    @classmethod
    def _check_worker_host(cls, host: str | None) -> str | None:
        if host in ("0.0.0.0", "::"):
            raise ValueError("workers tell each other this address, so it must be one that others can reach")
        return host

    @field_validator(*LABELS)
    @classmethod
    def _check_labels(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for label in labels or ():
            key, _, value = label.partition("=")
            if not key or not value:
                raise ValueError(f"{label!r} is not KEY=VALUE")
        _check_names(labels or ())
        return labels

    @field_validator(*RESOURCES)
    @classmethod
    def _check_resources(cls, resources: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for resource in resources or ():
            name, _, amount = resource.partition("=")
            if not name or not AMOUNT.fullmatch(amount) or float(amount) <= 0:
                raise ValueError(f"{resource!r} is not NAME=AMOUNT with an amount above 0")
            if name in RESERVED_RESOURCES:
                raise ValueError(f"the amount of {name} is worked out from other options; this is for custom resources")
        _check_names(resources or ())
        return resources

    @model_validator(mode="after")
    def _check_cluster(self) -> Self:
        given = [name for name in NODE_OPTIONS if getattr(self, name)]
        if given and self.address is None:
            raise ValueError(f"{given[0]} chooses among the nodes of a running Ray cluster: set address too")
        return self


def _check_names(given: tuple[str, ...]) -> None:
    names = [each.partition("=")[0] for each in given]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given more than once")
