"""`mmgen generate`: images and videos from prompts, made in this process."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from multimodal_gen.cli.flags import Arguments, Parser, add_settings, number, whole
from multimodal_gen.cli.plan import Plan, make_plan
from multimodal_gen.cli.text import as_json
from multimodal_gen.step_cache import write

if TYPE_CHECKING:
    from multimodal_gen.generator import DiffGenerator, GenerationResult


def add_arguments(parser: Parser) -> None:
    """Flags of `mmgen generate`."""
    from multimodal_gen.config import EngineConfig

    parser.usage = "mmgen generate [PROMPT] [flags]"
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="what to paint; - reads one prompt per line from stdin"
    )
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="one prompt per line; they share forwards (add --deterministic for exact replays of single images)",
    )
    parser.add_argument("--replay", metavar="FILE", help="make the image of this file again, from its recipe")
    _add_sampling(parser)
    _add_output(parser)
    add_settings(parser, EngineConfig)


def _add_sampling(parser: Parser) -> None:
    group = parser.add_argument_group("sampling", "the model's defaults apply to what is left out")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what to keep out of the picture")
    group.add_argument("--size", metavar="WxH", help="width and height in pixels, such as 128x128")
    group.add_argument("--width", type=whole, metavar="PIXELS", help="width")
    group.add_argument("--height", type=whole, metavar="PIXELS", help="height")
    group.add_argument("--num-inference-steps", "--steps", type=whole, metavar="N", help="denoising steps")
    group.add_argument(
        "--guidance-scale", type=number, metavar="W", help="weight of classifier-free guidance; 0 = none"
    )
    group.add_argument("--seed", type=whole, action="append", metavar="N", help="repeatable: one image for each")
    group.add_argument("--n", "--num-outputs-per-prompt", dest="n", type=whole, metavar="N", help="images per prompt")
    group.add_argument(
        "--cfg-normalization", type=number, metavar="R", help="cap of the guided prediction's norm; 0 = none"
    )
    group.add_argument("--cfg-truncation", metavar="T", help="time after which guidance stops, or none")
    group.add_argument("--num-frames", type=whole, metavar="N", help="frames of a video")
    group.add_argument("--fps", type=whole, metavar="N", help="frames per second of the video's file")
    group.add_argument("--image", metavar="FILE", help="picture that a video starts from")
    group.add_argument(
        "--guidance-scale-2", type=number, metavar="W", help="guidance of the second expert (default: as the first)"
    )
    group.add_argument("--flow-shift", type=number, metavar="S", help="shift of the noise schedule towards noise")
    group.add_argument("--max-sequence-length", type=whole, metavar="N", help="prompt tokens kept")


def _add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output", "-o", metavar="PATH", help="a folder, or one file to write (default: outputs/)")
    group.add_argument(
        "--output-format",
        metavar="FORMAT",
        help="png, jpeg, webp; of videos mp4, webm, gif; default: the first, or by --output",
    )
    group.add_argument(
        "--output-compression", type=whole, metavar="0-100", help="quality of jpeg and webp (default: 100)"
    )
    group.add_argument("--no-metadata", action="store_true", help="no prompt or settings in the file, only the AI mark")
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    group.add_argument("--quiet", "-q", action="store_true", help="print only the paths; no progress bar")


def run(arguments: Arguments) -> int:
    """Generate, write the files, print what came out."""
    plan = make_plan(arguments)
    _note(plan.notes)
    if not arguments.quiet:
        _show_memory_plan()
    began = time.monotonic()
    # Whatever a library prints belongs on stderr: stdout holds the result alone.
    with contextlib.redirect_stdout(sys.stderr):
        from multimodal_gen.generator import DiffGenerator

        with DiffGenerator(plan.config) as generator:
            loaded = time.monotonic() - began
            results = _generate(generator, plan, quiet=arguments.quiet)
            written = [image for result in results for image in _write(generator, plan, result)]
            facts = {
                "model": generator.card.name,
                "device": generator.info.device,
                "dtype": generator.info.dtype,
                "attention_backend": generator.info.attention_backend,
                "load_seconds": round(loaded, 3),
            }
            _note(plan.differences(generator.info.device, generator.list_loras().active))
    _note(dict.fromkeys(warning for result in results for warning in result.warnings))
    if arguments.json:
        print(as_json({**facts, "images": written, "requests": [_request_facts(result) for result in results]}))
    else:
        _print(written, results, loaded, quiet=arguments.quiet)
    return 0


def _generate(generator: DiffGenerator, plan: Plan, *, quiet: bool) -> list[GenerationResult]:
    from multimodal_gen.cli.progress import StepBar

    with StepBar(plan.steps, quiet=quiet) as bar:
        return generator.generate(plan.prompts, sampling_params=plan.params, output_type="np", on_step=bar.update)


def _write(generator: DiffGenerator, plan: Plan, result: GenerationResult) -> list[dict[str, Any]]:
    from multimodal_gen.media.files import file_name, write_exactly, write_new
    from multimodal_gen.media.formats import encode, extension

    written = []
    output, request = plan.output, result.request
    for index, pixels in enumerate(result.images if result.frames is None else result.frames):
        if plan.only is not None and index != plan.only:
            continue
        recipe = generator.recipe(result, index) if output.metadata else None
        data = encode(pixels, output.format, fps=result.fps, compression=output.compression, recipe=recipe)
        if output.file is not None:
            path = write_exactly(output.file, data)
        else:
            name = file_name(request.seeds[index], request.prompt, extension(output.format), datetime.now())
            path = write_new(output.folder, name, data)
        written.append(_image_facts(path, result, index))
    return written


def _image_facts(path: Path, result: GenerationResult, index: int) -> dict[str, Any]:
    request = result.request
    return {
        "path": str(path),
        "seed": request.seeds[index],
        "prompt": request.prompt,
        "width": request.width,
        "height": request.height,
        **({} if result.frames is None else {"num_frames": len(result.frames[index]), "fps": result.fps}),
    }


def _request_facts(result: GenerationResult) -> dict[str, Any]:
    return {
        "prompt": result.prompt,
        "negative_prompt": result.request.negative_prompt,
        "seeds": list(result.request.seeds),
        "num_inference_steps": result.request.num_inference_steps,
        "loras": [
            {"nickname": pin.nickname, "strength": pin.strength, "target": pin.tree} for pin in result.request.loras
        ],
        "guidance_scale": result.request.guidance_scale,
        "step_cache": write(result.request.step_cache),
        "prompt_tokens": result.prompt_tokens,
        "timings": {name: round(value, 4) for name, value in msgspec.structs.asdict(result.timings).items()},
        "warnings": list(result.warnings),
    }


def _print(written: list[dict[str, Any]], results: list[GenerationResult], loaded: float, *, quiet: bool) -> None:
    for image in written:
        print(image["path"] if quiet else f"{image['path']}  seed {image['seed']}")
    if quiet:
        return
    slowest = max((result.timings for result in results), key=lambda timings: timings.total)
    cached = f", {slowest.cached_steps} extrapolated" if slowest.cached_steps else ""
    print(
        f"{slowest.total:.2f} s: text {slowest.encode:.2f} s, {slowest.steps} steps {slowest.denoise:.2f} s "
        f"({slowest.per_step:.3f} s/step{cached}), decode {slowest.decode:.2f} s; the model loaded in {loaded:.1f} s"
    )


def _show_memory_plan() -> None:
    """What is where, before minutes of loading; on stderr, as all that is not the result."""
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("multimodal_gen.memory.residency")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(shown)


def _note(lines: Any) -> None:
    for line in lines:
        print(f"note: {line}", file=sys.stderr)
