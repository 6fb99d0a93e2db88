"""Weights of a language model in memory, in fewer bits, gone, and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from multimodal_gen.errors import ConfigError, CorruptModel
from tests.support.gguf_files import write_gguf
from tests.support.text_models import logits_of, make_model, open_model

pytestmark = [pytest.mark.unit]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SEQUENCES = [[5, 77, 300, 9, 14, 200, 31, 4, 4, 90, 12], [8, 9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


BITS = ["none", "int8", "int8-weights", "int4-weights"]


def logits(model: Any) -> torch.Tensor:
    return torch.cat(logits_of(model, SEQUENCES, 4))


def closeness(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Cosine between logits without their means."""
    found, wanted = found - found.mean(-1, keepdim=True), wanted - wanted.mean(-1, keepdim=True)
    return float(torch.cosine_similarity(found, wanted, dim=-1).min())


@pytest.mark.parametrize("bits", BITS)
def test_sleep_gives_the_memory_back_and_wake_reads_the_same_weights(bits: str, folder: Path) -> None:
    model = open_model(folder, llm_quantize=bits)
    before, held = logits(model), model.weights.nbytes
    assert 0 < held <= model.weights.needed
    model.sleep()
    assert model.weights.nbytes == 0
    model.wake()
    assert model.weights.nbytes == held
    assert torch.equal(logits(model), before)


def test_fewer_bits_take_less_memory_and_say_nearly_the_same(folder: Path) -> None:
    plain, eight, weights, four = (open_model(folder, llm_quantize=bits) for bits in BITS)
    wanted = logits(plain)
    assert closeness(logits(eight), wanted) > 0.99
    assert closeness(logits(weights), wanted) > 0.998
    assert closeness(logits(four), wanted) > 0.6  # random weights have no slack
    assert four.weights.nbytes < eight.weights.nbytes < 0.6 * plain.weights.nbytes


def test_four_bits_of_a_file_in_four_bits_lose_nothing_more(tmp_path: Path) -> None:
    path = write_gguf(make_model("llama", tmp_path / "model"), tmp_path / "model.gguf", "Q4_1")
    plain, four = open_model(path), open_model(path, llm_quantize="int4-weights")
    assert four.decoder.head is not None
    assert plain.decoder.head is not None
    four.decoder.head.packed = plain.decoder.head.packed  # it has 8 bits, and of 4 in the file they lose something
    torch.testing.assert_close(logits(four), logits(plain), atol=2e-3, rtol=2e-3)


def test_weights_in_many_files_are_the_same_model(tmp_path: Path) -> None:
    whole = make_model("qwen3", tmp_path / "whole")
    shards = make_model("qwen3", tmp_path / "shards", shard="200KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    assert torch.equal(logits(open_model(shards)), logits(open_model(whole)))


def test_a_file_that_changed_during_sleep_is_named_and_the_model_wakes_when_it_is_back(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "model")
    model = open_model(folder)
    before, path = logits(model), folder / "model.safetensors"
    raw = path.read_bytes()
    model.sleep()
    path.write_bytes(raw[:-8])
    for _ in range(2):
        with pytest.raises(CorruptModel, match=r"model\.safetensors was changed"):
            model.wake()
        assert model.weights.nbytes == 0
    path.write_bytes(raw)
    model.wake()
    assert torch.equal(logits(model), before)


def test_a_model_that_does_not_fit_is_refused_with_both_numbers(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs .* MB .* and 1\.0 kB are free") as raised:
        open_model(folder, device_memory_limit=1000)
    assert raised.value.param == "llm_path"


@pytest.mark.parametrize("wrong", ["missing", "shape", "strange"])
def test_weights_that_do_not_belong_to_their_configuration_are_named(wrong: str, tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "model")
    tensors, key = load_file(folder / "model.safetensors"), "model.layers.1.self_attn.k_proj.weight"
    if wrong == "missing":
        del tensors[key]
    elif wrong == "shape":
        tensors[key] = tensors[key][:16].clone()
    else:
        tensors["model.layers.1.self_attn.gate.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    message = {"missing": r"layers\.1\.attention\.qkv", "shape": key, "strange": r"self_attn\.gate"}[wrong]
    with pytest.raises(CorruptModel, match=message):
        open_model(folder)
