"""`kernels/ring_merge.py` in Triton: a program per token and head."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # tokens and heads of a program


@triton.jit
def _ring_merge(out_ptr, lse_ptr, more_ptr, more_lse_ptr, count, dim, rows: tl.constexpr, width: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows), tl.arange(0, width)
    here = row < count
    lse = tl.load(lse_ptr + row, mask=here, other=0.0)
    more_lse = tl.load(more_lse_ptr + row, mask=here, other=0.0)
    top = tl.maximum(lse, more_lse)
    finite = tl.where(top == float("-inf"), 0.0, top)
    ours, theirs = tl.exp(lse - finite), tl.exp(more_lse - finite)
    total = ours + theirs
    safe = tl.where(total > 0, total, 1.0)

    at, inside = row[:, None] * dim + column[None, :], here[:, None] & (column < dim)[None, :]
    out = tl.load(out_ptr + at, mask=inside, other=0.0)
    more = tl.load(more_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out * (ours / safe)[:, None] + more * (theirs / safe)[:, None], mask=inside)
    tl.store(lse_ptr + row, finite + tl.log(safe), mask=here & (total > 0))


def ring_merge_(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Arguments as checked by `kernels.ring_merge`."""
    more, more_lse = more.contiguous(), more_lse.contiguous()
    count, dim = lse.numel(), out.shape[2]
    if count:
        width = triton.next_power_of_2(dim)
        _ring_merge[(triton.cdiv(count, ROWS),)](out, lse, more, more_lse, count, dim, rows=ROWS, width=width)
