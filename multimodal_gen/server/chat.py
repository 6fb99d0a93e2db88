"""`POST /v1/chat/completions`."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from multimodal_gen.errors import Cancelled, InvalidValue, UnsupportedEndpoint
from multimodal_gen.llm.front import TextFront
from multimodal_gen.llm.parsers.answer import AnswerParser
from multimodal_gen.llm.parsers.reasoning import ReasoningFormat, ReasoningParser
from multimodal_gen.llm.parsers.tools.instructions import instructed, knows_tools
from multimodal_gen.server.chat_messages import read_messages, template_variables
from multimodal_gen.server.context import Context
from multimodal_gen.server.disconnect import unless_gone
from multimodal_gen.server.errors import ERROR_RESPONSES
from multimodal_gen.server.json_body import parse_object
from multimodal_gen.server.schemas import Unknown
from multimodal_gen.server.text_formats import Forms, Shape, read_rule, shape
from multimodal_gen.server.text_replies import ChatForm, Heading, chat_body
from multimodal_gen.server.text_schemas import ChatWish, read_wish
from multimodal_gen.server.text_stream import ChatStream
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
from multimodal_gen.server.tool_wishes import ToolWish, read_tools

if TYPE_CHECKING:
    from multimodal_gen.server.guard import Exchange

_OPENAPI_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": ChatWish.model_json_schema()}}}
}
TAIL = 64
"""tokens at the end of a prompt that tell whether it has opened the reasoning"""


def router(context: Context) -> APIRouter:
    """The chat routes of one server. Raises: ConfigError for parsers that there are not."""
    routes = APIRouter(tags=["text"], responses=ERROR_RESPONSES)
    forms = Forms.of(context.config, context.text)

    @routes.post("/v1/chat/completions", summary="Answer a conversation", openapi_extra=_OPENAPI_BODY)
    async def chat(request: Request) -> Response:
        exchange: Exchange = request.scope["state"]["exchange"]
        front = text_front(context)
        wish, unknown = read_wish(parse_object(await request.body()), ChatWish, context.config.unknown_fields)
        params = params_of(wish, max_tokens=_max_tokens(wish), logprobs=_logprobs(wish))
        adapter = await adapter_of(wish, context, exchange)
        usage_chunk = stream_usage(wish)
        asked = await _asked(wish, context, front, forms)
        grammar = await compiled(asked.shape.rule, front)
        names = {"prompt": "messages"} | ({"max_tokens": "max_completion_tokens"} if wish.max_tokens is None else {})
        (ticket,) = submit(
            context, exchange, wish, [asked.prompt], params, grammar=grammar, adapter=adapter, names=names
        )
        form = ChatForm(
            Heading("chatcmpl-" + uuid.uuid4().hex, wish.model or context.text_name),
            front.tokenizer,
            partial(_parser, asked, forms.reasoning, wish),
            logprobs=bool(wish.logprobs),
            usage_chunk=usage_chunk,
            warnings=tuple(f"Unknown field {name} was ignored." for name in unknown),
        )
        headers = {"x-mmgen-warning": "unknown fields ignored: " + ", ".join(unknown)} if unknown else {}
        if wish.stream:
            return ChatStream(context, exchange, ticket, form, headers)
        with context.running.hold(exchange.owner, exchange.request_id, ticket):
            try:
                outputs, finished = await unless_gone(collected(ticket), request.receive)
            except Cancelled:
                context.metrics.cancelled()
                raise
        content = await in_thread(context, partial(chat_body, form, outputs, finished))
        return Response(content, media_type="application/json", headers=headers)

    return routes


@dataclass(frozen=True)
class Asked:
    """One conversation, ready to be sent."""

    prompt: list[int]
    tools: ToolWish
    shape: Shape
    inside: bool  # the answer begins in the middle of the reasoning


async def _asked(wish: ChatWish, context: Context, front: TextFront, forms: Forms) -> Asked:
    """Raises: UnsupportedEndpoint, UnsupportedParameter, UnknownParameter, the InvalidValue family."""
    tools = read_tools(wish.tools, wish.tool_choice, wish.parallel_tool_calls)
    rule = read_rule(wish)
    work = partial(
        conversation,
        front,
        wish.messages,
        tools if forms.tools is not None else ToolWish(),
        wish.chat_template_kwargs,
        context.config.unknown_fields,
    )
    prompt = await in_thread(context, work)
    tail = front.tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False)
    inside = forms.reasoning is not None and forms.reasoning.begins_inside(tail)
    before = None if forms.reasoning is None or forms.reasoning.is_over(tail) else forms.reasoning
    return Asked(prompt, tools, shape(rule, tools, forms.tools, before, inside=inside), inside)


def conversation(
    front: TextFront,
    messages: list[dict[str, Any]],
    tools: ToolWish,
    kwargs: dict[str, Any] | None,
    unknown: Unknown,
    *,
    generate: bool = True,
) -> list[int]:
    """Token ids of a chat, as the model's template writes it. Raises: UnsupportedEndpoint; as `read_messages`."""
    if front.template is None:
        raise UnsupportedEndpoint(f"{front.card.name} comes without a chat template; use POST /v1/completions.")
    read, variables = read_messages(messages, unknown), template_variables(kwargs)
    listed = [tool.listed() for tool in tools.offered]
    if not knows_tools(front.template.source):
        read, listed = instructed(read, tools.offered), []
    return front.template.encode(front.tokenizer, read, tools=listed or None, generate=generate, variables=variables)


def _parser(asked: Asked, reasoning: ReasoningFormat | None, wish: ChatWish) -> AnswerParser:
    """A new one for one answer."""
    separate = wish.separate_reasoning is not False
    thoughts = None if reasoning is None else ReasoningParser(reasoning, inside=asked.inside, raw=not separate)
    calls = None if asked.shape.tools is None else asked.shape.tools.parser(asked.tools.allowed)
    return AnswerParser(
        thoughts, calls, separate=separate, stream=wish.stream_reasoning is not False, parallel=asked.tools.parallel
    )


def _max_tokens(wish: ChatWish) -> int | None:
    given, other = wish.max_tokens, wish.max_completion_tokens
    if given is not None and other is not None and given != other:
        raise InvalidValue(
            "'max_tokens' is the old name of 'max_completion_tokens'; give one of them.", param="max_tokens"
        )
    return other if given is None else given


def _logprobs(wish: ChatWish) -> int | None:
    if wish.top_logprobs is not None and not wish.logprobs:
        raise InvalidValue("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    return (wish.top_logprobs or 0) if wish.logprobs else None
