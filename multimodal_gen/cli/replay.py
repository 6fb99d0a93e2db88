"""`--replay`: from the recipe in a file to the request and the settings that made it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from multimodal_gen.adapters import Pin
from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.lora.sources import parse_flag
from multimodal_gen.media.recipe import Recipe, read_recipe
from multimodal_gen.pipelines import registry
from multimodal_gen.request import ModelCard
from multimodal_gen.step_cache import NONE
from multimodal_gen.version import __version__

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Replay:
    """A recipe and what follows from it."""

    recipe: Recipe
    notes: list[str]

    def settings(self, loras: Sequence[str]) -> dict[str, Any]:
        """Engine settings of the original, given the user's `--lora`, which say where the adapters are.

        The recipe may come from anywhere, so its model is looked for on this machine only. A GPU is not asked for:
        where there is none, an image near the original is better than none.
        """
        recipe = self.recipe
        on_cpu = recipe.device == "cpu"
        return {
            "model_path": recipe.repository or recipe.model,
            "revision": recipe.revision if recipe.repository else None,
            "local_files_only": None if _bundled(recipe) else True,
            "device": "cpu" if on_cpu else None,
            "dtype": recipe.dtype,
            "deterministic": recipe.deterministic,
            "attention_backend": recipe.attention_backend,
            "quantize": recipe.quantize,
            "kernels": recipe.kernels,
            "compile": recipe.compiled,
            "vae_tiling": recipe.vae_tiling,
            "max_batch_tokens": recipe.max_batch_tokens,
            "step_cache": recipe.step_cache or NONE,
            "threads": recipe.threads if on_cpu and not _too_many(recipe) else None,
            "lora": self._adapters(loras),
            "lora_merge_mode": "merge" if recipe.merged else "dynamic",
        }

    def settle(self, config: EngineConfig, given: Mapping[str, Any]) -> tuple[EngineConfig, list[str]]:
        """The settings as this machine can have them, and notes on what it cannot repeat.

        What the user asked for (`given`) stays: loading refuses it by name where it cannot be had.
        """
        from multimodal_gen.nn.precision import resolve_device

        device = resolve_device(config.device)
        taken: dict[str, str | bool] = {}
        notes = []
        for name, value, instead, why in _cannot(config, device):
            if name not in given:
                taken[name] = instead
                flag = f"--{name.replace('_', '-')}" + (f" {value[:40]!a}" if value else "")
                notes.append(f"the original's {flag} cannot be had on {device} ({why}): pixels may differ.")
        return msgspec.structs.replace(config, **taken), notes

    def _adapters(self, given: Sequence[str]) -> list[str]:
        """`--lora` flags with the strengths and targets of the original; a recipe names files, not where they are.

        Raises: ConfigError for adapters whose place is not given.
        """
        pins = self.recipe.loras
        paths = {}
        for flag in map(parse_flag, given):
            if flag.use.nickname not in {pin.nickname for pin in pins}:
                raise ConfigError(f"--lora {flag.use.nickname}: the image was made without it.", param="lora")
            if flag.use.strength not in (1.0, *(pin.strength for pin in pins if pin.nickname == flag.use.nickname)):
                raise ConfigError(
                    f"--lora {flag.use.nickname}: the strength comes from the recipe; give the path only.", param="lora"
                )
            paths[flag.use.nickname] = flag.path
        missing = [pin for pin in pins if pin.nickname not in paths]
        if missing:
            pin = missing[0]
            raise ConfigError(
                f"The image was made with the adapter {pin.nickname!r} (a file with SHA-256 {pin.sha256[:12]}…): say "
                f"where it is with --lora {pin.nickname}=PATH.",
                param="lora",
            )
        return [f"{pin.nickname}={paths[pin.nickname]}:{pin.strength!r}:{pin.tree}{_options(pin)}" for pin in pins]

    def other_adapters(self, pins: Sequence[Pin]) -> list[str]:
        """Why the adapters in use are not those of the original."""
        wanted = {(pin.nickname, pin.digest) for pin in self.recipe.loras}
        return [
            f"the adapter {pin.nickname!r} is another file than the one the original was made with."
            for pin in dict.fromkeys(pins)
            if (pin.nickname, pin.digest) not in wanted
        ]

    def check_image(self, png: bytes | None) -> list[str]:
        """Notes on the picture that the video starts from; a recipe holds its digest alone.

        Raises: ConfigError where it is missing.
        """
        wanted = self.recipe.image_sha256
        if wanted is not None and png is None:
            raise ConfigError("The video starts from a picture: say where it is with --image FILE.", param="image")
        if png is not None and hashlib.sha256(png).hexdigest() != wanted:
            return ["the picture is another one than the original started from: pixels may differ."]
        return []

    def parameters(self, card: ModelCard, overrides: dict[str, Any]) -> dict[str, Any]:
        """Sampling parameters of the original that this model takes and that nobody overrides.

        All seeds run, not only the wanted one: images of one request share forwards.
        """
        recipe = self.recipe
        seeds: dict[str, Any] = {"seed": list(recipe.seeds), "num_outputs_per_prompt": len(recipe.seeds)}
        if overrides.keys() & seeds.keys():
            seeds = {"seed": recipe.seed}
        stored = {
            "negative_prompt": recipe.negative_prompt,
            "width": recipe.width,
            "height": recipe.height,
            "num_inference_steps": recipe.num_inference_steps,
            "guidance_scale": recipe.guidance_scale,
            "cfg_normalization": recipe.cfg_normalization,
            "cfg_truncation": recipe.cfg_truncation,
            "max_sequence_length": recipe.max_sequence_length,
            "num_frames": recipe.num_frames,
            "fps": recipe.fps,
            "guidance_scale_2": recipe.guidance_scale_2,
            "flow_shift": recipe.flow_shift,
            **seeds,
        }
        return {name: value for name, value in stored.items() if name in card.parameters}


def _options(pin: Pin) -> str:
    return (f":alpha={pin.alpha!r}" if pin.alpha is not None else "") + (":partial" if pin.allow_partial else "")


def _cannot(config: EngineConfig, device: torch.device) -> Iterator[tuple[str, str, str | bool, str]]:
    """(setting, its value unless it is a switch, what to take instead, why `device` cannot have it)."""
    from multimodal_gen.attention.registry import available
    from multimodal_gen.kernels import native
    from multimodal_gen.nn import compiled
    from multimodal_gen.nn.quantize import KINDS

    with native.torch_only() if config.kernels == "torch" else contextlib.nullcontext():
        reasons = {"auto": "", **available(device)}
    if why := reasons.get(config.attention_backend, "there is no backend of that name"):
        yield "attention_backend", config.attention_backend, "auto", why
    if config.quantize != "none" and (why := KINDS[config.quantize].unavailable(device)):
        yield "quantize", config.quantize, "none", why
    if config.compile:
        try:
            compiled.check(device)
        except ConfigError as error:
            yield "compile", "", False, error.message.rstrip(".")


def read_replay(path: str) -> Replay:
    """Read the recipe of an image file. Raises as `read_recipe`."""
    recipe = read_recipe(path)
    notes = []
    if recipe.version != __version__:
        notes.append(
            f"{path} was made by multimodal_gen {recipe.version[:40]}, this is {__version__}: pixels may differ."
        )
    if recipe.merged and {pin.tree for pin in recipe.loras} != set(recipe.merged):
        notes.append(f"{path} was made with adapters partly merged, which is not repeated: pixels may differ.")
    if recipe.device == "cpu" and _too_many(recipe):
        notes.append(f"{path} was made by {recipe.threads} threads, more than this machine has: pixels may differ.")
    return Replay(recipe, notes)


def _bundled(recipe: Recipe) -> bool:
    return recipe.repository is None and recipe.model in registry.bundled()


def _too_many(recipe: Recipe) -> bool:
    """Threads without a core of their own would take turns; a recipe from anywhere may not ask for thousands."""
    return recipe.threads is not None and recipe.threads > (os.cpu_count() or 1)
