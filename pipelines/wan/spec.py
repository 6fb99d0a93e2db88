"""Wan: names, defaults and what a folder holds. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from multimodal_gen.errors import CorruptModel
from multimodal_gen.lora.names import AdapterTarget, Alias
from multimodal_gen.pipelines.contract import Spec, Variant
from multimodal_gen.pipelines.wan.config import WanConfig
from multimodal_gen.request import OF_IMAGES, Defaults, ModelCard, SamplingParams, VideoLimits
from multimodal_gen.weights.checkpoint import Checkpoint, Index, read_index, read_json

EXPERTS = ("transformer", "transformer_2")  # for noisy steps, for clean ones
TRAIN_STEPS = 1000
GUIDANCE_THRESHOLD = 1.0
MAX_SIDE = 2048
MAX_FRAMES = 1025

_480P = {"width": 832, "height": 480, "num_frames": 81, "fps": 16}
_720P = {"width": 1280, "height": 720, "num_frames": 81, "fps": 16}

# The names of the original repository (ComfyUI, kohya and musubi, lightx2v) for diffusers' modules.
_ORIGINAL = (
    *(Alias(rf"blocks\.(\d+)\.attn1\.to_{x}", rf"blocks.\1.self_attn.{x}") for x in "qkv"),
    Alias(r"blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.self_attn.o"),
    *(Alias(rf"blocks\.(\d+)\.attn2\.to_{x}", rf"blocks.\1.cross_attn.{x}") for x in "qkv"),
    Alias(r"blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.o"),
    *(Alias(rf"blocks\.(\d+)\.attn2\.add_{x}_proj", rf"blocks.\1.cross_attn.{x}_img") for x in "kv"),
    *(Alias(rf"blocks\.(\d+)\.attn1\.norm_{x}", rf"blocks.\1.self_attn.norm_{x}") for x in "qk"),
    *(Alias(rf"blocks\.(\d+)\.attn2\.norm_{x}", rf"blocks.\1.cross_attn.norm_{x}") for x in "qk"),
    Alias(r"blocks\.(\d+)\.attn2\.norm_added_k", r"blocks.\1.cross_attn.norm_k_img"),
    Alias(r"blocks\.(\d+)\.norm2", r"blocks.\1.norm3"),
    Alias(r"blocks\.(\d+)\.ffn\.net\.0\.proj", r"blocks.\1.ffn.0"),
    Alias(r"blocks\.(\d+)\.ffn\.net\.2", r"blocks.\1.ffn.2"),
    Alias(r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    Alias(r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    Alias(r"condition_embedder\.time_proj", "time_projection.1"),
    Alias(r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    Alias(r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    Alias(r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    Alias(r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    Alias(r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    Alias(r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    Alias(r"proj_out", "head.head"),
)
_MODULES = (
    *(f"blocks.0.attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")),
    *("blocks.0.attn2.add_k_proj", "blocks.0.attn2.add_v_proj", "blocks.0.norm2"),
    *("blocks.0.ffn.net.0.proj", "blocks.0.ffn.net.2", "patch_embedding", "proj_out"),
    *("condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder.linear_2"),
    *("condition_embedder.time_proj", "condition_embedder.text_embedder.linear_1"),
    "condition_embedder.text_embedder.linear_2",
)

# What stands between the blocks and the outside: patches, timestep, prompt, picture.
HIGH = (r"patch_embedding", r"time_(in|out|proj)", r"text_(in|out)", r"image_embedder\..+", r"proj_out")

SPEC = Spec(
    family="wan",
    title="Wan2.1 and Wan2.2 (text, or a picture, to video)",
    pipeline_classes=("WanPipeline", "WanImageToVideoPipeline"),
    pipeline="multimodal_gen.pipelines.wan.pipeline:WanPipeline",
    describe="multimodal_gen.pipelines.wan.spec:describe",
    variants=(
        Variant(
            ("wan2.1-t2v-1.3b-diffusers", "wan2.1-t2v-14b-diffusers"),
            Defaults(**_480P, num_inference_steps=50, guidance_scale=5.0),
        ),
        Variant(("wan2.1-i2v-14b-480p-diffusers",), Defaults(**_480P, num_inference_steps=40, guidance_scale=5.0)),
        Variant(("wan2.1-i2v-14b-720p-diffusers",), Defaults(**_720P, num_inference_steps=40, guidance_scale=5.0)),
        Variant(
            ("wan2.2-t2v-a14b-diffusers",),
            Defaults(**_720P, num_inference_steps=40, guidance_scale=4.0, guidance_scale_2=3.0),
        ),
        Variant(
            ("wan2.2-i2v-a14b-diffusers",),
            Defaults(**_480P, num_inference_steps=40, guidance_scale=3.5, guidance_scale_2=3.5),
        ),
        Variant(
            ("wan2.2-ti2v-5b-diffusers",),
            Defaults(width=1280, height=704, num_frames=121, fps=24, num_inference_steps=50, guidance_scale=5.0),
        ),
    ),
    adapters=(
        AdapterTarget(EXPERTS[0], EXPERTS[0], _MODULES, _ORIGINAL),
        # Files name no expert, or call both `transformer`; `target` says which one they change.
        AdapterTarget(EXPERTS[1], EXPERTS[1], _MODULES, _ORIGINAL, twin_of=EXPERTS[0]),
    ),
    high=HIGH,
)


@dataclass(frozen=True)
class Experts:
    """Which transformer makes which steps."""

    names: tuple[str, ...]
    boundary: float | None  # timestep from which on the first makes the step; None: it makes all

    @classmethod
    def of(cls, index: Checkpoint | Index) -> Experts:
        """Of `model_index.json`. Raises: CorruptModel for a boundary without a second expert, or the other way."""
        ratio = index.settings.get("boundary_ratio")
        second = EXPERTS[1] in index.components
        if ratio is not None and not second:
            raise CorruptModel(
                f"model_index.json has a boundary_ratio of {ratio} and no transformer_2: steps below that boundary "
                "need the second expert. Get the whole model; if it has one transformer only (Wan2.1), remove "
                "boundary_ratio."
            )
        if ratio is None and second:
            raise CorruptModel(
                "model_index.json lists transformer_2 and no boundary_ratio, which says when it is used."
            )
        if ratio is None:
            return cls(EXPERTS[:1], None)
        if not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
            raise CorruptModel(f"model_index.json: boundary_ratio must lie between 0 and 1, not {ratio!r}.")
        return cls(EXPERTS, ratio * TRAIN_STEPS)

    def at(self, time: float) -> str:
        """The expert of a timestep."""
        return self.names[0] if self.boundary is None or time >= self.boundary else self.names[1]


def describe(name: str, folder: Path) -> ModelCard:
    """The card of a Wan folder; `name` picks the variant."""
    index = read_index(folder)
    experts = Experts.of(index)
    transformer = WanConfig.from_json(read_json(folder, "transformer/config.json"))
    vae = read_json(folder, "vae/config.json")
    channels, scale = vae.get("z_dim", 16), vae.get("scale_factor_spatial", 8)
    image = _image_input(index, transformer, channels)
    multiple = scale * transformer.patch_size[1]
    unused = OF_IMAGES | ({"guidance_scale_2"} if experts.boundary is None else set())
    variant = next((v for v in SPEC.variants if name.lower() in v.names), SPEC.variants[0])
    return ModelCard(
        name=name,
        family=SPEC.family,
        pipeline_class=index.pipeline_class,
        task="image-to-video" if image == "required" else "text-to-video",
        path=str(folder),
        defaults=variant.defaults,
        parameters=frozenset(SamplingParams.__struct_fields__) - unused,
        size_multiple=multiple,
        min_side=2 * multiple,
        max_side=MAX_SIDE,
        pixels_per_token=multiple**2,
        max_sequence_length=512,
        guidance_threshold=GUIDANCE_THRESHOLD,
        previews=False,
        video=VideoLimits(frames_per_latent=vae.get("scale_factor_temporal", 4), max_frames=MAX_FRAMES, image=image),
        heads=transformer.num_attention_heads,
    )


def _image_input(index: Index, transformer: WanConfig, channels: int) -> Literal["none", "optional", "required"]:
    """Whether a video starts from a picture, by what the transformer's input has room for."""
    if index.settings.get("expand_timesteps"):
        return "optional"
    if transformer.in_channels == channels:
        return "none"
    if transformer.in_channels < 2 * channels or (transformer.image_dim and "image_encoder" not in index.components):
        raise CorruptModel(
            f"transformer/config.json: in_channels = {transformer.in_channels} and image_dim = {transformer.image_dim} "
            f"do not belong to a VAE of {channels} channels and the components {', '.join(sorted(index.components))}."
        )
    return "required"
