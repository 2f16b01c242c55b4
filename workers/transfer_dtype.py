"""In which dtype a handoff's KV travels: as it is kept, or rounded where the link is what the first token waits for."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvcache.storage import BlockStorage
from kvcache.transfer.compress import RoundedReads
from workers.rates import Rate
from workers.worker_options import TransferDtype

AUTO_DTYPE = "int8"
MIN_MEASURED_BYTES = 1 << 20  # what is left to send when a prompt is computed says little of the link below that


class WireFormat:
    """One worker's decisions. ``auto`` rounds when three measured rates say that the prompt's KV is there sooner so."""

    def __init__(self, storage: BlockStorage, dtype: TransferDtype, prefill_rate: Rate) -> None:
        """``prefill_rate``: prompt tokens per second of this worker."""
        self.num_compressed = 0  # handoffs
        self._storage = storage
        self._dtype: TransferDtype = "native" if storage.spec.is_scaled else dtype
        self._prefill_rate = prefill_rate
        self._link_rates: dict[str, Rate] = {}  # bytes per second, by address
        self._rounding_rate = Rate()  # bytes, as they are kept, per second
        self._rounded = {
            dtype: _TimedReads(storage, dtype, self._rounding_rate)
            for dtype in {"auto": (AUTO_DTYPE,), "native": ()}.get(self._dtype, (self._dtype,))
        }

    def storage_for(self, address: str, num_blocks: int, num_tokens: int) -> BlockStorage:
        """What a handoff of so many blocks is read from, while so many tokens are still to be computed."""
        dtype = AUTO_DTYPE if self._dtype == "auto" else self._dtype
        if dtype == "native" or (self._dtype == "auto" and not self._is_link_bound(address, num_blocks, num_tokens)):
            return self._storage
        self.num_compressed += 1
        return self._rounded[dtype]

    def note_link(self, address: str, num_bytes: int, seconds: float) -> None:
        """So much was still to be sent when a prompt was computed, and took so long."""
        if num_bytes >= MIN_MEASURED_BYTES:
            self._link_rates.setdefault(address, Rate()).add(num_bytes, seconds)

    def _is_link_bound(self, address: str, num_blocks: int, num_tokens: int) -> bool:
        link_rate = self._link_rates.get(address, Rate()).per_second
        prefill_rate = self._prefill_rate.per_second
        if link_rate is None or prefill_rate is None:
            return False
        rounded = self._rounded[AUTO_DTYPE]
        num_bytes = num_blocks * self._storage.spec.block_bytes
        native_s = num_bytes / link_rate
        rounding_s = num_bytes / rate if (rate := self._rounding_rate.per_second) is not None else 0.0
        rounded_s = num_blocks * rounded.spec.block_bytes / link_rate + rounding_s
        hidden_s = num_tokens / prefill_rate  # sent while later tokens are computed
        return native_s > hidden_s and rounded_s < native_s


class _TimedReads(RoundedReads):
    def __init__(self, storage: BlockStorage, dtype: str, rate: Rate) -> None:
        super().__init__(storage, dtype)
        self._rate = rate
        self._kept_bytes = storage.spec.layer_block_bytes

    def read_blocks(self, layer: int, block_ids: Sequence[int], out: memoryview | None = None) -> memoryview:
        started_s = time.perf_counter()
        payload = super().read_blocks(layer, block_ids, out)
        self._rate.add(len(block_ids) * self._kept_bytes, time.perf_counter() - started_s)
        return payload
