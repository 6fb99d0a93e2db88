"""The attention backends, best first. `--attention-backend` picks by name; nothing else does."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from multimodal_gen.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

    from multimodal_gen.attention.base import AttentionBackend, Candidate, LseBackend

BACKENDS = {
    "native": "multimodal_gen.attention.native:NativeAttention",
    "triton": "multimodal_gen.attention.triton_packed:TritonAttention",
    "onednn": "multimodal_gen.attention.onednn:OneDnnAttention",
    "sdpa": "multimodal_gen.attention.sdpa:SdpaAttention",
    "naive": "multimodal_gen.attention.naive:NaiveAttention",
}
GIVE_LSE = (
    "native",
    "triton",
    "sdpa",
    "naive",
)  # those that ring attention can join blocks with; a test compares their attributes

log = logging.getLogger(__name__)


def _load(name: str) -> type[Candidate]:
    module, attribute = BACKENDS[name].split(":")
    backend: type[Candidate] = vars(importlib.import_module(module))[attribute]
    return backend


def available(device: torch.device) -> dict[str, str]:
    """Name → why it cannot run on `device` (empty: it can), best first."""
    return {name: _load(name).unavailable(device) for name in BACKENDS}


def choose(name: str, device: torch.device) -> AttentionBackend:
    """The named backend, or with `auto` the first that suits the device. Raises ConfigError listing what can run."""
    return _choose(name, device, available(device))


def choose_with_lse(name: str, device: torch.device) -> LseBackend:
    """As `choose`, among those that give a log-sum-exp."""
    lacking = dict.fromkeys(BACKENDS.keys() - set(GIVE_LSE), "it gives no log-sum-exp, which ring attention needs")
    backend: LseBackend = _choose(name, device, available(device) | lacking)
    return backend


def _choose(name: str, device: torch.device, reasons: dict[str, str]) -> Any:
    usable = [candidate for candidate, reason in reasons.items() if not reason]
    if name == "auto":
        name = next(candidate for candidate in usable if _load(candidate).preferred(device))
    elif name not in usable:
        why = reasons.get(name, "there is no backend of that name")
        raise ConfigError(
            f"--attention-backend {name} cannot run on {device}: {why}. Available: auto, {', '.join(usable)}."
            + did_you_mean(name, usable),
            param="attention_backend",
        )
    log.info("attention backend: %s on %s", name, device)
    return _load(name)()
