from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal_gen import DiffGenerator
from tests.support.checkpoints import make_flux1, make_stable_diffusion, make_z_image
from tests.support.device import DEVICE
from tests.support.text_models import smollm2
from tests.support.wan_checkpoints import make_wan

Maker = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> Iterator[None]:
    """Tiny matrices gain nothing from threads and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def z_image_folder(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """`z_image_folder(heads=3)`: a tiny Z-Image folder, made once for each set of options."""
    return _once(lambda **options: make_z_image(tmp_path_factory.mktemp("z_image"), **options))


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """`wan_folder(variant="t2v")`: a tiny Wan folder, made once for each set of options."""
    return _once(lambda **options: make_wan(tmp_path_factory.mktemp("wan"), **options))


@pytest.fixture(scope="session")
def flux1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.1 folder."""
    return make_flux1(tmp_path_factory.mktemp("flux1"))


@pytest.fixture(scope="session")
def stable_diffusion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion folder with a second-order solver."""
    return make_stable_diffusion(tmp_path_factory.mktemp("stable_diffusion"))


@pytest.fixture(scope="session")
def smollm2_by_transformers() -> Any:
    """SmolLM2 as transformers computes it in float32, from the GGUF file that we read."""
    from transformers import AutoModelForCausalLM

    path = smollm2()
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def generator() -> Maker:
    """`generator(folder)`: our float32 CPU generator for a folder or bundled name, loaded once."""
    return _once(lambda model: DiffGenerator.from_pretrained(str(model), device=DEVICE, dtype="float32"))


@pytest.fixture(scope="session")
def reference() -> Maker:
    """`reference(folder)`: diffusers' float32 pipeline, loaded once."""
    return _once(_load_reference)


def _load_reference(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _once(make: Maker) -> Maker:
    made: dict[Any, Any] = {}

    def get(*arguments: Any, **options: Any) -> Any:
        key = (arguments, tuple(sorted(options.items())))
        if key not in made:
            made[key] = make(*arguments, **options)
        return made[key]

    return get
