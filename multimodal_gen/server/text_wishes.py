"""What requests for text are settled by alike: which model and adapter, what the engine is asked, who waits for it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from multimodal_gen.errors import (
    CapacityError,
    InvalidValue,
    ModelNotFound,
    UnknownParameter,
    UnsupportedEndpoint,
    UnsupportedParameter,
    did_you_mean,
)
from multimodal_gen.llm.adapter_names import read_name, split_model
from multimodal_gen.llm.answers import Answers
from multimodal_gen.llm.asking import TextParams, settle
from multimodal_gen.llm.front import TextFront
from multimodal_gen.messages import TextDelta, TextFinished
from multimodal_gen.server.context import Context, fingerprint
from multimodal_gen.server.text_formats import Rule
from multimodal_gen.server.text_loras import bring
from multimodal_gen.server.text_schemas import TextWish
from multimodal_gen.server.wishes import check_priority, still_loading
from multimodal_gen.text import Grammar, TextOutput

if TYPE_CHECKING:
    from multimodal_gen.engine.ticket import TextTicket
    from multimodal_gen.server.guard import Exchange

T = TypeVar("T")

_TOKEN_ID = re.compile(r"[0-9]{1,9}")
_SAME_NAME = (
    "max_tokens", "n", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens",
    "spaces_between_special_tokens", "priority", "deadline_s",
)  # fmt: skip
_OTHER_NAME = {"include_stop": "include_stop_str_in_output"}


def text_front(context: Context) -> TextFront:
    """Tokenizer, template and grammars. Raises: UnsupportedEndpoint where no language model is served."""
    if context.text is None:
        raise UnsupportedEndpoint(
            "This server has no language model; start it with --llm-path, such as mmgen serve --llm-path smollm2."
        )
    return context.text


def check_text_model(name: str | None, context: Context) -> None:
    """Raises: UnsupportedEndpoint for the model of pictures; ModelNotFound unless the name is absent or the language
    model's. Nothing is ever loaded on request."""
    names = _names(context)
    if name is None or name in names:
        return
    pictures = context.engine.cards.pictures
    if pictures is not None and name in (context.model_name, pictures.name):
        raise UnsupportedEndpoint(
            f"{name} makes {pictures.media}s; use POST /v1/{'videos' if pictures.video else 'images/generations'}.",
            param="model",
        )
    raise ModelNotFound(
        f"This server's language model is not {name[:100]!a}.{did_you_mean(name[:100], names)} It is {names[0]!r}; "
        "leave 'model' out to use it.",
        param="model",
    )


def _names(context: Context) -> list[str]:
    return list(dict.fromkeys((context.text_name, context.text_card.name)))


@dataclass(frozen=True)
class Named:
    """An adapter that a request names."""

    name: str
    param: str  # the field that names it


async def adapter_of(wish: TextWish, context: Context, exchange: Exchange) -> Named | None:
    """The adapter in `model` (`id:adapter`) or `lora_path`, loaded if it is a path; None: the base model.

    Raises: ModelNotFound, AdapterNotFound, InvalidValue; as `text_loras.bring`.
    """
    model, adapter = (None, None) if wish.model is None else split_model(wish.model, _names(context))
    check_text_model(model, context)
    if adapter is not None and wish.lora_path is not None:
        raise InvalidValue("'model' names an adapter already; leave 'lora_path' out.", param="lora_path")
    if wish.lora_path is not None:
        named = Named(await bring(read_name(wish.lora_path), context, exchange), "lora_path")
    elif adapter is not None:
        named = Named(adapter, "model")
    else:
        return None
    context.engine.text_loras.find(named.name, named.param)
    return named


def params_of(wish: TextWish, **more: Any) -> TextParams:
    """A client's wish in the words of `llm.asking`. Raises: InvalidValue."""
    given = {name: value for name, value in wish.model_dump(include=set(_SAME_NAME)).items() if value is not None}
    for name, theirs in _OTHER_NAME.items():
        value = wish.model_dump(include={theirs})[theirs]
        if value is not None:
            given[name] = value
    if wish.logit_bias:
        given["logit_bias"] = _biases(wish.logit_bias)
    return TextParams(**{**given, **{name: value for name, value in more.items() if value is not None}})


def _biases(biases: Mapping[str, float]) -> dict[int, float]:
    wrong = next((token for token in biases if not _TOKEN_ID.fullmatch(token)), None)
    if wrong is not None:
        raise InvalidValue(f"'logit_bias' goes by token ids, got {wrong[:40]!a}.", param="logit_bias")
    return {int(token): bias for token, bias in biases.items()}


def stream_usage(wish: TextWish) -> bool:
    """Whether a stream ends with its usage. Raises: InvalidValue, UnknownParameter."""
    options = wish.stream_options or {}
    if wish.stream_options is not None and not wish.stream:
        raise InvalidValue("'stream_options' needs 'stream': true.", param="stream_options")
    for name, value in options.items():
        if name not in ("include_usage", "include_obfuscation"):
            raise UnknownParameter(f"Unknown field {name[:64]!a} in stream_options.", param="stream_options")
        if not isinstance(value, (bool, type(None))):
            raise InvalidValue(f"stream_options.{name} must be true or false.", param="stream_options")
    if options.get("include_obfuscation"):
        raise UnsupportedParameter("Chunks are not padded: leave include_obfuscation out.", param="stream_options")
    return bool(options.get("include_usage"))


async def compiled(rule: Rule | None, front: TextFront) -> Grammar | None:
    """Compiled in the helper process, once for all who wait for it. Raises: InvalidValue, naming the field."""
    return None if rule is None else await front.grammars.compile(rule.kind, rule.source, rule.param)


def submit(
    context: Context,
    exchange: Exchange,
    wish: TextWish,
    prompts: Iterable[Sequence[int]],
    params: TextParams,
    *,
    grammar: Grammar | None,
    adapter: Named | None,
    names: Mapping[str, str],
) -> list[TextTicket]:
    """One admitted request for each prompt, or none. `names`: field of `TextParams` → the client's name for it.

    Raises: the InvalidValue family, naming the field; CapacityError.
    """
    check_priority(wish.priority, context.config.max_priority)
    ready = context.engine.ready
    try:
        if ready is None or ready.text is None:
            raise still_loading()
        # Found again: nothing may come between this and its use by the request.
        digest = None if adapter is None else context.engine.text_loras.find(adapter.name, adapter.param)
        requests = [
            settle(
                exchange.work_id(),
                prompt,
                params,
                card=context.text_card,
                context=ready.text.context,
                grammar=grammar,
                adapter=digest,
                fair_key=fingerprint(exchange.owner, wish.safety_identifier or wish.user or ""),
                routing_key=exchange.routing_key,
            )
            for prompt in prompts
        ]
        tickets: list[TextTicket] = []
        try:
            for request in requests:
                tickets.append(context.engine.submit_text(request))
        except CapacityError:
            for ticket in tickets:
                ticket.cancel()
            raise
    except CapacityError as error:
        context.metrics.rejected(error.code)
        raise
    except InvalidValue as error:
        error.param = names.get(error.param or "", error.param)
        raise
    return tickets


async def collected(ticket: TextTicket) -> tuple[list[TextOutput], TextFinished]:
    """All answers to one prompt. Raises: the request's error."""
    answers = Answers(ticket.request)
    async for event in ticket:
        if isinstance(event, TextDelta):
            answers.note(event)
        elif isinstance(event, TextFinished):
            return answers.outputs(event), event
    raise AssertionError("a ticket's stream ends with TextFinished or an error")


async def in_thread(context: Context, work: Callable[[], T]) -> T:
    """Work that would keep other requests waiting: tokenizing, writing large answers."""
    return await asyncio.get_running_loop().run_in_executor(context.encoders, work)
