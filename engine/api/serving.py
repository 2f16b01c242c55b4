"""From a checked body to sequences for the engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fastapi import Request

from engine.api.fanout import Job
from engine.api.middleware import caller_of
from engine.api.protocol import GenerationRequest
from engine.api.sampling import make_sampling, seed_of
from engine.api.unsupported import UnknownFieldLog
from engine.cache_salt import make_cache_salt
from engine.metrics import Metrics
from engine.outputs import Origin, ServedModel, TextEngine
from engine.tenant_desk import TenantDesk
from engine.tokenizer import Tokenizer
from kvcache.errors import RequestError, UnknownModelError
from scheduler.request import check_sampling, room_for_answer
from scheduler.urgency import Urgency

THREAD_FROM_CHARACTERS = 4096
"""Text from this length on is tokenized in a thread: the event loop carries everybody's streams."""
MAX_SEQUENCES = 128  # of one request: it shares the workers' queues with others
TICKET_HEADER = "X-Request-Id"
TICKET = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Serving:
    """What the routes share."""

    engine: TextEngine
    metrics: Metrics
    desk: TenantDesk
    unknown_fields: UnknownFieldLog = field(default_factory=UnknownFieldLog)

    def model_named(self, name: str | None) -> ServedModel:
        """The served model, if ``name`` is one of its names or None.

        Raises:
            UnknownModelError: it is not.
        """
        model = self.engine.model
        if name is not None and name not in model.names:
            raise UnknownModelError(
                f"the model {name[:200]!r} does not exist; this server has {model.names[0]!r}", "model"
            )
        return model

    def sender_of(self, body: GenerationRequest, request: Request) -> Sender:
        """
        Raises:
            RequestError: the class or the name that it asks for cannot be had.
        """
        caller = caller_of(request)
        urgency = Urgency(self.desk.service_class(caller.tenant, body.service_tier), body.priority or 0)
        return Sender(caller.identity, Origin(caller.tenant, urgency, ticket_of(request)))

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt."""
        tokenizer = self.engine.tokenizer
        if len(text) < THREAD_FROM_CHARACTERS:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def render_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation; see ``Tokenizer.render_chat``."""
        tokenizer = self.engine.tokenizer
        if sum(len(message["content"]) for message in messages) < THREAD_FROM_CHARACTERS:
            return tokenizer.render_chat(messages)
        return await asyncio.to_thread(tokenizer.render_chat, messages)


@dataclass(frozen=True, slots=True)
class Sender:
    """Whose request it is: for the prefix cache, for limits and order."""

    identity: str
    origin: Origin


def ticket_of(request: Request) -> str | None:
    """The name that a client gave to its request, if any. It names it for questions by the same tenant, no more.

    Raises:
        RequestError: it is no name.
    """
    ticket = request.headers.get(TICKET_HEADER)
    if ticket is not None and not TICKET.fullmatch(ticket):
        raise RequestError(f"{TICKET_HEADER} must have 1 to 128 letters, digits or any of . _ : -", TICKET_HEADER)
    return ticket


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """One prompt, and the name of the field that it came from."""

    token_ids: Sequence[int]
    param: str
    text: str | None = None  # None: it came as token ids


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """How many tokens may be generated, and the name of the field that says so."""

    max_tokens: int | None  # None: not asked for
    default: int | None  # None: the rest of the context
    param: str = "max_tokens"


def fit_to_context(prompt: TokenPrompt, limit: TokenLimit, model: ServedModel) -> int:
    """The number of tokens to generate at most, so that prompt and answer fit the model's context.

    Raises:
        RequestError: they cannot, or the prompt is empty; names the field at fault.
    """
    length = len(prompt.token_ids)
    room = room_for_answer(length, model.max_model_len, prompt.param)
    if limit.max_tokens is None:
        return room if limit.default is None else min(limit.default, room)
    if limit.max_tokens > room:
        raise RequestError(
            f"{prompt.param} has {length} tokens and {limit.param} is {limit.max_tokens}; together they exceed the "
            f"model's context of {model.max_model_len} tokens",
            limit.param,
        )
    return limit.max_tokens


def make_jobs(
    body: GenerationRequest,
    prompts: Sequence[TokenPrompt],
    limit: TokenLimit,
    model: ServedModel,
    tokenizer: Tokenizer,
    sender: Sender,
) -> list[Job]:
    """One job per prompt and choice, ordered as OpenAI indexes choices: all of the first prompt, then the next.

    The i-th choice of a prompt is sampled with ``seed + i``, whichever place the prompt has in its list; without a
    seed every choice gets one of its own.

    Raises:
        RequestError: a prompt is empty, too long, or has a token id that the model does not know; or a parameter
            does not fit the model.
    """
    if len(prompts) * body.num_choices > MAX_SEQUENCES:
        raise RequestError(
            f"{len(prompts)} prompts with n = {body.num_choices} are more than {MAX_SEQUENCES} sequences", "n"
        )
    salt = make_cache_salt(sender.identity, body.cache_salt)
    shared = make_sampling(body, model, tokenizer)
    jobs: list[Job] = []
    for prompt in prompts:
        # Scoring a prompt computes one token, which nobody is told of.
        max_tokens = fit_to_context(prompt, limit, model) or 1
        if max(prompt.token_ids) >= model.vocab_size:
            raise RequestError(f"{prompt.param}: token ids must be below {model.vocab_size}", prompt.param)
        token_ids = tuple(prompt.token_ids)
        for choice in range(body.num_choices):
            sampling = replace(shared, max_tokens=max_tokens, seed=seed_of(body, choice))
            check_sampling(sampling, vocab_size=model.vocab_size)
            scores_only = body.max_tokens == 0
            jobs.append(Job(len(jobs), token_ids, sampling, body.stop_strings, salt, scores_only, sender.origin))
    return jobs
