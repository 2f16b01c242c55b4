"""The workers' own counts, read from the cluster snapshot when Prometheus asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from kvcache.errors import TransferFault
from scheduler.types import ClusterSnapshot, WorkerSnapshot
from scheduler.urgency import ServiceClass

PREFIX = "twinpool_"

_WORKER_LABELS = ("model_name", "worker", "role")


@dataclass(frozen=True, slots=True)
class _WorkerMetric:
    name: str
    documentation: str
    read: Callable[[WorkerSnapshot], float]


_STANDARD_GAUGES = (
    _WorkerMetric("num_requests_running", "Sequences in the batch of a worker.", lambda worker: worker.load.running),
    _WorkerMetric(
        "num_requests_waiting",
        "Sequences that wait on a worker for room or for KV.",
        lambda worker: worker.load.waiting,
    ),
    _WorkerMetric(
        "kv_cache_usage_perc", "Part of a worker's KV blocks in use, from 0 to 1.", lambda worker: _usage(worker)
    ),
)
_STANDARD_COUNTERS = (
    _WorkerMetric("num_preemptions", "Sequences put back for want of blocks.", lambda worker: worker.load.preemptions),
    _WorkerMetric(
        "prefix_cache_queries",
        "Tokens of sequences that began on a worker.",
        lambda worker: worker.load.prefix_cache_queries,
    ),
    _WorkerMetric(
        "prefix_cache_hits",
        "Those of them whose KV was cached there: not computed, or not sent there, once more.",
        lambda worker: worker.load.prefix_cache_hits,
    ),
)
_OUR_GAUGES = (
    _WorkerMetric("kv_blocks_leased", "Blocks held by handoffs under way.", lambda worker: worker.load.blocks_leased),
    _WorkerMetric(
        "kv_blocks_unaccounted", "Blocks that nobody owns; must be 0.", lambda worker: worker.load.blocks_unaccounted
    ),
)
_OUR_COUNTERS = (
    _WorkerMetric(
        "kv_transfers_compressed",
        "Handoffs from a worker that were rounded for the way.",
        lambda worker: worker.load.transfers_compressed,
    ),
    _WorkerMetric(
        "kv_offered_bytes", "KV sent back to prefill workers after turns.", lambda worker: worker.load.offered_bytes
    ),
    _WorkerMetric(
        "kv_offers_dropped",
        "Turns not sent back for want of budget or room, or because it broke.",
        lambda worker: worker.load.offers_dropped,
    ),
    _WorkerMetric(
        "kv_transfers_fenced",
        "Messages of handoffs that were over: a worker taken for dead went on.",
        lambda worker: dict(worker.load.transfer_failures).get(TransferFault.STALE_EPOCH.value, 0),
    ),
    _WorkerMetric(
        "kv_blocks_resumed",
        "Blocks kept of handoffs that broke: they did not come again.",
        lambda worker: worker.load.blocks_resumed,
    ),
    _WorkerMetric("kv_transfer_bytes", "KV payload received.", lambda worker: worker.load.transfer_bytes),
    _WorkerMetric(
        "kv_transfer_seconds", "Time spent in handoffs, summed over them.", lambda worker: worker.load.transfer_seconds
    ),
)


@dataclass(frozen=True, slots=True)
class _DetailedMetric:
    """A counter with one more label."""

    name: str
    documentation: str
    label: str
    read: Callable[[WorkerSnapshot], Iterable[tuple[str, int]]]


_OUR_DETAILED_COUNTERS = (
    _DetailedMetric(
        "kv_transfer_failures",
        "Handoffs refused or broken, by reason.",
        "reason",
        lambda worker: worker.load.transfer_failures,
    ),
    _DetailedMetric(
        "kv_tier_hits",
        "Blocks brought back into a cache.",
        "tier",
        lambda worker: [(tier.tier, tier.hits) for tier in worker.load.tiers],
    ),
    _DetailedMetric(
        "kv_tier_evictions",
        "Blocks that left a tier for want of room.",
        "tier",
        lambda worker: [(tier.tier, tier.evictions) for tier in worker.load.tiers],
    ),
    _DetailedMetric(
        "kv_tier_unsaved",
        "Evicted blocks that were not kept: too much was under way, or the disk refused.",
        "tier",
        lambda worker: [(tier.tier, tier.unsaved) for tier in worker.load.tiers],
    ),
    _DetailedMetric(
        "kv_tier_damaged",
        "Blocks that were not what they should have been, and were removed.",
        "tier",
        lambda worker: [(tier.tier, tier.damaged) for tier in worker.load.tiers],
    ),
)


def _usage(worker: WorkerSnapshot) -> float:
    total = worker.info.num_blocks
    return 1 - worker.load.blocks_free / total if total else 0.0


class ClusterMetrics:
    """Metric families of all workers. Counters go on when a worker restarts; see ``_Totals``."""

    def __init__(self, model_name: str, cluster: Callable[[], ClusterSnapshot]) -> None:
        self._model_name = model_name
        self._cluster = cluster
        self._totals = _Totals()
        self._starts: dict[str, int] = {}

    def standard(self) -> Iterator[Metric]:
        """Those that vLLM has too."""
        workers = self._cluster().workers
        yield from (self._gauge(metric, workers) for metric in _STANDARD_GAUGES)
        yield from (self._counter(metric, workers) for metric in _STANDARD_COUNTERS)

    def ours(self) -> Iterator[Metric]:
        """Those of a disaggregated engine."""
        workers = self._cluster().workers
        yield from (self._gauge(metric, workers) for metric in _OUR_GAUGES)
        yield from (self._counter(metric, workers) for metric in _OUR_COUNTERS)
        yield from (self._detailed_counter(metric, workers) for metric in _OUR_DETAILED_COUNTERS)
        yield self._tier_bytes(workers)
        yield self._restarts(workers)
        yield self._pool_workers(workers)
        yield self._prediction_errors(workers)
        yield self._queue_length()

    def _queue_length(self) -> Metric:
        cluster = self._cluster()
        family = GaugeMetricFamily(
            f"{PREFIX}queue_length", "Requests that wait for a worker, by class.", labels=("model_name", "class")
        )
        lengths = {ServiceClass.INTERACTIVE: cluster.queued_interactive, ServiceClass.BATCH: cluster.queued_batch}
        for service_class, length in lengths.items():
            family.add_metric((self._model_name, service_class.value), length)
        return family

    def _gauge(self, metric: _WorkerMetric, workers: tuple[WorkerSnapshot, ...]) -> Metric:
        family = GaugeMetricFamily(PREFIX + metric.name, metric.documentation, labels=_WORKER_LABELS)
        for worker in workers:
            labels = (self._model_name, worker.info.worker_id, worker.info.role.value)
            family.add_metric(labels, metric.read(worker))
        return family

    def _counter(self, metric: _WorkerMetric, workers: tuple[WorkerSnapshot, ...]) -> Metric:
        for worker in workers:
            self._totals.note(worker, metric.name, "", metric.read(worker))
        family = CounterMetricFamily(PREFIX + metric.name, metric.documentation, labels=_WORKER_LABELS)
        for total in self._totals.of(metric.name):
            family.add_metric((self._model_name, total.worker_id, total.role), total.value)
        return family

    def _detailed_counter(self, metric: _DetailedMetric, workers: tuple[WorkerSnapshot, ...]) -> Metric:
        for worker in workers:
            for detail, count in metric.read(worker):
                self._totals.note(worker, metric.name, detail, count)
        labels = (*_WORKER_LABELS, metric.label)
        family = CounterMetricFamily(PREFIX + metric.name, metric.documentation, labels=labels)
        for total in self._totals.of(metric.name):
            family.add_metric((self._model_name, total.worker_id, total.role, total.detail), total.value)
        return family

    def _tier_bytes(self, workers: tuple[WorkerSnapshot, ...]) -> Metric:
        labels = (*_WORKER_LABELS, "tier")
        family = GaugeMetricFamily(f"{PREFIX}kv_tier_bytes", "KV kept outside a worker's cache.", labels=labels)
        for worker in workers:
            for tier in worker.load.tiers:
                role = worker.info.role.value
                family.add_metric((self._model_name, worker.info.worker_id, role, tier.tier), tier.num_bytes)
        return family

    def _restarts(self, workers: tuple[WorkerSnapshot, ...]) -> Metric:
        """A worker's number is how often it was started. One that is away shows when it is back."""
        for worker in workers:
            self._starts[worker.info.worker_id] = worker.info.incarnation
        family = CounterMetricFamily(
            f"{PREFIX}worker_restarts", "Processes of a worker that ended.", labels=("model_name", "worker")
        )
        for worker_id, num_starts in self._starts.items():
            family.add_metric((self._model_name, worker_id), num_starts - 1)
        return family

    def _pool_workers(self, workers: tuple[WorkerSnapshot, ...]) -> Metric:
        pools = Counter((worker.info.role.value, worker.info.device.name) for worker in workers)
        family = GaugeMetricFamily(
            f"{PREFIX}pool_workers", "Live workers by role and device.", labels=("model_name", "role", "device")
        )
        for (role, device), count in pools.items():
            family.add_metric((self._model_name, role, device), count)
        return family

    def _prediction_errors(self, workers: tuple[WorkerSnapshot, ...]) -> Metric:
        family = GaugeMetricFamily(
            f"{PREFIX}cost_model_error",
            "Median of |predicted - real| / real of the newest steps, handoffs, TTFTs and TPOTs.",
            labels=(*_WORKER_LABELS, "of"),
        )
        for worker in workers:
            labels = (self._model_name, worker.info.worker_id, worker.info.role.value)
            for what in fields(worker.errors):
                error = getattr(worker.errors, what.name)
                if error is not None:
                    family.add_metric((*labels, what.name), error)
        return family


@dataclass(slots=True)
class _Total:
    worker_id: str
    role: str
    detail: str
    incarnation: int
    current: float = 0.0  # of the incarnation above
    earlier: float = 0.0  # of those before it

    @property
    def value(self) -> float:
        return self.earlier + self.current


class _Totals:
    """Counters that never go down, though a worker's own start from 0 with each restart.

    What a worker counted between the last scrape and its death is lost, unless something else scraped it.
    Workers that are gone stay in the output. Worker ids come from the launcher, so there are few.
    """

    def __init__(self) -> None:
        self._by_metric: dict[str, dict[tuple[str, str], _Total]] = {}

    def note(self, worker: WorkerSnapshot, metric: str, detail: str, value: float) -> None:
        info = worker.info
        totals = self._by_metric.setdefault(metric, {})
        total = totals.setdefault(
            (info.worker_id, detail), _Total(info.worker_id, info.role.value, detail, info.incarnation)
        )
        if info.incarnation < total.incarnation:
            return  # a late word of an earlier process
        if info.incarnation > total.incarnation:
            total.earlier, total.current, total.incarnation = total.value, 0.0, info.incarnation
        total.role = info.role.value
        total.current = max(total.current, value)

    def of(self, metric: str) -> list[_Total]:
        return list(self._by_metric.get(metric, {}).values())
