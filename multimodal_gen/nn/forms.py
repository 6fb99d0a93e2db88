"""In which form a layer's weight is computed with: as it was read, packed for the processor, or in fewer bits.

A layer that has a form (`Linear.packed`) holds nothing else: its `weight` keeps shape, dtype and device, and has memory
only while the loader fills it (`filled`). Whatever changes a weight (an adapter that is merged, a model that wakes up)
goes through the loader, so there is no second way to a form, and none that could be forgotten.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from multimodal_gen.kernels import blocked_linear, packed_linear
from multimodal_gen.kernels.blocked_linear import BlockedWeight
from multimodal_gen.kernels.packed_linear import PackedWeight
from multimodal_gen.nn.linear import FusedLinear, Linear, Packed
from multimodal_gen.nn.mlp import SwiGLU
from multimodal_gen.nn.precision import compute_dtype

Formed = Linear | FusedLinear
TOKENS = 32  # that `loss` looks at


@dataclass(frozen=True)
class Form:
    """One way to hold a weight."""

    pack: Callable[[Tensor], Packed]  # weight [out, in] → what is computed with; the weight may be let go of
    bits: float  # per number of the weight, scales included
    exact: bool  # whether it has all bits of the weight
    # Whether a layer that streams takes it in every pass, too: because its sums are others than those of the weight as
    # it was read. Where they are the same, the time for packing is not won back in one pass.
    passing: bool


# What a layer takes in fewer bits, or None; and whether its halves are wanted together (gate and up).
Fewer = Callable[[Formed, bool], Form | None]


def packed_form(shape: Sequence[int], dtype: torch.dtype, device: torch.device, halves: bool = False) -> Form | None:
    """An order that the processor reads well, where there is one. `halves`: gate and up are wanted together.

    Our own kernel multiplies bfloat16: as fast as oneDNN at thousands of tokens, up to 1.8 times at tens of them, and
    from three tokens on sums do not depend on how many there are. float32 and what it does not take go to oneDNN.
    """
    if device.type != "cpu" or compute_dtype(dtype, device) != dtype:
        return None
    bits = 8 * dtype.itemsize
    if dtype is torch.bfloat16 and not blocked_linear.unavailable(shape, dtype, dtype):
        return Form(partial(BlockedWeight, halves=halves), bits, exact=True, passing=True)
    if packed_linear.unavailable(dtype):
        return None
    return Form(PackedWeight, bits, exact=True, passing=dtype is torch.float32)


def choose(model: nn.Module, device: torch.device, fewer: Fewer, high: Sequence[str]) -> dict[Formed, Form]:
    """The forms of a model's layers; those that are computed with as they were read are left out.

    Args:
        fewer: what a layer takes in fewer bits.
        high: patterns of names of layers that keep their bits.
    """
    found: dict[Formed, Form] = {}
    pairs = {module.gate_up for module in model.modules() if isinstance(module, SwiGLU)}
    for name, layer in model.named_modules():
        if not isinstance(layer, Formed):
            continue
        stays = any(re.fullmatch(pattern, name) for pattern in high)
        weight, halves = layer.weight, layer in pairs
        form = (None if stays else fewer(layer, halves)) or packed_form(weight.shape, weight.dtype, device, halves)
        if form is not None:
            found[layer] = form
    return found


@contextmanager
def filled(layer: Formed, form: Form, losses: dict[Formed, float]) -> Iterator[None]:
    """Inside, the layer's weight has memory, zero where it is padded; afterwards the layer has it in its form.

    When filling fails, the layer keeps what it had. In `losses` it says what fewer bits lose (`loss`).
    """
    weight = layer.weight
    storage = weight.untyped_storage()
    storage.resize_(weight.nbytes)
    try:
        for view in layer.padding():
            view.zero_()
        yield
        packed = form.pack(weight.detach())
        if not form.exact:
            losses[layer] = loss(weight, packed)
        layer.packed = packed
    finally:
        storage.resize_(0)


def loss(weight: Tensor, packed: Packed) -> float:
    """‖packed(x) - x·Wᵀ‖ / ‖x·Wᵀ‖ for a few normally distributed tokens, always the same: those of real prompts have
    outliers, which cost more."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    exact = x.float() @ weight.float().T
    size = float(exact.norm())
    return float((packed(x, None) - exact).norm()) / size if size else 0.0


def losses_in_words(model: nn.Module, losses: Mapping[Formed, float]) -> str:
    """For the log."""
    names = {layer: name for name, layer in model.named_modules()}
    worst = max(losses, key=lambda layer: losses[layer])
    return (
        f"products of {len(losses)} layers with random tokens are {median(losses.values()):.2%} off in the median, "
        f"{losses[worst]:.2%} at most ({names[worst]})"
    )


def formed_bytes(forms: Mapping[Formed, Form]) -> int:
    """What layers will hold in these forms."""
    return sum(int(layer.weight.numel() * form.bits / 8) for layer, form in forms.items())
