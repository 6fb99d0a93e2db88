"""Adapters on the native Z-Image against diffusers and peft, where those are right; in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal_gen import DiffGenerator
from multimodal_gen.adapters import MERGE_MODES
from tests.support.adapters import Shapes, linear_shapes, only, peft_tensors, without, write_adapter
from tests.support.checkpoints import NEGATIVE, PROMPT
from tests.support.device import DEVICE, within

pytestmark = [pytest.mark.parity]

TOLERANCE = within(1e-5)  # ‖ours - theirs‖ / ‖theirs‖ of the latents after all steps
REQUEST = {"num_inference_steps": 4, "guidance_scale": 4.0, "width": 64, "height": 80, "seed": 3}
MODES = [mode for mode in MERGE_MODES if mode != "auto"]


@dataclass
class Bench:
    """One tiny checkpoint, both programs, and files for both."""

    gen: DiffGenerator
    pipe: Any
    shapes: Shapes
    folder: Path

    def file(self, name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
        return str(write_adapter(self.folder / f"{name}.safetensors", tensors, metadata))

    def ours(self, **options: Any) -> torch.Tensor:
        latents = self.gen.generate(PROMPT, output_type="latent", **{**REQUEST, **options}).latents
        assert latents is not None
        return latents

    def theirs(self, files: Sequence[str] = (), strengths: Sequence[float] = (), **options: Any) -> torch.Tensor:
        given = {**REQUEST, **options}
        names = [f"a{number}" for number in range(len(files))]
        try:
            for name, file in zip(names, files, strict=True):
                self.pipe.load_lora_weights(file, adapter_name=name)
            if names:
                self.pipe.set_adapters(names, list(strengths))
            latents: torch.Tensor = self.pipe(
                PROMPT,
                generator=torch.Generator().manual_seed(given.pop("seed")),
                output_type="latent",
                return_dict=False,
                **given,
            )[0]
        finally:
            self.pipe.unload_lora_weights()
        return latents


@pytest.fixture
def bench(z_image_folder: Callable[..., Path], reference: Callable[..., Any], tmp_path: Path) -> Any:
    folder = z_image_folder(heads=3, head_dim=24, layers=3, seed=21)
    pipe = reference(folder)
    with DiffGenerator.from_pretrained(str(folder), device=DEVICE, dtype="float32") as gen:
        yield Bench(gen, pipe, linear_shapes(pipe.transformer), tmp_path)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).norm() / want.norm())


SETS = [
    pytest.param([(4, 1.0, ())], id="one"),
    pytest.param([(4, -0.7, ())], id="negative"),
    pytest.param([(4, 0.0, ()), (2, 1.0, ())], id="zero first"),
    pytest.param([(4, 1.0, ("attention",)), (7, 0.5, ("feed_forward",))], id="different layers"),
    pytest.param([(3, 1.2, ("attention",)), (1, -0.4, ()), (8, 0.9, ("layers.0",))], id="three"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", SETS)
def test_ordered_sets_equal_peft(bench: Bench, wanted: list[tuple[int, float, tuple[str, ...]]], mode: str) -> None:
    files = [
        bench.file(f"f{i}", peft_tensors(only(bench.shapes, *parts) if parts else bench.shapes, rank=rank, seed=i))
        for i, (rank, _, parts) in enumerate(wanted)
    ]
    strengths = [strength for _, strength, _ in wanted]
    names = [f"n{i}" for i in range(len(files))]
    base = bench.ours()
    want = bench.theirs(files, strengths)
    bench.gen.set_lora(names, files, strength=strengths, merge_mode=mode)
    got = bench.ours()
    assert distance(got, base) > 100 * TOLERANCE, "the adapters do nothing here"
    assert distance(got, want) <= TOLERANCE
    bench.gen.set_lora(names[::-1], strength=strengths[::-1], merge_mode=mode)
    assert distance(bench.ours(), bench.theirs(files[::-1], strengths[::-1])) <= TOLERANCE
    assert bench.gen.list_loras().loaded[0].format == "diffusers: lora"


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_only_the_set_before_touched_is_pristine_again(bench: Bench, mode: str) -> None:
    """SGLang clears only the layers of the first adapter: what the second alone had touched leaks into the next set."""
    first = bench.file("first", peft_tensors(only(bench.shapes, "attention"), seed=1))
    second = bench.file("second", peft_tensors(only(bench.shapes, "feed_forward"), seed=2))
    bench.gen.set_lora(["first", "second"], [first, second], merge_mode=mode)
    bench.ours()
    bench.gen.set_lora("first", merge_mode=mode)
    assert distance(bench.ours(), bench.theirs([first], [1.0])) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_targets_mix_within_one_list(bench: Bench, mode: str) -> None:
    """`["all", "transformer"]`: each group must not clear the other."""
    text = linear_shapes(bench.pipe.text_encoder)
    both = {
        **peft_tensors(only(bench.shapes, "layers.1"), seed=1),
        **peft_tensors(only(text, "layers.0"), seed=5, prefix="text_encoder."),
    }
    mixed = bench.file("mixed", both)
    plain = bench.file("plain", peft_tensors(only(bench.shapes, "attention"), seed=2))
    bench.gen.set_lora(["mixed", "plain"], [mixed, plain], ["all", "transformer"], [0.5, 0.8], merge_mode=mode)
    got = bench.ours()
    state = bench.gen.list_loras()
    assert [(pin.tree, pin.nickname) for pin in state.active] == [
        ("transformer", "mixed"),
        ("text_encoder", "mixed"),
        ("transformer", "plain"),
    ]
    alone = bench.file("alone", {name: t for name, t in both.items() if name.startswith("transformer.")})
    with text_encoder_adapter(bench.pipe.text_encoder, both, 0.5):
        want = bench.theirs([alone, plain], [0.5, 0.8])
    assert distance(got, want) <= TOLERANCE
    bench.gen.set_lora(["mixed", "plain"], None, ["text_encoder", "transformer"], [0.5, 0.8], merge_mode=mode)
    with text_encoder_adapter(bench.pipe.text_encoder, both, 0.5):
        want = bench.theirs([plain], [0.8])
    assert distance(bench.ours(), want) <= TOLERANCE


class text_encoder_adapter:  # noqa: N801  a context manager that reads as a word
    """diffusers has no text encoder adapters for Z-Image: the reference is the sum, written into the weights."""

    def __init__(self, model: torch.nn.Module, tensors: dict[str, torch.Tensor], strength: float) -> None:
        self.model, self.strength = model, strength
        prefix = "text_encoder."
        self.pairs = {
            name.removeprefix(prefix).removesuffix(".lora_A.weight"): (
                tensor,
                tensors[name.replace("lora_A", "lora_B")],
            )
            for name, tensor in tensors.items()
            if name.startswith(prefix) and "lora_A" in name
        }

    def __enter__(self) -> None:
        self.before = {name: self.model.get_submodule(name).weight.detach().clone() for name in self.pairs}
        with torch.no_grad():
            for name, (down, up) in self.pairs.items():
                self.model.get_submodule(name).weight += self.strength * (up @ down)

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, weight in self.before.items():
                self.model.get_submodule(name).weight.copy_(weight)


def test_unmerging_is_exact_and_repeats_are_bit_equal(bench: Bench) -> None:
    file = bench.file("a", peft_tensors(bench.shapes))
    base = bench.ours()
    bench.gen.set_lora("a", file, merge_mode="merge")
    merged = bench.ours()
    for _ in range(3):
        bench.gen.unmerge_lora_weights()
        assert torch.equal(bench.ours(), base)
        assert bench.gen.list_loras().active == ()
        bench.gen.merge_lora_weights()
        assert torch.equal(bench.ours(), merged)
    bench.gen.merge_lora_weights(strength=0.5)
    assert distance(bench.ours(), bench.theirs([file], [0.5])) <= TOLERANCE
    bench.gen.set_lora([])
    assert torch.equal(bench.ours(), base)


def test_alpha_of_every_origin(bench: Bench) -> None:
    """peft's metadata as diffusers writes it, with patterns; `.alpha` tensors; the user's own."""
    import json

    shapes = only(bench.shapes, "layers.0", "layers.1")
    tensors = peft_tensors(shapes, rank=4, seed=9)
    config = {"r": 4, "lora_alpha": 10, "alpha_pattern": {"layers.0.attention.to_q": 3}, "target_modules": list(shapes)}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    by_metadata = bench.file("metadata", tensors, metadata)
    bench.gen.set_lora("metadata", by_metadata)
    want = bench.theirs([by_metadata], [1.0])
    assert distance(bench.ours(), want) <= TOLERANCE
    alphas = {f"transformer.{m}.alpha": torch.tensor(3.0 if m == "layers.0.attention.to_q" else 10.0) for m in shapes}
    bench.gen.set_lora("tensors", bench.file("tensors", {**tensors, **alphas}))
    assert distance(bench.ours(), want) <= TOLERANCE
    bench.gen.set_lora("given", by_metadata, lora_alpha=2.5)
    plain = bench.file("plain", tensors)
    assert distance(bench.ours(), bench.theirs([plain], [2.5 / 4])) <= TOLERANCE
    rslora = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 3, "transformer.use_rslora": True})}
    bench.gen.set_lora("rslora", bench.file("rslora", tensors, rslora))
    assert distance(bench.ours(), bench.theirs([plain], [3 / 4**0.5])) <= TOLERANCE


def test_guidance_negative_prompts_and_images_of_one_prompt(bench: Bench) -> None:
    file = bench.file("a", peft_tensors(without(bench.shapes, ["t_embedder"])))
    for options in ({"guidance_scale": 0.0}, {"negative_prompt": NEGATIVE}, {"width": 96, "height": 48}):
        want = bench.theirs([file], [0.8], **options)
        for mode in MODES:
            bench.gen.set_lora("a", file, strength=0.8, merge_mode=mode)
            assert distance(bench.ours(**options), want) <= TOLERANCE, (options, mode)


@pytest.mark.parametrize("mode", MODES)
def test_every_linear_layer_takes_an_adapter(bench: Bench, mode: str) -> None:
    """One module at a time, so that none can be forgotten on the way of the overlays."""
    for number, (module, shape) in enumerate(bench.shapes.items()):
        file = bench.file("one", peft_tensors({module: shape}, seed=number, size=1.0))
        bench.gen.set_lora("one", file, merge_mode=mode)
        want = bench.theirs([file], [1.0], num_inference_steps=1)
        assert distance(bench.ours(num_inference_steps=1), want) <= TOLERANCE, module
