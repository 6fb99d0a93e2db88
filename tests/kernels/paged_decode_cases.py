"""What the Triton kernel computes in Triton's interpreter: run as a program, because the interpreter is chosen when a
kernel is defined."""

from __future__ import annotations

import json
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "one page": {"lengths": [5], "page": 16},
    "whole tiles": {"lengths": [64, 128], "page": 16},
    "many lengths": {"lengths": [1, 63, 65, 200, 129], "page": 16},
    "pages of one token": {"lengths": [70, 3], "page": 1},
    "odd pages": {"lengths": [97, 12, 33], "page": 7},
    "no sharing of keys": {"lengths": [40, 90], "heads": 4, "kv_heads": 4},
    "all share keys": {"lengths": [40, 90], "heads": 6, "kv_heads": 1},
    "more than sixteen share keys": {"lengths": [70], "heads": 20, "kv_heads": 1},
    "odd width": {"lengths": [33, 100], "dim": 40},
    "wide": {"lengths": [80], "dim": 128},
    "split": {"lengths": [300, 20, 257], "splits": 4},
    "split in three": {"lengths": [500, 1, 192], "splits": 3},
    "split beyond the shortest": {"lengths": [10, 600], "splits": 5, "page": 4},
    "half precision": {"lengths": [1, 63, 65, 200], "dtype": "float16"},
    "half precision, split": {"lengths": [300, 20], "dtype": "float16", "splits": 2},
}
# The interpreter multiplies the bits of bfloat16, not its numbers.
ON_A_GPU = {**CASES, "bfloat16": {"lengths": [1, 65, 200], "dtype": "bfloat16"}}


def interpret(case: dict[str, Any], device: str = "cpu") -> float:
    """The largest difference from the reference. Pages that nobody has hold NaN."""
    import torch

    from multimodal_gen.kernels.paged_decode import paged_decode, reference

    lengths, page = case["lengths"], case.get("page", 16)
    heads, kv_heads, dim = case.get("heads", 9), case.get("kv_heads", 3), case.get("dim", 64)
    dtype = getattr(torch, case.get("dtype", "float32"))
    generator = torch.Generator().manual_seed(0)
    need = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(need) + 2, generator=generator).tolist()
    cache = torch.full((2, len(order), kv_heads, page, dim), float("nan"), dtype=dtype)
    table = torch.full((len(lengths), max(need)), order[-1], dtype=torch.int32)
    for index, (count, length) in enumerate(zip(need, lengths, strict=True)):
        own = torch.tensor([order.pop(0) for _ in range(count)])
        table[index, :count] = own
        filled = torch.randn(2, count * page, kv_heads, dim, generator=generator).to(dtype)
        filled[:, length:] = float("nan")
        cache[:, own] = filled.unflatten(1, (count, page)).transpose(2, 3)
    states = torch.randn(len(lengths), heads + 2, dim, generator=generator).to(dtype)
    q = states[:, :heads]  # as it lies beside keys and values
    counts = torch.tensor(lengths, dtype=torch.int32)
    q, cache, table, counts = (tensor.to(device) for tensor in (q, cache, table, counts))
    found = paged_decode(q, cache, table, counts, case.get("splits", 1), max(lengths))
    return float((found.float() - reference(q, cache, table, counts).float()).abs().max())


def backend() -> float:
    """The same between `TritonPaged` and the reference of backends, for spans of one token and of more."""
    import torch

    from multimodal_gen.attention.paged import Reference
    from multimodal_gen.attention.paged_triton import TritonPaged
    from multimodal_gen.llm.batch import Batch, Span

    generator = torch.Generator().manual_seed(0)
    cache = [torch.randn(2, 40, 2, 4, 16, generator=generator)]
    spans = [Span([1], 20, range(6)), Span([1], 0, [6]), Span([1] * 5, 9, [7, 9, 8, 10]), Span([1], 3, [11])]
    worst = 0.0
    for chosen in (spans, spans[:2], spans[2:]):
        batch = Batch.of(chosen, 4, torch.device("cpu"))
        q, kv = (torch.randn(batch.tokens, *shape, 16, generator=generator) for shape in ((6,), (2, 2)))
        found, wanted = (way.plan(batch, cache)(0, q, kv) for way in (TritonPaged(), Reference()))
        worst = max(worst, float((found - wanted).abs().max()))
    return worst


if __name__ == "__main__":
    print(json.dumps({name: interpret(case) for name, case in CASES.items()} | {"backend": backend()}))
