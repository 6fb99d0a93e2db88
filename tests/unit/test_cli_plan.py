"""The `mmgen` command up to the point where a model would be loaded: parsing, checks, messages, exit codes."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from multimodal_gen.cli.flags import Parser
from multimodal_gen.cli.generate import add_arguments
from multimodal_gen.cli.main import COMMANDS, main
from multimodal_gen.cli.plan import Plan, make_plan
from multimodal_gen.cli.replay import Replay
from multimodal_gen.config import EngineConfig, ServerConfig
from multimodal_gen.errors import UserError
from multimodal_gen.media.encode import encode_image
from multimodal_gen.media.maker import Maker
from multimodal_gen.media.recipe import Recipe
from multimodal_gen.messages import Ready
from multimodal_gen.pipelines import registry
from multimodal_gen.request import OF_VIDEOS, ImageRequest
from multimodal_gen.settings import options
from multimodal_gen.version import __version__
from multimodal_gen.weights.hub import ASSETS
from tests.support.mmgen import environment

pytestmark = [pytest.mark.unit]

REQUEST = ImageRequest(
    id="x",
    model="emoji-image",
    prompt="a cat",
    negative_prompt="blurry",
    width=64,
    height=96,
    num_inference_steps=9,
    guidance_scale=4.5,
    seeds=(7, 11, 3),
    cfg_normalization=1.0,
    cfg_truncation=None,
    max_sequence_length=64,
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def plan(*arguments: str) -> Plan:
    parser = Parser(prog="mmgen generate", description="")
    add_arguments(parser)
    parsed = parser.read(arguments)
    assert parsed is not None
    return make_plan(parsed)


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        plan(*arguments)
    return caught.value.message


def image_file(folder: Path, output_format: str = "png", compression: int = 100, **changes: Any) -> Path:
    recipe = Recipe.of(REQUEST, 1, dtype="float32", device="cpu", attention_backend="sdpa", deterministic=True)
    recipe = msgspec.structs.replace(recipe, **changes)
    path = folder / f"original.{output_format}"
    pixels = np.zeros((8, 8, 3), np.uint8)
    path.write_bytes(encode_image(pixels, output_format, compression=compression, recipe=recipe))  # type: ignore[arg-type]
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_bare_prompt_takes_the_models_defaults():
    made = plan("a red apple")
    assert made.prompts == ["a red apple"]
    assert msgspec.structs.asdict(made.params) == msgspec.structs.asdict(type(made.params)())
    assert made.config.model_path == "emoji-image"
    assert (made.output.folder, made.output.file, made.output.format) == (Path("outputs"), None, "png")
    assert made.steps == 20
    assert made.only is None


def test_every_flag_reaches_the_parameters():
    made = plan(
        *shlex.split(
            "x --negative-prompt no --size 64x96 --steps 6 --step-cache taylor:warmup=2 --guidance-scale 2.5 "
            "--seed 1 --seed 5 "
            "--cfg-normalization 2 --cfg-truncation none --max-sequence-length 9 --output-format webp "
            "--output-compression 80 --no-metadata --deterministic --threads 2 --dtype float32"
        )
    )
    given = {
        name: v
        for name, v in msgspec.structs.asdict(made.params).items()
        if name not in ("priority", "deadline_s", *OF_VIDEOS)
    }
    assert given == {
        "negative_prompt": "no",
        "width": 64,
        "height": 96,
        "num_inference_steps": 6,
        "guidance_scale": 2.5,
        "seed": [1, 5],
        "num_outputs_per_prompt": 2,
        "cfg_normalization": 2.0,
        "cfg_truncation": None,
        "max_sequence_length": 9,
        "step_cache": "taylor:interval=2,order=1,warmup=2",
    }
    assert (made.output.format, made.output.compression, made.output.metadata) == ("webp", 80, False)
    assert (made.config.deterministic, made.config.threads, made.config.dtype) == (True, 2, "float32")
    assert made.steps == 12


def test_every_setting_is_a_flag():
    parser = Parser(prog="mmgen generate", description="")
    add_arguments(parser)
    known = {name for action in parser._actions for name in action.option_strings}
    assert {option.flag for option in options(EngineConfig)} <= known
    assert {"--no-deterministic", "--no-local-files-only", "--config"} <= known


def test_prompts_from_a_file_and_from_stdin(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\ufeffa cat\r\n\n  a dog  \n", encoding="utf-8")
    assert plan("--prompt-file", "prompts.txt").prompts == ["a cat", "a dog"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    made = plan("-", "--n", "2", "--steps", "5")
    assert made.prompts == ["one", "two"]
    assert made.steps == 20
    assert "no prompt in" in refused("--prompt-file", "/dev/null")
    assert "No such file" in refused("--prompt-file", "absent.txt")
    assert "not both" in refused("x", "--prompt-file", "prompts.txt")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give a prompt"),
        ([""], "'prompt' is empty"),
        (["x", "y"], "Unexpected argument 'y'; put text with spaces in quotes"),
        (["x", "--stpes", "4"], "no flag --stpes. Did you mean '--steps'?"),
        (["--stpes=4", "x"], "no flag --stpes. Did you mean '--steps'?"),
        (["x", "--determ"], "no flag --determ."),  # flags are never abbreviated
        (["x", "--width", "abc"], "--width: must be a whole number, got 'abc'"),
        (["x", "--width"], "--width: expected one argument"),
        (["x", "--guidance-scale", "nan"], "'guidance_scale' must be between 0 and 100"),
        (["x", "--width", "100"], "'width' must be a multiple of 16 pixels"),
        (["x", "--size", "128"], "--size must look like 128x128"),
        (["x", "--size", "128x128", "--width", "64"], "give one of them"),
        (["x", "--size", "99999x99999"], "'width' must be between"),
        (["x", "--n", "11"], "'n' must be between 1 and 10"),
        (["x", "--seed", "1", "--seed", "2", "--n", "3"], "lists 2 seeds for n = 3"),
        (["x", "--seed", "-1"], "'seed' must be between 0"),
        (["x", "--cfg-truncation", "later"], "--cfg-truncation must be a number, got 'later'"),
        (["x", "--steps", "1000", "--n", "10", "--size", "2048x2048"], "--max-request-cost"),
        (["x", "--model-path", "emoji-imag"], "Did you mean 'emoji-image'?"),
        (["x", "--model-path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["x", "--dtype", "float8"], "--dtype cannot be 'float8'"),
        (["x", "--output-format", "jpg"], "--output-format must be one of png, jpeg, webp"),
        (["x", "--output-format", "png", "--output-compression", "50"], "leave it out for png"),
        (["x", "--output-format", "jpeg", "--output-compression", "101"], "between 0 and 100"),
        (["x", "--output", "a.png", "--output-format", "webp"], "drop one of them"),
        (["x", "--output", "a.png", "--n", "2"], "name a folder"),
        (["x", "--output", "x.gif"], "--output x.gif cannot be written: .gif is no format for images"),
        (["x", "--output", "a/x.TIFF"], "the suffixes of files are .png, .jpg, .jpeg, .webp"),
        (["x", "--output", "/dev/null"], "/dev/null is not a folder"),
        (["x", "--output", "/dev/null/deep/x.png"], "/dev/null is not a folder"),
        (["x", "--output", "n" * 300], "File name too long"),
        (["x", "--output", "/proc/self/new"], "no permission to write into /proc/self"),
        (["x", "--output", "a\0b"], "null"),
        (["x", "--max-queue-cost", "100"], "--max-queue-cost"),
        (["x", "--replay", "absent.png"], "There is no file absent.png"),
        (["x", "--config", "absent.yaml"], "No such file"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(arguments, expected, capsys):
    assert expected in refused(*arguments)
    code, out, err = run(capsys, "generate", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_no_mistake_costs_the_import_of_torch():
    """The checks above answer in milliseconds because nothing heavy is imported for them."""
    code = "import sys; from multimodal_gen.cli.main import main; main(['generate', 'x', '--width', '7']); "
    code += "main(['models']); main(['--help']); print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.splitlines()[-1] == "[]"


def test_output_suffix_names_the_format_and_existing_files_are_refused(tmp_path):
    for name, expected in (("a.png", "png"), ("b.JPG", "jpeg"), ("c.jpeg", "jpeg"), ("d.webp", "webp")):
        made = plan("x", "--output", name)
        assert (made.output.file, made.output.format) == (Path(name), expected)
    (tmp_path / "a.png").write_bytes(b"precious")
    assert "a.png exists already" in refused("x", "--output", "a.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "elsewhere")
    assert "dangling.png exists already" in refused("x", "--output", "dangling.png")
    (tmp_path / "plain").write_bytes(b"precious")
    assert "plain is not a folder" in refused("x", "--output", "plain")
    (tmp_path / "outputs").write_bytes(b"precious")
    assert "outputs is not a folder" in refused("x")
    assert plan("x", "--output", "new/deep").output.folder == Path("new/deep")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old.gif").mkdir()
    assert plan("x", "--output", "old.gif").output.folder == Path("old.gif")
    (tmp_path / "folder.png").mkdir()
    made = plan("x", "--output", "folder.png", "--n", "2")
    assert (made.output.folder, made.output.file) == (Path("folder.png"), None)


@pytest.mark.parametrize(("output_format", "compression"), [("png", 100), ("jpeg", 100), ("jpeg", 70), ("webp", 70)])
def test_replay_restores_request_settings_and_format(tmp_path, output_format, compression):
    made = plan("--replay", str(image_file(tmp_path, output_format, compression)))
    assert made.prompts == ["a cat"]
    params = made.params
    assert (params.width, params.height, params.num_inference_steps) == (64, 96, 9)
    assert (params.guidance_scale, params.negative_prompt, params.max_sequence_length) == (4.5, "blurry", 64)
    assert (params.cfg_normalization, params.cfg_truncation) == (1.0, None)
    assert (params.seed, params.num_outputs_per_prompt) == ([7, 11, 3], 3)
    assert made.only == 1
    config = made.config
    assert (config.dtype, config.device, config.deterministic, config.attention_backend) == (
        "float32",
        "cpu",
        True,
        "sdpa",
    )
    assert (made.output.format, made.output.compression) == (output_format, compression)
    assert made.notes == []


def test_replay_is_not_bent_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MMGEN_DTYPE", "bfloat16")
    monkeypatch.setenv("MMGEN_DETERMINISTIC", "false")
    made = plan("--replay", str(image_file(tmp_path)))
    assert (made.config.dtype, made.config.deterministic) == ("float32", True)


def test_flags_beside_replay_override_it(tmp_path):
    path = str(image_file(tmp_path))
    made = plan(
        "a dog", "--replay", path, "--steps", "3", "--dtype", "bfloat16", "--no-deterministic", "--size", "32x32"
    )
    assert made.prompts == ["a dog"]
    assert (made.params.num_inference_steps, made.params.width, made.params.guidance_scale) == (3, 32, 4.5)
    assert (made.config.dtype, made.config.deterministic, made.only) == ("bfloat16", False, 1)
    seeded = plan("--replay", path, "--seed", "5")
    assert (seeded.params.seed, seeded.params.num_outputs_per_prompt, seeded.only) == (5, 1, None)
    several = plan("--replay", path, "--n", "2")
    assert (several.params.seed, several.params.num_outputs_per_prompt, several.only) == (11, 2, None)
    other = plan("--replay", path, "--output-format", "jpeg")
    assert (other.output.format, other.output.compression) == ("jpeg", 100)


def test_replay_of_another_version_or_model_says_so(tmp_path):
    made = plan("--replay", str(image_file(tmp_path, version="0.0.1")))
    assert made.notes == [
        f"{tmp_path}/original.png was made by multimodal_gen 0.0.1, this is {__version__}: pixels may differ."
    ]
    message = refused("--replay", str(image_file(tmp_path, model="no-such-model")))
    assert "'no-such-model'" in message
    assert "--model-path" in message
    assert plan("--replay", str(image_file(tmp_path, model="no-such-model")), "--model-path", "emoji-image").only == 1


def test_replay_finds_a_hub_model_by_its_repository_and_revision(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--someone--emoji-image" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(ASSETS / "emoji-image")
    path = image_file(tmp_path, repository="someone/emoji-image", revision=commit)
    made = plan("--replay", str(path))
    assert (made.config.model_path, made.config.revision) == ("someone/emoji-image", commit)
    assert made.config.local_files_only
    message = refused("--replay", str(image_file(tmp_path, repository="someone/emoji-image", revision="f" * 40)))
    assert "'someone/emoji-image' at revision 'ffff" in message
    assert plan("--replay", str(image_file(tmp_path, revision="f" * 40))).config.revision is None


def test_replay_restores_what_shapes_the_forwards(tmp_path):
    cores = os.cpu_count() or 1
    made = plan("--replay", str(image_file(tmp_path, max_batch_tokens=300, threads=cores)))
    assert (made.config.max_batch_tokens, made.config.threads, made.notes) == (300, cores, [])
    greedy = plan("--replay", str(image_file(tmp_path, threads=cores + 1)))
    assert greedy.config.threads is None
    assert f"by {cores + 1} threads, more than this machine has" in greedy.notes[0]
    on_gpu = plan("--replay", str(image_file(tmp_path, threads=cores, device="cuda:0")))
    assert (on_gpu.config.threads, on_gpu.notes) == (None, [])
    assert "--threads cannot be 0" in refused("--replay", str(image_file(tmp_path, threads=0)))


@pytest.mark.parametrize("backend", ["triton", "from-the-future"])
def test_replay_takes_another_attention_backend_where_the_originals_cannot_run(tmp_path, backend):
    path = str(image_file(tmp_path, attention_backend=backend))
    made = plan("--replay", path)
    assert made.config.attention_backend == "auto"
    (note,) = made.notes
    assert f"--attention-backend {backend!r} cannot be had on cpu" in note
    assert note.endswith("pixels may differ.")
    asked = plan("--replay", path, "--attention-backend", backend)
    assert (asked.config.attention_backend, asked.notes) == (backend, []), "refused by name when it is loaded"


def test_replay_restores_the_form_of_weights_and_the_kernels(tmp_path, monkeypatch):
    wanted = {"quantize": "int8-weights", "kernels": "torch", "vae_tiling": True, "compile": True}
    config = EngineConfig(**wanted)
    ready = Ready(device="cpu", dtype="float32", attention_backend="sdpa", parameters=1, load_seconds=0.0)
    recipe = Maker(ready, config, registry.describe(config)).recipe(REQUEST, 1, ())
    own = Replay(Recipe.from_json(recipe.to_json()), []).settings(())
    assert {name: own[name] for name in wanted} == wanted
    monkeypatch.setenv("MMGEN_QUANTIZE", "int8")
    made = plan("--replay", str(image_file(tmp_path, quantize="int8-weights")))
    assert (made.config.quantize, made.notes) == ("int8-weights", [])
    assert plan("--replay", str(image_file(tmp_path))).config.quantize == "none", "whatever the environment says"


def test_replay_notes_what_this_machine_cannot_have(tmp_path):
    path = str(image_file(tmp_path, quantize="fp8"))
    made = plan("--replay", path)
    assert made.config.quantize == "none"
    (note,) = made.notes
    assert "--quantize 'fp8' cannot be had on cpu" in note
    assert note.endswith("pixels may differ.")
    asked = plan("--replay", path, "--quantize", "fp8")
    assert (asked.config.quantize, asked.notes) == ("fp8", []), "refused by name when it is loaded"
    no_kernels = plan("--replay", str(image_file(tmp_path, attention_backend="native")), "--kernels", "torch")
    assert no_kernels.config.attention_backend == "auto", "native attention is one of those kernels"


def test_replay_never_downloads_the_model_that_a_file_names(tmp_path):
    message = refused("--replay", str(image_file(tmp_path, model="someone/some-model")))
    assert "--no-local-files-only" in message


def test_a_replay_on_another_device_is_noted(tmp_path):
    made = plan("--replay", str(image_file(tmp_path, device="cuda:0")))
    assert made.config.device == "auto"
    assert made.differences("cuda:0", ()) == []
    assert "made on cuda:0, this one on cpu" in made.differences("cpu", ())[0]


def test_commands_and_top_level_flags(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)
    assert run(capsys, "--version") == (0, f"mmgen {__version__}\n", "")
    code, out, err = run(capsys, "genrate", "x")
    assert (code, out) == (2, "")
    assert "Unknown command 'genrate'. Did you mean 'generate'?" in err
    assert run(capsys, "--jsn")[0] == 2


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_each_command_has_help(command, capsys):
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: mmgen {command}")


def test_traceback_flag_lets_errors_through(capsys):
    with pytest.raises(UserError):
        main(["generate", "x", "--width", "7", "--traceback"])


def test_config_show_has_origins_and_hides_the_key(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MMGEN_API_KEY", "sk-secret")
    (tmp_path / "s.yaml").write_text("threads: 3\n")
    code, out, err = run(capsys, "config", "show", "--json", "--config", "s.yaml", "--port", "0")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert list(shown) == [option.name for option in options(ServerConfig)]
    assert shown["port"] == {"value": 0, "origin": "arguments"}
    assert shown["threads"] == {"value": 3, "origin": "s.yaml"}
    assert shown["api_key"] == {"value": "(hidden)", "origin": "MMGEN_API_KEY"}
    assert "sk-secret" not in run(capsys, "config")[1]
    code, _, err = run(capsys, "config", "shw")
    assert code == 2
    assert "Did you mean 'show'?" in err


def test_models_lists_and_describes(capsys):
    code, out, _ = run(capsys, "models")
    assert code == 0
    assert all(word in out for word in ("emoji-image", "ZImagePipeline", "diffusers"))
    listed = json.loads(run(capsys, "models", "--json")[1])
    assert listed["bundled"][0]["name"] == "emoji-image"
    assert "ZImagePipeline" in listed["native"][0]["pipeline_classes"]
    card = json.loads(run(capsys, "models", "emoji-image", "--json")[1])
    assert card["weights"]["parameters"] > 1_000_000
    code, _, err = run(capsys, "models", "emoji-imag")
    assert code == 2
    assert "Did you mean 'emoji-image'?" in err


def test_serve_refuses_a_public_bind_without_a_key(capsys):
    code, out, err = run(capsys, "serve", "--host", "0.0.0.0")
    assert (code, out) == (2, "")
    assert "MMGEN_API_KEY" in err
