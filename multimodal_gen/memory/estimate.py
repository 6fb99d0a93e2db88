"""What a plan costs in time: bytes that move in a step against what is computed meanwhile. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from multimodal_gen.memory.shares import DENOISE, MemoryPlan, Sizes
from multimodal_gen.request import ModelCard


@dataclass(frozen=True)
class Rates:
    """How fast a machine is; filled by `measure.rates`, or from the table of GPUs."""

    flops: float  # of long products in the model's dtype, per second
    pinned: float  # bytes per second from page-locked memory to the device
    pageable: float  # from other memory; on a CPU, from the page cache
    file: float  # from the disk


@dataclass(frozen=True)
class Load:
    """What one denoising step computes."""

    tokens: int  # of the transformer, for one output
    branches: int  # forwards per step: 2 with guidance

    @classmethod
    def of(cls, card: ModelCard) -> Load:
        """A request with the model's defaults."""
        defaults = card.defaults
        group = 1 if card.video is None else card.video.frames_per_latent
        frames = (defaults.num_frames - 1) // group + 1
        tokens = defaults.width * defaults.height // card.pixels_per_token * frames
        return cls(max(1, tokens), 2 if defaults.guidance_scale > card.guidance_threshold else 1)


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step; filled by `step_cost`."""

    compute: float
    transfer: float

    @property
    def slowdown(self) -> float:
        """What streaming adds, as a share of computing: 0.06 is six per cent; 0 where all copies are hidden."""
        return max(0.0, self.transfer - self.compute) / self.compute


def moved_per_step(plan: MemoryPlan, sizes: Sequence[Sizes]) -> int:
    """Bytes that pass to the device in one step; of several transformers, one runs at a time."""
    return max((_moved(plan, part) for part in sizes), default=0)


def step_cost(plan: MemoryPlan, sizes: Sequence[Sizes], load: Load, rates: Rates, itemsize: int) -> StepCost | None:
    """One step of one request that is alone; None for a model whose layers are not known.

    Args:
        itemsize: bytes of a number of the weights.
    """
    flops = max((_flops(part, load, itemsize) for part in sizes if part.stage == DENOISE), default=0.0)
    if not flops:
        return None
    # All branches of guidance are in one forward, so that every layer passes once.
    return StepCost(flops / rates.flops, _seconds(plan, sizes, rates))


def _moved(plan: MemoryPlan, part: Sizes) -> int:
    return sum(plan.shares[part.name].streamed(part, part.once)) if part.stage == DENOISE else 0


def _seconds(plan: MemoryPlan, sizes: Sequence[Sizes], rates: Rates) -> float:
    """Of the copies of a step. What every step needs has the fastest tiers; two experts share them evenly."""
    total = sum(_moved(plan, part) for part in sizes)
    if not total:
        return 0.0
    pinned = min(1.0, plan.pinned_bytes / total)
    pageable = min(1.0, plan.host_bytes / total) - pinned
    per_byte = pinned / rates.pinned + pageable / rates.pageable + (1 - pinned - pageable) / rates.file
    return moved_per_step(plan, sizes) * per_byte


def _flops(part: Sizes, load: Load, itemsize: int) -> float:
    """Of one step: two per weight and token, and attention of all tokens to all tokens."""
    layers = [size / itemsize for size in part.layers[part.once :]]
    # A block of width d has some 13 d^2 weights: four or eight d x d projections and a feed-forward of 5 to 8 d^2.
    attention = sum(4 * load.tokens**2 * (weights / 13) ** 0.5 for weights in layers)
    return load.branches * (2 * load.tokens * sum(layers) + attention)
