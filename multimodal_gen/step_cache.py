"""Step caches, as they are asked for: which denoising steps may be extrapolated from others instead of computed.

    first-block:threshold=0.1,order=1,warmup=6,most=3
    taylor:interval=2,order=1,warmup=6
    none

A method alone, `taylor`, takes the defaults of the fields below. What they do is in `pipelines/stages/step_cache.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from multimodal_gen.errors import did_you_mean

NONE = "none"


class StepCache(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both methods have."""

    order: Annotated[int, Meta(ge=0, le=2)] = 1
    """of the polynomial through the last computed steps; 0 repeats the last one"""
    warmup: Annotated[int, Meta(ge=1, le=1000)] = 6
    """steps at the beginning that are always computed; the last step is, too"""

    @property
    def first(self) -> int:
        """The first step that can be extrapolated, counted from 0."""
        return max(self.warmup, self.order + 1)

    def acts_in(self, steps: int) -> bool:
        """Whether a run of so many steps has any that can be extrapolated."""
        return self.first < steps - 1


class FirstBlock(StepCache, frozen=True, kw_only=True, tag="first-block"):
    """A step is extrapolated where the first block adds nearly what it added when all blocks were last computed
    (ParaAttention's first-block cache, Cheng, 2024)."""

    threshold: Annotated[float, Meta(gt=0, le=10)] = 0.1
    """mean absolute change of what the block adds, as a share of its mean absolute value"""
    most: Annotated[int, Meta(ge=1, le=1000)] = 3
    """extrapolated steps in a row"""


class Taylor(StepCache, frozen=True, kw_only=True, tag="taylor"):
    """Every n-th step is computed, those between are extrapolated (TaylorSeer: Liu et al., 2025)."""

    interval: Annotated[int, Meta(ge=2, le=100)] = 2
    """steps from one that is computed to the next"""


AnyStepCache = FirstBlock | Taylor
METHODS: dict[str, type[FirstBlock] | type[Taylor]] = {"first-block": FirstBlock, "taylor": Taylor}
FIELDS = ("threshold", "interval", "order", "warmup", "most")  # in the order of writing


def read(text: object) -> AnyStepCache | None:
    """What `METHOD` or `METHOD:KEY=VALUE,…` asks for; None for `none`. Raises: ValueError saying what is wrong."""
    if not isinstance(text, str):
        raise ValueError(f"it is none, a method, or METHOD:KEY=VALUE,…, not {type(text).__name__}")
    name, colon, rest = (part.strip() for part in text.partition(":"))
    names = (NONE, *METHODS)
    if name not in names:
        raise ValueError(f"{name[:40]!r} is not one of {', '.join(names)}{_hint(name, names)}")
    if name == NONE:
        if colon:
            raise ValueError("none takes no values")
        return None
    method = METHODS[name]
    return _made(name, method, _pairs(name, method, rest) if colon else {})


def _hint(name: str, known: Iterable[str]) -> str:
    """Whoever raises goes on behind it."""
    hint = did_you_mean(name, known)
    return f" ({hint.strip()})" if hint else ""


def write(cache: AnyStepCache | None) -> str:
    """The normal form, every value included, so that it means the same when defaults have changed."""
    if cache is None:
        return NONE
    name = next(name for name, method in METHODS.items() if isinstance(cache, method))
    values = msgspec.structs.asdict(cache)
    return f"{name}:" + ",".join(f"{key}={values[key]!r}" for key in FIELDS if key in values)


def parse_step_cache(value: object) -> str:
    """`--step-cache` in normal form. Raises: ValueError saying what is wrong."""
    return write(read(value))


def _pairs(name: str, method: type[StepCache], text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise ValueError(f"{item.strip()[:40]!r} is no KEY=VALUE, as in {name}:order=1")
        if key not in method.__struct_fields__:
            known = [field for field in FIELDS if field in method.__struct_fields__]
            raise ValueError(f"{name} has no {key[:40]!r}, but {', '.join(known)}{_hint(key, known)}")
        if key in found:
            raise ValueError(f"{key} is there twice")
        found[key] = value
    return found


def _made(name: str, method: type[FirstBlock] | type[Taylor], values: dict[str, str]) -> AnyStepCache:
    given: dict[str, Any] = {"type": name, **values}
    try:
        return msgspec.convert(given, method, strict=False)
    except msgspec.ValidationError as error:
        why, _, where = str(error).partition(" - at `$.")
        raise ValueError(f"{where.rstrip('`')} of {name}: {why[0].lower()}{why[1:].replace('`', '')}") from None
