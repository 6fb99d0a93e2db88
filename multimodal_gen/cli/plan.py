"""From the arguments of `mmgen generate` to a checked plan, before anything heavy is imported."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal_gen.adapters import Pin
from multimodal_gen.cli.flags import Arguments, given_settings, number
from multimodal_gen.cli.replay import Replay, read_replay
from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError, InvalidSize, InvalidValue, ModelNotFound, did_you_mean
from multimodal_gen.media.target import find_target
from multimodal_gen.pipelines import registry
from multimodal_gen.request import Media, ModelCard, SamplingParams
from multimodal_gen.resolve import resolve
from multimodal_gen.settings import load

DEFAULT_FOLDER = "outputs"

_SIZE = re.compile(r"([0-9]{1,6})[xX]([0-9]{1,6})")
_PARAMETERS = (
    "negative_prompt",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "cfg_normalization",
    "max_sequence_length",
    "num_frames",
    "fps",
    "guidance_scale_2",
    "flow_shift",
)


@dataclass(frozen=True)
class Output:
    """Where the outputs go and how they are written."""

    folder: Path
    file: Path | None  # one output, under exactly this name
    format: Any  # a value of `media.formats.BY_SUFFIX`
    compression: int
    metadata: bool


@dataclass(frozen=True)
class Plan:
    """All that `mmgen generate` will do."""

    config: EngineConfig
    prompts: list[str]
    params: SamplingParams
    output: Output
    only: int | None  # index of the one image to keep of each prompt; None = all
    steps: int  # denoising steps of all images together
    notes: list[str]  # what the user should know before it starts
    replay: Replay | None

    def differences(self, device: str, pins: Sequence[Pin]) -> list[str]:
        """Why a replay that ran on `device` with these adapters may differ from its original."""
        if self.replay is None:
            return []
        notes = self.replay.other_adapters(pins)
        if self.replay.recipe.device != device:
            notes.append(f"the original was made on {self.replay.recipe.device}, this one on {device}.")
        return [f"{note[:-1]}: pixels may differ." for note in notes]


def make_plan(arguments: Arguments) -> Plan:
    """Check everything that can be checked without loading the model.

    Raises: ConfigError, ModelNotFound, CorruptModel, the InvalidValue family.
    """
    from multimodal_gen.generator import check_total

    replay = read_replay(arguments.replay) if arguments.replay else None
    wanted = _given_parameters(arguments)
    prompts = _prompts(arguments, replay)
    notes = [*replay.notes, *replay.check_image(wanted.get("image"))] if replay else []
    config, card = _model(arguments, replay)
    if replay is not None:
        config, unlike = replay.settle(config, given_settings(arguments))
        notes += unlike
    if "step_cache" in given_settings(arguments):  # a wish, which is refused where it has no effect
        wanted["step_cache"] = config.step_cache
    only = replay.recipe.index if replay and not wanted.keys() & {"seed", "num_outputs_per_prompt"} else None
    params = SamplingParams(**{**(replay.parameters(card, wanted) if replay else {}), **wanted})
    requests = [
        resolve(request_id="plan", prompt=prompt, params=params, card=card, max_cost=config.max_request_cost)
        for prompt in prompts
    ]
    check_total(requests, config.max_queue_cost)
    images = len(prompts) * (1 if only is not None else requests[0].n)
    return Plan(
        config=config,
        prompts=prompts,
        params=params,
        output=_output(arguments, replay, images, card.media),
        only=only,
        steps=sum(request.num_inference_steps * request.n for request in requests),
        notes=notes,
        replay=replay,
    )


def _given_parameters(arguments: Arguments) -> dict[str, Any]:
    given = vars(arguments)
    wanted = {name: given[name] for name in _PARAMETERS if given[name] is not None}
    if arguments.size is not None:
        if wanted.keys() & {"width", "height"}:
            raise InvalidSize("--size and --width/--height say the same thing; give one of them.", param="size")
        wanted["width"], wanted["height"] = _size(arguments.size)
    if arguments.seed is not None:
        wanted["seed"] = arguments.seed if len(arguments.seed) > 1 else arguments.seed[0]
        if len(arguments.seed) > 1 and arguments.n is None:
            wanted["num_outputs_per_prompt"] = len(arguments.seed)
    if arguments.n is not None:
        wanted["num_outputs_per_prompt"] = arguments.n
    if arguments.image is not None:
        from multimodal_gen.media.reference import to_reference

        wanted["image"] = to_reference(Path(arguments.image))
    if arguments.cfg_truncation is not None:
        text = arguments.cfg_truncation
        wanted["cfg_truncation"] = None if text.lower() == "none" else _number(text, "--cfg-truncation")
    return wanted


def _size(text: str) -> tuple[int, int]:
    found = _SIZE.fullmatch(text)
    if found is None:
        raise InvalidSize(f"--size must look like 128x128 (width x height in pixels), got {text[:40]!r}.", param="size")
    return int(found[1]), int(found[2])


def _number(text: str, flag: str) -> float:
    import argparse

    try:
        return number(text)
    except argparse.ArgumentTypeError as error:
        raise InvalidValue(f"{flag} {error}.") from None


def _prompts(arguments: Arguments, replay: Replay | None) -> list[str]:
    sources = [s for s in (arguments.prompt, arguments.prompt_file) if s is not None]
    if len(sources) > 1:
        raise ConfigError("Give a PROMPT or --prompt-file, not both.")
    if not sources:
        if replay is None:
            raise ConfigError('There is nothing to paint: give a prompt, as in: mmgen generate "a red apple".')
        return [replay.recipe.prompt]
    if arguments.prompt_file is None and arguments.prompt != "-":
        return [arguments.prompt]
    lines = [line.strip() for line in _read_lines(arguments.prompt_file or "-")]
    prompts = [line for line in lines if line]
    if not prompts:
        raise ConfigError(f"There is no prompt in {arguments.prompt_file or 'stdin'}; write one per line.")
    return prompts


def _read_lines(source: str) -> list[str]:
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"Cannot read --prompt-file {source}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"Cannot read prompts from {source}: it is not UTF-8 text.") from None
    return text.splitlines()


def _model(arguments: Arguments, replay: Replay | None) -> tuple[EngineConfig, ModelCard]:
    flags = given_settings(arguments)
    from multimodal_gen.generator import check_makes_pictures

    if "llm_path" in flags:
        raise ConfigError("`mmgen generate` makes pictures; `mmgen chat` takes --llm-path.", param="llm_path")
    if replay is None:
        config = load(EngineConfig, flags, file=arguments.config)
        check_makes_pictures(config)
        return config, registry.describe(config)
    own = replay.settings(load(EngineConfig, flags, file=arguments.config).lora)
    config = load(EngineConfig, {**own, **flags, "lora": own["lora"]}, file=arguments.config)
    try:
        return config, registry.describe(config)
    except ModelNotFound as error:
        if "model_path" in flags:
            raise
        raise ModelNotFound(
            f"{error.message} The recipe in {arguments.replay} names this model: say where it is with --model-path, or "
            "allow a download with --no-local-files-only.",
            param="model_path",
        ) from None


def _output(arguments: Arguments, replay: Replay | None, outputs: int, media: Media) -> Output:
    from multimodal_gen.media.formats import BY_SUFFIX, DEFAULT

    known = list(dict.fromkeys(BY_SUFFIX[media].values()))
    place = DEFAULT_FOLDER if arguments.output is None else arguments.output
    target = find_target(place, outputs, "--output", media)
    by_suffix = target.format
    chosen = arguments.output_format or by_suffix or (replay.recipe.output_format if replay else DEFAULT[media])
    if chosen not in known:
        raise InvalidValue(
            f"--output-format must be one of {', '.join(known)}, got {chosen[:40]!r}." + did_you_mean(chosen, known)
        )
    if by_suffix is not None and chosen != by_suffix:
        raise InvalidValue(
            f"--output {target.file} asks for {by_suffix} and --output-format for {chosen}; drop one of them."
        )
    compression = arguments.output_compression
    if compression is None:
        compression = replay.recipe.output_compression if replay and replay.recipe.output_format == chosen else 100
    elif chosen not in ("jpeg", "webp") and compression != 100:
        raise InvalidValue(f"--output-compression is the quality of jpeg and webp; leave it out for {chosen}.")
    elif not 0 <= compression <= 100:
        raise InvalidValue(f"--output-compression must be between 0 and 100, got {compression}.")
    return Output(
        folder=target.folder,
        file=target.file,
        format=chosen,
        compression=compression,
        metadata=not arguments.no_metadata,
    )
