"""`DiffGenerator` with the bundled model: what comes out, where files go, and what is left after a failure."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from multimodal_gen import DiffGenerator, GenerationResult, SamplingParams
from multimodal_gen.errors import GenerationFailed, InvalidValue, RequestTooLarge, UnknownParameter
from multimodal_gen.media.recipe import read_recipe
from multimodal_gen.messages import Progress

pytestmark = [pytest.mark.unit]

QUICK: dict[str, Any] = {
    "width": 64,
    "height": 64,
    "num_inference_steps": 2,
    "guidance_scale": 0.0,
    "seed": 7,
}


def load(**options: Any) -> DiffGenerator:
    return DiffGenerator.from_pretrained(device="cpu", dtype="float32", **options)


@pytest.fixture(scope="module")
def gen() -> Iterator[DiffGenerator]:
    with load() as generator:
        yield generator


@pytest.fixture(scope="module")
def made(gen: DiffGenerator) -> GenerationResult:
    return gen.generate("a teapot", output_type="np", **QUICK)


@pytest.fixture
def untouched(gen: DiffGenerator) -> Iterator[DiffGenerator]:
    """The generator; the test must not make it compute."""
    steps = list[Progress]()
    real = gen.generate

    def watched(*arguments: Any, **options: Any) -> Any:
        return real(*arguments, on_step=steps.append, **options)

    gen.generate = watched  # type: ignore[method-assign]
    yield gen
    del gen.generate
    assert steps == []


def test_numpy_images_and_the_facts_beside_them(made: GenerationResult) -> None:
    (image,) = made.images
    assert (image.dtype, image.shape) == (np.uint8, (64, 64, 3))
    assert image.std() > 5
    assert (made.prompt, made.seed, made.seeds, made.latents, made.paths) == ("a teapot", 7, (7,), None, [])
    assert (made.request.width, made.request.num_inference_steps, made.request.guidance_scale) == (64, 2, 0.0)
    assert made.prompt_tokens > 0
    assert made.timings.steps == 2
    assert 0 < made.timings.denoise <= made.timings.total


def test_pil_and_torch_images_show_the_same_pixels(gen: DiffGenerator, made: GenerationResult) -> None:
    (pil,) = gen.generate("a teapot", **QUICK).images
    assert isinstance(pil, Image.Image)
    assert (pil.mode, pil.size) == ("RGB", (64, 64))
    assert np.array_equal(np.asarray(pil), made.images[0])
    (tensor,) = gen.generate("a teapot", output_type="pt", **QUICK).images
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (3, 64, 64))
    assert torch.equal((tensor * 255).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(made.images[0]))


def test_latents_come_instead_of_images(gen: DiffGenerator) -> None:
    result = gen.generate("a teapot", output_type="latent", num_outputs_per_prompt=2, **QUICK)
    assert result.images == []
    assert result.latents is not None
    assert (result.latents.dtype, result.latents.shape[0], result.latents.ndim) == (torch.float32, 2, 4)
    assert result.latents.shape[2] == result.latents.shape[3] < 64
    assert result.latents.isfinite().all()
    assert not torch.equal(result.latents[0], result.latents[1])


def test_a_list_of_prompts_is_answered_in_its_order(gen: DiffGenerator, made: GenerationResult) -> None:
    results = gen.generate(["a red apple", "a teapot", "a rocket"], output_type="np", **QUICK)
    assert [result.prompt for result in results] == ["a red apple", "a teapot", "a rocket"]
    # In company the pixels may round differently; another prompt's picture is far away.
    distances = [np.abs(result.images[0].astype(int) - made.images[0]).mean() for result in results]
    assert distances[1] < 1
    assert min(distances[0], distances[2]) > 5
    (only,) = gen.generate(["a teapot"], output_type="np", **QUICK)
    assert np.array_equal(only.images[0], made.images[0])
    assert gen.generate([]) == []


def test_keywords_take_precedence_over_sampling_params(gen: DiffGenerator) -> None:
    params = SamplingParams(**{**QUICK, "num_inference_steps": 1, "seed": 3})
    result = gen.generate("a teapot", sampling_params=params, output_type="np", seed=[5, 9], num_outputs_per_prompt=2)
    assert (result.seeds, len(result.images), result.timings.steps) == ((5, 9), 2, 1)
    assert params.seed == 3
    with pytest.raises(UnknownParameter, match="Did you mean 'num_inference_steps'"):
        gen.generate("a teapot", num_inference_step=1)
    with pytest.raises(InvalidValue, match="Did you mean 'latent'") as caught:
        gen.generate("a teapot", output_type="latents")
    assert caught.value.param == "output_type"


def test_every_step_of_every_image_is_reported(gen: DiffGenerator) -> None:
    seen = list[Progress]()
    gen.generate("a teapot", on_step=seen.append, num_outputs_per_prompt=2, **QUICK)
    assert sorted((event.index, event.step, event.steps) for event in seen) == [
        (0, 1, 2),
        (0, 2, 2),
        (1, 1, 2),
        (1, 2, 2),
    ]


@pytest.mark.parametrize(("name", "kind"), [("teapot.png", "PNG"), ("new/teapot.JPG", "JPEG"), ("teapot.webp", "WEBP")])
def test_an_image_suffix_names_the_file(
    gen: DiffGenerator, made: GenerationResult, tmp_path: Path, name: str, kind: str
) -> None:
    result = gen.generate("a teapot", output_path=tmp_path / name, **QUICK)
    assert result.paths == [tmp_path / name]
    with Image.open(tmp_path / name) as image:
        assert image.format == kind
        assert np.abs(np.asarray(image).astype(int) - made.images[0]).mean() < (1 if kind == "PNG" else 8)
    recipe = read_recipe(tmp_path / name)
    assert (recipe.prompt, recipe.seeds, recipe.device, recipe.dtype) == ("a teapot", (7,), "cpu", "float32")
    assert (recipe.repository, recipe.revision, recipe.max_batch_tokens) == (None, None, None)
    assert recipe.threads == torch.get_num_threads()
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [Path(name).name]


def test_any_other_name_is_a_folder(gen: DiffGenerator, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "v1.5"
    for _ in range(2):
        results = gen.generate(["a teapot", "a teapot"], output_path=str(folder), **QUICK)
        assert all(path.parent == folder for result in results for path in result.paths)
    assert len(list(folder.iterdir())) == 4
    assert {path.suffix for path in folder.iterdir()} == {".png"}


def test_outputs_that_cannot_be_are_refused_before_anything_is_computed(
    untouched: DiffGenerator, tmp_path: Path
) -> None:
    (tmp_path / "taken.png").write_bytes(b"precious")
    (tmp_path / "plain").write_bytes(b"precious")
    for name, options, message in (
        ("taken.png", {}, "exists already"),
        ("plain", {}, "plain is not a folder"),
        ("plain/deep/a.png", {}, "plain is not a folder"),
        ("a.gif", {}, ".gif is no format for images"),
        ("a.SVG", {}, ".svg is no format for images"),
        ("a.png", {"num_outputs_per_prompt": 2}, "2 images are asked for; name a folder"),
        ("a.png", {"output_type": "latent"}, "output_path takes images"),
        ("folder", {"output_type": "latent"}, "output_path takes images"),
    ):
        with pytest.raises(InvalidValue) as caught:
            untouched.generate("a teapot", output_path=tmp_path / name, **{**QUICK, **options})
        assert message in caught.value.message
        assert caught.value.param == "output_path"
    with pytest.raises(InvalidValue, match="2 images"):
        untouched.generate(["a", "b"], output_path=tmp_path / "a.png", **QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "taken.png"]
    assert (tmp_path / "taken.png").read_bytes() == b"precious"


def test_max_queue_cost_bounds_one_call(gen: DiffGenerator, made: GenerationResult) -> None:
    with load(max_queue_cost=2 * made.request.cost) as small:
        assert len(small.generate(["a", "b"], **QUICK)) == 2
        with pytest.raises(RequestTooLarge, match="max_queue_cost") as caught:
            small.generate(["a", "b", "c"], **QUICK)
    assert f"{3 * made.request.cost:,} token-steps" in caught.value.message


def test_a_failure_ends_its_call_and_the_next_one_works(made: GenerationResult) -> None:
    with load(fault="denoise:raise:1") as broken:
        before = broken.info
        with pytest.raises(GenerationFailed, match="InjectedFault"):
            broken.generate("a teapot", **QUICK)
        assert np.array_equal(broken.generate("a teapot", output_type="np", **QUICK).images[0], made.images[0])
        assert broken.info is before  # the same engine: nothing was loaded again


def test_a_sick_engine_is_loaded_anew(made: GenerationResult, caplog: pytest.LogCaptureFixture) -> None:
    with load(fault="denoise:raise:3", max_consecutive_errors=2) as broken:
        before = broken.info
        for _ in range(2):
            with pytest.raises(GenerationFailed):
                broken.generate("a teapot", **QUICK)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "multimodal_gen.generator"):
            # The third fault stays with the engine that it was planned for.
            again = broken.generate("a teapot", output_type="np", **QUICK)
        assert [record.message for record in caplog.records] == ["2 failures in a row: loading emoji-image anew"]
        assert broken.info is not before
        assert np.array_equal(again.images[0], made.images[0])
        after = broken.info
        broken.generate("a teapot", **QUICK)
        assert broken.info is after


def test_ctrl_c_in_on_step_leaves_nothing_queued(gen: DiffGenerator, made: GenerationResult) -> None:
    def interrupt(_event: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gen.generate(["a red apple", "a rocket"], on_step=interrupt, **QUICK)
    seen = list[Progress]()
    after = gen.generate("a teapot", output_type="np", on_step=seen.append, **QUICK)
    assert {event.request_id for event in seen} == {after.request.id}
    assert np.array_equal(after.images[0], made.images[0])


def test_a_closed_generator_says_so() -> None:
    with load() as closed:
        assert closed.card.name == "emoji-image"
    with pytest.raises(InvalidValue, match="closed"):
        closed.generate("a teapot", **QUICK)
    with pytest.raises(InvalidValue, match="closed"):
        _ = closed.info
    closed.close()


def test_a_recipe_holds_every_setting_of_the_request(gen: DiffGenerator, made: GenerationResult) -> None:
    recipe = msgspec.structs.asdict(gen.recipe(made, 0))
    request = msgspec.structs.asdict(made.request)
    not_pixels = {"id", "own_loras", "output", "previews", "priority", "deadline_s", "fair_key", "row_tokens"} | {
        "checkpoint_every"
    }
    assert {name: recipe[name] for name in request.keys() - not_pixels} == {
        name: value for name, value in request.items() if name not in not_pixels
    }
