"""What a user asks for and gets: plain data, no torch, no behaviour.

`SamplingParams` is the wish (None = the model's default). `resolve.resolve` turns it into an `ImageRequest` or a
`VideoRequest`, in which every value is settled and the cost is known, or raises the error that names the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from multimodal_gen.adapters import Pin
from multimodal_gen.step_cache import NONE, AnyStepCache

MAX_N = 10
MAX_STEPS = 1000
MAX_PROMPT_CHARS = 32_000
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 100.0
MAX_PREVIEWS = 3
MAX_FPS = 120
MAX_FLOW_SHIFT = 100.0

OutputKind = Literal["pixels", "latent"]
Media = Literal["image", "video"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to sample. Every field left None takes the model's default."""

    negative_prompt: str | None = None
    width: int | None = None
    """pixels"""
    height: int | None = None
    """pixels"""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    """classifier-free guidance weight, in the convention of the model family; 0 = one forward per step"""
    seed: int | Sequence[int] | None = None
    """output i uses seed + i; a list gives one seed per output; None draws one"""
    num_outputs_per_prompt: int = 1
    num_frames: int | None = None
    """frames of a video"""
    fps: int | None = None
    """frames per second of the video's file; changes no pixel"""
    guidance_scale_2: float | None = None
    """weight of the second expert, for the low-noise steps; None: the same as guidance_scale"""
    flow_shift: float | None = None
    """shift of the noise schedule towards noise; None: the checkpoint's"""
    image: bytes | None = None
    """picture that a video starts from, as the PNG that `media.reference` makes"""
    cfg_normalization: float = 0.0
    """cap of the guided prediction's norm as a multiple of the unguided one's; 0 = no cap"""
    cfg_truncation: float | None = 1.0
    """guidance stops once the normalised time (0 noise … 1 clean) passes this; None = never"""
    max_sequence_length: int | None = None
    """prompt tokens kept"""
    step_cache: str | None = None
    """steps that may be extrapolated instead of computed: `METHOD:KEY=VALUE,…` (`step_cache.py`), or none; None: what
    the engine's settings say"""
    priority: int = 0
    """higher runs first"""
    deadline_s: float | None = None
    """seconds from arrival after which the answer is worthless and the request is dropped"""


OF_IMAGES = frozenset({"cfg_normalization", "cfg_truncation"})
OF_VIDEOS = frozenset({"num_frames", "fps", "guidance_scale_2", "flow_shift", "image"})
"""`SamplingParams` fields that mean nothing for the other media"""


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """A model's own choice for what the user leaves open."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int = 512
    guidance_scale_2: float | None = None
    """None: the same as guidance_scale"""
    num_frames: int = 1
    fps: int | None = None


class VideoLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a video model can make; filled by the family's `describe`."""

    frames_per_latent: int
    """frames after the first come in groups of this many: num_frames = k x frames_per_latent + 1"""
    max_frames: int
    image: Literal["none", "optional", "required"]
    """whether a video can, or must, start from a picture"""


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What the outside needs to know of a model; filled by `engine.describe` from the model's folder, without torch."""

    name: str
    family: str
    pipeline_class: str
    task: Literal["text-to-image", "text-to-video", "image-to-video"]
    path: str
    defaults: Defaults
    parameters: frozenset[str]
    """names of the `SamplingParams` fields that this model honours"""
    size_multiple: int
    """width and height must be multiples of this many pixels"""
    min_side: int
    max_side: int
    pixels_per_token: int
    """pixels per transformer token of an image, or of one latent frame: the cost of a step is counted in tokens"""
    max_sequence_length: int
    guidance_threshold: float
    """two forwards per step are needed when guidance_scale is above this"""
    previews: bool = True
    """whether intermediate images can be decoded"""
    latents: bool = True
    """whether final latents can be returned instead of pixels"""
    exclusive: bool = False
    """rows cannot share the model: each runs from its first step to its last before another starts"""
    video: VideoLimits | None = None
    """None for models of images"""
    heads: int = 0
    """attention heads of the transformer, which parallel workers share out; 0: unknown, one worker only"""
    step_cache: str = NONE
    """of requests that leave it open; filled by `registry.describe` from the settings"""

    @property
    def media(self) -> Media:
        """What it makes."""
        return "image" if self.video is None else "video"


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine needs to know of a settled request, whatever it makes; read by everyone after `resolve`."""

    id: str
    model: str
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seeds: tuple[int, ...]
    """one per output"""
    max_sequence_length: int
    loras: tuple[Pin, ...] = ()
    """adapters per module tree, in the order of addition"""
    own_loras: bool = False
    """the list came with the request; False: it is the active one of the moment when the request arrived"""
    output: OutputKind = "pixels"
    previews: int = 0
    """intermediate images per output"""
    checkpoint_every: int = 0
    """steps between the row states that the engine hands out (`messages.Checkpoint`); 0: none"""
    step_cache: AnyStepCache | None = None
    """which steps may be extrapolated; None: every step is computed"""
    priority: int = 0
    deadline_s: float | None = None
    """seconds that were left when this message was sent"""
    fair_key: str = ""
    """requests with the same key share one fair portion of the machine"""
    row_tokens: int = 0
    """transformer tokens that one output of this request adds to a step, guidance included"""

    @property
    def n(self) -> int:
        """Number of outputs."""
        return len(self.seeds)

    @property
    def cost(self) -> int:
        """Token-steps of the whole request: the unit of queue limits and budgets."""
        return self.row_tokens * self.num_inference_steps * self.n


class ImageRequest(GenerationRequest, frozen=True, kw_only=True, tag="image"):
    """Images of one prompt; made by `resolve`."""

    cfg_normalization: float
    cfg_truncation: float | None


class VideoRequest(GenerationRequest, frozen=True, kw_only=True, tag="video"):
    """Videos of one prompt; made by `resolve`."""

    num_frames: int
    fps: int
    """of the file; changes no pixel"""
    guidance_scale_2: float | None = None
    """weight of the second expert; None where the model has none"""
    flow_shift: float | None = None
    """None: the checkpoint's"""
    image: bytes | None = None
    """PNG that the video starts from"""
    stream_frames: bool = False
    """frames leave the engine as they are made (`messages.Frames`), not all of them at the end"""


AnyRequest = ImageRequest | VideoRequest


class Timings(msgspec.Struct, kw_only=True):
    """Where the time of one request went, in seconds."""

    queue: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0
    steps: int = 0
    """denoising steps of one output"""
    cached_steps: int = 0
    """steps of all outputs together that were extrapolated instead of computed"""

    @property
    def per_step(self) -> float:
        """Mean seconds per denoising step."""
        return self.denoise / self.steps if self.steps else 0.0
