"""Who is served how much, who is refused, and how long requests wait for a worker.

The labels ``tenant`` and ``limit`` have the values of the configuration, so there are few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from engine.cluster_metrics import PREFIX
from kvcache.errors import OverloadedError, RateLimitError, UnavailableError

OVERLOADED, UNAVAILABLE = "overloaded", "unavailable"


class TenantMetrics:
    """Part of ``engine.metrics.Metrics``."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._running: Mapping[str, Callable[[], int]] = {}
        self._tokens = self._counter("tenant_tokens", "Tokens of requests that ended.", "tenant", "kind")
        self._limit_hits = self._counter("tenant_limit_hits", "Requests over a tenant's limit.", "tenant", "limit")
        self._refused = self._counter("requests_refused", "Requests refused for want of room, by reason.", "reason")

    def count_running(self, running: Mapping[str, Callable[[], int]]) -> None:
        """Whom to ask at every scrape how many requests of a tenant are under way."""
        self._running = running

    def served(self, tenant: str, num_prompt_tokens: int, num_generated_tokens: int) -> None:
        self._tokens.labels(self._model_name, tenant, "prompt").inc(num_prompt_tokens)
        self._tokens.labels(self._model_name, tenant, "generation").inc(num_generated_tokens)

    def limit_hit(self, tenant: str, limit: str) -> None:
        self._limit_hits.labels(self._model_name, tenant, limit).inc()

    def refused(self, error: OverloadedError) -> None:
        reason = OVERLOADED
        if isinstance(error, RateLimitError):
            reason = error.limit
        elif isinstance(error, UnavailableError):
            reason = UNAVAILABLE
        self._refused.labels(self._model_name, reason).inc()

    def collect(self) -> Iterator[Metric]:
        for collector in (self._tokens, self._limit_hits, self._refused):
            yield from collector.collect()
        family = GaugeMetricFamily(
            f"{PREFIX}tenant_requests_running", "Requests under way.", labels=("model_name", "tenant")
        )
        for tenant, count in self._running.items():
            family.add_metric((self._model_name, tenant), count())
        yield family

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, documentation, ("model_name", *labels), registry=None)
