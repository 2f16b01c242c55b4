"""vLLM's rates, measured from inside its own environment: started by ``benchmarks.engine_peers`` with vLLM's Python.

Stands alone: it imports nothing of Twinpool. Prints one JSON line when the model is loaded, then one for every line
that it reads, each a whole round of all cases.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from statistics import median
from typing import Any


def parse_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prefill-tokens", type=int, nargs="+", required=True)
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    parser.add_argument("--prefill-shots", type=int, required=True, help="a prompt's time is the median of so many")
    parser.add_argument("--context", type=int, required=True, help="prompt tokens of sequences that decode")
    parser.add_argument("--decode-steps", type=int, required=True)
    return parser.parse_args(arguments)


def set_environment(threads: int) -> None:
    """Before vLLM is imported: as many cores as meant, one process, no network."""
    os.environ.update(
        OMP_NUM_THREADS=str(threads),
        VLLM_CPU_KVCACHE_SPACE="2",
        VLLM_CPU_OMP_THREADS_BIND=",".join(str(core) for core in range(threads)),
        VLLM_CPU_NUM_OF_RESERVED_CPU="0",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )


class Peer:
    def __init__(self, flags: argparse.Namespace) -> None:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

        self._params: Any = SamplingParams
        self._rng = random.Random(0)
        self._flags = flags
        longest = max(*flags.prefill_tokens, 64, flags.context + flags.decode_steps) + 1
        self._llm = LLM(
            model=flags.model,
            dtype=flags.dtype,
            max_model_len=longest,
            enable_prefix_caching=False,
            max_num_seqs=max(flags.batches),
        )
        self.seconds(1, 60, 4)

    def seconds(self, num_prompts: int, num_tokens: int, num_new_tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [self._rng.randrange(100, 40000) for _ in range(num_tokens)]}
            for _ in range(num_prompts)
        ]
        # Tokens only, as from our step loop.
        params = self._params(max_tokens=num_new_tokens, ignore_eos=True, temperature=0, detokenize=False)
        started_s = time.perf_counter()
        self._llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - started_s

    def prefill_seconds(self, num_prompts: int, num_tokens: int) -> float:
        """Up to the first token of each."""
        return median(self.seconds(num_prompts, num_tokens, 1) for _ in range(self._flags.prefill_shots))

    def decode_tok_s(self, batch: int) -> float:
        context, steps = self._flags.context, self._flags.decode_steps
        first = self.prefill_seconds(batch, context)
        return float(batch * steps / (self.seconds(batch, context, 1 + steps) - first))

    def round(self) -> dict[str, dict[str, float]]:
        """Tokens per second, by prompt length and by batch."""
        lengths, batches = self._flags.prefill_tokens, self._flags.batches
        return {
            "prefill_tok_s": {str(length): length / self.prefill_seconds(1, length) for length in lengths},
            "decode_tok_s": {str(batch): self.decode_tok_s(batch) for batch in batches},
        }


def main() -> None:
    flags = parse_flags()
    set_environment(flags.threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints itself must not mix with the answers
    started_s = time.perf_counter()
    peer = Peer(flags)
    ready = {"ready_s": time.perf_counter() - started_s, "version": metadata.version("vllm-cpu")}
    print(json.dumps(ready), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(peer.round()), file=answers, flush=True)


if __name__ == "__main__":
    main()
