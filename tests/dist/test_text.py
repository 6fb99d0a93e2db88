"""Language models on several ranks against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal_gen.errors import ConfigError
from multimodal_gen.parallel.degrees import Degrees
from multimodal_gen.parallel.mesh import Mesh
from tests.dist.text_cases import SEQUENCES, every_layer
from tests.support.gguf_files import write_gguf
from tests.support.ranks import Ranks
from tests.support.text_models import logits_of, make_model, open_model

pytestmark = [pytest.mark.dist]

CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "llama": (2, "llama", {}),
    "keys held twice": (4, "llama", {"num_attention_heads": 8}),
    "tied": (2, "llama", {"tie_word_embeddings": True}),
    "vocabulary that does not divide": (2, "llama", {"vocab_size": 321}),
    "biases": (2, "qwen2", {}),
    "biases of keys held twice": (4, "qwen2", {"num_attention_heads": 4}),
    "norms per head": (3, "qwen3", {"num_key_value_heads": 3, "vocab_size": 321, "intermediate_size": 225}),
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_share_a_model_compute_its_logits(case: str, ranks: Ranks, tmp_path: Path) -> None:
    size, family, changes = CASES[case]
    folder = make_model(family, tmp_path / "model", **changes)
    alone = logits_of(open_model(folder), SEQUENCES, 4)
    results = ranks.run(Degrees(tp=size), "tests.dist.text_cases:logits", path=str(folder))
    for found in results:
        for index, logits in enumerate(alone):
            torch.testing.assert_close(found[f"logits_{index}"], logits, atol=1e-4, rtol=1e-4)
            assert torch.equal(found[f"logits_{index}"], results[0][f"logits_{index}"])  # all ranks choose alike
            assert torch.equal(found[f"logits_{index}"], found[f"again_{index}"])
    heads = changes.get("num_key_value_heads", 2)
    assert {found["cache"].shape[2] for found in results} == {max(1, heads // size)}


def test_ranks_share_a_gguf_file_whose_rows_stand_in_pairs(ranks: Ranks, tmp_path: Path) -> None:
    path = write_gguf(make_model("llama", tmp_path / "model"), tmp_path / "model.gguf", "Q8_0")
    alone = logits_of(open_model(path), SEQUENCES, 4)
    for found in ranks.run(Degrees(tp=2), "tests.dist.text_cases:logits", path=str(path)):
        for index, logits in enumerate(alone):
            torch.testing.assert_close(found[f"logits_{index}"], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("heads", [6, 8])
def test_ranks_share_adapters_as_they_share_the_weights(heads: int, ranks: Ranks, tmp_path: Path) -> None:
    size = 2 if heads == 6 else 4  # of which two hold the same keys
    folder = make_model("llama", tmp_path / "model", num_attention_heads=heads)
    model = open_model(folder)
    overlay, plain = every_layer(model), logits_of(model, SEQUENCES, 4)
    alone = logits_of(model, SEQUENCES, 4, (overlay, None, overlay))
    assert not torch.allclose(alone[0], plain[0], atol=0.1)
    assert torch.allclose(alone[1], plain[1], atol=1e-4)
    for found in ranks.run(Degrees(tp=size), "tests.dist.text_cases:adapted", path=str(folder)):
        for index, logits in enumerate(alone):
            torch.testing.assert_close(found[f"logits_{index}"], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "message"), [(4, "6 attention heads .* 4 ranks"), (3, "2 of keys .* 3 ranks"), (6, "width 224 .* 6 ranks")]
)
def test_heads_that_cannot_be_shared_out_are_refused_with_both_numbers(size: int, message: str, tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "model")
    with pytest.raises(ConfigError, match=message) as raised:
        open_model(folder, mesh=Mesh.imagined(Degrees(tp=size)), model_path="none")
    assert raised.value.param == "tp_size"


def test_beside_a_picture_model_each_rank_has_all_of_a_model_that_cannot_be_shared(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "model")
    model = open_model(folder, mesh=Mesh.imagined(Degrees(tp=4)), model_path="emoji-image")
    assert (model.ranks.size, model.decoder.kv_heads) == (1, 2)
