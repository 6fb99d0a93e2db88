"""Adapters on the native Wan family against diffusers and peft; in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multimodal_gen import DiffGenerator
from multimodal_gen.errors import AdapterMismatch
from tests.support.adapters import Shapes, linear_shapes, only, peft_tensors, write_adapter
from tests.support.checkpoints import PROMPT
from tests.support.device import DEVICE, within

pytestmark = [pytest.mark.parity]

TOLERANCE = within(1e-5)  # ‖ours - theirs‖ / ‖theirs‖ of the latents after all steps
REQUEST = {"num_inference_steps": 4, "guidance_scale": 4.0, "width": 64, "height": 96, "num_frames": 9, "seed": 3}
MODES = ["merge", "dynamic"]
# The original repository's names of diffusers' modules, as ComfyUI's files have them.
ORIGINAL = {
    **{f"attn1.to_{x}": f"self_attn.{x}" for x in "qkv"},
    **{f"attn2.to_{x}": f"cross_attn.{x}" for x in "qkv"},
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


@dataclass
class Bench:
    """One tiny checkpoint, both programs, and files for both."""

    gen: DiffGenerator
    pipe: Any
    shapes: Shapes
    folder: Path
    image: Image.Image | None

    def file(self, name: str, tensors: dict[str, torch.Tensor]) -> str:
        return str(write_adapter(self.folder / f"{name}.safetensors", tensors))

    def ours(self, **options: Any) -> torch.Tensor:
        latents = self.gen.generate(PROMPT, output_type="latent", image=self.image, **{**REQUEST, **options}).latents
        assert latents is not None
        return latents

    def theirs(self, files: Sequence[tuple[str, float, bool]] = ()) -> torch.Tensor:
        """Files with strength, and whether the second expert gets them."""
        given = dict(REQUEST)
        given |= {} if self.image is None else {"image": self.image}
        by_expert: dict[bool, dict[str, float]] = {False: {}, True: {}}
        try:
            for number, (file, strength, second) in enumerate(files):
                name = f"a{number}"
                options = {"load_into_transformer_2": True} if second else {}
                self.pipe.load_lora_weights(file, adapter_name=name, **options)
                by_expert[second][name] = strength
            for second, adapters in by_expert.items():
                if adapters:
                    transformer = self.pipe.transformer_2 if second else self.pipe.transformer
                    transformer.set_adapters(list(adapters), list(adapters.values()))
            noise = torch.Generator().manual_seed(int(given.pop("seed")))
            latents: torch.Tensor = self.pipe(
                prompt=PROMPT, generator=noise, output_type="latent", return_dict=False, **given
            )[0]
        finally:
            self.pipe.unload_lora_weights()
        return latents


@pytest.fixture(params=["t2v", "i2v", "t2v_a14b"])
def bench(
    request: pytest.FixtureRequest, wan_folder: Callable[..., Path], reference: Callable[..., Any], tmp_path: Path
) -> Iterator[Bench]:
    boundary = {"boundary": 0.8} if request.param == "t2v_a14b" else {}  # two steps for each expert
    folder = wan_folder(variant=request.param, layers=3, seed=21, **boundary)
    image = Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 60).convert("RGB") if request.param == "i2v" else None
    pipe = reference(folder)
    with DiffGenerator.from_pretrained(str(folder), device=DEVICE, dtype="float32") as gen:
        yield Bench(gen, pipe, linear_shapes(pipe.transformer), tmp_path, image)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("mode", MODES)
def test_ordered_sets_equal_peft(bench: Bench, mode: str) -> None:
    two = (
        bench.gen.card.defaults.guidance_scale_2 is not None or "transformer_2" in bench.gen._engine.core.pipeline.trees
    )
    first = bench.file("first", peft_tensors(only(bench.shapes, "attn"), rank=4, seed=1))
    second = bench.file("second", peft_tensors(bench.shapes, rank=2, seed=2))
    base = bench.ours()
    assert distance(base, bench.theirs()) <= TOLERANCE
    bench.gen.set_lora(["a", "b"], [first, second], strength=[0.8, -0.5], merge_mode=mode)
    wanted = [(first, 0.8, False), (second, -0.5, False)]
    wanted += [(file, strength, True) for file, strength, _ in wanted] if two else []
    got = bench.ours()
    assert distance(got, base) > 100 * TOLERANCE
    assert distance(got, bench.theirs(wanted)) <= TOLERANCE
    bench.gen.set_lora("a", merge_mode=mode)
    again = [(first, 1.0, False)] + ([(first, 1.0, True)] if two else [])
    assert distance(bench.ours(), bench.theirs(again)) <= TOLERANCE
    bench.gen.set_lora([])
    assert torch.equal(bench.ours(), base)


@pytest.mark.parametrize("mode", MODES)
def test_every_linear_layer_takes_an_adapter(bench: Bench, mode: str) -> None:
    """One kind of module at a time, so that none can be forgotten: texts that are kept must change with them too."""
    kinds = dict.fromkeys(name.split(".", 2)[2] if name.startswith("blocks") else name for name in bench.shapes)
    for number, kind in enumerate(kinds):
        shapes = {name: shape for name, shape in bench.shapes.items() if name.endswith(kind)}
        file = bench.file("one", peft_tensors(shapes, seed=number, size=1.0))
        bench.gen.set_lora("one", file, target="transformer", merge_mode=mode)
        assert distance(bench.ours(), bench.theirs([(file, 1.0, False)])) <= TOLERANCE, kind


def test_names_of_the_original_repository(bench: Bench) -> None:
    shapes = only(bench.shapes, *ORIGINAL)
    tensors = peft_tensors(shapes, seed=5)
    bench.gen.set_lora("plain", bench.file("plain", tensors), target="transformer")
    want = bench.ours()
    renamed = {}
    for name, tensor in tensors.items():
        module = next(ours for ours in sorted(ORIGINAL, key=len, reverse=True) if f".{ours}." in name)
        renamed[name.replace("transformer.", "diffusion_model.").replace(f".{module}.", f".{ORIGINAL[module]}.")] = (
            tensor
        )
    bench.gen.set_lora("original", bench.file("original", renamed), target="transformer")
    assert torch.equal(bench.ours(), want)
    kohya = {}
    for name, tensor in renamed.items():
        path, _, kind = name.removeprefix("diffusion_model.").partition(".lora_")
        role = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[kind]
        kohya[f"lora_unet_{path.replace('.', '_')}.{role}"] = tensor
    bench.gen.set_lora("kohya", bench.file("kohya", kohya), target="transformer")
    assert torch.equal(bench.ours(), want)


def test_experts_take_adapters_of_their_own(bench: Bench) -> None:
    noisy = bench.file("noisy", peft_tensors(bench.shapes, seed=1))
    clean = bench.file("clean", peft_tensors(bench.shapes, seed=2))
    if "transformer_2" not in bench.gen._engine.core.pipeline.trees:
        named = bench.file("named", peft_tensors(bench.shapes, seed=2, prefix="transformer_2."))
        with pytest.raises(AdapterMismatch):
            bench.gen.set_lora("named", named)
        return
    want = bench.theirs([(noisy, 0.7, False), (clean, 0.9, True)])
    for mode in MODES:
        bench.gen.set_lora(["n", "c"], [noisy, clean], ["transformer", "transformer_2"], [0.7, 0.9], merge_mode=mode)
        assert distance(bench.ours(), want) <= TOLERANCE, mode
    named = bench.file("named", peft_tensors(bench.shapes, seed=2, prefix="transformer_2."))
    bench.gen.set_lora(["n", "named"], [noisy, named], ["transformer", "all"], [0.7, 0.9])
    assert distance(bench.ours(), want) <= TOLERANCE


def test_requests_with_their_own_adapters_share_a_forward(bench: Bench) -> None:
    file = bench.file("a", peft_tensors(bench.shapes, seed=1))
    bench.gen.set_lora("a", file, merge_mode="dynamic")
    own = bench.ours(loras=[{"nickname": "a", "strength": 0.5}])
    bench.gen.set_lora("a", strength=0.5, merge_mode="dynamic")
    assert distance(own, bench.ours()) <= TOLERANCE
