"""`POST /v1/tokenize` and `POST /v1/detokenize`: what the language model reads for a text, and back."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from multimodal_gen.errors import InvalidValue
from multimodal_gen.llm.front import TextFront
from multimodal_gen.server.chat import conversation
from multimodal_gen.server.context import Context
from multimodal_gen.server.errors import ERROR_RESPONSES
from multimodal_gen.server.json_body import MAX_VALUES, parse_object
from multimodal_gen.server.schemas import Unknown
from multimodal_gen.server.text_schemas import DetokenizeWish, TokenizeWish, read_wish
from multimodal_gen.server.text_wishes import check_text_model, in_thread, text_front
from multimodal_gen.server.tool_wishes import read_tools


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def router(context: Context) -> APIRouter:
    """The tokenizer routes of one server."""
    routes = APIRouter(tags=["text"], responses=ERROR_RESPONSES)

    @routes.post(
        "/v1/tokenize",
        summary="Tokens of a text or a conversation",
        openapi_extra=_body(TokenizeWish.model_json_schema()),
    )
    async def tokenize(request: Request) -> Response:
        front = text_front(context)
        wish, _ = read_wish(parse_object(await request.body()), TokenizeWish, context.config.unknown_fields)
        check_text_model(wish.model, context)
        ready = context.engine.ready
        longest = front.card.context if ready is None or ready.text is None else ready.text.context
        work = partial(_tokens, wish, front, context.config.unknown_fields, context.text_name, longest)
        return Response(await in_thread(context, work), media_type="application/json")

    @routes.post("/v1/detokenize", summary="Text of tokens", openapi_extra=_body(DetokenizeWish.model_json_schema()))
    async def detokenize(request: Request) -> dict[str, Any]:
        front = text_front(context)
        body = parse_object(await request.body(), MAX_VALUES + front.card.context)
        wish, _ = read_wish(body, DetokenizeWish, context.config.unknown_fields)
        check_text_model(wish.model, context)
        if not all(0 <= token < front.card.vocab_size for token in wish.tokens):
            raise InvalidValue(
                f"'tokens' holds an id that this model does not have; they go from 0 to {front.card.vocab_size - 1:,}.",
                param="tokens",
            )
        decode = partial(front.tokenizer.decode, wish.tokens, skip_special_tokens=wish.skip_special_tokens is True)
        return {"model": context.text_name, "text": await in_thread(context, decode)}

    return routes


def _tokens(wish: TokenizeWish, front: TextFront, unknown: Unknown, model: str, longest: int) -> bytes:
    """The answer's body. Raises: as `_ids`."""
    ids = _ids(wish, front, unknown)
    answer: dict[str, Any] = {"model": model, "tokens": ids, "count": len(ids), "max_model_len": longest}
    if wish.return_token_strs:
        answer["token_strs"] = [front.tokenizer.token_text(token) for token in ids]
    return msgspec.json.encode(answer)


def _ids(wish: TokenizeWish, front: TextFront, unknown: Unknown) -> list[int]:
    """Raises: InvalidValue; as `conversation`."""
    if (wish.prompt is None) == (wish.messages is None):
        raise InvalidValue("Give either 'prompt' or 'messages'.", param="prompt")
    if wish.messages is None:
        for name in ("tools", "chat_template_kwargs", "add_generation_prompt"):
            if wish.model_dump(include={name})[name] is not None:
                raise InvalidValue(f"{name!r} belongs to 'messages'.", param=name)
        return front.tokenizer.encode(wish.prompt or "", add_special=wish.add_special_tokens is not False)
    if wish.add_special_tokens is not None:
        raise InvalidValue(
            "'add_special_tokens' belongs to 'prompt': a conversation has what its template writes.",
            param="add_special_tokens",
        )
    return conversation(
        front,
        wish.messages,
        read_tools(wish.tools, None, None),
        wish.chat_template_kwargs,
        unknown,
        generate=wish.add_generation_prompt is not False,
    )
