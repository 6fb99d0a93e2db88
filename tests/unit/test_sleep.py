"""A model in this process sleeps: its memory is free, and the same bytes come back wherever its weights were."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from multimodal_gen import DiffGenerator
from multimodal_gen.errors import Asleep, OutOfMemory, WeightsUnavailable
from tests.support.adapters import make_adapter_for
from tests.support.checkpoints import PROMPT, make_stable_diffusion, make_z_image

pytestmark = [pytest.mark.unit]

REQUEST: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64, "guidance_scale": 2.0, "seed": 5}
FILES = ["transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_z_image(tmp_path_factory.mktemp("model") / "z")


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter_for(folder, tmp_path_factory.mktemp("adapters") / "a.safetensors")


def latents(generator: DiffGenerator) -> Tensor:
    found = generator.generate(PROMPT, output_type="latent", **REQUEST).latents
    assert found is not None
    return found


@pytest.mark.parametrize("mode", ["merge", "dynamic"])
@pytest.mark.parametrize("offload", ["none", "layerwise", "component"])
def test_the_same_bytes_come_back_wherever_weights_are(folder: Path, adapter: Path, offload: str, mode: Any) -> None:
    with DiffGenerator.from_pretrained(str(folder), offload=offload, threads=1) as generator:
        base = latents(generator)
        generator.set_lora("a", adapter, merge_mode=mode)
        before, loras = latents(generator), generator.list_loras()
        assert not torch.equal(before, base)
        assert generator.sleep() > 0
        assert generator.sleep() == 0
        assert generator.list_loras() == loras
        for forbidden in (lambda: latents(generator), lambda: generator.set_lora([])):
            with pytest.raises(Asleep):
                forbidden()
        generator.wake()
        generator.wake()
        assert torch.equal(latents(generator), before)
        generator.set_lora([])
        assert torch.equal(latents(generator), base)


def test_the_memory_is_given_back_to_the_system() -> None:
    def resident() -> int:
        return int(psutil.Process().memory_info().rss)

    with DiffGenerator.from_pretrained("emoji-image", threads=1, dtype="float32") as generator:
        generator.generate(PROMPT, **REQUEST)
        for _ in range(2):
            before = resident()
            freed = generator.sleep()
            assert freed > 85 << 20
            assert before - resident() > 0.9 * freed
            generator.wake()


@pytest.mark.parametrize("offload", ["none", "layerwise", "component"])
@pytest.mark.parametrize("file", FILES)
def test_where_a_file_is_gone_it_sleeps_on(folder: Path, tmp_path: Path, offload: str, file: str) -> None:
    shutil.copytree(folder, tmp_path / "z")
    path = tmp_path / "z" / file
    with DiffGenerator.from_pretrained(str(tmp_path / "z"), offload=offload, threads=1) as generator:
        before = latents(generator)
        path.rename(tmp_path / "away")
        generator.wake()  # it is awake: nothing is read, and nothing ends
        assert generator.info.device == "cpu"
        (tmp_path / "away").rename(path)
        generator.sleep()
        path.rename(tmp_path / "away")
        for _ in range(2):
            with pytest.raises(WeightsUnavailable) as caught:
                generator.wake()
            assert file in caught.value.message
            assert str(tmp_path) not in caught.value.message
            with pytest.raises(Asleep):
                latents(generator)
            assert generator.sleep() == 0
        (tmp_path / "away").rename(path)
        generator.wake()
        assert torch.equal(latents(generator), before)


def test_a_wake_without_room_can_be_tried_again(folder: Path) -> None:
    with DiffGenerator.from_pretrained(str(folder), threads=1, fault="wake:oom:1") as generator:
        before = latents(generator)
        freed = generator.sleep()
        with pytest.raises(OutOfMemory):
            generator.wake()
        assert generator.sleep() == 0, "nothing of the failed wake is kept"
        generator.wake()
        assert generator.sleep() >= 0.9 * freed
        generator.wake()
        assert torch.equal(latents(generator), before)


def test_what_diffusers_holds_goes_with_the_engine(tmp_path: Path) -> None:
    size = {**REQUEST, "guidance_scale": 5.0, "output_type": "pt"}
    with DiffGenerator.from_pretrained(str(make_stable_diffusion(tmp_path / "sd")), dtype="float32") as generator:
        before, loras = generator.generate(PROMPT, **size).images[0], generator.list_loras()
        generator.sleep()
        generator.sleep()
        assert generator.list_loras() == loras
        with pytest.raises(Asleep):
            generator.generate(PROMPT, **size)
        generator.wake()
        assert torch.equal(generator.generate(PROMPT, **size).images[0], before)
