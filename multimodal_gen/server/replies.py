"""Finished pixels → the JSON that clients get. Everything here is work for a thread, not for the event loop."""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from multimodal_gen.media.arrays import to_numpy
from multimodal_gen.media.encode import encode_image
from multimodal_gen.media.maker import Maker
from multimodal_gen.media.recipe import ImageFormat, Recipe
from multimodal_gen.messages import Array, Finished, Preview
from multimodal_gen.request import AnyRequest, ModelCard
from multimodal_gen.server.schemas import ImageGenerationRequest
from multimodal_gen.step_cache import write

# What OpenAI's answers may say of each quality that requests may ask for.
_QUALITY_MADE = {"low": "low", "high": "high", "hd": "high"}


@dataclass(frozen=True)
class Form:
    """How one request wants its images written."""

    model: str  # the name that the client knows
    output_format: ImageFormat
    compression: int
    quality: str
    tokens_per_image: int
    revised: bool = False  # whether the prompt is not the user's

    @classmethod
    def of(
        cls, wish: ImageGenerationRequest, request: AnyRequest, card: ModelCard, model: str, *, revised: bool = False
    ) -> Form:
        """The form that `wish` asks for, defaults filled in."""
        return cls(
            model=model,
            output_format=wish.output_format or "png",
            compression=100 if wish.output_compression is None else wish.output_compression,
            quality=_QUALITY_MADE.get(wish.quality or "auto", "medium"),
            tokens_per_image=request.width * request.height // card.pixels_per_token,
            revised=revised,
        )

    def facts(self, request: AnyRequest) -> dict[str, Any]:
        """The fields that every answer and event carries."""
        return {
            "size": f"{request.width}x{request.height}",
            "quality": self.quality,
            "background": "opaque",
            "output_format": self.output_format,
            **_adapters(request),
            **({} if request.step_cache is None else {"step_cache": write(request.step_cache)}),
        }

    def prompts(self, request: AnyRequest) -> dict[str, Any]:
        """What each image carries where the language model has rewritten its prompt."""
        if not self.revised:
            return {}
        return {"revised_prompt": request.prompt, "revised_negative_prompt": request.negative_prompt}

    def usage(self, prompt_tokens: int, images: int) -> dict[str, Any]:
        """Tokens in OpenAI's shape; an image counts as its transformer tokens."""
        made = self.tokens_per_image * images
        return {
            "input_tokens": prompt_tokens,
            "output_tokens": made,
            "total_tokens": prompt_tokens + made,
            "input_tokens_details": {"text_tokens": prompt_tokens, "image_tokens": 0},
            "output_tokens_details": {"text_tokens": 0, "image_tokens": made},
        }


def _adapters(request: AnyRequest) -> dict[str, Any]:
    """The adapters that were in effect; nothing for the base model."""
    if not request.loras:
        return {}
    return {
        "loras": [{"nickname": pin.nickname, "strength": pin.strength, "target": pin.tree} for pin in request.loras]
    }


def answer(
    request: AnyRequest, request_id: str, finished: Finished, form: Form, maker: Maker, warnings: list[str]
) -> bytes:
    """The body of a whole answer."""
    timings = finished.timings
    body: dict[str, Any] = {
        "created": int(time.time()),
        "id": request_id,
        "model": form.model,
        "data": [
            {
                "b64_json": _file(finished.outputs[i], form, maker.recipe(request, i, finished.merged)),
                "seed": seed,
                **form.prompts(request),
            }
            for i, seed in enumerate(request.seeds)
        ],
        **form.facts(request),
        "usage": form.usage(finished.prompt_tokens, request.n),
        "timings": {**msgspec.to_builtins(timings), "per_step": timings.per_step},
    }
    if warnings or finished.warnings:
        body["warnings"] = [*warnings, *finished.warnings]
    return msgspec.json.encode(body)


def completed_event(
    request: AnyRequest, finished: Finished, index: int, form: Form, maker: Maker, warnings: list[str]
) -> bytes:
    """`image_generation.completed` for image `index`."""
    event: dict[str, Any] = {
        "type": "image_generation.completed",
        "b64_json": _file(finished.outputs[index], form, maker.recipe(request, index, finished.merged)),
        "created_at": int(time.time()),
        **form.facts(request),
        "usage": form.usage(finished.prompt_tokens, 1),
        "index": index,
        "seed": request.seeds[index],
        **form.prompts(request),
        "timings": {**msgspec.to_builtins(finished.timings), "per_step": finished.timings.per_step},
    }
    if warnings or finished.warnings:
        event["warnings"] = [*warnings, *finished.warnings]
    return event_bytes("image_generation.completed", event)


def partial_event(request: AnyRequest, preview: Preview, form: Form) -> bytes:
    """`image_generation.partial_image`; previews carry no recipe, which would promise the final image."""
    event = {
        "type": "image_generation.partial_image",
        "b64_json": _file(preview.image, form, None),
        "partial_image_index": preview.number,
        "created_at": int(time.time()),
        **form.facts(request),
        "index": preview.index,
        "seed": request.seeds[preview.index],
    }
    return event_bytes("image_generation.partial_image", event)


def event_bytes(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"event: " + name.encode("ascii") + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


def comment_bytes(text: str) -> bytes:
    """A server-sent comment, which clients skip."""
    return b": " + text.encode("ascii") + b"\n\n"


def _file(array: Array, form: Form, recipe: Recipe | None) -> str:
    data = encode_image(to_numpy(array), form.output_format, compression=form.compression, recipe=recipe)
    return base64.b64encode(data).decode("ascii")
