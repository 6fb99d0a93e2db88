"""What decoders of pictures and of videos have in common. Pixels are [F, H, W, C], channels last, contiguous.

Modules hold the checkpoint's tensors under its names and shapes; what computes are the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal_gen.attention.native import wins
from multimodal_gen.errors import CorruptModel
from multimodal_gen.kernels.packed_attention import packed_attention


class Filter(nn.Module):
    """The weight [out, in, *sides] and the bias of a convolution."""

    def __init__(self, channels: int, out: int, *sides: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, channels, *sides), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out), requires_grad=False)


class Pointwise(Filter):
    """A 1x1 convolution, with as many sides of one as the checkpoint gives it."""

    def forward(self, x: Tensor) -> Tensor:
        """[F, H, W, in] → [F, H, W, out]."""
        out, channels = self.weight.shape[:2]
        # To oneDNN as a convolution: in float32 the BLAS is half as fast (kernels/float32_product.py).
        y = F.conv2d(x.permute(0, 3, 1, 2), self.weight.view(out, channels, 1, 1), self.bias)
        return y.permute(0, 2, 3, 1).contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head over all pixels of a frame: [F, pixels, C] each → [F, pixels, C]."""
    if wins(q):
        lengths = (q.shape[1],) * len(q)
        queries, keys, values = (x.flatten(0, 1)[:, None] for x in (q, k, v))
        return packed_attention(queries, keys, values, lengths, lengths).view(q.shape)
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


def expect(config: Mapping[str, Any], **values: object) -> None:
    """Refuse what this decoder does not compute. Raises: CorruptModel."""
    for name, value in values.items():
        if config.get(name, value) != value:
            raise CorruptModel(
                f"vae/config.json: {name} is {config[name]!r}, and this decoder is built for {value!r}. The weights of "
                "another kind of autoencoder cannot be used here."
            )
