"""What Prometheus reads: latencies and lengths seen at the gateway, and the workers' own counts.

Every metric is declared once, under ``twinpool_``. Those that vLLM has as well are also served under ``vllm:``, from
the same numbers, so that existing dashboards work. All carry ``model_name``, by which those dashboards select;
what a worker counts carries ``worker`` and ``role`` too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.cluster_metrics import PREFIX, ClusterMetrics
from engine.outputs import Interruption
from engine.tenant_metrics import TenantMetrics
from scheduler.request import FinishReason
from scheduler.types import ClusterSnapshot
from workers.stages import Stage

STANDARD_PREFIX = "vllm:"

# vLLM's bounds, so that quantiles over both agree.
_FIRST_TOKEN_BOUNDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN_BOUNDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_BOUNDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_LENGTH_BOUNDS = tuple(digit * 10.0**power for power in range(6) for digit in (1, 2, 5))

ERROR = "error"
FINISHED_REASONS = (*(reason.value for reason in FinishReason), ERROR)
"""Values of ``finished_reason``: ``abort`` is a client that left, ``error`` a sequence that failed."""


class Metrics:
    """All metrics of one gateway, in a registry of their own. Used from one thread: the event loop's."""

    def __init__(
        self,
        model_name: str,
        cluster: Callable[[], ClusterSnapshot],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``cluster`` is asked at every scrape; it may be called before the engine has workers."""
        self.now = clock
        self._own: list[Collector] = []
        self._model_name = model_name
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of sequences that got a first token.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens delivered to clients.")
        finished = Counter(
            f"{PREFIX}request_success",
            "Sequences that ended, by reason.",
            ("model_name", "finished_reason"),
            registry=None,
        )
        self._own.append(finished)
        self._finished = {reason: finished.labels(model_name, reason) for reason in FINISHED_REASONS}
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From the request to its first token.", _FIRST_TOKEN_BOUNDS
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two pieces of a stream that hold tokens.", _INTER_TOKEN_BOUNDS
        )
        self._latency = self._histogram(
            "e2e_request_latency_seconds", "From the request to its last token; completed only.", _REQUEST_BOUNDS
        )
        self._prompt_length = self._histogram(
            "request_prompt_tokens", "Prompt tokens per completed sequence.", _LENGTH_BOUNDS
        )
        self._generation_length = self._histogram(
            "request_generation_tokens", "Generated tokens per completed sequence.", _LENGTH_BOUNDS
        )
        self._queue_time = self._histogram(
            "request_queue_time_seconds", "From asking for a worker to having one.", _REQUEST_BOUNDS
        )
        self._prefill_time = self._histogram(
            "request_prefill_time_seconds", "From the first step of a prompt to its first token.", _REQUEST_BOUNDS
        )
        self._decode_time = self._histogram(
            "request_decode_time_seconds", "From the first token to the last, on the worker.", _REQUEST_BOUNDS
        )
        self._stages = Histogram(
            f"{PREFIX}request_stage_seconds",
            "How long sequences were in each stage on their workers.",
            ("model_name", "stage"),
            buckets=_FIRST_TOKEN_BOUNDS,
            registry=None,
        )
        self.of_tenants = TenantMetrics(model_name)
        self._registry = CollectorRegistry(auto_describe=False)
        self._migrations = Counter(
            f"{PREFIX}migrations",
            "Sequences that went on elsewhere, by what kept them from staying.",
            ("model_name", "reason"),
            registry=None,
        )
        only_ours = (self.of_tenants, self._migrations, self._stages)
        self._registry.register(_BothNames(self._own, ClusterMetrics(model_name, cluster), only_ours))

    def recorder(self, num_prompt_tokens: int, started_s: float) -> RequestRecorder:
        """For one sequence of a request that came in at ``started_s`` of this object's clock."""
        return RequestRecorder(self, num_prompt_tokens, started_s)

    def observe_first_token(self, seconds: float, num_prompt_tokens: int) -> None:
        self._first_token.observe(seconds)
        self._prompt_tokens.inc(num_prompt_tokens)

    def observe_queue_time(self, seconds: float) -> None:
        self._queue_time.observe(seconds)

    def observe_inter_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def observe_tokens(self, num_tokens: int) -> None:
        self._generation_tokens.inc(num_tokens)

    def observe_completed(self, seconds: float, num_prompt_tokens: int, num_generated_tokens: int) -> None:
        self._latency.observe(seconds)
        self._prompt_length.observe(num_prompt_tokens)
        self._generation_length.observe(num_generated_tokens)

    def observe_migration(self, reason: Interruption) -> None:
        self._migrations.labels(self._model_name, reason.value).inc()

    def observe_stages(self, seconds: Mapping[Stage, float]) -> None:
        """Of a sequence that has ended, as its workers say."""
        for stage, spent_s in seconds.items():
            self._stages.labels(self._model_name, stage.value).observe(spent_s)
        if Stage.PREFILL in seconds:
            self._prefill_time.observe(seconds[Stage.PREFILL] + seconds.get(Stage.TRANSFER, 0.0))
        if Stage.DECODE in seconds:
            self._decode_time.observe(seconds[Stage.FIRST_DECODE] + seconds[Stage.DECODE])

    def observe_end(self, reason: str) -> None:
        """``reason`` is one of ``FINISHED_REASONS``."""
        self._finished[reason].inc()

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format (``prometheus_client.CONTENT_TYPE_LATEST``)."""
        return generate_latest(self._registry)

    def _counter(self, name: str, documentation: str) -> Counter:
        counter = Counter(PREFIX + name, documentation, ("model_name",), registry=None)
        self._own.append(counter)
        return counter.labels(self._model_name)

    def _histogram(self, name: str, documentation: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = Histogram(PREFIX + name, documentation, ("model_name",), buckets=bounds, registry=None)
        self._own.append(histogram)
        return histogram.labels(self._model_name)


class RequestRecorder:
    """Observes one sequence. A ``with`` block around its stream; leaving early counts as abort or error."""

    def __init__(self, metrics: Metrics, num_prompt_tokens: int, started_s: float) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._started_s = started_s
        self._num_generated = 0
        self._last_token_s: float | None = None
        self._reason: str | None = None

    def on_delta(self, num_tokens: int, finish_reason: FinishReason | None) -> None:
        """One piece of the stream came, with ``num_tokens`` new tokens."""
        now = self._metrics.now()
        if num_tokens:
            if self._last_token_s is None:
                self._metrics.observe_first_token(now - self._started_s, self._num_prompt_tokens)
            else:
                self._metrics.observe_inter_token(now - self._last_token_s)
            self._last_token_s = now
            self._num_generated += num_tokens
            self._metrics.observe_tokens(num_tokens)
        if finish_reason is not None:
            self._reason = finish_reason.value

    def __enter__(self) -> RequestRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._reason is None:
            left = kind is None or issubclass(kind, GeneratorExit | asyncio.CancelledError)
            self._reason = FinishReason.ABORT.value if left else ERROR
        elif self._reason != FinishReason.ABORT.value:
            elapsed = self._metrics.now() - self._started_s
            self._metrics.observe_completed(elapsed, self._num_prompt_tokens, self._num_generated)
        self._metrics.observe_end(self._reason)


class _BothNames(Collector):
    """Serves families under our prefix, and the standard ones under vLLM's as well."""

    def __init__(
        self, own: Iterable[Collector], cluster: ClusterMetrics, only_ours: Sequence[Collector | TenantMetrics]
    ) -> None:
        self._own = own
        self._cluster = cluster
        self._only_ours = only_ours

    def collect(self) -> Iterator[Metric]:
        for collector in self._own:
            for family in collector.collect():
                yield _renamed(family, PREFIX)
                yield _renamed(family, STANDARD_PREFIX)
        for family in self._cluster.standard():
            yield family
            yield _renamed(family, STANDARD_PREFIX)
        yield from self._cluster.ours()
        for collector in self._only_ours:
            for family in collector.collect():
                yield _renamed(family, PREFIX)


def _renamed(family: Metric, prefix: str) -> Metric:
    """A copy under another prefix, without the ``_created`` times that no dashboard reads."""
    renamed = Metric(prefix + family.name.removeprefix(PREFIX), family.documentation, family.type)
    renamed.samples = [
        sample._replace(name=prefix + sample.name.removeprefix(PREFIX))
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    return renamed
