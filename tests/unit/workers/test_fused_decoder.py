"""The native decoder gives what the transformers model gives, in every build that this processor can run."""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.request import SamplingParams
from scheduler.step_plan import UNKNOWN_TOKEN, ScheduledChunk, StepPlan
from tests.unit.workers.native_models import (
    CONFIGS,
    SEQUENCE_LENGTH,
    SHAPE,
    decoding_steps,
    make_model,
    spec_of,
    steps,
)
from workers.model.attention_layers import read_attention_layers
from workers.model.fused_decoder import FusedDecoder, WeightFormat, find_misfit
from workers.model.rows import likeliest
from workers.model.transformers_model import TransformersModel
from workers.native import library
from workers.step_progress import StepProgress


def assert_same_logits(model: Any, spec: KVCacheSpec, num_threads: int) -> None:
    reference, fused = TransformersModel(model), FusedDecoder(model, spec, SEQUENCE_LENGTH, num_threads)
    num_blocks = 3 * -(-SEQUENCE_LENGTH // spec.block_size)
    storages = PagedStorage(spec, num_blocks), PagedStorage(spec, num_blocks)
    for plan in steps(spec.block_size):
        expected = reference.logits(plan, storages[0])
        found = fused.logits(plan, storages[1])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    for ours, theirs in zip(storages[1].layers, storages[0].layers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_kv_equal_the_model_s(tmp_path: Path, build: str, name: str) -> None:
    config = CONFIGS[name]()
    model = make_model(tmp_path, config)
    spec = spec_of(config)
    assert find_misfit(model, spec, read_attention_layers(model, SEQUENCE_LENGTH)) is None
    assert_same_logits(model, spec, num_threads=1)


class Watched(StepProgress):
    """Compares the cache at each layer's turn with what it holds after the step."""

    def __init__(self, storage: PagedStorage) -> None:
        super().__init__(lambda _: None)
        self._storage = storage
        self.seen: list[torch.Tensor] = []

    def layer_done(self, layer: int) -> None:
        super().layer_done(layer)
        self.seen.append(self._storage.layers[layer].clone())


def test_a_transformers_model_tells_each_layer_once_its_kv_is_complete(tmp_path: Path) -> None:
    config = CONFIGS["llama"]()
    model, spec = make_model(tmp_path, config), spec_of(config)
    storage = PagedStorage(spec, 3 * -(-SEQUENCE_LENGTH // spec.block_size))
    progress = Watched(storage)
    for plan in steps(spec.block_size):
        progress.seen.clear()
        TransformersModel(model).logits(plan, storage, progress)
        assert len(progress.seen) == spec.num_layers
        for early, final in zip(progress.seen, storage.layers, strict=True):
            assert torch.equal(early, final)
    progress.close()


def test_the_native_decoder_counts_its_layers_and_wakes_the_reader(tmp_path: Path, build: str) -> None:
    config = CONFIGS["llama"]()
    spec = spec_of(config)
    fused = FusedDecoder(make_model(tmp_path, config), spec, SEQUENCE_LENGTH, 1)
    read_fd, wake_fd = os.pipe()
    counter = ctypes.c_int64(0)
    progress = SimpleNamespace(counter_address=ctypes.addressof(counter), wake_fd=wake_fd)
    fused.logits(steps(spec.block_size)[0], PagedStorage(spec, 40), progress)  # type: ignore[arg-type]
    assert counter.value == spec.num_layers
    assert len(os.read(read_fd, 1000)) == spec.num_layers
    os.close(read_fd)
    os.close(wake_fd)


@pytest.mark.parametrize("block_size", [1, 8, 128])
def test_any_block_size_and_two_threads_give_the_same(tmp_path: Path, build: str, block_size: int) -> None:
    config = CONFIGS["llama"]()
    assert_same_logits(make_model(tmp_path, config), spec_of(config, block_size=block_size), num_threads=2)


def allowed_cores() -> dict[int, set[int]]:
    """Of each thread of this process; some may end meanwhile."""
    cores = {}
    for thread in map(int, os.listdir("/proc/self/task")):
        with suppress(ProcessLookupError):
            cores[thread] = os.sched_getaffinity(thread)
    return cores


def restrict(cores: Mapping[int, set[int]]) -> None:
    for thread, allowed in cores.items():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, allowed)


@pytest.mark.parametrize("num_cores", [1, 2])
def test_threads_that_make_room_for_each_other_may_use_the_same_cores_as_before(tmp_path: Path, num_cores: int) -> None:
    config = CONFIGS["llama"]()
    model, spec = make_model(tmp_path, config), spec_of(config)
    assert_same_logits(model, spec, num_threads=2)  # the threads are there
    before = allowed_cores()
    restricted = {thread: set(sorted(cores)[:num_cores]) for thread, cores in before.items()}
    try:
        restrict(restricted)
        for _ in range(5):
            assert_same_logits(model, spec, num_threads=2)
        after = allowed_cores()
    finally:
        restrict(before)
    both = restricted.keys() & after.keys()
    assert len(both) >= 2
    assert {thread: after[thread] for thread in both} == {thread: restricted[thread] for thread in both}


LONG = 600  # several parts of a decoding sequence's keys, several blocks of a prompt's


def long_steps(block_size: int, with_neighbour: bool = True) -> list[StepPlan]:
    """A long prompt, a chunk that goes on at an odd place, then decoding; beside it another sequence."""
    width = -(-LONG // block_size)
    tables = [tuple(2 * block + which for block in reversed(range(width))) for which in range(2)]
    greedy = SamplingParams(max_tokens=1, temperature=0.0)

    def chunk(which: int, start: int, end: int) -> ScheduledChunk:
        token_ids = tuple((5 * which + 13 * position + position * position) % 131 for position in range(start, end))
        return ScheduledChunk(str(which), token_ids, start, end - start, tables[which], greedy)

    spans = [((0, 0, 301), (1, 0, 7)), ((1, 7, 8), (0, 301, 598)), ((1, 8, 263), (0, 598, 599)), ((0, 599, 600),)]
    return [StepPlan(tuple(chunk(*span) for span in step if with_neighbour or span[0] == 0)) for step in spans]


@pytest.mark.parametrize("block_size", [16, 24])
def test_long_sequences_equal_the_model_s(tmp_path: Path, build: str, block_size: int) -> None:
    config = CONFIGS["qwen3, q and k norms"]()
    model = make_model(tmp_path, config)
    spec = spec_of(config, block_size=block_size)
    reference, fused = TransformersModel(model), FusedDecoder(model, spec, LONG, 1)
    storages = [PagedStorage(spec, 2 * -(-LONG // block_size)) for _ in range(2)]
    for plan in long_steps(block_size):
        expected, found = reference.logits(plan, storages[0]), fused.logits(plan, storages[1])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("weight_format", WeightFormat)
def test_neither_threads_nor_neighbours_change_a_bit_of_a_long_sequence(
    tmp_path: Path, build: str, weight_format: WeightFormat
) -> None:
    config = CONFIGS["llama"]()
    model = make_model(tmp_path, config)
    spec = spec_of(config)

    def logits(num_threads: int, with_neighbour: bool) -> torch.Tensor:
        fused = FusedDecoder(model, spec, LONG, num_threads, weight_format)
        storage = PagedStorage(spec, 2 * -(-LONG // spec.block_size))
        rows = []
        for plan in long_steps(spec.block_size, with_neighbour):
            found = fused.logits(plan, storage)
            rows += [row for row, chunk in zip(found, plan.chunks, strict=True) if chunk.request_id == "0"]
        return torch.stack(rows)

    expected = logits(1, with_neighbour=False)
    assert torch.equal(logits(2, with_neighbour=False), expected)
    assert torch.equal(logits(2, with_neighbour=True), expected)


@pytest.mark.parametrize("weight_format", WeightFormat)
def test_threads_change_no_bit_of_a_large_batch(tmp_path: Path, build: str, weight_format: WeightFormat) -> None:
    """Threads share its rows, where each of them does all rows of a small one."""
    config = CONFIGS["llama"]()
    model = make_model(tmp_path, config)
    spec = spec_of(config)

    def logits(num_threads: int) -> list[torch.Tensor]:
        fused = FusedDecoder(model, spec, SEQUENCE_LENGTH, num_threads, weight_format)
        storage = PagedStorage(spec, 60)
        return [fused.logits(plan, storage) for plan in (*decoding_steps()[:2], *steps(spec.block_size))]

    expected = logits(1)
    for num_threads in (2, 3):
        assert all(torch.equal(*pair) for pair in zip(logits(num_threads), expected, strict=True))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_step_tells_where_its_time_went_when_asked(tmp_path: Path, build: str, num_threads: int) -> None:
    config = CONFIGS["llama"]()
    spec = spec_of(config)
    fused = FusedDecoder(make_model(tmp_path, config), spec, SEQUENCE_LENGTH, num_threads)
    storage = PagedStorage(spec, 60)
    plan = steps(spec.block_size)[0]
    unasked = fused.logits(plan, storage)
    fused.parts = library.Parts()
    started_ns = time.perf_counter_ns()
    assert torch.equal(fused.logits(plan, storage), unasked)
    whole_ns = time.perf_counter_ns() - started_ns
    told_ns = [getattr(fused.parts, name) for name, _ in library.Parts._fields_]
    assert all(part_ns > 0 for part_ns in told_ns)
    assert sum(told_ns) <= whole_ns


def test_what_a_sequence_computes_does_not_depend_on_its_neighbours(tmp_path: Path, build: str) -> None:
    config = CONFIGS["llama"]()
    spec = spec_of(config)
    fused = FusedDecoder(make_model(tmp_path, config), spec, SEQUENCE_LENGTH, 1)
    storage = PagedStorage(spec, 60)
    for plan in steps(spec.block_size)[:3]:
        fused.logits(plan, storage)
    together = steps(spec.block_size)[3]
    alone = [fused.logits(StepPlan((chunk,)), storage) for chunk in together.chunks]
    assert torch.equal(fused.logits(together, storage), torch.cat(alone))


def test_a_step_that_samples_nothing_leaves_the_same_kv(tmp_path: Path, build: str) -> None:
    config = CONFIGS["llama"]()
    spec = spec_of(config)
    fused = FusedDecoder(make_model(tmp_path, config), spec, SEQUENCE_LENGTH, 1)
    storages = [PagedStorage(spec, 60) for _ in range(2)]
    plan = steps(spec.block_size)[0]
    fused.logits(plan, storages[0])
    assert fused.logits_of_rows(plan, storages[1], []).shape == (0, config.vocab_size)
    for ours, theirs in zip(storages[1].layers, storages[0].layers, strict=True):
        assert torch.equal(ours, theirs)


def test_nan_goes_on_to_the_logits_in_every_format(tmp_path: Path, build: str) -> None:
    config = CONFIGS["llama"]()
    model = make_model(tmp_path, config)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    spec = spec_of(config)
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    for weight_format in WeightFormat:
        fused = FusedDecoder(model, spec, SEQUENCE_LENGTH, 1, weight_format)
        bad, good = ScheduledChunk("bad", (3, 7), 0, 2, (0,), greedy), ScheduledChunk("good", (3,), 0, 1, (1,), greedy)
        logits = fused.logits(StepPlan((bad, good)), PagedStorage(spec, 2))
        assert logits[0].isnan().any()
        assert logits[1].isfinite().all()


def test_the_likeliest_tokens_are_told(tmp_path: Path, build: str) -> None:
    """Of rows that end anywhere in a block, for values that are equal, and for what no token can be chosen from."""
    vocab_size = 1531
    model = make_model(tmp_path, LlamaConfig(**SHAPE | {"num_attention_heads": 4, "vocab_size": vocab_size}))
    spec = spec_of(model.config)
    head, norm = model.lm_head.weight, model.model.norm.weight
    numbers = torch.linspace(-1, 1, 1021)
    rows = {
        "usual": [float(numbers[(37 * i) % 1021]) for i in range(vocab_size)],
        "the last is largest": [0.0] * (vocab_size - 1) + [1.0],
        "the first of equals": [-1.0] * 700 + [-0.5] * (vocab_size - 700),
        "nan": [0.0] * 1000 + [math.nan] + [0.0] * (vocab_size - 1001),
        "nan at the end": [0.0] * (vocab_size - 1) + [math.nan],
        "infinity": [math.inf] + [0.0] * (vocab_size - 1),
        "all forbidden": [-math.inf] * vocab_size,
    }
    plan = steps(spec.block_size)[0]
    for name, logits in rows.items():
        with torch.no_grad():
            head.zero_()
            head[:, 0] = torch.tensor(logits)
            norm.zero_()
            norm[0] = 1.0
        fused = FusedDecoder(model, spec, SEQUENCE_LENGTH, 2)
        told = fused.run(fused.prepare(plan, PagedStorage(spec, 39)), None)
        assert told.likeliest == likeliest(told.logits), name


def test_inputs_may_get_their_tokens_later(tmp_path: Path, build: str) -> None:
    model = make_model(tmp_path, CONFIGS["llama"]())
    spec = spec_of(model.config)
    fused = FusedDecoder(model, spec, SEQUENCE_LENGTH, 1)
    storages = [PagedStorage(spec, 39) for _ in range(2)]
    for plan in steps(spec.block_size)[:3]:
        for storage in storages:
            fused.logits(plan, storage)
    plan = steps(spec.block_size)[3]
    unknown = StepPlan(tuple(replace(chunk, token_ids=(UNKNOWN_TOKEN,)) for chunk in plan.chunks))
    inputs = fused.prepare(unknown, storages[0])
    inputs.set_tokens([chunk.token_ids[0] for chunk in plan.chunks])
    assert fused.run(inputs, None).logits.equal(fused.logits(plan, storages[1]))
