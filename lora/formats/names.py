"""How programs name a model's modules in adapter files: one row for each prefix.

The first row whose prefix matches decides; what is left of the name is the path inside the tree. Files of kohya and
LyCORIS write "_" for every ".", which is undone when the adapter is bound to a model.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Naming(NamedTuple):
    """One row of the table."""

    program: str
    prefix: str  # regular expression
    tree: str | None  # None: the file does not say
    flat: bool = False  # "_" for every "."


NAMINGS = (
    Naming("kohya", r"lora_(?:unet|transformer)_", "transformer", flat=True),
    Naming("kohya", r"lora_te1?_", "text_encoder", flat=True),
    Naming("lycoris", r"lycoris_", None, flat=True),
    Naming("comfyui", r"(?:model\.)?diffusion_model\.", "transformer"),
    Naming("comfyui", r"text_encoders\.(?:\w+\.)?transformer\.", "text_encoder"),
    Naming("diffusers", r"(?:base_model\.model\.)?transformer_2\.", "transformer_2"),
    Naming("diffusers", r"(?:base_model\.model\.)?transformer\.", "transformer"),
    Naming("diffusers", r"(?:base_model\.model\.)?text_encoder\.", "text_encoder"),
    Naming("peft", r"base_model\.model\.", None),
    Naming("bare", r"", None),
)


def name_of(module: str) -> tuple[Naming, str]:
    """The row of a module's name, and its path inside the tree."""
    for naming in NAMINGS:
        match = re.match(naming.prefix, module)
        if match:
            return naming, module[match.end() :]
    raise AssertionError("the last row matches every name")
