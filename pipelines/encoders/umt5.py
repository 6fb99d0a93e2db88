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
from torch import Tensor

from multimodal_gen.errors import CorruptModel
from multimodal_gen.memory.layers import LayerList, Track
from multimodal_gen.memory.residency import Memory
from multimodal_gen.nn.foreign import adopt
from multimodal_gen.nn.precision import compute_dtype
from multimodal_gen.parallel.group import SOLO, Group
from multimodal_gen.parallel.tensor import COLUMN, ROW, Rule, shard
from multimodal_gen.weights.header import read_header
from multimodal_gen.weights.loading import Rename, WeightTree, construction

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
    Rule(r"embed_tokens", ROW),
    Rule(r"block\.\d+\.layer\.0\.SelfAttention\.([qkv]|relative_attention_bias)", COLUMN),
    Rule(r"block\.\d+\.layer\.0\.SelfAttention\.o", ROW),
    Rule(r"block\.\d+\.layer\.1\.DenseReluDense\.wi_[01]", COLUMN),
    Rule(r"block\.\d+\.layer\.1\.DenseReluDense\.wo", ROW),
)
RENAMES = (Rename(r"encoder\.(.+)", r"\1"), Rename(r"shared\.weight", "embed_tokens.weight"))
TRACK = Track("text_encoder", (LayerList("block"),))


class UMT5Encoder:
    """Tokenizer and encoder stack."""

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
        from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

        self.device = device
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            config = UMT5Config.from_pretrained(folder / "text_encoder", local_files_only=True)
            with construction(torch.device("meta"), compute_dtype(dtype, device)):
                model = UMT5EncoderModel(config).encoder
        except (OSError, ValueError, KeyError) as error:
            raise CorruptModel(f"{folder / 'text_encoder'} cannot be loaded: {error}") from None
        if compute_dtype(dtype, device) == torch.float16:
            for block in model.block:  # its sums are beyond what float16 can hold
                block.layer[1].DenseReluDense.wo.float()
        adopt(model)
        if all(width % ranks.size == 0 for width in (config.num_heads, config.d_ff, config.vocab_size)):
            shard(model, SHARDING, ranks)
            for block in model.block:
                block.layer[0].SelfAttention.n_heads //= ranks.size
        else:
            log.info("the text encoder cannot be shared out over %d ranks: each has all of it", ranks.size)
        self.model = model.eval()
        self.weights = WeightTree(model, files, RENAMES, _doubles(files))
        self._here = memory.add("text_encoder", "encode", model, self.weights, (TRACK,), ("embed_tokens",))
        self.parameters = self.weights.parameters

    def tokenize(self, prompt: str, max_length: int) -> Tokens:
        """The cleaned prompt with its end token, cut to `max_length`."""
        text = clean(prompt)
        ids: Sequence[int] = self.tokenizer(text, truncation=True, max_length=max_length).input_ids
        dropped = len(self.tokenizer(text).input_ids) - len(ids) if len(ids) == max_length else 0
        return Tokens(torch.tensor(ids, dtype=torch.long, device=self.device), dropped)

    def encode(self, tokens: Tokens) -> Tensor:
        """[l] tokens → [l, D]."""
        with self._here():
            states: Tensor = self.model(input_ids=tokens.ids[None]).last_hidden_state
        return states[0]


def _doubles(files: Sequence[Path]) -> tuple[str, ...]:
    """Some files hold the embedding twice, under the name of the encoder's own and under that of the shared one."""
    keys = {key for file in files for key in read_header(file, str(file))}
    return (r"shared\.weight",) if "encoder.embed_tokens.weight" in keys else ()
