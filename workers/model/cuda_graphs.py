"""Decode steps as recorded CUDA graphs: one call to the device instead of one per kernel.

A graph has a fixed number of sequences. There is one for each of a few batch sizes, and a step takes the smallest
that holds it; slots that are left over decode a made-up token into a block that nobody owns::

    step of 3 sequences    a  b  c
    graph of 4 slots      [a][b][c][ ]     the last one reads and writes the scratch block

Only what fills the slots and what calls the recording differ from a plain run, so everything else is tested on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from kvcache.storage import PagedStorage
from scheduler.step_plan import ScheduledChunk, StepPlan
from workers.model.attention.flashinfer_backend import FlashInferAttention, FlashInferDecodeSlots
from workers.model.transformers_model import TransformersModel
from workers.step_progress import StepProgress

WARM_UP_RUNS = 2  # kernels are compiled and chosen, and layers met, before anything is recorded

Replay = Callable[[], torch.Tensor]


class GraphRecorder(Protocol):
    """What records device work; CUDA in production."""

    def record(self, run: Callable[[], torch.Tensor]) -> Replay:
        """Calls ``run`` a few times. The result does its work again, on the same memory, into the same output."""
        ...


class CudaGraphRecorder:
    """Recordings share one memory pool: no two of them run at once, and outputs are copied before the next."""

    def __init__(self) -> None:
        self._pool: Any = None  # torch's handle has no public type

    def record(self, run: Callable[[], torch.Tensor]) -> Replay:
        stream = torch.cuda.Stream()  # torch asks for warm-up on a stream that is not the default one
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        self._pool = self._pool or graph.pool()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Powers of two up to ``max_num_seqs``, and that itself: a step fills more than half of its graph."""
    powers = (1 << exponent for exponent in range(max_num_seqs.bit_length()))
    return (*(size for size in powers if size < max_num_seqs), max_num_seqs)


def padded(chunks: Sequence[ScheduledChunk], size: int, scratch_block: int) -> list[ScheduledChunk]:
    """Fills up with sequences of one token in the scratch block."""
    idle = ScheduledChunk("", (0,), 0, 0, (scratch_block,), None)
    return [*chunks, *[idle] * (size - len(chunks))]


class DecodeGraph:
    """One recorded run of the model over ``size`` decoding sequences."""

    def __init__(
        self,
        model: TransformersModel,
        attention: FlashInferDecodeSlots,
        storage: PagedStorage,
        recorder: GraphRecorder,
        device: str,
    ) -> None:
        self._attention = attention
        self._storage = storage
        self._inputs = torch.zeros(2, 1, attention.num_slots, dtype=torch.int64, device=device)  # tokens, positions
        token_ids, positions = self._inputs
        self._fill(())
        self._replay = recorder.record(lambda: model.forward(token_ids, positions, attention, storage))

    def run(self, chunks: Sequence[ScheduledChunk]) -> torch.Tensor:
        """Logits of each chunk: ``[len(chunks), vocabulary]``, overwritten by the next run of any graph."""
        self._fill(chunks)
        return self._replay()[: len(chunks)]

    def _fill(self, chunks: Sequence[ScheduledChunk]) -> None:
        scratch_block = self._storage.scratch_block
        slots = padded(chunks, self._attention.num_slots, scratch_block)
        rows = [[chunk.token_ids[0] for chunk in slots], [chunk.start for chunk in slots]]
        self._inputs.copy_(torch.tensor(rows).unsqueeze(1))
        self._attention.fill(slots, scratch_block, self._storage.spec)


class GraphedModel:
    """A ``StepModel`` that replays decode-only steps and runs all others as they come. Bound to one storage."""

    def __init__(
        self,
        model: TransformersModel,
        attention: FlashInferAttention,
        storage: PagedStorage,
        max_num_seqs: int,
        max_model_len: int,
        recorder: GraphRecorder,
    ) -> None:
        """Records all graphs, the largest first, so that the others fit into its memory."""
        self._model = model
        self._storage = storage
        self._max_blocks = storage.spec.num_blocks_for(max_model_len)
        self._graphs: dict[int, DecodeGraph] = {}
        for size in reversed(graph_sizes(max_num_seqs)):
            slots = FlashInferDecodeSlots(attention, size, self._max_blocks)
            self._graphs[size] = DecodeGraph(model, slots, storage, recorder, attention.device)

    def logits(self, plan: StepPlan, storage: PagedStorage, progress: StepProgress | None = None) -> torch.Tensor:
        """See ``StepModel.logits``. Nobody is told of single layers: on a GPU the step's end tells."""
        assert storage is self._storage, "graphs hold the addresses of the storage they were recorded with"
        graph = self._find_graph(plan)
        if graph is None:
            return self._model.logits(plan, storage)
        # Of single tokens the rows are the chunks.
        return graph.run(plan.chunks)[plan.logit_rows]  # a copy: the graph's own output changes with the next step

    def _find_graph(self, plan: StepPlan) -> DecodeGraph | None:
        size = min((size for size in self._graphs if size >= len(plan.chunks)), default=None)
        fits = all(
            len(chunk.token_ids) == 1 and self._storage.spec.num_blocks_for(chunk.end) <= self._max_blocks
            for chunk in plan.chunks
        )
        return self._graphs[size] if size is not None and fits else None
