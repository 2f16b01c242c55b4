"""What a draw depends on, and that it follows the distribution it claims."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from scheduler.request import SamplingParams, TokenHistory
from tests.unit.workers.native_builds import BUILDS
from tests.unit.workers.reference_sampling import processed
from workers.model import sampler
from workers.model.sampler import TOP_P_CANDIDATES, NothingLeftError, sample, uniform
from workers.model.sequence_state import SequenceState
from workers.native import library

LOGITS = [2.0, -1.0, 0.5, 3.0, 0.0, 1.5, -3.0, 2.5]
NUM_DRAWS = 3000
# Below this with probability 0.9999, for 1 to 15 degrees of freedom (any table of the chi-square distribution).
CHI_SQUARE_9999 = (15.1, 18.4, 21.1, 23.5, 25.7, 27.9, 29.9, 31.8, 33.7, 35.6, 37.4, 39.1, 40.9, 42.6, 44.3)


@pytest.fixture(autouse=True, params=["native", "torch"])
def drawn_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to draw: that of the native build, and the portable one."""
    if request.param == "torch":
        monkeypatch.setattr(sampler, "load_library", lambda: None)
    elif not BUILDS:
        pytest.skip("no native build for this processor")


class SplitMix64:
    """Vigna's published C code, number by number."""

    def __init__(self, state: int) -> None:
        self.state = state % 2**64

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        mixed = self.state
        mixed = (mixed ^ mixed // 2**30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed // 2**27) * 0x94D049BB133111EB % 2**64
        return mixed ^ mixed // 2**31


def params(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> SamplingParams:
    return SamplingParams(1, temperature, top_p, top_k, seed)


def draw(logits: list[float], sampling: SamplingParams, num_draws: int = NUM_DRAWS) -> Counter[int]:
    """One draw per position, counted by token."""
    rows = torch.tensor([logits]).expand(num_draws, -1)
    return Counter(sample(rows, [sampling] * num_draws, range(num_draws)))


def reference_distribution(logits: list[float], sampling: SamplingParams) -> dict[int, float]:
    """Softmax, ``min_p``, then the likeliest ``top_k``, then the smallest set of them that reaches ``top_p``."""
    weights = [math.exp((logit - max(logits)) / sampling.temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: -weights[token])
    order = [token for token in order if weights[token] >= sampling.min_p * max(weights)]
    order = order[: sampling.top_k] if sampling.top_k else order
    total = sum(weights[token] for token in order)
    kept: list[int] = []
    for token in order:
        kept.append(token)
        if sum(weights[each] for each in kept) >= sampling.top_p * total:
            break
    kept_total = sum(weights[token] for token in kept)
    return {token: weights[token] / kept_total for token in kept}


def check_distribution(counts: Counter[int], expected: dict[int, float]) -> None:
    """Pearson's chi-square test; the seeds are fixed, so it either always holds or never."""
    assert set(counts) <= set(expected)
    num_draws = sum(counts.values())
    statistic = sum((counts[token] - num_draws * p) ** 2 / (num_draws * p) for token, p in expected.items())
    if len(expected) > 1:
        assert statistic < CHI_SQUARE_9999[len(expected) - 2]


# The number behind a draw


def test_the_reference_generator_gives_the_published_numbers() -> None:
    generator = SplitMix64(1234567)
    assert [generator.next() for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**63 - 1, 2**64 - 1, -1, -(2**63)])
@pytest.mark.parametrize("position", [0, 1, 4095, 2**40])
def test_a_number_is_split_mix_of_seed_and_position(seed: int, position: int) -> None:
    mixed = SplitMix64(SplitMix64(seed).next() + position).next()
    assert uniform(seed, position) == (mixed >> 11) / 2**53
    assert 0.0 <= uniform(seed, position) < 1.0


@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_numbers_are_spread_evenly(along: str) -> None:
    numbers = [uniform(7, each) if along == "positions" else uniform(each, 7) for each in range(8000)]
    check_distribution(Counter(int(16 * number) for number in numbers), dict.fromkeys(range(16), 1 / 16))


def test_neighbouring_seeds_do_not_share_their_numbers() -> None:
    """Adding seed and position would make sequence 1 at position 5 draw as sequence 2 at position 4."""
    numbers = {uniform(seed, position) for seed in range(50) for position in range(50)}
    assert len(numbers) == 2500


# What a draw depends on


def test_temperature_zero_takes_the_likeliest_token() -> None:
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(1))
    greedy = [params(temperature=0.0, top_k=index % 3, top_p=0.1, seed=index) for index in range(20)]
    expected = [max(range(300), key=row.__getitem__) for row in logits.tolist()]
    assert sample(logits, greedy, range(20)) == expected


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    logits = torch.randn(12, 500, generator=torch.Generator().manual_seed(2)) * 3
    kinds = [params(), params(temperature=0.0), params(0.7, top_k=20), params(1.3, top_p=0.9)]
    rows = [replace(kinds[index % 4], seed=index) for index in range(12)]
    positions = [index * 3 for index in range(12)]
    alone = [sample(logits[i : i + 1], [rows[i]], [positions[i]])[0] for i in range(12)]
    order = [7, 0, 11, 3, 3, 8, 1]
    mixed = sample(logits[order], [rows[i] for i in order], [positions[i] for i in order])
    assert sample(logits, rows, positions) == alone
    assert mixed == [alone[i] for i in order]


MANY_KINDS: tuple[dict[str, object], ...] = (
    {"temperature": 0.0},
    {},
    {"temperature": 0.0, "frequency_penalty": 1.5},
    {"top_k": 20},
    {"top_p": 0.9, "logit_bias": ((3, 5.0), (70, -4.0))},
    {"min_p": 0.05, "presence_penalty": 0.7, "repetition_penalty": 1.3},
    {"temperature": 1.4, "top_k": 7, "top_p": 0.8, "min_p": 0.01},
    {"allowed_token_ids": tuple(range(5, 400, 3)), "min_tokens": 9, "stop_token_ids": (8, 11)},
    {"bad_words": ((4,), (9, 10)), "top_p": 0.99},
    {"temperature": 2.0, "top_p": 0.999},
)


def crowd(size: int) -> tuple[list[SamplingParams], dict[int, SequenceState]]:
    """All sorts of parameters, each with a history of its own."""
    rows, states = [], {}
    for row in range(size):
        rows.append(SamplingParams(9, seed=row, **MANY_KINDS[row % len(MANY_KINDS)]))  # type: ignore[arg-type]
        if rows[row].alters_logits:
            tokens = [(row * 31 + 7 * position) % 500 for position in range(20 + row)]
            history = TokenHistory(tokens, len(tokens), 10)
            states[row] = SequenceState(rows[row], history)
            states[row].advance(history)
    return rows, states


@pytest.mark.parametrize("size", [500, 5003])
def test_a_request_alone_and_among_31_others_gets_the_same_token(size: int) -> None:
    logits = torch.randn(32, size, generator=torch.Generator().manual_seed(5)) * 2
    rows, states = crowd(32)
    positions = [3 * row for row in range(32)]
    together = sample(logits, rows, positions, states)
    for row in range(32):
        own = {0: states[row]} if row in states else {}
        assert sample(logits[row : row + 1], [rows[row]], [positions[row]], own) == [together[row]]
    back = list(reversed(range(32)))
    turned = {31 - row: state for row, state in states.items()}
    assert sample(logits[back], [rows[i] for i in back], [positions[i] for i in back], turned) == together[::-1]


def test_what_is_asked_for_by_one_row_leaves_the_logits_as_they_were() -> None:
    logits = torch.randn(32, 500, generator=torch.Generator().manual_seed(6))
    before = logits.clone()
    rows, states = crowd(32)
    sample(logits, rows, range(32), states)
    assert torch.equal(logits, before)


def test_greedy_takes_the_likeliest_after_the_processors() -> None:
    logits = torch.randn(32, 500, generator=torch.Generator().manual_seed(7))
    rows, states = crowd(32)
    rows = [replace(params, temperature=0.0) for params in rows]
    found = sample(logits, rows, range(32), states)
    for row, params in enumerate(rows):
        tokens = [(row * 31 + 7 * position) % 500 for position in range(20 + row)]
        expected = processed(logits[row].tolist(), params, tokens[:10], tokens[10:])
        assert found[row] == expected.index(max(expected))


def test_masks_that_leave_nothing_are_told_apart_from_a_broken_model() -> None:
    sampling = SamplingParams(1, allowed_token_ids=(1, 2), bad_words=((3, 1), (3, 2)))
    history = TokenHistory([5, 3], 2, 1)
    state = SequenceState(sampling, history)
    with pytest.raises(NothingLeftError):
        sample(torch.zeros(1, 9), [sampling], [2], {0: state})


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1])
def test_a_draw_repeats_for_the_same_seed_and_position(seed: int) -> None:
    rows = torch.zeros(50, 100)
    draws = [sample(rows, [params(seed=seed)] * 50, range(50)) for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 25  # and differs between positions


def test_seeds_draw_differently() -> None:
    rows = torch.zeros(50, 1000)
    assert len(set(sample(rows, [params(seed=seed) for seed in range(50)], [3] * 50))) > 40


def test_each_row_needs_its_parameters_and_its_position() -> None:
    with pytest.raises(ValueError, match="argument"):
        sample(torch.zeros(2, 5), [params(), params()], [1])


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("spread", [0.3, 2.0, 9.0], ids="logits spread by {}".format)
@pytest.mark.parametrize("size", [3, 17, 500, 5003, 40_000])
def test_every_build_draws_what_torch_draws(
    monkeypatch: pytest.MonkeyPatch, size: int, spread: float, build: str
) -> None:
    """But for a draw at the very edge between two tokens, which rounding may send to either."""
    logits = torch.randn(60, size, generator=torch.Generator().manual_seed(size)) * spread
    logits[::7, 1::2] = -math.inf
    limits: tuple[dict[str, float], ...] = (
        {},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"top_k": 40},
        {"top_k": 900, "top_p": 0.7},
    )
    rows = [
        SamplingParams(1, temperature=0.2 + row % 4, seed=row, **limits[row % 5])  # type: ignore[arg-type]
        for row in range(60)
    ]
    path = library.path_of(build)
    assert path is not None
    native = library._declare(path)
    monkeypatch.setattr(sampler, "load_library", lambda: native)
    drawn = sample(logits, rows, range(60))
    monkeypatch.setattr(sampler, "load_library", lambda: None)
    expected = sample(logits, rows, range(60))
    assert sum(ours != theirs for ours, theirs in zip(drawn, expected, strict=True)) <= 1
    assert all(logits[row, token] > -math.inf for row, token in enumerate(drawn))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("limit", "size", "num_kept"),
    [
        ({}, 5003, 5003),
        ({"top_p": 0.0}, 5003, 1),
        ({"top_p": 0.0}, 40, 1),
        ({"top_p": 0.5}, 5003, 2502),
        ({"top_p": 0.999}, 5003, 4998),
        ({"top_p": 1 - 1e-9}, 5003, 5003),
        ({"top_k": 7}, 5003, 7),
        ({"top_k": 3000, "top_p": 0.5}, 5003, 1500),
        ({"top_k": 90_000, "top_p": 0.9}, 40, 36),
    ],
)
def test_every_build_draws_among_equals_in_their_order(
    monkeypatch: pytest.MonkeyPatch, limit: dict[str, float], size: int, num_kept: int, build: str
) -> None:
    """Then the number behind a draw says which: so much of those that are left, the first of the vocabulary."""
    path = library.path_of(build)
    assert path is not None
    native = library._declare(path)
    monkeypatch.setattr(sampler, "load_library", lambda: native)
    rows = [SamplingParams(1, seed=seed, **limit) for seed in range(100)]  # type: ignore[arg-type]
    drawn = sample(torch.zeros(100, size), rows, [0] * 100)
    expected = [int(uniform(seed, 0) * num_kept) for seed in range(100)]
    assert all(abs(ours - theirs) <= 1 for ours, theirs in zip(drawn, expected, strict=True))
    assert max(drawn) < num_kept


# Which distribution a draw follows


@pytest.mark.parametrize(
    "sampling",
    [
        params(seed=3),
        params(temperature=0.5, seed=4),
        params(temperature=2.0, seed=5),
        params(top_k=1),
        params(top_k=3, seed=6),
        params(top_k=8, seed=7),
        params(top_k=100, seed=8),
        params(top_p=0.0),
        params(top_p=0.3),
        params(top_p=0.6, seed=9),
        params(top_p=0.95, seed=10),
        params(top_p=0.999999, seed=11),
        params(temperature=1.5, top_k=5, top_p=0.8, seed=-12),
        params(temperature=0.3, top_k=4, top_p=0.99, seed=13),
        SamplingParams(1, min_p=0.2, seed=14),
        SamplingParams(1, temperature=1.7, min_p=0.1, seed=15),
        SamplingParams(1, min_p=1.0, seed=16),
        SamplingParams(1, min_p=0.05, top_k=4, top_p=0.9, seed=17),
        SamplingParams(1, min_p=0.3, top_p=0.99, seed=18),
    ],
    ids=repr,
)
def test_draws_follow_the_distribution_that_is_left(sampling: SamplingParams) -> None:
    check_distribution(draw(LOGITS, sampling), reference_distribution(LOGITS, sampling))


@pytest.mark.parametrize(("top_p", "num_kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, num_kept: int) -> None:
    """Four tokens of exactly a quarter each, so that the edge is hit."""
    assert len(draw([0.0] * 4, params(top_p=top_p), num_draws=300)) == num_kept


@pytest.mark.parametrize("top_p", [0.02, 0.5, 0.97])
def test_top_p_holds_where_it_keeps_more_tokens_than_are_looked_at_first(top_p: float) -> None:
    """Tokens of one probability each: the first so many in the order that ties happen to have."""
    size = 3000
    assert size * 0.02 < TOP_P_CANDIDATES < size * 0.5
    drawn = {sample(torch.zeros(1, size), [params(top_p=top_p, seed=seed)], [0])[0] for seed in range(200)}
    assert len(drawn) > 0.5 * min(200, size * top_p)  # 200 draws meet some tokens twice


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = [-math.inf, 1.0, -math.inf, 0.0, -math.inf]
    assert set(draw(logits, params(seed=1), 500)) == {1, 3}
    assert set(draw(logits, params(seed=1, top_p=0.99999), 500)) == {1, 3}
    assert set(draw(logits, params(seed=1, top_k=4), 500)) == {1, 3}


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-38, 1e-44, 1e-46, 1e-300, 5e-324])
@pytest.mark.parametrize("limit", [{}, {"top_k": 5}, {"top_p": 0.9}], ids=repr)
def test_a_tiny_temperature_takes_the_likeliest_token(temperature: float, limit: dict[str, float]) -> None:
    sampling = replace(params(temperature), **limit)
    assert set(draw([2.0, -5e3, 3.0, 2.9, 1e4, -1e30], sampling, num_draws=50)) == {4}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_p", [0.95, 1.0])
def test_logits_of_a_smaller_dtype_are_drawn_in_full_precision(dtype: torch.dtype, top_p: float) -> None:
    """The probabilities of 5,000 tokens are small numbers; rounded to eight bits they would not add up."""
    rows = torch.randn(1, 5000, generator=torch.Generator().manual_seed(3)).to(dtype).expand(200, -1)
    sampling = [params(seed=2, top_p=top_p)] * 200
    assert sample(rows, sampling, range(200)) == sample(rows.float(), sampling, range(200))
