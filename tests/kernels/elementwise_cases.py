"""Calls of the operations between matrix products, on random numbers of awkward sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multimodal_gen.kernels import gated_norm, gated_product, gated_residual, norm_modulate, qk_norm_rope
from multimodal_gen.kernels.norm_modulate import Norm

# Of one rounding, relative and absolute.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = ((0, 16, 1), (1, 2, 1), (7, 38, 3), (130, 512, 2))  # tokens, width, segments
HEADS = ((0, 1, 1, 8), (5, 3, 2, 6), (33, 3, 2, 64), (9, 2, 1, 80), (4, 1, 1, 128))  # tokens, parts, normed, head width


@dataclass(frozen=True)
class Case:
    """One call of an operation, and the plain torch that it is compared with."""

    compute: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self, compute: Callable[..., Tensor]) -> list[Tensor]:
        """What comes out of copies of the arguments: the result, and the first argument, which may be overwritten."""
        args = [_copied(arg) for arg in self.args]
        return [compute(*args, **self.options), args[0]]


def _copied(arg: Any) -> Any:
    """Strides included."""
    if isinstance(arg, Tensor):
        same = torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device=arg.device)
        return same.copy_(arg)
    return arg


class Numbers:
    """Random tensors of one case."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype or self.dtype)

    def strided(self, rows: int, width: int) -> Tensor:
        """Rows that do not lie end to end."""
        return self(rows, width + 3)[:, :width]

    def index(self, rows: int, segments: int) -> Tensor:
        """Which segment each of the rows belongs to."""
        return torch.randint(segments, (rows,), generator=self.generator, dtype=torch.int32)


def modulations(dtype: torch.dtype) -> Iterator[Case]:
    """Norms with scale and shift, in the dtype of the tokens and in float32."""
    for rows, width, segments in SHAPES:
        make = Numbers(dtype, rows + width)
        for wide in (dtype, torch.float32):
            x, index = make.strided(rows, width), make.index(rows, segments)
            scale, shift = make(segments, width, dtype=wide), make(segments, width, dtype=wide)
            ours, plain = norm_modulate.rms_norm_scale, norm_modulate.rms_norm_scale_reference
            yield Case(ours, plain, (x, scale, index, 1e-6), {})
            yield Case(ours, plain, (x, scale, None, 1e-2), {})
            ours, plain = norm_modulate.layer_norm_scale_shift, norm_modulate.layer_norm_scale_shift_reference
            yield Case(ours, plain, (x, scale, shift, index, 1e-5), {})
            yield Case(ours, plain, (x, scale, None, None, 1e-5), {})


def residuals(dtype: torch.dtype) -> Iterator[Case]:
    """Sums with and without gate, norm before and norm after."""
    for rows, width, segments in SHAPES:
        make = Numbers(dtype, rows + width)
        for wide in (dtype, torch.float32):
            x, y, index = make(rows, width), make.strided(rows, width), make.index(rows, segments)
            gate, scale, shift = (make(segments, width, dtype=wide) for _ in range(3))
            ours, plain = gated_residual.gated_residual_, gated_residual.gated_residual_reference_
            for args in ((gate, index, None), (gate, index, 1e-5), (gate, None, 1e-5), (None, None, None)):
                yield Case(ours, plain, (x, y, *args), {})
            fused, apart = gated_residual.gated_residual_norm_, gated_residual.gated_residual_norm_reference_
            rms, layer = Norm("rms", scale, None, index, 1e-5), Norm("layer", scale, shift, None, 1e-6)
            yield Case(fused, apart, (x, y, gate, index, 1e-5, rms), {})
            yield Case(fused, apart, (x, y, None, None, None, layer), {})


def rotations(dtype: torch.dtype) -> Iterator[Case]:
    """Norms of each head and of all together, turned in both layouts or not at all."""
    for rows, parts, normed, width in HEADS:
        make, heads = Numbers(dtype, rows + width), 3
        angles = make(rows, width // 2, dtype=torch.float32) * 100
        turns = torch.stack((angles.cos(), angles.sin()), 1)
        x = make(rows, parts + 1, heads, width)[:, :parts]  # tokens do not lie end to end
        squares = make(rows, normed, dtype=torch.float32).square()
        for options in ({}, {"pairs": "halves"}):
            ours, plain = qk_norm_rope.qk_norm_rope_, qk_norm_rope.reference_
            yield Case(ours, plain, (x, make(normed, width), turns, 1e-5), options)
            yield Case(ours, plain, (x, make(normed, heads * width), turns, 1e-6), options)
            yield Case(ours, plain, (x, make(normed, heads * width), turns, 1e-6), {**options, "mean_square": squares})
        yield Case(ours, plain, (x, make(normed, width), None, 1e-5), {})
        yield Case(ours, plain, (x, make(normed, heads * width), None, 1e-5), {})


def activations(dtype: torch.dtype) -> Iterator[Case]:
    """Gated products and GELU."""
    for rows, width, _ in SHAPES:
        make = Numbers(dtype, rows + width)
        both = make.strided(rows, 2 * width) * 4
        for activation in ("silu", "gelu_tanh"):
            ours, plain = gated_product.gated_product, gated_product.gated_product_reference
            yield Case(ours, plain, (*both.chunk(2, -1), activation), {})
        x = make(rows, width) * 4
        for bias in (None, make(width)):
            yield Case(gated_product.gelu_tanh_, gated_product.gelu_tanh_reference_, (x, bias), {})


def gated_norms(dtype: torch.dtype) -> Iterator[Case]:
    """Both kinds of norms, both orders, in groups."""
    for rows, width, _ in SHAPES:
        make = Numbers(dtype, rows + width)
        x, gate, weight, bias = make.strided(rows, width), make(rows, width), make(width), make(width)
        for kind in ("rms", "layer"):
            for order in ("gate_first", "norm_first"):
                options = {"kind": kind, "order": order, "groups": 2}
                yield Case(gated_norm.gated_norm, gated_norm.reference, (x, gate, weight, bias, 1e-5), options)
        single = x, None, weight.float(), None, 1e-5
        yield Case(gated_norm.gated_norm, gated_norm.reference, single, {"kind": "rms"})


FAMILIES = {
    "norm_modulate": modulations,
    "gated_residual": residuals,
    "qk_norm_rope": rotations,
    "gated_product": activations,
    "gated_norm": gated_norms,
}
