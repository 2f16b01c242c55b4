"""Where every request of a tenant enters and leaves: its limits, its class, its counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from engine.metrics import Metrics
from kvcache.errors import OverloadedError, RateLimitError, RequestError
from scheduler.tenants import Allowance, Tenant, TenantGate
from scheduler.urgency import ServiceClass


class TokenCount(Protocol):
    """The tokens of one request, counted while they come."""

    @property
    def most_tokens(self) -> int:
        """What it may come to."""
        ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def completion_tokens(self) -> int: ...


class TenantDesk:
    """All tenants of one gateway. Used on one event loop; the time is that of ``metrics``."""

    def __init__(self, tenants: Sequence[Tenant], metrics: Metrics) -> None:
        self._gates = {tenant.name: TenantGate(tenant) for tenant in tenants}
        self._metrics = metrics.of_tenants
        self._now = metrics.now
        self._metrics.count_running({name: gate.count_running for name, gate in self._gates.items()})

    def service_class(self, tenant: str, service_tier: str | None) -> ServiceClass:
        """What a request of this tenant is, by its ``service_tier``.

        Raises:
            RequestError: it asks for more than the tenant may have.
        """
        highest = self._gates[tenant].tenant.highest_class
        if service_tier == "default" and highest is ServiceClass.BATCH:
            raise RequestError(
                f"tenant {tenant!r} has batch work only; leave service_tier out or set it to flex", "service_tier"
            )
        return ServiceClass.BATCH if service_tier == "flex" else highest

    def allowances(self, tenant: str) -> Sequence[Allowance]:
        """What is left of a tenant's limits per minute."""
        return self._gates[tenant].allowances(self._now())

    @contextmanager
    def visit(self, tenant: str, count: TokenCount) -> Iterator[None]:
        """Around the work on one request.

        Raises:
            RateLimitError, RequestError: as ``TenantGate.enter``.
        """
        gate = self._gates[tenant]
        try:
            gate.enter(count.most_tokens, self._now())
        except RateLimitError as error:
            self._metrics.limit_hit(tenant, error.limit)
            self._metrics.refused(error)
            raise
        try:
            yield
        except OverloadedError as error:
            self._metrics.refused(error)
            raise
        finally:
            gate.leave(count.most_tokens - count.prompt_tokens - count.completion_tokens)
            self._metrics.served(tenant, count.prompt_tokens, count.completion_tokens)
