"""Decode through graphs, all but the recording itself: a recording is played by calling the same function again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvcache.storage import PagedStorage
from tests.fake_flashinfer import FakeFlashInfer
from tests.tiny_model import make_plan, tiny_llama, tiny_spec
from workers.model.attention.flashinfer_backend import FlashInferAttention
from workers.model.cuda_graphs import GraphedModel, Replay, graph_sizes, padded
from workers.model.runner import ModelRunner
from workers.model.transformers_model import TransformersModel

SPEC = tiny_spec()
NUM_BLOCKS = 24
MAX_NUM_SEQS = 6
MAX_MODEL_LEN = 24
BLOCKS = [[4, 11, 2, 7], [9, 3, 8], [0, 1, 5], [6, 10, 12], [13, 14, 15]]


class FakeRecorder:
    """Like CUDA, it lets nothing be planned while it records or replays, and keeps one output per graph."""

    def __init__(self, library: FakeFlashInfer) -> None:
        self._library = library
        self.replayed: list[int] = []  # the sizes of the graphs

    def record(self, run: Callable[[], torch.Tensor]) -> Replay:
        run()
        with self._library.recording():
            output = run().clone()

        def replay() -> torch.Tensor:
            self.replayed.append(len(output))
            with self._library.recording():
                return output.copy_(run())

        return replay


class Pair:
    """The same model with and without graphs, each with a storage."""

    def __init__(self, folder: Path) -> None:
        model = tiny_llama(folder, SPEC)
        self.library = FakeFlashInfer()
        self.recorder = FakeRecorder(self.library)
        attention = FlashInferAttention(self.library, "cpu")
        fast = TransformersModel(model, attention=attention)
        self.storage = PagedStorage(SPEC, NUM_BLOCKS, with_scratch_block=True)
        self.graphed = GraphedModel(fast, attention, self.storage, MAX_NUM_SEQS, MAX_MODEL_LEN, self.recorder)
        self.plain = TransformersModel(model)
        self.plain_storage = PagedStorage(SPEC, NUM_BLOCKS)

    def check(self, *chunks: tuple[int, int, int]) -> torch.Tensor:
        plan = make_plan(*chunks, blocks=BLOCKS)
        expected = self.plain.logits(plan, self.plain_storage)
        found = self.graphed.logits(plan, self.storage)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        return found

    def check_storages(self) -> None:
        for ours, theirs in zip(self.storage.layers, self.plain_storage.layers, strict=True):
            torch.testing.assert_close(ours[:NUM_BLOCKS], theirs, rtol=1e-4, atol=1e-5)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def test_decode_steps_give_what_they_give_without_graphs(pair: Pair) -> None:
    """Sequences join and leave, cross into new blocks, and come in another order than they began in."""
    pair.check((0, 0, 10), (1, 0, 3), (2, 0, 1))
    pair.check((0, 10, 11), (1, 3, 4), (2, 1, 2))
    pair.check((2, 2, 3), (1, 4, 5))
    pair.check((3, 0, 6), (0, 11, 12))
    pair.check((1, 5, 6), (3, 6, 7), (0, 12, 13), (2, 3, 4), (4, 0, 1))
    pair.check((0, 13, 14))
    assert pair.recorder.replayed == [4, 2, 6, 1]
    pair.check_storages()


def test_only_steps_of_single_tokens_that_fit_a_graph_are_replayed(pair: Pair) -> None:
    pair.check((0, 0, 10))
    pair.check((0, 10, 11), (1, 0, 2))
    assert pair.recorder.replayed == []


def test_logits_outlive_the_next_step(pair: Pair) -> None:
    first = pair.check((0, 0, 1))
    before = first.clone()
    pair.check((0, 1, 2))
    assert torch.equal(first, before) and pair.recorder.replayed == [1, 1]


def test_a_replay_reads_and_writes_where_the_recording_did(pair: Pair) -> None:
    pair.check((0, 0, 1), (1, 0, 1), (2, 0, 1))
    pair.library.arrays.clear()
    pair.check((0, 1, 2), (1, 1, 2), (2, 1, 2), (3, 0, 1))
    first = list(pair.library.arrays)
    pair.library.arrays.clear()
    pair.check((3, 1, 2), (2, 2, 3), (0, 2, 3))
    assert len(first) == SPEC.num_layers and pair.library.arrays == first


def test_padding_touches_the_scratch_block_only(pair: Pair) -> None:
    for layer in pair.storage.layers:
        layer[:] = 7.0
    plan = make_plan((0, 0, 1), (1, 0, 1), (2, 0, 1), blocks=BLOCKS)
    pair.graphed.logits(plan, pair.storage)
    for layer in pair.storage.layers:
        changed = [block for block in range(len(layer)) if not bool((layer[block] == 7.0).all())]
        assert changed == sorted([BLOCKS[0][0], BLOCKS[1][0], BLOCKS[2][0], pair.storage.scratch_block])


def test_what_a_poisoned_sequence_left_does_not_reach_the_next_owner(pair: Pair) -> None:
    for layer in pair.storage.layers:
        layer[:] = float("nan")
    pair.check((0, 0, 1), (1, 0, 1), (2, 0, 1))
    assert pair.recorder.replayed == [4]


def test_tokens_are_sampled_as_without_graphs(pair: Pair) -> None:
    runners = ModelRunner(pair.graphed, pair.storage), ModelRunner(pair.plain, pair.plain_storage)
    for step in range(4):
        plan = make_plan((0, step, step + 1), (1, step, step + 1), (2, step, step + 1), blocks=BLOCKS)
        assert runners[0].execute(plan) == runners[1].execute(plan)


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8)), (65, (1, 2, 4, 8, 16, 32, 64, 65))],
)
def test_graph_sizes_double_up_to_the_largest_batch(max_num_seqs: int, sizes: tuple[int, ...]) -> None:
    assert graph_sizes(max_num_seqs) == sizes


def test_padding_is_one_token_in_the_scratch_block() -> None:
    chunks = make_plan((0, 3, 4), blocks=BLOCKS).chunks
    real, *idle = padded(chunks, 3, scratch_block=99)
    assert real is chunks[0]
    assert [(chunk.start, chunk.end, chunk.block_table, chunk.sampling) for chunk in idle] == [(0, 1, (99,), None)] * 2


def test_a_storage_without_scratch_block_cannot_be_recorded(tmp_path: Path) -> None:
    attention = FlashInferAttention(FakeFlashInfer(), "cpu")
    model = TransformersModel(tiny_llama(tmp_path, SPEC), attention=attention)
    with pytest.raises(AssertionError, match="made without one"):
        GraphedModel(model, attention, PagedStorage(SPEC, 4), 1, 8, FakeRecorder(attention.library))
