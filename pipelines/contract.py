"""The step contract between the engine and every model family.

The engine calls four verbs: `encode` (prompt → conditions), `prepare` (seed → noise), `denoise` (ONE step for a batch
of rows, again and again) and `decode` (latents → pixels). There is no other denoising loop in the repository.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from multimodal_gen.lora.applied import BASE, Applied
from multimodal_gen.lora.names import AdapterTarget
from multimodal_gen.pipelines.history import PREFIX, History
from multimodal_gen.request import AnyRequest, Defaults, ModelCard

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from multimodal_gen.memory.residency import Memory
    from multimodal_gen.weights.loading import WeightTree


@dataclass(frozen=True)
class Variant:
    """Published checkpoints of one family that want other defaults than the family's."""

    names: tuple[str, ...]  # folder or repository base names, lower case
    defaults: Defaults


@dataclass(frozen=True)
class Spec:
    """What a family is; one constant `SPEC` per family folder, importable without torch."""

    family: str
    title: str
    pipeline_classes: tuple[str, ...]  # `_class_name` in model_index.json
    pipeline: str  # "module:Class", imported in the worker only
    describe: str  # "module:function", (name, folder) -> ModelCard, without torch
    variants: tuple[Variant, ...] = ()
    adapters: tuple[AdapterTarget, ...] = ()  # what LoRA files may change
    high: tuple[str, ...] | None = (
        None  # patterns of layers that --quantize leaves alone; None: it leaves out the family
    )


@dataclass
class Conditions:
    """What the text (or image) encoder made of a request; families subclass it with their tensors."""

    prompt_tokens: int  # filled by encode: tokens of the prompt, after truncation
    warnings: tuple[str, ...] = ()  # filled by encode: what the user should know (a truncated prompt)
    row_tokens: int | None = None  # filled by encode: transformer tokens per step of one row, where known exactly


@dataclass
class Sampler:
    """A row's own solver state; families subclass it with what their solver needs."""

    def tensors(self) -> dict[str, Tensor]:
        """What the solver has gathered from the steps so far; nothing for solvers without memory."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Become what `tensors` were taken from, `step` steps into the same schedule."""


@dataclass
class Row:
    """One image or video of one request: all that is needed to pause it at a step and go on elsewhere."""

    request: AnyRequest  # filled by the engine
    index: int  # filled by the engine: which of the request's outputs
    adapters: Applied = BASE  # filled by the engine: what the request's adapters come to
    conditions: Conditions | None = None  # filled by encode
    latents: torch.Tensor | None = None  # filled by prepare, replaced by denoise: float32 [C, h, w] or [C, f, h, w]
    sampler: Sampler | None = None  # filled by prepare
    step: int = 0  # advanced by denoise: steps done
    clean: torch.Tensor | None = None  # filled by denoise for rows that want previews: estimate of the clean latents
    history: History = field(default_factory=History)  # replaced by denoise, for rows with a step cache

    @property
    def seed(self) -> int:
        """The seed of this output's noise."""
        return self.request.seeds[self.index]

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.request.num_inference_steps

    def tensors(self) -> dict[str, Tensor]:
        """What `restore` needs to go on from this step."""
        assert self.latents is not None, "prepare() fills row.latents"
        assert self.sampler is not None, "prepare() fills row.sampler"
        return {"latents": self.latents, **self.sampler.tensors(), **self.history.tensors()}

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Be where `tensors` were taken; the row has been prepared."""
        assert self.sampler is not None, "prepare() fills row.sampler"
        self.latents = tensors["latents"]
        own = {name: value for name, value in tensors.items() if name != "latents" and not name.startswith(PREFIX)}
        self.sampler.restore(own, step)
        self.history = History.of(tensors)
        self.step = step


@dataclass
class PipelineInfo:
    """Facts of a loaded pipeline that the outside may see."""

    device: str
    dtype: str
    attention_backend: str
    parameters: int  # of all components
    cache: CacheUse = field(default_factory=lambda: CacheUse())


@dataclass
class CacheUse:
    """Use of the conditions cache since start."""

    bytes: int = 0
    hits: int = 0
    misses: int = 0


class Pipeline(Protocol):
    """A loaded model. Verbs leave their rows untouched when they raise, so that a row can be tried again."""

    card: ModelCard
    info: PipelineInfo
    trees: Mapping[str, WeightTree]  # what adapters can change, by the names of the spec's targets
    memory: Memory  # where its weights are

    def encode(self, rows: Sequence[Row]) -> None:
        """Fill `row.conditions`; rows of one request share the object."""

    def prepare(self, row: Row) -> None:
        """Fill latents (noise from a CPU generator seeded with `row.seed`) and sampler."""

    def denoise(self, rows: Sequence[Row]) -> None:
        """Advance every row by ONE step; each row has its own size, timestep, guidance and prompt."""

    def decode(self, row: Row) -> Iterator[np.ndarray | None]:
        """Final latents → uint8, piece by piece; between two pieces other rows may be denoised.

        Yields: a picture [height, width, 3] in the end, or the next frames of a video, [f, height, width, 3]; None
        where a piece of work has made nothing to show yet.
        """

    def preview(self, row: Row) -> np.ndarray:
        """`row.clean` → uint8 [height, width, 3]."""

    def release(self, row: Row) -> None:
        """Free what the row holds outside itself; called once when it leaves, finished, cancelled or failed."""

    def forget(self) -> None:
        """Let go of what was kept for the adapters in use until now and is quickly made again."""

    def reset(self) -> None:
        """Let go of all that was kept for reuse: after a failure that some ranks did not see, caches may differ."""


def whole(pieces: Iterable[np.ndarray | None]) -> np.ndarray:
    """What `decode` has made, together: [height, width, 3] or [frames, height, width, 3]."""
    import numpy as np

    made = [piece for piece in pieces if piece is not None]
    return made[0] if len(made) == 1 else np.concatenate(made)
