"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from fastapi import APIRouter, Response

from engine.api.openapi import plain_responses
from engine.api.protocol import DetokenizeRequest, TokenizeRequest, check_messages
from engine.api.replies import DetokenizeReply, JsonReply, TokenizeReply
from engine.api.serving import Serving
from kvcache.errors import RequestError


def tokens_router(serving: Serving) -> APIRouter:
    """The routes, bound to one engine."""
    router = APIRouter()

    @router.post("/tokenize", response_model=None, responses=plain_responses(TokenizeReply))
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text, or of a conversation as the model sees it."""
        model = serving.model_named(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", "prompt")
        if body.messages is not None:
            check_messages(body.messages, serving.unknown_fields)
            ids = await serving.render_chat([message.for_template() for message in body.messages])
        else:
            ids = await serving.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        return JsonReply(TokenizeReply(len(ids), model.max_model_len, ids))

    @router.post("/detokenize", response_model=None, responses=plain_responses(DetokenizeReply))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Text of token ids, special tokens included."""
        model = serving.model_named(body.model)
        if max(body.tokens) >= model.vocab_size:
            raise RequestError(f"tokens: token ids must be below {model.vocab_size}", "tokens")
        return JsonReply(DetokenizeReply(serving.engine.tokenizer.decode(body.tokens, skip_special_tokens=False)))

    return router
