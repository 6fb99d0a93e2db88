"""Adapters from the command line, with the trained ones of examples/."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multimodal_gen.media.recipe import read_recipe
from tests.support.mmgen import ROOT, mmgen

pytestmark = [pytest.mark.e2e]

LORAS = ROOT / "examples" / "loras"
QUICK = ("grinning face", "--size", "64x64", "--steps", "4", "--seed", "3", "--json")


def flag(name: str, rest: str = "") -> str:
    return f"{name}={LORAS / name}.safetensors{rest}"


def pixels(done, folder: Path) -> np.ndarray:
    assert done.code == 0, done
    with Image.open(folder / json.loads(done.out)["images"][0]["path"]) as image:
        return np.asarray(image).astype(int)


def test_order_strength_and_replay(tmp_path):
    base = pixels(mmgen("generate", *QUICK, folder=tmp_path), tmp_path)
    both = ("--lora", flag("blueprint", ":0.8"), "--lora", flag("pixel-art", ":1:transformer"))
    done = mmgen("generate", *QUICK, *both, folder=tmp_path)
    made = pixels(done, tmp_path)
    assert np.abs(made - base).mean() > 5
    facts = json.loads(done.out)
    assert facts["requests"][0]["loras"] == [
        {"nickname": "blueprint", "strength": 0.8, "target": "transformer"},
        {"nickname": "pixel-art", "strength": 1.0, "target": "transformer"},
    ]
    file = tmp_path / facts["images"][0]["path"]
    recipe = read_recipe(file)
    assert [(pin.nickname, pin.strength) for pin in recipe.loras] == [("blueprint", 0.8), ("pixel-art", 1.0)]
    with Image.open(file) as image:
        assert "<lora:blueprint:0.8> <lora:pixel-art:1>" in image.info["parameters"]
    refused = mmgen("generate", "--replay", str(file), folder=tmp_path)
    assert "--lora blueprint=PATH" in refused.error
    where = ("--lora", flag("blueprint"), "--lora", flag("pixel-art"))
    again = mmgen("generate", "--replay", str(file), *where, "--json", folder=tmp_path)
    assert again.code == 0, again
    assert (tmp_path / json.loads(again.out)["images"][0]["path"]).read_bytes() == file.read_bytes()
    swapped = ("--lora", f"blueprint={LORAS}/pixel-art.safetensors", "--lora", flag("pixel-art"))
    (tmp_path / "c.yaml").write_text(json.dumps({"lora": [flag("blueprint", ":0.8"), flag("pixel-art")]}))
    by_file = mmgen("generate", "--replay", str(file), "--config", "c.yaml", "--json", folder=tmp_path)
    assert (tmp_path / json.loads(by_file.out)["images"][0]["path"]).read_bytes() == file.read_bytes()
    stronger = ("--lora", flag("blueprint", ":0.3"), "--lora", flag("pixel-art"))
    assert "comes from the recipe" in mmgen("generate", "--replay", str(file), *stronger, folder=tmp_path).error
    other = mmgen("generate", "--replay", str(file), *swapped, folder=tmp_path)
    assert "another file than the one the original was made with: pixels may differ" in other.err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nothing", "NAME=PATH"),
        ("x=/nowhere.safetensors", "no adapter at"),
        (flag("blueprint", ":lots"), "is no strength"),
        (flag("blueprint", ":1:transformer_2"), "no target 'transformer_2'"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, value, message):
    assert message in mmgen("generate", *QUICK, "--lora", value, folder=tmp_path).error


def test_inspect_and_ls(tmp_path):
    done = mmgen(
        "lora",
        "inspect",
        str(LORAS / "blueprint.safetensors"),
        "--model-path",
        "emoji-image",
        "--json",
        folder=tmp_path,
    )
    facts = json.loads(done.out)
    assert facts["format"] == "diffusers: lora"
    assert facts["ranks"] == [8]
    assert facts["targets"] == ["transformer"]
    assert facts["families"] == {"zimage": f"{facts['modules']} of {facts['modules']} modules"}
    assert facts["model"]["modules"] == {"transformer": facts["modules"]}
    assert facts["model"]["skipped"] == []
    table = mmgen("lora", "ls", str(LORAS), folder=tmp_path)
    assert table.code == 0
    assert "pixel-art.safetensors" in table.out
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04.")
    rows = json.loads(mmgen("lora", "ls", str(tmp_path), "--json", folder=tmp_path).out)["adapters"]
    assert [row["format"] for row in rows] == ["unsafe_format"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect",), "takes one FILE"),
        (("inspct", "x"), "Did you mean 'inspect'"),
        (("inspect", "/nowhere"), "no adapter at"),
        (("ls", "/nowhere"), "no folder"),
        ((), "`ls` or `inspect FILE`"),
    ],
)
def test_bad_commands_are_one_line(tmp_path, arguments, message):
    assert message in mmgen("lora", *arguments, folder=tmp_path).error
