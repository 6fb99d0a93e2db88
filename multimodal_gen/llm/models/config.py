"""What a decoder looks like, whichever file said so. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from multimodal_gen.errors import ConfigError, CorruptModel

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20  # also of the vocabulary's length, in units of 64
T = TypeVar("T", int, float, bool, str)


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are changed for contexts beyond the first training (`llm/models/rope.py`)."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original: int  # context that the model was first trained on
    low: float = 1.0  # llama3: wavelengths beyond original / low are stretched by the whole factor
    high: float = 4.0  # llama3: those below original / high stay
    beta_fast: float = 32.0  # yarn: turns within the original context, of the first frequency that is changed
    beta_slow: float = 1.0  # yarn: and of the last that is not changed fully
    attention_factor: float = 1.0  # yarn: of cosines and sines
    truncate: bool = True  # yarn: whether the borders are rounded to whole dimensions


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (Su et al., 2021)."""

    theta: float
    dim: int  # of each head that turn; all of them in these families
    scaling: RopeScaling | None = None
    factors: bool = False  # the file has a tensor of divisors of the frequencies (GGUF's rope_freqs)


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of these families; filled by their `parse` functions from config.json or GGUF metadata."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int  # of the feed-forward layers
    eps: float
    context: int  # tokens that positions were trained or stretched for
    rope: RopeConfig
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output
    qk_norm: bool = False  # queries and keys are normalised per head
    tied: bool = False  # the output layer is the embedding

    def __post_init__(self) -> None:
        """Raises: CorruptModel for numbers that do not go together."""
        sizes = (self.vocab_size // 64, self.width, self.hidden, self.head_dim, self.heads, self.kv_heads)
        if not (0 < self.layers <= MAX_LAYERS and self.vocab_size > 0 and max(sizes) <= MAX_WIDTH):
            raise CorruptModel(f"The model's configuration has sizes that no model has: {self}.")
        if min(sizes[1:]) <= 0 or self.context <= 0:
            raise CorruptModel(f"The model's configuration has sizes that are not positive: {self}.")
        if self.heads % self.kv_heads:
            raise CorruptModel(
                f"The model's configuration has {self.heads} heads and {self.kv_heads} of keys and values, which must "
                "divide them."
            )
        if self.head_dim % 2 or self.rope.dim != self.head_dim:
            raise CorruptModel(f"Positions turn {self.rope.dim} of {self.head_dim} numbers of a head; all must turn.")
        if not (0 < self.eps < 1 and math.isfinite(self.rope.theta) and self.rope.theta > 1):
            raise CorruptModel(f"The model's configuration has eps {self.eps} and rope theta {self.rope.theta}.")

    def share(self, ranks: int) -> tuple[int, int]:
        """Heads of each rank: of queries, of keys and values. Ranks beyond the latter's number hold the same ones.

        Raises: ConfigError naming both numbers.
        """
        pieces = min(ranks, self.kv_heads)
        if self.heads % ranks or self.kv_heads % pieces or ranks % pieces:
            raise ConfigError(
                f"{self.heads} attention heads and {self.kv_heads} of keys and values cannot be shared out over "
                f"--tp-size {ranks} ranks: it must divide {self.heads}, and divide {self.kv_heads} or be a multiple of "
                "it.",
                param="tp_size",
            )
        if self.hidden % ranks:
            raise ConfigError(
                f"Feed-forward layers of width {self.hidden} cannot be shared out over --tp-size {ranks} ranks.",
                param="tp_size",
            )
        return self.heads // ranks, self.kv_heads // pieces


class Keys:
    """A mapping whose values have been written by strangers: every read says what type is wanted."""

    def __init__(self, values: Mapping[str, Any], shown: str) -> None:
        self._values, self._shown = values, shown

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    @property
    def nested(self) -> bool:
        """Whether a value is a table."""
        return any(isinstance(value, dict) for value in self._values.values())

    def need(self, key: str, kind: type[T]) -> T:
        """Raises: CorruptModel where it is missing or of another type."""
        if key not in self:
            raise CorruptModel(f"{self._shown} lacks {key!r}.")
        return self.get(key, kind())

    def get(self, key: str, default: T) -> T:
        """The value, of the default's type. Raises: CorruptModel."""
        value = self._values.get(key)
        if value is None:
            return default
        kind = type(default)
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise CorruptModel(f"{self._shown}: {key!r} must be of type {kind.__name__}, not {str(value)[:60]!r}.")
        return value

    def table(self, key: str) -> Keys | None:
        """A table inside, or None. Raises: CorruptModel."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise CorruptModel(f"{self._shown}: {key!r} must be a table, not {str(value)[:60]!r}.")
        return Keys(value, f"{self._shown}, {key}")

    def all_of(self, key: str, allowed: tuple[str, ...]) -> None:
        """Refuse a list of texts with others in it. Raises: ConfigError, CorruptModel."""
        value = self._values.get(key)
        if value is not None and (not isinstance(value, list) or not all(isinstance(item, str) for item in value)):
            raise CorruptModel(f"{self._shown}: {key!r} must be a list of names.")
        other = next((item for item in value or () if item not in allowed), None)
        if other is not None:
            raise unsupported(f"{self._shown}: {key} has {other!r}")


def unsupported(what: str) -> ConfigError:
    """A model that is sound, and computes something that is not written here."""
    return ConfigError(f"{what}, which this decoder does not compute. Use another model.", param="llm_path")
