"""Why a model does not fit, and which flag would make it fit. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from multimodal_gen.errors import ConfigError
from multimodal_gen.memory.search import Search
from multimodal_gen.memory.shares import Wishes
from multimodal_gen.offload import Prefetch
from multimodal_gen.units import at_least, size


def refusal(search: Search, limit: int, available: int, device: str) -> ConfigError:
    """The error for wishes that no way satisfies within `limit`.

    Args:
        available: bytes that could be allowed if no limit were set.
    """
    wishes = search.wishes
    way = search.smallest()
    need = search.needs(way)
    within = f"--device-memory-limit allows {size(limit)}" if wishes.device_limit else f"{size(limit)} are available"
    streams = f", of which {way.slots} x {size(way.slot_bytes)} for streamed layers" if way.slots else ""
    what = "for its weights alone" if wishes.offload == "none" else "at the least"
    fix = next(_remedies(search, limit), None) or _more_memory(wishes, need, available)
    return ConfigError(
        f"The model does not fit on {device}: with {_shown(wishes)} it needs {size(need)} {what}{streams}, and "
        f"{within}. {fix}",
        param=_at_fault(search, limit),
    )


def _remedies(search: Search, limit: int) -> Iterator[str]:
    """Changes of one flag that would make it fit, the mildest first."""
    for wishes, text in _changes(search):
        found = Search(search.sizes, wishes, search.working, search.kind)
        try:
            way = found.best(limit)
        except ConfigError:  # a prefetch that is too small for a layer is no remedy
            continue
        if way is not None:
            yield f"{text}, with {size(found.needs(way))}."


def _changes(search: Search) -> Iterator[tuple[Wishes, str]]:
    wishes = search.wishes
    if wishes.resident_layers:
        for count in range(min(wishes.resident_layers, _longest(search)) - 1, -1, -1):
            yield replace(wishes, resident_layers=count), f"--resident-layers {count} is the most that fits"
    if wishes.offload != "auto":
        yield replace(wishes, offload="auto", resident_layers=None), "--offload auto would fit"
    if wishes.components:
        yield replace(wishes, components={}), "Without --offload-components it would fit"
    if wishes.prefetch.count:
        for count in range(max(search.smallest().slots - 2, 0), -1, -1):
            yield replace(wishes, prefetch=Prefetch(count)), f"--prefetch-layers {count} would fit"
    plain = Wishes(prefetch=Prefetch(0), device_limit=wishes.device_limit)
    yield plain, "--offload auto --prefetch-layers 0, without the other offload flags, would fit"


def _more_memory(wishes: Wishes, need: int, available: int) -> str:
    if wishes.device_limit is not None and need <= available:
        return f"--device-memory-limit {at_least(need)} would make it fit."
    return (
        f"Free {at_least(need - available)} more, or choose a smaller model, a --dtype of two bytes, or more devices "
        "with --tp-size."
    )


def _shown(wishes: Wishes) -> str:
    """The flags that decided."""
    named = [name if kind is None else f"{name}={kind}" for name, kind in wishes.components.items()]
    parts = [f"--offload {wishes.offload}", *(f"--offload-components {name}" for name in named)]
    if wishes.resident_layers is not None:
        parts.append(f"--resident-layers {wishes.resident_layers}")
    return " ".join(parts)


def _at_fault(search: Search, limit: int) -> str:
    """The setting that the error is about."""
    wishes = search.wishes
    if wishes.resident_layers:
        fewer = Search(search.sizes, replace(wishes, resident_layers=0), search.working, search.kind)
        if fewer.best(limit) is not None:
            return "resident_layers"
    if wishes.offload != "auto":
        return "offload"
    return "offload_components" if wishes.components else "device_memory_limit"


def _longest(search: Search) -> int:
    return max(len(part.layers) for part in search.sizes)
