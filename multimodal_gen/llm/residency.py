"""The weights of a language model in memory, gone, and back.

Layers are filled one after the other, and each may be packed as soon as it is there (`nn.linear.Packed`): what was read
is let go of before the next layer comes, so the peak is the packed model and one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from multimodal_gen.llm.forms import Form, Multiplied
from multimodal_gen.llm.models.vocabulary import Vocabulary
from multimodal_gen.memory.component import span_bytes
from multimodal_gen.memory.host import release_freed_memory
from multimodal_gen.weights.loading import WeightTree, allocate, clear_padding


class TextWeights:
    """All weights of one model on one rank."""

    def __init__(
        self, model: nn.Module, tree: WeightTree, device: torch.device, forms: Mapping[Multiplied, Form]
    ) -> None:
        """
        Args:
            model: on the meta device, shared out.
            forms: of the layers whose weights are not computed with as they were read.

        Raises: CorruptModel.
        """
        tree.verify()
        self._model, self._tree, self._device, self._forms = model, tree, device, forms
        self._placed = False
        self._keys: dict[nn.Module, set[str]] = {}
        for key, place in tree.places.items():
            self._keys.setdefault(place.layer, set()).add(key)

    @property
    def needed(self) -> int:
        """Bytes that loading takes: the weights in their forms, and the largest as it is read."""
        gone = [layer.weight for layer in self._forms if not _stays(layer)]
        packed = sum(layer.weight.numel() * form.bits / 8 for layer, form in self._forms.items())
        plain = sum(tensor.nbytes for tensor in self._model.parameters()) - sum(weight.nbytes for weight in gone)
        return int(plain + packed) + max((weight.nbytes for weight in gone), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        if not self._placed:
            return 0
        held = sum(tensor.untyped_storage().nbytes() for tensor in self._model.parameters())
        return held + sum(layer.packed.nbytes for layer in self._forms if layer.packed is not None)

    def load(self) -> None:
        """Read all weights. Raises: CorruptModel; it may be called again then."""
        self._tree.check()
        if not self._placed:
            allocate(self._model, self._device)
            self._placed = True
            self.take_out()
        try:
            for layer, keys in self._keys.items():
                self._bring(layer, keys)
        except BaseException:
            self.take_out()
            raise
        self._tree.absent = frozenset(key for layer in self._forms for key in self._keys[layer])

    def _bring(self, layer: nn.Module, keys: set[str]) -> None:
        for tensor in _own(layer):
            tensor.untyped_storage().resize_(span_bytes(tensor))
        clear_padding(layer)
        self._tree.fill(keys)
        if isinstance(layer, Multiplied) and layer in self._forms:
            layer.packed = self._forms[layer].pack(layer.weight)
            if not _stays(layer):
                layer.weight.untyped_storage().resize_(0)

    def take_out(self) -> None:
        """Free all of it; tensors keep their shape, dtype and device."""
        for layer in self._forms:
            layer.packed = None
        for tensor in self._model.parameters():
            tensor.untyped_storage().resize_(0)
        self._tree.absent = frozenset(self._tree.places)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            release_freed_memory()


def _stays(layer: Multiplied) -> bool:
    """Whether the weight is needed as it was read, too."""
    return isinstance(layer, Vocabulary) and layer.embeds


def _own(layer: nn.Module) -> Iterator[Tensor]:
    return layer.parameters(recurse=False)
