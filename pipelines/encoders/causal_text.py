"""A causal language model used as a text encoder: the hidden states before its last layer, on real tokens only.

Causal attention makes positions independent of what follows them, so the padding that reference pipelines append
changes nothing that is kept; and a layer whose output is not read is not loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

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
from multimodal_gen.pipelines.encoders import chat_tokens
from multimodal_gen.pipelines.encoders.qwen3 import Qwen3Body, Qwen3Config
from multimodal_gen.weights.checkpoint import read_json
from multimodal_gen.weights.loading import Rename, WeightTree, construction

log = logging.getLogger(__name__)


Forward = Callable[[Tensor], Tensor]
"""int64 [l] → states before the final norm, [l, D]"""


class Shape(Protocol):
    """What is asked of a decoder's configuration, ours or transformers'."""

    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...


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
    """Tokenizer with chat template and a decoder, cut after its second last layer."""

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
        self.device = device
        self.read = chat_tokens.load(folder / "tokenizer")
        # Half precision that the CPU only emulates would make the encoder ten times slower.
        model, config, self._forward = _body(folder / "text_encoder", compute_dtype(dtype, device))
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
        ids = self.read(prompt, max_length)
        dropped = len(self.read(prompt, None)) - len(ids) if len(ids) == max_length else 0
        return Tokens(torch.tensor(ids, dtype=torch.long, device=self.device), dropped)

    def encode(self, tokens: Tokens, overlay: Overlay | None = None) -> Tensor:
        """[l] tokens → hidden states [l, D], with unmerged adapters."""
        with self._here(), _hooked(overlay):
            return self._forward(tokens.ids)


def _body(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Shape, Forward]:
    """The decoder without its last layer and its final norm, on the meta device. Raises: CorruptModel."""
    config = Qwen3Config.read(read_json(folder, "config.json"))
    if config is None:
        return _foreign(folder, dtype)
    with construction(torch.device("meta"), dtype):
        model = Qwen3Body(replace(config, num_hidden_layers=config.num_hidden_layers - 1))
    return model, model.config, model


def _foreign(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Shape, Forward]:
    """By transformers, for whatever is not written here; its buffers have memory."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        config.num_hidden_layers -= 1
        config.layer_types = config.layer_types[: config.num_hidden_layers]
        with init_empty_weights(include_buffers=False):
            model = AutoModel.from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise CorruptModel(f"{folder} cannot be loaded: {error}") from None
    model.norm = nn.Identity()

    def forward(ids: Tensor) -> Tensor:
        states: Tensor = model(input_ids=ids[None], use_cache=False).last_hidden_state
        return states[0]

    return model, config, forward


def _divides(size: int, config: Shape) -> bool:
    shared = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size, config.vocab_size)
    return all(width % size == 0 for width in shared)


@contextmanager
def _hooked(overlay: Overlay | None) -> Iterator[None]:
    """While inside, layers add the overlay's updates."""
    layers = [layer for layer in (overlay.updates if overlay is not None else ()) if isinstance(layer, ForeignLinear)]
    for layer in layers:
        layer.overlay = overlay
    try:
        yield
    finally:
        for layer in layers:
            layer.overlay = None
