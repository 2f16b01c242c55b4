"""Text and log-probabilities of one sequence: shown together, cut together."""

from __future__ import annotations

from collections.abc import Sequence

from engine.outputs import TextDelta
from engine.text_assembler import TextAssembler, TokenBatch
from engine.tokenizer import Tokenizer
from scheduler.request import FinishReason, TokenLogprobs
from tests.fakes import tiny_backend

TOKENIZER = Tokenizer(tiny_backend())
END = 0


def tokens_of(*texts: str) -> list[int]:
    """One token each."""
    ids = [TOKENIZER.encode(text) for text in texts]
    assert all(len(each) == 1 for each in ids)
    return [each[0] for each in ids]


def logprobs_of(index: int) -> TokenLogprobs:
    return TokenLogprobs(-float(index), 1, (), ())


def assemble(
    token_ids: Sequence[int],
    stop: Sequence[str] = (),
    reason: FinishReason = FinishReason.LENGTH,
    min_tokens: int = 0,
) -> list[TextDelta]:
    """One token at a time, until the sequence ends."""
    assembler = TextAssembler(TOKENIZER, [END], stop, min_tokens)
    deltas: list[TextDelta] = []
    for index, token_id in enumerate(token_ids):
        end = reason if index == len(token_ids) - 1 else None
        deltas.append(assembler.push(TokenBatch(index, (token_id,), end, (logprobs_of(index),))))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def told(deltas: Sequence[TextDelta]) -> list[tuple[float, int]]:
    return [(each.logprobs.logprob, each.text_offset) for delta in deltas for each in delta.logprobs]


def test_without_stop_strings_each_token_is_told_as_it_comes() -> None:
    deltas = assemble(tokens_of("h", "e", "x"))
    assert [len(delta.logprobs) for delta in deltas] == [1, 1, 1]
    assert told(deltas) == [(-0.0, 0), (-1.0, 1), (-2.0, 2)]


def test_parts_of_one_character_begin_where_it_does() -> None:
    euro = TOKENIZER.encode("€")
    assert len(euro) == 3
    deltas = assemble([*tokens_of("h"), *euro, *tokens_of("e")])
    assert [offset for _, offset in told(deltas)] == [0, 1, 1, 1, 2]


def test_a_stop_string_cuts_text_and_tokens_alike() -> None:
    deltas = assemble(tokens_of("h", "e", "x", "y", "z"), stop=["xy"])
    assert "".join(delta.text for delta in deltas) == "he"
    assert told(deltas) == [(-0.0, 0), (-1.0, 1)]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, "xy")


def test_what_may_begin_a_stop_string_is_told_when_it_is_shown() -> None:
    deltas = assemble(tokens_of("h", "x", "e", "x"), stop=["xy"])
    assert [(delta.text, len(delta.logprobs)) for delta in deltas] == [("h", 1), ("", 0), ("xe", 2), ("x", 1)]
    assert [offset for _, offset in told(deltas)] == [0, 1, 2, 3]


def test_a_token_that_is_cut_in_the_middle_is_told() -> None:
    (token,) = tokens_of("hello")
    deltas = assemble([token, token], stop=["lo"])
    assert "".join(delta.text for delta in deltas) == "hel"
    assert told(deltas) == [(-0.0, 0)]


def test_the_end_token_is_told_at_the_end_of_the_text() -> None:
    deltas = assemble([*tokens_of("h", "e"), END], stop=["zz"], reason=FinishReason.STOP)
    assert told(deltas) == [(-0.0, 0), (-1.0, 1), (-2.0, 2)]
    assert deltas[-1].stop_reason is None


def test_stop_strings_count_after_min_tokens_only() -> None:
    token_ids = tokens_of("x", "y", "h", "x", "y", "e")
    for min_tokens, text in ((0, ""), (1, "xyh"), (2, "xyh"), (5, "xyhxye")):
        deltas = assemble(token_ids, stop=["xy"], min_tokens=min_tokens)
        assert "".join(delta.text for delta in deltas) == text


def test_the_prompt_s_come_with_the_first_piece() -> None:
    assembler = TextAssembler(TOKENIZER, [END], ["zz"], 0)
    of_prompt = (logprobs_of(7), logprobs_of(8))
    (token,) = tokens_of("h")
    assert assembler.push(TokenBatch(0, (token,), None, (), of_prompt)).prompt_logprobs == of_prompt
