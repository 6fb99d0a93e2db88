"""Ranks that share a language model hold their pieces of its adapters, and say what one process says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from multimodal_gen.parallel.degrees import Degrees
from multimodal_gen.parallel.mesh import Mesh
from tests.dist.text_lora_cases import NAMES, answers
from tests.support.ranks import Ranks
from tests.support.text_adapters import write_random
from tests.support.text_core import make_text_folder
from tests.support.text_models import open_model

pytestmark = [pytest.mark.dist]


@pytest.mark.parametrize(("size", "heads", "places"), [(2, 6, 8), (2, 6, 1), (4, 8, 2)])
def test_ranks_say_what_one_process_says(size: int, heads: int, places: int, ranks: Ranks, tmp_path: Path) -> None:
    """With 4 ranks and 2 heads of keys, pairs of ranks hold the same piece of the keys' factors."""
    folder = make_text_folder("llama", tmp_path / "model", num_attention_heads=heads)
    config = open_model(folder).config
    for seed, name in enumerate(NAMES):
        write_random(tmp_path / f"{name}.safetensors", config, seed=seed)
    case = {"path": str(folder), "adapters": str(tmp_path), "places": places}
    alone = answers(Mesh.solo(), **case)
    assert len({tuple(alone[f"{name} 0"].tolist()) for name in ("base", *NAMES)}) == 3
    for found in ranks.run(Degrees(tp=size), "tests.dist.text_lora_cases:answers", **case):
        assert found.keys() == alone.keys()
        for name, tokens in alone.items():
            assert torch.equal(found[name], tokens), name
