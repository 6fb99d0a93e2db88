"""`enhance_prompt`: the language model beside the pictures rewrites a prompt before it is used.

It may fail, or take too long: then the prompt is used as it was written, and a warning says why. The instructions stay
in the prefix cache for good; the answer is JSON by grammar.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from multimodal_gen.errors import Cancelled, DeadlineExceeded, MmgenError, UnsupportedParameter
from multimodal_gen.llm.asking import TextParams, settle
from multimodal_gen.llm.front import TextFront
from multimodal_gen.server.context import Context, fingerprint
from multimodal_gen.server.schemas import ImageGenerationRequest
from multimodal_gen.server.text_wishes import collected, in_thread
from multimodal_gen.server.video_schemas import VideoSettings

if TYPE_CHECKING:
    from multimodal_gen.request import AnyRequest
    from multimodal_gen.server.guard import Exchange

Wish = TypeVar("Wish", ImageGenerationRequest, VideoSettings)

FIELD = "enhance_prompt"
ANSWER_TOKENS = 200
LEAST_DEADLINE_S = 1e-3
INSTRUCTIONS = (
    "You rewrite short prompts for a model that makes pictures and videos. Keep everything that the user asks for. Add "
    "what is missing: details of the subject, surroundings, composition, light, colours and style. Answer with one "
    'JSON object: "prompt" is the new prompt in one or two sentences, "negative_prompt" names what must not be seen, '
    'or is empty.\nFor the prompt "a cat" you answer {"prompt": "A fluffy orange cat sits on a sunny window sill, soft '
    'morning light, warm colours, shallow depth of field, detailed fur", "negative_prompt": "blurry, deformed"}'
)
# Bounds on the lengths of strings would take the grammar's compiler seconds; ANSWER_TOKENS is the bound.
SCHEMA = {
    "type": "object",
    "properties": {"prompt": {"type": "string"}, "negative_prompt": {"type": "string"}},
    "required": ["prompt", "negative_prompt"],
    "additionalProperties": False,
}
_BEGUN = re.compile(r'\s*\{\s*"prompt"\s*:\s*("(?:[^"\\]|\\.)*)', re.DOTALL)
_ENDS = (".", "!", "?", ",", ";")  # where a text that was cut off may end

log = logging.getLogger("multimodal_gen.server")


class Revision(msgspec.Struct, frozen=True):
    """What the language model answers, by the grammar of `SCHEMA`."""

    prompt: str
    negative_prompt: str = ""


@dataclass(frozen=True)
class Enhanced:
    """What came of it."""

    revision: Revision | None  # None: nobody asked for one, or it failed
    warnings: tuple[str, ...] = ()  # why it failed
    seconds: float = 0.0

    def applied(self, wish: Wish, settled: AnyRequest, *, guided: bool) -> Wish:
        """The wish with the new prompt, and with what was settled by chance. A negative prompt of the user's own stays,
        and none is put where nothing reads it (`guided`)."""
        if self.revision is None:
            return wish
        update: dict[str, Any] = {"prompt": self.revision.prompt, "seed": list(settled.seeds)}
        if guided and self.revision.negative_prompt and wish.negative_prompt is None:
            update["negative_prompt"] = self.revision.negative_prompt
        return wish.model_copy(update=update)


def is_guided(settled: AnyRequest, context: Context) -> bool:
    """Whether a request reads a negative prompt."""
    card = context.card
    return "negative_prompt" in card.parameters and settled.guidance_scale > card.guidance_threshold


async def enhance(
    wish: ImageGenerationRequest | VideoSettings,
    settled: AnyRequest,
    context: Context,
    exchange: Exchange,
    deadline_s: float | None = None,
) -> Enhanced:
    """Rewrite the prompt of a wish that asks for it.

    Args:
        settled: what the wish comes to as it is; its seed is the language model's, too.

    Raises: UnsupportedParameter without a language model that chats; Cancelled. All else is told by a warning.
    """
    if not wish.enhance_prompt:
        return Enhanced(None)
    front = _front(context)
    limit = min(context.config.enhance_timeout_s, deadline_s or context.config.enhance_timeout_s)
    began = time.monotonic()
    try:
        revision = await asyncio.wait_for(_ask(wish, settled, front, context, exchange, limit), limit)
        why = None if revision is not None else "the language model did not come to an end"
    except (asyncio.TimeoutError, DeadlineExceeded):
        revision, why = None, f"the language model took longer than {limit:g} s"
    except Cancelled:  # by the user, who wants no picture either
        raise
    except MmgenError as error:
        log.warning("%s: the prompt was not enhanced: %s", exchange.request_id, error.message)
        revision, why = None, error.message.rstrip(".")
    context.metrics.prompt_enhanced("ok" if revision else "failed")
    told = () if why is None else (f"The prompt was used as it was written: {why}.",)
    return Enhanced(revision, told, time.monotonic() - began)


def time_left(deadline_s: float | None, enhanced: Enhanced) -> float | None:
    """Of a deadline that covers all of a request."""
    return None if deadline_s is None else max(LEAST_DEADLINE_S, deadline_s - enhanced.seconds)


def _front(context: Context) -> TextFront:
    if context.text is None:
        raise UnsupportedParameter(
            f"'{FIELD}' needs a language model, and this server has none; start it with --llm-path, such as "
            "--llm-path smollm2.",
            param=FIELD,
        )
    if context.text.template is None:
        raise UnsupportedParameter(
            f"'{FIELD}' needs a language model that chats; {context.text.card.name} has no chat template.", param=FIELD
        )
    return context.text


async def _ask(
    wish: ImageGenerationRequest | VideoSettings,
    settled: AnyRequest,
    front: TextFront,
    context: Context,
    exchange: Exchange,
    limit: float,
) -> Revision | None:
    """The language model's answer; None for one that was cut off. Raises: as `EngineClient.submit_text`; its error."""
    grammar = await front.grammars.compile("json_schema", msgspec.json.encode(SCHEMA).decode(), FIELD)
    prompt = await in_thread(context, partial(_written, front, wish.prompt))
    request = settle(
        exchange.work_id(),
        prompt,
        TextParams(
            max_tokens=ANSWER_TOKENS,
            temperature=0.5,
            top_p=0.9,
            repetition_penalty=1.05,
            seed=settled.seeds[0],
            priority=wish.priority or 0,
            deadline_s=limit,
        ),
        card=front.card,
        context=context.engine.text_context,
        grammar=grammar,
        fair_key=fingerprint(exchange.owner, wish.safety_identifier or wish.user or ""),
        keep_prefix=instructions_tokens(front),
    )
    ticket = context.engine.submit_text(request)
    with context.running.hold(exchange.owner, exchange.request_id, ticket):
        (output,), _ = await collected(ticket)
    return read_revision(output.text)


def read_revision(text: str) -> Revision | None:
    """What the language model has written; where it was cut off, its whole sentences or phrases. None for nothing."""
    try:
        revision: Revision | None = msgspec.json.decode(text, type=Revision)
    except msgspec.DecodeError:
        revision = _cut_off(text)
    if revision is None or not revision.prompt.strip():
        return None
    return Revision(" ".join(revision.prompt.split()), " ".join(revision.negative_prompt.split()))


def _cut_off(text: str) -> Revision | None:
    begun = _BEGUN.match(text)
    if begun is None:
        return None
    end = max(begun[1].rfind(mark) for mark in _ENDS)
    try:
        return None if end < 1 else Revision(msgspec.json.decode(begun[1][: end + 1].rstrip(",;") + '"', type=str))
    except msgspec.DecodeError:
        return None


def _written(front: TextFront, prompt: str) -> list[int]:
    assert front.template is not None, "checked before"
    messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": prompt}]
    return front.template.encode(front.tokenizer, messages)


@lru_cache(maxsize=8)
def instructions_tokens(front: TextFront) -> int:
    """How many tokens at the start of the question are the same whatever the prompt."""
    return _common(_written(front, "a cat"), _written(front, "Zebras"))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
