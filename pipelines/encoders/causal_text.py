"""A causal language model used as a text encoder: the hidden states before its last layer, on real tokens only.

Causal attention makes positions independent of what follows them, so the padding that reference pipelines append
changes nothing that is kept; and a layer whose output is not read is not loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multimodal_gen.errors import CorruptModel
from multimodal_gen.memory.layers import LayerList, Track
from multimodal_gen.memory.residency import Memory
from multimodal_gen.nn.foreign import ForeignLinear, adopt
from multimodal_gen.nn.lowrank import Overlay
from multimodal_gen.nn.precision import compute_dtype
from multimodal_gen.parallel.group import SOLO, Group
from multimodal_gen.parallel.tensor import COLUMN, ROW, Rule, shard
from multimodal_gen.weights.loading import Rename, WeightTree

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """A prompt as the encoder reads it."""

    ids: Tensor  # int64 [l]
    dropped: int  # tokens cut off at the end


SHARDING = (
    Rule(r"embed_tokens", ROW),
    Rule(r"layers\.\d+\.self_attn\.[qkv]_proj", COLUMN),
    Rule(r"layers\.\d+\.self_attn\.o_proj", ROW),
    Rule(r"layers\.\d+\.mlp\.(gate|up)_proj", COLUMN),
    Rule(r"layers\.\d+\.mlp\.down_proj", ROW),
)
TRACK = Track("text_encoder", (LayerList("layers"),))


class CausalTextEncoder:
    """Tokenizer with chat template and a transformers decoder, cut after its second last layer."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path],
        device: torch.device,
        dtype: torch.dtype,
        memory: Memory,
        ranks: Group = SOLO,
    ) -> None:
        """
        Args:
            folder: holds tokenizer/ and text_encoder/.
            files: the encoder's weights.
            memory: gives it memory, and says when it may be used.
            ranks: share the weights where their number divides the heads; else each has all of them.

        Raises: CorruptModel.
        """
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        self.device = device
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            config = AutoConfig.from_pretrained(folder / "text_encoder", local_files_only=True)
            config.num_hidden_layers -= 1
            config.layer_types = config.layer_types[: config.num_hidden_layers]
            # Half precision that the CPU only emulates would make the encoder ten times slower.
            with init_empty_weights(include_buffers=False):
                model = AutoModel.from_config(config, dtype=compute_dtype(dtype, device))
        except (OSError, ValueError, KeyError) as error:
            raise CorruptModel(f"{folder / 'text_encoder'} cannot be loaded: {error}") from None
        model.norm = nn.Identity()  # the reference reads the state before the final norm
        adopt(model)
        if _divides(ranks.size, config):
            shard(model, SHARDING, ranks)
        else:
            log.info("the text encoder cannot be shared out over %d ranks: each has all of it", ranks.size)
        self.model = model.eval()
        # The last layer, the final norm and an output head are in the files, and nothing here reads them.
        unread = (rf"(model\.)?layers\.{config.num_hidden_layers}\..+", r"(model\.)?norm\.weight", r"lm_head\.weight")
        self.weights = WeightTree(self.model, files, (Rename(r"model\.(.+)", r"\1"),), unread)
        self._here = memory.add("text_encoder", "encode", self.model, self.weights, (TRACK,), ("embed_tokens",))
        self.parameters = self.weights.parameters

    def tokenize(self, prompt: str, max_length: int) -> Tokens:
        """The prompt in the chat template of one user turn, cut to `max_length` tokens."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        ids = self.tokenizer(text, truncation=True, max_length=max_length).input_ids
        dropped = len(self.tokenizer(text).input_ids) - len(ids) if len(ids) == max_length else 0
        return Tokens(torch.tensor(ids, dtype=torch.long, device=self.device), dropped)

    def encode(self, tokens: Tokens, overlay: Overlay | None = None) -> Tensor:
        """[l] tokens → hidden states [l, D], with unmerged adapters."""
        with self._here(), _hooked(overlay):
            states: Tensor = self.model(input_ids=tokens.ids[None], use_cache=False).last_hidden_state
        return states[0]


def _divides(size: int, config: Any) -> bool:
    shared = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size, config.vocab_size)
    return all(width % size == 0 for width in shared)


@contextmanager
def _hooked(overlay: Overlay | None) -> Iterator[None]:
    """While inside, the layers of a model that is not ours add the overlay's updates."""
    layers = [layer for layer in (overlay.updates if overlay is not None else ()) if isinstance(layer, ForeignLinear)]
    for layer in layers:
        layer.overlay = overlay
    try:
        yield
    finally:
        for layer in layers:
            layer.overlay = None
