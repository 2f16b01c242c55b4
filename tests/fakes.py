"""Stand-ins for the lowest ports, so that tests replace those and not internals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from engine.outputs import SOMEBODY, Origin, QueuePlace, ServedModel, TextDelta
from engine.tokenizer import Tokenizer
from scheduler.request import FinishReason, SamplingParams
from scheduler.room import Room
from scheduler.types import ClusterSnapshot

END_TOKEN = "<|end|>"
MODEL_NAME = "tiny"


def tiny_backend(texts: Sequence[str] = ("hello world, the quick brown fox",)) -> tokenizers.Tokenizer:
    """A byte-level BPE like GPT-2's, with one special token. It can encode every text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(END_TOKEN, special=True)],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def render_plainly(messages: Sequence[dict[str, str]]) -> str:
    """Stands for a chat template; refuses what a real one might."""
    if messages[0]["role"] == "tool":
        raise ValueError("a conversation cannot begin with a tool")
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"


def deltas_of(*texts: str, reason: FinishReason = FinishReason.STOP) -> tuple[TextDelta, ...]:
    """A script: one token per text, the last of which ends the sequence."""
    last = len(texts) - 1
    return tuple(TextDelta(text, (100 + i,), reason if i == last else None) for i, text in enumerate(texts))


@dataclass(frozen=True, slots=True)
class Call:
    """One call of ``generate``."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...]
    cache_salt: bytes
    origin: Origin = SOMEBODY


@dataclass(slots=True)
class Script:
    """What one sequence does: pieces, then perhaps an error, or silence until it is closed."""

    deltas: tuple[TextDelta, ...] = ()
    error: Exception | None = None
    hangs: bool = False
    waits: bool = False  # for a place, until it is closed


class FakeEngine:
    """A ``TextEngine`` that plays scripts, the i-th call the i-th script and the last one from then on."""

    def __init__(self, *scripts: Script, max_model_len: int = 100) -> None:
        self.tokenizer = Tokenizer(tiny_backend(), render_plainly)
        self.model = ServedModel(
            names=(MODEL_NAME, "org/tiny"),
            max_model_len=max_model_len,
            created=1_700_000_000,
            eos_token_ids=(0,),
            vocab_size=self.tokenizer.vocab_size,
        )
        self.ready = True
        self.cluster = ClusterSnapshot()
        self.calls: list[Call] = []
        self.finished = 0  # sequences that played to their end or failed
        self.aborted = 0  # sequences that were closed or cancelled before it
        self.queue_places: dict[tuple[str, str], QueuePlace] = {}  # by tenant and ticket
        self.started = asyncio.Event()  # the first piece of a sequence was asked for
        self._scripts = scripts or (Script(deltas_of("hello", " world")),)

    @property
    def open(self) -> int:
        return len(self.calls) - self.finished - self.aborted

    def queue_place(self, tenant: str, ticket: str) -> QueuePlace | None:
        return self.queue_places.get((tenant, ticket))

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        stop: Sequence[str] = (),
        cache_salt: bytes = b"",
        origin: Origin = SOMEBODY,
        on_placed: Callable[[], None] = lambda: None,
    ) -> AsyncIterator[TextDelta]:
        script = self._scripts[min(len(self.calls), len(self._scripts) - 1)]
        self.calls.append(Call(tuple(prompt_token_ids), sampling, tuple(stop), cache_salt, origin))
        self.started.set()
        try:
            if script.waits:
                await asyncio.Event().wait()
            on_placed()
            for delta in script.deltas:
                await asyncio.sleep(0)
                if delta.finish_reason is not None:
                    self.finished += 1
                yield delta
            if script.hangs:
                await asyncio.Event().wait()
            if script.error is not None:
                self.finished += 1
                raise script.error
        except (GeneratorExit, asyncio.CancelledError):
            if not any(delta.finish_reason for delta in script.deltas):
                self.aborted += 1
            raise


class FakeNodeMarket:
    """An ``engine.autoscaling.NodeMarket`` that notes what it was told; the end is an empty list."""

    def __init__(self) -> None:
        self.asked: list[list[Room]] = []

    def tell(self, rooms: Sequence[Room]) -> None:
        self.asked.append(list(rooms))

    def close(self) -> None:
        self.tell(())


@dataclass(slots=True)
class ManualClock:
    """Stands still until told."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s
