"""The decoder of all families: what a batch of spans makes of tokens, one layer after the other."""

from __future__ import annotations

from torch import Tensor, nn

from multimodal_gen.attention.paged import Attend, PagedBackend
from multimodal_gen.kernels.decoder_layers import DecoderLayers, Rows, unavailable
from multimodal_gen.kernels.paged_attention import Spans
from multimodal_gen.llm.batch import Batch
from multimodal_gen.llm.kv_cache import KVCache
from multimodal_gen.llm.models.config import DecoderConfig
from multimodal_gen.llm.models.layer import At, Layer
from multimodal_gen.llm.models.rope import Rope
from multimodal_gen.llm.models.vocabulary import Vocabulary
from multimodal_gen.llm.models.whole import bind
from multimodal_gen.nn.norm import ThinRMSNorm


class Decoder(nn.Module):
    """Tokens → logits."""

    def __init__(self, config: DecoderConfig, backend: PagedBackend) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.embedding = Vocabulary(config.vocab_size, config.width, embeds=True)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = ThinRMSNorm(config.width, config.eps)
        self.head = None if config.tied else Vocabulary(config.vocab_size, config.width, embeds=False)
        self.rope = Rope(config.rope)
        self._bound: tuple[KVCache, DecoderLayers | None] | None = None  # filled by the first forward over a cache

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values that are computed here."""
        layer = self.layers[0]
        assert isinstance(layer, Layer)
        return layer.attention.qkv.kv_heads

    def unbind(self) -> None:
        """Weights or cache go away."""
        self._bound = None

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Compute the batch's tokens and keep their keys and values; → float32 [R, vocabulary] (`Batch.logits_at`)."""
        x = self.embedding.embed(batch.ids)
        rotation, whole = self.rope(batch.positions, x.dtype), self._whole(batch, x, cache)
        if whole is not None:
            spans = Spans.of(batch.spans, batch.page_size)
            x = whole(x, Rows(rotation.cos.flatten(1), rotation.sin.flatten(1), batch.slots, spans))
        else:
            x = self._through(x, At(batch, rotation, self.backend.plan(batch, cache.layers)), cache)
        return self._logits(x[batch.logits_at])

    def decode(self, batch: Batch, attend: Attend, cache: KVCache) -> Tensor:
        """The same, logits of all tokens, with attention that is planned already."""
        x = self.embedding.embed(batch.ids)
        return self._logits(self._through(x, At(batch, self.rope(batch.positions, x.dtype), attend), cache))

    def _through(self, x: Tensor, at: At, cache: KVCache) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x, at, cache, index)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        head = self.embedding if self.head is None else self.head
        return head.logits(self.norm(x))

    def _whole(self, batch: Batch, x: Tensor, cache: KVCache) -> DecoderLayers | None:
        """All layers in one call, where they can be: adapters are added between them."""
        if batch.routing is not None or unavailable(x):
            return None
        if self._bound is None or self._bound[0] is not cache:
            self._bound = cache, bind(self.layers, cache)
        return self._bound[1]
