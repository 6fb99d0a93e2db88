"""Encoded files: decodable, deterministic, marked, and their recipes survive any prompt."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import InvalidValue, NotFound
from multimodal_gen.media.encode import EXTENSIONS, SUFFIXES, encode_image
from multimodal_gen.media.recipe import Recipe, origin, read_recipe
from multimodal_gen.pipelines import registry
from multimodal_gen.request import ImageRequest

pytestmark = [pytest.mark.unit]

FORMATS = ["png", "jpeg", "webp"]
NASTY_PROMPTS = {
    "plain": 'a red apple, on: a "blue" background',
    "unicode": "りんご 🍎 e\u0301 \u202eelppa",
    "nul": "a\0b\x01\x1b[31m\r\nSteps: 1, Seed: 2",
    "surrogate": "a \ud83c b \udfff",
    "long": "x" * 32_000,
    "long unicode": "漢" * 32_000,
    "long control": "\x01" * 32_000,
    "markup": "</x:xmpmeta><script>alert(1)</script>",
}


def pixels(height: int = 24, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def recipe(prompt: str = "a red apple", **changes: object) -> Recipe:
    request = ImageRequest(
        id="x",
        model="emoji-image",
        prompt=prompt,
        negative_prompt="blurry",
        width=40,
        height=24,
        num_inference_steps=9,
        guidance_scale=4.5,
        seeds=(7, 11),
        cfg_normalization=0.0,
        cfg_truncation=None,
        max_sequence_length=64,
    )
    made = Recipe.of(request, 1, dtype="float32", device="cpu", attention_backend="sdpa", deterministic=True)
    return msgspec.structs.replace(made, **changes)


def stored(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "image"
    path.write_bytes(data)
    return path


def test_png_keeps_every_pixel():
    data = encode_image(pixels(), "png", recipe=recipe())
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels())


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("prompt", NASTY_PROMPTS.values(), ids=NASTY_PROMPTS.keys())
def test_recipe_survives_any_prompt_in_every_format(tmp_path, output_format, prompt):
    wanted = recipe(prompt, negative_prompt=prompt, output_format=output_format, output_compression=80)
    data = encode_image(pixels(), output_format, compression=80, recipe=recipe(prompt, negative_prompt=prompt))
    assert read_recipe(stored(tmp_path, data)) == wanted
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.size == (40, 24)
        assert image.format == output_format.upper()


@pytest.mark.parametrize("output_format", FORMATS)
def test_equal_inputs_give_equal_bytes(output_format):
    one, two = (encode_image(pixels(), output_format, compression=90, recipe=recipe()) for _ in range(2))
    assert one == two
    other = encode_image(pixels(), output_format, compression=90, recipe=recipe(seeds=(7, 12)))
    assert other != one


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_compression_is_quality(output_format):
    sizes = [len(encode_image(pixels(64, 64), output_format, compression=c)) for c in (0, 50, 100)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] < sizes[2]


def test_quality_100_jpeg_stays_close_to_the_pixels():
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    seen = np.asarray(Image.open(io.BytesIO(encode_image(smooth, "jpeg"))))
    assert np.abs(seen.astype(int) - smooth).max() <= 4


@pytest.mark.parametrize("output_format", FORMATS)
def test_every_file_is_marked_as_made_by_a_model_and_without_recipe_holds_no_prompt(tmp_path, output_format):
    secret = "a very private prompt"
    marked = encode_image(pixels(), output_format, recipe=recipe(secret))
    bare = encode_image(pixels(), output_format)
    for data in (marked, bare):
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            xmp = image.info["xmp"] if "xmp" in image.info else image.info["XML:com.adobe.xmp"]
        assert b"trainedAlgorithmicMedia" in (xmp if isinstance(xmp, bytes) else xmp.encode())
    assert secret.encode() in marked
    assert secret.encode() not in bare
    with pytest.raises(InvalidValue, match="holds no recipe"):
        read_recipe(stored(tmp_path, bare))


def test_png_parameters_chunk_is_a1111_text():
    data = encode_image(pixels(), "png", recipe=recipe("cat\0dog", negative_prompt="a\nb"))
    with Image.open(io.BytesIO(data)) as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        text = image.text["parameters"]
    lines = text.split("\n")
    assert lines[0] == "cat\ufffddog"
    assert lines[1:3] == ["Negative prompt: a", "b"]
    assert lines[3].startswith("Steps: 9, CFG scale: 4.5, Seed: 11, Size: 40x24, Model: emoji-image, Version: ")


def test_jpeg_description_is_utf8():
    data = encode_image(pixels(), "jpeg", recipe=recipe("りんご"))
    assert "りんご\nNegative prompt".encode() in data


@pytest.mark.parametrize("output_format", FORMATS)
def test_prompt_with_nul_leaves_no_nul_in_text_for_other_programs(output_format):
    assert "\0" not in recipe("a\0b").parameters_text()
    assert "\0" not in recipe("a\0b", output_format=output_format).to_json()


def test_unknown_format_and_compression_are_user_errors():
    with pytest.raises(InvalidValue) as caught:
        encode_image(pixels(), "gif")  # type: ignore[arg-type]
    assert caught.value.param == "output_format"
    for compression in (-1, 101):
        with pytest.raises(InvalidValue) as caught:
            encode_image(pixels(), "jpeg", compression=compression)
        assert caught.value.param == "output_compression"


def test_suffix_tables_agree():
    assert {EXTENSIONS["." + suffix] for suffix in SUFFIXES.values()} == set(SUFFIXES) == set(FORMATS)
    assert all(EXTENSIONS["." + SUFFIXES[f]] == f for f in SUFFIXES)


def test_files_that_are_no_recipes_are_named_errors(tmp_path):
    with pytest.raises(NotFound, match=r"There is no file .*nothing\.png"):
        read_recipe(tmp_path / "nothing.png")
    with pytest.raises(InvalidValue, match="not a PNG, JPEG or WebP"):
        read_recipe(stored(tmp_path, b"<svg></svg>"))
    buffer = io.BytesIO()
    Image.fromarray(pixels()).save(buffer, "BMP")
    with pytest.raises(InvalidValue, match="not a PNG, JPEG or WebP"):
        read_recipe(stored(tmp_path, buffer.getvalue()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"steps":', '"stps":').replace("num_inference_steps", "steps"), "missing required"),
        (lambda text: text.replace('"width":40', '"width":"forty"'), "damaged"),
        (lambda text: text.replace('"index":1', '"index":2'), "image 2 of 2"),
        (lambda text: text.replace('"index":1', '"index":-1'), "image -1 of 2"),
        (lambda text: text.replace('"schema":1', '"schema":2'), "update multimodal_gen"),
        (lambda text: text[:-5], "damaged"),
        (lambda text: "[" * 200_000, "damaged"),
        (lambda text: text.replace('"width":40', f'"width":{"9" * 5000}'), "damaged"),
    ],
)
def test_damaged_recipes_are_user_errors(change, message):
    with pytest.raises(InvalidValue, match=message):
        Recipe.from_json(change(recipe().to_json()))


def test_recipes_from_before_a_field_was_added_are_read():
    added = {"repository": None, "revision": None, "max_batch_tokens": None, "threads": None}
    stored = json.loads(recipe().to_json())
    old = {name: value for name, value in stored.items() if name not in added}
    assert len(stored) - len(old) == len(added)
    assert Recipe.from_json(json.dumps(old)) == recipe()
    full = recipe(repository="owner/name", revision="main", max_batch_tokens=512, threads=2)
    assert Recipe.from_json(full.to_json()) == full


def test_origin_is_a_repository_at_its_commit_and_never_a_folder(tmp_path, monkeypatch):
    bundled = EngineConfig()
    card = registry.describe(bundled)
    assert origin(bundled, card) == (None, None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (card.path, "mine/model", "~/model/", "./model"):
        local = EngineConfig(model_path=path, revision="main")
        assert origin(local, msgspec.structs.replace(card, path=str(Path(path).expanduser()))) == (None, None)
    hub, commit = EngineConfig(model_path="owner/name", revision="main"), "0123456789abcdef0123456789abcdef01234567"
    assert origin(hub, msgspec.structs.replace(card, path=f"/cache/snapshots/{commit}")) == ("owner/name", commit)
    assert origin(hub, msgspec.structs.replace(card, path="/cache/elsewhere")) == ("owner/name", "main")


def test_truncated_files_are_user_errors_or_keep_their_recipe(tmp_path):
    for output_format in FORMATS:
        data = encode_image(pixels(), output_format, recipe=recipe())
        for keep in range(0, len(data), 37):
            try:
                found = read_recipe(stored(tmp_path, data[:keep]))
            except InvalidValue:
                continue
            assert found.prompt == "a red apple"
