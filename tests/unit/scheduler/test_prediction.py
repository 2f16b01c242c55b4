"""What is predicted of a request when it is placed, and what is learned from how it turned out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from kvcache.prefix import HashChain
from scheduler.cache_index import hashes_of_prompt, pack_names
from scheduler.controller import ClusterController
from scheduler.cost_model import CostModel
from scheduler.events import (
    PrefillDone,
    RequestArrived,
    RequestEnded,
    WorkerRegistered,
    WorkerReported,
)
from scheduler.placement import PlacementOptions
from scheduler.prediction import PredictionLog, Sizes, predict
from scheduler.types import (
    CacheDelta,
    Placement,
    Prediction,
    PredictionErrors,
    StepTimes,
    TransferTimes,
    WorkerAddress,
    WorkerLoad,
    WorkerRole,
)
from tests.builders import make_spec, make_worker

PREFILL, DECODE = make_worker("p", WorkerRole.PREFILL), make_worker("d", WorkerRole.DECODE)
HANDED_OVER = Placement("r", WorkerAddress("d", "d.test:1"), WorkerAddress("p", "p.test:1"))
IN_PLACE = Placement("r", WorkerAddress("d", "d.test:1"), None)
SIZES = Sizes(prompt=100, output=40)


@dataclass
class Books:
    """``others``: beside a request, on average; None: those that decode now."""

    decoding_size: int = 0
    decoding_context_tokens: int = 0
    backlog: float = 0.0
    others: float | None = None

    @property
    def batch_size(self) -> int:
        return self.decoding_size

    @property
    def batch_context_tokens(self) -> int:
        return self.decoding_context_tokens

    def backlog_s(self, now: float, prefill_s: float) -> float:
        assert prefill_s > 0
        return max(0.0, self.backlog - now)

    def others_beside(self, now: float, begin_s: float, seconds: float) -> float:
        assert begin_s > now and seconds > 0
        return self.decoding_size if self.others is None else self.others


def predicted(costs: CostModel, placement: Placement, prefill: Books, decode: Books, now: float = 0.0) -> Prediction:
    prefill_id = placement.prefill.worker_id if placement.prefill is not None else placement.decode.worker_id
    prefill_s = costs.prefill_seconds(prefill_id, SIZES.prompt)
    return predict(costs, placement, SIZES, prefill_s, prefill, decode, now)


@pytest.fixture
def costs() -> CostModel:
    model = CostModel()
    for info in (PREFILL, DECODE):
        model.add(info)
    return model


def test_a_first_token_comes_after_queue_computation_and_handoff(costs: CostModel) -> None:
    prediction = predicted(costs, HANDED_OVER, Books(backlog=7.0), Books(), now=4.0)
    assert prediction.ttft_s == 3.0 + costs.prefill_seconds("p", 100) + costs.transfer_seconds("p", "d", 100)


def test_what_the_decode_worker_has_cached_is_not_sent(costs: CostModel) -> None:
    prefill_s = costs.prefill_seconds("p", SIZES.prompt)
    held = replace(SIZES, held=64)
    prediction = predict(costs, HANDED_OVER, held, prefill_s, Books(), Books(), 0.0)
    assert prediction.ttft_s == pytest.approx(prefill_s + costs.transfer_seconds("p", "d", 36))
    assert prediction.ttft_s < predicted(costs, HANDED_OVER, Books(), Books()).ttft_s


def test_the_controller_predicts_a_first_token_sooner_where_the_decode_worker_has_the_prompt() -> None:
    """The prefill worker has nothing of it, so all is computed; of the handoff only the last block is left."""
    prompt = range(61)
    names = hashes_of_prompt(b"", make_spec().block_size, prompt)
    added = pack_names(HashChain(b"", make_spec().block_size).hashes(prompt))
    costs = CostModel()
    for info in (PREFILL, DECODE):
        costs.add(info)
    controller = ClusterController(options=PlacementOptions("round_robin"))
    for info in (PREFILL, DECODE):
        controller.handle(WorkerRegistered(info), 0.0)
    controller.handle(WorkerReported("d", 1, WorkerLoad(), cache=CacheDelta(0, added)), 0.0)
    controller.handle(RequestArrived("r", 61, 8, prefixes=(names,)), 1.0)
    real_s = costs.prefill_seconds("p", 61) + costs.transfer_seconds("p", "d", 1)
    controller.handle(PrefillDone("r"), 1.0 + real_s)
    assert errors_of(controller, "p").ttft == pytest.approx(0.0, abs=1e-9)


def test_a_prompt_in_place_is_not_handed_over(costs: CostModel) -> None:
    books = Books()
    assert predicted(costs, IN_PLACE, books, books, now=4.0).ttft_s == costs.prefill_seconds("d", 100)


@pytest.mark.parametrize(("placement", "steps"), [(HANDED_OVER, 0.0), (IN_PLACE, 0.5)])
def test_a_busy_decode_worker_takes_a_request_up_between_two_steps(
    costs: CostModel, placement: Placement, steps: float
) -> None:
    """Its prompt, where that is computed there, and then the first token of its own; a handoff begins at once."""
    idle, busy = (predicted(costs, placement, Books(), Books(size, 120 * size)) for size in (0, 8))
    step_s = costs.decode_step_seconds("d", 9, 9 * 120)
    assert busy.ttft_s - idle.ttft_s == pytest.approx(steps * step_s)
    assert busy.tpot_s == pytest.approx((39 + 0.5) / 39 * step_s)


def test_tokens_take_as_long_as_a_step_of_the_batch_that_there_will_be_on_average(costs: CostModel) -> None:
    """Four decode now, of 250 tokens each; 1.5 of them, or others in their place, will be there."""
    prediction = predicted(costs, HANDED_OVER, Books(), Books(4, 1000, others=1.5))
    step_s = costs.decode_step_seconds("d", 2.5, 100 + 20 + 1.5 * 250)
    assert prediction.tpot_s == pytest.approx((39 + 0.5) / 39 * step_s)


def test_alone_tokens_take_a_step_each(costs: CostModel) -> None:
    assert predicted(costs, HANDED_OVER, Books(), Books()).tpot_s == costs.decode_step_seconds("d", 1, 120)


def test_calls_that_no_step_explains_are_learned_from_first_tokens(costs: CostModel) -> None:
    """Each token comes 10 ms late, but for one whose queue went otherwise."""
    log = PredictionLog(costs)
    for number in range(20):
        prediction = predicted(costs, HANDED_OVER, Books(), Books())
        parts_s = prediction.ttft_s - costs.start_seconds("p")
        log.begin(HANDED_OVER, prediction, now=0.0)
        log.first_token("r", now=parts_s + (2.0 if number == 10 else 0.01))
    assert costs.start_seconds("p") == pytest.approx(0.01)
    assert costs.errors("p").ttft == pytest.approx(0.0, abs=1e-6)


def test_tpot_is_judged_over_the_whole_answer(costs: CostModel) -> None:
    log = PredictionLog(costs)
    log.begin(HANDED_OVER, Prediction(ttft_s=1.0, tpot_s=0.10), now=5.0)
    log.first_token("r", now=6.0)
    log.end("r", num_output_tokens=11, now=6.8)  # ten tokens in 0.8 s
    assert costs.errors("d").tpot == pytest.approx(0.25)


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_an_answer_that_failed_or_was_short_says_nothing_of_tpot(costs: CostModel, num_tokens: int) -> None:
    log = PredictionLog(costs)
    log.begin(HANDED_OVER, Prediction(1.0, 0.1), now=0.0)
    log.first_token("r", now=1.0)
    log.end("r", num_tokens, now=2.0)
    assert costs.errors("d").tpot is None


def test_a_request_whose_worker_left_teaches_nothing(costs: CostModel) -> None:
    log = PredictionLog(costs)
    log.begin(HANDED_OVER, Prediction(1.0, 0.1), now=0.0)
    costs.remove("p")
    log.first_token("r", now=1.0)
    log.first_token("unknown", now=1.0)
    log.end("r", 20, now=3.0)
    assert costs.errors("d").tpot == pytest.approx(abs(0.1 - 2 / 19) / (2 / 19))


def test_the_controller_predicts_each_request_and_says_how_far_off_it_was() -> None:
    controller = ClusterController(options=PlacementOptions("least_loaded"))
    for info in (PREFILL, DECODE):
        controller.handle(WorkerRegistered(info), 0.0)
    controller.handle(RequestArrived("r", 100, 20), 1.0)
    controller.handle(PrefillDone("r"), 2.0)
    controller.handle(RequestEnded("r", 20), 3.0)
    steps = (StepTimes(3, 0, 0, 6, 200, 0.5), StepTimes(1, 100, 5050, 0, 0, 0.5))
    controller.handle(WorkerReported("d", 1, WorkerLoad(), steps), 3.0)
    controller.handle(WorkerReported("p", 1, WorkerLoad(), steps, (TransferTimes("d.test:1", 1, 1000, 0.5),)), 3.0)
    errors = {worker.info.worker_id: worker.errors for worker in controller.snapshot().workers}
    told = {
        name: {key for key in PredictionErrors.__slots__ if getattr(of, key) is not None} for name, of in errors.items()
    }
    assert told == {"p": {"prefill", "decode", "transfer", "ttft"}, "d": {"prefill", "decode", "tpot"}}


def test_requests_that_still_wait_for_their_prompts_do_not_slow_the_batch_that_one_meets() -> None:
    controller = ClusterController(options=PlacementOptions("least_loaded"))
    for info in (PREFILL, DECODE):
        controller.handle(WorkerRegistered(info), 0.0)
    for number in range(40):
        controller.handle(RequestArrived(str(number), 100, 20), 0.0)
    controller.handle(PrefillDone("0"), 1.0)
    controller.handle(RequestEnded("0", 20), 1.0 + 19 * alone_s(controller))
    assert errors_of(controller, "d").tpot == pytest.approx(0.0, abs=0.01)
    controller.handle(PrefillDone("39"), 9.0)
    controller.handle(RequestEnded("39", 20), 9.0 + 19 * alone_s(controller))
    assert errors_of(controller, "d").tpot == pytest.approx(0.0, abs=0.01)


def alone_s(controller: ClusterController) -> float:
    return controller._costs.decode_step_seconds("d", 1, 100 + 10)


def errors_of(controller: ClusterController, worker_id: str) -> PredictionErrors:
    (found,) = [worker.errors for worker in controller.snapshot().workers if worker.info.worker_id == worker_id]
    return found


def test_of_requests_that_come_together_one_is_compared(costs: CostModel) -> None:
    log = PredictionLog(costs)
    assert log.wants(1.0)
    log.begin(IN_PLACE, Prediction(1.0, 1.0), 1.0)
    assert [log.wants(1.0), log.wants(1.1)] == [False, True]
