"""`mmgen` as a user runs it: real processes, the bundled model, files on disk."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multimodal_gen.media.recipe import read_recipe
from multimodal_gen.weights.hub import ASSETS
from tests.support.mmgen import Done, command, environment, mmgen

pytestmark = [pytest.mark.e2e]

QUICK = ("--steps", "2", "--size", "64x64", "--guidance-scale", "0")
CACHE = "taylor:interval=2,order=0,warmup=1"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the user sits in."""
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def made(place: Path) -> Done:
    """Two images in the default folder, one `mmgen generate` for all tests that only look at its result."""
    cache = ("--steps", "4", "--step-cache", CACHE)  # of what replay must repeat
    return mmgen(
        "generate",
        "a red apple on a blue background",
        *QUICK,
        *cache,
        "--seed",
        "7",
        "--seed",
        "3",
        folder=place,
        fresh=True,
    )


@pytest.fixture(scope="module")
def replayed(place: Path, made: Done) -> dict[str, Any]:
    """The second of those images again, as JSON."""
    done = mmgen("generate", "--replay", str(_paths(place, made)[1]), "--json", folder=place, MMGEN_DTYPE="bfloat16")
    assert done.code == 0, done.err
    answer: dict[str, Any] = json.loads(done.out)
    return answer


def _paths(place: Path, made: Done) -> list[Path]:
    return [place / line.split("  seed ")[0] for line in made.out.splitlines()[:-1]]


def test_generate_writes_pictures_and_says_where(place, made):
    assert made.code == 0, made.err
    *lines, timings = made.out.splitlines()
    assert [line.split("  seed ")[1] for line in lines] == ["7", "3"]
    assert re.match(
        r"[\d.]+ s: text [\d.]+ s, 4 steps [\d.]+ s \([\d.]+ s/step, 2 extrapolated\), decode [\d.]+ s; the model",
        timings,
    )
    for path, seed in zip(_paths(place, made), (7, 3), strict=True):
        assert re.fullmatch(rf"\d{{8}}-\d{{6}}_{seed}_a-red-apple-on-a-blue-background\.png", path.name)
        with Image.open(path) as image:
            pixels = np.asarray(image)
        assert pixels.shape == (64, 64, 3)
        assert pixels.std() > 5
    first, second = (np.asarray(Image.open(path)) for path in _paths(place, made))
    assert (first != second).any()


def test_progress_is_shown_on_stderr(made):
    assert "step 8/8" in made.err  # two images, four steps
    assert re.search(r"[\d.]+s/step\]", made.err)


def test_pictures_carry_their_recipe(place, made):
    recipe = read_recipe(_paths(place, made)[1])
    assert (recipe.prompt, recipe.seeds, recipe.index) == ("a red apple on a blue background", (7, 3), 1)
    assert (recipe.width, recipe.height, recipe.num_inference_steps, recipe.guidance_scale) == (64, 64, 4, 0.0)
    assert recipe.step_cache == CACHE
    assert recipe.model == "emoji-image"
    assert recipe.attention_backend in ("native", "onednn", "sdpa")  # the better one for this processor
    assert (recipe.repository, recipe.revision, recipe.max_batch_tokens) == (None, None, None)
    assert recipe.threads is not None
    assert recipe.threads >= 1
    with Image.open(_paths(place, made)[1]) as image:
        assert image.info["parameters"].startswith("a red apple on a blue background\nSteps: 4, ")


def test_replay_gives_the_same_bytes_in_a_new_file(place, made, replayed):
    (image,) = replayed["images"]
    original, again = _paths(place, made)[1], place / image["path"]
    assert again != original
    assert again.read_bytes() == original.read_bytes()
    assert sorted(path.suffix for path in (place / "outputs").iterdir()) == [".png"] * 3  # no temporary files left


def test_json_tells_all(replayed):
    assert replayed["model"] == "emoji-image"
    assert replayed["images"][0]["seed"] == 3
    (request,) = replayed["requests"]
    assert request["seeds"] == [7, 3]
    assert request["num_inference_steps"] == request["timings"]["steps"] == 4
    assert request["step_cache"] == CACHE
    assert request["timings"]["cached_steps"] == 2  # one of each image
    assert 0 < request["timings"]["denoise"] <= request["timings"]["total"]
    assert replayed["load_seconds"] > 0


def test_prompts_from_stdin_into_one_folder_as_jpeg_without_metadata(place):
    folder = place / "plain"
    done = mmgen(
        "generate", "-", *QUICK, "--output", str(folder), "--output-format", "jpeg", "--no-metadata", "--quiet",
        folder=place, stdin="a secret cat\na secret dog\n",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.err == ""
    assert sorted(done.out.splitlines()) == sorted(str(path) for path in folder.iterdir())
    assert len(list(folder.iterdir())) == 2
    for path in folder.iterdir():
        assert b"secret" not in path.read_bytes()
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (64, 64))


def test_an_existing_file_is_kept(place):
    target = place / "precious.png"
    target.write_bytes(b"precious")
    done = mmgen("generate", "a cat", *QUICK, "--output", "precious.png", folder=place)
    assert done.code == 2
    assert "precious.png exists already" in done.error
    assert target.read_bytes() == b"precious"
    assert done.seconds < 5


@pytest.mark.parametrize("name", ["plain", "x.gif"])
def test_an_output_that_cannot_be_is_refused_before_anything_is_computed(tmp_path, name):
    (tmp_path / "plain").write_bytes(b"precious")
    done = mmgen("generate", "a cat", *QUICK, "--output", name, folder=tmp_path)
    assert done.code == 2
    assert f"--output {name} cannot be written" in done.error
    assert done.seconds < 5
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (["--stpes", "2"], {}, "no flag --stpes. Did you mean '--steps'?"),
        (["--model-path", "no/such/folder"], {}, "no/such/folder"),
        ([], {"MMGEN_PRT": "1"}, "Unknown environment variable MMGEN_PRT. Did you mean 'MMGEN_PORT'?"),
        ([], {"MMGEN_DTYPE": "float8"}, "(from MMGEN_DTYPE)"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(place, arguments, variables, expected):
    done = mmgen("generate", "a cat", *arguments, folder=place, **variables)
    assert done.code == 2
    assert expected in done.error
    assert done.seconds < 5


@pytest.mark.parametrize(
    ("relative", "damage"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "truncate"),
        ("vae/diffusion_pytorch_model.safetensors", "remove"),
        ("text_encoder/config.json", "garble"),
    ],
)
def test_corrupt_models_are_named_at_once(tmp_path, relative, damage):
    model = shutil.copytree(ASSETS / "emoji-image", tmp_path / "model")
    victim = model / relative
    if damage == "remove":
        victim.unlink()
    else:
        content = victim.read_bytes()
        victim.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"{" + content)
    done = mmgen("generate", "a cat", *QUICK, "--model-path", str(model), folder=tmp_path)
    assert done.code == 2
    assert relative in done.error
    assert done.seconds < 5
    assert not (tmp_path / "outputs").exists()


def test_ctrl_c_ends_it_with_130_and_leaves_no_file(tmp_path):
    process = subprocess.Popen(
        command("generate", "a cat", "--size", "512x512", "--steps", "500"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, and so whatever they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stderr is not None
        seen = ""
        while "step 0/" not in seen:  # the bar appears once the model is loaded
            seen += process.stderr.read(1)
            assert process.poll() is None, seen
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "error: interrupted."
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_doctor_reports_the_machine_and_the_model(place):
    done = mmgen("doctor", "--json", folder=place)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["problems"] == []
    assert report["settings"]["attention_backends"]["sdpa"] == ""
    assert report["settings"]["dtype"] in ("float32", "bfloat16", "float16")
    assert report["model"]["name"] == "emoji-image"
    assert report["plan"]["peak_bytes"] > report["model"]["parameters"]
    assert report["model"]["fits"] is True
    assert report["cpu"]["torch_threads"] >= 1
    assert 0 < report["memory"]["free_bytes"] <= report["memory"]["total_bytes"]
    assert report["versions"]["diffusers"]


def test_doctor_finds_what_cannot_work(place):
    done = mmgen("doctor", "--device", "cuda:99", folder=place)
    assert done.code == 1
    assert "problem: --device 'cuda:99'" in done.out
    assert "Traceback" not in done.err


def test_doctor_plans_for_another_gpu_and_says_what_does_not_fit(place):
    done = mmgen("doctor", "--gpu", "RTX 4090", "--offload", "layerwise", "--resident-layers", "4", folder=place)
    assert done.code == 0, done.err
    assert "bfloat16 on rtx-4090:" in done.out
    assert "transformer   streamed, 4 of 12 layers resident, 2.5 MB per layer" in done.out
    done = mmgen("doctor", "--device-memory-limit", "1MB", folder=place)
    assert done.code == 1
    assert "and --device-memory-limit allows 1.0 MB. --device-memory-limit" in done.out
    done = mmgen("doctor", "--gpu", "rtx-4099", folder=place)
    assert done.code == 2
    assert "error: --gpu 'rtx-4099' is not in the table. Did you mean 'rtx-4090'?" in done.err


def test_help_is_instant(place):
    fastest = min(mmgen("--help", folder=place, fresh=True).seconds for _ in range(3))
    assert fastest < 1.0  # 0.15 s on a quiet machine
