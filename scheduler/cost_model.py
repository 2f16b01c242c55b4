"""How long things will take on a worker: predicted from its device and its model, corrected by what they took.

A step reads the weights once and computes with every row (roofline: Williams et al., CACM 2009); attention comes on
top. Each part has a coefficient that is 1 where the device does what its profile says, and is learned online.
docs/cost_model.md has the formulas.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import log
from statistics import median

from scheduler.online_fit import Coefficient, OnlineFit
from scheduler.types import (
    DeviceProfile,
    GemmRate,
    ModelShape,
    PredictionErrors,
    StepTimes,
    TransferTimes,
    WorkerInfo,
)

UNKNOWN_LINK_GB_S = 1.0  # about what gRPC moves over loopback; the first handoffs tell better
ERROR_WINDOW = 32  # samples that an error is the median of
START_WINDOW = 64  # first tokens whose calls are learned from: queues make them differ a lot
NEIGHBOURS_MEMORY = 0.02  # what the newest steps count in how many neighbours a worker mostly has
DRIFT_STEP = log(1.2)  # of times, in which a worker's drift is counted
DRIFT_SLACK = 0.75  # steps its times may be off: more than half, or its drift would change with every sample
_TYPICAL_TOKENS, _TYPICAL_BATCH = 512, 8  # of a prompt, or context; sequences that decode
_SHORTEST_S = 1e-7  # clocks may say 0

# Coefficients of parts that the profile gives: right to a factor of two or so, and never free.
_PART = Coefficient(prior=1.0, deviation=1.0, low=0.05, high=20.0)
_STEP = Coefficient(prior=1e-3, deviation=3e-3, low=0.0, high=1.0)  # seconds a step takes beside the model
_SEQUENCE = Coefficient(prior=2e-5, deviation=2e-4, low=0.0, high=0.1)  # and each sequence in it
_HANDOFF = Coefficient(prior=2e-3, deviation=5e-3, low=0.0, high=1.0)  # and a handoff, beside its bytes
_NEIGHBOUR = Coefficient(prior=0.0, deviation=0.3, low=0.0, high=5.0)  # of the parts: each other that computes
_LINK = Coefficient(prior=1.0, deviation=1.0, low=0.0, high=50.0)  # a part of the bytes goes while layers compute


class CostModel:
    """Predicted seconds on registered workers; corrected by what steps really took.

    A prediction costs about a microsecond and changes nothing. All but ``add`` raise KeyError for a worker that was
    not added, or was removed.
    """

    def __init__(self) -> None:
        self._workers: dict[str, WorkerCosts] = {}
        self.workers: Mapping[str, WorkerCosts] = self._workers  # by id, for whoever asks a dozen times for a request
        self._id_of: dict[str, str] = {}  # by address

    def add(self, info: WorkerInfo) -> None:
        """A worker has registered. What was learned of an earlier process of that name is forgotten."""
        if info.worker_id in self._workers:
            self.remove(info.worker_id)
        self._workers[info.worker_id] = WorkerCosts(info)
        self._id_of[info.address] = info.worker_id

    def remove(self, worker_id: str) -> None:
        removed = self._workers.pop(worker_id)
        if self._id_of.get(removed.address) == worker_id:
            del self._id_of[removed.address]
        for worker in self._workers.values():
            worker.links.pop(worker_id, None)

    def prefill_seconds(
        self, worker_id: str, num_tokens: int, num_cached_tokens: int = 0, neighbours: float | None = None
    ) -> float:
        """To compute a prompt of ``num_tokens``, of which that many are cached there, alone on the worker.

        Args:
            neighbours: how many workers compute beside it on its node; None: as many as mostly.
        """
        return self._workers[worker_id].prefill_seconds(num_tokens, num_cached_tokens, neighbours)

    def decode_step_seconds(
        self, worker_id: str, batch_size: float, context_tokens: float, neighbours: float | None = None
    ) -> float:
        """One token for each of ``batch_size`` sequences, whose contexts add up to ``context_tokens``.

        Args:
            neighbours: as ``prefill_seconds``.
        """
        return self._workers[worker_id].decode_step_seconds(batch_size, context_tokens, neighbours)

    def transfer_seconds(self, prefill_id: str, decode_id: str, num_tokens: int) -> float:
        """See ``WorkerCosts.transfer_seconds``."""
        return self._workers[prefill_id].transfer_seconds(self._workers[decode_id], num_tokens)

    def observe(self, worker_id: str, steps: StepTimes, neighbours: float | None = None) -> None:
        """Learns from steps that a worker has taken while so many others computed beside it on its node.

        Args:
            neighbours: None: not known, so as many as mostly.
        """
        self._workers[worker_id].observe(steps, neighbours)

    def observe_transfers(self, prefill_id: str, transfers: TransferTimes) -> None:
        """Learns from handoffs that a prefill worker has made. A receiver that is not known here is passed over."""
        decode_id = self._id_of.get(transfers.address)
        if decode_id is None or transfers.num_transfers < 1:
            return
        sender = self._workers[prefill_id]
        link = sender.links.setdefault(decode_id, OnlineFit((_HANDOFF, _LINK)))
        seconds = max(transfers.seconds, _SHORTEST_S)
        byte_s = _byte_seconds(sender, self._workers[decode_id])
        features = (transfers.num_transfers, transfers.num_bytes * byte_s)
        sender.transfer_errors.append(abs(link.predict(features) - seconds) / seconds)
        link.add(features, seconds)

    def start_seconds(self, worker_id: str) -> float:
        """What a first token of a prompt computed there takes beyond its parts: calls, and turns of event loops."""
        return self._workers[worker_id].start_s

    def observe_first_token(self, worker_id: str, predicted_s: float, real_s: float) -> None:
        """Learns ``start_seconds`` from a request whose first token is out; of a worker that left, nothing."""
        worker = self._workers.get(worker_id)
        if worker is not None and real_s > 0:
            worker.observe_first_token(predicted_s, real_s)

    def observe_tokens(self, worker_id: str, predicted_s: float, real_s: float) -> None:
        """Notes how far off the TPOT of a request was that decoded there; of a worker that left, nothing."""
        worker = self._workers.get(worker_id)
        if worker is not None and real_s > 0:
            worker.tpot_errors.append(abs(predicted_s - real_s) / real_s)

    def errors(self, worker_id: str) -> PredictionErrors:
        """How far off the newest predictions were that a worker's steps and handoffs could prove wrong."""
        worker = self._workers[worker_id]
        return PredictionErrors(
            _median(worker.prefill_errors),
            _median(worker.decode_errors),
            _median(worker.transfer_errors),
            _median(worker.ttft_errors),
            _median(worker.tpot_errors),
        )


class WorkerCosts:
    """What one worker takes. Its coefficients lie beside the features that they multiply, ready for a prediction.

    What is named ``seconds`` changes nothing. ``neighbours``, where it may be None: as many as mostly.
    """

    __slots__ = (
        "_chunk",
        "_decode",
        "_decode_linear",
        "_decode_usual",
        "_kv_token_s",
        "_pair_s",
        "_prefill",
        "_prefill_linear",
        "_prefill_usual",
        "_start_residuals",
        "_undrifted_s",
        "address",
        "context_token_s",
        "decode_errors",
        "drift",
        "kv_token_bytes",
        "least_prefill_s",
        "link_gb_s",
        "links",
        "neighbours",
        "prefill_errors",
        "start_s",
        "tpot_errors",
        "transfer_errors",
        "ttft_errors",
        "worker_id",
    )

    def __init__(self, info: WorkerInfo) -> None:
        device, shape = info.device, info.shape
        self.worker_id = info.worker_id
        self.address = info.address
        self.context_token_s = 0.0  # what a token of their contexts adds to a decode step
        self.least_prefill_s = 0.0  # of the shortest prompt
        self.kv_token_bytes = shape.kv_token_bytes
        self.link_gb_s = device.link_gb_s or UNKNOWN_LINK_GB_S
        self.links: dict[str, OnlineFit] = {}  # by decode worker
        self.prefill_errors: deque[float] = deque(maxlen=ERROR_WINDOW)
        self.decode_errors: deque[float] = deque(maxlen=ERROR_WINDOW)
        self.transfer_errors: deque[float] = deque(maxlen=ERROR_WINDOW)
        self.ttft_errors: deque[float] = deque(maxlen=ERROR_WINDOW)
        self.tpot_errors: deque[float] = deque(maxlen=ERROR_WINDOW)
        self.neighbours = 0.0  # mean of what was told with steps
        self.drift = (0, 0)  # of a prompt and of a decode step: how far what was learned is from the profile, in steps
        self.start_s = 0.0
        self._start_residuals: deque[float] = deque(maxlen=START_WINDOW)
        self._chunk = info.max_num_batched_tokens
        self._prefill_linear = prefill_times(device, shape)
        self._decode_linear = decode_times(device, shape)
        self._pair_s = pair_seconds(device, shape)
        self._kv_token_s = shape.kv_token_bytes / ((device.attention_gb_s or device.read_gb_s) * 1e9)
        self._prefill = OnlineFit((_STEP, _PART, _PART, _NEIGHBOUR))  # steps, linear layers, attention
        self._decode = OnlineFit((_STEP, _SEQUENCE, _PART, _PART, _NEIGHBOUR))  # and sequences
        self._settle()
        self._undrifted_s = self._typical_seconds()

    def prefill_seconds(self, num_tokens: int, num_cached_tokens: int, neighbours: float | None = None) -> float:
        num_computed = num_tokens - num_cached_tokens
        if num_computed < 1:
            num_computed = 1  # the last token is computed always, for its logits
        chunk, linear = self._chunk, self._prefill_linear
        if num_computed <= chunk:
            num_steps, linear_s = 1, linear.seconds(num_computed)
        else:
            num_steps = -(-num_computed // chunk)
            linear_s = linear.seconds(num_computed - (num_steps - 1) * chunk) + (num_steps - 1) * linear.seconds(chunk)
        attention_s = self._pair_s * num_computed * (num_tokens - (num_computed - 1) / 2)
        usual = self._prefill_usual if neighbours is None else self._prefill_beside(neighbours)
        step, per_linear, per_attention = usual
        return step * num_steps + per_linear * linear_s + per_attention * attention_s

    def decode_step_seconds(self, batch_size: float, context_tokens: float, neighbours: float | None = None) -> float:
        usual = self._decode_usual if neighbours is None else self._decode_beside(neighbours)
        step, sequence, per_linear, per_attention = usual
        linear_s, attention_s = self._decode_linear.seconds(batch_size), self._kv_token_s * context_tokens
        return step + sequence * batch_size + per_linear * linear_s + per_attention * attention_s

    def two_steps_seconds(self, batch_size: int, context_tokens: int) -> tuple[float, float]:
        """A decode step, and one with a sequence more whose context is still to be counted: in one call."""
        step, sequence, per_linear, per_attention = self._decode_usual
        linear_s, joined_linear_s = self._decode_linear.two_seconds(batch_size)
        attention_s = per_attention * (self._kv_token_s * context_tokens)
        return (
            step + sequence * batch_size + per_linear * linear_s + attention_s,
            step + sequence * (batch_size + 1) + per_linear * joined_linear_s + attention_s,
        )

    def transfer_seconds(self, receiver: WorkerCosts, num_tokens: int) -> float:
        """From the end of a prompt's computation here until its KV is attached there.

        Layers travel while others compute: this is what is left at the end, which is learned for each pair.
        """
        link = self.links.get(receiver.worker_id)
        handoff_s, byte_s = link.values if link is not None else (_HANDOFF.prior, _LINK.prior)
        return handoff_s + byte_s * num_tokens * self.kv_token_bytes * _byte_seconds(self, receiver)

    def _settle(self) -> None:
        """After anything was learned: what is the same for every prediction is computed once."""
        self._prefill_usual = self._prefill_beside(self.neighbours)
        self._decode_usual = self._decode_beside(self.neighbours)
        self.context_token_s = self._decode_usual[3] * self._kv_token_s
        self.least_prefill_s = self.prefill_seconds(1, 0)

    def _prefill_beside(self, neighbours: float) -> tuple[float, float, float]:
        """Seconds of a step, and how often its linear layers and its attention count."""
        step, per_linear, per_attention, per_neighbour = self._prefill.values
        beside = per_neighbour * neighbours
        return step, per_linear + beside, per_attention + beside

    def _decode_beside(self, neighbours: float) -> tuple[float, float, float, float]:
        """The same, and seconds of a sequence."""
        step, sequence, per_linear, per_attention, per_neighbour = self._decode.values
        beside = per_neighbour * neighbours
        return step, sequence, per_linear + beside, per_attention + beside

    def observe(self, steps: StepTimes, neighbours: float | None) -> None:
        if steps.num_steps < 1:
            return
        if neighbours is None:
            neighbours = self.neighbours
        self.neighbours += NEIGHBOURS_MEMORY * (neighbours - self.neighbours)
        if steps.prompt_tokens:
            self._observe_prefill(steps, neighbours)
        else:
            self._observe_decode(steps, neighbours)
        self._settle()
        prefill_s, decode_s = self._typical_seconds()
        told_prefill_s, told_decode_s = self._undrifted_s
        self.drift = (
            _drifted(self.drift[0], prefill_s / told_prefill_s),
            _drifted(self.drift[1], decode_s / told_decode_s),
        )

    def _typical_seconds(self) -> tuple[float, float]:
        """Of a prompt and of a decode step such as most are."""
        prefill_s = self.prefill_seconds(_TYPICAL_TOKENS, 0)
        return prefill_s, self.decode_step_seconds(_TYPICAL_BATCH, _TYPICAL_BATCH * _TYPICAL_TOKENS)

    def observe_first_token(self, predicted_s: float, real_s: float) -> None:
        """The median, for what is far off is a queue that went otherwise and no call."""
        self.ttft_errors.append(abs(predicted_s - real_s) / real_s)
        self._start_residuals.append(real_s - (predicted_s - self.start_s))
        self.start_s = max(0.0, median(self._start_residuals))

    def _observe_decode(self, steps: StepTimes, neighbours: float) -> None:
        num_steps, seconds = steps.num_steps, max(steps.seconds, _SHORTEST_S)
        linear_s = num_steps * self._decode_linear.seconds(steps.decode_tokens / num_steps)
        attention_s = self._kv_token_s * steps.context_tokens
        features = (num_steps, steps.decode_tokens, linear_s, attention_s, neighbours * (linear_s + attention_s))
        self.decode_errors.append(abs(self._decode.predict(features) - seconds) / seconds)
        self._decode.add(features, seconds)

    def _observe_prefill(self, steps: StepTimes, neighbours: float) -> None:
        """In a step of both, what decoding sequences add is taken as known: other steps show it better."""
        num_steps, seconds = steps.num_steps, max(steps.seconds, _SHORTEST_S)
        rows = (steps.prompt_tokens + steps.decode_tokens) / num_steps
        linear_s = num_steps * self._prefill_linear.seconds(rows)
        attention_s = self._pair_s * steps.prompt_pairs
        features = (num_steps, linear_s, attention_s, neighbours * (linear_s + attention_s))
        _, sequence, _, per_attention, per_neighbour = self._decode.values
        per_attention += neighbours * per_neighbour
        known_s = sequence * steps.decode_tokens + per_attention * self._kv_token_s * steps.context_tokens
        self.prefill_errors.append(abs(self._prefill.predict(features) + known_s - seconds) / seconds)
        self._prefill.add(features, max(seconds - known_s, seconds / 2))


@dataclass(frozen=True, slots=True)
class LinearTimes:
    """Seconds of the linear layers of one step by its rows: straight lines between points, and on beyond the last."""

    rows: tuple[float, ...]  # growing, from 0
    at_rows: tuple[float, ...]
    slopes: tuple[float, ...]  # from each of them on

    def seconds(self, rows: float) -> float:
        index = bisect_right(self.rows, rows) - 1
        return self.at_rows[index] + self.slopes[index] * (rows - self.rows[index])

    def two_seconds(self, rows: int) -> tuple[float, float]:
        """Of so many rows, and of one more: mostly on the same line."""
        index = bisect_right(self.rows, rows) - 1
        at, slope, first = self.at_rows[index], self.slopes[index], self.rows[index]
        joined = rows + 1
        if index + 1 < len(self.rows) and self.rows[index + 1] <= joined:
            return at + slope * (rows - first), self.seconds(joined)
        return at + slope * (rows - first), at + slope * (joined - first)


def prefill_times(device: DeviceProfile, shape: ModelShape) -> LinearTimes:
    """Of a prompt's tokens; the head is left out, for only the last of them needs it."""
    return linear_times(device, shape.weight_bytes, shape.linear_flops, shape.num_layers)


def decode_times(device: DeviceProfile, shape: ModelShape) -> LinearTimes:
    """Of decoding sequences, a token each."""
    weight_bytes, flops = shape.weight_bytes + shape.head_bytes, shape.linear_flops + shape.head_flops
    return linear_times(device, weight_bytes, flops, shape.num_layers)


def pair_seconds(device: DeviceProfile, shape: ModelShape) -> float:
    """Of a prompt's attention: of one token with one token of its context."""
    return shape.attention_flops / ((device.prompt_attention_gflop_s or device.gemm_gflop_s) * 1e9)


@lru_cache(maxsize=256)  # most workers are like others, and what they share stays in the processor's cache
def linear_times(device: DeviceProfile, weight_bytes: float, flops: float, num_layers: int = 0) -> LinearTimes:
    """The longer of reading all weights and computing with every row, at the rate that the device has for so many;
    and what each layer adds.

    Args:
        flops: of one row.
    """
    floor_s = weight_bytes / (device.read_gb_s * 1e9)
    rates = device.gemm_rates or (GemmRate(1, device.gemm_gflop_s),)
    computed = [(float(rate.rows), rate.rows * flops / (rate.gflop_s * 1e9)) for rate in rates]
    points = _rising([(0.0, floor_s), *_above(floor_s, computed)])
    layers_s = num_layers * device.layer_s
    points = [(rows, seconds + layers_s) for rows, seconds in points]
    return _join(points, flops / (device.gemm_gflop_s * 1e9))


def _above(floor_s: float, computed: list[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    """The points of the longer of the two, with the one where computing overtakes reading."""
    last_rows, last_s = 0.0, 0.0
    for rows, seconds in computed:
        if last_s < floor_s < seconds:
            yield last_rows + (rows - last_rows) * (floor_s - last_s) / (seconds - last_s), floor_s
        yield rows, max(floor_s, seconds)
        last_rows, last_s = rows, seconds
    if last_s < floor_s:
        yield last_rows * floor_s / last_s, floor_s


def _rising(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """More rows never take less time, whatever a probe says."""
    rising = [points[0]]
    for rows, seconds in points[1:]:
        if rows > rising[-1][0]:
            rising.append((rows, max(seconds, rising[-1][1])))
    return rising


def _join(points: list[tuple[float, float]], last_slope: float) -> LinearTimes:
    slopes = [(right[1] - left[1]) / (right[0] - left[0]) for left, right in pairwise(points)]
    rows, seconds = zip(*points, strict=True)
    return LinearTimes(rows, seconds, (*slopes, last_slope))


def _byte_seconds(sender: WorkerCosts, receiver: WorkerCosts) -> float:
    """Of one byte of KV, by the slower of both links."""
    return 1 / (min(sender.link_gb_s, receiver.link_gb_s) * 1e9)


def _drifted(drift: int, times_as_long: float) -> int:
    """The same as before while that is about right."""
    steps = log(times_as_long) / DRIFT_STEP
    return drift if abs(steps - drift) <= DRIFT_SLACK else round(steps)


def _median(errors: deque[float]) -> float | None:
    return median(errors) if errors else None
