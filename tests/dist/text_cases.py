"""What ranks compute of a language model in these tests; each function runs on every rank of a mesh."""

from __future__ import annotations

import torch
from torch import Tensor

from multimodal_gen.llm.adapter_target import DECODER
from multimodal_gen.llm.loading import TextModel
from multimodal_gen.lora.adapter import Adapter
from multimodal_gen.lora.overlay import make_overlay
from multimodal_gen.lora.tree import AdaptedTree
from multimodal_gen.lora.updates import LowRank
from multimodal_gen.nn.lowrank import Overlay
from multimodal_gen.parallel.mesh import Mesh
from tests.support.text_models import logits_of, open_model

SEQUENCES = [[5, 77, 300, 9, 14, 200, 31], [8], [250, 3, 3, 90, 17, 6, 111, 42, 60, 7, 19]]


def logits(mesh: Mesh, path: str, dtype: str = "float32") -> dict[str, Tensor]:
    """Of every token of the sequences, and where they came from."""
    model = open_model(path, dtype, mesh)
    found = {f"logits_{index}": rows for index, rows in enumerate(logits_of(model, SEQUENCES, 4))}
    model.sleep()
    model.wake()
    found |= {f"again_{index}": rows for index, rows in enumerate(logits_of(model, SEQUENCES, 4))}
    return found | {"cache": model.new_cache(3, 4).layers[0]}


def adapted(mesh: Mesh, path: str) -> dict[str, Tensor]:
    """The same with an adapter of every layer on the first and the last sequence."""
    model = open_model(path, mesh=mesh)
    overlay = every_layer(model)
    return {f"logits_{i}": rows for i, rows in enumerate(logits_of(model, SEQUENCES, 4, (overlay, None, overlay)))}


def every_layer(model: TextModel) -> Overlay:
    """A random adapter of all matrices in the layers, or this rank's share of it."""
    generator, updates = torch.Generator().manual_seed(3), {}
    for key, (out, *rest) in model.tree.shapes.items():
        if "layers" in key and rest:
            down = torch.randn(3, rest[0], generator=generator) / rest[0] ** 0.5
            up = torch.randn(out, 3, generator=generator) * 0.3
            updates[key.removeprefix("model.")] = (LowRank(down, up, 1.0),)
    overlay = make_overlay(AdaptedTree(DECODER, model.tree), [(Adapter({DECODER.tree: updates}), 1.0)])
    assert overlay is not None
    return overlay
