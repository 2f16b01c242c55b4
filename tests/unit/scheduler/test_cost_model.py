"""What the cost model promises: the roofline, order, bounds, and that it learns what is true."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.cost_model import CostModel, linear_times
from scheduler.types import (
    DeviceProfile,
    GemmRate,
    ModelShape,
    PredictionErrors,
    StepTimes,
    TransferTimes,
    WorkerInfo,
    WorkerRole,
)
from tests.builders import make_spec, make_worker, repeatable

# A billion weights in bfloat16, a tenth of them in the head; 16 layers of 16 heads of 128, 4 of them with KV.
SHAPE = ModelShape(16, 1.8e9, 0.2e9, 1.8e9, 0.2e9, 4.0 * 16 * 16 * 128, 32768)
DEVICE = DeviceProfile("device", gemm_gflop_s=100_000.0, read_gb_s=1000.0, memory_bytes=1 << 34)
CHUNK = 512


def worker(worker_id: str = "w", device: DeviceProfile = DEVICE, role: WorkerRole = WorkerRole.COLOCATED) -> WorkerInfo:
    return replace(make_worker(worker_id, role), device=device, shape=SHAPE, max_num_batched_tokens=CHUNK)


def model_of(*workers: WorkerInfo) -> CostModel:
    model = CostModel()
    for info in workers:
        model.add(info)
    return model


def decode_steps(batch: int, context: int, step_s: float, num_steps: int = 4) -> StepTimes:
    return StepTimes(num_steps, 0, 0, num_steps * batch, num_steps * context, num_steps * step_s)


def prefill_step(num_tokens: int, step_s: float, start: int = 0) -> StepTimes:
    return StepTimes(1, num_tokens, num_tokens * start + num_tokens * (num_tokens + 1) // 2, 0, 0, step_s)


def test_a_small_decode_batch_takes_as_long_as_reading_the_weights() -> None:
    assert model_of(worker()).decode_step_seconds("w", 1, 0) == pytest.approx(2.0e9 / 1000e9, rel=0.6)
    times = linear_times(DEVICE, 2.0e9, 2.0e9)
    assert times.seconds(1) == times.seconds(99) == pytest.approx(2.0e9 / 1000e9)


def test_many_rows_take_as_long_as_computing_with_them() -> None:
    times = linear_times(DEVICE, 2.0e9, 2.0e9)
    assert times.seconds(1000) == pytest.approx(1000 * 2.0e9 / 100_000e9)
    assert times.seconds(100) == pytest.approx(times.seconds(99))  # where computing overtakes reading


def test_measured_rates_are_met_at_their_rows() -> None:
    rates = (GemmRate(1, 500.0), GemmRate(16, 4_000.0), GemmRate(256, 60_000.0), GemmRate(1024, 90_000.0))
    times = linear_times(replace(DEVICE, gemm_rates=rates), 2.0e9, 2.0e9)
    for rate in rates:
        assert times.seconds(rate.rows) == pytest.approx(max(2e-3, rate.rows * 2.0e9 / (rate.gflop_s * 1e9)))


@given(
    rates=st.lists(st.floats(1.0, 1e6), max_size=6),
    rows=st.lists(st.integers(0, 10_000), min_size=2, max_size=20),
)
@repeatable(max_examples=100)
def test_more_rows_never_take_less_time(rates: list[float], rows: list[int]) -> None:
    device = replace(DEVICE, gemm_rates=tuple(GemmRate(4**power, rate) for power, rate in enumerate(rates)))
    times = linear_times(device, 2.0e9, 2.0e9)
    seconds = [times.seconds(count) for count in sorted(rows)]
    assert seconds == sorted(seconds) and seconds[0] >= 2e-3


def test_a_prompt_is_computed_in_chunks_and_its_attention_grows_with_its_square() -> None:
    model = model_of(worker())
    whole, half = model.prefill_seconds("w", 8 * CHUNK), model.prefill_seconds("w", 4 * CHUNK)
    pairs = (8 * CHUNK) ** 2 / 2 - 2 * (4 * CHUNK) ** 2 / 2
    assert whole - 2 * half == pytest.approx(pairs * SHAPE.attention_flops / 100_000e9, rel=0.01)


def test_each_layer_adds_what_its_kernels_take_beside_their_work() -> None:
    device = replace(DEVICE, layer_s=1e-5)
    assert linear_times(device, 2.0e9, 2.0e9, 16).seconds(1) == pytest.approx(2e-3 + 16e-5)
    assert linear_times(device, 2.0e9, 2.0e9, 16).seconds(1000) == pytest.approx(1000 * 2.0e9 / 100_000e9 + 16e-5)


def test_attention_of_prompts_may_be_slower_than_products() -> None:
    slow = model_of(worker(device=replace(DEVICE, prompt_attention_gflop_s=25_000.0)))
    added = slow.prefill_seconds("w", 400) - model_of(worker()).prefill_seconds("w", 400)
    assert added == pytest.approx(400 * 401 / 2 * SHAPE.attention_flops * (1 / 25_000e9 - 1 / 100_000e9))


def test_cached_tokens_are_not_computed_but_attended_to() -> None:
    model = model_of(worker())
    rest = model.prefill_seconds("w", 4000, num_cached_tokens=3000)
    assert model.prefill_seconds("w", 1000) < rest < model.prefill_seconds("w", 4000)
    assert model.prefill_seconds("w", 4000, 4000) == model.prefill_seconds("w", 4000, 3999)  # its last token


@given(
    tokens=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    batches=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    contexts=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
)
@repeatable(max_examples=100)
def test_more_work_is_never_predicted_to_take_less(
    tokens: tuple[int, int], batches: tuple[int, int], contexts: tuple[int, int]
) -> None:
    model = model_of(worker())
    assert 0 < model.prefill_seconds("w", min(tokens)) <= model.prefill_seconds("w", max(tokens))
    small = model.decode_step_seconds("w", min(batches), min(contexts))
    assert 0 < small <= model.decode_step_seconds("w", max(batches), max(contexts))


def test_kv_goes_over_the_slower_of_both_links() -> None:
    fast, slow = replace(DEVICE, link_gb_s=50.0), replace(DEVICE, link_gb_s=2.0)
    model = model_of(worker("p", fast), worker("d", slow), worker("e", fast))
    num_bytes = 2000 * SHAPE.kv_token_bytes
    beyond = model.transfer_seconds("p", "d", 3000) - model.transfer_seconds("p", "d", 1000)
    assert beyond == pytest.approx(num_bytes / 2e9)
    assert model.transfer_seconds("p", "e", 3000) < model.transfer_seconds("p", "d", 3000)


def test_steps_teach_what_the_profile_did_not_know() -> None:
    """A device that reads at a third of the rate it was said to, with noise, and a load that changes."""
    model, noise = model_of(worker()), random.Random(7)
    truth = model_of(worker(device=replace(DEVICE, read_gb_s=300.0, gemm_gflop_s=40_000.0)))
    for _ in range(100):
        batch = noise.randint(1, 32)
        context = batch * noise.randint(50, 3000)
        step_s = truth.decode_step_seconds("w", batch, context) * noise.lognormvariate(0, 0.03)
        model.observe("w", decode_steps(batch, context, step_s))
        num_tokens, start = noise.randint(16, CHUNK), noise.choice((0, 0, 1000, 2500))
        prefill_s = truth.prefill_seconds("w", start + num_tokens, start) * noise.lognormvariate(0, 0.03)
        model.observe("w", prefill_step(num_tokens, prefill_s, start))
    for batch, each in ((1, 100), (8, 2000), (32, 500)):
        real = truth.decode_step_seconds("w", batch, batch * each)
        assert model.decode_step_seconds("w", batch, batch * each) == pytest.approx(real, rel=0.05)
    for num_tokens in (32, 200, 512, 3000):
        assert model.prefill_seconds("w", num_tokens) == pytest.approx(truth.prefill_seconds("w", num_tokens), rel=0.08)
    errors = model.errors("w")
    assert errors.prefill is not None and errors.prefill < 0.08
    assert errors.decode is not None and errors.decode < 0.05


def test_it_follows_a_device_that_becomes_slower() -> None:
    model = model_of(worker())
    for step_s in (3e-3, 6e-3):
        for _ in range(200):
            model.observe("w", decode_steps(4, 2000, step_s))
    assert model.decode_step_seconds("w", 4, 2000) == pytest.approx(6e-3, rel=0.05)


def test_the_drift_of_a_device_says_how_far_it_is_from_its_profile_and_does_not_change_with_every_sample() -> None:
    """Twice as long is log 2 / log 1.2 = 3.8 steps. Between two steps it stays at the one that it came to first."""
    noise, truth = random.Random(7), model_of(worker())

    def drifts(model: CostModel, *times_as_long: float) -> set[tuple[int, int]]:
        seen = set()
        for number in range(100):
            num_tokens, batch = noise.randint(100, CHUNK), noise.randint(1, 16)
            factor = times_as_long[number % len(times_as_long)]
            model.observe("w", prefill_step(num_tokens, factor * truth.prefill_seconds("w", num_tokens)))
            step_s = factor * truth.decode_step_seconds("w", batch, 500 * batch)
            model.observe("w", decode_steps(batch, 500 * batch, step_s))
            if number >= 50:
                seen.add(model.workers["w"].drift)
        return seen

    faster, slower = model_of(worker()), model_of(worker())
    assert faster.workers["w"].drift == (0, 0)
    assert drifts(slower, 2.0) == {(4, 4)}
    edge = 1.2**3.5
    assert drifts(faster, edge * 0.97, edge * 1.03) <= {(3, 3), (4, 4)}
    assert drifts(slower, edge * 0.97, edge * 1.03) == {(4, 4)}


def test_one_bad_sample_changes_little() -> None:
    model = model_of(worker())
    for _ in range(50):
        model.observe("w", decode_steps(4, 2000, 3e-3))
    model.observe("w", decode_steps(4, 2000, 3.0))
    assert model.decode_step_seconds("w", 4, 2000) == pytest.approx(3e-3, rel=0.1)


@given(
    samples=st.lists(
        st.tuples(
            st.integers(1, 100), st.integers(0, 600), st.integers(0, 64), st.integers(0, 10**5), st.floats(0, 1e4)
        ),
        max_size=30,
    )
)
@repeatable(max_examples=100)
def test_no_samples_make_a_prediction_negative_or_turn_its_order(
    samples: list[tuple[int, int, int, int, float]],
) -> None:
    model = model_of(worker())
    for num_steps, prompt, batch, context, seconds in samples:
        if prompt or batch:
            pairs = prompt * (prompt + 1) // 2
            steps = StepTimes(
                num_steps, num_steps * prompt, num_steps * pairs, num_steps * batch, num_steps * context, seconds
            )
            model.observe("w", steps)
    assert 0 < model.decode_step_seconds("w", 1, 10) <= model.decode_step_seconds("w", 32, 10_000)
    assert 0 < model.prefill_seconds("w", 10) <= model.prefill_seconds("w", 4000)


def test_a_step_of_both_phases_teaches_prefill_what_decoding_does_not_explain() -> None:
    model, truth = model_of(worker()), model_of(worker(device=replace(DEVICE, gemm_gflop_s=50_000.0)))
    prompt, batch, context = 256, 8, 16_000
    both_s = truth.prefill_seconds("w", prompt + batch) + context * SHAPE.kv_token_bytes / 1000e9
    for _ in range(100):
        model.observe("w", StepTimes(1, prompt, prompt * (prompt + 1) // 2, batch, context, both_s))
    assert model.prefill_seconds("w", prompt + batch) == pytest.approx(
        truth.prefill_seconds("w", prompt + batch), rel=0.1
    )


def test_a_neighbour_slows_all_parts_of_a_step_but_not_what_is_beside_the_model() -> None:
    """Both phases take 1.3 times as long for what the profile says, with one other; nobody said so before."""
    model, truth = model_of(worker()), model_of(worker())
    slower = replace(DEVICE, read_gb_s=1000.0 / 1.3, gemm_gflop_s=100_000.0 / 1.3)
    beside = model_of(worker(device=slower))
    for number in range(200):
        batch, num_tokens, others = 4 + number % 9, 100 + 40 * (number % 10), number % 3 % 2
        of = beside if others else truth
        step_s = of.decode_step_seconds("w", batch, 500 * batch)
        model.observe("w", decode_steps(batch, 500 * batch, step_s), others)
        model.observe("w", prefill_step(num_tokens, of.prefill_seconds("w", num_tokens)), others)
    for others, of in ((0, truth), (1, beside)):
        decode_s, prefill_s = of.decode_step_seconds("w", 8, 4000), of.prefill_seconds("w", 300)
        assert model.decode_step_seconds("w", 8, 4000, others) == pytest.approx(decode_s, rel=0.03)
        assert model.prefill_seconds("w", 300, 0, others) == pytest.approx(prefill_s, rel=0.03)
    usual = model.decode_step_seconds("w", 8, 4000)
    assert usual == pytest.approx(model.decode_step_seconds("w", 8, 4000, 1 / 3), rel=0.03)  # a third of the time


def test_handoffs_teach_each_pair_its_own_rate() -> None:
    model = model_of(worker("p"), worker("d"), worker("e"))
    for num_tokens in (100, 2000, 500, 4000) * 20:
        num_bytes = num_tokens * SHAPE.kv_token_bytes
        model.observe_transfers("p", TransferTimes("d.test:1", 1, num_bytes, 0.001 + num_bytes / 0.25e9))
    assert model.transfer_seconds("p", "d", 1000) == pytest.approx(
        0.001 + 1000 * SHAPE.kv_token_bytes / 0.25e9, rel=0.1
    )
    assert model.transfer_seconds("p", "e", 1000) < model.transfer_seconds("p", "d", 1000) / 2
    error = model.errors("p").transfer
    assert error is not None and error < 0.1


def test_an_error_is_of_what_was_said_before() -> None:
    """The first steps take twice what the profile says: their error is half, whatever is learned from them."""
    model = model_of(worker())
    assert model.errors("w") == PredictionErrors()
    predicted = model.decode_step_seconds("w", 4, 2000)
    model.observe("w", decode_steps(4, 2000, 2 * predicted))
    assert model.errors("w").decode == pytest.approx(0.5)


def test_a_worker_that_comes_back_is_judged_by_its_profile_again() -> None:
    model, fresh = model_of(worker("p"), worker("d")), model_of(worker("p"), worker("d"))
    for _ in range(20):
        model.observe("d", decode_steps(4, 2000, 1.0))
        model.observe_transfers("p", TransferTimes("d.test:1", 1, 1000, 1.0))
    model.add(worker("d"))
    assert model.decode_step_seconds("d", 4, 2000) == fresh.decode_step_seconds("d", 4, 2000)
    assert model.transfer_seconds("p", "d", 100) == fresh.transfer_seconds("p", "d", 100)


def test_a_worker_that_left_is_unknown_and_its_handoffs_are_passed_over() -> None:
    model = model_of(worker("p"), worker("d"))
    model.remove("d")
    model.observe_transfers("p", TransferTimes("d.test:1", 1, 1000, 1.0))
    with pytest.raises(KeyError):
        model.transfer_seconds("p", "d", 100)


def test_a_smaller_cache_format_is_read_and_sent_faster() -> None:
    spec = make_spec(num_layers=16, num_kv_heads=4, head_size=128, block_size=16, dtype="int8")
    model = model_of(worker("a"), replace(worker("b"), shape=replace(SHAPE, kv_token_bytes=spec.token_bytes)))
    assert model.decode_step_seconds("b", 8, 10**6) < model.decode_step_seconds("a", 8, 10**6)
    assert model.transfer_seconds("b", "a", 1000) < model.transfer_seconds("a", "b", 1000)
