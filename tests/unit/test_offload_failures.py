"""What happens to requests when the files of a model that is read while it runs are not what they were."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from multimodal_gen import DiffGenerator
from multimodal_gen.engine.local import LocalEngine
from multimodal_gen.errors import AdapterError, ConfigError, WeightsUnavailable
from tests.support.adapters import write_adapter
from tests.support.checkpoints import PROMPT, make_z_image

pytestmark = [pytest.mark.unit]

REQUEST: dict[str, Any] = {"num_inference_steps": 3, "width": 64, "height": 64, "guidance_scale": 2.0, "seed": 5}
FILE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_z_image(tmp_path_factory.mktemp("model") / "z", layers=6)


@pytest.fixture(params=["layerwise", "component"])
def running(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[tuple[DiffGenerator, Path]]:
    """A generator that reads weights while it runs, and the file that it reads most of them from."""
    shutil.copytree(folder, tmp_path / "z")
    with DiffGenerator.from_pretrained(
        str(tmp_path / "z"), offload=request.param, condition_cache_mb=0, threads=1
    ) as gen:
        yield gen, tmp_path / "z" / FILE


def latents(gen: DiffGenerator) -> Tensor:
    found = gen.generate(PROMPT, output_type="latent", **REQUEST).latents
    assert found is not None
    return found


def refused(gen: DiffGenerator, file: Path) -> str:
    """A request fails with the file named, as the model's folder names it, and the engine stays well."""
    with pytest.raises(WeightsUnavailable) as caught:
        latents(gen)
    assert FILE in caught.value.message
    assert str(file.parents[1]) not in caught.value.message
    assert isinstance(gen._engine, LocalEngine)
    assert not gen._engine.core.sick
    return caught.value.message


def test_a_file_that_is_cut_short_and_comes_back(running: tuple[DiffGenerator, Path]) -> None:
    gen, file = running
    before, data = latents(gen), file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    for _ in range(5):  # more than --max-consecutive-errors
        refused(gen, file)
    file.write_bytes(data)
    assert torch.equal(latents(gen), before)


def test_a_file_that_is_gone_and_comes_back(running: tuple[DiffGenerator, Path]) -> None:
    gen, file = running
    before = latents(gen)
    file.rename(file.with_suffix(".away"))
    assert "No such file" in refused(gen, file)
    shutil.copy(file.with_suffix(".away"), file)
    assert torch.equal(latents(gen), before)


def test_another_model_s_file_is_not_taken_for_it(running: tuple[DiffGenerator, Path], tmp_path: Path) -> None:
    gen, file = running
    other = make_z_image(tmp_path / "other", layers=6, seed=9)
    shutil.copy(other / FILE, file)
    assert "changed" in refused(gen, file)


@pytest.mark.parametrize("call", [1, 7, 20, 33])
def test_a_disk_that_fails_in_the_middle_of_a_step(
    running: tuple[DiffGenerator, Path], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    gen, file = running
    before, real, calls = latents(gen), os.preadv, 0

    def failing(fd: int, *rest: Any) -> int:
        nonlocal calls
        if os.readlink(f"/proc/self/fd/{fd}") == str(file):
            calls += 1
            if calls >= call:
                raise OSError(5, "Input/output error")
        return real(fd, *rest)

    monkeypatch.setattr(os, "preadv", failing)
    assert "Input/output error" in refused(gen, file)
    monkeypatch.undo()
    assert torch.equal(latents(gen), before)


def test_adapters_that_overflow_are_refused_before_a_layer_meets_them(
    running: tuple[DiffGenerator, Path], tmp_path: Path
) -> None:
    gen, _ = running
    before = latents(gen)
    name = "layers.3.attention.to_q"
    huge = {f"{name}.lora_A.weight": torch.full((2, 96), 1e20), f"{name}.lora_B.weight": torch.full((96, 2), 1e20)}
    with pytest.raises(AdapterError, match="overflow"):
        gen.set_lora("huge", str(write_adapter(tmp_path / "huge.safetensors", huge)), merge_mode="merge")
    assert not gen.list_loras().active
    assert torch.equal(latents(gen), before)


def test_limits_that_are_too_small_for_one_layer(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        DiffGenerator.from_pretrained(str(folder), device_memory_limit=100_000)
    assert caught.value.param == "device_memory_limit"
    assert "--device-memory-limit" in caught.value.message
