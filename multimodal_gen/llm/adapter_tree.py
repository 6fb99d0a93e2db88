"""A decoder as adapters see it: modules under the names that training programs give them, whatever file the weights
came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from multimodal_gen.lora.bind import Spellings
from multimodal_gen.lora.names import AdapterTarget, Alias, TreeLayout
from multimodal_gen.lora.tree import Gathered, Members, gather
from multimodal_gen.weights.loading import Place, Rename

_ATTENTION = r"(layers\.\d+\.self_attn)\.q_proj"
_MLP = r"(layers\.\d+\.mlp)\.gate_proj"
_QKV = tuple(rf"\1.{part}_proj" for part in "qkv")
_GATE_UP = tuple(rf"\1.{part}_proj" for part in ("gate", "up"))

# The names of transformers, which peft and all that is built on it write; fused ones are those of serving programs.
DECODER = AdapterTarget(
    tree="text",
    folder="",
    modules=(
        *(f"layers.0.self_attn.{part}_proj" for part in "qkvo"),
        *(f"layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")),
    ),
    aliases=(
        Alias(r"(layers\..+)", r"model.\1"),
        *(Alias(_ATTENTION, rf"{prefix}\1.qkv_proj", _QKV) for prefix in ("", "model.")),
        *(Alias(_MLP, rf"{prefix}\1.gate_up_proj", _GATE_UP) for prefix in ("", "model.")),
    ),
)
PREFIX = "model."  # of the checkpoint's own names


class DecoderTree:
    """Canonical names (`layers.3.self_attn.q_proj.weight`) → places in a decoder."""

    def __init__(self, model: nn.Module, renames: Sequence[Rename], layers: int) -> None:
        """`renames` are the family's, from the names of a transformers checkpoint to those of `model`."""
        self.target = DECODER
        self.places = _places(model, renames, layers)
        shapes = {name: place.shape for name, place in self.places.items()}
        self.spellings = Spellings(TreeLayout(DECODER, shapes))

    def place(self, name: str) -> Place:
        """Where the weight of a canonical name lives."""
        return self.places[name]

    def gather(self, members: Members) -> Gathered:
        """What `members` do to this tree."""
        return gather(members, self.target.tree)


def _places(model: nn.Module, renames: Sequence[Rename], layers: int) -> Mapping[str, Place]:
    found = {}
    modules = dict(model.named_modules())
    for layer in range(layers):
        for module in DECODER.modules:
            name = f"{module.replace('layers.0.', f'layers.{layer}.')}.weight"
            key = PREFIX + name
            target, part = next(filter(None, (row.apply(key) for row in renames)), (key, None))
            owner, _, own = target.rpartition(".")
            found[name] = Place(modules[owner], own, part)
    return found
