"""TTFT through two workers beside TTFT in one, at the edge that the gateway calls. Real processes, real model."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import grpc
from tqdm import tqdm

from benchmarks.handoff_links import Peer, running_peer
from workers import worker_pb2 as pb
from workers import worker_pb2_grpc as pb_grpc

MODULE = "benchmarks.handoff_worker"
MAX_TOKENS = 2  # the second shows that the sequence has joined the batch
RESERVE_TOKENS = 16


class TwoAndOne:
    """A prefill and a decode worker, and one that does both; one thread each, as many cores as the machine has."""

    def __init__(self, folder: Path, vocab_size: int, longest: int, stack: ExitStack) -> None:
        words = (str(folder), str(longest + RESERVE_TOKENS))
        self._one, self._prefill, self._decode = (
            stack.enter_context(running_peer(role, *words, module=MODULE))
            for role in ("colocated", "prefill", "decode")
        )
        self._vocab_size = vocab_size
        self._num_requests = 0

    def ratio(self, num_tokens: int, runs: int) -> float:
        """The median TTFT through two over the median in one; they take turns."""
        two: list[float] = []
        one: list[float] = []
        for _ in tqdm(range(runs), desc=f"TTFT, {num_tokens} tokens", leave=False, disable=None):
            prompt = self._prompt(num_tokens)
            one.append(self._ttft_s(self._one, prompt, ""))
            two.append(self._ttft_s(self._decode, prompt, self._prefill.address))
        return median(two) / median(one)

    def warm_up(self) -> None:
        for peer, prefill_address in ((self._one, ""), (self._decode, self._prefill.address)):
            self._ttft_s(peer, self._prompt(64), prefill_address)

    def _prompt(self, num_tokens: int) -> Sequence[int]:
        rng = random.Random(self._num_requests)
        return [rng.randrange(1, self._vocab_size) for _ in range(num_tokens)]

    def _ttft_s(self, peer: Peer, prompt: Sequence[int], prefill_address: str) -> float:
        self._num_requests += 1
        request = pb.GenerateRequest(
            request_id=f"request-{self._num_requests}",
            prompt_token_ids=prompt,
            sampling=pb.SamplingParams(max_tokens=MAX_TOKENS, top_p=1.0),
            prefill_address=prefill_address,
        )
        with grpc.insecure_channel(peer.address) as channel:
            grpc.channel_ready_future(channel).result()
            started_s = time.perf_counter()
            events = pb_grpc.WorkerStub(channel).Generate(request)
            next(events)
            ttft_s = time.perf_counter() - started_s
            for _ in events:
                pass
        return ttft_s
