"""CLIP's vision tower as an image encoder: the hidden states before its last layer, which is not loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from multimodal_gen.errors import CorruptModel
from multimodal_gen.memory.layers import LayerList, Track
from multimodal_gen.memory.residency import Memory
from multimodal_gen.nn.foreign import adopt
from multimodal_gen.nn.precision import compute_dtype
from multimodal_gen.weights.loading import Rename, WeightTree

TRACK = Track("image_encoder", (LayerList("encoder.layers"),))


class ClipVisionEncoder:
    """Image processor and vision tower."""

    def __init__(
        self, folder: Path, files: Sequence[Path], device: torch.device, dtype: torch.dtype, memory: Memory
    ) -> None:
        """
        Args:
            folder: holds image_processor/ and image_encoder/.
            files: the encoder's weights.
            memory: gives it memory, and says when it may be used.

        Raises: CorruptModel.
        """
        from accelerate import init_empty_weights
        from transformers import AutoConfig, CLIPImageProcessorPil, CLIPVisionModel

        self.device, self.dtype = device, compute_dtype(dtype, device)
        try:
            self.processor = CLIPImageProcessorPil.from_pretrained(folder / "image_processor", local_files_only=True)
            config = AutoConfig.from_pretrained(folder / "image_encoder", local_files_only=True)
            config.num_hidden_layers -= 1
            with init_empty_weights(include_buffers=False):
                model = CLIPVisionModel._from_config(config, dtype=self.dtype)
        except (OSError, ValueError, KeyError) as error:
            raise CorruptModel(f"{folder / 'image_encoder'} cannot be loaded: {error}") from None
        model.post_layernorm = nn.Identity()  # the reference reads the state before it
        adopt(model)
        self.model = model.eval()
        # The last layer, the final norm and the projection are in the file, and nothing here reads them.
        unread = (
            rf"vision_model\.encoder\.layers\.{config.num_hidden_layers}\..+",
            r"vision_model\.post_layernorm\..+",
            r"(visual|text)_projection\.weight",
            r"(.+\.)?position_ids",
        )
        self.weights = WeightTree(self.model, files, (Rename(r"vision_model\.(.+)", r"\1"),), unread)
        self.parameters = self.weights.parameters
        self._here = memory.add("image_encoder", "encode", self.model, self.weights, (TRACK,))

    def encode(self, image: Image.Image) -> Tensor:
        """A picture → tokens [1 + patches, D]."""
        pixels: Tensor = self.processor(images=image, return_tensors="pt").pixel_values
        with self._here():
            states: Tensor = self.model(pixel_values=pixels.to(self.device, self.dtype)).last_hidden_state
        return states[0]
