"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastapi import APIRouter, Request, Response

from engine.api.answer import AnswerHead, ChoiceText, answer
from engine.api.fanout import ChoiceDelta
from engine.api.middleware import caller_of
from engine.api.openapi import answer_responses
from engine.api.protocol import ChatRequest
from engine.api.replies import ChatChoice, ChatChunk, ChatChunkChoice, ChatDelta, ChatReply, ChatText, Usage
from engine.api.serving import Serving, TokenLimit, TokenPrompt, make_jobs


class ChatFormat:
    """The ``AnswerFormat`` of chat."""

    def __init__(self, head: AnswerHead, show_token_ids: bool) -> None:
        self._head = head
        self._show_token_ids = show_token_ids

    def opening(self, num_choices: int) -> Iterable[ChatChunk]:
        """Each choice begins with who speaks."""
        for index in range(num_choices):
            yield self._chunk((ChatChunkChoice(index, ChatText("assistant", ""), None, None, None),), None)

    def chunk(self, piece: ChoiceDelta, usage: Usage | None) -> ChatChunk:
        delta = piece.delta
        token_ids = delta.token_ids if self._show_token_ids else None
        choice = ChatChunkChoice(piece.index, ChatDelta(delta.text), delta.finish_reason, delta.stop_reason, token_ids)
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
            )
            for one in choices
        )
        return ChatReply(self._head.id, self._head.created, self._head.model, tuple(told), usage)

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
        token_ids = await serving.render_chat([message.for_template() for message in body.messages])
        jobs = make_jobs(body, [TokenPrompt(token_ids, "messages")], _limit(body), model, caller_of(request))
        style = ChatFormat(AnswerHead.make("chatcmpl", model.names[0]), bool(body.return_token_ids))
        return await answer(serving, body, jobs, style, request, started_s)

    return router


def _limit(body: ChatRequest) -> TokenLimit:
    """Under the name that the client used."""
    if body.max_completion_tokens is not None:
        return TokenLimit(body.max_completion_tokens, None, "max_completion_tokens")
    return TokenLimit(body.max_tokens, None)
