"""Adapters in `LLM`: loaded from the start or later, named by calls, evicted, gone with an engine and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from multimodal_gen import LLM
from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.cards import describe
from multimodal_gen.errors import AdapterLimit, AdapterNotFound, ConfigError, InvalidValue
from tests.support.text_adapters import write_random
from tests.support.text_core import make_text_folder
from tests.support.text_models import open_model

pytestmark = [pytest.mark.unit]

SMALL: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": "16MiB", "threads": 1}
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 6}
PROMPT = "a red apple"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `model/`, adapters beside it."""
    root = tmp_path_factory.mktemp("llm")
    config = open_model(make_text_folder("qwen3", root / "model", vocab_size=512)).config
    for seed, name in enumerate("abc"):
        write_random(root / f"{name}.safetensors", config, seed=seed)
    return root


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(
        str(folder / "model"), max_loaded_loras=2, lora_paths=[f"a={folder / 'a.safetensors'}:pinned"], **SMALL
    ) as made:
        yield made


def said(llm: LLM, lora: str | None = None) -> tuple[int, ...]:
    return llm.generate(PROMPT, lora=lora, **GREEDY)[0].token_ids


def test_calls_name_adapters_and_the_least_used_leaves(llm: LLM, folder: Path) -> None:
    base, a = said(llm), said(llm, "a")
    info = llm.load_lora_adapter("b", str(folder / "b.safetensors"))
    assert info.rank == 4
    b = said(llm, "b")
    assert len({base, a, b}) == 3
    llm.load_lora_adapter("c", str(folder / "c.safetensors"))
    assert list(llm.lora_adapters) == ["a", "c"]
    with pytest.raises(AdapterNotFound, match="'b'"):
        said(llm, "b")
    llm.load_lora_adapter("c", str(folder / "b.safetensors"), pinned=True)
    assert said(llm, "c") == b
    with pytest.raises(AdapterLimit):
        llm.load_lora_adapter("d", str(folder / "b.safetensors"))
    llm.unload_lora_adapter("a")
    assert list(llm.lora_adapters) == ["c"]
    assert said(llm) == base


def test_what_is_wrong_is_told_and_changes_nothing(llm: LLM, folder: Path) -> None:
    before = llm.lora_adapters
    with pytest.raises(AdapterNotFound):
        llm.load_lora_adapter("b", str(folder / "nothing.safetensors"))
    with pytest.raises(InvalidValue):
        llm.load_lora_adapter("no name", str(folder / "b.safetensors"))
    with pytest.raises(InvalidValue):
        llm.load_lora_adapter("b", str(folder / "b.safetensors"), lora_alpha=-1.0)
    with pytest.raises(AdapterNotFound):
        llm.unload_lora_adapter("b")
    assert llm.lora_adapters == before


def test_adapters_outlive_an_engine_that_is_not_to_be_trusted_any_more(llm: LLM) -> None:
    a = said(llm, "a")
    side = llm._live.side  # type: ignore[attr-defined]
    side.core._failures = 100
    assert said(llm, "a") == a
    assert llm._live.side is not side  # type: ignore[attr-defined]


def test_adapters_that_are_not_there_fail_the_start(folder: Path) -> None:
    with pytest.raises(AdapterNotFound):
        LLM(str(folder / "model"), lora_paths=["a=/nowhere/a.safetensors"], **SMALL)
    with pytest.raises(ConfigError, match="--lora-paths"):
        describe(EngineConfig(lora_paths=["a=/nowhere/a.safetensors"]))
