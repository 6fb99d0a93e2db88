"""What requests for images and for videos are settled by alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multimodal_gen.adapters import Pin, pins_of, read_uses
from multimodal_gen.errors import InvalidValue, ModelLoading
from multimodal_gen.server.context import Context, lost_adapters
from multimodal_gen.server.schemas import shown


def pins_for(loras: Sequence[dict[str, Any]] | None, context: Context) -> tuple[Pin, ...]:
    """The request's own adapters, else the active ones, by what they are now.

    Raises: the AdapterError family, InvalidValue, AdapterUnavailable, ModelLoading.
    """
    engine = context.engine
    if loras is None:
        if engine.loras.missing:
            raise lost_adapters(engine.loras)
        return engine.loras.active
    uses = read_uses(loras)
    if engine.ready is None:
        raise still_loading()
    return pins_of(uses, engine.loras, engine.ready.targets)


def still_loading() -> ModelLoading:
    """The answer while nobody knows the model's adapters yet."""
    return ModelLoading("The model is still loading; try again in a few seconds.", retry_after=5.0)


def check_priority(priority: int | None, most: int) -> None:
    """Raises: InvalidValue."""
    if priority is not None and priority > most:
        raise InvalidValue(
            f"'priority' may be at most {most} on this server, which is its --max-priority; got {shown(priority)}.",
            param="priority",
        )
