"""Logits of the decoder against those of transformers, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.gguf_files import write_gguf
from tests.support.text_models import FAMILIES, logits_of, make_model, open_model, reference

pytestmark = [pytest.mark.parity]

LENGTHS = (1, 9, 4, 23)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True}),
    "odd widths": ("llama", {"intermediate_size": 200}),
    "own head width": ("llama", {"head_dim": 20}),
    "one head of keys": ("qwen2", {"num_key_value_heads": 1}),
    "as many heads of keys": ("qwen3", {"num_key_value_heads": 6}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
            }
        },
    ),
    "yarn": (
        "qwen3",
        {
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "beta_fast": 8.0},
                "original_max_position_embeddings": 64,
            }
        },
    ),
}


def sequences(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.no_grad()
def expected(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0].float()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    folder = make_model(family, tmp_path / "model", **changes)
    theirs, ours = reference(folder), open_model(folder)
    for chunk in (None, 5, 1):
        for ids, logits in zip(sequences(), logits_of(ours, sequences(), chunk), strict=True):
            torch.testing.assert_close(logits, expected(theirs, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_halves_differ_from_transformers_by_rounding_only(family: str, dtype: str, tmp_path: Path) -> None:
    half = getattr(torch, dtype)
    folder = make_model(family, tmp_path / "model", dtype=half)
    exact, rounded, ours = reference(folder), reference(folder, half), open_model(folder, dtype)
    wanted = torch.cat([expected(exact, ids) for ids in sequences()])
    theirs = torch.cat([expected(rounded, ids) for ids in sequences()]) - wanted
    for chunk in (None, 1):
        error = torch.cat(logits_of(ours, sequences(), chunk)) - wanted
        assert error.square().mean() < 1.5 * theirs.square().mean()


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "Q4_1"), ("llama", "F16"), ("qwen2", "Q4_0"), ("qwen3", "Q8_0")]
)
def test_gguf_logits_are_those_of_transformers_on_the_same_file(family: str, kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    own = {"head_dim": 128} if family == "qwen3" else {}  # transformers reads no other from GGUF
    path = write_gguf(make_model(family, tmp_path / "model", **own), tmp_path / "model.gguf", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    for ids, logits in zip(sequences(), logits_of(open_model(path), sequences()), strict=True):
        torch.testing.assert_close(logits, expected(theirs, ids), atol=1e-4, rtol=1e-4)


def test_divisors_of_frequencies_in_a_gguf_file_are_llama3s_scaling(tmp_path: Path) -> None:
    scaling = VARIANTS["llama3"][1]
    folder = make_model("llama", tmp_path / "model", **scaling)
    theirs = reference(folder)
    plain = 1.0 / scaling["rope_parameters"]["rope_theta"] ** (torch.arange(0, 16, 2) / 16)
    divisors = (plain / theirs.model.rotary_emb.inv_freq).numpy()
    path = write_gguf(folder, tmp_path / "model.gguf", "F32", {"rope_freqs.weight": divisors})
    for ids, logits in zip(sequences(), logits_of(open_model(path), sequences()), strict=True):
        torch.testing.assert_close(logits, expected(theirs, ids), atol=1e-4, rtol=1e-4)


def test_smollm2_logits_are_those_of_transformers(smollm2_by_transformers: Any) -> None:
    prompt = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    (logits,) = logits_of(open_model("smollm2"), [prompt], 7)
    torch.testing.assert_close(logits, expected(smollm2_by_transformers, prompt), atol=1e-3, rtol=1e-3)
