"""Which workers may be in one cluster."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.spec import KVCacheSpec
from scheduler.types import WorkerInfo, WorkerRole


@dataclass(frozen=True, slots=True)
class _Kind:
    """What workers are compared by."""

    model: str
    vocab_size: int
    version: str
    checkpoint: str
    spec: KVCacheSpec
    exchanges_kv: bool


class PairingRules:
    """Compares a newcomer with each kind of worker there is, and so not with each worker."""

    def __init__(self) -> None:
        self._workers: dict[_Kind, dict[str, None]] = {}

    def problem(self, info: WorkerInfo) -> str | None:
        """Why a worker may not join those it would exchange KV with; None when it may. Names the field."""
        for kind, worker_ids in self._workers.items():
            name = next((worker_id for worker_id in worker_ids if worker_id != info.worker_id), None)
            if name is None:
                continue
            if kind.model != info.model:
                return f"{info.worker_id} serves model {info.model!r} and {name} serves {kind.model!r}"
            if kind.vocab_size != info.vocab_size:
                return f"vocab_size of {info.worker_id} is {info.vocab_size} and that of {name} {kind.vocab_size}"
            if kind.version != info.version:
                return f"version of {info.worker_id} is {info.version or 'unknown'} and that of {name} {kind.version}"
            obstacle = info.spec.obstacle(kind.spec)
            if _kind(info).exchanges_kv and kind.exchanges_kv and obstacle is not None:
                return f"KV of {info.worker_id} and {name} cannot be exchanged: {obstacle}"
            if kind.checkpoint != info.checkpoint:
                return (
                    f"the checkpoint of {info.worker_id} is {info.checkpoint or 'unknown'} and that of {name}"
                    f" {kind.checkpoint}: configuration, vocabulary or weights differ"
                )
        return None

    def add(self, info: WorkerInfo) -> None:
        self._workers.setdefault(_kind(info), {})[info.worker_id] = None

    def remove(self, info: WorkerInfo) -> None:
        kind = _kind(info)
        del self._workers[kind][info.worker_id]
        if not self._workers[kind]:
            del self._workers[kind]


def _kind(info: WorkerInfo) -> _Kind:
    exchanges_kv = info.role is not WorkerRole.COLOCATED
    return _Kind(info.model, info.vocab_size, info.version, info.checkpoint, info.spec, exchanges_kv)
