"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from engine.api.answer import AnswerHead, ChoiceText, answer
from engine.api.fanout import ChoiceDelta
from engine.api.logprobs import completion_logprobs, echoed_logprobs, joined, prompt_logprobs
from engine.api.openapi import answer_responses
from engine.api.protocol import DEFAULT_COMPLETION_TOKENS, CompletionRequest
from engine.api.replies import CompletionChoice, CompletionLogprobs, CompletionReply, PromptLogprobs, Usage
from engine.api.serving import Serving, TokenLimit, TokenPrompt, make_jobs
from engine.outputs import OutputLogprobs
from engine.tokenizer import Tokenizer
from scheduler.request import TokenLogprobs


@dataclass(frozen=True, slots=True)
class CompletionOptions:
    """What a request wants to be told beside the text."""

    show_token_ids: bool
    echo: bool
    num_logprobs: int | None
    num_prompt_logprobs: int | None

    @classmethod
    def of(cls, body: CompletionRequest) -> CompletionOptions:
        return cls(bool(body.return_token_ids), bool(body.echo), body.logprobs, body.prompt_logprobs)


class CompletionFormat:
    """The ``AnswerFormat`` of completions."""

    def __init__(
        self, head: AnswerHead, options: CompletionOptions, tokenizer: Tokenizer, prompts: Sequence[TokenPrompt]
    ) -> None:
        """``prompts``: one for each choice."""
        self._head = head
        self._options = options
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._echoes = [_text_of(prompt, tokenizer) if options.echo else "" for prompt in prompts]
        self._begun: set[int] = set()

    def opening(self, num_choices: int) -> Iterable[CompletionReply]:
        return ()

    def chunk(self, piece: ChoiceDelta, usage: Usage | None) -> CompletionReply:
        delta = piece.delta
        is_first = piece.index not in self._begun
        self._begun.add(piece.index)
        choice = CompletionChoice(
            piece.index,
            (self._echoes[piece.index] if is_first else "") + delta.text,
            delta.finish_reason,
            delta.stop_reason,
            delta.token_ids if self._options.show_token_ids else None,
            self._logprobs(piece.index, delta.logprobs, delta.prompt_logprobs, is_first),
        )
        return self._reply((choice,), usage)

    def usage_chunk(self, usage: Usage) -> CompletionReply:
        return self._reply((), usage)

    def whole(self, choices: Sequence[ChoiceText], usage: Usage) -> CompletionReply:
        told = (
            CompletionChoice(
                one.index,
                self._echoes[one.index] + one.text,
                one.finish_reason,
                one.stop_reason,
                tuple(one.token_ids) if self._options.show_token_ids else None,
                self._logprobs(one.index, one.logprobs, one.prompt_logprobs, is_first=True),
                self._prompt_logprobs(one),
            )
            for one in choices
        )
        return self._reply(tuple(told), usage)

    def _logprobs(
        self, index: int, outputs: Sequence[OutputLogprobs], prompt: Sequence[TokenLogprobs], is_first: bool
    ) -> CompletionLogprobs | None:
        count = self._options.num_logprobs
        if count is None:
            return None
        told = completion_logprobs(self._tokenizer, outputs, count, len(self._echoes[index]))
        if not self._options.echo or not is_first:
            return told
        return joined(echoed_logprobs(self._tokenizer, self._prompts[index].token_ids, prompt, count), told)

    def _prompt_logprobs(self, one: ChoiceText) -> PromptLogprobs | None:
        count = self._options.num_prompt_logprobs
        if count is None:
            return None
        return prompt_logprobs(self._tokenizer, self._prompts[one.index].token_ids, one.prompt_logprobs, count)

    def _reply(self, choices: tuple[CompletionChoice, ...], usage: Usage | None) -> CompletionReply:
        return CompletionReply(self._head.id, self._head.created, self._head.model, choices, usage)


def _text_of(prompt: TokenPrompt, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text


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
        sender = serving.sender_of(body, request)
        prompts = await _token_prompts(serving, body)
        tokenizer = serving.engine.tokenizer
        limit = TokenLimit(body.max_tokens, DEFAULT_COMPLETION_TOKENS)
        jobs = make_jobs(body, prompts, limit, model, tokenizer, sender)
        of_choices = [prompt for prompt in prompts for _ in range(body.num_choices)]
        head = AnswerHead.make("cmpl", model.names[0])
        style = CompletionFormat(head, CompletionOptions.of(body), tokenizer, of_choices)
        return await answer(serving, body, jobs, style, request, started_s)

    return router


async def _token_prompts(serving: Serving, body: CompletionRequest) -> list[TokenPrompt]:
    """An empty text stays empty, though a tokenizer may put a begin token before it."""
    prompts = body.prompts
    result: list[TokenPrompt] = []
    for position, prompt in enumerate(prompts):
        param = "prompt" if len(prompts) == 1 else f"prompt[{position}]"
        if isinstance(prompt, str):
            result.append(TokenPrompt(await serving.encode(prompt) if prompt else (), param, prompt))
        else:
            result.append(TokenPrompt(prompt, param))
    return result
