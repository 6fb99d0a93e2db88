"""Feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from multimodal_gen.kernels.blocked_linear import BlockedWeight
from multimodal_gen.kernels.gated_product import gated_product, gelu_tanh_
from multimodal_gen.nn.linear import FusedLinear, Linear, align
from multimodal_gen.nn.lowrank import Routed


class GeluMLP(nn.Module):
    """down(gelu(up(x))) with biases; `approximate` is torch's: "tanh" or "none"."""

    def __init__(self, dim: int, hidden: int, out: int, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.up = Linear(dim, hidden, bias=True)
        self.down = Linear(hidden, out, bias=True)

    def forward(self, x: Tensor, routing: Routed | None = None) -> Tensor:
        h = self.up(x, routing)
        h = gelu_tanh_(h) if self.approximate == "tanh" else F.gelu(h)
        return self.down(h, routing)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer, 2020); gate and up are one product, the hidden width is aligned.

    The extra hidden units are exact zeros: silu(0) · 0 meets zero columns of `down`.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = FusedLinear(dim, {"gate": hidden, "up": hidden}, multiple=16)
        self.down = Linear(hidden, dim, stored_in=align(hidden))

    def forward(self, x: Tensor, routing: Routed | None = None) -> Tensor:
        packed = self.gate_up.packed
        if routing is None and isinstance(packed, BlockedWeight) and packed.halves:  # gate and up are never written
            return self.down(packed.swiglu(x, self.gate_up.bias))
        gate, up = self.gate_up(x, routing).chunk(2, dim=-1)
        return self.down(gated_product(gate, up), routing)
