"""The fallback on the step contract: diffusers loads and computes, the engine decides when each step runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError, CorruptModel, InvalidValue, UnsupportedParameter
from multimodal_gen.memory.residency import Memory
from multimodal_gen.nn.precision import resolve_device, resolve_dtype
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.pipelines.contract import Conditions, PipelineInfo, Row
from multimodal_gen.pipelines.diffusers_any.run import Step, StepwiseCall
from multimodal_gen.pipelines.diffusers_any.signature import CallSignature
from multimodal_gen.pipelines.diffusers_any.spec import guidance_argument, step_callback, takes_negative
from multimodal_gen.request import GenerationRequest, ModelCard
from multimodal_gen.weights.checkpoint import verify
from multimodal_gen.weights.loading import WeightTree

PLACEMENT = (
    "offload",
    "offload_components",
    "prefetch_layers",
    "resident_layers",
    "device_memory_limit",
    "host_memory_limit",
    "pin_memory",
)


class DiffusersPipeline:
    """Any text-to-image pipeline of diffusers, one row at a time (`card.exclusive`)."""

    def __init__(self, card: ModelCard, config: EngineConfig, mesh: Mesh) -> None:
        """Raises: CorruptModel, RemoteCodeRefused, ConfigError."""
        assert mesh.degrees.world == 1, "parallel.plan refuses to share out a model that diffusers computes"
        if config.attention_backend != "auto":
            raise ConfigError(
                f"--attention-backend {config.attention_backend} has no effect on {card.pipeline_class}: diffusers "
                "chooses its attention. Leave it at auto.",
                param="attention_backend",
            )
        _check_offload(config, card)
        checkpoint = verify(Path(card.path))
        device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, device)
        self.card = card
        self.trees: dict[str, WeightTree] = {}
        self.pipe = _load(checkpoint.folder, checkpoint.pipeline_class, dtype).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.call = _signature_of(self.pipe)
        self.memory = Memory(config, device, checkpoint.folder, mesh)
        self.info = PipelineInfo(
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            attention_backend="diffusers",
            parameters=checkpoint.parameters,
        )
        self._calls: dict[tuple[str, int], StepwiseCall] = {}

    def encode(self, rows: Sequence[Row]) -> None:
        """Checks the request; the prompt itself is encoded by diffusers, in the first step.

        Raises: UnsupportedParameter for a value that this pipeline class does not take.
        """
        conditions: dict[str, Conditions] = {}
        for row in rows:
            request = row.request
            if request.id not in conditions:
                self._arguments(request)
                conditions[request.id] = Conditions(prompt_tokens=self._count_tokens(request))
            row.conditions = conditions[request.id]

    def prepare(self, row: Row) -> None:
        """Nothing to do: diffusers draws the noise in the first step, from the generator that it is given."""

    def denoise(self, rows: Sequence[Row]) -> None:
        """One step of each row. Raises what diffusers raised; a repeated call begins the image anew."""
        for row in rows:
            self._drive(row, row.step + 1)
            row.step += 1

    def decode(self, row: Row) -> Iterator[np.ndarray | None]:
        """The finished image, uint8 [height, width, 3].

        Raises: InvalidValue where the model has a safety checker and it struck; what diffusers raised.
        """
        yield self._image(row)

    def preview(self, row: Row) -> np.ndarray:
        """Never called: the card says that there are no previews."""
        raise UnsupportedParameter(f"{self.card.name} ({self.card.pipeline_class}) cannot show partial images.")

    def release(self, row: Row) -> None:
        """End the row's thread, wherever it is."""
        call = self._calls.pop(_key(row), None)
        if call is not None:
            call.cancel()

    def forget(self) -> None:
        """Nothing is kept."""

    def reset(self) -> None:
        """Nothing is kept."""

    def _drive(self, row: Row, step: int) -> StepwiseCall:
        """The row's call, advanced until `step` of its requested steps are done; begun where there is none."""
        call = self._calls.get(_key(row))
        if call is None:
            call = self._calls[_key(row)] = StepwiseCall(lambda on_step: self._run(row, on_step), self._count_steps)
        try:
            call.advance(step, row.request.num_inference_steps)
        except Exception:
            del self._calls[_key(row)]
            raise
        return call

    def _image(self, row: Row) -> np.ndarray:
        call = self._drive(row, row.request.num_inference_steps)
        try:
            output = call.finish()
        except Exception:
            del self._calls[_key(row)]
            raise
        images, *flags = output
        if flags and flags[0] and any(flags[0]):
            raise InvalidValue(
                "The model's own safety checker blacked out the image; change the prompt or the seed.", param="prompt"
            )
        return np.asarray(images[0].convert("RGB"))

    def _run(self, row: Row, on_step: Step) -> Any:
        callback = step_callback(self.call)
        assert callback is not None, "describe() refuses pipelines without a callback"
        every = {"callback_steps": 1} if callback == "callback" else {}
        generator = torch.Generator("cpu").manual_seed(row.seed)
        arguments = {**self._arguments(row.request), "generator": generator, callback: on_step, **every}
        return self.pipe(output_type="pil", return_dict=False, **arguments)

    def _arguments(self, request: GenerationRequest) -> dict[str, Any]:
        """The request in the words of the pipeline's `__call__`."""
        card = self.card
        if request.output != "pixels":
            raise UnsupportedParameter(
                f"{card.name} ({card.pipeline_class}) returns images only, no latents.", param="output_type"
            )
        wanted: dict[str, Any] = {
            "prompt": request.prompt,
            "width": request.width,
            "height": request.height,
            "num_inference_steps": request.num_inference_steps,
        }
        if "max_sequence_length" in self.call:
            wanted["max_sequence_length"] = request.max_sequence_length
        if guidance_argument(self.call) in self.call:
            wanted[guidance_argument(self.call)] = request.guidance_scale
        if request.negative_prompt is not None:
            self._check_negative()
            wanted["negative_prompt"] = request.negative_prompt
        elif guidance_argument(self.call) == "true_cfg_scale" and request.guidance_scale > card.guidance_threshold:
            wanted["negative_prompt"] = ""  # without any, these classes skip guidance whatever its scale
        return wanted

    def _check_negative(self) -> None:
        if not takes_negative(self.call):
            raise UnsupportedParameter(
                f"{self.card.name} ({self.card.pipeline_class}) does not use 'negative_prompt'; leave it out.",
                param="negative_prompt",
            )

    def _count_tokens(self, request: GenerationRequest) -> int:
        """Tokens of the prompt by the pipeline's last tokenizer, which is the one with the most room."""
        names = sorted(name for name in self.pipe.components if name.startswith("tokenizer"))
        tokenizer = self.pipe.components[names[-1]] if names else None
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            return 0
        tokens: list[int] = tokenizer(request.prompt).input_ids
        return min(len(tokens), int(tokenizer.model_max_length))

    def _count_steps(self) -> int:
        """Steps of the run that has just begun; the scheduler's count, not the request's."""
        return len(self.pipe.components["scheduler"].timesteps)


def _check_offload(config: EngineConfig, card: ModelCard) -> None:
    """Raises: ConfigError for wishes about weights that diffusers holds."""
    given, usual = msgspec.structs.asdict(config), msgspec.structs.asdict(EngineConfig())
    wishes = [name for name in PLACEMENT if given[name] != usual[name] and (name, given[name]) != ("offload", "none")]
    if wishes:
        flag = "--" + wishes[0].replace("_", "-")
        raise ConfigError(
            f"{flag} has no effect on {card.pipeline_class}: diffusers holds its weights, all of them on the device. "
            f"Leave {flag} out, or choose a model of a native family (`mmgen models`).",
            param=wishes[0],
        )


def _key(row: Row) -> tuple[str, int]:
    return row.request.id, row.index


def _load(folder: Path, pipeline_class: str, dtype: torch.dtype) -> Any:
    try:
        with _no_loading_bars():
            return DiffusionPipeline.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
    except ImportError as error:
        raise ConfigError(
            f"{pipeline_class} needs a package that is not installed: {_first_line(error)}", param="model_path"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptModel(
            f"diffusers cannot load this {pipeline_class} folder: {_first_line(error).replace(str(folder), '.')}"
        ) from error


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _signature_of(pipe: Any) -> CallSignature:
    found: Mapping[str, inspect.Parameter] = inspect.signature(type(pipe).__call__).parameters
    named = {
        name: p.default for name, p in list(found.items())[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    required = tuple(name for name, default in named.items() if default is inspect.Parameter.empty)
    return CallSignature(required, {name: default for name, default in named.items() if name not in required})


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
