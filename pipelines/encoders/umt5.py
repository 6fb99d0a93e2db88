"""UMT5 as a text encoder, on the real tokens only.

Reference pipelines pad prompts to 512 tokens, mask the padding and set its outputs to zero: the same as not running it,
at a tenth of the time.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ftfy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal_gen.errors import CorruptModel
from multimodal_gen.nn.precision import compute_dtype
from multimodal_gen.nn.slots import Cut, Extent, Slotted
from multimodal_gen.parallel.group import SOLO, Group
from multimodal_gen.parallel.tensor import COLUMN, ROW, Rule, shard
from multimodal_gen.weights.header import read_header
from multimodal_gen.weights.loading import Rename, allocate, default_dtype, load_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """A prompt as the encoder reads it."""

    ids: Tensor  # int64 [l]
    dropped: int  # tokens cut off at the end


def clean(prompt: str) -> str:
    """Broken encodings mended, HTML entities resolved (twice, as the training data was), white space collapsed."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text.strip()).strip()


SHARDING = (
    Rule(r"block\.\d+\.layer\.0\.SelfAttention\.[qkv]", COLUMN),
    Rule(r"block\.\d+\.layer\.0\.SelfAttention\.o", ROW),
    Rule(r"block\.\d+\.layer\.1\.DenseReluDense\.wi_[01]", COLUMN),
    Rule(r"block\.\d+\.layer\.1\.DenseReluDense\.wo", ROW),
)


class HeadBias(Slotted):
    """A rank's heads of a relative position bias [buckets, heads], in the place of torch's embedding."""

    def __init__(self, buckets: int, heads: int, dtype: torch.dtype, group: Group) -> None:
        super().__init__()
        weight = torch.empty(buckets, heads // group.size, dtype=dtype, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.cuts = {"weight": Cut(1, group.rank, group.size)}

    def extent(self, part: str | None) -> Extent:
        """All of it."""
        rows, columns = self.weight.shape
        return Extent(slice(0, rows), slice(0, columns))

    def forward(self, buckets: Tensor) -> Tensor:
        """int64 [...] → [..., heads]."""
        return F.embedding(buckets, self.weight)


class UMT5Encoder:
    """Tokenizer and encoder stack."""

    def __init__(
        self, folder: Path, files: Sequence[Path], device: torch.device, dtype: torch.dtype, ranks: Group = SOLO
    ) -> None:
        """
        Args:
            folder: holds tokenizer/ and text_encoder/.
            files: the encoder's weights.
            ranks: share the weights where their number divides the heads; else each has all of them.

        Raises: CorruptModel.
        """
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoTokenizer, UMT5EncoderModel

        self.device = device
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            config = AutoConfig.from_pretrained(folder / "text_encoder", local_files_only=True)
            with init_empty_weights(include_buffers=False), default_dtype(compute_dtype(dtype, device)):
                model: nn.Module = UMT5EncoderModel(config).encoder
        except (OSError, ValueError, KeyError) as error:
            raise CorruptModel(f"{folder / 'text_encoder'} cannot be loaded: {error}") from None
        if dtype == torch.float16:  # as the reference keeps it: sums of the feed-forward pass its range
            for name, layer in model.named_modules():
                if name.endswith(".wo"):
                    layer.float()
        if config.num_heads % ranks.size == 0 and config.d_ff % ranks.size == 0:
            _share_heads(model, ranks)
            shard(model, SHARDING, ranks)
        else:
            log.info("the text encoder cannot be shared out over %d ranks: each has all of it", ranks.size)
        allocate(model, device)
        self.model = model.eval()
        weights = load_weights(self.model, files, RENAMES, _second_names(files))
        self.parameters = weights.parameters

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


RENAMES = (Rename(r"shared\.weight", "embed_tokens.weight"), Rename(r"encoder\.(.+)", r"\1"))


def _second_names(files: Sequence[Path]) -> tuple[str, ...]:
    """The embedding has two names, of which files have one or both."""
    both = any("shared.weight" in read_header(file, str(file)) for file in files)
    return (r"encoder\.embed_tokens\.weight",) if both else ()


def _share_heads(model: nn.Module, ranks: Group) -> None:
    """What transformers' attention knows of its heads besides the linear layers."""
    from transformers.models.umt5.modeling_umt5 import UMT5Attention

    for layer in list(model.modules()) if ranks.size > 1 else ():
        if not isinstance(layer, UMT5Attention):
            continue
        if layer.has_relative_attention_bias:
            bias = layer.relative_attention_bias
            layer.relative_attention_bias = HeadBias(bias.num_embeddings, bias.embedding_dim, bias.weight.dtype, ranks)
        layer.n_heads //= ranks.size
        layer.inner_dim //= ranks.size
