"""How many pages the KV cache has, how long a text may be, and how much one step reads."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from multimodal_gen import units
from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.llm.loading import TextModel
from multimodal_gen.memory.free import free_bytes
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.text import TextCard

STEP_TOKENS = {"cpu": 256, "cuda": 2048}  # a step of so many takes some times as long as one that only writes
SHARE = 5  # of what is free, a fifth is taken where nobody says how much

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Room:
    """What the settings come to for one model."""

    pages: int
    context: int  # tokens of a prompt and its answer
    step_tokens: int


def settle(model: TextModel, config: EngineConfig, mesh: Mesh) -> Room:
    """The room for keys and values beside a loaded model; the same on all ranks. Raises: ConfigError, PeerLost."""
    own = _free(model, config, mesh)
    least = min(int(each) for each in mesh.control.all_gather_bytes(str(own).encode()))
    page_bytes = model.page_bytes(config.kv_page_size) * (1 + model.backend.copies)
    return share(model.card, config, page_bytes, least, model.device.type)


def _free(model: TextModel, config: EngineConfig, mesh: Mesh) -> int:
    """Bytes beside the weights, for one rank."""
    sharing = mesh.degrees.world * mesh.loading if model.device.type == "cpu" else 1
    free = free_bytes(model.device, sharing)
    if config.device_memory_limit is None:
        return free
    return max(0, min(free, config.device_memory_limit - model.weights.nbytes))


def share(card: TextCard, config: EngineConfig, page_bytes: int, free: int, device: str) -> Room:
    """How much of what is free is taken.

    Args:
        page_bytes: of one page on one rank, with what attention keeps beside it.
        free: bytes for one rank; the least that any rank has.
        device: cpu or cuda.

    Raises: ConfigError.
    """
    if config.max_context is not None and config.max_context > card.context:
        raise ConfigError(
            f"--max-context {config.max_context} is more than the {card.context} tokens that {card.name} was made for.",
            param="max_context",
        )
    wanted = min(card.context, config.max_context or card.context)
    per_text = -(-wanted // config.kv_page_size)
    if config.kv_cache_memory is None:
        pages = min(per_text * config.max_running_requests, max(1, free // SHARE // page_bytes))
    else:
        pages = config.kv_cache_memory // page_bytes
    holds = pages * config.kv_page_size
    if holds < 2 or (config.max_context is not None and holds < wanted):
        raise ConfigError(
            f"One text of {wanted} tokens needs {units.size(per_text * page_bytes)} for keys and values, and there are "
            f"{units.size(pages * page_bytes)}: room for {holds} tokens. Raise --kv-cache-memory, or lower "
            "--max-context.",
            param="kv_cache_memory" if config.kv_cache_memory is not None else "max_context",
        )
    if holds < wanted:
        log.warning("keys and values have room for %d tokens: no text can be longer", holds)
    return Room(pages, min(wanted, holds), config.chunked_prefill_size or STEP_TOKENS[device])
