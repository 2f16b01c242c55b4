"""Where evicted blocks go: the host's memory, then files; and how they come back when that is quicker than computing.

::

    prefix cache ──evicted──► host memory ──evicted──► files           each least recently used first out, by bytes
         ▲                         │                     │
         └──── verified, in blocks of their own ─────────┘             before the sequence that begins so is queued

Kept by workers that compute prompts. Copying out of the cache is done at once, for somebody is about to write to the
block; all else, checksums and files, in a thread. What is under way is bounded: beyond that, blocks are not saved.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import takewhile
from pathlib import Path

from kvcache.errors import TransferError
from kvcache.manager import KVCacheManager
from kvcache.prefix import HashChain
from kvcache.storage import BlockStorage
from kvcache.tiers.file_tier import FileTier
from kvcache.tiers.host_tier import HostTier, Record
from kvcache.tiers.record import decode_block, encode_block
from scheduler.request import Request
from scheduler.types import Phase, TierLoad
from workers.rates import Rate
from workers.worker_options import WorkerOptions

MAX_PENDING_BYTES = 64 << 20  # copied out of the cache and not yet in a tier
FLUSH_TIMEOUT_S = 5.0  # for what is in memory when the worker ends; half of what --shutdown-timeout gives by default
logger = logging.getLogger(__name__)

Layers = list[bytes | memoryview]


@dataclass(frozen=True, slots=True)
class _Found:
    """The beginning of a run of blocks, as far as it could be read and verified."""

    blocks: list[Layers]
    num_from_files: int
    file_bytes: int
    file_seconds: float


class KVTiers:
    """Owned by one event loop. It is the pool's ``on_evict``."""

    def __init__(
        self,
        manager: KVCacheManager,
        storage: BlockStorage,
        prefill_rate: Rate,
        host: HostTier,
        files: FileTier | None,
    ) -> None:
        """``prefill_rate``: prompt tokens per second of this worker, as measured."""
        self._manager = manager
        self._storage = storage
        self._prefill_rate = prefill_rate
        self._host = host
        self._files = files
        self._file_rate = Rate()  # bytes per second, read and verified
        self._pending_bytes = 0
        self._thread = ThreadPoolExecutor(1, "kv-tiers")
        self._saving: set[asyncio.Task[None]] = set()
        self.host_hits = self.file_hits = self.num_unsaved = self.num_damaged = 0
        manager.pool.on_evict = self._save

    def loads(self) -> tuple[TierLoad, ...]:
        host = TierLoad("host", self._host.num_bytes, self.host_hits, self._host.evictions, self.num_unsaved)
        if self._files is None:
            return (host,)
        files = TierLoad("file", self._files.num_bytes, self.file_hits, self._files.evictions, 0, self.num_damaged)
        return host, files

    async def bring_back(self, request: Request) -> None:
        """Before a sequence is queued here: what tiers have of its prompt is cached again, if that is quicker.

        It gets blocks of its own, as a sequence that ends at once: so it is cached and free, and may be evicted again.
        """
        if request.sampling.prompt_logprobs is not None:
            return  # needs the logits of all tokens
        block_size = self._manager.spec.block_size
        num_blocks = (request.num_prompt_tokens - 1) // block_size  # the last token is always computed
        names = HashChain(request.cache_salt, block_size).hashes(request.prompt_token_ids[: num_blocks * block_size])
        held = len(self._manager.find_prefix(names))
        wanted = list(takewhile(self._has, names[held:]))
        if not wanted or not self._is_quicker(wanted):
            return
        records = [(name, self._host.get(name)) for name in wanted]
        found = await asyncio.get_running_loop().run_in_executor(self._thread, self._read, records)
        if found.file_bytes:
            self._file_rate.add(found.file_bytes, found.file_seconds)
        if len(found.blocks) < len(wanted):
            self._host.remove(wanted[len(found.blocks)])
        if self._put(names, held, found.blocks):
            self.file_hits += found.num_from_files
            self.host_hits += len(found.blocks) - found.num_from_files

    async def close(self) -> None:
        """Waits for what is being saved. What is in memory goes to files, for ``FLUSH_TIMEOUT_S`` at most: so a worker
        that is started again finds it."""
        self._manager.pool.on_evict = None
        await asyncio.gather(*self._saving)
        if self._files is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._flush, self._files)
        self._thread.shutdown()

    def _has(self, name: bytes) -> bool:
        return name in self._host or (self._files is not None and name in self._files)

    def _is_quicker(self, names: Sequence[bytes]) -> bool:
        """Than computing these blocks. What was never measured is tried; memory is taken for free."""
        prefill_rate, file_rate = self._prefill_rate.per_second, self._file_rate.per_second
        files = self._files
        if prefill_rate is None or file_rate is None or files is None:
            return True
        file_bytes = sum(files.size_of(name) for name in names if name not in self._host)
        if file_bytes / file_rate <= len(names) * self._manager.spec.block_size / prefill_rate:
            return True
        self._file_rate.doubt()  # or one bad day would be remembered for ever
        return False

    def _read(self, records: Sequence[tuple[bytes, bytes | None]]) -> _Found:
        """In the thread. Ends before the first block that cannot be had; a bad record is removed."""
        blocks: list[Layers] = []
        num_from_files = file_bytes = 0
        started_s = time.monotonic()
        for name, data in records:
            is_file = data is None
            if data is None and self._files is not None:
                data = self._files.read(name)
            if data is None:
                break
            try:
                blocks.append(decode_block(name, self._manager.spec, data))
            except TransferError as error:
                logger.warning("A saved KV block is damaged and is removed: %s", error)
                self.num_damaged += 1
                if self._files is not None:
                    self._files.remove(name)
                break
            num_from_files += is_file
            file_bytes += len(data) if is_file else 0
        return _Found(blocks, num_from_files, file_bytes, time.monotonic() - started_s)

    def _put(self, names: Sequence[bytes], first_block: int, blocks: Sequence[Layers]) -> bool:
        """Writes verified blocks of a prompt, the first of which is number ``first_block``, into the cache."""
        manager = self._manager
        end_block = first_block + len(blocks)
        prefix = manager.find_prefix(names[:end_block])
        if not first_block <= len(prefix) < end_block:
            return False  # evicted or computed meanwhile
        owner = f"tier-{uuid.uuid4().hex}"
        if not manager.begin(owner, end_block * manager.spec.block_size, prefix):
            return False
        block_ids = manager.block_table(owner)[len(prefix) :]
        for layer in range(manager.spec.num_layers):
            payload = b"".join(block[layer] for block in blocks[len(prefix) - first_block :])
            self._storage.write_blocks(layer, block_ids, payload)
        manager.cache(owner, names[len(prefix) : end_block], len(prefix))
        manager.free(owner)
        return True

    def _save(self, names: Sequence[bytes], block_ids: Sequence[int]) -> None:
        """These blocks are about to be written to by somebody else."""
        room = (MAX_PENDING_BYTES - self._pending_bytes) // self._manager.spec.block_bytes
        wanted = [pair for pair in zip(names, block_ids, strict=True) if not self._has(pair[0])]
        self.num_unsaved += max(0, len(wanted) - room)
        wanted = wanted[:room]
        if not wanted:
            return
        ids = [block_id for _, block_id in wanted]
        layers = [self._storage.read_blocks(layer, ids) for layer in range(self._manager.spec.num_layers)]
        num_bytes = len(wanted) * self._manager.spec.block_bytes
        self._pending_bytes += num_bytes
        task = asyncio.get_running_loop().create_task(self._keep([name for name, _ in wanted], layers, num_bytes))
        self._saving.add(task)
        task.add_done_callback(self._saving.discard)

    async def _keep(self, names: list[bytes], layers: list[memoryview], num_bytes: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            records = await loop.run_in_executor(self._thread, _encode, names, layers)
            evicted = [old for record in records for old in self._host.put(record)]
            if self._files is not None and evicted:
                await loop.run_in_executor(self._thread, self._write, self._files, evicted)
        finally:
            self._pending_bytes -= num_bytes

    def _flush(self, files: FileTier) -> None:
        """In the thread. The host tier does not change any more."""
        deadline_s = time.monotonic() + FLUSH_TIMEOUT_S
        try:
            num_kept = files.write_newest(self._host.newest_first(), lambda: time.monotonic() < deadline_s)
        except OSError as error:
            logger.warning("KV blocks in memory could not be written to files: %s", error)
        else:
            logger.info("%d KV blocks that were in memory are in files now.", num_kept)

    def _write(self, files: FileTier, records: Sequence[Record]) -> None:
        try:
            for record in records:
                files.write(record)
        except OSError as error:
            self.num_unsaved += len(records)
            logger.warning("KV blocks could not be written to files: %s", error)


def _encode(names: Sequence[bytes], layers: Sequence[memoryview]) -> list[Record]:
    size = len(layers[0]) // len(names)
    return [
        Record(name, encode_block(name, [layer[index * size : (index + 1) * size] for layer in layers]))
        for index, name in enumerate(names)
    ]


def make_tiers(
    options: WorkerOptions, manager: KVCacheManager, storage: BlockStorage, prefill_rate: Rate
) -> KVTiers | None:
    """None where none are asked for, and on workers that compute no prompts.

    Raises:
        ResourceError: the folder cannot be used.
    """
    is_on = options.kv_host_cache_bytes or options.kv_file_cache_bytes
    if not is_on or not options.role.takes(Phase.PREFILL):
        return None
    files = None
    if options.kv_file_cache_bytes:
        folder = Path(options.kv_file_cache_dir) / f"{fingerprint(options)}-{options.worker_id}"
        files = FileTier(folder, options.kv_file_cache_bytes)
    return KVTiers(manager, storage, prefill_rate, HostTier(options.kv_host_cache_bytes), files)


def fingerprint(options: WorkerOptions) -> str:
    """Of all that decides what KV of given tokens looks like: another model's files are not even looked at.

    A checkpoint is known by its place and by its files' names, sizes and times: a copy elsewhere is another one.
    """
    path = Path(options.model_path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    status = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    known = (str(path.resolve()), status, astuple(options.spec), options.dtype, options.quantization, options.device)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]
