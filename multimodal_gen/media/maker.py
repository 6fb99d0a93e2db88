"""Who made an output: what shapes pixels besides the request, as recipes tell it."""

from __future__ import annotations

from dataclasses import dataclass

from multimodal_gen.config import EngineConfig
from multimodal_gen.media.recipe import Recipe, origin
from multimodal_gen.messages import Ready
from multimodal_gen.request import AnyRequest, ModelCard


@dataclass(frozen=True)
class Maker:
    """A worker, its settings and its model."""

    ready: Ready
    config: EngineConfig
    card: ModelCard

    def recipe(self, request: AnyRequest, index: int, merged: tuple[str, ...]) -> Recipe:
        """The recipe of output `index`; `merged` as in `messages.Finished`."""
        repository, revision = origin(self.config, self.card)
        return Recipe.of(
            request,
            index,
            dtype=self.ready.dtype,
            device=self.ready.device,
            attention_backend=self.ready.attention_backend,
            deterministic=self.config.deterministic,
            quantize=self.config.quantize,
            kernels=self.config.kernels,
            compiled=self.config.compile,
            vae_tiling=self.config.vae_tiling,
            repository=repository,
            revision=revision,
            max_batch_tokens=self.config.max_batch_tokens,
            threads=self.ready.threads,
            merged=merged,
        )
