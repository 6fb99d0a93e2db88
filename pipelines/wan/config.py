"""`transformer/config.json` of a Wan checkpoint. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multimodal_gen.errors import CorruptModel


@dataclass(frozen=True)
class WanConfig:
    """Sizes of one transformer; filled by `from_json`."""

    patch_size: tuple[int, int, int]  # frames, height, width, in latents
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    num_layers: int
    eps: float
    image_dim: int | None  # width of the image encoder's tokens; None: the model has none

    @classmethod
    def from_json(cls, config: Mapping[str, Any], shown: str = "transformer/config.json") -> WanConfig:
        """Raises: CorruptModel for a layout that this implementation does not cover."""
        try:
            made = cls(
                patch_size=tuple(config["patch_size"]),
                image_dim=config.get("image_dim"),
                **{f: config[f] for f in cls.__dataclass_fields__ if f not in ("patch_size", "image_dim")},
            )
        except KeyError as error:
            raise CorruptModel(f"{shown} lacks {error}.") from None
        if made.attention_head_dim % 2 or made.attention_head_dim < 6:
            raise CorruptModel(
                f"{shown}: attention_head_dim {made.attention_head_dim} cannot be split into three axes."
            )
        wanted = {
            "qk_norm": "rms_norm_across_heads",
            "cross_attn_norm": True,
            "pos_embed_seq_len": None,
            "added_kv_proj_dim": None if made.image_dim is None else made.dim,
        }
        for name, value in wanted.items():
            if config.get(name, value) != value:
                raise CorruptModel(f"{shown}: {name} = {config[name]!r} is not supported, {value!r} is.")
        return made

    @property
    def dim(self) -> int:
        """Model width."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """Head dimensions that turn with frame, row and column."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side

    @property
    def patch_elements(self) -> int:
        """Latent positions in one patch."""
        frames, height, width = self.patch_size
        return frames * height * width
