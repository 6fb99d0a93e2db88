"""What ranks compute of a language model in these tests; each function runs on every rank of a mesh."""

from __future__ import annotations

from torch import Tensor

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
