"""What a Wan folder says of itself, and folders that contradict themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import CorruptModel
from multimodal_gen.pipelines import registry
from multimodal_gen.request import ModelCard
from tests.support.wan_checkpoints import VARIANTS, make_wan

pytestmark = [pytest.mark.unit]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wan")
    return {variant: make_wan(root / variant, variant) for variant in VARIANTS}


def describe(folder: Path) -> ModelCard:
    return registry.describe(EngineConfig(model_path=str(folder)))


@pytest.mark.parametrize(
    ("variant", "task", "image", "experts", "multiple"),
    [
        ("t2v", "text-to-video", "none", 1, 16),
        ("i2v", "image-to-video", "required", 1, 16),
        ("t2v_a14b", "text-to-video", "none", 2, 16),
        ("i2v_a14b", "image-to-video", "required", 2, 16),
        ("ti2v_5b", "text-to-video", "optional", 1, 32),
    ],
)
def test_five_layouts(
    folders: dict[str, Path], variant: str, task: str, image: str, experts: int, multiple: int
) -> None:
    card = describe(folders[variant])
    assert card.video is not None
    assert (card.family, card.task, card.video.image, card.media) == ("wan", task, image, "video")
    assert ("guidance_scale_2" in card.parameters) == (experts == 2)
    assert (card.size_multiple, card.heads, card.video.frames_per_latent) == (multiple, 4, 4)


@pytest.mark.parametrize(
    ("name", "size", "frames", "fps", "steps"),
    [
        ("Wan2.1-T2V-1.3B-Diffusers", (832, 480), 81, 16, 50),
        ("Wan2.1-I2V-14B-720P-Diffusers", (1280, 720), 81, 16, 40),
        ("Wan2.2-TI2V-5B-Diffusers", (1280, 704), 121, 24, 50),
        ("my-own-finetune", (832, 480), 81, 16, 50),
    ],
)
def test_published_names_have_their_defaults(
    folders: dict[str, Path], tmp_path: Path, name: str, size: tuple[int, int], frames: int, fps: int, steps: int
) -> None:
    (tmp_path / name).symlink_to(folders["t2v"])
    defaults = describe(tmp_path / name).defaults
    assert (defaults.width, defaults.height) == size
    assert (defaults.num_frames, defaults.fps, defaults.num_inference_steps) == (frames, fps, steps)


def edit(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        content.update(values)
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v != "drop"}))

    return change


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("t2v", edit("model_index.json", boundary_ratio=0.875), "boundary_ratio of 0.875 and no transformer_2"),
        ("t2v_a14b", edit("model_index.json", boundary_ratio=None), "lists transformer_2 and no boundary_ratio"),
        ("t2v_a14b", edit("model_index.json", boundary_ratio=1.5), "between 0 and 1, not 1.5"),
        ("t2v_a14b", edit("model_index.json", transformer_2=[None, None]), "no transformer_2"),
        ("t2v", edit("transformer/config.json", in_channels=20), "in_channels = 20"),
        ("i2v", edit("model_index.json", image_encoder=[None, None]), "image_dim = 32"),
        ("t2v", edit("transformer/config.json", qk_norm="rms_norm"), "qk_norm = 'rms_norm' is not supported"),
        ("t2v", edit("transformer/config.json", pos_embed_seq_len=514), "pos_embed_seq_len = 514 is not supported"),
        ("t2v", edit("transformer/config.json", ffn_dim="drop"), "lacks 'ffn_dim'"),
    ],
)
def test_contradictions_are_told_before_anything_is_loaded(
    folders: dict[str, Path], tmp_path: Path, variant: str, change: Callable[[Path], None], message: str
) -> None:
    folder = Path(shutil.copytree(folders[variant], tmp_path / "model"))
    change(folder)
    with pytest.raises(CorruptModel, match=message):
        describe(folder)
