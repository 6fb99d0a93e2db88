"""Videos from the command line and from Python, with tiny models of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from multimodal_gen import DiffGenerator
from multimodal_gen.media.recipe import read_recipe
from tests.support.mmgen import mmgen
from tests.support.wan_checkpoints import make_wan

pytestmark = [pytest.mark.e2e]

QUICK = ("--size", "96x64", "--num-frames", "17", "--steps", "2", "--seed", "3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {variant: make_wan(root / variant, variant) for variant in ("t2v", "i2v", "ti2v_5b")}  # type: ignore[misc]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "first.jpg"
    Image.effect_mandelbrot((120, 90), (-2, -1, 1, 1), 60).convert("RGB").save(path)
    return path


def frames_of(path: Path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert stream.average_rate is not None
        return frames, float(stream.average_rate)


def test_a_video_and_its_replay_byte_for_byte(models, tmp_path):
    flags = ("--model-path", str(models["t2v"]))
    made = mmgen("generate", "a red cat", *QUICK, *flags, "--fps", "12", "-o", "a.mp4", folder=tmp_path)
    assert made.code == 0, made.err
    frames, rate = frames_of(tmp_path / "a.mp4")
    assert (frames.shape, rate) == ((17, 64, 96, 3), 12.0)
    recipe = read_recipe(tmp_path / "a.mp4")
    assert (recipe.prompt, recipe.num_frames, recipe.fps, recipe.seeds) == ("a red cat", 17, 12, (3,))
    again = mmgen("generate", "--replay", "a.mp4", *flags, "-o", "b.mp4", folder=tmp_path)
    assert again.code == 0, again.err
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_video_from_a_picture(models, picture, tmp_path):
    flags = ("--model-path", str(models["i2v"]))
    made = mmgen(
        "generate", "a cat", *QUICK, *flags, "--image", str(picture), "--json", "-o", "a.webm", folder=tmp_path
    )
    assert made.code == 0, made.err
    (facts,) = json.loads(made.out)["images"]
    assert (facts["path"], facts["num_frames"], facts["fps"]) == ("a.webm", 17, 16)
    assert frames_of(tmp_path / "a.webm")[0].shape == (17, 64, 96, 3)
    missing = mmgen("generate", "--replay", "a.webm", *flags, folder=tmp_path)
    assert "--image FILE" in missing.error
    replay = ("--replay", "a.webm", *flags, "-o", "b.webm")
    again = mmgen("generate", *replay, "--image", str(picture), folder=tmp_path)
    assert again.code == 0, again.err
    assert (tmp_path / "a.webm").read_bytes() == (tmp_path / "b.webm").read_bytes()


def test_mistakes_are_told_before_a_model_is_loaded(models, picture, tmp_path):
    text, image = ("--model-path", str(models["t2v"])), ("--model-path", str(models["i2v"]))
    (tmp_path / "fake.png").write_text("no picture")
    for arguments, message in (
        ((*text, "--num-frames", "16"), "try 17"),
        ((*text, "--image", str(picture)), "from text alone"),
        ((*image,), "give one"),
        ((*image, "--image", "absent.png"), "absent.png"),
        ((*image, "--image", "fake.png"), "PNG, JPEG or WebP"),
        ((*text, "-o", "x.png"), ".png is no format for videos"),
        ((*text, "-o", "x.mp4", "--n", "2"), "2 videos are asked for"),
        ((*text, "--output-format", "jpeg"), "mp4, webm, gif"),
        ((*text, "--size", "90x64"), "multiple of 16"),
        ((*text, "--guidance-scale-2", "3"), "does not use 'guidance_scale_2'"),
        (("--num-frames", "5"), "does not use 'num_frames'"),
    ):
        done = mmgen("generate", "x", *arguments, folder=tmp_path)
        assert message in done.error, done
        assert done.seconds < 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fake.png"]


def test_python(models, picture, tmp_path):
    options = {"width": 96, "height": 64, "num_frames": 5, "num_inference_steps": 2, "seed": 4}
    with DiffGenerator.from_pretrained(str(models["ti2v_5b"]), device="cpu") as gen:
        text = gen.generate("a cat", **options, num_outputs_per_prompt=2, output_path=tmp_path)
        start = gen.generate("a cat", **options, image=picture, output_path=tmp_path / "x.gif")
        again = gen.generate("a cat", **options, image=Image.open(picture))
        tensor = gen.generate("a cat", **options, output_type="pt").frames
    assert (text.frames.shape, text.frames.dtype, text.fps) == ((2, 5, 64, 96, 3), np.uint8, 16)
    assert text.images == []
    assert [path.suffix for path in text.paths] == [".mp4", ".mp4"]
    assert start.paths == [tmp_path / "x.gif"]
    assert np.array_equal(start.frames, again.frames)
    assert not np.array_equal(start.frames[0], text.frames[0])
    assert tensor.shape == (1, 5, 3, 64, 96)
    assert np.abs(tensor[0].permute(0, 2, 3, 1).numpy() * 255 - text.frames[0]).max() < 1e-3
