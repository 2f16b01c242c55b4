"""Prompts, and what transformers' own generate makes of them: the reference for every way of serving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_TOKENS = 24
EDGE_LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 200, 2000)

PASSAGE = """The lighthouse stood at the end of the pier, where the river met the sea. Every evening the keeper climbed
one hundred and twelve steps, lit the lamp, and wrote the weather into a book. In winter the waves reached the door.
Ships passed by without stopping, and he knew most of them by the sound of their engines. One night, in 1931, a boat
came without lights. He rang the bell three times, as the rule said, and waited for an answer that did not come. """

TEXTS = (
    "The capital of France is",
    "机器学习是人工智能的一个分支，它研究",  # noqa: RUF001  Chinese punctuation is meant
    "从前有一座山，山里有一座庙，庙里有",  # noqa: RUF001
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    "SELECT name, price FROM products WHERE",
    "Eins, zwei, drei, vier,",
    "🙂 🙃 🙂 🙃",
)

CHATS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada."},
        {"role": "user", "content": "What is my name?"},
    ],
    [{"role": "user", "content": "写一首关于春天的短诗。"}],
)


@dataclass(frozen=True, slots=True)
class ReferenceCase:
    name: str
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]  # greedy, float32, the end token included


def make_reference(checkpoint: Path) -> list[ReferenceCase]:
    """26 prompts with up to ``MAX_TOKENS`` greedy tokens each."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    passage = tokenizer(PASSAGE * 20)["input_ids"]
    prompts = {f"{length} tokens": passage[:length] for length in EDGE_LENGTHS}
    prompts |= {text[:20]: tokenizer(text)["input_ids"] for text in TEXTS}
    for index, chat in enumerate(CHATS):
        prompts[f"chat {index}"] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return [ReferenceCase(name, tuple(ids), _generate(model, ids)) for name, ids in prompts.items()]


def _generate(model: torch.nn.Module, prompt_token_ids: list[int]) -> tuple[int, ...]:
    ids = torch.tensor([prompt_token_ids])
    output = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False
    )
    return tuple(output[0, len(prompt_token_ids) :].tolist())
