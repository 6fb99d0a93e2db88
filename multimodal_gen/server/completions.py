"""`POST /v1/completions`: texts gone on with, as they are."""

from __future__ import annotations

import asyncio
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter, Request, Response

from multimodal_gen.errors import Cancelled, InvalidN, InvalidValue, UnsupportedParameter
from multimodal_gen.llm.asking import TextParams, check_ids
from multimodal_gen.llm.front import TextFront
from multimodal_gen.server.completion_replies import CompletionForm, completion_body
from multimodal_gen.server.context import Context
from multimodal_gen.server.disconnect import unless_gone
from multimodal_gen.server.errors import ERROR_RESPONSES
from multimodal_gen.server.json_body import MAX_VALUES, parse_object
from multimodal_gen.server.text_formats import read_rule
from multimodal_gen.server.text_replies import Heading
from multimodal_gen.server.text_schemas import CompletionWish, read_wish
from multimodal_gen.server.text_stream import CompletionStream
from multimodal_gen.server.text_wishes import (
    adapter_of,
    collected,
    compiled,
    in_thread,
    params_of,
    stream_usage,
    submit,
    text_front,
)
from multimodal_gen.text import MAX_CHOICES

if TYPE_CHECKING:
    from multimodal_gen.server.guard import Exchange

_OPENAPI_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": CompletionWish.model_json_schema()}}}
}
DEFAULT_TOKENS = 16
"""OpenAI's"""


def router(context: Context) -> APIRouter:
    """The completion routes of one server."""
    routes = APIRouter(tags=["text"], responses=ERROR_RESPONSES)

    @routes.post("/v1/completions", summary="Go on with a text", openapi_extra=_OPENAPI_BODY)
    async def complete(request: Request) -> Response:
        exchange: Exchange = request.scope["state"]["exchange"]
        front = text_front(context)
        # Token ids of a prompt are values of the body, but cheap ones.
        body = parse_object(await request.body(), MAX_VALUES + front.card.context)
        wish, unknown = read_wish(body, CompletionWish, context.config.unknown_fields)
        adapter, rule = await adapter_of(wish, context, exchange), read_rule(wish)
        prompts = await in_thread(context, partial(_prompts, wish, front))
        params = _params(wish, len(prompts))
        form = CompletionForm(
            Heading("cmpl-" + uuid.uuid4().hex, wish.model or context.text_name),
            front.tokenizer,
            params.n,
            echoes=tuple(_echo(wish, front, at, ids) for at, ids in enumerate(prompts)) if wish.echo else (),
            written=wish.max_tokens != 0,
            logprobs=wish.logprobs is not None,
            usage_chunk=stream_usage(wish),
            warnings=tuple(f"Unknown field {name} was ignored." for name in unknown),
        )
        grammar = await compiled(rule, front)
        tickets = submit(context, exchange, wish, prompts, params, grammar=grammar, adapter=adapter, names={})
        headers = {"x-mmgen-warning": "unknown fields ignored: " + ", ".join(unknown)} if unknown else {}
        if wish.stream:
            return CompletionStream(context, exchange, tickets, form, headers)
        with context.running.hold(exchange.owner, exchange.request_id, *tickets):
            try:
                answers = await unless_gone(_all([collected(ticket) for ticket in tickets]), request.receive)
            except Cancelled:
                context.metrics.cancelled()
                raise
        content = await in_thread(context, partial(completion_body, form, answers))
        return Response(content, media_type="application/json", headers=headers)

    return routes


async def _all(waits: list[Any]) -> list[Any]:
    return list(await asyncio.gather(*waits))


def _prompts(wish: CompletionWish, front: TextFront) -> list[list[int]]:
    """Token ids of each prompt. Raises: InvalidValue."""
    several = _several(wish.prompt)
    if not several:
        raise InvalidValue("'prompt' is empty; give a text, or token ids.", param="prompt")
    if len(several) > MAX_CHOICES:
        raise InvalidValue(f"'prompt' may hold at most {MAX_CHOICES} texts, got {len(several):,}.", param="prompt")
    for prompt in several:
        if not isinstance(prompt, str):
            check_ids(prompt, "prompt", front.card.vocab_size)  # before an echo is made of them
    try:
        return [front.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in several]
    except InvalidValue as error:
        error.param = "prompt"
        raise


def _several(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    ids = [token for token in prompt if isinstance(token, int)]
    if ids:
        return [ids]
    return [each for each in prompt if not isinstance(each, int)]


def _params(wish: CompletionWish, prompts: int) -> TextParams:
    """Raises: InvalidValue, UnsupportedParameter."""
    params = params_of(wish, logprobs=wish.logprobs)
    if wish.n is not None and 0 < MAX_CHOICES < wish.n * prompts:
        raise InvalidN(
            f"'n' answers to each of {prompts} prompts are more than {MAX_CHOICES}; ask for fewer.", param="n"
        )
    if wish.max_tokens == 0:
        if not wish.echo:
            raise InvalidValue("'max_tokens' may be 0 only where 'echo' tells the prompt.", param="max_tokens")
        params = msgspec.structs.replace(params, max_tokens=1, min_tokens=0)
    elif wish.max_tokens is None:
        params = msgspec.structs.replace(params, max_tokens=DEFAULT_TOKENS)
    if wish.echo and wish.logprobs is not None:
        if wish.stream:
            raise UnsupportedParameter(
                "Log-probabilities of the prompt are not streamed: leave 'stream', 'echo' or 'logprobs' out.",
                param="echo",
            )
        params = msgspec.structs.replace(params, prompt_logprobs=True)
    return params


def _echo(wish: CompletionWish, front: TextFront, at: int, ids: list[int]) -> str:
    prompt = _several(wish.prompt)[at]
    return prompt if isinstance(prompt, str) else front.tokenizer.decode(ids, skip_special_tokens=False)
