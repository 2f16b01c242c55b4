"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastapi import APIRouter, Request, Response

from engine.api.answer import AnswerHead, ChoiceText, answer
from engine.api.fanout import ChoiceDelta
from engine.api.logprobs import chat_logprobs, prompt_logprobs
from engine.api.openapi import answer_responses
from engine.api.protocol import ChatRequest
from engine.api.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatReply,
    ChatText,
    PromptLogprobs,
    Usage,
)
from engine.api.serving import Serving, TokenLimit, TokenPrompt, make_jobs
from engine.outputs import OutputLogprobs
from engine.tokenizer import Tokenizer


class ChatFormat:
    """The ``AnswerFormat`` of chat."""

    def __init__(self, head: AnswerHead, body: ChatRequest, tokenizer: Tokenizer, prompt: TokenPrompt) -> None:
        self._head = head
        self._show_token_ids = bool(body.return_token_ids)
        self._show_logprobs = bool(body.logprobs)
        self._num_prompt_logprobs = body.prompt_logprobs
        self._tokenizer = tokenizer
        self._prompt = prompt

    def opening(self, num_choices: int) -> Iterable[ChatChunk]:
        """Each choice begins with who speaks."""
        for index in range(num_choices):
            yield self._chunk((ChatChunkChoice(index, ChatText("assistant", ""), None, None, None),), None)

    def chunk(self, piece: ChoiceDelta, usage: Usage | None) -> ChatChunk:
        delta = piece.delta
        token_ids = delta.token_ids if self._show_token_ids else None
        choice = ChatChunkChoice(
            piece.index,
            ChatDelta(delta.text),
            delta.finish_reason,
            delta.stop_reason,
            token_ids,
            self._logprobs(delta.logprobs),
        )
        return self._chunk((choice,), usage)

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return self._chunk((), usage)

    def whole(self, choices: Sequence[ChoiceText], usage: Usage) -> ChatReply:
        told = (
            ChatChoice(
                one.index,
                ChatText("assistant", one.text),
                one.finish_reason,
                one.stop_reason,
                tuple(one.token_ids) if self._show_token_ids else None,
                self._logprobs(one.logprobs),
            )
            for one in choices
        )
        of_prompt = self._prompt_logprobs(choices[0])
        return ChatReply(self._head.id, self._head.created, self._head.model, tuple(told), usage, of_prompt)

    def _logprobs(self, outputs: Sequence[OutputLogprobs]) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, outputs) if self._show_logprobs else None

    def _prompt_logprobs(self, one: ChoiceText) -> PromptLogprobs | None:
        """Of any choice: all have the same prompt."""
        if self._num_prompt_logprobs is None:
            return None
        return prompt_logprobs(self._tokenizer, self._prompt.token_ids, one.prompt_logprobs, self._num_prompt_logprobs)

    def _chunk(self, choices: tuple[ChatChunkChoice, ...], usage: Usage | None) -> ChatChunk:
        return ChatChunk(self._head.id, self._head.created, self._head.model, choices, usage)


def chat_router(serving: Serving) -> APIRouter:
    """The route, bound to one engine."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None, responses=answer_responses(ChatReply))
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Writes the assistant's next message."""
        started_s = serving.metrics.now()
        body.check(serving.unknown_fields)
        model = serving.model_named(body.model)
        sender = serving.sender_of(body, request)
        token_ids = await serving.render_chat([message.for_template() for message in body.messages])
        prompt, tokenizer = TokenPrompt(token_ids, "messages"), serving.engine.tokenizer
        jobs = make_jobs(body, [prompt], _limit(body), model, tokenizer, sender)
        style = ChatFormat(AnswerHead.make("chatcmpl", model.names[0]), body, tokenizer, prompt)
        return await answer(serving, body, jobs, style, request, started_s)

    return router


def _limit(body: ChatRequest) -> TokenLimit:
    """Under the name that the client used."""
    if body.max_completion_tokens is not None:
        return TokenLimit(body.max_completion_tokens, None, "max_completion_tokens")
    return TokenLimit(body.max_tokens, None)
