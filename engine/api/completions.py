"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from engine.api.answer import AnswerHead, ChoiceText, answer
from engine.api.fanout import ChoiceDelta
from engine.api.middleware import caller_of
from engine.api.openapi import answer_responses
from engine.api.protocol import DEFAULT_COMPLETION_TOKENS, CompletionRequest
from engine.api.replies import CompletionChoice, CompletionReply, Usage
from engine.api.serving import Serving, TokenLimit, TokenPrompt, make_jobs


class CompletionFormat:
    """The ``AnswerFormat`` of completions."""

    def __init__(self, head: AnswerHead, show_token_ids: bool) -> None:
        self._head = head
        self._show_token_ids = show_token_ids

    def opening(self, num_choices: int) -> Iterable[CompletionReply]:
        return ()

    def chunk(self, piece: ChoiceDelta, usage: Usage | None) -> CompletionReply:
        delta = piece.delta
        token_ids = delta.token_ids if self._show_token_ids else None
        choice = CompletionChoice(piece.index, delta.text, delta.finish_reason, delta.stop_reason, token_ids)
        return self._reply((choice,), usage)

    def usage_chunk(self, usage: Usage) -> CompletionReply:
        return self._reply((), usage)

    def whole(self, choices: Sequence[ChoiceText], usage: Usage) -> CompletionReply:
        told = (
            CompletionChoice(
                one.index,
                one.text,
                one.finish_reason,
                one.stop_reason,
                tuple(one.token_ids) if self._show_token_ids else None,
            )
            for one in choices
        )
        return self._reply(tuple(told), usage)

    def _reply(self, choices: tuple[CompletionChoice, ...], usage: Usage | None) -> CompletionReply:
        return CompletionReply(self._head.id, self._head.created, self._head.model, choices, usage)


def completions_router(serving: Serving) -> APIRouter:
    """The route, bound to one engine."""
    router = APIRouter()
    responses: dict[int | str, dict[str, Any]] = answer_responses(CompletionReply)

    @router.post("/v1/completions", response_model=None, responses=responses)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continues one or several texts."""
        started_s = serving.metrics.now()
        body.check(serving.unknown_fields)
        model = serving.model_named(body.model)
        prompts = await _token_prompts(serving, body)
        limit = TokenLimit(body.max_tokens, DEFAULT_COMPLETION_TOKENS)
        jobs = make_jobs(body, prompts, limit, model, caller_of(request))
        style = CompletionFormat(AnswerHead.make("cmpl", model.names[0]), bool(body.return_token_ids))
        return await answer(serving, body, jobs, style, request, started_s)

    return router


async def _token_prompts(serving: Serving, body: CompletionRequest) -> list[TokenPrompt]:
    """An empty text stays empty, though a tokenizer may put a begin token before it."""
    prompts = body.prompts
    result: list[TokenPrompt] = []
    for position, prompt in enumerate(prompts):
        param = "prompt" if len(prompts) == 1 else f"prompt[{position}]"
        if isinstance(prompt, str):
            result.append(TokenPrompt(await serving.encode(prompt) if prompt else (), param))
        else:
            result.append(TokenPrompt(prompt, param))
    return result
