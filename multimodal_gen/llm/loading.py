"""From a card to a model that computes; and to sleep and back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multimodal_gen import units
from multimodal_gen.attention.paged_registry import choose_paged
from multimodal_gen.config import NO_MODEL, EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.llm import checkpoint
from multimodal_gen.llm.batch import Batch
from multimodal_gen.llm.checkpoint import TextCheckpoint
from multimodal_gen.llm.forms import choose
from multimodal_gen.llm.kv_cache import KVCache
from multimodal_gen.llm.models.config import DecoderConfig
from multimodal_gen.llm.models.decoder import Decoder
from multimodal_gen.llm.models.names import PAIRED, canonical
from multimodal_gen.llm.models.tables import RENAMES, ignored, sharding
from multimodal_gen.llm.residency import TextWeights
from multimodal_gen.memory.free import free_bytes
from multimodal_gen.nn.precision import compute_dtype, resolve_device, resolve_dtype
from multimodal_gen.parallel.group import SOLO, Group
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.parallel.tensor import shard
from multimodal_gen.text import TextCard
from multimodal_gen.weights.gguf import GgufFile
from multimodal_gen.weights.loading import WeightTree, construction
from multimodal_gen.weights.reader import TensorFile

if TYPE_CHECKING:
    from multimodal_gen.llm.decode_graphs import DecodeGraphs

log = logging.getLogger(__name__)


class TextModel:
    """A loaded language model, or this rank's share of it. Everything belongs to the engine's thread."""

    def __init__(self, card: TextCard, config: EngineConfig, mesh: Mesh) -> None:
        """
        Args:
            config: `device` is this rank's own.
            mesh: its `tp` group shares the model; all other ranks have the same share.

        Raises: CorruptModel; ConfigError for ranks that cannot share it, or memory that it does not fit into.
        """
        found = checkpoint.read(Path(card.path), card.format)
        self.card, self.config = card, found.config
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.llm_dtype, self.device)
        if compute_dtype(self.dtype, self.device) != self.dtype and config.llm_quantize == "none":
            log.warning(
                "%s has no %s products: weights are widened in every step. --llm-dtype auto is faster here.",
                self.device,
                str(self.dtype).removeprefix("torch."),
            )
        self.backend = choose_paged(self.device, self.config.head_dim, self.dtype)
        with construction(torch.device("meta"), self.dtype):
            self.decoder = Decoder(found.config, self.backend).eval()
        self.ranks = _who_share(found.config, config, mesh)
        shard(self.decoder, sharding(found.config, self.ranks.size), self.ranks)
        self.tree = WeightTree(self.decoder, _files(found), RENAMES, ignored(found.config))
        forms = choose(self.decoder, config, self.device, self.dtype)
        self.weights = TextWeights(self.decoder, self.tree, self.device, forms)
        self._check_room(config, mesh)
        self.weights.load()
        self.graphs = _graphs(self.decoder, self.device, self.ranks)

    def _check_room(self, config: EngineConfig, mesh: Mesh) -> None:
        sharing = mesh.degrees.world * mesh.loading if self.device.type == "cpu" else 1
        free, needed = free_bytes(self.device, sharing), self.weights.needed
        if config.device_memory_limit is not None:
            free = min(free, config.device_memory_limit)
        if needed > free:
            raise ConfigError(
                f"{self.card.name} needs {units.size(needed)} for its weights in {str(self.dtype)[6:]}, and "
                f"{units.size(free)} are free on {self.device}. Use a smaller model, fewer bits per weight "
                "(--llm-quantize), or more ranks (--tp-size).",
                param="llm_path",
            )

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Compute a batch and keep its keys and values; → float32 [R, vocabulary], a row per wanted token."""
        logits = None if self.graphs is None else self.graphs.run(batch, cache)
        return self.decoder(batch, cache) if logits is None else logits

    def page_bytes(self, page_size: int) -> int:
        """Bytes of one page of keys and values on this rank."""
        return KVCache.page_bytes(
            self.config.layers, page_size, self.decoder.kv_heads, self.config.head_dim, self.dtype
        )

    def new_cache(self, pages: int, page_size: int) -> KVCache:
        """Memory for keys and values of this rank's heads."""
        heads, width = self.decoder.kv_heads, self.config.head_dim
        return KVCache(self.config.layers, pages, page_size, heads, width, self.dtype, self.device)

    def sleep(self) -> None:
        """Give the weights' memory back."""
        self.weights.take_out()
        self.decoder.unbind()
        if self.graphs is not None:
            self.graphs.clear()
        self.backend.clear()

    def wake(self) -> None:
        """Read the weights again. Raises: CorruptModel for files that are not as they were; it may be called again."""
        self.weights.load()


def load(card: TextCard, config: EngineConfig, mesh: Mesh | None = None) -> TextModel:
    """Load the described model. Raises: as `TextModel`."""
    return TextModel(card, config, mesh or Mesh.solo())


def _graphs(decoder: Decoder, device: torch.device, ranks: Group) -> DecodeGraphs | None:
    """For the steps of one rank on CUDA; `--kernels torch` is without."""
    if device.type != "cuda" or ranks.size > 1 or decoder.backend.name != "triton":
        return None
    from multimodal_gen.llm.decode_graphs import DecodeGraphs  # imports Triton

    return DecodeGraphs.of(decoder, device)


def _who_share(model: DecoderConfig, config: EngineConfig, mesh: Mesh) -> Group:
    """Ranks that were asked for by a picture model's heads need not suit those of the text model beside it.

    Raises: ConfigError where there is no picture model.
    """
    try:
        model.share(mesh.tp.size)
    except ConfigError as error:
        if config.model_path == NO_MODEL:
            raise
        log.info("each rank has all of the language model: %s", error.message)
        return SOLO
    return mesh.tp


def _files(found: TextCheckpoint) -> list[Path | TensorFile]:
    if found.format == "safetensors":
        return list(found.files)
    paired = {key: found.config.head_dim for key in found.tensors if PAIRED.fullmatch(key)}
    return [GgufFile(path, canonical, paired if found.family.gguf_pairs else {}) for path in found.files]
