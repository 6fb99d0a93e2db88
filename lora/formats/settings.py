"""The scale of a low-rank module: alpha from wherever a file keeps it.

Order: the alpha that the user gave; the module's own `.alpha` tensor; peft's configuration (from the header's
`lora_adapter_metadata` as diffusers writes it, or adapter_config.json), with its patterns; kohya's
`ss_network_alpha`; else alpha = rank. `use_rslora` divides by √rank instead of rank (Kalajdzievski, 2023).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multimodal_gen.errors import AdapterError, CorruptAdapter

MAX_ALPHA = 1e6
METADATA_KEY = "lora_adapter_metadata"
KOHYA_ALPHA = "ss_network_alpha"
PEFT_TYPES = ("LORA", "LOHA", "LOKR")
# Fields of peft that give the tensors another meaning.
UNSUPPORTED = frozenset(
    {"alora_invocation_tokens", "kasa_config", "layer_replication", "target_parameters", "use_qalora"}
)
# These change the base weights when training begins; their files mean something only on top of those.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Settings:
    """What a file says of its modules besides tensors; filled by `read_settings`."""

    name: str  # of the file
    config: Mapping[str, Any]  # peft's fields, keys with the tree in front where the header names one
    kohya_alpha: float | None
    override: float | None  # the user's alpha

    def scale(self, tree: str | None, module: str, rank: int, own: float | None) -> float:
        """Of one module with factors of this rank (0: nothing of it is a product); `own` is its `.alpha` tensor.

        Raises: CorruptAdapter for an alpha that is no number of a sensible size.
        """
        alpha = self._alpha(tree, module, own)
        if rank == 0:
            # LyCORIS ignores alpha where there is no rank to divide it by; peft divides by the rank that was asked for.
            asked = self._field(tree, "r") if self._field(tree, "peft_type") == "LOKR" else None
            if alpha is None or asked is None:
                return 1.0
            rank = self._whole(asked)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self._field(tree, "use_rslora") else rank)

    def _whole(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_ALPHA:
            raise CorruptAdapter(f"{self.name}: the rank of the configuration is no number of a sensible size.")
        return value

    def _alpha(self, tree: str | None, module: str, own: float | None) -> float | None:
        if self.override is not None:
            return self.override
        if own is not None:
            return self._number(own, module)
        patterns = self._field(tree, "alpha_pattern") or {}
        found = next((value for pattern, value in patterns.items() if _matches(pattern, module)), None)
        if found is None:
            found = self._field(tree, "lora_alpha", self._field(tree, "alpha", self.kohya_alpha))
        return None if found is None else self._number(found, module)

    def _number(self, value: Any, module: str) -> float:
        # NaN fails the comparison; whole numbers too large for a float compare all the same.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -MAX_ALPHA <= value <= MAX_ALPHA:
            raise CorruptAdapter(f"{self.name}: alpha of {module[:120]!a} is no number between ±{MAX_ALPHA:g}.")
        return float(value)

    def _field(self, tree: str | None, field: str, default: Any = None) -> Any:
        own = self.config.get(f"{tree}.{field}") if tree else None
        return self.config.get(field, default) if own is None else own


def read_settings(
    name: str, metadata: Mapping[str, str], config: Mapping[str, Any], own_alphas: bool, override: float | None
) -> Settings:
    """Settings of a file.

    Args:
        own_alphas: whether modules bring `.alpha` tensors, which make `ss_network_alpha` a mere note.

    Raises: CorruptAdapter; AdapterError for a method that the file cannot be used without.
    """
    merged = {**config, **_from_header(name, metadata)}
    _refuse(name, merged)
    kohya = None
    if not own_alphas and KOHYA_ALPHA in metadata:
        try:
            kohya = float(metadata[KOHYA_ALPHA])
        except ValueError:
            raise CorruptAdapter(f"{name}: {KOHYA_ALPHA} in the header is not a number.") from None
    return Settings(name, merged, kohya, override)


def _from_header(name: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        return {}
    try:
        found = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CorruptAdapter(f"{name}: {METADATA_KEY} in the header is not a JSON object.")
    return found


def _refuse(name: str, config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        field = key.rpartition(".")[2]
        if field == "peft_type" and value not in PEFT_TYPES:
            raise AdapterError(f"{name} is a {str(value)[:40]} adapter; {', '.join(PEFT_TYPES)} can be loaded.")
        if field == "fan_in_fan_out" and value:
            raise AdapterError(f"{name} sets fan_in_fan_out: its matrices are transposed, which is not supported.")
        if field in ("alpha_pattern", "rank_pattern") and not isinstance(value, dict | None):
            raise CorruptAdapter(f"{name}: {field} must map module patterns to numbers.")
        if field in UNSUPPORTED and value:
            raise AdapterError(f"{name} was trained with {field}, which is not supported.")
        start = str(value).lower()
        if field == "init_lora_weights" and start.startswith(CHANGED_BASE):
            raise AdapterError(
                f"{name} was trained with init_lora_weights = {start[:20]!r}, which changes the base weights; convert "
                "it to a plain LoRA (peft: path_initial_model_for_weight_conversion)."
            )


def _matches(pattern: str, module: str) -> bool:
    """As peft reads a pattern: a module's whole path, or its end after a dot.

    Files hold names here. Real expressions are refused: one made on purpose could match for years.
    """
    whole, name = pattern.startswith("^"), pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise AdapterError(f"The pattern {pattern[:40]!a} of the adapter's configuration is no plain module name.")
    return module == name or (not whole and module.endswith(f".{name}"))
