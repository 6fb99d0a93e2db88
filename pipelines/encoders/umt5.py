"""UMT5 as a text encoder, on the real tokens only.

Reference pipelines pad prompts to 512 tokens, mask the padding and set its outputs to zero: the same as not running it,
at a tenth of the time.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ftfy
import torch
from torch import Tensor

from multimodal_gen.errors import CorruptModel
from multimodal_gen.nn.precision import compute_dtype


@dataclass(frozen=True)
class Tokens:
    """A prompt as the encoder reads it."""

    ids: Tensor  # int64 [l]
    dropped: int  # tokens cut off at the end


def clean(prompt: str) -> str:
    """Broken encodings mended, HTML entities resolved (twice, as the training data was), white space collapsed."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text.strip()).strip()


class UMT5Encoder:
    """Tokenizer and encoder stack."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        """`folder` holds tokenizer/ and text_encoder/. Raises: CorruptModel."""
        from transformers import AutoTokenizer, UMT5EncoderModel
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        self.device = device
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            model = UMT5EncoderModel.from_pretrained(
                folder / "text_encoder",
                dtype=compute_dtype(dtype, device),
                local_files_only=True,
                use_safetensors=True,
            )
        except (OSError, ValueError, KeyError) as error:
            raise CorruptModel(f"{folder / 'text_encoder'} cannot be loaded: {error}") from None
        self.model = model.to(device).eval()
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def tokenize(self, prompt: str, max_length: int) -> Tokens:
        """The cleaned prompt with its end token, cut to `max_length`."""
        text = clean(prompt)
        ids: Sequence[int] = self.tokenizer(text, truncation=True, max_length=max_length).input_ids
        dropped = len(self.tokenizer(text).input_ids) - len(ids) if len(ids) == max_length else 0
        return Tokens(torch.tensor(ids, dtype=torch.long, device=self.device), dropped)

    def encode(self, tokens: Tokens) -> Tensor:
        """[l] tokens → [l, D]."""
        states: Tensor = self.model(input_ids=tokens.ids[None]).last_hidden_state
        return states[0]
