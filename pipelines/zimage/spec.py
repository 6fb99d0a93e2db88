"""Z-Image: names, defaults and the rename table. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multimodal_gen.errors import CorruptModel
from multimodal_gen.lora.names import AdapterTarget, Alias
from multimodal_gen.pipelines.contract import Spec, Variant
from multimodal_gen.request import OF_VIDEOS, Defaults, ModelCard, SamplingParams
from multimodal_gen.weights.checkpoint import read_json

_REFINED = (
    *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)
# Besides the checkpoint's names, adapter files use those of the original repository (ComfyUI, kohya, ai-toolkit).
TRANSFORMER = AdapterTarget(
    tree="transformer",
    folder="transformer",
    modules=(
        *(f"layers.0.attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")),
        *(f"layers.0.feed_forward.{name}" for name in ("w1", "w2", "w3")),
        "layers.0.adaLN_modulation.0",
        *(f"{tower}.0.{name}" for tower in ("noise_refiner", "context_refiner") for name in _REFINED),
        "noise_refiner.0.adaLN_modulation.0",
        *("all_x_embedder.2-1", "all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1"),
        *("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1"),
    ),
    aliases=(
        Alias(
            r"(.+\.attention)\.to_q",
            r"\1.qkv",
            parts=(r"\1.to_q", r"\1.to_k", r"\1.to_v"),
        ),
        Alias(r"(.+\.attention)\.to_([qkv])", r"\1.to.\2"),
        Alias(r"(.+\.attention)\.to_out\.0", r"\1.out"),
        Alias(r"(.+\.attention)\.to_out\.0", r"\1.to_out"),
        Alias(r"(.+\.attention)\.norm_([qk])", r"\1.\2_norm"),
        Alias(r"all_x_embedder\.2-1", "x_embedder"),
        Alias(r"all_final_layer\.2-1\.(.+)", r"final_layer.\1"),
    ),
)
TEXT_ENCODER = AdapterTarget(
    tree="text_encoder",
    folder="text_encoder",
    modules=(
        *(f"layers.0.self_attn.{name}_proj" for name in "qkvo"),
        *(f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
    ),
    aliases=(Alias(r"(layers\..+)", r"model.\1"),),
    strip=r"model\.",
)

# What stands between the blocks and the outside, and what the timestep does to them: a fiftieth of the weights.
HIGH = (r"(image|caption)_embedder", r"time_(in|out)", r"(.+\.)?modulation", r"final\.linear")

MAX_SIDE = 2048  # pixels; beyond it the VAE's activations alone take tens of gigabytes

SPEC = Spec(
    family="zimage",
    title="Z-Image and Z-Image-Turbo",
    pipeline_classes=("ZImagePipeline",),
    pipeline="multimodal_gen.pipelines.zimage.pipeline:ZImagePipeline",
    describe="multimodal_gen.pipelines.zimage.spec:describe",
    variants=(
        Variant(("z-image",), Defaults(width=1024, height=1024, num_inference_steps=50, guidance_scale=4.0)),
        Variant(("z-image-turbo",), Defaults(width=1024, height=1024, num_inference_steps=8, guidance_scale=0.0)),
        Variant(("emoji-image",), Defaults(width=128, height=128, num_inference_steps=20, guidance_scale=3.0)),
    ),
    adapters=(TRANSFORMER, TEXT_ENCODER),
    high=HIGH,
)


class _Config:
    """A component's config.json; a key that it lacks is an error that names the file."""

    def __init__(self, folder: Path, component: str) -> None:
        self.name = f"{component}/config.json"
        self.values = read_json(folder, self.name)

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise CorruptModel(f"{self.name} lacks {key!r}.")
        return self.values[key]


def describe(name: str, folder: Path) -> ModelCard:
    """The card of a Z-Image folder; `name` picks the variant."""
    text, vae, transformer = (_Config(folder, part) for part in ("text_encoder", "vae", "transformer"))
    vae_scale = 2 ** (len(vae["block_out_channels"]) - 1)
    multiple = vae_scale * transformer["all_patch_size"][0]
    variant = next((v for v in SPEC.variants if name.lower() in v.names), SPEC.variants[0])
    return ModelCard(
        name=name,
        family=SPEC.family,
        pipeline_class=SPEC.pipeline_classes[0],
        task="text-to-image",
        path=str(folder),
        defaults=variant.defaults,
        parameters=frozenset(SamplingParams.__struct_fields__) - OF_VIDEOS,
        size_multiple=multiple,
        min_side=2 * multiple,
        max_side=min(MAX_SIDE, multiple * min(transformer["axes_lens"][1:])),
        pixels_per_token=multiple**2,
        max_sequence_length=min(1024, text["max_position_embeddings"]),
        guidance_threshold=0.0,
        heads=transformer["n_heads"],
    )
