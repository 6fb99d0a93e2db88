"""Which component is where: a pure function of sizes, wishes and free memory. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from multimodal_gen.errors import ConfigError, did_you_mean
from multimodal_gen.memory.refusal import refusal
from multimodal_gen.memory.search import Search, Way
from multimodal_gen.memory.shares import DENOISE, ONE_LAYER, MemoryPlan, Share, Sizes, Wishes
from multimodal_gen.offload import Residency
from multimodal_gen.units import size

__all__ = ["MemoryPlan", "Residency", "Share", "Sizes", "Wishes", "allowance", "plan", "plan_usual"]

RESERVE = 20  # one part in so many of the free memory is left alone where no limit says how much may be used


def plan(
    sizes: Sequence[Sizes],
    wishes: Wishes,
    working: Mapping[str, int],
    free_bytes: int,
    device: str,
    host_free: int = 0,
) -> MemoryPlan:
    """Place every component of one rank.

    Args:
        working: bytes that a stage works with beside the weights.
        free_bytes: of the device, for this rank, with nothing of the model on it; of the machine where the device is a
            CPU.
        host_free: of the machine, for this rank, where the device is another; 0: nothing is kept there.

    Raises: ConfigError (`param` is the setting) naming both numbers and the flag that would make it fit.
    """
    _check(sizes, wishes, _kind(device))
    limit = allowance(wishes.device_limit, free_bytes)
    search = Search(sizes, wishes, working, _kind(device))
    way = search.best(limit)
    if way is None:
        raise refusal(search, limit, allowance(None, free_bytes), device)
    return _made(search, way, free_bytes, host_free)


def plan_usual(
    sizes: Sequence[Sizes],
    wishes: Wishes,
    usual: Mapping[str, int],
    least: Mapping[str, int],
    free_bytes: int,
    device: str,
    host_free: int = 0,
) -> tuple[MemoryPlan, str | None]:
    """(plan, what to warn of): for requests of the default size, or with all room that there can be for smaller ones.

    Args:
        usual: what stages work with for a request of the default size.
        least: for the smallest request that the model takes. The other arguments are those of `plan`.

    Raises: as `plan`, where not even the smallest request would fit.
    """
    try:
        return plan(sizes, wishes, usual, free_bytes, device, host_free), None
    except ConfigError:
        plan(sizes, wishes, least, free_bytes, device, host_free)  # raises in the same words with other numbers
    search = Search(sizes, wishes, least, _kind(device))
    way = search.smallest()
    need = Search(sizes, wishes, usual, _kind(device)).smallest().peak
    limit = allowance(wishes.device_limit, free_bytes)
    warning = (
        f"A request of the model's default size needs {size(need)} at the least, and {size(limit)} are available: it "
        f"may run out of memory. Weights take {size(way.weights)} of them, so that smaller requests fit."
    )
    return _made(search, way, free_bytes, host_free), warning


def _kind(device: str) -> str:
    return "cpu" if device.partition(":")[0] == "cpu" else "cuda"


def _made(search: Search, way: Way, free_bytes: int, host_free: int) -> MemoryPlan:
    wishes, on_cpu = search.wishes, search.kind == "cpu"
    host, pinned = _on_cpu(way, wishes, free_bytes) if on_cpu else _on_host(way, search.sizes, wishes, host_free)
    limit = allowance(wishes.device_limit, free_bytes)
    return MemoryPlan(way.shares, way.slots, way.slot_bytes, way.peak, limit, host, pinned)


def allowance(limit: int | None, free_bytes: int) -> int:
    """What may be used of the free memory."""
    return free_bytes - free_bytes // RESERVE if limit is None else min(limit, free_bytes)


def _on_cpu(way: Way, wishes: Wishes, free_bytes: int) -> tuple[int, int]:
    """(host, pinned): files may stay in the page cache where the weights and the work leave room."""
    if wishes.host_limit is not None:
        return min(wishes.host_limit, free_bytes), 0
    return max(0, free_bytes - (wishes.device_limit or way.peak)), 0


def _on_host(way: Way, sizes: Sequence[Sizes], wishes: Wishes, host_free: int) -> tuple[int, int]:
    """(host, pinned): what is not on the device at all times is kept in RAM, as far as there is room."""
    away = sum(part.total - way.shares[part.name].held(part) for part in sizes)
    host = min(away, allowance(wishes.host_limit, host_free))
    return host, min(host, host_free // 2 if wishes.pin is None else wishes.pin)


def _check(sizes: Sequence[Sizes], wishes: Wishes, kind: str) -> None:
    """Raises: ConfigError for wishes that this model or this device cannot honour."""
    parts = {part.name: part for part in sizes}
    for name, asked in wishes.components.items():
        if name not in parts:
            raise ConfigError(
                f"--offload-components names {name!r}, and this model has {', '.join(parts)}."
                f"{did_you_mean(name, parts)}",
                param="offload_components",
            )
        if asked == "streamed" and not parts[name].layers:
            raise ConfigError(
                f"--offload-components {name}=streamed cannot be: {name} has no list of layers. Say {name}=parked.",
                param="offload_components",
            )
        if asked is None and wishes.offload == "none":
            raise ConfigError(
                f"--offload none keeps all on the device, and --offload-components names {name}: say how, as in "
                f"{name}=parked, or drop one of the two.",
                param="offload_components",
            )
    streams = wishes.offload in ("auto", "layerwise") or "streamed" in wishes.components.values()
    if wishes.resident_layers is not None and not streams:
        raise ConfigError(
            f"--resident-layers {wishes.resident_layers} is about streamed layers, and --offload {wishes.offload} "
            "streams none: use --offload layerwise, or leave it out.",
            param="resident_layers",
        )
    if wishes.resident_layers is not None and not any(p.layers for p in sizes if p.stage == DENOISE):
        raise ConfigError(
            "--resident-layers is about the layers of a transformer, and this model's cannot be streamed.",
            param="resident_layers",
        )
    if wishes.prefetch != ONE_LAYER and not streams:
        raise ConfigError(
            f"--prefetch-layers {wishes.prefetch} is about streamed layers, and --offload {wishes.offload} streams "
            "none: use --offload layerwise, or leave it out.",
            param="prefetch_layers",
        )
    _check_host(wishes, kind)
    _check_pin(wishes, kind)


def _check_host(wishes: Wishes, kind: str) -> None:
    """Where all is on a GPU, nothing is kept in the host's memory."""
    stays = wishes.offload == "none" and not any(kind != "resident" for kind in wishes.components.values())
    for name, value in (("host_memory_limit", wishes.host_limit), ("pin_memory", wishes.pin)):
        if kind == "cuda" and stays and value is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} is about weights that are not on the GPU, and --offload none keeps all there: leave it out.",
                param=name,
            )


def _check_pin(wishes: Wishes, kind: str) -> None:
    if wishes.pin is None:
        return
    if kind == "cpu":
        raise ConfigError(
            "--pin-memory is about copies to a GPU and has no effect on a CPU; leave it out.", param="pin_memory"
        )
    if wishes.host_limit is not None and wishes.pin > wishes.host_limit:
        raise ConfigError(
            f"--pin-memory asks for {size(wishes.pin)} of the {size(wishes.host_limit)} that --host-memory-limit "
            "allows; it must be within them.",
            param="pin_memory",
        )
