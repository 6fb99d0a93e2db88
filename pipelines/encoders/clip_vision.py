"""CLIP's vision tower as an image encoder: the hidden states before its last layer, which is not loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from multimodal_gen.errors import CorruptModel
from multimodal_gen.nn.precision import compute_dtype


class ClipVisionEncoder:
    """Image processor and vision tower."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        """`folder` holds image_processor/ and image_encoder/. Raises: CorruptModel."""
        from transformers import AutoConfig, CLIPImageProcessorPil, CLIPVisionModel
        from transformers.utils import logging as transformers_logging

        verbosity = transformers_logging.get_verbosity()
        # The last layer and the projection are left in the file on purpose; the loader would report them as unexpected.
        transformers_logging.set_verbosity(transformers_logging.ERROR)
        self.device, self.dtype = device, compute_dtype(dtype, device)
        try:
            self.processor = CLIPImageProcessorPil.from_pretrained(folder / "image_processor", local_files_only=True)
            config = AutoConfig.from_pretrained(folder / "image_encoder", local_files_only=True)
            config.num_hidden_layers -= 1
            model = CLIPVisionModel.from_pretrained(
                folder / "image_encoder", config=config, dtype=self.dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise CorruptModel(f"{folder / 'image_encoder'} cannot be loaded: {error}") from None
        finally:
            transformers_logging.set_verbosity(verbosity)
        self.model = model.to(device).eval()
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def encode(self, image: Image.Image) -> Tensor:
        """A picture → tokens [1 + patches, D]."""
        pixels: Tensor = self.processor(images=image, return_tensors="pt").pixel_values
        states = self.model(pixel_values=pixels.to(self.device, self.dtype), output_hidden_states=True).hidden_states
        return states[-1][0]
