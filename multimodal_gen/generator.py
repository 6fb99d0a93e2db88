"""`DiffGenerator`: the Python API, a synchronous face of the same engine that the server runs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import msgspec

from multimodal_gen import settings
from multimodal_gen.adapters import (
    AdapterUse,
    Change,
    LoraState,
    MergeMode,
    UnloadLora,
    check_nickname,
    merge_change,
    pins_of,
    read_uses,
    unmerge_change,
)
from multimodal_gen.adapters import (
    Target as LoraTarget,
)
from multimodal_gen.config import DEFAULT_MODEL, NO_MODEL, EngineConfig
from multimodal_gen.environment import calm_openmp
from multimodal_gen.errors import (
    ConfigError,
    InvalidValue,
    MmgenError,
    RequestTooLarge,
    UnknownParameter,
    did_you_mean,
    from_code,
)
from multimodal_gen.lora.sources import set_change, start_change
from multimodal_gen.media.arrays import to_numpy
from multimodal_gen.media.outputs import OutputType, check_output, convert, convert_frames, stack
from multimodal_gen.messages import Event, Failed, Finished, Progress
from multimodal_gen.request import AnyRequest, ModelCard, SamplingParams, Timings, VideoRequest
from multimodal_gen.resolve import resolve

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import torch

    from multimodal_gen.engine.local import Engine
    from multimodal_gen.media.recipe import Recipe
    from multimodal_gen.media.target import Target
    from multimodal_gen.pipelines.contract import PipelineInfo

log = logging.getLogger(__name__)


@dataclass
class GenerationResult:
    """The images or videos of one prompt."""

    prompt: str
    images: list[Any]
    """PIL images ("pil"), uint8 [H, W, 3] ("np") or float [3, H, W] in 0 … 1 ("pt"); empty for videos and "latent" """
    frames: np.ndarray | None
    """of a video model: uint8 [n, F, H, W, 3] ("pil" and "np"), or a tensor float [n, F, 3, H, W] in 0 … 1 ("pt")"""
    fps: int | None
    """frames per second of videos"""
    latents: torch.Tensor | None
    """float32 [n, C, h, w] or [n, C, f, h, w] for "latent", before the VAE's scaling; else None"""
    seed: int
    """of the first image"""
    seeds: tuple[int, ...]
    timings: Timings
    request: AnyRequest
    """every setting as it was used"""
    prompt_tokens: int
    warnings: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    """files written, where `output_path` was given"""
    merged: tuple[str, ...] = ()
    """module trees whose adapters were merged into the weights; the others ran beside them"""


class DiffGenerator:
    """One loaded model: in this process, or in workers of its own where several ranks were asked for.

        with DiffGenerator.from_pretrained(model_path="emoji-image") as gen:
            gen.generate(prompt="a teapot", seed=7).images[0].save("teapot.png")

    Not thread-safe: call it from one thread at a time.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Load the model. Raises: ModelNotFound, CorruptModel, ConfigError."""
        check_makes_pictures(config)
        config = msgspec.structs.replace(config, llm_path=None, lora_paths=[])  # nothing here asks a language model
        calm_openmp()
        from multimodal_gen.engine.local import LocalEngine, RemoteEngine
        from multimodal_gen.media.recipe import origin
        from multimodal_gen.parallel.plan import plan
        from multimodal_gen.pipelines import registry

        self.config = config
        self.card: ModelCard = registry.describe(config)
        apart = plan(config, self.card).workers > 1 or config.executor == "ray"
        start_change(config)  # a file that is not there is told before the model is loaded
        self._origin = origin(config, self.card)
        self._closed = False
        self._live: Engine = RemoteEngine(config) if apart else LocalEngine(self.card, config)
        self._ids = itertools.count()

    @classmethod
    def from_pretrained(cls, model_path: str = DEFAULT_MODEL, **options: Any) -> DiffGenerator:
        """Load a bundled model, a diffusers folder or a hub repository.

        Every engine flag has the keyword of the same name: `--max-batch-tokens` is `max_batch_tokens=`.
        """
        if options.get("llm_path") is not None:
            raise ConfigError("DiffGenerator makes pictures and videos; LLM writes text.", param="llm_path")
        return cls(settings.load(EngineConfig, {"model_path": str(model_path), **options}))

    @property
    def info(self) -> PipelineInfo:
        """Device, dtype and attention backend in use."""
        return self._engine.info

    @overload
    def generate(self, prompt: str, **options: Any) -> GenerationResult: ...
    @overload
    def generate(self, prompt: list[str], **options: Any) -> list[GenerationResult]: ...
    def generate(
        self,
        prompt: str | list[str],
        *,
        sampling_params: SamplingParams | None = None,
        image: str | Path | bytes | PIL.Image.Image | np.ndarray | None = None,
        output_type: OutputType = "pil",
        output_path: str | Path | None = None,
        on_step: Callable[[Progress], None] | None = None,
        loras: Sequence[AdapterUse | Mapping[str, Any]] | None = None,
        **overrides: Any,
    ) -> GenerationResult | list[GenerationResult]:
        """Generate images or videos; a list of prompts runs as one batch and gives a list in the same order.

        Args:
            prompt: what to show.
            sampling_params: settings for all prompts; keywords in `overrides` (its field names) take precedence.
            image: what a video starts from: a path, the bytes of a PNG, JPEG or WebP file, a PIL image, or an array.
            output_type: "pil", "np" (uint8 [H, W, 3]), "pt" (float [3, H, W], 0 … 1) or "latent"; of a video,
                "pil" and "np" are the same.
            output_path: where to write the outputs, with their recipes. A name that ends in .png, .jpg, .jpeg or .webp
                (videos: .mp4, .webm or .gif) is the file of the one output, and nothing may be there yet; anything
                else is a folder for PNG (MP4) files, whose names never collide.
            on_step: called after every step of every output.
            loras: adapters of this call, in order, instead of the active ones: {"nickname", "strength", "target"}
                each; [] is the base model.

        Raises: the errors of `multimodal_gen.errors`, before anything runs where the arguments are wrong; never
            returns None. After `max_consecutive_errors` failures in a row, the next call loads the model anew.
        """
        check_output(output_type, output_path)
        params = _merge(sampling_params or SamplingParams(), overrides)
        if image is not None:
            from multimodal_gen.media.reference import to_reference

            params = msgspec.structs.replace(params, image=to_reference(image))
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        engine = self._engine
        engine.refresh()
        state = engine.loras
        pins = state.active if loras is None else pins_of(read_uses(loras), state, engine.targets)
        requests = [
            resolve(
                request_id=f"local-{next(self._ids)}",
                prompt=text,
                params=params,
                card=self.card,
                max_cost=self.config.max_request_cost,
                output="latent" if output_type == "latent" else "pixels",
                loras=pins,
                own_loras=loras is not None,
            )
            for text in prompts
        ]
        check_total(requests, self.config.max_queue_cost)
        target = self._target(requests, output_path)
        answers = dict[str, Finished]()
        engine.run(requests, lambda event: _collect(event, answers, on_step))
        results = [self._result(r, answers[r.id], output_type, target) for r in requests]
        return results[0] if isinstance(prompt, str) else results

    # --- adapters -----------------------------------------------------------------------------------------------

    def set_lora(
        self,
        lora_nickname: str | Sequence[str],
        lora_path: str | Path | Sequence[str | Path | None] | None = None,
        target: str | Sequence[str] = "all",
        strength: float | Sequence[float] = 1.0,
        merge_mode: MergeMode | None = None,
        *,
        lora_alpha: float | Sequence[float | None] | None = None,
        allow_partial: bool = False,
    ) -> LoraState:
        """Make these adapters the active ones, in this order, instead of those before; [] is the base model.

        Args:
            lora_nickname: one name or several; the other arguments are scalars for all, or lists of that length.
            lora_path: safetensors files or folders; None for those that are loaded already.
            target: "all", "transformer", "transformer_2" or "text_encoder".
            merge_mode: "merge" into the weights, "dynamic" beside them, or "auto"; None: the setting lora_merge_mode.
            lora_alpha: replaces the alpha of the file.
            allow_partial: load a file of which some modules have no place in the model; they are listed as skipped.

        Raises: the AdapterError family, InvalidValue; the adapters are then as before.
        """
        if isinstance(lora_path, Path):
            lora_path = str(lora_path)
        elif lora_path is not None and not isinstance(lora_path, str):
            lora_path = [None if path is None else str(path) for path in lora_path]
        return self._change(
            set_change(
                lora_nickname,
                lora_path,
                target,
                strength,
                merge_mode,
                alpha=lora_alpha,
                allow_partial=allow_partial,
                roots=[Path(root) for root in self.config.lora_root] or None,
                default_mode=self.config.lora_merge_mode,
            )
        )

    def merge_lora_weights(self, target: LoraTarget = "all", strength: float = 1.0) -> LoraState:
        """Bring the adapters of the last `set_lora` back, merged, their strengths multiplied by `strength`."""
        return self._change(merge_change(target, strength))

    def unmerge_lora_weights(self, target: LoraTarget = "all") -> LoraState:
        """Bring the base weights of a target back, bit for bit; the adapters stay loaded."""
        return self._change(unmerge_change(target))

    def list_loras(self) -> LoraState:
        """What is loaded and what is active."""
        return self._engine.loras

    def unload_lora(self, lora_nickname: str) -> LoraState:
        """Forget an adapter. Raises: AdapterNotFound; AdapterInUse while it is active."""
        return self._change(UnloadLora(nickname=check_nickname(lora_nickname)))

    def _change(self, change: Change) -> LoraState:
        engine = self._engine
        engine.refresh()
        return engine.change(change)

    # --- memory -------------------------------------------------------------------------------------------------

    def sleep(self) -> int:
        """Give the memory of weights and caches back, on all ranks; returns the bytes that it was.

        Until `wake`, `generate` and changes of adapters raise Asleep. What is loaded and active stays so.
        """
        return self._engine.sleep().freed_bytes

    def wake(self) -> None:
        """Bring the weights back, with the adapters in them: the same seed gives the same bytes as before.

        Raises: WeightsUnavailable where the checkpoint's files are gone, OutOfMemory; it can be tried again.
        """
        self._engine.wake()

    def close(self) -> None:
        """Free the model and end its workers; the object cannot generate any more."""
        if not self._closed:
            self._live.close()
        self._closed = True

    def __enter__(self) -> DiffGenerator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def _engine(self) -> Engine:
        if self._closed:
            raise InvalidValue("This DiffGenerator is closed; make a new one with from_pretrained.")
        return self._live

    def _target(self, requests: Sequence[AnyRequest], output_path: str | Path | None) -> Target | None:
        from multimodal_gen.media.target import find_target

        outputs = sum(request.n for request in requests)
        return None if output_path is None else find_target(output_path, outputs, "output_path", self.card.media)

    def _result(
        self, request: AnyRequest, answer: Finished, output_type: OutputType, target: Target | None
    ) -> GenerationResult:
        arrays = [to_numpy(array) for array in answer.outputs]
        kind = "latent" if output_type == "latent" else self.card.media
        result = GenerationResult(
            prompt=request.prompt,
            images=[convert(array, output_type) for array in arrays] if kind == "image" else [],
            frames=convert_frames(arrays, output_type) if kind == "video" else None,
            fps=request.fps if isinstance(request, VideoRequest) else None,
            latents=stack(arrays) if kind == "latent" else None,
            seed=request.seeds[0],
            seeds=request.seeds,
            timings=answer.timings,
            request=request,
            prompt_tokens=answer.prompt_tokens,
            warnings=answer.warnings,
            merged=answer.merged,
        )
        if target is not None:
            result.paths = [self._write(result, i, array, target) for i, array in enumerate(arrays)]
        return result

    def recipe(self, result: GenerationResult, index: int) -> Recipe:
        """All that is needed to make image `index` of a result again."""
        from multimodal_gen.media.recipe import Recipe

        info = self.info
        repository, revision = self._origin
        return Recipe.of(
            result.request,
            index,
            device=info.device,
            dtype=info.dtype,
            attention_backend=info.attention_backend,
            deterministic=self.config.deterministic,
            quantize=self.config.quantize,
            kernels=self.config.kernels,
            compiled=self.config.compile,
            vae_tiling=self.config.vae_tiling,
            repository=repository,
            revision=revision,
            max_batch_tokens=self.config.max_batch_tokens,
            threads=self._engine.threads,
            merged=result.merged,
        )

    def _write(self, result: GenerationResult, index: int, pixels: np.ndarray, target: Target) -> Path:
        from multimodal_gen.media.files import file_name, write_exactly, write_new
        from multimodal_gen.media.formats import DEFAULT, encode, extension

        kind, request = target.format or DEFAULT[self.card.media], result.request
        data = encode(pixels, kind, fps=result.fps, compression=100, recipe=self.recipe(result, index))
        if target.file is not None:
            return write_exactly(target.file, data)
        name = file_name(request.seeds[index], request.prompt, extension(kind), datetime.now())
        return write_new(target.folder, name, data)


def check_makes_pictures(config: EngineConfig) -> None:
    """Raises: ConfigError where the settings name no model of pictures."""
    if config.model_path == NO_MODEL:
        raise ConfigError(
            "There is no model of pictures or videos: --model-path is none, as it is where only --llm-path is given.",
            param="model_path",
        )


def check_total(requests: Sequence[AnyRequest], max_queue_cost: int) -> None:
    """Raises: RequestTooLarge when the requests of one call need more token-steps together than may wait at once."""
    total = sum(request.cost for request in requests)
    if total > max_queue_cost:
        raise RequestTooLarge(
            f"The {len(requests)} prompt(s) need about {total:,} token-steps together and {max_queue_cost:,} may wait "
            "at once. Give fewer at a time, or raise max_queue_cost (--max-queue-cost)."
        )


def _merge(params: SamplingParams, overrides: dict[str, Any]) -> SamplingParams:
    for name in overrides:
        if name not in params.__struct_fields__:
            raise UnknownParameter(
                f"generate() has no setting {name!r}." + did_you_mean(name, params.__struct_fields__), param=name
            )
    return msgspec.structs.replace(params, **overrides)


def _collect(event: Event, answers: dict[str, Finished], on_step: Callable[[Progress], None] | None) -> None:
    if isinstance(event, Finished):
        answers[event.request_id] = event
    elif isinstance(event, Failed):
        error: MmgenError = from_code(event.error.code, event.error.message, event.error.param)
        raise error
    elif isinstance(event, Progress) and on_step is not None:
        on_step(event)
