"""Which family runs which checkpoint: one visible table, filled lazily."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.pipelines.contract import Pipeline, Spec
from multimodal_gen.request import ModelCard
from multimodal_gen.step_cache import NONE
from multimodal_gen.weights import hub
from multimodal_gen.weights.checkpoint import verify

if TYPE_CHECKING:
    from multimodal_gen.parallel.mesh import Mesh

NATIVE = (
    "multimodal_gen.pipelines.zimage.spec:SPEC",
    "multimodal_gen.pipelines.wan.spec:SPEC",
)
FALLBACK = "multimodal_gen.pipelines.diffusers_any.spec:SPEC"


def _import(target: str) -> Any:
    module, name = target.split(":")
    return vars(importlib.import_module(module))[name]


def families() -> list[Spec]:
    """The native families. A pipeline class that two of them claim is a bug."""
    specs: list[Spec] = [_import(target) for target in NATIVE]
    classes = [name for spec in specs for name in spec.pipeline_classes]
    assert len(classes) == len(set(classes)), f"two families claim one pipeline class: {classes}"
    return specs


def fallback() -> Spec:
    """The family that runs everything else through diffusers."""
    spec: Spec = _import(FALLBACK)
    return spec


def find(pipeline_class: str) -> Spec:
    """The native family of a pipeline class, else the fallback."""
    return next((spec for spec in families() if pipeline_class in spec.pipeline_classes), None) or fallback()


def bundled() -> list[str]:
    """Names of the models inside the package."""
    return hub.bundled()


def describe(config: EngineConfig) -> ModelCard:
    """Find the model, check its files and describe it, without torch.

    Raises: ModelNotFound, CorruptModel, RemoteCodeRefused, ConfigError.
    """
    folder = hub.resolve(config.model_path, revision=config.revision, local_files_only=config.local_files_only)
    checkpoint = verify(folder)
    name = Path(config.model_path.rstrip("/")).name or config.model_path
    spec = find(checkpoint.pipeline_class)
    if config.quantize != "none" and spec.high is None:
        raise ConfigError(
            f"--quantize {config.quantize} is for {', '.join(s.title for s in families() if s.high is not None)}; "
            f"{name} is a {checkpoint.pipeline_class}. Leave it out.",
            param="quantize",
        )
    _check_regions(config, spec, name, checkpoint.pipeline_class)
    card: ModelCard = _import(spec.describe)(name, folder)
    return with_step_cache(card, config)


def _check_regions(config: EngineConfig, spec: Spec, name: str, pipeline_class: str) -> None:
    """Raises: ConfigError for --compile and --cuda-graphs where they would do nothing."""
    for param, wanted in (("compile", config.compile), ("cuda_graphs", config.cuda_graphs)):
        flag = "--" + param.replace("_", "-")
        if wanted and spec is fallback():
            why = f"{flag}: {name} runs through diffusers ({pipeline_class}), whose layers are left as they are."
            raise ConfigError(f"{why} Leave it out.", param=param)
    if config.compile and config.deterministic:
        raise ConfigError(
            "--compile and --deterministic exclude one another: code is compiled anew as other shapes come, and rounds "
            "otherwise then.",
            param="compile",
        )


def with_step_cache(card: ModelCard, config: EngineConfig) -> ModelCard:
    """The card with what requests get that say nothing of step caches. Raises: ConfigError."""
    if config.step_cache != NONE and "step_cache" not in card.parameters:
        raise ConfigError(
            f"--step-cache {config.step_cache}: {card.name} runs through diffusers ({card.pipeline_class}), where "
            "every step is computed. Leave it out.",
            param="step_cache",
        )
    return msgspec.structs.replace(card, step_cache=config.step_cache)


def load(card: ModelCard, config: EngineConfig, mesh: Mesh | None = None) -> Pipeline:
    """Load the described model, or this rank's share of it; imports torch.

    Args:
        config: `device` is this rank's own.
        mesh: this rank's place among those that share the model, as `parallel.plan` allowed it; None: it is alone.

    Raises: CorruptModel, ConfigError.
    """
    from multimodal_gen.parallel.mesh import Mesh

    spec = find(card.pipeline_class)
    pipeline: Pipeline = _import(spec.pipeline)(card, config, mesh or Mesh.solo())
    return pipeline
