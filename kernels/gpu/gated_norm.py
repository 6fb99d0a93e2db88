"""`kernels/gated_norm.py` in Triton: a program per group of several tokens.

As many tokens per program as keep every multiprocessor busy twice, at most `MAX_ROWS` (as mamba_ssm's
`layernorm_gated`).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from multimodal_gen.kernels.gpu.rows import processors, warps_of, width_of

MAX_ROWS = 4
MAX_NUMBERS = 8192  # of a program, so that a row's numbers stay in registers


@triton.jit
def _gated_norm(
    x_ptr,
    gate_ptr,  # None: no gate
    weight_ptr,
    bias_ptr,  # None: no bias
    y_ptr,
    x_row,
    gate_row,
    tokens,
    dim,
    group,  # numbers that are normalised together
    eps,
    layer: tl.constexpr,
    gate_first: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    within = tl.arange(0, width)
    column = tl.program_id(1) * group + within
    mask = (row < tokens)[:, None] & (within < group)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + row[:, None] * gate_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        gate *= tl.sigmoid(gate)
        if gate_first:
            x *= gate
    if layer:
        x = tl.where(mask, x - (tl.sum(x, 1) / group)[:, None], 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 1) / group + eps)[:, None]
    y *= tl.load(weight_ptr + column, mask=within < group, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=within < group, other=0.0).to(tl.float32)[None, :]
    if gate_ptr is not None and not gate_first:
        y *= gate
    tl.store(y_ptr + row[:, None] * dim + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def rows_of(tokens: int, groups: int, width: int, many: int) -> int:
    """Tokens of a program, on `many` multiprocessors."""
    enough = triton.next_power_of_2(triton.cdiv(tokens * groups, 2 * many))
    return max(1, min(enough, MAX_ROWS, MAX_NUMBERS // width))


def gated_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    kind: Literal["rms", "layer"] = "rms",
    groups: int = 1,
    order: Literal["gate_first", "norm_first"] = "gate_first",
) -> Tensor:
    """Arguments as checked by `kernels.gated_norm`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    gate = gate if gate is None or gate.stride(1) == 1 else gate.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, dim = x.shape
    if not tokens:
        return y
    group = dim // groups
    width = width_of(group)
    rows = rows_of(tokens, groups, width, processors(x.device))
    _gated_norm[(triton.cdiv(tokens, rows), groups)](
        x,
        gate,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        x.stride(0),
        0 if gate is None else gate.stride(0),
        tokens,
        dim,
        group,
        eps,
        layer=kind == "layer",
        gate_first=order == "gate_first",
        rows=rows,
        width=width,
        num_warps=warps_of(rows * width),
    )
    return y
